"""Our parameters by the names that PyTorch's BERT, RoBERTa and DistilBERT give them.

One table for each architecture serves both directions. A PyTorch linear layer holds
(out, in) and is transposed; query, key and value kernels are (D, H, d) here and the
attention output kernel is (H, d, D), there they are (H * d, D) and (D, H * d).
Embeddings and LayerNorms are the same on both sides. DistilBERT has no table of token
types: here its only type has zeros, and there the words have what is added to all.

Names start with the family's prefix; what is read without loading it, the tensors'
shapes, is a dict of tuples by those names.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.checkpoints.hf_config import FAMILIES, to_fields
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import blocks

Shapes = dict[str, tuple[int, ...]]

# PyTorch's modules and tables by ours; {p} is the prefix and {i} the number of a layer.
_BERT = {
    "embeddings.word": "{p}embeddings.word_embeddings",
    "embeddings.position": "{p}embeddings.position_embeddings",
    "embeddings.type": "{p}embeddings.token_type_embeddings",
    "embeddings.norm": "{p}embeddings.LayerNorm",
    "layer_{i}": "{p}encoder.layer.{i}",
    "layer_{i}.attention.query": "{p}encoder.layer.{i}.attention.self.query",
    "layer_{i}.attention.key": "{p}encoder.layer.{i}.attention.self.key",
    "layer_{i}.attention.value": "{p}encoder.layer.{i}.attention.self.value",
    "layer_{i}.attention.output": "{p}encoder.layer.{i}.attention.output.dense",
    "layer_{i}.attention_norm": "{p}encoder.layer.{i}.attention.output.LayerNorm",
    "layer_{i}.ffn.up": "{p}encoder.layer.{i}.intermediate.dense",
    "layer_{i}.ffn.down": "{p}encoder.layer.{i}.output.dense",
    "layer_{i}.ffn_norm": "{p}encoder.layer.{i}.output.LayerNorm",
    "pooler": "{p}pooler.dense",
    "classifier": "classifier",
}
_ROBERTA = _BERT | {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
_DISTILBERT = {
    "embeddings.word": "{p}embeddings.word_embeddings",
    "embeddings.position": "{p}embeddings.position_embeddings",
    "embeddings.norm": "{p}embeddings.LayerNorm",
    "layer_{i}": "{p}transformer.layer.{i}",
    "layer_{i}.attention.query": "{p}transformer.layer.{i}.attention.q_lin",
    "layer_{i}.attention.key": "{p}transformer.layer.{i}.attention.k_lin",
    "layer_{i}.attention.value": "{p}transformer.layer.{i}.attention.v_lin",
    "layer_{i}.attention.output": "{p}transformer.layer.{i}.attention.out_lin",
    "layer_{i}.attention_norm": "{p}transformer.layer.{i}.sa_layer_norm",
    "layer_{i}.ffn.up": "{p}transformer.layer.{i}.ffn.lin1",
    "layer_{i}.ffn.down": "{p}transformer.layer.{i}.ffn.lin2",
    "layer_{i}.ffn_norm": "{p}transformer.layer.{i}.output_layer_norm",
    "pooler": "pre_classifier",
    "classifier": "classifier",
}
_NAMES = dict.fromkeys(FAMILIES, _ROBERTA)
_NAMES |= {"bert": _BERT, "distilbert": _DISTILBERT}

# What pretraining and distillation leave behind, and a pooler that nothing reads.
_UNUSED = ("cls.", "lm_head.", "layer_transformation.", "fit_dense.", "fit_denses.")
_UNUSED += ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
_UNUSED_INSIDE = ("pooler.", "layer_transformation.")  # behind the prefix

# Tensors of these names are never a BERT's.
_OTHERS = ("roberta.", "lm_head.", "classifier.dense.", "classifier.out_proj.")
_OTHERS += ("distilbert.", "vocab_transform.", "pre_classifier.")

_TYPES = "embeddings.type"

# What a model that is a part of others has in front of the names of its tensors.
_WRAPPERS = re.compile(r"^(module\.|model\.|_orig_mod\.)*")

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def module_names(config: EncoderConfig) -> dict[str, str]:
    """PyTorch's names for our modules and tables, by the paths of ours."""
    names, (_, prefix) = dict(_NAMES[config.model_type]), FAMILIES[config.model_type]
    if not config.has_pooler:
        del names["pooler"]
        names["classifier"] = PROBLEMS[config.problem].classifier
    if config.pooling:  # Its linear layer is in a folder of its own.
        del names["classifier"]
    return {
        ours.format(i=i): theirs.format(p=prefix, i=i)
        for ours, theirs in names.items()
        for i in range(len(config.heads) if "{i}" in ours else 1)
    }


def _beside(config):
    """The modules that do not stand among the tensors of the encoder."""
    return ("classifier",) if config.pooling else ()


def head_names(config: EncoderConfig) -> dict[str, str]:
    """The part of `module_names` that the head has, in its order."""
    names = module_names(config)
    return {ours: names[ours] for ours in ("pooler", "classifier") if ours in names}


def encoder_parts(config: EncoderConfig) -> tuple[str, ...]:
    """What the names of the encoder's tensors, not of the head's, start with."""
    heads, (_, prefix) = head_names(config), FAMILIES[config.model_type]
    names = [x for ours, x in module_names(config).items() if ours not in heads]
    tops = {name.removeprefix(prefix).partition(".")[0] for name in names}
    return tuple(f"{prefix}{top}." for top in sorted(tops))


def stored_names(names: Collection[str], config: EncoderConfig) -> dict[str, str]:
    """The names that a folder has, by those that PyTorch would write today.

    An encoder that was saved alone has no prefix, and bert-base-uncased itself has the
    parameters of its LayerNorms under old names. PyTorch's wrappers, for several
    devices or of `torch.compile`, have theirs in front of every name, also the head's.

    Raises:
      UnsupportedCheckpoint: where there are no word embeddings, and where a tensor is
        there twice, under two names.
    """
    _, prefix = FAMILIES[config.model_type]
    words = module_names(config)["embeddings.word"].removeprefix(prefix) + ".weight"
    prefixes = [name.removesuffix(words) for name in names if name.endswith(words)]
    if not prefixes:
        raise UnsupportedCheckpoint(f"lacks {words}")
    stored, old = {}, min(prefixes, key=len)
    # Anything else in front of an encoder is another name of the family's own.
    outer = old.removesuffix(prefix)
    outer = outer if _WRAPPERS.fullmatch(outer) else ""
    parts = [part.removeprefix(prefix) for part in encoder_parts(config)]
    inside = tuple(old + part for part in (*parts, *_UNUSED_INSIDE))
    for name in names:
        new = name.removeprefix(outer)
        if name.startswith(inside):
            new = prefix + name.removeprefix(old)
        for was, now in _OLD_NAMES.items():
            new = new.replace(was, now)
        if new in stored:  # Two models in one file would be mixed.
            raise UnsupportedCheckpoint(f"holds both {stored[new]} and {name}")
        stored[new] = name
    return stored


def check_bert(names: Collection[str], config: EncoderConfig) -> None:
    """Raises UnsupportedCheckpoint unless tensors can be a BERT's by their names.

    A RoBERTa's encoder has tensors of the same shapes, but numbers its positions in
    another way, and has one token type alone.
    """
    names = [_WRAPPERS.sub("", name, count=1) for name in names]
    other = [name for name in names if name.startswith(_OTHERS)]
    if other or config.type_vocab_size < 2:
        found = other[0] if other else f"type_vocab_size={config.type_vocab_size}"
        legal = f"lacks 'model_type', and {found} is not a BERT's"
        raise UnsupportedCheckpoint(f"config.json {legal}")


def to_torch(params: dict, config: EncoderConfig) -> dict[str, jax.Array]:
    """`params` (NumPy's or JAX's) in PyTorch's shapes, by PyTorch's names."""
    names, tensors = module_names(config), {}
    params = {k: v for k, v in params.items() if k not in _beside(config)}
    if _TYPES not in names:
        tables = params["embeddings"]
        words = tables["word"] + tables["type"][0]
        rest = {name: table for name, table in tables.items() if name != "type"}
        params = params | {"embeddings": rest | {"word": words}}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            joins_heads = path[-2].key == "output"
            inputs = array.shape[:-1] if joins_heads else array.shape[:1]
            array = array.reshape(math.prod(inputs), -1).T
        elif path[-1].key == "bias":
            array = array.reshape(-1)
        tensors[_name(path, names)] = array
    return tensors


def from_torch(
    get: Callable[[str], np.ndarray],
    config: EncoderConfig,
    without: Collection[str] = (),
) -> dict:
    """The inverse of `to_torch`: new float32 arrays in our shapes.

    Args:
      get: from a name to its tensor, of a shape that `complaints` found right.
      config: the sizes.
      without: modules of the head to leave out.

    Raises:
      UnsupportedCheckpoint: for integers, as quantised models have them, and for
        values that are not finite.
    """
    names = module_names(config)

    def leaf(path, like):
        if _TYPES not in names and path[-1].key == "type":
            return np.zeros(like.shape, np.float32)
        name = _name(path, names)
        array = get(name)
        if not jax.numpy.issubdtype(array.dtype, np.floating):
            reason = f"{name} holds {array.dtype}, must be floating point"
            raise UnsupportedCheckpoint(reason)
        array = array.T if path[-1].key == "kernel" else array
        with np.errstate(over="ignore"):  # It is said below.
            found = np.array(array.reshape(like.shape), np.float32, order="C")
        if not np.isfinite(found).all():
            reason = f"{name} holds values that are infinite or nan, must be finite"
            raise UnsupportedCheckpoint(reason)
        return found

    without = {*without, *_beside(config)}
    wanted = {k: v for k, v in abstract_params(config).items() if k not in without}
    return jax.tree_util.tree_map_with_path(leaf, wanted)


def bert_form(params: dict, config: EncoderConfig) -> tuple[dict, EncoderConfig]:
    """The same model with the sizes of a BERT, whatever its family.

    RoBERTa differs in the rows of its position table, which are cut off here where no
    token has them, and in the names of its head. It numbers real tokens alone, so for
    padding on the right only. DistilBERT differs in the activation function of its
    pooler, which stays.
    """
    table = params["embeddings"]["position"][config.position_offset :]
    embeddings = params["embeddings"] | {"position": table}
    config = dataclasses.replace(
        config, model_type="bert", position_offset=0, max_positions=len(table)
    )
    return params | {"embeddings": embeddings}, config


def to_hugging_face(
    params: dict, config: EncoderConfig, labels: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict]:
    """A dense model as transformers stores it: tensors by name, and config.json.

    Args:
      params: the parameters.
      config: their sizes.
      labels: names of the classes.

    Raises:
      UserError: for what transformers cannot hold, a sliced model above all.
    """
    fields = to_fields(config, labels)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    if jax.tree.map(np.shape, params) != shapes:
        legal = "must have the structure and shapes that config initialises"
        raise reject("params", "...", legal)
    tensors = to_torch(jax.tree.map(np.asarray, params), config)
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}, fields


def infer_encoder(shapes: Shapes, dense: EncoderConfig) -> EncoderConfig:
    """`dense` with the widths that the tensors have; the head's stay.

    A block is absent where none of its linear layers is there. At least one tensor
    of every layer must be: a slicer leaves an absent block's LayerNorm behind.

    Raises:
      UnsupportedCheckpoint: where the tensors do not show the widths.
    """
    names = module_names(dense)

    def units(layer, block):  # 0 where the block is absent
        if not any(name.startswith(f"{names[layer]}.") for name in shapes):
            reason = f"config.json has {len(dense.heads)} layers"
            raise UnsupportedCheckpoint(f"lacks {names[layer]}.*, {reason}")
        parts = [names[f"{layer}.{block.name}.{name}"] for name in block.modules]
        leaves = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
        if leaves.isdisjoint(shapes):
            return 0
        rows, size = _matrix(shapes, parts[0])[0], 1
        if block.unit == "H" and rows % (size := dense.head_size):
            legal = f"has {rows} rows, must be whole heads of {size}"
            raise UnsupportedCheckpoint(f"{parts[0]}.weight {legal}")
        return rows // size

    layers = [f"layer_{i}" for i in range(len(dense.heads))]
    widths = {b.widths: tuple(units(x, b) for x in layers) for b in blocks(dense)}
    hidden = _matrix(shapes, names["embeddings.word"])[1]
    return dataclasses.replace(dense, hidden_size=hidden, **widths)


def infer_head(shapes: Shapes, config: EncoderConfig) -> EncoderConfig:
    """`config` with the widths of the head's tensors.

    Raises:
      UnsupportedCheckpoint: where the head is missing.
    """
    names = head_names(config)
    for name in reversed(names.values()):
        if f"{name}.weight" not in shapes:
            legal = f"give a model fine-tuned for {config.problem}"
            raise UnsupportedCheckpoint(f"has no {name}.weight; {legal}")
    rows = {ours: _matrix(shapes, theirs)[0] for ours, theirs in names.items()}
    return dataclasses.replace(
        config, pooler_size=rows.get("pooler", 0), num_labels=rows["classifier"]
    )


def complaints(shapes: Shapes, config: EncoderConfig) -> dict[str, str]:
    """Tensors that are missing, misshapen or unknown, and what to say of each."""
    found, names = {}, module_names(config)
    wanted = jax.eval_shape(lambda x: to_torch(x, config), abstract_params(config))
    for name, like in wanted.items():
        if name not in shapes:
            found[name] = f"lacks {name}"
        elif shapes[name] != like.shape:
            found[name] = f"{name} has shape {shapes[name]}, must be {like.shape}"
    absent = [
        f"{names[f'layer_{i}.{block.norm}']}."
        for block in blocks(config)
        for i, width in enumerate(block.sizes(config))
        if not width
    ]
    _, prefix = FAMILIES[config.model_type]
    unused = (*_UNUSED, *(prefix + name for name in _UNUSED_INSIDE), *absent)
    for name in shapes:
        used = not name.startswith(unused) and not name.endswith("position_ids")
        if used and name not in wanted:
            found[name] = f"has an unknown tensor {name}"
    return found


def _name(path, names):
    keys = [entry.key for entry in path]
    table = names.get(".".join(keys))
    leaf = "bias" if keys[-1] == "bias" else "weight"
    return f"{table or names['.'.join(keys[:-1])]}.{leaf}"


def _matrix(shapes, module):
    name = f"{module}.weight"
    if name not in shapes:
        raise UnsupportedCheckpoint(f"lacks {name}")
    if len(shapes[name]) != 2 or 0 in shapes[name]:
        reason = f"{name} has shape {shapes[name]}, must be a matrix"
        raise UnsupportedCheckpoint(reason)
    return shapes[name]
