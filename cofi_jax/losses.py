"""What an output should be: the labels', or the teacher's.

    task          cross-entropy; squared error of a value
    distillation  T^2 KL(teacher || student); squared error of a value

A span is two classifications over the real tokens of its row: of where the answer
starts and of where it ends. Both count alike.
"""

import jax
import jax.numpy as jnp
import optax

from cofi_jax.model import Batch


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` under non-negative `weights` of the same shape."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


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
        return weighted_mean(losses, batch["weight"])
    logits, weight = _choices(problem, logits, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"].reshape(-1)
    )
    return weighted_mean(losses, weight)


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
        return weighted_mean(jnp.square(student - teacher)[:, 0], batch["weight"])
    student, weight = _choices(problem, student, batch)
    teacher, _ = _choices(problem, teacher, batch)
    p = jax.nn.log_softmax(teacher / temperature)
    q = jax.nn.log_softmax(student / temperature)
    divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
    return temperature**2 * weighted_mean(divergence, weight)


def _choices(problem, logits, batch):
    """Rows of logits to choose from, and the rows' weights; two rows of each span."""
    if problem == "classification":
        return logits, batch["weight"]
    real = batch["attention_mask"][:, None] > 0
    logits = jnp.where(real, jnp.swapaxes(logits, 1, 2), -1e9)
    return logits.reshape(-1, logits.shape[-1]), jnp.repeat(batch["weight"], 2)
