"""The recipe to begin with, for any encoder and any task: several models from one run.

    python train.py --config configs/fast.py:stsb \
        --config.model.path=path/to/encoder --config.data.path=path/to/stsb
    python train.py --config configs/fast.py:own,0.8,0.95,budget=6 \
        --config.model.path=path/to/encoder --config.data.path=path/to/rows \
        --config.data.columns=text

The argument is the task, then perhaps targets in rising order, which are 0.6, 0.8, 0.9
and 0.95 if there are none, and perhaps a budget: the epochs in which each model
recovers; the last one recovers for half as many more. The default budget follows from
the number of rows of the task; it is 4 for the task "own".

A target such as 8x is a speedup instead: the model is to be 8 times as fast as the
dense one, as the benchmark measures it (--config.benchmark.batch_size and so on). All
targets of a run are sparsities, or all are speedups.

The steps of one target do not suffice to go from the dense model to a high one, so the
targets 0.6, 0.8 and 0.9 (or 2x, 4x and 8x) are made on the way where they lie below the
last one, also if nobody asked for them. To have 0.7 and 0.95 alone, set
--config.prune.targets=0.7,0.95.

Each model is cut from the recovered one before, at once. The units that go are those
that the others can best make up for. The model is then fitted to the one before by
least squares, and all steps go into its recovery. In so few steps that mostly keeps
more than to learn masks (docs/results.md). To learn them all the same, for some epochs
a target, set --config.prune.epochs and .warmup_epochs.

Expected: with an encoder of 6 layers and 250 steps a target on 8,000 rows of SST-2, an
accuracy of 0.872 of 0.869 at 60 %, 0.857 at 80 %, 0.853 at 90 % and 0.838 at 95 %, the
means of three seeds (docs/results.md). Time: 34 to 39 minutes for these four targets on
one of two busy CPU cores.
"""

import math

from cofi_jax.config import Config
from cofi_jax.data.tasks import OWN
from cofi_jax.errors import reject
from configs import paper

TARGETS = (0.6, 0.8, 0.9, 0.95)
SPEEDUPS = (2.0, 4.0, 8.0)

# The training rows of the tasks. In batches of 32, the budget of a task of fewer rows
# than `_ROWS_TO_SEE` is of about 700 steps; that of a larger one is of two epochs.
ROWS = {
    "mnli": 392_702,
    "qqp": 363_846,
    "qnli": 104_743,
    "sst2": 67_349,
    "cola": 8_551,
    "stsb": 5_749,
    "mrpc": 3_668,
    "rte": 2_490,
    "wnli": 635,
    "squad": 87_599,
    OWN: 5_500,  # a guess
}
_ROWS_TO_SEE = 11_000  # at least, in half of the budget


def get_config(argument: str = "sst2") -> Config:
    """The recipe for `task[,target...][,budget=epochs]`.

    Raises:
      UserError: for a task, target or budget that there is not.
    """
    task, *words = argument.split(",")
    if task not in ROWS:
        raise reject("task", task, f"must be one of {', '.join(ROWS)}")
    budget = 2 * min(-(-_ROWS_TO_SEE // ROWS[task]), 10)
    if words and words[-1].startswith("budget="):
        budget = _epochs(words.pop().removeprefix("budget="))
    config = paper.recipe(task)
    config.prune.targets, config.prune.target_speedup = _targets(words)
    config.prune.kinds = ("mha", "head", "ffn", "intermediate")
    config.prune.constraint = "exact"
    config.prune.seeds = "compensated"
    config.prune.seed_batches = config.prune.reconstruction_batches = 16
    config.prune.epochs = config.prune.warmup_epochs = 0
    config.prune.prepruning_epochs = 0
    config.prune.mask_learning_rate = 0.05  # where epochs are set to learn masks
    config.prune.recover_epochs = budget
    config.finetune.epochs = budget + -(-budget // 2)
    config.finetune.schedule = "linear"
    config.teacher.learning_rate = 5e-5
    config.prune.learning_rate = config.finetune.learning_rate = 1e-4
    config.distill.match = "closest"
    config.benchmark.batch_size = 32
    config.benchmark.seq_length = 64
    config.eval_every = config.checkpoint_every = 200
    return config


def _epochs(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise reject("budget", text, "must be a whole number of epochs above 0")
    return int(text)


def _targets(words: list[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The sparsities and the speedups, one of which there are none of."""
    speeds = [word for word in words if word.endswith("x")]
    if speeds and len(speeds) < len(words):
        legal = "must be all sparsities, such as 0.95, or all speedups, such as 8x"
        raise reject("targets", ",".join(words), legal)
    asked = tuple(_target(word, word.removesuffix("x")) for word in words) or TARGETS
    usual = SPEEDUPS if speeds else TARGETS
    near = {"rel_tol": 0.01} if speeds else {"rel_tol": 0.0, "abs_tol": 1e-4}
    on_the_way = [
        target
        for target in usual
        if target < max(asked)
        # Targets that are nearer to each other are refused.
        and not any(math.isclose(target, each, **near) for each in asked)
    ]
    targets = tuple(sorted({*asked, *on_the_way}))
    return ((), targets) if speeds else (targets, ())


def _target(word: str, number: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        legal = "must be a number, or the last word a budget, such as budget=4"
        raise reject("target", word, legal) from error
