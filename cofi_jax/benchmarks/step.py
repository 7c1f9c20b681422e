"""The examples that a training step takes in per second, beside PyTorch.

A turn is one pass over the same batches, whose rows are as long as a task's own. All
steps see the same examples. PyTorch sees them also in batches drawn at random, each
padded to its own longest row, as its users feed it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, text, workload
from cofi_jax.benchmarks.workload import Plan, Subject
from cofi_jax.config import Distill
from cofi_jax.data import batches as batches_lib
from cofi_jax.evaluation import timing
from cofi_jax.evaluation.timing import Timing
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import hard_concrete, masks
from cofi_jax.training import objectives, teacher
from cofi_jax.training import step as step_lib

KEPT = "kept teacher outputs"
_KINDS = ("masked", "late masked", "plain", "finetune")
_KEPT_KINDS = ("masked", "finetune")  # These are timed with kept outputs, too.

Batches = list[dict[str, np.ndarray]]


def measure(
    subject: Subject,
    examples: batches_lib.Examples,
    plan: Plan,
    *,
    repeats: int,
    torch_dtype: str,
    torch_compile: bool,
) -> dict[str, Any]:
    """Times the steps in turn.

    Args:
      subject: the models.
      examples: the rows.
      plan: the batches to pass over, all of them full.
      repeats: the turns of each step.
      torch_dtype: the dtype of PyTorch's matrix products.
      torch_compile: whether PyTorch also runs compiled.

    Returns:
      `batches` by padded length, `examples` and `tokens` (of a turn, without padding),
      `rates` of the device, `steps`, the cost of masks as `masked_over_plain`, and
      `left_out`, with the reason. Each step has
        `turn_ms`                 the median of its turns
        `examples_per_second`, `spread`  at the median; at the 95th and 5th percentile
        `masked_is_faster`, `masked_is_faster_spread`  a ratio, turn by turn
        `padding`                 the fraction of its tokens that is padding
        `useful_flops_per_second`  without padding: `roofline.step_flops`
        `utilisation`             that over the device's matrix rate
    """
    distill = Distill()
    lengths = examples.lengths
    rows = np.concatenate([chosen for _, chosen in plan])
    calls, left_out = ours(subject, examples, plan, distill), {}
    plans = dict.fromkeys(calls, plan)
    if reason := baselines.unfit(subject.dense):
        left_out["pytorch"] = reason
    else:
        fed = {"random batches": workload.at_random(plan, lengths), "our batches": plan}
        for compiled in (False, True) if torch_compile else (False,):
            step = pytorch(subject, distill, torch_dtype, compiled=compiled)
            kind = "pytorch compiled" if compiled else "pytorch"
            for how, fed_plan in fed.items():
                found = [baselines.tensors(b) for b in batches(examples, fed_plan)]
                name = f"{kind}, {how}"
                calls[name] = functools.partial(_pytorch_turn, step, found)
                plans[name] = fed_plan
    rates = roofline.rates(subject.dense.dtype)
    timings = timing.side_by_side(
        calls, repeats=repeats, warmup=1, turn_ms=0, rest_ms=100
    )

    def work(name):
        student = subject.sliced if "finetune" in name else subject.dense
        if name == "late masked" and jax.default_backend() == "cpu":
            student = without_absent(subject)  # A CPU skips absent blocks.
        return roofline.step_flops(
            student,
            subject.dense,
            lengths[rows],
            distill,
            masked="masked" in name,
            taught=KEPT in name,
        )

    steps = {
        name: described(
            each,
            timings["masked"],
            examples=len(rows),
            tokens=int(lengths[rows].sum()),
            padded=sum(length * len(chosen) for length, chosen in plans[name]),
            flops=work(name),
            rate=rates["flops_per_second"],
        )
        for name, each in timings.items()
    }
    ratio, spread = timing.speedup(timings["masked"], timings["plain"])
    return {
        "batches": dict(sorted(collections.Counter(n for n, _ in plan).items())),
        "examples": len(rows),
        "tokens": int(lengths[rows].sum()),
        "repeats": repeats,
        "rates": rates,
        "steps": steps,
        "masked_over_plain": ratio,
        "masked_over_plain_spread": list(spread),
        "left_out": left_out,
    }


def described(
    each: Timing,
    masked: Timing,
    *,
    examples: int,
    tokens: int,
    padded: int,
    flops: int,
    rate: float,
) -> dict[str, Any]:
    """Returns the figures of one step for `measure`.

    Args:
      each: the turns of the step.
      masked: those of the masked step.
      examples: the examples in a turn.
      tokens: the tokens in a turn, without padding.
      padded: the tokens in a turn, with padding.
      flops: the operations of a turn.
      rate: the device's operations per second.
    """
    ratio, spread = timing.speedup(each, masked)
    seconds = each.median_ms / 1e3
    return {
        "turn_ms": each.median_ms,
        "examples_per_second": examples / seconds,
        "spread": [1e3 * examples / each.percentile_ms(p) for p in (95, 5)],
        "masked_is_faster": ratio,
        "masked_is_faster_spread": list(spread),
        "padding": 1 - tokens / padded,
        "useful_flops_per_second": flops / seconds,
        "utilisation": flops / seconds / rate,
    }


def batches(examples: batches_lib.Examples, plan: Plan) -> Batches:
    """Returns the padded batches of a plan, in the host's memory."""
    return [
        batches_lib.make_batch(examples, rows, length=length, batch_size=len(rows))
        for length, rows in plan
    ]


def ours(
    subject: Subject, examples: batches_lib.Examples, plan: Plan, distill: Distill
) -> dict[str, Callable[[], Any]]:
    """Returns a turn of each of our own steps, by name."""
    rows = np.unique(np.concatenate([chosen for _, chosen in plan]))
    examples = examples.take(rows)  # Teacher outputs are kept of these alone.
    plan = [(length, np.searchsorted(rows, chosen)) for length, chosen in plan]
    fed, buckets = batches(examples, plan), sorted({length for length, _ in plan})

    def turn(kind, cache):
        step, state, context = prepared(subject, distill, kind)
        asked = dataclasses.replace(distill, cache=cache)
        teaching = teacher.TeacherCache(
            Encoder(subject.dense), subject.dense_params, asked
        )
        teacher_outputs = teaching.of(examples, buckets, len(plan[0][1]))

        def call():
            nonlocal state
            for (_, rows), arrays in zip(plan, fed, strict=True):
                batch = jax.device_put(arrays)
                batch["teacher_outputs"] = teacher_outputs(rows, batch)
                state, metrics = step(state, context, batch)
            return state.trainable, metrics

        return call

    calls = {kind: turn(kind, "none") for kind in _KINDS}
    return calls | {f"{kind}, {KEPT}": turn(kind, "host") for kind in _KEPT_KINDS}


def without_absent(subject: Subject) -> EncoderConfig:
    """Returns the dense sizes without the blocks that the sliced model lacks."""

    def kept(dense, sliced):
        return tuple(d * (s > 0) for d, s in zip(dense, sliced, strict=True))

    return dataclasses.replace(
        subject.dense,
        heads=kept(subject.dense.heads, subject.sliced.heads),
        intermediate=kept(subject.dense.intermediate, subject.sliced.intermediate),
    )


def prepared(
    subject: Subject, distill: Distill, kind: str
) -> tuple[Callable, step_lib.TrainState, dict]:
    """Returns the jitted step, its first state and its context, as in a run.

    In `late masked` the blocks that the sliced model lacks are closed, as they are
    towards the end of pruning.
    """
    small = kind == "finetune"
    sizes, params = subject.dense, subject.dense_params
    if small:
        sizes, params = subject.sliced, subject.sliced_params
    trainable = {
        "distill_projection": jnp.eye(sizes.hidden_size, subject.dense.hidden_size)
    }
    imitate, context = objectives.DistillationObjective, {}
    if "masked" in kind:
        imitate = objectives.PruningObjective
        log_alpha = masks.init_log_alpha(subject.dense, jax.random.key(2))
        if kind == "late masked":
            for name, widths in (
                ("mha", subject.sliced.heads),
                ("ffn", subject.sliced.intermediate),
            ):
                open_ = jnp.array(widths) > 0
                low, high = hard_concrete.clamp(jnp.array([-jnp.inf, jnp.inf]))
                log_alpha[name] = jnp.where(open_, high, low)
        trainable["log_alpha"] = log_alpha
        trainable["multipliers"] = {"linear": 0.0, "quadratic": 0.0}
        context["target_sparsity"] = jnp.float32(0.95)
        context["warmup_steps"] = jnp.int32(100)
    rate = step_lib.learning_rate(1e-5, "constant", 1)
    state = step_lib.create_state(
        params,
        seed=0,
        stage=kind,
        rates=dict.fromkeys(("weights", "masks", "multipliers"), rate),
        freeze_embeddings=True,
        **trainable,
    )
    return step_lib.make_step(imitate(Encoder(sizes), distill)), state, context


def pytorch(
    subject: Subject, distill: Distill, dtype: str, *, compiled: bool
) -> Callable[[dict], Any]:
    """Returns PyTorch's plain step on the dense model: `baselines.pytorch_step`."""
    params, config = subject.dense_params, subject.dense
    identity = np.eye(config.hidden_size, dtype=np.float32)
    return baselines.pytorch_step(
        params, params, identity, config, distill, dtype=dtype, compiled=compiled
    )


def _pytorch_turn(step, fed):
    for batch in fed:
        step(batch)
    baselines.wait()


def table(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as text for people."""
    rows = [
        ("", "examples/s", "5 % to 95 %", "padding", "GFLOP/s", "of peak", "masked")
    ]
    for name, each in result["steps"].items():
        times = text.times(each["masked_is_faster"], each["masked_is_faster_spread"])
        rows.append(
            (
                name,
                f"{each['examples_per_second']:.1f}",
                "{:.1f} to {:.1f}".format(*each["spread"]),
                f"{each['padding']:.1%}",
                f"{each['useful_flops_per_second'] / 1e9:.1f}",
                f"{each['utilisation']:.1%}",
                "" if name == "masked" else f"{times} as fast",
            )
        )
    batches = ", ".join(f"{n} of {length}" for length, n in result["batches"].items())
    cost = text.times(result["masked_over_plain"], result["masked_over_plain_spread"])
    return (
        f"{result['examples']} examples, {result['tokens']} tokens without padding; "
        f"batches by padded length: {batches}\n\n{text.aligned(rows)}\n\n"
        f"masks and Lagrangian: a step takes {cost} as long as without"
    )
