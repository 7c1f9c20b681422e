"""Folders of sentence-transformers: an encoder, and what makes vectors of its tokens.

    modules.json           the modules in their order, with their folders
    1_Pooling/config.json  how tokens become a vector: mean, cls or max
    2_Dense/               config.json and model.safetensors of a linear layer, if any
    3_Normalize/           nothing; where it is named, vectors are made 1 long

The encoder is in the folder itself, or in one that the first module names, as
transformers stores it. What is written can be read by any version of that library.
"""

import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import foreign, huggingface
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.config import Model
from cofi_jax.errors import reject, warn
from cofi_jax.models.config import POOLINGS, EncoderConfig

_MODULES = "modules.json"
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_PACKAGE = "sentence_transformers.models"  # where every version has these classes

# The fields of 1_Pooling/config.json by our names of what they turn on.
_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
}
_OTHER_POOLING = ("mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")

_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
}


class Head(NamedTuple):
    """What follows the encoder.

    Attributes:
      encoder: the folder of the encoder.
      fields: those of `EncoderConfig` that describe the head.
      params: the linear layer as `classifier`, or nothing.
    """

    encoder: Path
    fields: dict[str, Any]
    params: dict[str, Any]

    def vectors(self, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The vectors (B, C) of hidden states (B, T, D) and a mask (B, T) of tokens."""
        real = mask[..., None] > 0
        if self.fields["head"] == "mean":
            x = (states * real).sum(1) / np.maximum(real.sum(1), 1)
        elif self.fields["head"] == "max":
            x = np.where(real, states, -1e9).max(1)
        else:
            x = states[:, 0]
        if linear := self.params.get("classifier"):
            x = x @ linear["kernel"] + linear.get("bias", 0)
            functions = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}
            x = functions.get(self.fields["output_activation"], np.asarray)(x)
        if self.fields["normalize"]:
            x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return np.float32(x)


def is_folder(folder: Path) -> bool:
    """Whether a folder is one of sentence-transformers."""
    return (folder / _MODULES).is_file()


def load(
    folder: Path, *, field: str, problem: str, model: Model
) -> tuple[EncoderConfig, dict, Path]:
    """A dense model that makes vectors.

    Args:
      folder: the folder.
      field: the config field that named it, for messages.
      problem: the key of `data.problems.PROBLEMS`.
      model: `dropout` and `dtype` are taken from here.

    Returns:
      The sizes, float32 parameters, and the folder of the encoder and its tokenizer.

    Raises:
      UserError: for modules or a pooling that are not known, and for an encoder that
        `huggingface.load_encoder` refuses.
    """
    try:
        head = read(folder)
        config, params = huggingface.load_encoder(
            head.encoder,
            field=field,
            num_labels=0,
            problem=problem,
            model=model,
            key=jax.random.key(0),  # There is nothing to draw.
        )
        config = _joined(config, head)
    except UnsupportedCheckpoint as error:
        raise reject(field, str(folder), str(error)) from error
    return config, params | head.params, head.encoder


def read(folder: Path) -> Head:
    """Reads what follows the encoder.

    Raises:
      UnsupportedCheckpoint: for modules or a pooling that are not known.
    """
    modules = _modules(folder)
    encoder = modules["Transformer"]
    bert = encoder / "sentence_bert_config.json"
    if bert.is_file() and foreign.read_json(bert).get("do_lower_case"):
        warn(f"{bert}: do_lower_case is not read; the tokenizer alone decides")
    how = folder / "config_sentence_transformers.json"
    if how.is_file():
        _warn_of_use(how)
    fields: dict[str, Any] = {"head": _pooling(modules["Pooling"])}
    fields["normalize"] = "Normalize" in modules
    if "Dense" not in modules:
        return Head(encoder, fields, {})
    about = _config(modules["Dense"])
    said = about.get("activation_function", _ACTIVATIONS["tanh"])
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if said not in known:
        legal = f"must be one of {', '.join(known)}"
        raise UnsupportedCheckpoint(f"activation_function is {said!r}, {legal}")
    for name, legal in (
        ("module_input_name", "sentence_embedding"),
        ("module_output_name", "sentence_embedding"),
        ("use_residual", False),
    ):
        if (value := about.get(name, legal)) not in (legal, None):
            said = f"{name} is {reprlib.repr(value)}, must be {legal!r} or absent"
            raise UnsupportedCheckpoint(f"{modules['Dense'].name}/config.json: {said}")
    linear = _linear(modules["Dense"])
    fields |= {
        "output_activation": known[said],
        "output_bias": "bias" in linear,
        "num_labels": linear["kernel"].shape[1],
    }
    return Head(encoder, fields, {"classifier": linear})


def _modules(folder: Path) -> dict[str, Path]:
    """The folders of the modules by the names of their classes, in their order."""
    path = folder / _MODULES
    if not foreign.is_there(path):
        legal = f"has no {_MODULES}; must be a folder of sentence-transformers, with "
        raise UnsupportedCheckpoint(f"{legal}1_Pooling")
    try:
        listed = json.loads(foreign.read_text(path), object_pairs_hook=files.unique)
        pairs = [(str(each["type"]), str(each["path"])) for each in listed]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        legal = f"{_MODULES} cannot be read ({foreign.reason(error)})"
        raise UnsupportedCheckpoint(legal) from error
    names = [kind.rpartition(".")[2] for kind, _ in pairs]
    wanted = [name for name in _ORDER if name in names]
    foreigners = [kind for kind, _ in pairs if not kind.startswith("sentence_transf")]
    if names != wanted or names[:2] != [*_ORDER[:2]] or foreigners:
        legal = f"must be {' and '.join(_ORDER[:2])}, then perhaps "
        legal += " and ".join(_ORDER[2:])
        said = ", ".join(kind for kind, _ in pairs[:6])
        raise UnsupportedCheckpoint(f"{_MODULES} lists {said or 'nothing'}; {legal}")
    found = {name: folder / path for name, (_, path) in zip(names, pairs, strict=True)}
    for name, path in found.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            legal = f"{_MODULES} has {name} in {path}, outside of the folder"
            raise UnsupportedCheckpoint(legal)
    return found


def _warn_of_use(path: Path) -> None:
    """Says what a folder's users do with texts and vectors that is not done here."""
    about = foreign.read_json(path)
    prompts = about.get("prompts") or {}
    if isinstance(prompts, dict) and (named := [k for k, v in prompts.items() if v]):
        warn(
            f"{path}: its prompts, {', '.join(map(ascii, named[:5]))}, are neither put "
            "in front of texts nor kept; texts that need one must begin with it"
        )
    if (said := about.get("similarity_fn_name") or "cosine") != "cosine":
        legal = "similarities are cosines here, and in what is exported"
        warn(f"{path}: similarity_fn_name is {reprlib.repr(said)}; {legal}")


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a module."""
    try:
        return foreign.read_json(folder / "config.json")
    except UnsupportedCheckpoint as error:
        raise UnsupportedCheckpoint(f"{folder.name}/{error}") from error


def _pooling(folder: Path) -> str:
    about = _config(folder)
    said = about.get("pooling_mode")
    if said is None:  # before version 5.3
        fields = _POOLING | {name: f"pooling_mode_{name}" for name in _OTHER_POOLING}
        said = [name for name, field in fields.items() if about.get(field)]
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or len(said) != 1 or said[0] not in POOLINGS:
        legal = f"pooling is {reprlib.repr(said)}, must be one of {', '.join(POOLINGS)}"
        raise UnsupportedCheckpoint(f"{folder.name}/config.json: {legal}")
    return said[0]


def _linear(folder: Path) -> dict[str, np.ndarray]:
    shapes, get = huggingface.open_tensors(folder)
    found = {}
    for name, ours in (("linear.weight", "kernel"), ("linear.bias", "bias")):
        if name not in shapes:
            continue
        array = np.asarray(get(name), np.float32)
        if not np.isfinite(array).all():
            legal = "holds values that are infinite or nan, must be finite"
            raise UnsupportedCheckpoint(f"{folder.name}: {name} {legal}")
        found[ours] = np.ascontiguousarray(array.T)
    kernel, bias = found.get("kernel"), found.get("bias")
    if kernel is None or kernel.ndim != 2 or 0 in kernel.shape:
        legal = "must hold a matrix linear.weight"
        raise UnsupportedCheckpoint(f"{folder.name}: {legal}")
    if bias is not None and bias.shape != kernel.shape[1:]:
        legal = f"linear.bias has shape {bias.shape}, must be {kernel.shape[1:]}"
        raise UnsupportedCheckpoint(f"{folder.name}: {legal}")
    return found


def _joined(config: EncoderConfig, head: Head) -> EncoderConfig:
    """The sizes of the encoder with those of the head."""
    width = config.hidden_size
    if head.params and (rows := len(head.params["classifier"]["kernel"])) != width:
        legal = f"its linear layer reads {rows} dimensions, the encoder has {width}"
        raise UnsupportedCheckpoint(legal)
    return dataclasses.replace(config, **{"num_labels": width} | head.fields)


def write(folder: Path, params: dict, config: EncoderConfig) -> None:
    """Writes what follows the encoder, whose files are in the folder itself.

    A linear layer that changes nothing is left out. Texts are cut where the tokenizer
    says.

    Args:
      folder: the folder of the encoder.
      params: the parameters, of which the linear layer is written.
      config: the sizes.
    """
    kinds, width = [("Transformer", ""), ("Pooling", "1_Pooling")], config.hidden_size
    modes = {name: False for name in _POOLING.values()}
    modes |= {f"pooling_mode_{name}": False for name in _OTHER_POOLING}
    modes[_POOLING[config.pooling]] = True
    sizes = {"word_embedding_dimension": width}
    _write(folder / "1_Pooling", sizes | modes | {"include_prompt": True})
    if config.output_activation and not _is_identity(params, config):
        linear = {k: np.asarray(v, np.float32) for k, v in params["classifier"].items()}
        kinds.append(("Dense", "2_Dense"))
        about = {
            "in_features": width,
            "out_features": config.num_labels,
            "bias": "bias" in linear,
            "activation_function": _ACTIVATIONS[config.output_activation],
        }
        tensors = {"linear.weight": linear["kernel"].T}
        if "bias" in linear:
            tensors["linear.bias"] = linear["bias"]
        (folder / "2_Dense").mkdir()
        huggingface.write_tensors(folder / "2_Dense", tensors, about)
    if config.normalize:
        kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_PACKAGE}.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / _MODULES).write_text(json.dumps(modules, indent=2) + "\n")
    cut = {"max_seq_length": None, "do_lower_case": False}
    files.write_json(folder / "sentence_bert_config.json", cut)
    prompts = {"prompts": {}, "default_prompt_name": None}
    about = prompts | {"similarity_fn_name": "cosine"}
    files.write_json(folder / "config_sentence_transformers.json", about)


def _is_identity(params, config):
    linear = {k: np.asarray(v) for k, v in params["classifier"].items()}
    same = np.array_equal(linear["kernel"], np.eye(config.hidden_size))
    same &= config.output_activation == "identity"
    return same and not linear.get("bias", np.zeros(1)).any()


def _write(folder, about):
    folder.mkdir()
    files.write_json(folder / "config.json", about)
