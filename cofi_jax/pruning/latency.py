"""Measured time as a cost: a speedup is the sparsity of the time.

A table says how long a device takes. A model takes T_0 for what cannot be pruned, and
each block of n units c(n) more, where c is a piecewise linear curve and 0 units take no
time. If all masks are drawn independently of each other,

    E[T] = T_0 + sum over blocks, over layers l: outer_l * E[c(N_l)]

where N_l is the number of open masks in the block, which is Poisson-binomial. Few units
are convolved one by one, which is exact. Of many units, the number is close to normal,
with the mean m and the standard deviation s. The curve is a sum of ramps, one for each
knot k at which its slope changes, and with z = |m - k| / s,

    E[max(0, N - k)] = max(0, m - k) + s (phi(z) - z Phi(-z))

where phi and Phi are the density and the distribution function of a standard normal
variable. Where the block has a mask of its own, c(0) is c at the first knot here: a
sliced block is free only if its own mask is closed, since evaluation leaves at least
one unit in a block that is probably there. Masks of 0 and 1 that are closed throughout
in each closed block therefore have an expected time that is their exact time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.stats import norm

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import blocks
from cofi_jax.pruning.cost import Cost
from cofi_jax.pruning.masks import Masks, without_padding

FEW = 32  # Up to so many units, their number is convolved and each is measured.
# The least slope of a curve as a fraction of its mean slope. On a plateau, a constraint
# would otherwise not know which way to go.
_LEAST_SLOPE = 0.01


class Curve(NamedTuple):
    """The time of a block by the number of its units; no unit takes no time.

    Attributes:
      counts: rising numbers of units, the first of which is at least 1, (K,).
      ms: the milliseconds of a block of so many, (K,).
    """

    counts: Any
    ms: Any


class Table(NamedTuple):
    """What a device takes for a batch, a pytree of arrays.

    Attributes:
      overhead: the milliseconds of what cannot be pruned, a scalar.
      curves: the `Curve` of each block by its name.
    """

    overhead: Any
    curves: dict[str, Curve]

    def straight(self) -> "Table":
        """The same table with lines in place of its curves, from no unit to all.

        By it, a unit is worth its share of a whole block. The slope of a curve between
        two knots is too sensitive to noise to divide by.
        """
        curves = {}
        for name, (counts, ms) in self.curves.items():
            curves[name] = Curve(counts, ms[-1] * counts / counts[-1])
        return Table(self.overhead, curves)


def rising(counts: np.ndarray, ms: np.ndarray) -> Curve:
    """Returns the curve that a constraint can follow, of times that were measured.

    It is the rising curve that is closest to them (isotonic regression), with a slope
    of at least 1 % of its mean slope, and with positive times.

    Args:
      counts: rising numbers of units, (K,).
      ms: the times, with noise, (K,).
    """
    from scipy.optimize import isotonic_regression  # slow to import

    counts, ms = np.asarray(counts, float), np.asarray(ms, float)
    found = isotonic_regression(np.maximum(ms, 1e-3 * np.abs(ms).max())).x
    steps = np.diff(counts)
    least = _LEAST_SLOPE * (found[-1] - found[0]) / max(counts[-1] - counts[0], 1)
    climbed = np.cumsum(np.maximum(np.diff(found), least * steps))
    return Curve(counts, found[0] + np.concatenate([[0], climbed]))


def cost(table: Table) -> Cost:
    """Returns the time by a table as a cost; the table may be traced."""
    return Cost(
        functools.partial(_expected, table=table),
        functools.partial(_exact, table=table),
    )


def sparsity_of(speedup: float) -> float:
    """Returns the fraction of the time that a speedup removes."""
    return 1 - 1 / speedup


def speedup_of(sparsity: float) -> float:
    """Returns the speedup, given the fraction of the time that is removed."""
    return 1 / (1 - sparsity)


def _exact(masks: Masks, config: EncoderConfig, table: Table) -> Any:
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((dict(masks), table)))
    xp: Any = jnp if traced else np
    masks = {kind: xp.asarray(v) > 0 for kind, v in masks.items()}
    masks, total = without_padding(masks, config), table.overhead
    for block in blocks(config):
        units = np.asarray(block.sizes(config))  # (L,), like all that follow
        if block.inner in masks:
            units = masks[block.inner].sum(-1)
        there = (units > 0) * masks.get(block.outer, 1)
        curve = table.curves[block.name]
        total = total + (xp.interp(units, curve.counts, curve.ms) * there).sum()
    return total


def _expected(probabilities: Masks, config: EncoderConfig, table: Table) -> Any:
    masks, total = without_padding(probabilities, config), table.overhead
    for block in blocks(config):
        curve = table.curves[block.name]
        units = np.asarray(block.sizes(config))  # (L,), like all that follow
        if block.inner in masks:
            chances = jnp.asarray(masks[block.inner])  # (L, W)
            left = _mean(curve, chances)
            if block.outer not in masks:  # The block goes with the last of its units.
                left = left - (1 - chances).prod(-1) * curve.ms[0]
        else:
            left = jnp.interp(units, curve.counts, curve.ms)
        total = total + (left * (units > 0) * masks.get(block.outer, 1)).sum()
    return total


def _mean(curve: Curve, chances: jax.Array) -> jax.Array:
    """Returns E[c(N)] of units that are open with these chances, (L, W) to (L,)."""
    counts, ms = jnp.asarray(curve.counts), jnp.asarray(curve.ms)
    width = chances.shape[-1]
    if width <= FEW:
        number = jnp.zeros((*chances.shape[:-1], width + 1)).at[..., 0].set(1)
        for unit in range(width):
            chance = chances[..., unit, None]
            number = number * (1 - chance) + jnp.roll(number, 1, -1) * chance
        return (number * jnp.interp(jnp.arange(width + 1), counts, ms)).sum(-1)
    mean, variance = chances.sum(-1), (chances * (1 - chances)).sum(-1)
    random = variance > 1e-9  # The derivative of the root is not finite at 0.
    deviation = jnp.sqrt(jnp.where(random, variance, 1))[..., None]
    slopes = jnp.diff(ms) / jnp.diff(counts)
    bends = jnp.diff(slopes, prepend=0)  # at all knots but the last
    z = jnp.abs(mean[..., None] - counts[:-1]) / deviation
    more = (bends * deviation * (norm.pdf(z) - z * norm.cdf(-z))).sum(-1)
    return jnp.interp(mean, counts, ms) + jnp.where(random, more, 0)
