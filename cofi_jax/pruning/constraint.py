"""The constraint on the cost, and masks that meet it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.errors import reject
from cofi_jax.pruning import hard_concrete
from cofi_jax.pruning.cost import Cost, cost, exact_sparsity, num_params
from cofi_jax.pruning.masks import ALL, LogAlpha, Masks, evaluation_masks, mask_shapes
from cofi_jax.pruning.masks import prob_active as _probabilities
from cofi_jax.pruning.transforms import MaskTransform, chain, keep_at_least


def expected_sparsity(log_alpha: LogAlpha, config, cost: Cost = cost) -> jax.Array:
    """The mean sparsity over samples: scalar, differentiable.

    Args:
      log_alpha: of the pruned kinds.
      config: the dense `EncoderConfig`.
      cost: what sparsity is a fraction of, linear in each gate; parameters if not
        given.
    """
    return 1 - cost(_probabilities(log_alpha), config) / float(cost({}, config))


def max_sparsity(config, kinds: Sequence[str] = ALL) -> float:
    """The highest expected sparsity that gates of these kinds can reach."""
    floor = float(hard_concrete.prob_active(hard_concrete.LOG_ALPHA_RANGE[0]))
    shapes = mask_shapes(config, kinds).items()
    left = cost({kind: np.full(shape, floor) for kind, shape in shapes}, config)
    return float(1 - left / num_params({}, config))


def target_at(step: jax.Array, target: jax.Array, warmup_steps: jax.Array) -> jax.Array:
    """The target at `step`: linear from 0 to `target` over `warmup_steps`."""
    risen = step / jnp.maximum(warmup_steps, 1)
    return target * jnp.where(step < warmup_steps, risen, 1.0)


def lagrangian(sparsity, target, multipliers: Masks) -> jax.Array:
    """l1 * (s - t) + l2 * (s - t)**2 (paper, section 3.1); scalar."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


def target_masks(
    log_alpha: LogAlpha, config, target: float, tolerance: float = 1e-3
) -> Masks:
    """Evaluation masks whose exact sparsity meets `target`.

    Where the masks as they are miss it by more than `tolerance`, all log-alphas are
    shifted by the smallest common offset that brings the sparsity to the target.
    Where too much opens or closes at once there (a block of BERT-base is 3 or 6 % of
    it), the log-alphas stay just before or after that, and the gates inside the
    blocks are shifted further; where that is still too coarse, the intermediate gates
    alone. Gates that were open and stay open keep their value.
    """
    learned = evaluation_masks(log_alpha)
    found = _nearest(log_alpha, config, target, tolerance)

    def value(before, after):
        kept = jnp.where(before > 0, before, after)
        return jnp.where(after > 0, kept, 0.0)

    return {kind: value(learned[kind], found[kind]) for kind in learned}


def final_masks(
    log_alpha: LogAlpha,
    config,
    target: float,
    transform: MaskTransform,
) -> Masks:
    """Evaluation masks that meet the target after a transform that opens gates.

    So more is closed before it: in a model of few units the sparsity ends above the
    target. Where the transform opens too much for any, it is left out.
    """
    aim = target
    for _ in range(20):
        gates = transform(target_masks(log_alpha, config, aim))
        missing = target - exact_sparsity(gates, config)
        if missing <= 1e-3:
            return gates
        aim += max(missing, 2e-3)
    print("warning: widths stay as they are: rounded, they miss the target", flush=True)
    return target_masks(log_alpha, config, target)


def _nearest(log_alpha, config, target, tolerance):
    # A model without a hidden dimension cannot be sliced.
    masks_of = chain(evaluation_masks, keep_at_least(hidden=1))

    def removed_at(kinds, start, offset):
        masks = masks_of(_shift(start, kinds, offset))
        return masks, exact_sparsity(masks, config)

    def bisect(kinds, start):
        """The offsets around the target; sparsity falls as the offset rises."""
        low, high = -32.0, 32.0
        for _ in range(40):  # below the resolution of float32
            middle = (low + high) / 2
            if removed_at(kinds, start, middle)[1] >= target:
                low = middle
            else:
                high = middle
        return low, high

    best, learned = removed_at(ALL, log_alpha, 0.0)
    if abs(learned - target) <= tolerance:
        return best
    low, high = bisect(ALL, log_alpha)
    best, lowest = removed_at(ALL, log_alpha, low)
    # First the side of the jump where no gate moves against the way that is needed.
    for side in (high, low) if learned < target else (low, high):
        near = _shift(log_alpha, ALL, side)
        for kinds in (("head", "intermediate", "hidden"), ("intermediate",)):
            if lowest <= target + tolerance:
                return best
            inner_low, inner_high = bisect(kinds, near)
            masks, removed = removed_at(kinds, near, inner_low)
            if target <= removed < lowest:
                best, lowest = masks, removed
            near = _shift(near, kinds, inner_high if side == high else inner_low)
    return best


def _shift(log_alpha, kinds, offset):
    return {k: v + offset if k in kinds else v for k, v in log_alpha.items()}


# Of equally open gates the cheapest close first.
_FINE_TO_COARSE = ("intermediate", "head", "hidden", "mha", "ffn")


def meet_target(config, target: float) -> MaskTransform:
    """Closes the least open gates until the exact sparsity is at least `target`.

    No more than it takes: with the last of them open the target would be missed. Of
    equally open ones intermediate gates close first, then head, hidden, mha, ffn; in
    a kind the first of every row, then the second of every row, and so on. None is
    opened, masks that meet the target stay as they are, and so does one hidden
    dimension. Where log-alphas are known, `target_masks` can open gates too.

    Args:
      config: the dense `EncoderConfig`.
      target: in [0, 1).

    Raises:
      UserError: for another target; when applied, for one that the masks' kinds
        cannot reach.
    """
    if not 0 <= target < 1:
        raise reject("target", target, "must be in [0, 1)")
    full = num_params({}, config)

    def removed(size):
        return 1 - size / full

    largest = int((1 - target) * full) + 1  # and down to what float64 calls the target
    while removed(largest) < target:
        largest -= 1
    # float32 rounds counts above 2**24, int32 holds those below 2**31.
    exact = np.int32 if full < 2**31 else np.float32

    def apply(masks):
        lowest = {kind: np.zeros(np.shape(gates)) for kind, gates in masks.items()}
        if "hidden" in lowest:
            lowest["hidden"][0] = 1
        if num_params(lowest, config) > largest:
            highest = exact_sparsity(lowest, config)
            legal = f"gates of {tuple(masks)} reach at most {highest:.3f}"
            raise reject("target", target, legal)
        order = _closing_order(masks)

        def closed_to(number):
            return {k: jnp.where(order[k] < number, 0, v) for k, v in masks.items()}

        low, high = 0, sum(gates.size for gates in masks.values())
        for _ in range(high.bit_length()):  # bisection
            middle = (low + high) // 2
            gates = closed_to(middle)
            gates = {kind: (gate > 0).astype(exact) for kind, gate in gates.items()}
            enough = cost(gates, config) <= exact(largest)
            low = jnp.where(enough, low, middle + 1)
            high = jnp.where(enough, middle, high)
        return closed_to(high)

    return apply


def _closing_order(masks):
    """The number of gates that close before each one, by kind."""
    kinds = [kind for kind in _FINE_TO_COARSE if kind in masks]
    columns = [jnp.ravel(masks[kind].T) for kind in kinds]
    if not kinds:
        return {}
    order = jnp.argsort(jnp.argsort(jnp.concatenate(columns), stable=True))
    ends = np.cumsum([column.size for column in columns])
    parts = dict(zip(kinds, jnp.split(order, ends[:-1]), strict=True))
    order = {kind: part.reshape(masks[kind].T.shape).T for kind, part in parts.items()}
    if "hidden" in order:  # a model without a hidden dimension cannot be sliced
        most_open = order["hidden"] == order["hidden"].max()
        order["hidden"] = jnp.where(most_open, ends[-1], order["hidden"])
    return order
