"""The examples that a training step takes in per second, beside PyTorch.

A turn is one pass over the same batches, whose rows are as long as a task's own. All
steps see the same examples. PyTorch sees them also in batches drawn at random, each
padded to its own longest row, as its users feed it.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, workload
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.config import Data, Distill
from cofi_jax.data import batches as batches_lib
from cofi_jax.data import sources, tasks
from cofi_jax.data.batches import Examples
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency_table, timing
from cofi_jax.models.bert import Encoder
from cofi_jax.models.spec import blocks
from cofi_jax.pruning import masks
from cofi_jax.pruning.latency import Curve, Table
from cofi_jax.training import objectives, teacher
from cofi_jax.training import step as step_lib

KINDS = ("masked", "plain", "finetune", "exact", "speedup")
_MASKED = ("masked", "exact", "speedup")
_KEPT_KINDS = ("masked", "finetune")  # These are timed with kept outputs, too.


class Work(NamedTuple):
    """The batches of a turn."""

    examples: Examples
    padded: Sequence[int]  # the length of each batch; all have equally many examples

    def rows(self) -> list[np.ndarray]:
        """Returns the places of each batch's examples."""
        return np.split(np.arange(len(self.examples)), len(self.padded))

    def batches(self) -> list[dict[str, np.ndarray]]:
        """Returns the padded batches, in the host's memory."""
        return [
            batches_lib.make_batch(
                self.examples, rows, length=length, batch_size=len(rows)
            )
            for length, rows in zip(self.padded, self.rows(), strict=True)
        ]


class Timed(NamedTuple):
    """A step to be timed."""

    turn: Callable[[], Any]
    work: Work
    flops: int  # the operations of a turn on real tokens


def measure(
    model: str,
    dtype: str,
    batch_size: int,
    seq_length: int,
    batches: int,
    data: str,
    task: str,
    repeats: int,
    torch_compile: bool,
    **sizes: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times the steps in turn.

    Args:
      model: see `workload.load`.
      dtype: of the matrix products.
      batch_size: sequences in a batch.
      seq_length: the tokens of random rows, or where those of `data` are cut.
      batches: how many there are in a turn.
      data: the rows, a folder or a name on the hub; "" for random ones.
      task: the task of the data.
      repeats: the turns of each step.
      torch_compile: whether PyTorch also runs compiled.
      **sizes: of a random model.

    Returns:
      The conditions, and a row for each step with
        `examples_per_second`
        `padding`           the fraction of its tokens that is padding
        `of_peak`           real tokens' `roofline.step_flops` over the matrix rate
        `masked_is_faster`  than this step, as a ratio, turn by turn

    Raises:
      UserError: for what is not there, and where the memory does not suffice.
    """
    load = functools.partial(workload.load, model, dtype=dtype, **sizes)
    if data:
        if not model:
            raise reject("model", "", "must be given with data: it has the tokenizer")
        found = tasks.find(Data(task, data, max_length=seq_length))
        subject = load(longest=found.max_length, task=found)
        found, columns = sources.load(found, ("train",))
        examples = found.tokenise(columns["train"], subject.tokenizer, training=True)
        buckets = batches_lib.bucket_lengths(found, examples.lengths)
        work = sampled(examples, buckets, batches, batch_size)
    else:
        length = seq_length or 64
        subject, count = load(longest=length), batches * batch_size
        rows = workload.random_rows(count, length, subject.dense.vocab_size)
        work = Work(rows, [length] * batches)
    count, tokens = len(work.examples), int(work.examples.lengths.sum())
    conditions = {
        "batches_by_length": dict(collections.Counter(work.padded)),
        "examples": count,
        "tokens": tokens,
        "dense": workload.described(subject.dense, subject.dense),
        "sliced": workload.described(subject.sliced, subject.dense),
    }
    with timing.memory_suffices(batch_size, max(work.padded)):
        steps = ours(subject, work)
        if reason := baselines.unfit(subject.dense):
            conditions["left_out"] = {"pytorch": reason}
        else:
            for compiled in (False, True) if torch_compile else (False,):
                steps |= _pytorch_steps(subject, steps["plain"], compiled)
        rates = roofline.rates(dtype)
        calls = {name: each.turn for name, each in steps.items()}
        timings = timing.side_by_side(
            calls, repeats=repeats, warmup=1, turn_ms=0, rest_ms=100
        )
    table = []
    for name, each in timings.items():
        median, low, high = each.spread_ms
        _, (_, padded), flops = steps[name]
        figures = {
            "examples_per_second": [1e3 * count / ms for ms in (median, high, low)],
            "padding": 1 - tokens * len(padded) / (sum(padded) * count),
            "of_peak": 1e3 * flops / median / rates["flops_per_second"],
            "masked_is_faster": timing.speedup(each, timings["masked"]),
        }
        table.append({"step": name} | figures)
    return conditions | {"rates": rates}, table


def sampled(
    examples: Examples, buckets: Sequence[int], count: int, batch_size: int
) -> Work:
    """Takes `count` full batches of an epoch, each padded length in proportion.

    Raises:
      UserError: where there are fewer full batches.
    """
    how = {"batch_size": batch_size, "buckets": buckets}
    plan = batches_lib.epoch_plan(examples.lengths, **how, seed=0, stage="", epoch=0)
    full = [each for each in plan if len(each[1]) == batch_size]
    if count > len(full):
        legal = f"must be at most {len(full)}, the full batches of an epoch"
        raise reject("batches", count, legal)
    full.sort(key=lambda each: each[0])
    # The middles of `count` equal parts of the batches, which are sorted by length.
    places = ((np.arange(count) + 0.5) * len(full) / count).astype(int)
    padded, rows = zip(*(full[place] for place in places), strict=True)
    return Work(examples.take(np.concatenate(rows)), padded)


def at_random(work: Work) -> Work:
    """Returns the same examples in random batches, each as long as its longest."""
    order = np.random.default_rng(0).permutation(len(work.examples))
    examples = work.examples.take(order)
    longest = examples.lengths.reshape(len(work.padded), -1).max(1)
    return Work(examples, longest.tolist())


def ours(subject: Subject, work: Work) -> dict[str, Timed]:
    """Returns each of our own steps, by name."""
    batches, buckets = work.batches(), sorted(set(work.padded))

    def timed(kind, cache="none"):
        step, state, context = prepared(subject, kind)
        teaching = teacher.TeacherCache(
            Encoder(subject.dense), subject.dense_params, Distill(cache=cache)
        )
        teacher_outputs = teaching.of(work.examples, buckets, len(work.rows()[0]))

        def turn():
            nonlocal state
            for rows, arrays in zip(work.rows(), batches, strict=True):
                batch = jax.device_put(arrays)
                batch["teacher_outputs"] = teacher_outputs(rows, batch)
                state, metrics = step(state, context, batch)
            return state.trainable, metrics

        student = subject.sliced if kind == "finetune" else subject.dense
        flops = roofline.step_flops(
            student,
            subject.dense,
            work.examples.lengths,
            masked=kind in _MASKED,
            taught=cache != "none",
        )
        return Timed(turn, work, flops)

    kept = {f"{k}, kept teacher outputs": timed(k, "host") for k in _KEPT_KINDS}
    return {kind: timed(kind) for kind in KINDS} | kept


def _pytorch_steps(subject, plain, compiled):
    """Returns PyTorch's steps, which do what our `plain` one does, by name."""
    step = of_pytorch(subject, compiled=compiled)
    name = "pytorch compiled" if compiled else "pytorch"

    def turn(fed):
        for batch in fed:
            step(batch)
        baselines.wait()

    def timed(work):
        fed = [baselines.tensors(batch) for batch in work.batches()]
        return Timed(functools.partial(turn, fed), work, plain.flops)

    return {
        f"{name}, random batches": timed(at_random(plain.work)),
        f"{name}, our batches": timed(plain.work),
    }


def of_pytorch(subject: Subject, *, compiled: bool = False) -> Callable[[dict], Any]:
    """Returns `baselines.pytorch_step` of the dense model, its own teacher."""
    params, config = subject.dense_params, subject.dense
    identity = np.eye(config.hidden_size, dtype=np.float32)
    return baselines.pytorch_step(
        params, params, identity, config, Distill(), compiled=compiled
    )


def prepared(
    subject: Subject, kind: str
) -> tuple[Callable[..., Any], step_lib.TrainState, dict]:
    """Returns the jitted step of a kind, its first state and its context, as in a run.

    Args:
      subject: the dense model is the teacher and, but for `finetune`, the student.
      kind: `masked` is with masks and the paper's Lagrangian, `exact` with masks and
        the exact constraint, `speedup` with this constraint of the time by a table, and
        `plain` without masks; `finetune` trains the sliced model.
    """
    sizes, params = subject.dense, subject.dense_params
    if kind == "finetune":
        sizes, params = subject.sliced, subject.sliced_params
    projection = jnp.eye(sizes.hidden_size, subject.dense.hidden_size)
    trainable: dict[str, Any] = {"distill_projection": projection}
    imitate, context = objectives.DistillationObjective, {}
    if kind in _MASKED:
        imitate = objectives.PruningObjective
        key = jax.random.key(2)
        trainable["log_alpha"] = masks.init_log_alpha(subject.dense, key)
        if kind == "masked":
            trainable["multipliers"] = {"linear": 0.0, "quadratic": 0.0}
        context["target_sparsity"] = jnp.float32(0.95)
        context["warmup_steps"] = jnp.int32(100)
        context["share"] = jnp.float32(1)
    if kind == "speedup":
        context["table"] = jax.tree.map(np.float32, _table(sizes))
    rate = step_lib.learning_rate(1e-5, "constant", 1)
    state = step_lib.create_state(
        params,
        seed=0,
        stage=kind,
        rates=dict.fromkeys(("weights", "masks", "multipliers"), rate),
        freeze_embeddings=True,
        **trainable,
    )
    return step_lib.make_step(imitate(Encoder(sizes), Distill())), state, context


def _table(config) -> Table:
    """A table of times that are proportional to the units, with the knots of a run's.

    A step takes as long by it as by a measured one.
    """
    curves = {}
    for block in blocks(config):
        counts = np.array(latency_table.knots(max(block.sizes(config))))
        curves[block.name] = Curve(counts, counts / counts[-1])
    return Table(0.1, curves)
