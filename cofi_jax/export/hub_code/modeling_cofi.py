"""A pruned BERT encoder for `transformers`: each layer has the widths it kept.

A block that was pruned away has no module, no tensor and no LayerNorm: its output is
its input. Everything else is as in BERT, also the names of the tensors. Loading needs
`trust_remote_code=True` and no library but torch and transformers.

Shapes: B batch, T tokens, D hidden dimensions.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_cofi import CofiConfig

_HEADS = ("classifier.", "qa_outputs.")


class CofiEmbeddings(nn.Module):
    """Word, position and token type embeddings, normalised."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words, types):
        """Embeds words (B, T, D) of token types (B, T), or None, as (B, T, D)."""
        # Positions are not a buffer: transformers 5 would leave it unset.
        positions = torch.arange(words.shape[1], device=words.device)
        types = torch.zeros_like(positions) if types is None else types
        x = words + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class CofiHeads(nn.Module):
    """The heads that a layer kept: from (B, T, D) to (B, T, heads * head_dim)."""

    def __init__(self, config, heads):
        super().__init__()
        self.config = config
        self.heads = heads
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(config.hidden_size, heads * config.head_dim))

    def forward(self, x, mask):
        """Returns the heads' outputs and, or None, the weights (B, heads, T, T)."""

        def split(projected):
            return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = map(split, (self.query(x), self.key(x), self.value(x)))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        if self.config._attn_implementation == "eager":
            scores = query @ key.transpose(2, 3) * self.config.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            context = F.dropout(weights, dropout) @ value
        else:
            weights = None
            context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return context.transpose(1, 2).flatten(2), weights


class CofiOutput(nn.Module):
    """The end of a block: a projection, the residual and the LayerNorm."""

    def __init__(self, config, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y, x):
        """Adds the projected y (B, T, inputs) to the block's input x (B, T, D)."""
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class CofiLayer(nn.Module):
    """The blocks that a layer kept: attention, feed-forward, both or none."""

    def __init__(self, config, heads, width):
        super().__init__()
        self.heads, self.width = heads, width
        if heads:
            output = CofiOutput(config, heads * config.head_dim)
            heads = CofiHeads(config, heads)
            self.attention = nn.ModuleDict({"self": heads, "output": output})
        if width:
            up = nn.Linear(config.hidden_size, width)
            self.intermediate = nn.ModuleDict({"dense": up})
            self.activation = ACT2FN[config.hidden_act]
            self.output = CofiOutput(config, width)

    def forward(self, x, mask):
        """Returns the new states (B, T, D) and the attention weights, or None."""
        weights = None
        if self.heads:
            context, weights = self.attention["self"](x, mask)
            x = self.attention["output"](context, x)
        if self.width:
            x = self.output(self.activation(self.intermediate["dense"](x)), x)
        return x, weights


class CofiPreTrainedModel(PreTrainedModel):
    """Loads strictly: a wrong tensor is an error, never a random weight."""

    config_class = CofiConfig
    base_model_prefix = "bert"
    _input_embed_layer = "word_embeddings"
    _supports_sdpa = True
    _no_split_modules = ["CofiLayer"]
    accepts_loss_kwargs = False  # The losses are means, whatever else is passed.

    def _init_weights(self, module):
        # transformers 5 keeps the functions of torch.nn.init, and nothing else, from
        # touching weights that were loaded.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Loads as transformers does, but refuses tensors that do not fit.

        A head may be missing where the folder's architecture has another one, and may
        have another size with `ignore_mismatched_sizes=True`.

        Raises:
          ValueError: for tensors that are missing, unknown or of another shape.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        misshapen = {name for name, *_ in info["mismatched_keys"]}
        wrong = misshapen.union(info["missing_keys"], info["unexpected_keys"])
        own = cls.__name__ in (model.config.architectures or ())
        forgiven = misshapen if own else wrong
        heads = {name for name in forgiven if name.startswith(_HEADS)}
        if wrong := sorted(wrong - heads):
            raise ValueError(
                "config.json and the weights do not fit; missing, unknown or of "
                f"another shape: {', '.join(wrong[:5])}"
            )
        return (model, info) if output_loading_info else model

    def _output(self, kind, encoded, found, return_dict):
        """What was found, and the layers' states if they were asked for, in one."""
        states, attentions = encoded.hidden_states, encoded.attentions
        output = kind(**found, hidden_states=states, attentions=attentions)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()


class CofiModel(CofiPreTrainedModel):
    """The encoder, with its pooler where the config has one."""

    def __init__(self, config):
        super().__init__(config)
        widths = zip(config.attention_heads, config.intermediate_sizes, strict=True)
        layers = [CofiLayer(config, *pair) for pair in widths]
        self.embeddings = CofiEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = None
        if config.pooler_size:
            linear = nn.Linear(config.hidden_size, config.pooler_size)
            self.pooler = nn.ModuleDict({"dense": linear})
            self.pooler_activation = ACT2FN[config.pooler_activation]
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """Computes as `BertModel`; an absent block's attention weights are None."""
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager'")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        x = self.embeddings(inputs_embeds, token_type_ids)
        mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError("attention_mask must be (batch, tokens)")
            # It is added to the scores, and finite: a row of padding must not be NaN.
            mask = torch.zeros_like(attention_mask, dtype=x.dtype)
            mask = mask.masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)
            mask = mask[:, None, None]
        # They are kept only where asked for, as they take most of the memory.
        states = (x,) if output_hidden_states else None
        attentions = () if output_attentions else None
        for layer in self.encoder["layer"]:
            x, weights = layer(x, mask)
            states = (*states, x) if output_hidden_states else None
            attentions = (*attentions, weights) if output_attentions else None
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler_activation(self.pooler["dense"](x[:, 0]))
        output = BaseModelOutputWithPooling(hidden_states=states, attentions=attentions)
        found = {"last_hidden_state": x, "pooler_output": pooled}
        return self._output(BaseModelOutputWithPooling, output, found, return_dict)


class CofiForSequenceClassification(CofiPreTrainedModel):
    """A class, or a number, for a sentence or a pair of them."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = CofiModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.pooler_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        return_dict=None,
        **others,
    ):
        """As `BertForSequenceClassification`; `others` are passed to `CofiModel`."""
        others |= {"return_dict": True}
        output = self.bert(input_ids, attention_mask, token_type_ids, **others)
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None if labels is None else self._loss(logits, labels)
        found = {"loss": loss, "logits": logits}
        return self._output(SequenceClassifierOutput, output, found, return_dict)

    def _loss(self, logits, labels):
        problem = self.config.problem_type
        if problem == "regression" or (problem is None and logits.shape[-1] == 1):
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        several = problem is None and labels.is_floating_point()
        if problem == "multi_label_classification" or several:
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits, labels.reshape(-1))


class CofiForTokenClassification(CofiPreTrainedModel):
    """A class for every token."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = CofiModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        return_dict=None,
        **others,
    ):
        """As `BertForTokenClassification`; `others` are passed to `CofiModel`."""
        others |= {"return_dict": True}
        output = self.bert(input_ids, attention_mask, token_type_ids, **others)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        found = {"loss": loss, "logits": logits}
        return self._output(TokenClassifierOutput, output, found, return_dict)


class CofiForQuestionAnswering(CofiPreTrainedModel):
    """The start and the end of the answer in a passage."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = CofiModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        return_dict=None,
        **others,
    ):
        """As `BertForQuestionAnswering`; `others` are passed to `CofiModel`."""
        others |= {"return_dict": True}
        output = self.bert(input_ids, attention_mask, token_type_ids, **others)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            beyond = start.shape[1]  # An answer there does not count.
            loss = 0
            for side, where in ((start, start_positions), (end, end_positions)):
                where = where.reshape(-1).clamp(0, beyond)
                loss = loss + F.cross_entropy(side, where, ignore_index=beyond) / 2
        found = {"loss": loss, "start_logits": start, "end_logits": end}
        return self._output(QuestionAnsweringModelOutput, output, found, return_dict)
