"""Logits of all rows."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from cofi_jax import distributed
from cofi_jax.data import batches
from cofi_jax.models.bert import Encoder


@functools.cache  # stages of one model share what is compiled
def make_predict(model: Encoder) -> Callable:
    """The jitted `predict(params, masks, batch) -> logits`, 0 at padding in spans."""

    def predict(params, masks, batch):
        logits = model.apply({"params": params, "masks": masks}, batch).logits
        if model.config.problem == "span":
            logits = logits * (batch["attention_mask"] > 0)[..., None]
        return logits

    return jax.jit(predict)


def predict_all(
    predict: Callable,
    params: dict,
    gates: Mapping[str, jax.Array],
    examples: batches.Examples,
    *,
    batch_size: int,
    buckets: Sequence[int],
    put: Callable = jax.device_put,
) -> np.ndarray:
    """Logits (N, C) of all `examples`, in their order; of spans (N, T, 2).

    T is the last of the `buckets`, padded with zeros. `put` brings a batch to where
    `params` are.
    """
    rows, outputs = [], []
    for chosen, batch in batches.eval_batches(
        examples, batch_size=batch_size, buckets=buckets
    ):
        rows.append(chosen)
        outputs.append(predict(params, gates, put(batch)))
    logits = np.concatenate(
        [
            _pad(logits[: len(chosen)], buckets[-1])
            for chosen, logits in zip(rows, distributed.fetch(outputs), strict=True)
        ]
    )
    return logits[np.argsort(np.concatenate(rows))]


def _pad(logits, length):
    if logits.ndim < 3:
        return logits
    return np.pad(logits, ((0, 0), (0, length - logits.shape[1]), (0, 0)))
