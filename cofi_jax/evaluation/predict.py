"""The logits of all rows of a task."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cofi_jax import distributed
from cofi_jax.data import batches
from cofi_jax.data.tasks import Task
from cofi_jax.models.bert import Encoder


@functools.cache  # The stages of a run share what is compiled for a model.
def make_predict(model: Encoder) -> Callable[..., jax.Array]:
    """The jitted `predict(params, masks, batch)`, which gives the logits of a batch.

    They are (B, C), or (B, T, C) where the head reads every token, and 0 at padding.
    """

    def predict(params, masks, batch):
        logits = model.apply({"params": params, "masks": masks}, batch).logits
        if model.config.reads_every_token:
            logits = logits * (batch["attention_mask"] > 0)[..., None]
        return logits

    return jax.jit(predict)


def predict_all(
    predict: Callable,
    params: dict,
    masks: Mapping[str, jax.Array],
    examples: batches.Examples,
    *,
    batch_size: int,
    buckets: Sequence[int],
    put: Callable = jax.device_put,
    shrink: bool = False,
) -> np.ndarray:
    """The logits of N examples, in their order.

    Args:
      predict: what `make_predict` gives.
      params: the parameters.
      masks: by kind; {} for a model that is not masked.
      examples: the N rows.
      batch_size: rows in a batch.
      buckets: the padded lengths.
      put: brings a batch to the devices that hold `params`.
      shrink: the last batch is filled up to a power of two only.

    Returns:
      (N, C), or (N, T, C) where the head reads every token; T is the last of the
      `buckets`, and logits at padding are 0.
    """
    rows, outputs = [], []
    for chosen, batch in batches.eval_batches(
        examples, batch_size=batch_size, buckets=buckets, shrink=shrink
    ):
        rows.append(chosen)
        outputs.append(predict(params, masks, put(batch)))
    found = []
    for chosen, output in zip(rows, distributed.fetch(outputs), strict=True):
        output = output[: len(chosen)]
        if output.ndim == 3:
            padding = (0, 0), (0, buckets[-1] - output.shape[1]), (0, 0)
            output = np.pad(output, padding)
        found.append(output)
    return np.concatenate(found)[np.argsort(np.concatenate(rows))]


def logits(
    predict: Callable,
    params: dict,
    task: Task,
    examples: batches.Examples,
    *,
    batch_size: int,
    shrink: bool = False,
) -> np.ndarray:
    """Like `predict_all`, without masks and with the task's padded lengths."""
    buckets = batches.bucket_lengths(task, examples.lengths)
    sizes = {"batch_size": batch_size, "buckets": buckets, "shrink": shrink}
    return predict_all(predict, params, {}, examples, **sizes)


def answered(
    predict: Callable,
    params: dict,
    task: Task,
    columns: dict[str, Any],
    tokenizer: Any,
    *,
    batch_size: int,
) -> dict[str, Any]:
    """The columns of rows with a model's answers as labels, where the task has none.

    Args:
      predict: what `make_predict` gives.
      params: the parameters of the model.
      task: the task, with the settings that were chosen for the model.
      columns: those of a split that `sources.load` read.
      tokenizer: the tokenizer of the model.
      batch_size: rows in a batch.
    """
    if not task.lacks_labels(columns):
        return columns
    examples = task.tokenise(columns, tokenizer)
    found = logits(predict, params, task, examples, batch_size=batch_size)
    return columns | {task.label_column: task.problem.answers(found, examples)}
