"""The cost of an encoder, expected and exact; sparsity is the fraction removed of it.

The cost is the number of weights and biases in the blocks of all layers. Embeddings,
LayerNorms, pooler and classifier do not count. If h hidden dimensions are left, and if
each unit has a weights for each of them and b more (`models.spec.per_unit`), then

    cost = sum over blocks, over layers l:
           outer_l * (sum_i inner_li * (a h + b) + any_i(inner_li) * h)

where any(z) = 1 - prod(1 - z), because the output bias of a block remains as long as
any of its units does. In BERT, a = 4 d and b = 3 d for heads of width d, and a = 2 and
b = 1 for feed-forward units. The cost is linear in each single mask. So probabilities
of independent masks, in place of the masks, give the expected cost.
"""

import dataclasses
import functools
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
    """The quantity that pruning reduces, as two functions.

    Attributes:
      expected: maps the probabilities that the masks are open, and the sizes of the
        model that is pruned, to a scalar that is differentiable in the probabilities.
      exact: maps masks and the sizes to the cost of the model that slicing leaves;
        without masks that is the cost of the model before pruning. If the function
        cannot be traced, `meet_target` does not work under `jax.jit`.
    """

    expected: Callable[[Masks, EncoderConfig], Any]
    exact: Callable[[Masks, EncoderConfig], Any]


def _count(masks, config, number):
    """Evaluates the formula above in the type `number`: float, or int to be exact."""
    masks = without_padding(masks, config)
    hidden, total = number(config.hidden_size), number(0)
    if "hidden" in masks:
        hidden = masks["hidden"].sum()
    for block in blocks(config):
        (a, b), (c, d) = per_unit(block, config)
        units = np.asarray(block.sizes(config), number)  # (L,), like all that follow
        any_open = (units > 0).astype(number)
        if block.inner in masks:
            units = masks[block.inner].sum(-1)
            any_open = 1 - (1 - masks[block.inner]).prod(-1)
        left = units * (a * hidden + b) + any_open * (c * hidden + d)
        total = total + (left * masks.get(block.outer, number(1))).sum()
    return total


def _exact(masks: Masks, config: EncoderConfig) -> Any:
    number = int
    if any(isinstance(mask, Tracer) for mask in masks.values()):
        # A compiled program has integers of 32 bits only.
        number = int if _count({}, config, int) < 2**31 else float
    else:
        masks = {kind: np.asarray(mask) for kind, mask in masks.items()}
    masks = {kind: (mask > 0).astype(number) for kind, mask in masks.items()}
    return _count(masks, config, number)


PARAMETERS = Cost(functools.partial(_count, number=float), _exact)


def num_params(masks: Masks, config: EncoderConfig) -> int:
    """Returns how many of the counted parameters slicing with `masks` leaves."""
    return int(PARAMETERS.exact(masks, config))


def exact_sparsity(
    masks: Masks, config: EncoderConfig, cost: Cost = PARAMETERS
) -> float:
    """Returns the fraction of the cost that slicing with `masks` removes."""
    return float(1 - cost.exact(masks, config) / cost.exact({}, config))


def multiply_adds(config: EncoderConfig, seq_length: int) -> int:
    """Counts the multiply-adds of the matrix products of a forward pass over one row.

    These are the products with the kernels of the blocks, the `Block.products`, and the
    classifier: D P + P C if it reads the first token through a pooler of width P, or
    T D C if it reads every token. The number of FLOPs is twice as large.

    Args:
      config: the sizes of the dense or the sliced model.
      seq_length: the number T of tokens, including padding.
    """
    sizes = {"T": seq_length, "D": config.hidden_size, "d": config.head_size}
    total = 0
    for block in blocks(config):
        sizes[block.unit] = sum(block.sizes(config))
        kernels = [f"T{kernel}" for kernel, _ in block.modules.values()]
        for product in (*kernels, *block.products):
            total += math.prod(sizes[axis] for axis in product)
    if config.pooling:
        layer = config.hidden_size * config.num_labels
        return total + layer * bool(config.output_activation)
    if config.reads_every_token:
        return total + seq_length * config.hidden_size * config.num_labels
    return total + (config.hidden_size + config.num_labels) * config.pooler_size
