"""Costs of an encoder under masks: what sparsity is a fraction of.

`PARAMETERS` is the number of weights and biases in the blocks of the layers;
embeddings, LayerNorms, pooler and classifier are left out. With h = sum(hidden), and
(a, b), (c, e) the weights of a block (see `Block.weights`; in BERT's attention
(4 d, 3 d), (1, 0), in its feed-forward (2, 1), (1, 0)), it is the sum over blocks of

    outer * (sum(inner) * (a h + b) + any(inner) * (c h + e))

where any(z) = 1 - prod(1 - z): a block's output bias goes with its last unit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import architecture_of
from cofi_jax.pruning.masks import Masks, without_padding


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of the encoder, as two functions of masks and `EncoderConfig`.

    Masks of a kind that is missing are open, so `{}` gives the cost of the whole model.

    Attributes:
      expected: the mean cost of independent gates, given the probabilities that they
        are open; a scalar, differentiable.
      exact: the cost of what slicing with the masks leaves; a scalar, of which a
        traced one is made of traced masks.
    """

    expected: Callable[[Masks, EncoderConfig], Any]
    exact: Callable[[Masks, EncoderConfig], Any]


def _count(masks, config):
    masks = without_padding(masks, config)
    # Integer masks are counted in integers, exactly.
    whole = all(np.issubdtype(gates.dtype, np.integer) for gates in masks.values())
    number = int if whole else float
    total = number(0)
    hidden = masks["hidden"].sum() if "hidden" in masks else number(config.hidden_size)
    for block in architecture_of(config).blocks:
        (a, b), (c, e) = block.weights(config)
        units = np.asarray(getattr(config, block.widths), number)  # (L,)
        any_open = (units > 0).astype(number)
        if block.inner in masks:
            units = masks[block.inner].sum(-1)
            any_open = 1 - (1 - masks[block.inner]).prod(-1)
        weights = units * (a * hidden + b) + any_open * (c * hidden + e)
        total = total + (weights * masks.get(block.outer, number(1))).sum()
    return total


def _exact_count(masks, config):
    number = np.int64
    if any(isinstance(gates, jax.core.Tracer) for gates in masks.values()):
        # Traced integers have 32 bits; above them float32 has to do.
        number = jnp.int32 if _count({}, config) < 2**31 else jnp.float32
        return _count({k: (v > 0).astype(number) for k, v in masks.items()}, config)
    return _count(
        {k: (np.asarray(v) > 0).astype(number) for k, v in masks.items()}, config
    )


PARAMETERS = Cost(expected=_count, exact=_exact_count)


def num_params(masks: Masks, config: EncoderConfig) -> int:
    """The exact count of what slicing with `masks` leaves of the counted weights."""
    return int(PARAMETERS.exact(masks, config))


def exact_sparsity(
    masks: Masks, config: EncoderConfig, cost: Cost = PARAMETERS
) -> float:
    """The fraction of the cost that slicing with `masks` removes."""
    return float(1 - cost.exact(masks, config) / cost.exact({}, config))


def multiply_adds(config: EncoderConfig, seq_length: int) -> int:
    """Multiply-adds of all matrix products of a forward pass over one sequence.

    Each of n units of a block takes `a T D` for the projections of T tokens and, in
    attention, `2 T^2 d` for scores and context. The head takes D P + P C on the first
    token (P = pooler_size, C = num_labels), or T D C on every token. A FLOP count is
    twice as large.

    Args:
      config: of the dense or the sliced model.
      seq_length: T, padding included.
    """
    tokens, width, total = seq_length, config.hidden_size, 0
    for block in architecture_of(config).blocks:
        by_token, by_pair = block.products(config)
        unit = by_token * tokens * width + by_pair * tokens**2
        total += sum(getattr(config, block.widths)) * unit
    if config.reads_every_token:
        return total + tokens * width * config.num_labels
    return total + (width + config.num_labels) * config.pooler_size
