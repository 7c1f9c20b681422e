"""The constraint on the cost, and masks that meet it.

Masks that meet a target come from one closing order and one bisection: masks close in
the order of how open they are, and the fewest are closed whose removal is enough.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
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


def target_at(step: jax.Array, target: jax.Array, warmup_steps: jax.Array) -> jax.Array:
    """The target at `step`: linear from 0 to `target` over `warmup_steps`."""
    risen = step / jnp.maximum(warmup_steps, 1)
    return target * jnp.where(step < warmup_steps, risen, 1.0)


def lagrangian(
    sparsity: jax.Array, target: jax.Array, multipliers: Mapping
) -> jax.Array:
    """l1 * (s - t) + l2 * (s - t)**2 (paper, section 3.1); scalar."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


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
    target is just met. Where one mask closes too much at that point (a block of
    BERT-base is 3 or 6 % of it), it stays open and those after it close in its place;
    where that is still too coarse, it closes and those before it open again. Masks
    that were open and stay open keep their value, and one hidden dimension always
    stays.
    """
    learned = {k: np.asarray(v) for k, v in evaluation_masks(log_alpha).items()}
    soft = {k: np.asarray(hard_concrete.deterministic(v)) for k, v in log_alpha.items()}
    opened = {k: np.where(v > 0, v, soft[k]) for k, v in learned.items()}
    # What evaluation closes is below 0 here, so it closes before all other masks.
    order = _closing_order({k: opened[k] - (v <= 0) for k, v in learned.items()})
    order = {kind: np.asarray(number) for kind, number in order.items()}
    total = sum(mask.size for mask in learned.values())

    def closed_to(number, order):
        return {k: np.where(order[k] < number, 0, v) for k, v in opened.items()}

    def removed(state):
        return exact_sparsity(closed_to(*state), config, cost)

    best = sum(int((mask <= 0).sum()) for mask in learned.values()), order
    if abs(removed(best) - target) <= tolerance:
        return {kind: jnp.asarray(mask) for kind, mask in closed_to(*best).items()}
    one_unit = min(
        exact_sparsity({kind: np.zeros_like(mask)}, config, cost) / mask.size
        for kind, mask in learned.items()
    )
    best = total, order
    for state in _states(order, total, lambda *pair: removed(pair) >= target):
        best = min(best, state, key=removed)
        if removed(best) <= target + max(tolerance, one_unit):
            break
    return {kind: jnp.asarray(mask) for kind, mask in closed_to(*best).items()}


def _states(
    order: dict[str, np.ndarray], total: int, enough: Callable[..., bool]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Pairs of how many masks close, as few as are enough, and the order they close in.

    The first order is `order`. In the next one the mask that closed last is moved to
    the end, where it stays open, and so on. When the others are no longer enough, the
    first mask that was moved is moved to the front for good, and all begins anew.
    """

    def moved(number, order, to):
        return {k: np.where(v == number - 1, to, v) for k, v in order.items()}

    first = 1
    while first:
        tried, first = order, 0
        while enough(total, tried):
            number = int(_fewest(lambda n, tried=tried: enough(n, tried), total))
            yield number, tried
            if not number:  # what was moved to the front is enough
                break
            first = first or number
            tried = moved(number, tried, total)
        order = moved(first, order, -1)


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
    most = target_count(target, cost.exact({}, config))

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
            return left <= np.asarray(most, left.dtype)

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
