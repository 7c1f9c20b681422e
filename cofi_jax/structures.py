"""Sizes of the models whose speed is measured: dense, and sliced as the paper's are."""

import dataclasses
from typing import Any

import numpy as np

from cofi_jax import sparsity
from cofi_jax.config import reject
from cofi_jax.model import EncoderConfig

# Of the paper's models at 95 %: three of twelve blocks of each kind, with 2 to 5 of 12
# heads and 100 to 700 of 3072 units, and 760 of 768 dimensions.
_BLOCKS, _HEADS, _UNITS, _HIDDEN = 3 / 12, (5, 2, 12), (700, 100, 3072), 760 / 768


def dense(
    *,
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    vocab_size: int,
    longest: int,
) -> EncoderConfig:
    """A dense classifier's sizes, with positions for `longest` tokens or 512.

    Raises:
      UserError: where the heads do not divide the hidden size.
    """
    if hidden % heads:
        raise reject("hidden", hidden, f"must be a multiple of heads={heads}")
    return EncoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        heads=(heads,) * layers,
        head_size=hidden // heads,
        intermediate=(intermediate,) * layers,
        pooler_size=hidden,
        num_labels=2,
        max_positions=max(longest, 512),
    )


def like_the_paper(dense: EncoderConfig) -> EncoderConfig:
    """Sizes with about 95 % of the blocks' parameters gone, as the paper's have them.

    A quarter of the blocks of each kind stays, evenly spaced, those of the one kind
    between those of the other; the first ones are the widest.
    """
    layers = len(dense.heads)
    blocks = max(1, round(_BLOCKS * layers))

    def widths(full, first, shape):
        most, least, of = shape
        found = [0] * layers
        places = np.linspace(first, layers - 1, blocks + 1)[:-1].astype(int)
        shares = np.linspace(most, least, blocks) / of
        for place, share in zip(places, shares, strict=True):
            found[place] = max(1, round(share * full))
        return tuple(found)

    return dataclasses.replace(
        dense,
        hidden_size=max(1, round(_HIDDEN * dense.hidden_size)),
        heads=widths(dense.heads[0], 0, _HEADS),
        intermediate=widths(dense.intermediate[0], min(1, layers - 1), _UNITS),
    )


def rounded(sliced: EncoderConfig, dense: EncoderConfig, multiple: int):
    """`sliced` with feed-forward widths raised to multiples, up to those of `dense`.

    An absent block stays absent.
    """

    def up(width, full):
        return min(-(-width // multiple) * multiple, full)

    return dataclasses.replace(
        sliced,
        intermediate=tuple(map(up, sliced.intermediate, dense.intermediate)),
    )


def described(config: EncoderConfig, dense: EncoderConfig) -> dict[str, Any]:
    """Widths, encoder parameters and sparsity of a model, for the JSON."""
    params = sparsity.num_params({}, config)
    removed = 1 - params / sparsity.num_params({}, dense)
    return config.widths() | {"encoder_params": params, "sparsity": removed}
