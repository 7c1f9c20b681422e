"""The config.json of a Hugging Face folder, to our sizes and back."""

import dataclasses
from collections.abc import Sequence

from cofi_jax.config import Model
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS

# Hugging Face's classes of a family, by model_type, and the prefix of their tensors.
FAMILIES = {
    "bert": ("Bert", "bert."),
    "roberta": ("Roberta", "roberta."),
    "xlm-roberta": ("XLMRoberta", "roberta."),
    "camembert": ("Camembert", "roberta."),
}


class UnsupportedCheckpoint(ValueError):
    """What is wrong with a folder, in one line."""


def from_fields(
    fields: dict, num_labels: int, model: Model, problem: str
) -> EncoderConfig:
    """The sizes that the fields of a config.json tell; dropout and dtype are `model`'s.

    Raises:
      UnsupportedCheckpoint: where a field is missing or not legal, or the
        architecture is another one.
    """
    legal = {
        "model_type": (None, tuple(FAMILIES)),
        "hidden_act": ("gelu", tuple(ACTIVATIONS)),
        "position_embedding_type": ("absolute", ("absolute",)),
        "is_decoder": (False, (False,)),
    }
    for name, (default, values) in legal.items():
        if (value := fields.get(name, default)) not in values:
            values = " or ".join(map(repr, values))
            raise UnsupportedCheckpoint(
                f"unsupported architecture: {name} is {value!r}, must be {values}"
            )

    def size(name, default=None, least=1):
        if name not in fields and default is None:
            raise UnsupportedCheckpoint(f"config.json lacks {name!r}")
        value = fields.get(name, default)
        if type(value) is not int or value < least:
            raise UnsupportedCheckpoint(
                f"config.json: {name} is {value!r}, must be {least} or more"
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if hidden % heads:
        legal = "must divide hidden_size"
        raise UnsupportedCheckpoint(f"num_attention_heads is {heads}, {legal}")
    epsilon = fields.get("layer_norm_eps", 1e-12)
    if type(epsilon) is not float:
        legal = f"layer_norm_eps is {epsilon!r}, must be a float"
        raise UnsupportedCheckpoint(f"config.json: {legal}")
    head, family = PROBLEMS[problem].head, fields["model_type"]
    # RoBERTa's rows up to that of the padding token are never those of a token.
    offset = 0 if family == "bert" else size("pad_token_id", 1, least=0) + 1
    config = EncoderConfig.dense(
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        num_labels=num_labels,
        max_positions=size("max_position_embeddings", least=offset + 1),
        type_vocab_size=size("type_vocab_size"),
        layer_norm_eps=epsilon,
        dropout=model.dropout,
        dtype=model.dtype,
        problem=problem,
        activation=fields.get("hidden_act", "gelu"),
        model_type=family,
        position_offset=offset,
    )
    # A head that follows from the problem is not named, so that equal models have equal
    # sizes, however they were described.
    named = {} if config.reads_every_token == (head == "every") else {"head": head}
    pooler = hidden if head == "first" else 0
    return dataclasses.replace(config, pooler_size=pooler, **named)


def is_dense(config: EncoderConfig) -> bool:
    """Returns whether transformers has a model of these sizes."""
    hidden, units = config.hidden_size, set(config.intermediate)
    attention = {heads * config.head_size for heads in config.heads}
    pooler = config.reads_every_token or config.pooler_size == hidden
    return attention == {hidden} and len(units) == 1 and 0 not in units and pooler


def to_fields(config: EncoderConfig, labels: Sequence[str] = ()) -> dict:
    """The fields of a config.json for a dense model, with the names of its classes.

    Raises:
      UserError: where transformers has no such model, a sliced one say, and where there
        are not as many labels as outputs.
    """
    if not is_dense(config):
        legal = "must be a dense model's; transformers cannot hold a sliced one"
        raise reject("config", config.widths(), legal)
    name, _ = FAMILIES[config.model_type]
    return shared_fields(config, labels) | {
        "architectures": [f"{name}For{PROBLEMS[config.problem].auto_model}"],
        "model_type": config.model_type,
        "num_attention_heads": config.heads[0],
        "intermediate_size": config.intermediate[0],
        "max_position_embeddings": config.max_positions,
        "position_embedding_type": "absolute",
    }


def shared_fields(config: EncoderConfig, labels: Sequence[str]) -> dict:
    """The fields of a config.json that say the same of dense and sliced models.

    Without `labels` the classes are called LABEL_0, ...

    Raises:
      UserError: where there are not as many labels as outputs.
    """
    names = labels or [f"LABEL_{row}" for row in range(config.num_labels)]
    if len(names) != config.num_labels:
        legal = f"has {config.num_labels} classes, labels has {len(labels)}"
        raise reject("labels", tuple(labels), legal)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.heads),
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "problem_type": PROBLEMS[config.problem].problem_type,
        "id2label": {str(row): name for row, name in enumerate(names)},
        "label2id": {name: row for row, name in enumerate(names)},
    }


def class_rows(
    fields: dict, labels: Sequence[str], label_order: Sequence[str], field: str
) -> list[int] | None:
    """The model's row of each of `labels`; None where nothing tells its order.

    Args:
      fields: of config.json; the names in it count, unless they are LABEL_0, ...
      labels: the task's classes in its order.
      label_order: the same in the order of the model, () for that of `fields`.
        Upper and lower case count only where classes differ in nothing else.
      field: the config field that named the folder, for messages.

    Raises:
      UserError: where `label_order` is no permutation of `labels`.
      UnsupportedCheckpoint: where there is none and the names in `fields` are not
        `labels`.
    """
    try:
        names = {int(row): str(name) for row, name in fields["id2label"].items()}
        named = [names[row] for row in range(len(names))]
    except (AttributeError, KeyError, TypeError, ValueError):  # none that make sense
        named = []
    where = "labels" if field == "model" else f"{field.removesuffix('.path')}.labels"
    for fold in (str, str.lower):
        order, wanted = ([*map(fold, x)] for x in (label_order or named, labels))
        if len(set(order)) == len(order) and sorted(order) == sorted(wanted):
            return [order.index(name) for name in wanted]
    if label_order:
        legal = f"must be a permutation of {tuple(labels)}, in the order of the model"
        raise reject(where, tuple(label_order), legal)
    real = not all(name.startswith("LABEL_") for name in named)
    if labels and real and len(set(named)) == len(labels):
        raise UnsupportedCheckpoint(
            f"names its classes {', '.join(named[:5])}; give the task's own names, "
            f"{', '.join(labels[:5])}, in the order of the model: {where}"
        )
    return None if labels else []
