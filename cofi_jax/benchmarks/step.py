"""How many examples a second a training step takes in, beside what others do.

A turn is one pass over the same K batches of a task's own lengths. All contestants
see the same examples; PyTorch sees them also in batches drawn at random, each padded to
its own longest row, as its users feed it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, workload
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


_KINDS, _TAUGHT = ("masked", "late masked", "plain", "finetune"), ("masked", "finetune")


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
      plan: the batches to pass over, all full.
      repeats: turns of each contestant.
      torch_dtype: of PyTorch's matrix work.
      torch_compile: whether PyTorch also runs compiled.

    Returns:
      `batches` by padded length, `examples` and `tokens` (of a turn, without padding),
      `rates` of the device, `contestants`, the costs of masks as `masked_over_plain`,
      and `left_out`, with the reason. Of a contestant
        `turn_ms`                 the median of its turns
        `examples_per_second`, `spread`  at the median; at the 95th and 5th percentile
        `masked_is_faster`, `masked_is_faster_spread`  times, turn by turn
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
            student = without_absent(subject)  # which are skipped there
        return roofline.step_flops(
            student,
            subject.dense,
            lengths[rows],
            distill,
            masked="masked" in name,
            taught=KEPT in name,
        )

    contestants = {
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
        "contestants": contestants,
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
    """A contestant's part of what `measure` returns.

    Args:
      each: its turns.
      masked: those of the pruning step.
      examples: in a turn.
      tokens: in a turn, without padding.
      padded: in a turn, with padding.
      flops: of a turn.
      rate: of the device, FLOP/s.
    """
    ratio, spread = timing.speedup(each, masked)
    seconds = each.median_ms / 1e3
    slow_and_fast = [examples / each.percentile_ms(p) * 1e3 for p in (95, 5)]
    return {
        "turn_ms": each.median_ms,
        "examples_per_second": examples / seconds,
        "spread": slow_and_fast,
        "masked_is_faster": ratio,
        "masked_is_faster_spread": list(spread),
        "padding": 1 - tokens / padded,
        "useful_flops_per_second": flops / seconds,
        "utilisation": flops / seconds / rate,
    }


def batches(examples: batches_lib.Examples, plan: Plan) -> Batches:
    """The padded batches of a plan, in the host's memory."""
    return [
        batches_lib.make_batch(examples, rows, length=length, batch_size=len(rows))
        for length, rows in plan
    ]


def ours(
    subject: Subject, examples: batches_lib.Examples, plan: Plan, distill: Distill
) -> dict[str, Callable[[], Any]]:
    """A turn of each of our own steps, by name."""
    rows = np.unique(np.concatenate([chosen for _, chosen in plan]))
    examples = examples.take(rows)  # no outputs are kept of others
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
    return calls | {f"{kind}, {KEPT}": turn(kind, "host") for kind in _TAUGHT}


def without_absent(subject: Subject) -> EncoderConfig:
    """The dense sizes without those blocks that the sliced model lacks."""

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
    """The jitted step, its first state and its context, as the stages make them.

    In `late masked` those blocks are closed that the sliced model lacks, as they are
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
    """PyTorch's plain step on the dense model: `baselines.pytorch_step`."""
    params = subject.dense_params
    identity = np.eye(subject.dense.hidden_size, dtype=np.float32)
    how = {"dtype": dtype, "compiled": compiled}
    return baselines.pytorch_step(
        params, params, identity, subject.dense, distill, **how
    )


def _pytorch_turn(step, fed):
    for batch in fed:
        step(batch)
    baselines.wait()


def table(result: dict[str, Any]) -> str:
    """The result of `measure` for people."""
    batches = ", ".join(f"{n} of {length}" for length, n in result["batches"].items())
    lines = [
        f"{result['examples']} examples, {result['tokens']} tokens without padding; "
        f"batches by padded length: {batches}",
        "",
        f"{'':32}{'examples/s':>11}{'5 % to 95 %':>17}{'padding':>9}"
        f"{'GFLOP/s':>9}{'of peak':>9}  masked is",
    ]
    for name, each in result["contestants"].items():
        between = "{:.1f} to {:.1f}".format(*each["spread"])
        times = f"{each['masked_is_faster']:.2f}x as fast "
        times += "({:.2f} to {:.2f})".format(*each["masked_is_faster_spread"])
        line = (
            f"{name:32}{each['examples_per_second']:11.1f}{between:>17}"
            f"{each['padding']:9.1%}{each['useful_flops_per_second'] / 1e9:9.1f}"
            f"{each['utilisation']:9.1%}"
        )
        lines.append(line if name == "masked" else f"{line}  {times}")
    low, high = result["masked_over_plain_spread"]
    times = f"{result['masked_over_plain']:.3f} times ({low:.3f} to {high:.3f})"
    lines += ["", f"masks and Lagrangian: a step takes {times} as long as without"]
    lines += [f"left out: {n}: {why}" for n, why in result["left_out"].items()]
    return "\n".join(lines)
