"""The sizes of an encoder; in a sliced one the layers differ in width."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder; a width of 0 means that the block is absent."""

    vocab_size: int
    hidden_size: int
    heads: tuple[int, ...]  # per layer
    head_size: int
    intermediate: tuple[int, ...]  # per layer
    pooler_size: int
    num_labels: int
    max_positions: int = 512  # rows of the position table
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    dtype: str = "float32"  # of the matrix work; parameters stay float32
    problem: str = "classification"  # a key of data.problems.PROBLEMS
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    model_type: str = "bert"  # as Hugging Face calls the family
    position_offset: int = 0  # the position table's row for the first token
    head: str = ""  # the tokens that the head reads: first, every, or "": by `problem`

    @classmethod
    def dense(
        cls,
        *,
        num_layers: int,
        num_heads: int,
        hidden_size: int,
        intermediate_size: int,
        **others: Any,
    ) -> "EncoderConfig":
        """Returns the sizes of a model of equal layers; `others` are further fields."""
        return cls(
            hidden_size=hidden_size,
            heads=(num_heads,) * num_layers,
            head_size=hidden_size // num_heads,
            intermediate=(intermediate_size,) * num_layers,
            pooler_size=hidden_size,
            **others,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "EncoderConfig":
        """The inverse of `dataclasses.asdict` after a passage through JSON."""
        lists: dict[str, Any] = {
            name: tuple(fields[name]) for name in ("heads", "intermediate")
        }
        return cls(**fields | lists)

    @property
    def longest(self) -> int:
        """The most tokens that the position table has rows for."""
        return self.max_positions - self.position_offset

    @property
    def reads_every_token(self) -> bool:
        """Whether the head reads every token, not the first one through a pooler."""
        # Descriptions that are older than `head` do not name it.
        return (self.head or {"span": "every"}.get(self.problem)) == "every"

    @property
    def pad_token_id(self) -> int:
        """The padding token's id in the family's own vocabularies."""
        return max(self.position_offset - 1, 0)

    def widths(self) -> dict[str, int | list[int]]:
        """JSON-able `hidden`, and `heads` and `intermediate` per layer."""
        return {
            "hidden": self.hidden_size,
            "heads": list(self.heads),
            "intermediate": list(self.intermediate),
        }
