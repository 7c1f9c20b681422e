"""The latency of forward passes of several models, timed in turn."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.evaluation import timing
from cofi_jax.evaluation.timing import Timing
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig

# How a model is opened in a runtime: parameters and sizes to a function of batches.
Opener = Callable[[dict, EncoderConfig], Callable[[Batch], Any]]


def grid(
    calls: Mapping[str, Callable[[Batch], Any]],
    vocab_size: int,
    *,
    batch_sizes: Sequence[int],
    seq_lengths: Sequence[int],
    repeats: int,
    rest_ms: float = 0.0,
) -> list[dict[str, Any]]:
    """Times all models at every batch size and length: the `grid` of `evaluate`.

    Args:
      calls: functions from a batch to logits by the name of the model.
      vocab_size: the number of tokens that all models know.
      batch_sizes: the values of B.
      seq_lengths: the values of T.
      repeats: the turns of each model.
      rest_ms: as in `timing.side_by_side`.

    Returns:
      For each batch size, length and model
        `batch_size`, `seq_length`, `model` (its name)
        `latency_ms`, `latency_p95_ms`  median and 95th percentile of a pass
        `examples_per_second`           at the median
        `speedup`, `speedup_spread`     over the first model: median over the turns,
                                        5th and 95th percentile
    """
    found = []
    for batch_size, seq_length in itertools.product(batch_sizes, seq_lengths):
        cell = {"batch_size": batch_size, "seq_length": seq_length}
        timings = passes(calls, vocab_size, **cell, repeats=repeats, rest_ms=rest_ms)
        first = next(iter(timings.values()))
        for name, each in timings.items():
            ratio, *spread = timing.speedup(first, each)
            figures = {
                "model": name,
                "latency_ms": each.median_ms,
                "latency_p95_ms": each.percentile_ms(95),
                "examples_per_second": 1e3 * batch_size / each.median_ms,
                "speedup": ratio,
                "speedup_spread": spread,
            }
            found.append(cell | figures)
    return found


def inference(
    models: dict[str, tuple[Encoder, dict]],
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
    opener: Opener | None = None,
    rest_ms: float = 0.0,
) -> dict[str, Any]:
    """Times forward passes on one batch of random tokens without padding.

    Args:
      models: the modules and their parameters by name, the dense model first.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T), no more than the models have positions.
      repeats: the turns of each model, of one pass or as many as 50 ms hold.
      opener: opens the models in another runtime than JAX.
      rest_ms: as in `timing.side_by_side`.

    Returns:
      The part of `report.json` that is measured here: `latency_ms` by name; of two
      models also `speedup` (the first's time over the second's) and `speedup_spread`;
      and `benchmark`, the conditions of the measurement.

    Raises:
      UserError: where the memory does not suffice.
    """
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    vocab_size = min(model.config.vocab_size for model, _ in models.values())
    with timing.memory_suffices(batch_size, seq_length):
        calls = {
            name: opener(params, model.config) if opener else call(model, params)
            for name, (model, params) in models.items()
        }
    timings = passes(calls, vocab_size, **sizes, repeats=repeats, rest_ms=rest_ms)
    result: dict[str, Any] = {
        "latency_ms": {name: each.median_ms for name, each in timings.items()}
    }
    if len(timings) == 2:
        ratio, *spread = timing.speedup(*timings.values())
        result |= {"speedup": ratio, "speedup_spread": spread}
    how = conditions(models) | sizes | {"repeats": repeats}
    how["latency_spread_ms"] = {n: t.spread_ms[1:] for n, t in timings.items()}
    how["examples_per_second"] = {
        name: 1e3 * batch_size / each.median_ms for name, each in timings.items()
    }
    return result | {"benchmark": how}


def passes(
    calls: Mapping[str, Callable[[Batch], Any]],
    vocab_size: int,
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
    rest_ms: float = 0.0,
) -> dict[str, Timing]:
    """Returns the timings behind `inference` and `grid`, of any number of models."""
    with timing.memory_suffices(batch_size, seq_length):
        batch = random_batch(vocab_size, batch_size=batch_size, seq_length=seq_length)
        bound = {name: functools.partial(each, batch) for name, each in calls.items()}
        return timing.side_by_side(bound, repeats=repeats, rest_ms=rest_ms)


def call(model: Encoder, params: dict) -> Callable[[Batch], jax.Array]:
    """Returns the jitted function from a batch to the logits of a model."""
    return functools.partial(forward(model), jax.device_put(params))


def conditions(models: dict[str, tuple[Encoder, Any]]) -> dict[str, str]:
    """Returns `device`, `dtype` and `matmul_precision` of a measurement."""
    dtypes = dict.fromkeys(np.dtype(m.config.dtype).name for m, _ in models.values())
    return {
        "device": timing.describe(jax.devices()[0]),
        "dtype": " and ".join(dtypes),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
    }


def random_batch(
    vocab_size: int, *, batch_size: int, seq_length: int
) -> dict[str, jax.Array]:
    """Returns a (B, T) batch of random tokens without padding, on the device."""
    shape = (batch_size, seq_length)
    # None of them is the padding token, which is 0 for BERT and 1 for RoBERTa.
    ids = np.random.default_rng(0).integers(min(2, vocab_size - 1), vocab_size, shape)
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
    }


def forward(model: Encoder) -> Callable[[dict, dict], jax.Array]:
    """Returns the jitted function from parameters and a batch to logits, (B, C)."""
    # The compiler would fold parameters that are closed over, and the other outputs
    # would have to be written to memory as well.
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
