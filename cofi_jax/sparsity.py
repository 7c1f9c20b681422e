"""One count of the cost, and the constraint on it.

The cost of an encoder is the number of weights and biases in its attention and
feed-forward blocks; embeddings, LayerNorms, pooler and classifier are left out.
It is linear in each single gate, so given probabilities of independent gates it
is the expected cost, and given 0/1 gates the exact one. With hidden width
h = sum(hidden) and head width d,

    cost = sum_l mha_l * (sum_i head_li * (4 d h + 3 d) + any_i(head_li) * h)
         + sum_l ffn_l * (sum_j int_lj * (2 h + 1)      + any_j(int_lj)  * h)

where any(g) = 1 - prod(1 - g): a block's output bias goes with its last unit.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import hard_concrete
from cofi_jax.masks import ALL, LogAlpha, Masks, evaluation_masks, mask_shapes
from cofi_jax.masks import prob_active as _probabilities

Cost = Callable[[Masks], jax.Array]


def cost(gates: Masks, config) -> jax.Array:
    """Weights and biases that `gates` (values in [0, 1]) leave, see above.

    Args:
      gates: the gated kinds, NumPy or JAX arrays; NumPy float64 counts exactly.
      config: the `EncoderConfig` which the gates thin out.
    """
    d, total = config.head_size, 0.0
    hidden = gates["hidden"].sum() if "hidden" in gates else float(config.hidden_size)
    for layer, (heads, width) in enumerate(
        zip(config.heads, config.intermediate, strict=True)
    ):
        for outer, inner, units, unit_cost in (
            ("mha", "head", heads, 4 * d * hidden + 3 * d),
            ("ffn", "intermediate", width, 2 * hidden + 1),
        ):
            if not units:
                continue
            block = units * unit_cost + hidden
            if inner in gates:
                open_units = gates[inner][layer]
                any_open = 1 - (1 - open_units).prod()
                block = open_units.sum() * unit_cost + any_open * hidden
            total = total + block * (gates[outer][layer] if outer in gates else 1.0)
    return total


def num_params(masks: Masks, config) -> int:
    """Exact count of what slicing with `masks` leaves of the counted weights."""
    return round(float(cost(_opened(masks), config)))


def exact_sparsity(masks: Masks, config) -> float:
    """Fraction of the counted weights that slicing with `masks` removes."""
    return 1 - num_params(masks, config) / num_params({}, config)


def _opened(masks):
    return {k: (np.asarray(v) > 0).astype(np.float64) for k, v in masks.items()}


def expected_sparsity(log_alpha: LogAlpha, config) -> jax.Array:
    """The mean sparsity over samples: scalar, differentiable."""
    return 1 - cost(_probabilities(log_alpha), config) / num_params({}, config)


def max_sparsity(config, kinds: Sequence[str] = ALL) -> float:
    """The highest expected sparsity that gates of these kinds can reach."""
    floor = {
        kind: np.full(shape, hard_concrete.LOG_ALPHA_RANGE[0])
        for kind, shape in mask_shapes(config, kinds).items()
    }
    return float(expected_sparsity(floor, config))


def target_at(step: jax.Array, target: jax.Array, warmup_steps: jax.Array) -> jax.Array:
    """The target at `step`: linear from 0 to `target` over `warmup_steps`."""
    return target * jnp.minimum(1.0, step / jnp.maximum(warmup_steps, 1))


def lagrangian(sparsity, target, multipliers: Masks) -> jax.Array:
    """l1 * (s - t) + l2 * (s - t)**2 (paper, section 3.1); scalar."""
    gap = sparsity - target
    return multipliers["linear"] * gap + multipliers["quadratic"] * gap**2


def meet_target(
    log_alpha: LogAlpha, config, target: float, tolerance: float = 1e-3
) -> Masks:
    """Evaluation masks whose exact sparsity meets `target`.

    Where the masks as they are miss it by more than `tolerance`, all log-alphas are
    shifted by the smallest common offset that brings the sparsity to the target or,
    where a whole block closes at once, just above it.
    """

    def masks_at(offset):
        return evaluation_masks({k: v + offset for k, v in log_alpha.items()})

    masks = masks_at(0.0)
    if abs(exact_sparsity(masks, config) - target) <= tolerance:
        return masks
    # Sparsity falls as the offset rises. 40 halvings of 64 go below float32.
    low, high = -32.0, 32.0
    for _ in range(40):
        middle = (low + high) / 2
        if exact_sparsity(masks_at(middle), config) >= target:
            low = middle
        else:
            high = middle
    return masks_at(low)
