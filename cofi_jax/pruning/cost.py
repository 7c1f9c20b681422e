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

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cofi_jax.pruning.masks import Masks

Cost = Callable[[Masks, Any], jax.Array]  # (gates, EncoderConfig) to a scalar


def cost(gates: Masks, config) -> jax.Array:
    """Weights and biases that `gates` (values in [0, 1]) leave, see above.

    Args:
      gates: the gated kinds, NumPy or JAX arrays; NumPy float64 counts exactly.
      config: the `EncoderConfig` which the gates thin out.
    """
    # Integer gates are counted in integers: exactly, under jit as well.
    whole = all(np.issubdtype(gate.dtype, np.integer) for gate in gates.values())
    number = int if whole else float
    d, total = config.head_size, number(0)
    hidden = gates["hidden"].sum() if "hidden" in gates else number(config.hidden_size)
    for outer, inner, widths, unit_cost in (
        ("mha", "head", config.heads, 4 * d * hidden + 3 * d),
        ("ffn", "intermediate", config.intermediate, 2 * hidden + 1),
    ):
        units = np.asarray(widths, number)  # (L,), as is whatever follows
        any_open = (units > 0).astype(number)
        if inner in gates:
            units = gates[inner].sum(-1)
            any_open = 1 - (1 - gates[inner]).prod(-1)
        blocks = units * unit_cost + any_open * hidden
        total = total + (blocks * gates.get(outer, number(1))).sum()
    return total


def num_params(masks: Masks, config) -> int:
    """Exact count of what slicing with `masks` leaves of the counted weights."""
    return round(float(cost(_opened(masks), config)))


def exact_sparsity(masks: Masks, config) -> float:
    """Fraction of the counted weights that slicing with `masks` removes."""
    return 1 - num_params(masks, config) / num_params({}, config)


def multiply_adds(config, seq_length: int) -> int:
    """Multiply-adds of all matrix products of a forward pass, by sequence of T tokens.

    With D = hidden_size, d = head_size, h_l heads and F_l units in layer l: sum over l

        4 T D h_l d      query, key, value and output projections
        2 T^2 h_l d      scores and context
        2 T D F_l        up and down

    and D P + P C for the head on the first token (P = pooler_size, C = num_labels),
    or T D C for one on every token. A FLOP count is twice as large.

    Args:
      config: of the dense or the sliced model.
      seq_length: T, padding included.
    """
    tokens, width = seq_length, config.hidden_size
    joined = sum(config.heads) * config.head_size
    total = 4 * tokens * width * joined + 2 * tokens**2 * joined
    total += 2 * tokens * width * sum(config.intermediate)
    if config.reads_every_token:
        return total + tokens * width * config.num_labels
    return total + (width + config.num_labels) * config.pooler_size


def _opened(masks):
    return {k: (np.asarray(v) > 0).astype(np.float64) for k, v in masks.items()}
