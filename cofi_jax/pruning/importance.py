"""Masks and log-alphas in the order of importance, or of magnitude.

The importance of a mask is the mean squared gradient of a loss with respect to it, at
masks of 1; `training.importance` measures it. To second order, it is proportional to
the loss that closing this mask alone adds: this is optimal brain damage with the Fisher
information in place of the Hessian. Importance divided by the cost that closing the
mask removes says what a unit of cost is worth there.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, KINDS, place
from cofi_jax.pruning.cost import PARAMETERS, Cost
from cofi_jax.pruning.masks import LogAlpha, Masks, mask_shapes, real_positions

# The log-alpha of the most important unit, just inside `LOG_ALPHA_RANGE`.
_OPEN = 4.5
# The offset of the masks of whole blocks, which close after most masks inside them.


def magnitude(
    params: dict, config: EncoderConfig, kinds: Sequence[str] = KINDS
) -> dict[str, np.ndarray]:
    """Returns the sum of squares of the parameters that closing each mask removes.

    It takes the place of importance in `ranks` and `seed_log_alpha`, to prune by
    magnitude. Only the parameters that the cost counts are summed up.

    Args:
      params: the parameters of the model.
      config: the sizes of the model.
      kinds: the kinds of masks.

    Returns:
      For each kind a float array of the shape of its masks, 0 at padding.

    Raises:
      UserError: if a kind is unknown or if there is none.
    """
    found = {k: np.zeros(shape) for k, shape in mask_shapes(config, kinds).items()}
    flat = traverse_util.flatten_dict(params)
    for path, array in flat.items():
        axes, layer, block = place(path, flat)
        if block is None or path[1] == block.norm:
            continue
        squares = np.square(np.asarray(array, np.float64))
        sums = {  # over all other axes than that of the units
            letter: squares.sum(tuple(i for i, x in enumerate(axes) if x != letter))
            for letter in (block.unit, "D")
        }
        if block.outer in found:
            found[block.outer][layer] += squares.sum()
        if block.inner in found and block.unit in axes:
            units = block.sizes(config)[layer]
            found[block.inner][layer, :units] += sums[block.unit]
        if "hidden" in found and "D" in axes:
            found["hidden"] += sums["D"]
    return found


def removed_alone(
    config: EncoderConfig, masks: Masks, cost: Cost = PARAMETERS
) -> dict[str, np.ndarray]:
    """Returns the cost that closing each mask removes while all others are open.

    Args:
      config: the sizes of the model that is pruned.
      masks: arrays of any of the kinds, of which only the shapes are read.
      cost: the cost that is meant.

    Returns:
      For each kind an array of the shape of its masks.
    """
    real = real_positions(config)
    ones = {k: jnp.ones(v.shape) * real.get(k, 1.0) for k, v in masks.items()}

    def left(masks):
        return jnp.asarray(cost.expected(masks, config), jnp.float32)

    # Compiled as one program: one for each operation would take longer to make ready.
    return jax.tree.map(np.asarray, jax.jit(jax.grad(left))(ones))


def ranks(
    importance: Masks, config: EncoderConfig, cost: Cost = PARAMETERS
) -> dict[str, jax.Array]:
    """Returns masks in (0, 1] in the order of their importance per removed cost.

    Heads, feed-forward units and hidden dimensions are ranked together. The rank of one
    is the share of all their cost that is worth no more than the cost it removes. The
    masks of whole blocks are ranked within their kind, where each has the same share.

    Args:
      importance: the importance of each mask, as `training.importance` measures it.
      config: the sizes of the model that was measured.
      cost: the cost that closing masks removes.

    Returns:
      For each kind a float32 array of the shape of its masks.
    """
    removes, real = removed_alone(config, importance, cost), real_positions(config)
    worth = {
        kind: np.where(real.get(kind, True), value, 0) / np.maximum(removes[kind], 1e-9)
        for kind, value in importance.items()
    }
    found = {
        kind: _ranked(value, np.ones_like(value))
        for kind, value in worth.items()
        if kind in INNER
    }
    if fine := [kind for kind in worth if kind not in INNER]:
        values = np.concatenate([np.ravel(worth[kind]) for kind in fine])
        shares = np.concatenate([np.ravel(removes[kind]) for kind in fine])
        ends = np.cumsum([worth[kind].size for kind in fine])
        parts = np.split(_ranked(values, shares), ends[:-1])
        for kind, part in zip(fine, parts, strict=True):
            found[kind] = part.reshape(worth[kind].shape)
    return {kind: jnp.asarray(found[kind], jnp.float32) for kind in importance}


def _ranked(values, shares):
    """Returns for each value the part of all shares that values up to it have, (N,)."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.cumsum(shares[order]) / max(shares.sum(), 1e-9)
    return found


def seed_log_alpha(
    importance: Masks,
    config: EncoderConfig,
    *,
    spread: float = 30.0,
    blocks_later: float = 10.0,
    cost: Cost = PARAMETERS,
) -> LogAlpha:
    """Returns log-alphas in the order of importance, to start pruning from.

    They suit a constraint that moves all log-alphas by a common offset, such as
    `constraint.at_target`.

    Args:
      importance: the importance of each mask, as `training.importance` measures it.
      config: the sizes of the model that was measured.
      spread: the distance between the most and the least important mask. A mask is
        undecided over a distance of about 6, so with a wider spread fewer masks are
        undecided at a time, and training changes their order less.
      blocks_later: how much later than their rank says the masks of whole blocks close,
        so that most of what is inside a block closes before it.
      cost: the cost that closing masks removes.

    Returns:
      float32 arrays of the shapes of the masks, -inf at padding.
    """
    real, seeds = real_positions(config), {}
    for kind, rank in ranks(importance, config, cost).items():
        most = _OPEN + (blocks_later if kind in INNER else 0)
        seed = most - spread * (1 - rank)
        seeds[kind] = jnp.where(real.get(kind, True), seed, -jnp.inf)
    return seeds
