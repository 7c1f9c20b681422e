"""The prunable axes of an architecture, as one table that everything else reads.

The shapes of the masks, the cost, the multiply-adds, folding, slicing and the layers
that are alive all follow from it. Each axis of an array has a letter:

    D  hidden dimensions          kept where the mask `hidden` is open
    H  heads of a layer           kept where `head` is open
    F  feed-forward units         kept where `intermediate` is open
    d  dimensions of a head       never cut
    *  anything else              never cut

An array whose last axis is D writes to the hidden states, so the masks of what it
writes are folded into it.
"""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig


class Block(NamedTuple):
    """A residual block of each layer: its masks, its units and its parameters.

    Attributes:
      name: the block's name in a layer's parameters; its LayerNorm is `{name}_norm`.
      outer: the kind of mask that closes the whole block.
      inner: the kind of mask that closes single units of it.
      widths: the field of `EncoderConfig` that has the number of units per layer.
      unit: the letter of the units.
      modules: the axes of each module's kernel and bias; these count for the cost.
      products: the axes of the matrix products without parameters; T is the tokens.
    """

    name: str
    outer: str
    inner: str
    widths: str
    unit: str
    modules: Mapping[str, tuple[str, str]]
    products: tuple[str, ...] = ()

    @property
    def norm(self) -> str:
        """The name of the block's LayerNorm in a layer's parameters."""
        return f"{self.name}_norm"

    def sizes(self, config: EncoderConfig) -> tuple[int, ...]:
        """The number of units in each layer."""
        return getattr(config, self.widths)

    def real(self, config: EncoderConfig) -> dict[str, np.ndarray]:
        """Booleans by kind: which positions of its masks are there, not padding.

        They are (L,) for the outer kind and (L, W) for the inner one, where W is the
        width of the widest layer.
        """
        sizes = np.asarray(self.sizes(config), int)
        units = np.arange(sizes.max(initial=0)) < sizes[:, None]
        return {self.outer: sizes > 0, self.inner: units}


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
            modules={
                "query": ("DHd", "Hd"),
                "key": ("DHd", "Hd"),
                "value": ("DHd", "Hd"),
                "output": ("HdD", "D"),
            },
            products=("TTHd", "TTHd"),  # the scores and the context
        ),
        Block(
            name="ffn",
            outer="ffn",
            inner="intermediate",
            widths="intermediate",
            unit="F",
            modules={"up": ("DF", "F"), "down": ("FD", "D")},
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
ARCHITECTURES: dict[str, Architecture] = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "camembert"), BERT
)

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")

# The kind of the masks inside a block, by the kind of the masks on whole blocks.
INNER = {b.outer: b.inner for known in ARCHITECTURES.values() for b in known.blocks}


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
    """The place of a parameter: the letters of its axes and, in a layer, the block."""

    axes: str
    layer: int = 0
    block: Block | None = None


def place(path: Sequence[str], params: Container) -> Place:
    """The place of the parameter that lies at `path`, among the paths `params`.

    Raises:
      KeyError: for a parameter that no table has.
    """
    top, module, name = path[0], path[1], "/".join(path)
    for known in ARCHITECTURES.values():
        if name in known.outside:
            axes = known.outside[name]
            behind = top == "classifier" and ("pooler", "kernel") in params
            return Place(axes.replace("D", "*") if behind else axes)
        for block in known.blocks if top.startswith("layer_") else ():
            layer = int(top.removeprefix("layer_"))
            if module == block.norm:
                return Place("D", layer, block)
            if module == block.name and path[2] in block.modules:
                return Place(block.modules[path[2]][path[3] == "bias"], layer, block)
    raise KeyError(name)


def per_unit(block: Block, config: EncoderConfig) -> tuple[list[int], list[int]]:
    """Weights of one unit, and those of the block that go with its last unit.

    Each is a pair (a, b), which stands for a * hidden + b.
    """
    found = [0, 0], [0, 0]
    for axes in (axes for pair in block.modules.values() for axes in pair):
        size = config.head_size ** axes.count("d")
        found[block.unit not in axes]["D" not in axes] += size
    return found
