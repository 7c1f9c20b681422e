"""How fast models run: always things side by side, in turn, in one run.

A machine speeds up and slows down over minutes. Here the calls alternate, A B A B,
so the i-th times of A and B were taken under the same conditions:

    speedup = median(A) / median(B),    spread = 5th and 95th percentile of A_i / B_i
"""

import argparse
import dataclasses
import functools
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

from cofi_jax import masks, objective, training
from cofi_jax.config import Distill
from cofi_jax.model import Encoder, EncoderConfig, init_params


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one call took, in milliseconds, in the order it was measured."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Half of the calls were faster."""
        return float(np.median(self.times_ms))

    @property
    def low_ms(self) -> float:
        """The 5th percentile."""
        return float(np.percentile(self.times_ms, 5))

    @property
    def high_ms(self) -> float:
        """The 95th percentile."""
        return float(np.percentile(self.times_ms, 95))

    @property
    def repeats(self) -> int:
        """How many calls were timed."""
        return len(self.times_ms)


def side_by_side(
    calls: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 3
) -> dict[str, Timing]:
    """Times the calls in turn, each until its result is ready.

    Args:
      calls: name to function of no arguments; any pytree of arrays comes back.
      repeats: timed calls of each.
      warmup: untimed calls of each beforehand; the first one compiles.
    """
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    times_ms = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times_ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing(tuple(times)) for name, times in times_ms.items()}


def speedup(dense: Timing, pruned: Timing) -> tuple[float, tuple[float, float]]:
    """How many times as fast `pruned` is, and the spread of that.

    Both come from one `side_by_side`, so their i-th times belong together.

    Returns:
      The ratio of the medians; the 5th and 95th percentile of the ratios by pair.
    """
    ratios = np.divide(dense.times_ms, pruned.times_ms)
    low, high = np.percentile(ratios, (5, 95))
    return dense.median_ms / pruned.median_ms, (float(low), float(high))


def inference(
    models: dict[str, tuple[Any, Any]],
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Times forward passes on one batch of random tokens without padding.

    Args:
      models: name to (linen module, params), the dense one first.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T), no more than the models have positions.
      repeats: timed passes of each model.
      seed: of the token ids.

    Returns:
      The part of `report.json` that is measured here: `latency_ms` by name, with
      two models `speedup` (first over second) and `speedup_spread`, and
      `benchmark`, which says how it was measured.
    """
    vocab_size = min(model.config.vocab_size for model, _ in models.values())
    batch = _random_batch(vocab_size, batch_size, seq_length, seed)
    calls = {
        name: functools.partial(_forward(model), jax.device_put(params), batch)
        for name, (model, params) in models.items()
    }
    timings = side_by_side(calls, repeats=repeats)
    dtypes = dict.fromkeys(np.dtype(m.config.dtype).name for m, _ in models.values())
    return _result(timings, batch, " and ".join(dtypes))


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
    batch = _random_batch(config.vocab_size, batch_size, seq_length, seed=0)
    batch["labels"] = jnp.zeros(batch_size, jnp.int32)
    batch["weight"] = jnp.ones(batch_size)
    params = init_params(config, jax.random.key(0))
    context = {
        "teacher": init_params(config, jax.random.key(1)),
        "target_sparsity": jnp.float32(0.9),
        "warmup_steps": jnp.int32(100),
    }
    rate = training.Rate.create(1e-5, "constant", 1)
    theta = {"distill_projection": jnp.eye(config.hidden_size)}
    gates = {
        "log_alpha": masks.init_log_alpha(config, jax.random.key(2)),
        "multipliers": {"linear": 0.0, "quadratic": 0.0},
    }

    def stepper(objective, **theta):
        step = training.make_step(objective(model, model, Distill()))
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
            state, metrics = step(state, context, batch)
            return state.theta, metrics

        return call

    calls = {
        "masked": stepper(objective.pruning_objective, **theta, **gates),
        "plain": stepper(objective.distillation_objective, **theta),
    }
    timings = side_by_side(calls, repeats=repeats)
    return _result(timings, batch, config.dtype)


def _random_batch(vocab_size, batch_size, seq_length, seed):
    shape = (batch_size, seq_length)
    ids = np.random.default_rng(seed).integers(vocab_size, size=shape)
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
    }


def _result(timings, batch, dtype):
    result = {"latency_ms": {name: t.median_ms for name, t in timings.items()}}
    if len(timings) == 2:
        ratio, spread = speedup(*timings.values())
        result |= {"speedup": ratio, "speedup_spread": list(spread)}
    batch_size, seq_length = batch["input_ids"].shape
    result["benchmark"] = {
        "device": describe(batch["input_ids"].device),
        "dtype": dtype,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "batch_size": batch_size,
        "seq_length": seq_length,
        "repeats": next(iter(timings.values())).repeats,
        "latency_spread_ms": {n: [t.low_ms, t.high_ms] for n, t in timings.items()},
        "examples_per_second": {
            name: 1e3 * batch_size / t.median_ms for name, t in timings.items()
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
    """`python -m cofi_jax.benchmark`: what masks cost in a step, as JSON."""
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
