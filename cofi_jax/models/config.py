"""The sizes of an encoder, whose layers differ in width once it has been sliced."""

import dataclasses
from typing import Any

POOLINGS = ("mean", "cls", "max")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder.

    Attributes:
      vocab_size: the number of rows of the word table.
      hidden_size: the number D of hidden dimensions.
      heads: the number of attention heads of each layer; 0 is an absent block.
      head_size: the width d of every head.
      intermediate: the number of feed-forward units of each layer, likewise.
      pooler_size: the width of the pooler, which slicing does not change.
      num_labels: the number C of logits.
      max_positions: the number of rows of the position table.
      type_vocab_size: the number of token types.
      layer_norm_eps: the number that LayerNorm adds to the variance.
      dropout: the fraction of activations that dropout zeroes in training.
      dtype: the dtype of the matrix products; parameters are always float32.
      problem: the kind of task, a key of `data.problems.PROBLEMS`.
      activation: the activation function, a key of `layers.ACTIVATIONS`.
      model_type: the name of the model family in Hugging Face configs.
      position_offset: the row of the position table that the first token takes.
      pooler_activation: the activation function of the pooler, "tanh" or "relu".
      head: the tokens that the head reads. For the logits of a classifier, it is
        "first" or "every". For a vector, it is "mean" or "max", those of all tokens, or
        "cls", the first token without a pooler. If empty, the problem decides.
      output_activation: the activation function of the linear layer that maps a pooled
        vector to C dimensions, "identity", "tanh" or "relu"; if empty, there is no such
        layer, and C is D.
      output_bias: whether that layer adds a bias.
      normalize: whether vectors are divided by their length.
    """

    vocab_size: int
    hidden_size: int
    heads: tuple[int, ...]
    head_size: int
    intermediate: tuple[int, ...]
    pooler_size: int
    num_labels: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    dtype: str = "float32"
    problem: str = "classification"
    activation: str = "gelu"
    model_type: str = "bert"
    position_offset: int = 0
    head: str = ""
    pooler_activation: str = "tanh"
    output_activation: str = ""
    output_bias: bool = True
    normalize: bool = False

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
        """Returns the sizes of a model of equal layers; `others` sets more fields."""
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
        """Inverts `dataclasses.asdict`, whose tuples JSON has turned into lists."""
        widths = {name: tuple(fields[name]) for name in ("heads", "intermediate")}
        return cls(**fields | widths)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text that the position table allows."""
        return self.max_positions - self.position_offset

    @property
    def reads_every_token(self) -> bool:
        """Whether the classifier reads every token, not only the pooled first one."""
        return self._head == "every"

    @property
    def reads_one_token(self) -> bool:
        """Whether the head reads the first token alone."""
        return self._head in ("first", "cls")

    @property
    def has_pooler(self) -> bool:
        """Whether a pooler stands between the first token and the classifier."""
        return self._head == "first"

    @property
    def pooling(self) -> str:
        """How tokens become a vector, "mean", "max" or "cls"; "" for a classifier."""
        return self._head if self._head in POOLINGS else ""

    @property
    def _head(self) -> str:
        # Models that were saved before the field `head` existed leave it empty.
        return self.head or {"span": "every"}.get(self.problem, "first")

    @property
    def pad_token_id(self) -> int:
        """The id of the padding token in the vocabularies of the model family."""
        return max(self.position_offset - 1, 0)

    def widths(self) -> dict[str, int | list[int]]:
        """Returns `hidden`, and per layer `heads` and `intermediate`, for JSON."""
        return {
            "hidden": self.hidden_size,
            "heads": list(self.heads),
            "intermediate": list(self.intermediate),
        }
