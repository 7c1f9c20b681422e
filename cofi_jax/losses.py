"""What an output should be: the labels', or the teacher's.

    task          cross-entropy; squared error of a value
    distillation  T^2 KL(teacher || student); squared error of a value

A span is two classifications over the real tokens of its row: of where the answer
starts and of where it ends. Both count alike.

A mean over a batch that is worked through in m parts has the whole batch's
denominator: the batch's `total`, 1/m of the `rows` and of the `tokens` of all parts.
So the mean over the parts is the mean over the batch.
"""

import jax
import jax.numpy as jnp
import optax

from cofi_jax.model import Batch


def weighted_mean(
    values: jax.Array, weights: jax.Array, total: jax.Array | None = None
) -> jax.Array:
    """Mean of `values` under non-negative `weights` of the same shape.

    `total` takes the place of the weights' sum.
    """
    total = jnp.sum(weights) if total is None else total
    return jnp.sum(values * weights) / jnp.maximum(total, 1e-9)


def task_loss(problem: str, logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of the batch's labels, mean over rows of weight 1.

    Args:
      problem: classification, regression or span.
      logits: (B, C); (B, 1) of regression; (B, T, 2) of spans.
      batch: with `labels`, (B,) int32, float32 for regression or (B, 2) int32 for
        spans, `weight` (B,) and for spans `attention_mask` (B, T).
    """
    if problem == "regression":
        losses = jnp.square(logits[:, 0] - batch["labels"])
        return weighted_mean(losses, batch["weight"], _rows(batch))
    logits, weight, total = _choices(problem, logits, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"].reshape(-1)
    )
    return weighted_mean(losses, weight, total)


def distill_logits(
    problem: str,
    student: jax.Array,
    teacher: jax.Array,
    batch: Batch,
    temperature: float,
) -> jax.Array:
    """T^2 * KL(teacher || student) at temperature T, mean over rows of weight 1.

    The direction is that of the authors' code; the paper writes the other one. Values
    have no distribution (the KL of a single logit is 0): squared error.

    Args:
      problem: classification, regression or span.
      student: logits as in `task_loss`.
      teacher: likewise.
      batch: with `weight` and for spans `attention_mask`.
      temperature: T.
    """
    if problem == "regression":
        squares = jnp.square(student - teacher)[:, 0]
        return weighted_mean(squares, batch["weight"], _rows(batch))
    student, weight, total = _choices(problem, student, batch)
    teacher, *_ = _choices(problem, teacher, batch)
    p = jax.nn.log_softmax(teacher / temperature)
    q = jax.nn.log_softmax(student / temperature)
    divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
    return temperature**2 * weighted_mean(divergence, weight, total)


def _rows(batch):
    return batch["total"]["rows"] if "total" in batch else None


def _choices(problem, logits, batch):
    """Rows of logits to choose from, their weights and total; two of each span."""
    total = _rows(batch)
    if problem == "classification":
        return logits, batch["weight"], total
    real = batch["attention_mask"][:, None] > 0
    logits = jnp.where(real, jnp.swapaxes(logits, 1, 2), -1e9)
    weight = jnp.repeat(batch["weight"], 2)
    return (
        logits.reshape(-1, logits.shape[-1]),
        weight,
        None if total is None else 2 * total,
    )
