"""The sparsity constraint, in expectation while masks are learned and exact afterwards.

Masks that meet a target exactly are found by bisection over a closing order. The order
says which mask closes first, which is the least open one, and the bisection finds the
smallest number of masks whose closing meets the target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cofi_jax.errors import at_most, reject, warn
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, KINDS
from cofi_jax.pruning import hard_concrete
from cofi_jax.pruning.cost import PARAMETERS, Cost, exact_sparsity
from cofi_jax.pruning.masks import (
    LogAlpha,
    Masks,
    evaluation_masks,
    mask_shapes,
    prob_active,
)
from cofi_jax.pruning.transforms import MaskTransform

# At this distance of a log-alpha from 0, P(mask > 0) is 0 or 1 in float32.
_FAR = 20.0
_BISECTIONS = 32
# Of equally open masks, the kind that removes the least closes first.
_FINE_TO_COARSE = ("intermediate", "head", "hidden", "mha", "ffn")


def expected_sparsity(
    log_alpha: LogAlpha, config: EncoderConfig, cost: Cost = PARAMETERS
) -> jax.Array:
    """Returns the mean sparsity over samples of the masks.

    Args:
      log_alpha: the log-alphas of the pruned kinds.
      config: the sizes of the model that is pruned.
      cost: the cost that sparsity is a fraction of.

    Returns:
      A scalar that is differentiable in the log-alphas.
    """
    left = cost.expected(prob_active(log_alpha), config)
    return 1 - left / jnp.float32(cost.exact({}, config))


def max_sparsity(
    config: EncoderConfig,
    kinds: Sequence[str] = KINDS,
    cost: Cost = PARAMETERS,
    lowest: float = hard_concrete.LOG_ALPHA_RANGE[0],
) -> float:
    """Returns the highest expected sparsity that masks of these kinds can reach.

    Args:
      config: the sizes of the model that is pruned.
      kinds: the kinds of masks.
      cost: what sparsity is a fraction of.
      lowest: the lowest log-alpha; -inf where log-alphas have no bounds.
    """
    least = float(hard_concrete.prob_active(jnp.float32(lowest)))
    shapes = mask_shapes(config, kinds).items()
    left = cost.expected({k: np.full(shape, least) for k, shape in shapes}, config)
    return float(1 - left / cost.exact({}, config))


def most_removable(
    config: EncoderConfig, kinds: Sequence[str] = KINDS, cost: Cost = PARAMETERS
) -> float:
    """Returns the highest exact sparsity: one hidden dimension always stays."""
    shapes = mask_shapes(config).items()
    lowest = {kind: np.zeros(shape) for kind, shape in shapes if kind in kinds}
    if "hidden" in lowest:
        lowest["hidden"][0] = 1
    return exact_sparsity(lowest, config, cost)


def target_at(
    step: jax.Array,
    target: jax.Array,
    warmup_steps: jax.Array,
    start: ArrayLike = 0.0,
    *,
    geometric: bool = False,
) -> jax.Array:
    """Returns the target at `step`, which rises from `start` to `target`.

    It rises linearly, or, if `geometric`, so that what is left falls geometrically.
    """
    risen = step / jnp.maximum(warmup_steps, 1)
    risen = jnp.where(step < warmup_steps, risen, 1.0)
    if geometric:
        left = jnp.subtract(1, start) ** (1 - risen)
        return 1 - left * jnp.subtract(1, target) ** risen
    return start + (target - start) * risen


def on_log_scale(sparsity: ArrayLike, target: ArrayLike) -> jax.Array:
    """Returns how far a sparsity is on the way to a target, on a logarithmic scale.

    That is ln(1 - s) / ln(1 - t), which is 0 without sparsity and 1 at the target. A
    cost that is 2 % too high is about as far from a target that leaves a half as from
    one that leaves a twelfth.
    """
    return jnp.log1p(jnp.negative(sparsity)) / jnp.log1p(jnp.negative(target))


def of_part(sparsity: ArrayLike, share: ArrayLike) -> Any:
    """Returns the sparsity of a part that has `share` of the cost of the whole."""
    return 1 - (1 - sparsity) / share


def of_whole(sparsity: ArrayLike, share: ArrayLike) -> Any:
    """Returns the sparsity of the whole, given that of the part: inverts `of_part`."""
    return 1 - (1 - sparsity) * share


def lagrangian(
    sparsity: jax.Array, target: jax.Array, multipliers: Mapping
) -> jax.Array:
    """Returns l1 * (s - t) + l2 * (s - t)**2, a scalar (paper, section 3.1)."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


def at_target(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: ArrayLike,
    cost: Cost = PARAMETERS,
) -> LogAlpha:
    """Moves all log-alphas by a common offset so that they meet the target exactly.

    The more is subtracted from the log-alphas, the lower is the expected cost, so the
    offset is found by bisection. It has no gradient: when the gradient of one mask
    raises its log-alpha, the offset lowers the others. No multiplier is needed.

    Args:
      log_alpha: the log-alphas of the pruned kinds, which need not lie in the range of
        `hard_concrete.LOG_ALPHA_RANGE`; -inf at padding.
      config: the sizes of the model that is pruned.
      target: the expected sparsity, a scalar. A target that cannot be reached is missed
        by as little as possible.
      cost: the cost that sparsity is a fraction of.

    Returns:
      Log-alphas of the same shapes, whose expected sparsity differs from the target by
      at most about 1e-5, the precision of float32.
    """
    fixed = jax.lax.stop_gradient(dict(log_alpha))
    finite = [jnp.where(jnp.isfinite(v), v, 0) for v in fixed.values()]
    # An offset of this size opens all masks, or closes all of them.
    widest = _FAR + jnp.stack([jnp.abs(v).max(initial=0) for v in finite]).max()

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        moved = {kind: value - middle for kind, value in fixed.items()}
        enough = expected_sparsity(moved, config, cost) >= target
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, offset = jax.lax.fori_loop(0, _BISECTIONS, halve, (-widest, widest))
    return {kind: value - offset for kind, value in log_alpha.items()}


def target_count(target: float, full: int) -> int:
    """Returns the largest number n of `full` with 1 - n / full >= target."""
    near = int((1 - target) * full)  # The product is rounded, so this may be 1 off.
    return max(n for n in (near - 1, near, near + 1) if 1 - n / full >= target)


def target_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    tolerance: float = 1e-3,
    cost: Cost = PARAMETERS,
) -> Masks:
    """Returns evaluation masks whose exact sparsity meets the target.

    If the evaluation masks miss the target by more than `tolerance`, the least open of
    them close, or the most open of the closed ones open with their soft value, until
    the target is just met. The last mask to close may be of a coarse kind and remove
    too much: a block of BERT-base has 3 or 6 % of its cost. Then that mask stays open
    and finer masks close in its place; if even that removes too much, the block closes
    and units open again. Masks that stay open keep their value, and one hidden
    dimension always stays open.

    Args:
      log_alpha: the log-alphas of the pruned kinds.
      config: the sizes of the model that is pruned.
      target: the sparsity to meet, in [0, 1).
      tolerance: the largest distance from the target that needs no correction.
      cost: the cost that sparsity is a fraction of.

    Returns:
      Masks of the same shapes.
    """
    learned = {k: np.asarray(v) for k, v in evaluation_masks(log_alpha).items()}
    soft = {k: np.asarray(hard_concrete.deterministic(v)) for k, v in log_alpha.items()}
    opened = {k: np.where(v > 0, v, soft[k]) for k, v in learned.items()}
    # A mask that evaluation closes has a rank below 0, so it closes before all others.
    ranks = {kind: opened[kind] - (mask <= 0) for kind, mask in learned.items()}
    order = {kind: np.asarray(place) for kind, place in _closing_order(ranks).items()}
    total = sum(mask.size for mask in learned.values())
    finest = next(kind for kind in _FINE_TO_COARSE if kind in order)

    def close_first(number, order):
        return {k: np.where(order[k] < number, 0, v) for k, v in opened.items()}

    def excess(number, order):
        return exact_sparsity(close_first(number, order), config, cost) - target

    def fewest(order):
        return int(_fewest(lambda number: excess(number, order) >= 0, total))

    best = sum(int((mask <= 0).sum()) for mask in learned.values()), order
    if abs(excess(*best)) > tolerance:
        best = fewest(order), order
    least = excess(*best)
    number, tried = best
    while least > tolerance and number > 0:
        last = {kind: place == number - 1 for kind, place in tried.items()}
        if last[finest].any():  # A single unit removes too much; nothing is finer.
            break
        tried = {kind: np.where(last[kind], total, tried[kind]) for kind in tried}
        if excess(total, tried) < 0:  # No finer masks are left to close.
            order = _units_alone(close_first(*best), ranks, order, finest, total)
            best = fewest(order), order
            break
        number = fewest(tried)
        if 0 <= excess(number, tried) < least:
            best, least = (number, tried), excess(number, tried)
    return {kind: jnp.asarray(mask) for kind, mask in close_first(*best).items()}


def _units_alone(masks, ranks, order, finest, total):
    """Returns an order in which only units close, and coarse masks stay as they are.

    If `masks` open no block of such units, the most open block is opened.
    """
    alone = {finest: order[finest]}
    for kind in set(order) - {finest}:
        stays = masks[kind] > 0
        if INNER.get(kind) == finest and not stays.any():
            stays = ranks[kind] == ranks[kind].max()
        alone[kind] = np.where(stays, total, -1)
    return alone


def final_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    transform: MaskTransform,
    cost: Cost = PARAMETERS,
    tolerance: float = 1e-3,
) -> Masks:
    """Returns evaluation masks that meet the target after `transform` opens some.

    More masks close beforehand to make up for those that open, so in a model of few
    units the sparsity ends above the target. If the transform opens so many that the
    target is out of reach, it is left out, with a warning.
    """
    aim = target
    for _ in range(20):
        masks = transform(target_masks(log_alpha, config, aim, tolerance, cost))
        missing = target - exact_sparsity(masks, config, cost)
        if missing <= tolerance:
            return masks
        aim += max(missing, 2 * tolerance)
    warn("widths stay as they are: rounded, they miss the target")
    return target_masks(log_alpha, config, target, tolerance, cost)


def meet_target(
    config: EncoderConfig, target: float, cost: Cost = PARAMETERS
) -> MaskTransform:
    """Closes the least open masks until the exact sparsity is at least the target.

    It closes no more masks than that takes: if the last of them stayed open, the target
    would be missed. Of equally open masks, `intermediate` masks close first, then
    `head`, `hidden`, `mha` and `ffn`; within a kind, the first mask of every row, then
    the second of every row, and so on. No mask opens, masks that meet the target do not
    change, and one hidden dimension always stays open. If log-alphas are at hand, use
    `target_masks`, which can also open masks.

    Args:
      config: the sizes of the model that is pruned.
      target: the sparsity to reach, in [0, 1).
      cost: the cost that sparsity is a fraction of.

    Raises:
      UserError: if the target is not in [0, 1), and, when the transform is applied, if
        the kinds of the masks cannot reach it.
    """
    if not 0 <= target < 1:
        raise reject("target", target, "must be in [0, 1)")
    full = cost.exact({}, config)
    counted = np.issubdtype(np.result_type(full), np.integer)

    def apply(masks):
        if (highest := most_removable(config, tuple(masks), cost)) < target:
            legal = f"masks of {tuple(masks)} reach {at_most(highest)}"
            raise reject("target", target, legal)
        order = _closing_order(masks)

        def close_first(number):
            return {k: jnp.where(order[k] < number, 0, v) for k, v in masks.items()}

        def enough(number):
            left = cost.exact(close_first(number), config)
            if not counted:
                return 1 - left / full >= target
            # Integers make this exact under jit too, where there is no float64.
            return left <= np.asarray(target_count(target, full), left.dtype)

        return close_first(_fewest(enough, sum(mask.size for mask in masks.values())))

    return apply


def _fewest(enough: Callable[[Any], Any], most: int) -> Any:
    """Bisects for the smallest number that is enough, of 0 to `most`, which must be."""
    low, high = 0, most
    for _ in range(most.bit_length()):
        middle = (low + high) // 2
        found = enough(middle)
        low, high = jnp.where(found, low, middle + 1), jnp.where(found, middle, high)
    return high


def _closing_order(masks: Masks) -> dict[str, jax.Array]:
    """Returns for each mask the number of masks that close before it.

    The number of the most open hidden dimension is the number of all masks, so that it
    never closes: a model without hidden dimensions cannot be sliced.
    """
    kinds = [kind for kind in _FINE_TO_COARSE if kind in masks]
    if not kinds:
        return {}
    columns = [jnp.ravel(masks[kind].T) for kind in kinds]
    order = jnp.argsort(jnp.argsort(jnp.concatenate(columns), stable=True))
    ends = np.cumsum([column.size for column in columns])
    parts = dict(zip(kinds, jnp.split(order, ends[:-1]), strict=True))
    order = {kind: part.reshape(masks[kind].T.shape).T for kind, part in parts.items()}
    if "hidden" in order:
        most_open = order["hidden"] == order["hidden"].max()
        order["hidden"] = jnp.where(most_open, ends[-1], order["hidden"])
    return order
