"""Our parameters by the names that PyTorch's BERT and RoBERTa give them.

One table serves both directions. A PyTorch linear layer holds (out, in) and is
transposed; query, key and value kernels are (D, H, d) here and the attention output
kernel is (H, d, D), there they are (H * d, D) and (D, H * d). Embeddings and
LayerNorms are the same on both sides.

Names start with a prefix, "bert." as a rule; what is read without loading it, the
tensors' shapes, is a dict of tuples by those names.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np

from cofi_jax.checkpoints.hf_config import FAMILIES, UnsupportedCheckpoint, to_fields
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig

Shapes = dict[str, tuple[int, ...]]


_WORDS = "embeddings.word_embeddings"


_EMBEDDINGS = {
    "embeddings.word": _WORDS,
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}


_ATTENTION = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
}


_FFN = {"ffn.up": "intermediate.dense", "ffn.down": "output.dense"}


_NORMS = {
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
}


_LEAVES = ("weight", "bias")


_OLD_NAMES = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}


def modern(name: str) -> str:
    """The name of today for a LayerNorm's parameter in old folders, or `name`.

    bert-base-uncased itself is such a folder.
    """
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def find_prefix(names: Iterable[str]) -> str:
    """What stands before the name of the word embeddings.

    Raises:
      UnsupportedCheckpoint: where there are none.
    """
    words = f"{_WORDS}.weight"
    found = [name.removesuffix(words) for name in names if name.endswith(words)]
    if not found:
        raise UnsupportedCheckpoint(f"lacks {words}")
    return min(found, key=len)


def head_modules(config: EncoderConfig, prefix: str) -> dict[str, str]:
    """PyTorch's names for the modules of our head, in their order."""
    if config.reads_every_token:
        return {"classifier": PROBLEMS[config.problem].classifier}
    if config.model_type == "bert":
        return {"pooler": f"{prefix}pooler.dense", "classifier": "classifier"}
    return {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}


def to_torch(params: dict, config: EncoderConfig, prefix: str) -> dict[str, jax.Array]:
    """`params` (NumPy's or JAX's) in PyTorch's shapes, by PyTorch's names."""
    modules = _modules(config, prefix)
    tensors = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            inputs = array.shape[:-1] if _joins_heads(path) else array.shape[:1]
            array = array.reshape(math.prod(inputs), -1).T
        elif path[-1].key == "bias":
            array = array.reshape(-1)
        tensors[_name(path, modules)] = array
    return tensors


def from_torch(
    get: Callable[[str], np.ndarray],
    config: EncoderConfig,
    prefix: str,
    without: Collection[str] = (),
) -> dict:
    """The inverse of `to_torch`: new float32 arrays in our shapes.

    Args:
      get: from a name to its tensor, of a shape that `complaints` found right.
      config: the sizes.
      prefix: of the names.
      without: modules of the head to leave out.

    Raises:
      UnsupportedCheckpoint: for integers, as quantised models have them.
    """
    modules = _modules(config, prefix)

    def leaf(path, like):
        name = _name(path, modules)
        array = get(name)
        if not jax.numpy.issubdtype(array.dtype, np.floating):
            raise UnsupportedCheckpoint(
                f"{name} holds {array.dtype}, must be floating point"
            )
        array = array.T if path[-1].key == "kernel" else array
        return np.array(array.reshape(like.shape), np.float32, order="C")

    wanted = {k: v for k, v in abstract_params(config).items() if k not in without}
    return jax.tree_util.tree_map_with_path(leaf, wanted)


def bert_form(params: dict, config: EncoderConfig) -> tuple[dict, EncoderConfig]:
    """The same model with the sizes of a BERT, whatever its family.

    RoBERTa differs in the rows of its position table, which are cut off here where no
    token has them, and in the names of its head. It numbers real tokens alone, so for
    padding on the right only.
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
    try:
        fields = to_fields(config, labels)
    except UnsupportedCheckpoint as error:
        raise reject("config", config.widths(), str(error)) from error
    if jax.tree.map(np.shape, params) != jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(config)
    ):
        legal = "must have the structure and shapes that config initialises"
        raise reject("params", "...", legal)
    _, prefix = FAMILIES[config.model_type]
    params = jax.tree.map(np.asarray, params)
    tensors = to_torch(params, config, prefix)
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}, fields


def infer_encoder(shapes: Shapes, dense: EncoderConfig, prefix: str) -> EncoderConfig:
    """`dense` with the widths that the tensors have; the head's stay.

    A block is absent where none of its linear layers is there. At least one tensor
    of every layer must be: a slicer leaves an absent block's LayerNorm behind.

    Raises:
      UnsupportedCheckpoint: where the tensors do not show the widths.
    """

    def rows(layer, block):  # 0 where the block is absent
        modules = [f"{layer}{module}" for module in block.values()]
        present = any(f"{m}.{leaf}" in shapes for m in modules for leaf in _LEAVES)
        return _matrix(shapes, f"{modules[0]}.weight")[0] if present else 0

    heads, intermediate = [], []
    for i in range(len(dense.heads)):
        layer = f"{prefix}encoder.layer.{i}."
        if not any(name.startswith(layer) for name in shapes):
            raise UnsupportedCheckpoint(
                f"lacks {layer}*, config.json has {len(dense.heads)} layers"
            )
        width = rows(layer, _ATTENTION)
        if width % dense.head_size:
            raise UnsupportedCheckpoint(
                f"{layer}attention.self.query.weight has {width} rows, must be whole "
                f"heads of {dense.head_size}"
            )
        heads.append(width // dense.head_size)
        intermediate.append(rows(layer, _FFN))
    return dataclasses.replace(
        dense,
        hidden_size=_matrix(shapes, f"{prefix}{_WORDS}.weight")[1],
        heads=tuple(heads),
        intermediate=tuple(intermediate),
    )


def infer_head(shapes: Shapes, config: EncoderConfig, prefix: str) -> EncoderConfig:
    """`config` with the widths of the head's tensors.

    Raises:
      UnsupportedCheckpoint: where the head is missing.
    """
    names = {k: f"{v}.weight" for k, v in head_modules(config, prefix).items()}
    for name in reversed(names.values()):
        if name not in shapes:
            raise UnsupportedCheckpoint(
                f"has no {name}; give a model fine-tuned for {config.problem}"
            )
    return dataclasses.replace(
        config,
        pooler_size=_matrix(shapes, names["pooler"])[0] if "pooler" in names else 0,
        num_labels=_matrix(shapes, names["classifier"])[0],
    )


def complaints(shapes: Shapes, config: EncoderConfig, prefix: str) -> dict[str, str]:
    """Tensors that are missing, misshapen or unknown, and what to say of each."""
    wanted = jax.eval_shape(
        functools.partial(to_torch, config=config, prefix=prefix),
        abstract_params(config),
    )
    found = {}
    for name, like in wanted.items():
        if name not in shapes:
            found[name] = f"lacks {name}"
        elif shapes[name] != like.shape:
            found[name] = f"{name} has shape {shapes[name]}, must be {like.shape}"
    # Of pretraining, of distillation, and a pooler that nothing reads.
    unused = ["cls.", "lm_head.", f"{prefix}pooler."]
    unused += ["layer_transformation.", f"{prefix}layer_transformation."]
    for i, widths in enumerate(zip(config.heads, config.intermediate, strict=True)):
        for width, norm in zip(widths, _NORMS.values(), strict=True):
            if not width:
                unused.append(f"{prefix}encoder.layer.{i}.{norm}.")
    for name in shapes:
        used = not name.startswith(tuple(unused)) and not name.endswith("position_ids")
        if name not in wanted and used:
            found[name] = f"has an unknown tensor {name}"
    return found


def _modules(config, prefix):
    """PyTorch's names for our modules and tables, by the paths of ours."""
    modules = {ours: f"{prefix}{theirs}" for ours, theirs in _EMBEDDINGS.items()}
    for i in range(len(config.heads)):
        for ours, theirs in (_ATTENTION | _FFN | _NORMS).items():
            modules[f"layer_{i}.{ours}"] = f"{prefix}encoder.layer.{i}.{theirs}"
    return modules | head_modules(config, prefix)


def _name(path, modules):
    keys = [entry.key for entry in path]
    table = modules.get(".".join(keys))
    leaf = "bias" if keys[-1] == "bias" else "weight"
    return f"{table or modules['.'.join(keys[:-1])]}.{leaf}"


def _joins_heads(path):
    return path[-2].key == "output"


def _matrix(shapes, name):
    if name not in shapes:
        raise UnsupportedCheckpoint(f"lacks {name}")
    if len(shapes[name]) != 2 or 0 in shapes[name]:
        raise UnsupportedCheckpoint(
            f"{name} has shape {shapes[name]}, must be a matrix"
        )
    return shapes[name]
