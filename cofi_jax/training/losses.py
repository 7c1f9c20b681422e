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

from cofi_jax.models.bert import Batch
from cofi_jax.pruning import masks as masks_lib


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


def taught_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Ids of `count` teacher layers, evenly spaced up to the last (12, 4: 2 5 8 11)."""
    count = min(count, num_layers)
    return tuple(int(num_layers * (k + 1) / count + 0.5) - 1 for k in range(count))


def draw_layers(key: jax.Array, num_layers: int, count: int) -> jax.Array:
    """Ids (K,) of `count` teacher layers, one of each of as many equal windows.

    The windows end where `taught_layers` are (12, 4: 0-2, 3-5, 6-8, 9-11).
    """
    last = jnp.array(taught_layers(num_layers, count))
    first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1] + 1])
    return jax.random.randint(key, last.shape, first, last + 1)


def match_layers(costs: jax.Array, alive: jax.Array, *, ordered: bool) -> jax.Array:
    """The student layer that each taught teacher layer is compared with.

    Args:
      costs: (K, L) distance of teacher layer k and student layer l.
      alive: (L,) whether the student layer still has a block.
      ordered: going from the last teacher layer down, only layers below the one
        matched before; with none left, the lowest alive one. Otherwise each teacher
        layer takes the closest alive layer.

    Returns:
      (K,) int32 layer ids; 0 where no layer is alive.
    """
    ids = jnp.arange(costs.shape[1])
    lowest = jnp.argmax(alive)
    if not ordered:
        closest = jnp.argmin(jnp.where(alive, costs, jnp.inf), axis=1)
        return jnp.where(alive.any(), closest, 0).astype(jnp.int32)
    matched, bound = [], costs.shape[1]
    for row in costs[::-1]:
        candidate = alive & (ids < bound)
        closest = jnp.argmin(jnp.where(candidate, row, jnp.inf))
        bound = jnp.where(candidate.any(), closest, lowest)
        matched.append(bound)
    return jnp.stack(matched[::-1]).astype(jnp.int32)


def distill_layers(
    student: jax.Array,
    teacher: jax.Array,
    projection: jax.Array,
    token_weight: jax.Array,
    alive: jax.Array,
    taught: jax.Array,
    *,
    match: str,
    total: jax.Array | None = None,
) -> jax.Array:
    """Sum over teacher layers of the mean squared error to the matched student layer.

    Args:
      student: (L, B, T, D') outputs of the student's layers, in any float dtype.
      teacher: (K, B, T, D) outputs of the taught layers.
      projection: (D', D), from the student's width to the teacher's.
      token_weight: (B, T), 0 for padding.
      alive: (L,) student layers that may be chosen.
      taught: (K,) the numbers of the taught layers.
      match: closest or ordered, see `match_layers`; or fixed: the student's layer of
        the taught layer's number, and nothing where that one is not alive.
      total: takes the place of the token weights' sum.
    """

    # In the states' dtype, to which the teacher's are rounded too; also the way back.
    def project(states, projection):
        return (states @ projection.astype(states.dtype)).astype(jnp.float32)

    def distance(t, s):  # (B, T, D), (B, T, D)
        return weighted_mean(jnp.square(t - s).mean(-1), token_weight, total)

    if match == "fixed":
        matched, counts = taught, alive[taught]
    else:
        # The choice has no gradient, so only the chosen layers are differentiated.
        projected = project(*jax.lax.stop_gradient((student, projection)))
        costs = jax.vmap(lambda t: jax.vmap(lambda s: distance(t, s))(projected))(
            teacher
        )
        matched = match_layers(costs, alive, ordered=match == "ordered")
        counts = jnp.ones(len(matched))
    chosen = project(_layers(student, matched), projection)
    return jnp.sum(jax.vmap(distance)(teacher, chosen) * counts)


def _layers(outputs, ids):
    # Not outputs[ids], whose gradient is a scatter: on a GPU its sums would come in
    # any order, and a resumed run would differ.
    return jnp.stack(
        [jax.lax.dynamic_index_in_dim(outputs, i, keepdims=False) for i in ids]
    )


def alive_layers(config, masks: masks_lib.Masks) -> jax.Array:
    """(L,) booleans: the layer has a block that is not absent."""
    alive = jnp.zeros(len(config.heads), bool)
    for block, inner, widths in (
        ("mha", "head", config.heads),
        ("ffn", "intermediate", config.intermediate),
    ):
        present = jnp.asarray(widths) > 0
        if block in masks:
            present &= masks[block] > 0
        if inner in masks:
            present &= (masks[inner] > 0).any(-1)
        alive |= present
    return alive
