"""The cost that sparsity is a fraction of: what is expected and what is left exactly.

The cost of an encoder is the number of weights and biases in the blocks of its layers;
embeddings, LayerNorms, pooler and classifier are left out. With a hidden width of h
and units of a weights for each hidden dimension and b more (`models.spec` has them),

    cost = sum over blocks, over layers l:
           outer_l * (sum_i inner_li * (a h + b) + any_i(inner_li) * h)

where any(z) = 1 - prod(1 - z): a block's output bias goes with its last unit. In BERT
a = 4 d and b = 3 d for heads of width d, and a = 2 and b = 1 for feed-forward units.
The cost is linear in each single mask, so with probabilities of independent masks in
their place it is the expected cost.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.core import Tracer

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import blocks, per_unit
from cofi_jax.pruning.masks import Masks, without_padding


@dataclasses.dataclass(frozen=True)
class Cost:
    """What pruning reduces, as two functions.

    Attributes:
      expected: takes probabilities that the masks are open, and the sizes of the model
        that is pruned; returns a scalar, differentiable in the probabilities.
      exact: takes masks, of which all above 0 are open, and the sizes; returns the
        cost of the model that slicing leaves. Without masks it is the dense model's.
    """

    expected: Callable[[Masks, EncoderConfig], Any]
    exact: Callable[[Masks, EncoderConfig], Any]


def _count(masks, config, number):
    """The formula above; `number` is float, or int to count exactly."""
    masks = without_padding(masks, config)
    hidden, total = number(config.hidden_size), number(0)
    if "hidden" in masks:
        hidden = masks["hidden"].sum()
    for block in blocks(config):
        (a, b), (c, d) = per_unit(block, config)
        units = np.asarray(block.sizes(config), number)  # (L,), as is what follows
        any_open = (units > 0).astype(number)
        if block.inner in masks:
            units = masks[block.inner].sum(-1)
            any_open = 1 - (1 - masks[block.inner]).prod(-1)
        left = units * (a * hidden + b) + any_open * (c * hidden + d)
        total = total + (left * masks.get(block.outer, number(1))).sum()
    return total


def _expected(probabilities: Masks, config: EncoderConfig) -> Any:
    return _count(probabilities, config, float)


def _exact(masks: Masks, config: EncoderConfig) -> Any:
    number = int
    if any(isinstance(mask, Tracer) for mask in masks.values()):
        # Inside of a compiled program integers have 32 bits.
        number = int if _count({}, config, int) < 2**31 else float
    else:
        masks = {kind: np.asarray(mask) for kind, mask in masks.items()}
    masks = {kind: (mask > 0).astype(number) for kind, mask in masks.items()}
    return _count(masks, config, number)


PARAMETERS = Cost(_expected, _exact)


def num_params(masks: Masks, config: EncoderConfig) -> int:
    """The exact number of the counted weights that slicing with `masks` leaves."""
    return int(PARAMETERS.exact(masks, config))


def exact_sparsity(
    masks: Masks, config: EncoderConfig, cost: Cost = PARAMETERS
) -> float:
    """The fraction of the cost that slicing with `masks` removes."""
    return float(1 - cost.exact(masks, config) / cost.exact({}, config))


def multiply_adds(config: EncoderConfig, seq_length: int) -> int:
    """Multiply-adds of all matrix products of a forward pass over one sequence.

    These are the products with the blocks' kernels, those of `Block.products`, and
    D P + P C for a head on the first token (P = pooler_size, C = num_labels) or T D C
    for one on every token. A FLOP count is twice as large.

    Args:
      config: of the dense or the sliced model.
      seq_length: the number T of tokens, padding included.
    """
    sizes = {"T": seq_length, "D": config.hidden_size, "d": config.head_size}
    total = 0
    for block in blocks(config):
        sizes[block.unit] = sum(block.sizes(config))
        kernels = [f"T{kernel}" for kernel, _ in block.modules.values()]
        for product in (*kernels, *block.products):
            total += math.prod(sizes[axis] for axis in product)
    if config.reads_every_token:
        return total + seq_length * config.hidden_size * config.num_labels
    return total + (config.hidden_size + config.num_labels) * config.pooler_size
