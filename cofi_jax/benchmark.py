"""How fast models run: always things side by side, in turn, in one run.

A machine speeds up and slows down over minutes. Here turns alternate, A B A B, so the
i-th turns of A and B were taken under the same conditions:

    speedup = median over i of A_i / B_i,    spread = their 5th and 95th percentile

A turn is a short burst of calls, A_i the median of their times. Of single calls in
alternation a small model would always find the caches full of the large one.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import lessons, masks, objective, training
from cofi_jax.config import Distill, reject
from cofi_jax.model import Encoder, EncoderConfig, init_params

_TURN_MS = 50.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """What the calls took, in milliseconds: a tuple for each turn, in their order."""

    turns: tuple[tuple[float, ...], ...]

    @property
    def by_turn(self) -> np.ndarray:
        """(repeats,) the median of each turn."""
        return np.array([np.median(times) for times in self.turns])

    @property
    def median_ms(self) -> float:
        """Half of the calls were faster; every turn weighs the same."""
        return self.percentile_ms(50)

    def percentile_ms(self, percent: float) -> float:
        """`percent` of the calls were faster; every turn weighs the same."""
        # Else slow moments, of few calls, would hardly count.
        weights = np.concatenate([[1 / len(turn)] * len(turn) for turn in self.turns])
        calls = {"weights": weights, "method": "inverted_cdf"}
        return float(np.percentile(np.concatenate(self.turns), percent, **calls))

    @property
    def repeats(self) -> int:
        """How many turns there were."""
        return len(self.turns)


def side_by_side(
    calls: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 3,
    turn_ms: float = _TURN_MS,
) -> dict[str, Timing]:
    """Times the calls in turn, each until its result is ready.

    Args:
      calls: name to function of no arguments; any pytree of arrays comes back.
      repeats: turns of each.
      warmup: untimed calls of each beforehand; the first one compiles.
      turn_ms: a turn ends after this time; it has one call at least. The first call,
        which fills the caches anew, counts only where no other follows.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    turns = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()  # it would strike one call or another
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                turns[name].append(_turn(call, turn_ms))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(found)) for name, found in turns.items()}


def _turn(call, turn_ms):
    times, total = [], 0.0
    while not times or total < turn_ms:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
        total += times[-1]
    return tuple(times[1:] or times)


def speedup(dense: Timing, pruned: Timing) -> tuple[float, tuple[float, float]]:
    """How many times as fast `pruned` is, and the spread of that.

    Both come from one `side_by_side`, so their i-th turns belong together.

    Returns:
      The median of the ratios turn by turn; their 5th and 95th percentile.
    """
    low, middle, high = np.percentile(dense.by_turn / pruned.by_turn, (5, 50, 95))
    return float(middle), (float(low), float(high))


def inference(
    models: dict[str, tuple[Any, Any]],
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
) -> dict[str, Any]:
    """Times forward passes on one batch of random tokens without padding.

    Args:
      models: name to (linen module, params), the dense one first.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T), no more than the models have positions.
      repeats: turns of each model, of one pass or as many as 50 ms hold.

    Returns:
      The part of `report.json` that is measured here: `latency_ms` by name, with
      two models `speedup` (first over second) and `speedup_spread`, and
      `benchmark`, which says how it was measured.

    Raises:
      UserError: where the memory does not suffice.
    """
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    timings = passes(models, **sizes, repeats=repeats)
    return _result(timings, conditions(models) | sizes)


def passes(
    models: dict[str, tuple[Any, Any]],
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
) -> dict[str, Timing]:
    """The timings behind `inference`, of any number of models."""
    vocab_size = min(model.config.vocab_size for model, _ in models.values())
    try:
        batch = _random_batch(vocab_size, batch_size, seq_length)
        calls = {
            name: functools.partial(_forward(model), jax.device_put(params), batch)
            for name, (model, params) in models.items()
        }
        return side_by_side(calls, repeats=repeats)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            legal = f"too much for the memory, with sequences of {seq_length}"
            raise reject("batch_size", batch_size, legal) from error
        raise


def conditions(models: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """`device`, `dtype` and `matmul_precision` of a measurement."""
    dtypes = dict.fromkeys(np.dtype(m.config.dtype).name for m, _ in models.values())
    return {
        "device": describe(jax.devices()[0]),
        "dtype": " and ".join(dtypes),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
    }


def pruning_step(
    config: EncoderConfig, *, batch_size: int, seq_length: int, repeats: int
) -> dict[str, Any]:
    """Times a pruning step and the same distillation step without masks.

    Random weights and tokens; each step updates its own state.

    Args:
      config: the sizes of teacher and student.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T).
      repeats: timed steps of each.

    Returns:
      As `inference`, for `masked` and `plain`; `speedup` is masked over plain, so
      1.05 means that masks and Lagrangian cost 5 %.
    """
    model = Encoder(config)
    batch = _random_batch(config.vocab_size, batch_size, seq_length)
    batch["labels"] = jnp.zeros(batch_size, jnp.int32)
    batch["weight"] = jnp.ones(batch_size)
    params = init_params(config, jax.random.key(0))
    target = {"target_sparsity": jnp.float32(0.9), "warmup_steps": jnp.int32(100)}
    rate = training.Rate.create(1e-5, "constant", 1)
    teacher = init_params(config, jax.random.key(1))
    teach = lessons.make_teach(model, Distill())
    theta = {"distill_projection": jnp.eye(config.hidden_size)}
    gates = {
        "log_alpha": masks.init_log_alpha(config, jax.random.key(2)),
        "multipliers": {"linear": 0.0, "quadratic": 0.0},
    }

    def stepper(objective, **theta):
        step = training.make_step(objective(model, Distill()))
        state = training.create_state(
            params,
            seed=0,
            stage="benchmark",
            rates=dict.fromkeys(("weights", "gates", "multipliers"), rate),
            freeze_embeddings=True,
            **theta,
        )

        def call():
            nonlocal state
            taught = batch | {"lesson": teach(teacher, batch)}
            state, metrics = step(state, target, taught)
            return state.theta, metrics

        return call

    calls = {
        "masked": stepper(objective.pruning_objective, **theta, **gates),
        "plain": stepper(objective.distillation_objective, **theta),
    }
    timings = side_by_side(calls, repeats=repeats)
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    return _result(timings, conditions({"": (model, params)}) | sizes)


def _random_batch(vocab_size, batch_size, seq_length):
    shape = (batch_size, seq_length)
    ids = np.random.default_rng(0).integers(vocab_size, size=shape)
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
    }


def _result(timings, how):
    result = {"latency_ms": {name: t.median_ms for name, t in timings.items()}}
    if len(timings) == 2:
        ratio, spread = speedup(*timings.values())
        result |= {"speedup": ratio, "speedup_spread": list(spread)}
    result["benchmark"] = how | {
        "repeats": next(iter(timings.values())).repeats,
        "latency_spread_ms": {
            n: [t.percentile_ms(5), t.percentile_ms(95)] for n, t in timings.items()
        },
        "examples_per_second": {
            name: 1e3 * how["batch_size"] / t.median_ms for name, t in timings.items()
        },
    }
    return result


def _forward(model):
    # Params are an argument: closed over, they would be constants to fold. Logits
    # alone come out, as in use: other outputs would have to be written as well.
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)


def describe(device: jax.Device) -> str:
    """The device in words, such as `NVIDIA H200` or `cpu: AMD EPYC, 2 cores`."""
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    found = info.exists() and re.search(r"model name\s*: (.+)", info.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    linux = hasattr(os, "sched_getaffinity")  # counts what this process may use
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    return f"cpu: {name}, {cores} cores"


def main() -> None:
    """What masks cost in a step, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    sizes = dict(layers=6, hidden=384, heads=12, intermediate=1536)
    for name, size in (sizes | dict(batch=32, length=32, repeats=20)).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    config = EncoderConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        heads=(args.heads,) * args.layers,
        head_size=args.hidden // args.heads,
        intermediate=(args.intermediate,) * args.layers,
        pooler_size=args.hidden,
        num_labels=2,
        max_positions=max(args.length, 512),
    )
    result = pruning_step(
        config, batch_size=args.batch, seq_length=args.length, repeats=args.repeats
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
