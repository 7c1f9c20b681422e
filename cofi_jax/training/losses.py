"""The layer term of distillation: the student's layers imitate the teacher's.

The mean over a batch that is taken in m parts uses the denominator of the whole batch,
which the parts carry as `total`: 1/m of the `rows` and of the `tokens` of all parts.
So the mean over the parts is the mean over the batch. The losses of the logits are
methods of each `data.problems.Problem`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cofi_jax.data.problems.base import weighted_mean
from cofi_jax.pruning import masks as masks_lib

# Maps the costs (K, L) of pairing teacher and student layers, and which student layers
# are alive (L,), to the student layer of each teacher layer, (K,) int32.
Matcher = Callable[[jax.Array, jax.Array], jax.Array]


def taught_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Returns `count` layer numbers, evenly spaced up to the last: 2 5 8 11 of 12."""
    count = min(count, num_layers)
    return tuple(int(num_layers * (k + 1) / count + 0.5) - 1 for k in range(count))


def draw_layers(key: jax.Array, num_layers: int, count: int) -> jax.Array:
    """Draws (K,) layer numbers, one from each of `count` windows of equal length.

    The windows end at the `taught_layers`: 0-2, 3-5, 6-8 and 9-11 of 12.
    """
    last = jnp.array(taught_layers(num_layers, count))
    first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1] + 1])
    return jax.random.randint(key, last.shape, first, last + 1)


def match_closest(costs: jax.Array, alive: jax.Array) -> jax.Array:
    """Matches each teacher layer with the closest student layer that is alive.

    Args:
      costs: (K, L) distances of the teacher layers from the student layers.
      alive: (L,) whether a student layer still has a block.

    Returns:
      (K,) int32 numbers of student layers; 0 where none is alive.
    """
    closest = jnp.argmin(jnp.where(alive, costs, jnp.inf), axis=1)
    return jnp.where(alive.any(), closest, 0).astype(jnp.int32)


def match_ordered(costs: jax.Array, alive: jax.Array) -> jax.Array:
    """Matches like `match_closest`, but in the order of the layers.

    From the last teacher layer down, only student layers below the one that was matched
    before are eligible; where none is left, the lowest layer that is alive is taken.
    """
    numbers, lowest = jnp.arange(costs.shape[1]), jnp.argmax(alive)
    matched, bound = [], costs.shape[1]
    for row in costs[::-1]:
        eligible = alive & (numbers < bound)
        closest = jnp.argmin(jnp.where(eligible, row, jnp.inf))
        bound = jnp.where(eligible.any(), closest, lowest)
        matched.append(bound)
    return jnp.stack(matched[::-1]).astype(jnp.int32)


MATCHERS: dict[str, Matcher] = {"closest": match_closest, "ordered": match_ordered}


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
    """Sums the mean squared error to the matched student layer over teacher layers.

    Args:
      student: (L, B, T, D') outputs of the student's layers, in any float dtype.
      teacher: (K, B, T, D) outputs of the taught layers.
      projection: (D', D) map from the student's width to the teacher's.
      token_weight: (B, T), 0 for padding.
      alive: (L,) whether a student layer may be chosen.
      taught: (K,) the numbers of the taught layers.
      match: a key of `MATCHERS`, or `fixed`: the student layer has the number of the
        taught layer, and the term is 0 where that layer is not alive.
      total: takes the place of the sum of the token weights.
    """

    # The products are in the dtype of the states, to which the teacher's are rounded
    # too, and so is the backward pass.
    def project(states, projection):
        return (states @ projection.astype(states.dtype)).astype(jnp.float32)

    def distance(t, s):  # both (B, T, D)
        return weighted_mean(jnp.square(t - s).mean(-1), token_weight, total)

    if match == "fixed":
        matched, counts = taught, alive[taught]
    else:
        # The choice has no gradient, so only the chosen layers are differentiated.
        projected = project(*jax.lax.stop_gradient((student, projection)))
        to_each = jax.vmap(distance, in_axes=(None, 0))
        matched = MATCHERS[match](
            jax.vmap(to_each, (0, None))(teacher, projected), alive
        )
        counts = jnp.ones(len(matched))
    chosen = project(pick_layers(student, matched), projection)
    return jnp.sum(jax.vmap(distance)(teacher, chosen) * counts)


def pick_layers(outputs: jax.Array, numbers: jax.Array) -> jax.Array:
    """Picks (K, ...) of the layers' outputs (L, ...) by (K,) numbers."""
    # The gradient of outputs[numbers] would be a scatter, whose sums come in any order
    # on a GPU, so that a resumed run would differ.
    return jnp.stack(
        [jax.lax.dynamic_index_in_dim(outputs, i, keepdims=False) for i in numbers]
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
