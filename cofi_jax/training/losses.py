"""What the layers of a student should be: those of its teacher.

A mean over a batch that is worked through in m parts has the whole batch's
denominator: the batch's `total`, 1/m of the `rows` and of the `tokens` of all parts.
So the mean over the parts is the mean over the batch. The losses of the logits are
methods of each `data.problems.Problem`.
"""

import jax
import jax.numpy as jnp

from cofi_jax.data.problems.base import weighted_mean
from cofi_jax.pruning import masks as masks_lib


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
