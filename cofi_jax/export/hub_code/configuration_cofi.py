"""Sizes of a pruned BERT encoder, layer by layer; an absent block has the size 0."""

from transformers import PretrainedConfig

# A digest of modeling_cofi.py, filled in when a model is exported. transformers caches
# a folder's code by the folder's name and the content of this file alone. Without the
# digest, two folders of one name would both run the first one's modeling file.
CODE = ""

_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "attention_heads": (12,) * 12,
    "intermediate_sizes": (3072,) * 12,
    "head_dim": 64,
    "pooler_size": 768,
    "pooler_activation": "tanh",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}


class CofiConfig(PretrainedConfig):
    """A BERT whose layers have widths of their own.

    Attributes:
      attention_heads: heads of each layer, 0 where it has no attention block.
      intermediate_sizes: feed-forward units of each layer, 0 where it has none.
      head_dim: width of a head; `hidden_size` need not be a multiple of it.
      pooler_size: width of the pooler's output; 0 where there is no pooler.
      pooler_activation: its activation function, of those that transformers knows.
      num_hidden_layers, num_attention_heads, intermediate_size: the number of layers
        and the largest widths, for tools that expect one number.
    """

    model_type = "cofi_encoder"

    def __init__(self, **fields):
        for name, default in _DEFAULTS.items():
            setattr(self, name, fields.pop(name, default))
        heads, widths = list(self.attention_heads), list(self.intermediate_sizes)
        self.attention_heads, self.intermediate_sizes = heads, widths
        if len(heads) != len(widths):
            raise ValueError(
                f"attention_heads has {len(heads)} layers, "
                f"intermediate_sizes {len(widths)}"
            )
        derived = {
            "num_hidden_layers": len(heads),
            "num_attention_heads": max(heads, default=0),
            "intermediate_size": max(widths, default=0),
        }
        for name, value in derived.items():
            if (given := fields.pop(name, value)) != value:
                raise ValueError(
                    f"{name} is {given}, but {value} by attention_heads and "
                    "intermediate_sizes, which are what counts"
                )
            setattr(self, name, value)
        fields.setdefault("pad_token_id", 0)
        super().__init__(**fields)
