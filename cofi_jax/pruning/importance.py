"""From the importance of each mask to an order, to log-alphas, and to a structure.

The importance of a mask is the mean squared gradient of a loss by it, at masks of 1
(`training.importance` measures it). To second order, this is proportional to what
closing the mask alone adds to the loss (optimal brain damage, with Fisher's information
in place of the Hessian). Divided by the cost that the mask removes, it says what a unit
of cost is worth there.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER
from cofi_jax.pruning.cost import PARAMETERS, Cost
from cofi_jax.pruning.masks import LogAlpha, Masks, padded

# The log-alpha of the most important mask: just inside the range of the sampler.
_OPEN = 4.5
_BLOCKS_LATER = 10.0


def removed_alone(
    config: EncoderConfig, masks: Masks, cost: Cost = PARAMETERS
) -> dict[str, np.ndarray]:
    """The cost that closing each mask removes while all others are open, by kind.

    Args:
      config: the sizes of the model that is pruned.
      masks: any of the kinds; their shapes alone are read.
      cost: what is counted.
    """
    real = padded(config)
    ones = {k: jnp.ones(v.shape) * real.get(k, 1.0) for k, v in masks.items()}

    def left(masks):
        return jnp.asarray(cost.expected(masks, config), jnp.float32)

    return jax.tree.map(np.asarray, jax.grad(left)(ones))


def ranks(
    importance: Masks, config: EncoderConfig, cost: Cost = PARAMETERS
) -> dict[str, jax.Array]:
    """Masks in (0, 1] whose order is that of importance per removed cost.

    Heads, feed-forward units and hidden dimensions are ranked together: the rank is the
    share of their cost that is worth no more than the mask's own. Masks of whole blocks
    are ranked among the blocks of their kind, each with the same share.

    Args:
      importance: as from `training.importance`, by kind.
      config: the sizes of the model that was measured.
      cost: what a mask costs.
    """
    removes, real, found = removed_alone(config, importance, cost), padded(config), {}
    worth = {
        kind: np.where(real.get(kind, True), value, 0) / np.maximum(removes[kind], 1e-9)
        for kind, value in importance.items()
    }
    fine = [kind for kind in importance if kind not in INNER]
    if fine:
        values = np.concatenate([np.ravel(worth[kind]) for kind in fine])
        shares = np.concatenate([np.ravel(removes[kind]) for kind in fine])
        ranked = _ranked(values, shares)
        for kind in fine:
            part, ranked = np.split(ranked, [np.size(worth[kind])])
            found[kind] = part.reshape(worth[kind].shape)
    for kind in set(importance) - set(fine):
        found[kind] = _ranked(worth[kind], np.ones_like(worth[kind]))
    return {kind: jnp.asarray(found[kind], jnp.float32) for kind in importance}


def _ranked(values, shares):
    """The share of all `shares` that belongs to values up to each one, (N,)."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.cumsum(shares[order]) / max(shares.sum(), 1e-9)
    return found


def seed_log_alpha(
    importance: Masks,
    config: EncoderConfig,
    *,
    spread: float = 30.0,
    cost: Cost = PARAMETERS,
) -> LogAlpha:
    """Log-alphas in the order of importance, for a constraint that moves them together.

    Args:
      importance: as from `training.importance`, by kind.
      config: the sizes of the model that was measured.
      spread: the distance between the most and the least important mask. A mask is
        undecided over a distance of about 6, so the wider they are spread, the fewer
        are undecided at a time, and the less their order is learned anew.
      cost: what a mask costs.

    Returns:
      float32 arrays of the masks' shapes, -inf for padding.
    """
    real = padded(config)
    seeds = {}
    for kind, rank in ranks(importance, config, cost).items():
        # A block closes after most of what is inside of it.
        most = _OPEN + (_BLOCKS_LATER if kind in INNER else 0)
        seeds[kind] = jnp.where(
            real.get(kind, True), most - spread * (1 - rank), -jnp.inf
        )
    return seeds
