"""The kinds of masks, and the prunable axes of each architecture as one table.

Shapes of masks, costs, multiply-adds, folding, slicing and the layers that are alive
are all read from an `Architecture`. Another architecture needs a table here, a module
whose parameters have the names of the table, and a map to the names of Hugging Face.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig

KINDS = ("head", "mha", "intermediate", "ffn", "hidden")

# The kind of the mask on a whole block, and the kind of the masks on its units.
INNER = {"mha": "head", "ffn": "intermediate"}


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A residual block, which pruning removes whole or unit by unit.

    Attributes:
      name: of the block's module in the parameters of a layer.
      norm: the name of the LayerNorm that goes when the block goes.
      outer: the kind of the mask on the whole block.
      unit: the letter of the axis of units: heads, or intermediate units.
      widths: the field of `EncoderConfig` with the number of units per layer.
      arrays: for each projection, the axes of its kernel and of its bias.
      between_tokens: the axes of what is multiplied for each pair of tokens.
    """

    name: str
    norm: str
    outer: str
    unit: str
    widths: str
    arrays: Mapping[str, tuple[str, str]]
    between_tokens: tuple[str, ...] = ()

    @property
    def inner(self) -> str:
        """The kind of the masks on the block's units."""
        return INNER[self.outer]

    @property
    def kinds(self) -> tuple[str, str]:
        """The kinds of masks that decide whether the block is absent."""
        return self.outer, self.inner

    @property
    def modules(self) -> tuple[str, str]:
        """The names of the block's modules in the parameters of a layer."""
        return self.name, self.norm

    def weights(self, config: EncoderConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """The numbers of weights and biases as ((a, b), (c, e)).

        With D hidden dimensions, each unit has a D + b of them, and the block as a
        whole has c D + e more.
        """
        counts = [[0, 0], [0, 0]]
        for axes in [axes for pair in self.arrays.values() for axes in pair]:
            counts[self.unit not in axes]["D" not in axes] += _fixed(axes, config)
        return tuple(counts[0]), tuple(counts[1])

    def products(self, config: EncoderConfig) -> tuple[int, int]:
        """Multiply-adds of a unit: by token and hidden dimension, and by token pair."""
        (by_token, _), _ = self.weights(config)
        return by_token, sum(_fixed(axes, config) for axes in self.between_tokens)


def _fixed(axes, config):
    return config.head_size ** axes.count("d")


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """The prunable axes of an encoder, a string with one letter for each axis.

    D stands for the hidden dimensions, H for heads, d for the width of a head, F for
    intermediate units, and * for an axis that is not cut. An array whose last axis is D
    writes to the hidden states, so the masks are folded into it: those of its axes
    and, inside a block, the mask of the whole block.

    Attributes:
      blocks: of a layer, in order.
      others: the axes of the arrays outside of blocks, weights and bias, by module.
      heads: modules on top; the first one that exists reads the hidden states.
    """

    blocks: tuple[Block, ...]
    others: Mapping[str, tuple[str, str]]
    heads: tuple[str, ...]

    def axes(self, params: dict) -> dict:
        """A tree like `params` that has the axes in place of each array."""
        reader = next((name for name in self.heads if name in params), "")
        rows = {reader: ("D*", "*"), **self.others}
        for block in self.blocks:
            rows[block.norm] = ("D", "D")
            rows |= {f"{block.name}/{name}": row for name, row in block.arrays.items()}

        def of(path, array):
            *module, leaf = (entry.key for entry in path)
            module = "/".join(name for name in module if layer_of(name) is None)
            weights, bias = rows.get(module, 2 * ("*" * array.ndim,))
            return bias if leaf == "bias" else weights

        return jax.tree_util.tree_map_with_path(of, params)


def layer_of(name: str) -> int | None:
    """The layer's number in the name of its parameters; None for another name."""
    number = name.removeprefix("layer_")
    return int(number) if number != name else None


BERT = Architecture(
    blocks=(
        Block(
            name="attention",
            norm="attention_norm",
            outer="mha",
            unit="H",
            widths="heads",
            arrays={
                "query": ("DHd", "Hd"),
                "key": ("DHd", "Hd"),
                "value": ("DHd", "Hd"),
                "output": ("HdD", "D"),
            },
            between_tokens=("Hd", "Hd"),  # the scores and the context
        ),
        Block(
            name="ffn",
            norm="ffn_norm",
            outer="ffn",
            unit="F",
            widths="intermediate",
            arrays={"up": ("DF", "F"), "down": ("FD", "D")},
        ),
    ),
    others={
        "embeddings": ("*D", ""),  # by word, position and type
        "embeddings/norm": ("D", "D"),
    },
    heads=("pooler", "classifier"),
)


def architecture_of(config: EncoderConfig) -> Architecture:
    """The table of the model that `config` describes."""
    del config  # BERT and RoBERTa, which are all that there is, have the same table.
    return BERT


def check_kinds(field: str, kinds: Sequence[str]) -> None:
    """Raises UserError unless `kinds` are known, at least one and none twice."""
    if isinstance(kinds, str) or not kinds:
        raise reject(field, kinds, f"must be a tuple of one or more of {KINDS}")
    for kind in kinds:
        if kind not in KINDS:
            raise reject(field, kind, f"unknown mask kind; must be among {KINDS}")
    if len(set(kinds)) != len(kinds):
        raise reject(field, tuple(kinds), "names a kind twice")
