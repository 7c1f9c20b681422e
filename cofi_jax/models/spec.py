"""The prunable axes of an architecture, in one table that everything else reads.

The shapes of the masks, the cost, the multiply-adds, folding, slicing and the layers
that are alive all follow from the table. It gives each axis of a parameter a letter:

    D  the hidden dimensions             kept where a `hidden` mask is open
    H  the heads of a layer              kept where a `head` mask is open
    F  the feed-forward units            kept where an `intermediate` mask is open
    d  the dimensions within a head      never cut
    *  any other axis                    never cut

A parameter whose last axis is D writes to the hidden states, so folding multiplies it
by the masks of what it writes.
"""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig


class Block(NamedTuple):
    """A residual block, of which each layer has one: its masks, units and parameters.

    Attributes:
      name: the name of the block in the parameters of a layer.
      outer: the kind of the masks that close whole blocks.
      inner: the kind of the masks that close single units of a block.
      widths: the field of `EncoderConfig` with the number of units of each layer.
      unit: the letter of the axis of the units.
      modules: the axes of the kernel and the bias of each linear module by its name;
        these parameters make up the cost.
      products: the axes of the matrix products without a parameter, where T stands for
        the tokens.
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
        """The name of the LayerNorm of the block in the parameters of a layer."""
        return f"{self.name}_norm"

    @property
    def output(self) -> str:
        """The name of the linear module that writes to the hidden states."""
        axes = self.modules.items()
        return next(name for name, (kernel, _) in axes if kernel.endswith("D"))

    def sizes(self, config: EncoderConfig) -> tuple[int, ...]:
        """Returns the number of units of each layer."""
        return getattr(config, self.widths)

    def real(self, config: EncoderConfig) -> dict[str, np.ndarray]:
        """Returns, for both kinds of masks, which positions are real, not padding.

        The booleans are (L,) for the outer kind and (L, W) for the inner kind, where W
        is the width of the widest layer.
        """
        sizes = np.asarray(self.sizes(config), int)
        units = np.arange(sizes.max(initial=0)) < sizes[:, None]
        return {self.outer: sizes > 0, self.inner: units}


class Architecture(NamedTuple):
    """The table of an architecture.

    Attributes:
      blocks: the blocks of each layer, in the order in which they run.
      outside: the axes of all parameters outside the layers, by their path.
    """

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
            products=("TTHd", "TTHd"),  # These are the scores and the context.
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
        "classifier/kernel": "D*",  # See `place`: "**" if it reads a pooler.
        "classifier/bias": "*",
    },
)

# The architectures by `EncoderConfig.model_type`.
ARCHITECTURES: dict[str, Architecture] = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "camembert", "distilbert"), BERT
)

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")

# The kind of the masks inside a block by the kind of the masks of whole blocks.
INNER = {b.outer: b.inner for known in ARCHITECTURES.values() for b in known.blocks}


def blocks(config: EncoderConfig) -> tuple[Block, ...]:
    """Returns the blocks that each layer of a model of these sizes has."""
    return ARCHITECTURES[config.model_type].blocks


def check_kinds(field: str, kinds: Sequence[str]) -> None:
    """Checks the kinds of masks that a user has named.

    Raises:
      UserError: if `kinds` names no kind, an unknown kind, or a kind twice.
    """
    if isinstance(kinds, str) or not kinds:
        raise reject(field, kinds, f"must be a tuple of one or more of {KINDS}")
    for kind in kinds:
        if kind not in KINDS:
            raise reject(field, kind, f"unknown mask kind; must be among {KINDS}")
    if len(set(kinds)) != len(kinds):
        raise reject(field, tuple(kinds), "names a kind twice")


class Place(NamedTuple):
    """A parameter's place in the model.

    Attributes:
      axes: the letters of its axes.
      layer: the number of its layer, or 0 outside the layers.
      block: the block that it belongs to, or None outside the layers.
    """

    axes: str
    layer: int = 0
    block: Block | None = None


def place(path: Sequence[str], params: Container) -> Place:
    """Returns the place of a parameter.

    Args:
      path: the path of the parameter.
      params: the paths of all parameters of the model.

    Raises:
      KeyError: if no architecture has the parameter.
    """
    top, module, name = path[0], path[1], "/".join(path)
    for known in ARCHITECTURES.values():
        if name in known.outside:
            axes = known.outside[name]
            pooled = top == "classifier" and ("pooler", "kernel") in params
            return Place(axes.replace("D", "*") if pooled else axes)
        for block in known.blocks if top.startswith("layer_") else ():
            layer = int(top.removeprefix("layer_"))
            if module == block.norm:
                return Place("D", layer, block)
            if module == block.name and path[2] in block.modules:
                return Place(block.modules[path[2]][path[3] == "bias"], layer, block)
    raise KeyError(name)


def per_unit(block: Block, config: EncoderConfig) -> tuple[list[int], list[int]]:
    """Counts the parameters that belong to single units, and those that do not.

    Returns:
      Two pairs (a, b), each of which stands for a * D + b parameters: those of each
      unit, and those of the block that remain as long as any of its units does.
    """
    counts = [0, 0], [0, 0]
    for axes in (axes for pair in block.modules.values() for axes in pair):
        size = config.head_size ** axes.count("d")
        counts[block.unit not in axes]["D" not in axes] += size
    return counts
