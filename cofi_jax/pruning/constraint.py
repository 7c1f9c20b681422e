"""The constraint on the cost, and masks that meet it.

Masks are brought to a target by closing gates in one order, up to the number that a
bisection finds.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER
from cofi_jax.pruning import hard_concrete
from cofi_jax.pruning.cost import PARAMETERS, Cost, exact_sparsity
from cofi_jax.pruning.masks import (
    ALL,
    PADDING,
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
    """The mean sparsity over samples: a scalar, differentiable.

    Args:
      log_alpha: of the pruned kinds.
      config: the sizes of the model that the masks are on.
      cost: what sparsity is a fraction of; parameters if not given.
    """
    left = cost.expected(prob_active(log_alpha), config)
    return 1 - left / float(cost.exact({}, config))


def max_sparsity(
    config: EncoderConfig, kinds: Sequence[str] = ALL, cost: Cost = PARAMETERS
) -> float:
    """The highest expected sparsity that masks of these kinds can reach."""
    lowest = float(hard_concrete.prob_active(hard_concrete.LOG_ALPHA_RANGE[0]))
    shapes = mask_shapes(config, kinds).items()
    left = cost.expected({k: np.full(shape, lowest) for k, shape in shapes}, config)
    return float(1 - left / cost.exact({}, config))


def target_at(step: jax.Array, target: jax.Array, warmup_steps: jax.Array) -> jax.Array:
    """The target at `step`: linear from 0 to `target` over `warmup_steps`."""
    risen = step / jnp.maximum(warmup_steps, 1)
    return target * jnp.where(step < warmup_steps, risen, 1.0)


def lagrangian(
    sparsity: jax.Array, target: jax.Array, multipliers: Mapping[str, jax.Array]
) -> jax.Array:
    """l1 * (s - t) + l2 * (s - t)**2 (paper, section 3.1); scalar."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


def target_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    tolerance: float = 1e-3,
    cost: Cost = PARAMETERS,
) -> Masks:
    """Evaluation masks whose exact sparsity meets `target`.

    Where they miss it by more than `tolerance`, the open gates with the lowest
    log-alphas close, or the closed ones with the highest open, as few as it takes.
    Where a gate of a coarse kind would remove too much at once (a block of BERT-base
    is 3 or 6 % of it), it stays open, and finer ones close in its place. Gates that
    were open and stay open keep their value; one hidden dimension always stays.
    """
    learned = evaluation_masks(log_alpha)
    missed = exact_sparsity(learned, config, cost) - target
    if abs(missed) <= tolerance and (np.max(learned.get("hidden", 1)) > 0):
        return learned
    # A gate that opens again has at least the value of one that is open half the time.
    half = hard_concrete.LOG_ALPHA_RANGE[1] - hard_concrete.CLOSING_DISTANCE
    soft = {
        kind: hard_concrete.deterministic(jnp.maximum(la, half))
        for kind, la in log_alpha.items()
    }
    masks, ranks = {}, {}
    for kind, gates in learned.items():
        opened = jnp.where(gates == PADDING, PADDING, soft[kind])
        masks[kind] = jnp.where(gates > 0, gates, opened)
        ranks[kind] = log_alpha[kind] - jnp.where(gates > 0, 0, 99)
    order, enough = _closing_order(ranks), _enough(config, target, cost)
    finest = next(kind for kind in _FINE_TO_COARSE if kind in order)
    best, least, coarse = None, math.inf, True
    while coarse and (best is None or least > target + tolerance):
        number = _fewest(masks, order, enough)
        found = _close_first(masks, order, number)
        if best is not None and not enough(found):
            break
        removed = exact_sparsity(found, config, cost)
        if removed < least:
            best, least = found, removed
        last = {kind: places == number - 1 for kind, places in order.items()}
        coarse = number > 0 and not last[finest].any()
        order = {k: jnp.where(last[k], _NEVER, places) for k, places in order.items()}
    if coarse and least > target + tolerance:
        # No finer gates were left to close, so some open again, in an open block.
        for kind in set(order) - {finest}:
            stays = best[kind] > 0
            if INNER.get(kind) == finest:
                stays |= ~stays.any() & (ranks[kind] == ranks[kind].max())
            order[kind] = jnp.where(stays, _NEVER, -1)
        best = _close_first(masks, order, _fewest(masks, order, enough))
    return best


def final_masks(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    transform: MaskTransform,
    cost: Cost = PARAMETERS,
) -> Masks:
    """Evaluation masks that meet the target after a transform that opens gates.

    More gates are closed before it in turn, so that in a model of few units the
    sparsity ends above the target. Where the transform opens too many for any target,
    it is left out.
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
    )
    return target_masks(log_alpha, config, target, cost=cost)


def meet_target(
    config: EncoderConfig, target: float, cost: Cost = PARAMETERS
) -> MaskTransform:
    """Closes the least open gates until the exact sparsity is at least `target`.

    No more close than it takes: with the last of them open the target would be missed.
    Of equally open ones intermediate gates close first, then head, hidden, mha, ffn; in
    a kind the first of every row, then the second of every row, and so on. None is
    opened, masks that meet the target stay as they are, and so does one hidden
    dimension. Where log-alphas are known, `target_masks` can open gates too.

    Args:
      config: the sizes of the model that the masks are on.
      target: in [0, 1).
      cost: what sparsity is a fraction of; parameters if not given.

    Raises:
      UserError: for another target; when applied, for one that the masks' kinds
        cannot reach.
    """
    if not 0 <= target < 1:
        raise reject("target", target, "must be in [0, 1)")
    enough = _enough(config, target, cost)

    def apply(masks):
        lowest = {kind: np.zeros(np.shape(gates)) for kind, gates in masks.items()}
        if "hidden" in lowest:
            lowest["hidden"][0] = 1
        if not enough(lowest):
            highest = exact_sparsity(lowest, config, cost)
            legal = f"masks of {tuple(masks)} reach at most {highest:.3f}"
            raise reject("target", target, legal)
        order = _closing_order(masks)
        return _close_first(masks, order, _fewest(masks, order, enough))

    return apply


def _enough(config, target, cost) -> Callable[[Masks], jax.Array | bool]:
    """The predicate that the exact cost of masks is low enough for the target."""
    full = cost.exact({}, config)
    # The last term is the rounding of a sparsity that is given in float64.
    most = float(full) * (1 - target + 1e-15)
    if np.issubdtype(np.result_type(full), np.integer):
        most = math.floor(most)

    def enough(masks):
        size = cost.exact(masks, config)
        return size <= np.asarray(most, getattr(size, "dtype", None))

    return enough


# The kinds from fine to coarse: of equally open gates the finest close first.
_FINE_TO_COARSE = ("intermediate", "head", "hidden", "mha", "ffn")
_NEVER = np.iinfo(np.int32).max


@jax.jit
def _closing_order(ranks):
    """The number of gates that close before each one, by kind.

    The lowest of `ranks` close first, and one hidden dimension never does.
    """
    kinds = [kind for kind in _FINE_TO_COARSE if kind in ranks]
    if not kinds:
        return {}
    columns = [jnp.ravel(ranks[kind].T) for kind in kinds]
    order = jnp.argsort(jnp.argsort(jnp.concatenate(columns), stable=True))
    ends = np.cumsum([column.size for column in columns])
    parts = dict(zip(kinds, jnp.split(order, ends[:-1]), strict=True))
    order = {kind: part.reshape(ranks[kind].T.shape).T for kind, part in parts.items()}
    if "hidden" in order:  # a model without a hidden dimension cannot be sliced
        last = order["hidden"] == order["hidden"].max()
        order["hidden"] = jnp.where(last, _NEVER, order["hidden"])
    return order


@jax.jit
def _close_first(masks, order, number):
    """`masks` with the first `number` gates of the order closed."""
    return {
        kind: jnp.where(order[kind] < number, jnp.minimum(gates, 0), gates)
        for kind, gates in masks.items()
    }


def _fewest(masks, order, enough):
    """The least number of gates to close until `enough(masks)`, by bisection.

    It is the number of all gates where that is not enough.
    """
    low, high = 0, sum(gates.size for gates in masks.values())
    for _ in range(high.bit_length()):
        middle = (low + high) // 2
        met = enough(_close_first(masks, order, middle))
        low, high = jnp.where(met, low, middle + 1), jnp.where(met, middle, high)
    return high
