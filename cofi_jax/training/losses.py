"""Layer distillation: the student's layers imitate those of its teacher.

Where a batch is worked through in m parts, a mean over one part is divided by the
denominator of the whole batch: `total` is 1/m of the weight of all parts together. The
mean over the parts is then the mean over the batch. The losses of the logits are
methods of each `data.problems.Problem`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cofi_jax.data.problems.base import weighted_mean
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import masks as masks_lib

# A matcher maps the distances (K, L) of K taught teacher layers to L student layers,
# the student layers (L,) that are alive, and the numbers (K,) of the taught layers to
# the number of the student layer that each taught layer is compared with, (K,) int32,
# and the weight of each comparison, (K,).
Matcher = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def taught_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` evenly spaced teacher layers (of 12, 4: 2, 5, 8 and 11)."""
    count = min(count, num_layers)
    return tuple(int(num_layers * (k + 1) / count + 0.5) - 1 for k in range(count))


def draw_layers(key: jax.Array, num_layers: int, count: int) -> jax.Array:
    """Draws one teacher layer from each of `count` equal windows, (K,) int32.

    The windows end where `taught_layers` are (of 12, 4: 0-2, 3-5, 6-8 and 9-11).
    """
    last = jnp.array(taught_layers(num_layers, count))
    first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1] + 1])
    return jax.random.randint(key, last.shape, first, last + 1)


def match_closest(
    costs: jax.Array, alive: jax.Array, taught: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A `Matcher`: each taught layer takes the closest layer that is alive.

    It is layer 0 where no layer is alive.
    """
    closest = jnp.argmin(jnp.where(alive, costs, jnp.inf), axis=1)
    matched = jnp.where(alive.any(), closest, 0).astype(jnp.int32)
    return matched, jnp.ones(len(taught))


def match_ordered(
    costs: jax.Array, alive: jax.Array, taught: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A `Matcher`: the closest layers that keep the order of the teacher's layers.

    From the last taught layer down, each takes the closest alive layer below the one
    taken before, and the lowest alive layer where none is left.
    """
    ids, lowest = jnp.arange(costs.shape[1]), jnp.argmax(alive)
    matched, bound = [], costs.shape[1]
    for row in costs[::-1]:
        candidate = alive & (ids < bound)
        closest = jnp.argmin(jnp.where(candidate, row, jnp.inf))
        bound = jnp.where(candidate.any(), closest, lowest)
        matched.append(bound)
    return jnp.stack(matched[::-1]).astype(jnp.int32), jnp.ones(len(taught))


def match_fixed(
    costs: jax.Array, alive: jax.Array, taught: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A `Matcher`: the layer of the same number; a dead one is not compared."""
    del costs
    return taught, alive[taught]


MATCHERS: dict[str, Matcher] = {
    "closest": match_closest,
    "ordered": match_ordered,
    "fixed": match_fixed,
}


def distill_layers(
    student: jax.Array,
    teacher: jax.Array,
    projection: jax.Array,
    token_weight: jax.Array,
    alive: jax.Array,
    taught: jax.Array,
    *,
    match: Matcher,
    total: jax.Array | None = None,
) -> jax.Array:
    """The layer distillation loss of the paper's section 3.2.

    Args:
      student: the outputs of the student's layers, (L, B, T, D') in any float dtype.
      teacher: the outputs of the taught teacher layers, (K, B, T, D).
      projection: the learned map W from the student's width to the teacher's, (D', D).
      token_weight: (B, T), 0 for padding.
      alive: the student layers that may be chosen, (L,) booleans.
      taught: the numbers of the taught layers, (K,) int32.
      match: chooses the student layer that each taught layer is compared with.
      total: replaces the sum of the token weights as the denominator of the means.

    Returns:
      The mean squared errors between each taught layer and W times its student layer,
      summed over the taught layers.
    """

    # The product is in the student's dtype, in the backward pass too.
    def project(states, projection):
        return (states @ projection.astype(states.dtype)).astype(jnp.float32)

    def distance(t, s):  # (B, T, D), (B, T, D)
        return weighted_mean(jnp.square(t - s).mean(-1), token_weight, total)

    # The choice has no gradient, so only the chosen layers are differentiated. Where
    # the matcher ignores the distances, XLA removes their computation.
    projected = project(*jax.lax.stop_gradient((student, projection)))
    costs = jax.vmap(lambda t: jax.vmap(lambda s: distance(t, s))(projected))(teacher)
    matched, weights = match(costs, alive, taught)
    chosen = project(take_layers(student, matched), projection)
    return jnp.sum(jax.vmap(distance)(teacher, chosen) * weights)


def take_layers(outputs: jax.Array, ids: jax.Array | Sequence[int]) -> jax.Array:
    """`outputs[ids]` along the first axis, with a gradient that is summed in order.

    The gradient of `outputs[ids]` is a scatter, which a GPU adds up in any order: a
    resumed run would not end with the same bits.
    """
    return jnp.stack(
        [jax.lax.dynamic_index_in_dim(outputs, i, keepdims=False) for i in ids]
    )


def alive_layers(config: EncoderConfig, masks: masks_lib.Masks) -> jax.Array:
    """(L,) booleans: the layer has a block that is not absent."""
    present = masks_lib.present_blocks(masks, config).values()
    return functools.reduce(jnp.logical_or, present)
