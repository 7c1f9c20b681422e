"""Hugging Face BERT folders to our parameters.

A PyTorch linear layer holds (out, in) and is transposed; query, key and value
kernels are (D, H, d) here and the attention output kernel is (H, d, D).
"""

import json
from pathlib import Path

import jax
import numpy as np

from cofi_jax.config import Model, reject
from cofi_jax.model import EncoderConfig, init_params

_WEIGHTS = "model.safetensors"
_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_FILES = ("config.json", _WEIGHTS, "*token*", "vocab*", "merges.txt", "special*")


def resolve(path: str, field: str) -> Path:
    """A local folder for `path`: itself, or a snapshot of that name on the hub.

    Raises:
      UserError: when it is neither, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise reject(field, path, "no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    # The hub's client raises dozens of kinds, those of its HTTP library included.
    except Exception as error:
        raise reject(
            field,
            path,
            f"cannot be had from the Hugging Face hub ({type(error).__name__}); give "
            f"a local folder with config.json, {_WEIGHTS} and the tokenizer: "
            f"--config.{field}=path/to/folder",
        ) from error


def load_encoder(
    folder: Path, *, field: str, num_labels: int, model: Model, key: jax.Array
) -> tuple[EncoderConfig, dict]:
    """A pretrained encoder with a classifier for `num_labels` classes.

    The classifier, and the pooler where the folder has none, are initialised from
    `key` where the folder's do not fit.

    Args:
      folder: with `config.json` and `model.safetensors` of any float type.
      field: the config field that named the folder, for messages.
      num_labels: C.
      model: `dropout` and `dtype` are taken from here.
      key: for what has to be initialised.

    Returns:
      The sizes and float32 parameters.

    Raises:
      UserError: for an unsupported architecture, and for missing or misshapen weights.
    """
    config = read_config(folder, field, num_labels, model)
    weights = _read_weights(folder, field)
    head = {"classifier", "pooler"}
    if f"{_prefix(weights)}pooler.dense.weight" in weights:
        head.remove("pooler")
    if weights.get("classifier.weight", np.zeros(())).shape[:1] == (num_labels,):
        head.remove("classifier")
    loaded = _from_torch(weights, config, folder, field, skip=head)
    # The outer jit leaves out what is not asked for.
    fresh = jax.jit(lambda key: {n: init_params(config, key)[n] for n in head})(key)
    return config, loaded | fresh


def load_classifier(
    folder: Path, *, field: str, model: Model
) -> tuple[EncoderConfig, dict]:
    """A fine-tuned classifier, its number of classes as the folder has it.

    Raises:
      UserError: as `load_encoder`, and where the classifier is missing.
    """
    weights = _read_weights(folder, field)
    if "classifier.weight" not in weights:
        raise reject(field, str(folder), "has no classifier.weight; give a classifier")
    num_labels = weights["classifier.weight"].shape[0]
    config = read_config(folder, field, num_labels, model)
    return config, _from_torch(weights, config, folder, field, skip=set())


def read_config(
    folder: Path, field: str, num_labels: int, model: Model
) -> EncoderConfig:
    """The sizes in `config.json`.

    Raises:
      UserError: where the file is missing or broken, or the architecture is not BERT.
    """
    try:
        fields = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        reason = f"config.json cannot be read ({type(error).__name__})"
        raise reject(field, str(folder), reason) from error
    wanted = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }
    defaults = {k: v for k, v in wanted.items() if k != "model_type"}
    for name, legal in wanted.items():
        if fields.get(name, defaults.get(name)) != legal:
            raise reject(
                field,
                str(folder),
                f"unsupported architecture: {name} is {fields.get(name)!r}, must be "
                f"{legal!r}",
            )
    try:
        layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
        if heads < 1 or fields["hidden_size"] % heads:
            reason = f"num_attention_heads is {heads}, must divide hidden_size"
            raise reject(field, str(folder), reason)
        return EncoderConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            heads=(heads,) * layers,
            head_size=fields["hidden_size"] // heads,
            intermediate=(fields["intermediate_size"],) * layers,
            pooler_size=fields["hidden_size"],
            num_labels=num_labels,
            max_positions=fields["max_position_embeddings"],
            type_vocab_size=fields["type_vocab_size"],
            layer_norm_eps=fields.get("layer_norm_eps", 1e-12),
            dropout=model.dropout,
            dtype=model.dtype,
        )
    except KeyError as error:
        raise reject(field, str(folder), f"config.json lacks {error}") from error
    except TypeError as error:
        raise reject(field, str(folder), f"config.json: {error}") from error


def _read_weights(folder, field):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / _WEIGHTS).is_file():
        found = sorted(p.name for p in folder.iterdir())
        raise reject(field, str(folder), f"must hold {_WEIGHTS}; it holds {found}")
    try:
        weights = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise reject(
            field, str(folder), f"{_WEIGHTS} cannot be read ({error})"
        ) from error
    # As old folders, bert-base-uncased among them, call a LayerNorm's parameters.
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for was, name in old.items():
        weights = {key.replace(was, name): array for key, array in weights.items()}
    return weights


def _prefix(weights):
    return "bert." if any(name.startswith("bert.") for name in weights) else ""


def _from_torch(weights, config, folder, field, skip):
    """Our parameters, less the `skip`ped heads, from PyTorch's names."""
    base = _prefix(weights)
    d, dim = config.head_size, config.hidden_size

    def get(name, *shape):
        if name not in weights:
            raise reject(field, str(folder), f"{_WEIGHTS} lacks {name}")
        array = weights[name]
        if array.shape != shape:
            raise reject(
                field,
                str(folder),
                f"{name} has shape {array.shape}, config.json asks for {shape}",
            )
        return np.asarray(array, np.float32)

    def linear(name, rows, columns):
        return {
            "kernel": np.ascontiguousarray(get(f"{name}.weight", columns, rows).T),
            "bias": get(f"{name}.bias", columns),
        }

    def norm(name):
        return {"scale": get(f"{name}.weight", dim), "bias": get(f"{name}.bias", dim)}

    tables = f"{base}embeddings."
    params = {
        "embeddings": {
            "word": get(f"{tables}word_embeddings.weight", config.vocab_size, dim),
            "position": get(
                f"{tables}position_embeddings.weight", config.max_positions, dim
            ),
            "type": get(
                f"{tables}token_type_embeddings.weight", config.type_vocab_size, dim
            ),
            "norm": norm(f"{tables}LayerNorm"),
        }
    }
    for i, (heads, width) in enumerate(
        zip(config.heads, config.intermediate, strict=True)
    ):
        layer = f"{base}encoder.layer.{i}."
        attention = {}
        for name in ("query", "key", "value"):
            node = linear(f"{layer}attention.self.{name}", dim, heads * d)
            attention[name] = {
                "kernel": node["kernel"].reshape(dim, heads, d),
                "bias": node["bias"].reshape(heads, d),
            }
        output = linear(f"{layer}attention.output.dense", heads * d, dim)
        output["kernel"] = output["kernel"].reshape(heads, d, dim)
        params[f"layer_{i}"] = {
            "attention": attention | {"output": output},
            "attention_norm": norm(f"{layer}attention.output.LayerNorm"),
            "ffn": {
                "up": linear(f"{layer}intermediate.dense", dim, width),
                "down": linear(f"{layer}output.dense", width, dim),
            },
            "ffn_norm": norm(f"{layer}output.LayerNorm"),
        }
    if "pooler" not in skip:
        params["pooler"] = linear(f"{base}pooler.dense", dim, dim)
    if "classifier" not in skip:
        params["classifier"] = linear("classifier", dim, config.num_labels)
    return params


def load_tokenizer(folder: Path, field: str):
    """The folder's tokenizer.

    Raises:
      UserError: where there is none.
    """
    from transformers import AutoTokenizer

    # Without either file transformers makes one up that knows no word at all.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        legal = f"has no tokenizer; must hold {' or '.join(_VOCABULARIES)}"
        raise reject(field, str(folder), legal)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"its tokenizer cannot be read ({type(error).__name__})"
        raise reject(field, str(folder), reason) from error
