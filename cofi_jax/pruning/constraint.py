"""The constraint on the cost, and masks that meet it.

Masks that meet a target come from one closing order and one bisection: masks close in
the order of how open they are, and the fewest are closed whose removal is enough.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cofi_jax.errors import reject
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

# P(mask > 0) of a log-alpha that far from 0 is 0 or 1 in float32.
_FAR = 20.0
_BISECTIONS = 32


def expected_sparsity(
    log_alpha: LogAlpha, config: EncoderConfig, cost: Cost = PARAMETERS
) -> jax.Array:
    """The mean sparsity over samples: scalar, differentiable.

    Args:
      log_alpha: of the pruned kinds.
      config: the sizes of the model that is pruned.
      cost: what sparsity is a fraction of.
    """
    left = cost.expected(prob_active(log_alpha), config)
    return 1 - left / float(cost.exact({}, config))


def max_sparsity(
    config: EncoderConfig, kinds: Sequence[str] = KINDS, cost: Cost = PARAMETERS
) -> float:
    """The highest expected sparsity that masks of these kinds can reach."""
    lowest, _ = hard_concrete.LOG_ALPHA_RANGE
    least = float(hard_concrete.prob_active(jnp.float32(lowest)))
    shapes = mask_shapes(config, kinds).items()
    left = cost.expected({k: np.full(shape, least) for k, shape in shapes}, config)
    return float(1 - left / cost.exact({}, config))


def target_at(
    step: jax.Array, target: jax.Array, warmup_steps: jax.Array, start: ArrayLike = 0.0
) -> jax.Array:
    """The target at `step`: linear from `start` to `target` over `warmup_steps`."""
    risen = step / jnp.maximum(warmup_steps, 1)
    return start + (target - start) * jnp.where(step < warmup_steps, risen, 1.0)


def of_part(sparsity: ArrayLike, share: ArrayLike) -> Any:
    """The sparsity of a part that has `share` of the whole's cost, from the whole's."""
    return 1 - (1 - sparsity) / share


def of_whole(sparsity: ArrayLike, share: ArrayLike) -> Any:
    """The inverse of `of_part`."""
    return 1 - (1 - sparsity) * share


def lagrangian(
    sparsity: jax.Array, target: jax.Array, multipliers: Mapping
) -> jax.Array:
    """l1 * (s - t) + l2 * (s - t)**2 (paper, section 3.1); scalar."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


def at_target(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: ArrayLike,
    cost: Cost = PARAMETERS,
) -> LogAlpha:
    """The log-alphas moved by a common offset, so that they meet the target exactly.

    The offset is found by bisection: the more is subtracted from all log-alphas, the
    lower is the expected cost. It has no gradient, so what a mask gains by its own
    gradient the others lose together, and no multiplier is needed.

    Args:
      log_alpha: of the pruned kinds, without bounds; padding is -inf.
      config: the sizes of the model that is pruned.
      target: the expected sparsity, scalar; one that cannot be reached is missed by as
        little as possible.
      cost: what sparsity is a fraction of.

    Returns:
      Log-alphas of the same shapes. Their expected sparsity is the target to about
      1e-5, which is what float32 leaves.
    """
    fixed = jax.lax.stop_gradient(dict(log_alpha))
    finite = [jnp.where(jnp.isfinite(v), v, 0) for v in fixed.values()]
    # Beyond this distance from all log-alphas every mask is open, or every one closed.
    widest = _FAR + jnp.stack([jnp.abs(v).max() for v in finite]).max()

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        moved = {kind: value - middle for kind, value in fixed.items()}
        enough = expected_sparsity(moved, config, cost) >= target
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, offset = jax.lax.fori_loop(0, _BISECTIONS, halve, (-widest, widest))
    return {kind: value - offset for kind, value in log_alpha.items()}


def target_count(target: float, full: int) -> int:
    """The most of `full` that may stay: the largest n with 1 - n / full >= target."""
    near = int((1 - target) * full)  # float64 rounds it
    return max(n for n in (near - 1, near, near + 1) if 1 - n / full >= target)


def target_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    tolerance: float = 1e-3,
    cost: Cost = PARAMETERS,
) -> Masks:
    """Evaluation masks whose exact sparsity meets `target`.

    Where the evaluation masks miss it by more than `tolerance`, the least open of them
    close, or the most open of the closed ones open with their soft value, until the
    target is just met. Where a mask of a coarse kind closes too much at that point (a
    block of BERT-base is 3 or 6 % of it), it stays open and those after it close in its
    place; where that is still too coarse, it closes and units open again. Masks that
    were open and stay open keep their value, and one hidden dimension always stays.
    """
    learned = {k: np.asarray(v) for k, v in evaluation_masks(log_alpha).items()}
    soft = {k: np.asarray(hard_concrete.deterministic(v)) for k, v in log_alpha.items()}
    opened = {k: np.where(v > 0, v, soft[k]) for k, v in learned.items()}
    # What evaluation closes is below 0 here, so it closes before all other masks.
    ranks = {kind: opened[kind] - (mask <= 0) for kind, mask in learned.items()}
    order = {kind: np.asarray(place) for kind, place in _closing_order(ranks).items()}
    total = sum(mask.size for mask in learned.values())
    finest = next(kind for kind in _FINE_TO_COARSE if kind in order)

    def closed_to(number, order):
        return {k: np.where(order[k] < number, 0, v) for k, v in opened.items()}

    def removed(*state):
        return exact_sparsity(closed_to(*state), config, cost)

    def fewest(order):
        return int(_fewest(lambda number: removed(number, order) >= target, total))

    best = sum(int((mask <= 0).sum()) for mask in learned.values()), order
    missed = removed(*best) - target
    if abs(missed) > tolerance:
        best = fewest(order), order
        missed = removed(*best) - target
    number, tried = best
    while missed > tolerance and number > 0:
        last = {kind: place == number - 1 for kind, place in tried.items()}
        if last[finest].any():  # a single unit is too much
            break
        tried = {kind: np.where(last[kind], total, tried[kind]) for kind in tried}
        if removed(total, tried) < target:  # no finer masks are left to close
            best = _only_units(closed_to(*best), ranks, order, finest, total)
            best = fewest(best), best
            break
        number = fewest(tried)
        if 0 <= removed(number, tried) - target < missed:
            best, missed = (number, tried), removed(number, tried) - target
    return {kind: jnp.asarray(mask) for kind, mask in closed_to(*best).items()}


def _only_units(masks, ranks, order, finest, total):
    """The order in which units alone close, and what else `masks` close stays closed.

    Where no block of such units is open, the most open one is opened.
    """
    units = {finest: order[finest]}
    for kind in set(order) - {finest}:
        stays = masks[kind] > 0
        if INNER.get(kind) == finest and not stays.any():
            stays = ranks[kind] == ranks[kind].max()
        units[kind] = np.where(stays, total, -1)
    return units


def final_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    transform: MaskTransform,
    cost: Cost = PARAMETERS,
) -> Masks:
    """Evaluation masks that meet the target after a transform that opens masks.

    More is closed before it, so in a model of few units the sparsity ends above the
    target. A transform that opens too much for any is left out, with a warning.
    """
    aim = target
    for _ in range(20):
        masks = transform(target_masks(log_alpha, config, aim, cost=cost))
        missing = target - exact_sparsity(masks, config, cost)
        if missing <= 1e-3:
            return masks
        aim += max(missing, 2e-3)
    print(
        "warning: widths stay as they are: rounded, they miss the target",
        file=sys.stderr,
        flush=True,
    )
    return target_masks(log_alpha, config, target, cost=cost)


def meet_target(
    config: EncoderConfig, target: float, cost: Cost = PARAMETERS
) -> MaskTransform:
    """Closes the least open masks until the exact sparsity is at least `target`.

    No more close than it takes: with the last of them open the target would be missed.
    Of equally open ones intermediate masks close first, then head, hidden, mha, ffn; in
    a kind the first of every row, then the second of every row, and so on. None is
    opened, masks that meet the target stay as they are, and so does one hidden
    dimension. Where log-alphas are known, `target_masks` can open masks too.

    Args:
      config: the sizes of the model that is pruned.
      target: in [0, 1).
      cost: what sparsity is a fraction of.

    Raises:
      UserError: for another target; when applied, for one that the masks' kinds
        cannot reach.
    """
    if not 0 <= target < 1:
        raise reject("target", target, "must be in [0, 1)")
    full = cost.exact({}, config)
    counted = np.issubdtype(np.result_type(full), np.integer)

    def apply(masks):
        lowest = {kind: np.zeros(np.shape(mask)) for kind, mask in masks.items()}
        if "hidden" in lowest:
            lowest["hidden"][0] = 1
        if (highest := exact_sparsity(lowest, config, cost)) < target:
            legal = f"masks of {tuple(masks)} reach at most {highest:.3f}"
            raise reject("target", target, legal)
        order = _closing_order(masks)

        def closed_to(number):
            return {k: jnp.where(order[k] < number, 0, v) for k, v in masks.items()}

        def enough(number):
            left = cost.exact(closed_to(number), config)
            if not counted:
                return 1 - left / full >= target
            # This is exact under jit, too, where there is no float64.
            return left <= np.asarray(target_count(target, full), left.dtype)

        return closed_to(_fewest(enough, sum(mask.size for mask in masks.values())))

    return apply


def _fewest(enough: Callable[[Any], Any], most: int) -> Any:
    """The smallest number up to `most` that is enough, where all above it are, too."""
    low, high = 0, most
    for _ in range(most.bit_length()):  # bisection
        middle = (low + high) // 2
        found = enough(middle)
        low, high = jnp.where(found, low, middle + 1), jnp.where(found, middle, high)
    return high


# Of equally open masks the cheapest close first.
_FINE_TO_COARSE = ("intermediate", "head", "hidden", "mha", "ffn")


def _closing_order(masks: Masks) -> dict[str, jax.Array]:
    """The number of masks that close before each one, by kind.

    The most open hidden dimension never closes, as a model without any cannot be
    sliced: its number is that of all masks.
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
