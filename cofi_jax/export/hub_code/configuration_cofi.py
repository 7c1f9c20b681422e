"""Sizes of a pruned BERT encoder, layer by layer; an absent block has the size 0."""

from transformers import PretrainedConfig

# A digest of modeling_cofi.py, filled in when a model is exported. transformers caches
# a folder's code by the folder's name and the content of this file alone. Without the
# digest, two folders of one name would both run the first one's modeling file.
CODE = ""


class CofiConfig(PretrainedConfig):
    """A BERT whose layers have widths of their own.

    Attributes:
      attention_heads: heads of each layer, 0 where it has no attention block.
      intermediate_sizes: feed-forward units of each layer, 0 where it has none.
      head_dim: width of a head; `hidden_size` need not be a multiple of it.
      pooler_size: width of the pooler's output; 0 where there is no pooler.
      num_hidden_layers, num_attention_heads, intermediate_size: the number of layers
        and the largest widths, for tools that expect one number.
    """

    model_type = "cofi_encoder"

    def __init__(
        self,
        vocab_size=30522,
        hidden_size=768,
        attention_heads=(12,) * 12,
        intermediate_sizes=(3072,) * 12,
        head_dim=64,
        pooler_size=768,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
        pad_token_id=0,
        **kwargs,
    ):
        if len(attention_heads) != len(intermediate_sizes):
            raise ValueError(
                f"attention_heads has {len(attention_heads)} layers, "
                f"intermediate_sizes {len(intermediate_sizes)}"
            )
        derived = {
            "num_hidden_layers": len(attention_heads),
            "num_attention_heads": max(attention_heads, default=0),
            "intermediate_size": max(intermediate_sizes, default=0),
        }
        for name, value in derived.items():
            if (given := kwargs.pop(name, value)) != value:
                raise ValueError(
                    f"{name} is {given}, but {value} by attention_heads and "
                    "intermediate_sizes, which are what counts"
                )
            setattr(self, name, value)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.attention_heads = list(attention_heads)
        self.intermediate_sizes = list(intermediate_sizes)
        self.head_dim = head_dim
        self.pooler_size = pooler_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)
