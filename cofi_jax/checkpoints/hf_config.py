"""The config.json of a Hugging Face folder, to our sizes and back."""

import dataclasses
import reprlib
from collections.abc import Sequence

from cofi_jax.checkpoints import foreign
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
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
    "distilbert": ("DistilBert", "distilbert."),
}

# DistilBERT's own names of fields that the others share.
_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# What DistilBERT has no field for: it does without token types.
_FIXED_IN_DISTILBERT = {"type_vocab_size": 1, "layer_norm_eps": 1e-12}


# Names that transformers has for functions of ours.
_SAME_ACTIVATION = {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}

# What these fields may say where they are present; () means that they must be absent.
# With any other value, a model computes something else with tensors of the same names.
_NEUTRAL = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "position_embedding_type": ("absolute",),
    "attention_type": ("original_full", "full"),
    "attention_bias": (True,),
    "use_bias": (True,),
    "qkv_bias": (True,),
    "use_qkv_bias": (True,),
    "mlp_bias": (True,),
    "scale_attn_weights": (True,),
    "position_biased_input": (True,),
    "use_position_embeddings": (True,),
    "use_token_type_embeddings": (True,),
    "use_absolute_position_embeddings": (True,),
    "pooler_act": ("tanh",),
    "pooler_hidden_act": ("tanh",),
    "pooler_activation": ("tanh",),
    "norm_type": ("layer_norm", "layernorm", "LayerNorm"),
    "layer_norm_type": ("layer_norm", "layernorm", "LayerNorm", "post"),
    "inner_group_num": (1,),
    **dict.fromkeys(
        (
            "adapters",
            "attention_window",
            "cross_layer_parameter_sharing",
            "do_layer_norm_before",
            "emb_layer_norm_before",
            "expert_layers",
            "gated_mlp",
            "is_gated_act",
            "layer_scale_init_value",
            "norm_first",
            "normalize_before",
            "num_experts",
            "num_hidden_groups",
            "num_local_experts",
            "parallel_attention",
            "parallel_attn",
            "parallel_residual",
            "pos_att_type",
            "pre_norm",
            "quantization_config",
            "relative_attention",
            "residual_scale",
            "rms_norm_eps",
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "rotary",
            "rotary_value",
            "scale_attn_by_inverse_layer_idx",
            "share_attention",
            "share_layers",
            "share_parameters",
            "share_weights",
            "sparse_attention",
            "tie_layers",
            "tied_layers",
            "token_dropout",
            "use_moe",
            "use_parallel_attention",
            "use_parallel_residual",
            "use_relative_position",
            "use_rotary",
            "use_rotary_embeddings",
        ),
        (),
    ),
}

# These change nothing of the function: they are of training, of generation, of heads
# that are left out, or of where the folder comes from.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_internal _commit_hash _name_or_path
    _num_labels adapter_layers architectures attention_dropout
    attention_probs_dropout_prob
    attn_dropout attn_implementation author auto_map bad_words_ids base_model_name
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cls_token_id cross_attention_hidden_size custom_pipelines dataset datasets
    decoder_start_token_id directionality diversity_penalty do_distill
    do_layer_distill do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id eos_token_ids
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id fp16 gradient_checkpointing hidden_dropout
    hidden_dropout_prob ignore_mismatched_sizes initializer_range is_composition
    label_smoothing language layer_distill_version layerdrop length_penalty license
    mask_token_id max_length max_seq_length min_length model_max_length name
    name_or_path no_repeat_ngram_size nsp num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_past
    output_scores pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type prefix pruned_heads qa_dropout
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate seed
    sentence_transformers sep_token_id seq_classif_dropout sinusoidal_pos_embds
    summary_activation summary_first_dropout summary_last_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_weights_ tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript train_batch_size
    transformers.js_config transformers_version typical_p unk_token_id use_bfloat16
    use_cache use_flash_attn xla_device
    """.split()
)

# These are read, here or in `class_names`.
_READ = frozenset(
    """
    activation activation_function attention_head_size embedding_size head_dim
    hidden_act hidden_activation hidden_size id2label intermediate_size label2id
    layer_norm_eps max_position_embeddings model_type num_attention_heads
    num_hidden_layers num_key_value_heads num_labels pad_token_id problem_type
    qkv_size type_vocab_size vocab_size
    """.split()
).union(_DISTILBERT.values())

_MOST_LAYERS = 1000


def from_fields(
    fields: dict, num_labels: int, model: Model, problem: str
) -> EncoderConfig:
    """The sizes that the fields of a config.json tell; dropout and dtype are `model`'s.

    Without `model_type`, which Google's own files lack, it is a BERT's.

    Raises:
      UnsupportedCheckpoint: where a field is missing or not legal, or the
        architecture is another one.
    """
    family = fields.get("model_type")
    family = "bert" if family is None else family
    _one_of("model_type", family, tuple(FAMILIES))
    own_names = _DISTILBERT if family == "distilbert" else {}
    if own_names:
        shared = {k: fields[own] for k, own in own_names.items() if own in fields}
        fields = fields | shared | _FIXED_IN_DISTILBERT
    for name, values in _NEUTRAL.items():
        value = fields.get(name)
        # An empty value is that of an absent field, unless True is what it must be.
        if value or (value is not None and True in values):
            _one_of(name, value, values)
    activation = _activation(fields)

    def size(name, default=None, **bounds):
        own = own_names.get(name, name)
        if name not in fields and default is None:
            raise UnsupportedCheckpoint(f"config.json lacks {own!r}")
        value = fields.get(name, default)
        return foreign.number(f"config.json: {own}", value, **bounds)

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    for name, value in (("num_key_value_heads", heads), ("embedding_size", hidden)):
        if fields.get(name) not in (None, value):
            _one_of(name, fields[name], (value,))
    epsilon = ("config.json: layer_norm_eps", fields.get("layer_norm_eps", 1e-12))
    vocabulary, pad = size("vocab_size"), fields.get("pad_token_id")
    if pad is not None:
        size("pad_token_id", least=0, most=vocabulary - 1)
    if fields.get("num_labels") is not None:  # The weights tell the number.
        size("num_labels", least=0)
    # RoBERTa's rows up to that of the padding token are never those of a token.
    from_start = FAMILIES[family][1] != "roberta."
    offset = 0 if from_start else size("pad_token_id", 1, least=0) + 1
    config = EncoderConfig(
        heads=(heads,) * size("num_hidden_layers", most=_MOST_LAYERS),
        head_size=_head_size(fields, hidden, heads),
        hidden_size=hidden,
        intermediate=(size("intermediate_size"),) * fields["num_hidden_layers"],
        vocab_size=vocabulary,
        num_labels=num_labels,
        max_positions=size("max_position_embeddings", least=offset + 1),
        type_vocab_size=size("type_vocab_size"),
        layer_norm_eps=foreign.number(*epsilon, least=0, most=1, kind=float),
        dropout=model.dropout,
        dtype=model.dtype,
        problem=problem,
        activation=activation,
        model_type=family,
        position_offset=offset,
        pooler_size=0,
        pooler_activation=pooler_activation(family),
    )
    # A head that follows from the problem is not named, so that equal models have equal
    # sizes, however they were described.
    head = PROBLEMS[problem].head
    usual = "every" if config.reads_every_token else "first"
    named = {} if head == usual else {"head": head}
    pooler = hidden if head == "first" else 0
    return dataclasses.replace(config, pooler_size=pooler, **named)


def pooler_activation(family: str) -> str:
    """Returns the activation function of the pooler of a family."""
    return "relu" if family == "distilbert" else "tanh"


def unknown_fields(fields: dict) -> list[str]:
    """The fields of a config.json that say something, but nobody knows what."""
    known = _READ.union(_HARMLESS, _NEUTRAL)
    return sorted(name for name, value in fields.items() if value and name not in known)


def _one_of(name, value, legal):
    if value in legal and type(value) in map(type, legal):
        return
    legal = " or ".join(map(repr, legal)) or "absent"
    raise UnsupportedCheckpoint(
        f"unsupported architecture: {name} is {reprlib.repr(value)}, must be {legal}"
    )


def _activation(fields):
    """Our name of the activation function, by whichever name the field has."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    name, value = _stated(fields, names)
    if value is None:
        return "gelu"
    _one_of(name, value, (*ACTIVATIONS, *_SAME_ACTIVATION))
    return _SAME_ACTIVATION.get(value, value)


def _head_size(fields, hidden, heads):
    """The width of a head, which follows from others where no field states it."""
    name, value = _stated(fields, ("attention_head_size", "head_dim"))
    if value is not None:
        return foreign.number(f"config.json: {name}", value, most=hidden)
    name, width = "hidden_size", hidden
    if fields.get("qkv_size") is not None:  # AutoTinyBERT's, for all heads together
        name = "qkv_size"
        width = foreign.number(f"config.json: {name}", fields[name])
    if width % heads:
        raise UnsupportedCheckpoint(
            f"num_attention_heads is {heads}, must divide {name}"
        )
    return width // heads


def _stated(fields, names):
    """The first of the fields that is there, with its value, which all others share."""
    given = [(name, fields[name]) for name in names if fields.get(name) is not None]
    for name, value in given[1:]:
        _one_of(name, value, (given[0][1],))
    return given[0] if given else (None, None)


def is_dense(config: EncoderConfig) -> bool:
    """Returns whether transformers has a model of these sizes."""
    hidden, units = config.hidden_size, set(config.intermediate)
    attention = {heads * config.head_size for heads in config.heads}
    activation = config.pooler_activation == pooler_activation(config.model_type)
    pooler = config.pooler_size == hidden and activation
    pooler = pooler or not config.has_pooler
    if config.model_type == "distilbert":  # A lower epsilon changes nothing.
        fixed = _FIXED_IN_DISTILBERT
        if config.type_vocab_size != fixed["type_vocab_size"]:
            return False
        if config.layer_norm_eps > fixed["layer_norm_eps"]:
            return False
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
    fields = shared_fields(config, labels) | {
        "architectures": [PROBLEMS[config.problem].class_of(name)],
        "model_type": config.model_type,
        "num_attention_heads": config.heads[0],
        "intermediate_size": config.intermediate[0],
        "max_position_embeddings": config.max_positions,
    }
    if config.model_type != "distilbert":
        return fields | {"position_embedding_type": "absolute"}
    kept = {k: v for k, v in fields.items() if k not in _FIXED_IN_DISTILBERT}
    return {_DISTILBERT.get(name, name): value for name, value in kept.items()}


def shared_fields(config: EncoderConfig, labels: Sequence[str]) -> dict:
    """The fields of a config.json that say the same of dense and sliced models.

    Without `labels` the classes are called LABEL_0, ...

    Raises:
      UserError: where there are not as many labels as outputs.
    """
    names = labels or [f"LABEL_{row}" for row in range(config.num_labels)]
    if len(names) != config.num_labels and not config.pooling:
        legal = f"has {config.num_labels} classes, labels has {len(labels)}"
        raise reject("labels", tuple(labels), legal)
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.heads),
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
    }
    if config.pooling:  # There are no classes.
        return fields
    return fields | {
        "problem_type": PROBLEMS[config.problem].problem_type,
        "id2label": {str(row): name for row, name in enumerate(names)},
        "label2id": {name: row for row, name in enumerate(names)},
        **PROBLEMS[config.problem].hub_fields,
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
    where = "labels" if field == "model" else f"{field.removesuffix('.path')}.labels"
    named = class_names(fields, where) if labels and not label_order else []
    for fold in (str, str.lower):
        order, wanted = ([*map(fold, x)] for x in (label_order or named, labels))
        if len(set(order)) == len(order) and sorted(order) == sorted(wanted):
            return [order.index(name) for name in wanted]
    if label_order:
        legal = f"must be a permutation of {tuple(labels)}, in the order of the model"
        raise reject(where, tuple(label_order), legal)
    if labels and not _made_up(named) and len(named) == len(labels):
        raise UnsupportedCheckpoint(
            f"names its classes {', '.join(named[:5])}; give the task's own names, "
            f"{', '.join(labels[:5])}, in the order of the model: {where}"
        )
    return None if labels else []


def class_names(fields: dict, where: str) -> list[str]:
    """The names of the classes that a config.json gives, in the order of the logits.

    Messages say that the field `where` can give them instead.

    Where one of its two tables has the names LABEL_0, ..., as transformers writes them
    for classes that nobody has named, the other one counts. With no table there are
    none. Where both disagree, or none of them makes sense, it raises
    UnsupportedCheckpoint.
    """
    found = {name: _pairs(fields.get(name), name) for name in ("id2label", "label2id")}
    named = {
        table: pairs
        for table, pairs in found.items()
        if not _made_up(name for _, name in pairs)
    }
    real = [*filter(None, map(_in_order, named.values()))]
    if len(real) == 2 and real[0] != real[1]:
        raise UnsupportedCheckpoint("config.json: id2label and label2id disagree")
    if named and not real:
        table = next(iter(named))
        legal = (
            f"{table} is {reprlib.repr(fields[table])}, must number different names "
        )
        legal += f"from 0 on; or give them in the order of the model: {where}"
        raise UnsupportedCheckpoint(f"config.json: {legal}")
    return real[0] if real else _in_order(found["id2label"])


def _made_up(names):
    return all(str(name).startswith("LABEL_") for name in names)


def _pairs(table, field):
    """Pairs of a number and a name, as one of the two tables gives them."""
    if isinstance(table, list):
        return [*enumerate(table)]
    pairs = table.items() if isinstance(table, dict) else ()
    return [(row, name) for name, row in pairs] if field == "label2id" else [*pairs]


def _in_order(pairs):
    """The names in the order of their numbers; none where these make no sense."""
    try:
        # The numbers are keys in one table and values in the other one: text or not.
        rows = {int(str(row)): str(name) for row, name in pairs}
        names = [rows[row] for row in range(len(pairs))]
    except (KeyError, ValueError):
        return []
    return names if len(set(names)) == len(names) else []
