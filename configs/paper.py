"""The paper's grid: a task, a sparsity and, perhaps, ablations.

    python train.py --config configs/paper.py:qnli,0.60
    python train.py --config configs/paper.py:mnli,0.95,no_hidden,fixed

Tasks: `TASKS`. Sparsity: any; the paper has 0.60, 0.70, 0.75, 0.80, 0.85, 0.90 and
0.95, which is the default. Ablations: the names in `ABLATIONS`, applied in turn.

Needs the Hugging Face hub for bert-base-uncased and the data; without it add
--config.model.path=path/to/bert-base-uncased --config.data.path=path/to/qnli

Expected: about what cofi_jax/report/paper.py has of the paper (SST-2 at 95 %: accuracy
0.906; at 60 %: 0.930). Time: hours on one GPU for a large task, an hour or so for a
small one; not for a CPU, for which there is short.py.
"""

from collections.abc import Callable

from cofi_jax.config import Config
from cofi_jax.errors import reject

LARGE = ("mnli", "qqp", "qnli", "sst2")
SMALL = ("cola", "stsb", "mrpc", "rte", "wnli")
TASKS = (*LARGE, *SMALL, "squad")


def _without(*kinds):
    def change(config):
        config.prune.kinds = tuple(k for k in config.prune.kinds if k not in kinds)

    return change


def _fields(section, **values):
    return lambda config: vars(getattr(config, section)).update(values)


ABLATIONS: dict[str, Callable[[Config], None]] = {
    # Table 4, units that are not pruned.
    "no_hidden": _without("hidden"),
    "no_layers": _without("mha", "ffn"),
    "no_hidden_no_layers": _without("hidden", "mha", "ffn"),
    # Table 5, terms of the loss; alone, a term has weight 1.
    "no_distillation": _fields("distill", logits=0.0, layers=0.0),
    "logits_only": _fields("distill", logits=1.0, layers=0.0),
    # Table 11, the student layer that a teacher layer is compared with.
    "fixed": _fields("distill", match="fixed", num_layers=12),  # every layer
    "closest": _fields("distill", match="closest"),
    "ordered": _fields("distill", match="ordered"),
    # The authors' later advice: which teacher layers.
    "random": _fields("distill", taught="random"),
    # Appendix, another encoder.
    "roberta": _fields("model", path="roberta-base"),
}


def get_config(argument: str = "sst2") -> Config:
    """Appendix A for `task[,sparsity][,ablation...]`."""
    return build(argument, recipe)


def build(argument: str, recipe: Callable[[str], Config]) -> Config:
    """The recipe of a task with a sparsity and ablations.

    Raises:
      UserError: for a task, sparsity or ablation that there is not.
    """
    task, *words = argument.split(",")
    if task not in TASKS:
        raise reject("task", task, f"must be one of {', '.join(TASKS)}")
    config = recipe(task)
    if words and words[0] not in ABLATIONS:
        config.prune.targets = (_sparsity(words.pop(0)),)
    for word in words:
        if word not in ABLATIONS:
            raise reject("ablation", word, f"must be one of {', '.join(ABLATIONS)}")
        ABLATIONS[word](config)
    return config


def _sparsity(word):
    legal = f"must be in [0, 1), or an ablation: {', '.join(ABLATIONS)}"
    try:
        value = float(word)
    except ValueError as error:
        raise reject("sparsity", word, legal) from error
    if not 0 <= value < 1:
        raise reject("sparsity", word, legal)
    return value


def recipe(task: str) -> Config:
    """Appendix A of the paper; the rest are the defaults."""
    config = Config()
    config.data.task = task
    config.prune.epochs = 20
    config.prune.prepruning_epochs = 1
    config.prune.warmup_epochs = 2
    config.prune.learning_rate = 2e-5
    config.prune.mask_learning_rate = 0.01
    config.prune.multiplier_learning_rate = 0.01
    config.distill.logits = 0.1
    config.distill.layers = 0.9
    config.distill.temperature = 2.0
    config.finetune.epochs = 20
    config.finetune.learning_rate = 2e-5
    if task in SMALL:
        config.prune.epochs = 100
        config.prune.prepruning_epochs = 4
        config.prune.warmup_epochs = 20
        config.distill.match = "ordered"
        config.eval_every = 50
    if task == "squad":
        for stage in (config.teacher, config.prune, config.finetune):
            stage.batch_size = 16
            stage.learning_rate = 3e-5
        config.benchmark.seq_length = 384
    return config
