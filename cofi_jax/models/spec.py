"""The prunable axes of an architecture, as one table that everything else reads.

The shapes of the masks, the cost, the multiply-adds, folding, slicing and the layers
that are alive all follow from the rows below. Another architecture is another table.

The axes of an array are spelt by letters:

    D  hidden dimensions          kept where `hidden` is open
    H  heads of a layer           kept where `head` is open
    F  feed-forward units         kept where `intermediate` is open
    d  dimensions of a head       never cut
    *  anything else              never cut

An array whose last axis is D writes to the hidden states, so the masks of what it
writes are folded into it.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig


class Block(NamedTuple):
    """A residual block of each layer: its units, its masks and its parameters.

    Attributes:
      name: the block's name in a layer's parameters; its LayerNorm is `{name}_norm`.
      outer: the kind of mask that closes the whole block.
      inner: the kind of mask that closes single units of it.
      widths: the field of `EncoderConfig` that has the number of units per layer.
      unit: the letter of the units.
      arrays: the axes of each parameter that counts for the cost.
      products: the axes of the matrix products without parameters; T is the tokens.
    """

    name: str
    outer: str
    inner: str
    widths: str
    unit: str
    arrays: Mapping[str, str]
    products: tuple[str, ...] = ()

    @property
    def norm(self) -> str:
        """The name of the block's LayerNorm in a layer's parameters."""
        return f"{self.name}_norm"

    def sizes(self, config: EncoderConfig) -> tuple[int, ...]:
        """The number of units in each layer."""
        return getattr(config, self.widths)

    def real(self, config: EncoderConfig) -> np.ndarray:
        """(L, W) booleans: the positions of the inner mask that are units.

        W is the width of the widest layer; the rows of the others are padded.
        """
        sizes = np.asarray(self.sizes(config))[:, None]
        return np.arange(sizes.max()) < sizes


class Architecture(NamedTuple):
    """The blocks of each layer in their order, and the axes of all other parameters."""

    blocks: tuple[Block, ...]
    outside: Mapping[str, str]


BERT = Architecture(
    blocks=(
        Block(
            name="attention",
            outer="mha",
            inner="head",
            widths="heads",
            unit="H",
            arrays={
                "query/kernel": "DHd",
                "query/bias": "Hd",
                "key/kernel": "DHd",
                "key/bias": "Hd",
                "value/kernel": "DHd",
                "value/bias": "Hd",
                "output/kernel": "HdD",
                "output/bias": "D",
            },
            products=("TTHd", "TTHd"),  # the scores and the context
        ),
        Block(
            name="ffn",
            outer="ffn",
            inner="intermediate",
            widths="intermediate",
            unit="F",
            arrays={
                "up/kernel": "DF",
                "up/bias": "F",
                "down/kernel": "FD",
                "down/bias": "D",
            },
        ),
    ),
    outside={
        "embeddings/word": "*D",
        "embeddings/position": "*D",
        "embeddings/type": "*D",
        "embeddings/norm/scale": "D",
        "embeddings/norm/bias": "D",
        "pooler/kernel": "D*",
        "pooler/bias": "*",
        "classifier/kernel": "D*",  # "**" behind a pooler
        "classifier/bias": "*",
    },
)

# By `EncoderConfig.model_type`.
ARCHITECTURES = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), BERT)

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")

# The kind of the masks inside a block, by the kind of the masks on whole blocks.
INNER = {
    block.outer: block.inner
    for architecture in ARCHITECTURES.values()
    for block in architecture.blocks
}


def blocks(config: EncoderConfig) -> tuple[Block, ...]:
    """The blocks of each layer of a model of these sizes."""
    return ARCHITECTURES[config.model_type].blocks


def check_kinds(field: str, kinds: Sequence[str]) -> None:
    """Raises UserError unless `kinds` are known, at least one and none twice."""
    if isinstance(kinds, str) or not kinds:
        raise reject(field, kinds, f"must be a tuple of one or more of {KINDS}")
    for kind in kinds:
        if kind not in KINDS:
            raise reject(field, kind, f"unknown mask kind; must be among {KINDS}")
    if len(set(kinds)) != len(kinds):
        raise reject(field, tuple(kinds), "names a kind twice")


class Place(NamedTuple):
    """Where a parameter stands in the table.

    Attributes:
      axes: the letters of its axes.
      layer: the layer's number, or None outside the layers.
      block: the block that it belongs to, or None outside the layers.
      counted: whether it is one of the block's own arrays, not of its LayerNorm.
    """

    axes: str
    layer: int | None = None
    block: Block | None = None
    counted: bool = False


def place(path: Sequence[str], params: Container) -> Place:
    """The place of the parameter that lies at `path`, among the paths `params`.

    Raises:
      KeyError: for a parameter that no table has.
    """
    top, *rest = path
    name = "/".join(path)
    for architecture in ARCHITECTURES.values():
        if name in architecture.outside:
            axes = architecture.outside[name]
            behind = top == "classifier" and ("pooler", "kernel") in params
            return Place(axes.replace("D", "*") if behind else axes)
        for block in architecture.blocks if top.startswith("layer_") else ():
            layer, array = int(top.removeprefix("layer_")), "/".join(rest[1:])
            if rest[0] == block.norm:
                return Place("D", layer, block)
            if rest[0] == block.name and array in block.arrays:
                return Place(block.arrays[array], layer, block, counted=True)
    raise KeyError(name)


def per_unit(block: Block, config: EncoderConfig) -> Iterator[tuple[int, int]]:
    """Weights of one unit, then those of the block that go with its last unit.

    Each is a pair (a, b), which stands for a * hidden + b.
    """
    for of_unit in (True, False):
        weights = [0, 0]
        for axes in block.arrays.values():
            if (block.unit in axes) == of_unit:
                weights["D" not in axes] += config.head_size ** axes.count("d")
        yield tuple(weights)
