"""Layer distillation, by which the student's layers learn to imitate the teacher's.

If a batch is worked through in m parts, the mean over a part is divided by `total`,
which is 1/m of the weight of the whole batch. The mean over the parts is then the mean
over the batch. The losses of the logits are methods of each `data.problems.Problem`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cofi_jax.data.problems.base import weighted_mean
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import masks as masks_lib

# A matcher chooses the student layer that each taught layer is compared with. It takes
# the distances (K, L) of the K taught layers of the teacher to the L student layers,
# booleans (L,) of the student layers that are alive, and the numbers (K,) of the taught
# layers. It returns the numbers (K,) int32 of the chosen layers, and the weights (K,)
# of the comparisons.
Match = tuple[jax.Array, jax.Array]
Matcher = Callable[[jax.Array, jax.Array, jax.Array], Match]


def taught_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Returns `count` evenly spaced teacher layers; 4 of 12 are 2, 5, 8 and 11."""
    count = min(count, num_layers)
    return tuple(int(num_layers * (k + 1) / count + 0.5) - 1 for k in range(count))


def draw_layers(key: jax.Array, num_layers: int, count: int) -> jax.Array:
    """Draws one teacher layer from each of `count` equal windows, (K,) int32.

    The windows end at the `taught_layers`; for 4 of 12 they are 0-2, 3-5, 6-8 and 9-11.
    """
    last = jnp.array(taught_layers(num_layers, count))
    first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1] + 1])
    return jax.random.randint(key, last.shape, first, last + 1)


def match_closest(costs: jax.Array, alive: jax.Array, taught: jax.Array) -> Match:
    """A `Matcher` that chooses the closest layer that is alive, or 0 if none is."""
    closest = jnp.argmin(jnp.where(alive, costs, jnp.inf), axis=1)
    matched = jnp.where(alive.any(), closest, 0).astype(jnp.int32)
    return matched, jnp.ones(len(taught))


def match_ordered(costs: jax.Array, alive: jax.Array, taught: jax.Array) -> Match:
    """A `Matcher` that chooses the closest layers in the order of the teacher's layers.

    The last taught layer chooses first. Each chooses the closest alive layer below the
    one chosen before, or the lowest alive layer if none is left.
    """
    ids, lowest = jnp.arange(costs.shape[1]), jnp.argmax(alive)
    matched, bound = [], costs.shape[1]
    for row in costs[::-1]:
        candidate = alive & (ids < bound)
        closest = jnp.argmin(jnp.where(candidate, row, jnp.inf))
        bound = jnp.where(candidate.any(), closest, lowest)
        matched.append(bound)
    return jnp.stack(matched[::-1]).astype(jnp.int32), jnp.ones(len(taught))


def match_fixed(costs: jax.Array, alive: jax.Array, taught: jax.Array) -> Match:
    """A `Matcher` that chooses the layer of the same number, with weight 0 if dead."""
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
    """Computes the layer distillation loss (paper, section 3.2).

    Args:
      student: the outputs of the student's layers, (L, B, T, D') in any float dtype.
      teacher: the outputs of the taught layers of the teacher, (K, B, T, D).
      projection: the learned map W from the student's width to the teacher's, (D', D).
      token_weight: the weights of the tokens, (B, T), 0 for padding.
      alive: booleans (L,) of the student layers that are alive.
      taught: the numbers of the taught layers, (K,) int32.
      match: the matcher that chooses a student layer for each taught layer.
      total: the denominator of the means, if not the sum of the token weights.

    Returns:
      The sum over the taught layers of the mean squared error between the taught layer
      and W times its student layer, a scalar.
    """

    # The product is in the student's dtype, also in the backward pass.
    def project(states, projection):  # (..., D'), (D', D) -> (..., D)
        return (states @ projection.astype(states.dtype)).astype(jnp.float32)

    def distance(t, s):  # (B, T, D), (B, T, D) -> ()
        return weighted_mean(jnp.square(t - s).mean(-1), token_weight, total)

    # The choice has no gradient, so only the chosen layers are differentiated. If the
    # matcher ignores the distances, XLA removes their computation.
    projected = project(*jax.lax.stop_gradient((student, projection)))  # (L, B, T, D)
    costs = jax.vmap(lambda t: jax.vmap(lambda s: distance(t, s))(projected))(teacher)
    matched, weights = match(costs, alive, taught)  # costs is (K, L)
    chosen = project(take_layers(student, matched), projection)  # (K, B, T, D)
    return jnp.sum(jax.vmap(distance)(teacher, chosen) * weights)


def take_layers(outputs: jax.Array, ids: jax.Array | Sequence[int]) -> jax.Array:
    """Returns `outputs[ids]` along the first axis, with a deterministic gradient.

    The gradient of `outputs[ids]` itself is a scatter, which a GPU sums in any order,
    so a resumed run would not end with the same bits.
    """
    return jnp.stack(
        [jax.lax.dynamic_index_in_dim(outputs, i, keepdims=False) for i in ids]
    )


def alive_layers(config: EncoderConfig, masks: masks_lib.Masks) -> jax.Array:
    """Returns booleans (L,) of the layers in which some block is present."""
    present = masks_lib.present_blocks(masks, config).values()
    return functools.reduce(jnp.logical_or, present)
