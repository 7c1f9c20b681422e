"""Hugging Face folders of encoders, dense and sliced, to our parameters.

Sliced are the checkpoints of the original CoFi: tensors have their pruned shapes,
absent blocks are missing, config.json has the dense sizes. Dense ones are written.
"""

import contextlib
import json
import reprlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import foreign, hf_config, hf_names, tokenizers
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.checkpoints.hf_config import class_rows, from_fields, unknown_fields
from cofi_jax.checkpoints.hf_names import to_hugging_face
from cofi_jax.config import Model
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject, warn
from cofi_jax.models.bert import init_params
from cofi_jax.models.config import EncoderConfig

_WEIGHTS = "model.safetensors"
_TORCH = "pytorch_model.bin"  # where there is no other

_INDEX = "model.safetensors.index.json"  # of a large model, in several files
_FLOATS = ("F16", "BF16", "F32", "F64")
_PARTS = "model-*-of-*.safetensors"

_PATTERNS = "config.json *token* vocab* special* merges.txt *piece* bpe.codes "
_PATTERNS += "modules.json sentence_bert* config_sentence* ?_*"


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
        for weights in ((_WEIGHTS,), (_INDEX, _PARTS), (_TORCH,)):
            found = snapshot_download(
                path, allow_patterns=[*weights, *_PATTERNS.split()]
            )
            if (Path(found) / weights[0]).exists():
                break
        return Path(found)
    # The hub's client raises dozens of kinds, those of its HTTP library included.
    except Exception as error:
        said = f"{type(error).__name__}: {foreign.reason(error)}"
        legal = f"cannot be had from the Hugging Face hub ({said}); "
        legal += f"give a local folder with config.json, {_WEIGHTS} and the tokenizer: "
        legal += f"--config.{field}=path/to/folder"
        raise reject(field, path, legal) from error


def load_encoder(
    folder: Path,
    *,
    field: str,
    num_labels: int,
    problem: str,
    model: Model,
    key: jax.Array,
) -> tuple[EncoderConfig, dict]:
    """A dense pretrained encoder with a head for `problem`.

    Modules of the head that are missing, or have other shapes than asked for, are
    initialised from `key`.

    Args:
      folder: with `config.json` and weights of any float type, in
        `model.safetensors` or else `pytorch_model.bin`.
      field: the config field that named the folder, for messages.
      num_labels: C; 1 for regression, 2 for span.
      problem: a key of `data.problems.PROBLEMS`.
      model: `dropout` and `dtype` are taken from here.
      key: for what has to be initialised.

    Returns:
      The sizes and float32 parameters.

    Raises:
      UserError: for another architecture, a sliced model, and missing, misshapen
        or unknown weights.
    """
    config = read_config(folder, field, num_labels, model, problem)
    with _misfits_rejected(field, folder):
        shapes, get = _open_weights(folder, config)
        found = hf_names.infer_encoder(shapes, config)
        if found != config:
            legal = "not config.json's: a pruned model; give a dense one"
            raise UnsupportedCheckpoint(f"has widths {found.widths()}, {legal}")
        wrong = hf_names.complaints(shapes, config)
        for name, complaint in wrong.items():
            if name.startswith(hf_names.encoder_parts(config)):
                raise UnsupportedCheckpoint(complaint)
        spoilt = {name.rpartition(".")[0] for name in wrong}
        heads = hf_names.head_names(config)
        fresh = {ours for ours, theirs in heads.items() if theirs in spoilt}
        loaded = hf_names.from_torch(get, config, without=fresh)
        _warn_of_unknown_fields(folder)
    # The outer jit leaves out what is not asked for.
    init = jax.jit(lambda key: {n: init_params(config, key)[n] for n in sorted(fresh)})
    return config, loaded | init(key)


def load_classifier(
    folder: Path,
    *,
    field: str,
    problem: str,
    labels: Sequence[str],
    label_order: Sequence[str] = (),
    model: Model,
) -> tuple[EncoderConfig, dict]:
    """A fine-tuned model with its head, dense or sliced, its widths from the tensors.

    Args:
      folder: as in `load_encoder`; config.json has the sizes of the dense model.
      field: the config field that named the folder, for messages.
      problem: a key of `data.problems.PROBLEMS`.
      labels: the task's classes in its order, the order of the logits that come
        back; () takes what the folder has, and is for regression and span.
      label_order: the same classes in the order of the folder's logits; () takes
        the names in config.json or, with a warning where it has none, the task's
        order.
      model: `dropout` and `dtype` are taken from here.

    Returns:
      The sizes and float32 parameters.

    Raises:
      UserError: for an unsupported architecture, missing, misshapen or unknown
        weights, and classes that are not the task's.
    """
    dense = read_config(folder, field, len(labels), model, problem)
    with _misfits_rejected(field, folder):
        fields = _read_json(folder)
        _check_problem(fields, problem)
        rows = class_rows(fields, labels, label_order, field)
        shapes, get = _open_weights(folder, dense)
        config = hf_names.infer_encoder(shapes, dense)
        config = hf_names.infer_head(shapes, config)
        wanted = PROBLEMS[problem].num_outputs(labels)
        if wanted and config.num_labels != wanted:
            legal = f"the task has {wanted}"
            raise UnsupportedCheckpoint(f"has {config.num_labels} classes, {legal}")
        if wrong := hf_names.complaints(shapes, config):
            raise UnsupportedCheckpoint(next(iter(wrong.values())))
        params = hf_names.from_torch(get, config)
        _warn_of_unknown_fields(folder)
    if rows is None:
        warn(f"{folder} does not name its classes; taken as {', '.join(labels)}")
    if rows:
        head = params["classifier"]
        params["classifier"] = {name: leaf[..., rows] for name, leaf in head.items()}
    return config, params


def read_config(
    folder: Path,
    field: str,
    num_labels: int,
    model: Model,
    problem: str = "classification",
) -> EncoderConfig:
    """The sizes in `config.json`.

    Raises:
      UserError: where the file is missing or broken, or the architecture is another.
    """
    with _misfits_rejected(field, folder):
        return from_fields(_read_json(folder), num_labels, model, problem)


def class_names(folder: Path, field: str) -> tuple[str, ...]:
    """The names of the classes in `config.json`, in the order of the model.

    Raises:
      UserError: where it has none, or they make no sense.
    """
    where = f"{field.removesuffix('.path')}.labels"
    with _misfits_rejected(field, folder):
        if names := hf_config.class_names(_read_json(folder), where):
            return tuple(names)
        legal = f"does not name its classes; give them in its order: {where}"
        raise UnsupportedCheckpoint(f"config.json {legal}")


def _warn_of_unknown_fields(folder):
    if unknown := unknown_fields(_read_json(folder)):
        some = f"{', '.join(map(ascii, unknown[:5]))}{', ...' * (len(unknown) > 5)}"
        warning = f"config.json has fields that are not known: {some}"
        warn(f"{folder}: {warning}; they are not read")


def _check_problem(fields, problem):
    """Refuses a head whose outputs are of another kind, whatever their number."""
    given, wanted = fields.get("problem_type"), PROBLEMS[problem].problem_type
    if given and wanted and given != wanted:
        legal = f"must be {wanted!r} or absent for a task of {problem}"
        raise UnsupportedCheckpoint(f"problem_type is {reprlib.repr(given)}, {legal}")


def _read_json(folder):
    path = folder / "config.json"
    if not foreign.is_there(path):
        raise UnsupportedCheckpoint("config.json cannot be read (there is none)")
    return foreign.read_json(path)


@contextlib.contextmanager
def _misfits_rejected(field, folder):
    try:
        yield
    except UnsupportedCheckpoint as error:
        raise reject(field, str(folder), str(error)) from error


def _open_weights(folder, config):
    """As `open_tensors`, by the names that PyTorch would write today."""
    shapes, get = open_tensors(folder)
    stored = hf_names.stored_names(shapes, config)
    if "model_type" not in foreign.read_json(folder / "config.json"):
        hf_names.check_bert(stored.values(), config)
    modern = {name: shapes[old] for name, old in stored.items()}
    return modern, lambda name: get(stored[name])


def open_tensors(
    folder: Path,
) -> tuple[hf_names.Shapes, Callable[[str], np.ndarray]]:
    """The shapes of a folder's tensors by name, and how to read one as an array.

    Raises:
      UnsupportedCheckpoint: where there are none, or they cannot be read.
    """
    openers = {_WEIGHTS: _open_safetensors, _INDEX: _open_parts, _TORCH: _open_torch}
    there = [name for name in openers if foreign.is_there(folder / name)]
    if not there:
        found = sorted(path.name for path in folder.iterdir())
        legal = f"must hold {_WEIGHTS} or {_TORCH}; it holds {found}"
        if any(name.endswith(".index.json") for name in found):
            legal = f"is cut into several files; merge them into {_WEIGHTS}"
        raise UnsupportedCheckpoint(legal)
    return openers[there[0]](folder / there[0])


def _open_safetensors(path):
    from safetensors import SafetensorError, safe_open

    foreign.check_kind(path)
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UnsupportedCheckpoint(f"{path.name} cannot be read ({error})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}

    def get(name):
        dtype = slices[name].get_dtype()
        if dtype not in _FLOATS and dtype[0] not in "IUB":  # NumPy has no float8.
            reason = f"{name} holds {dtype}, must be one of {', '.join(_FLOATS)}"
            raise UnsupportedCheckpoint(reason)
        return file.get_tensor(name)

    return {name: tuple(part.get_shape()) for name, part in slices.items()}, get


def _open_parts(index):
    """Opens the files among which an index divides the tensors."""
    table = foreign.read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        legal = "must hold a `weight_map` of tensors and files"
        raise UnsupportedCheckpoint(f"{index.name} {legal}")
    shapes, getters = {}, {}
    for file in sorted(set(map(str, table.values()))):
        path = index.with_name(Path(file).name)
        if path.name != file or not foreign.is_there(path):
            legal = f"names {file!r}, which is not in the folder"
            raise UnsupportedCheckpoint(f"{index.name} {legal}")
        there, get = _open_safetensors(path)
        for name in [name for name, where in table.items() if where == file]:
            if name not in there:
                legal = f"looks for {name!r} in {file}, which lacks it"
                raise UnsupportedCheckpoint(f"{index.name} {legal}")
            shapes[name], getters[name] = there[name], get
    return shapes, lambda name: getters[name](name)


def _open_torch(path):
    try:
        import torch
    except ImportError as error:
        reason = f"{path.name} needs PyTorch: pip install torch, or give {_WEIGHTS}"
        raise UnsupportedCheckpoint(reason) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        reason = f"{path.name} needs PyTorch 2.6, which reads weights alone"
        raise UnsupportedCheckpoint(reason)
    foreign.check_kind(path, own=b"pk")
    try:
        tensors = torch.load(
            path,
            weights_only=True,  # nothing in the file is executed
            map_location="cpu",
            mmap=zipfile.is_zipfile(path),  # since PyTorch 1.6
        )
    # Of damage, and of what would be executed; PyTorch proposes to execute it.
    except Exception as error:
        said = foreign.reason(error)
        if said.startswith("Weights only load failed"):
            said = "it holds more than tensors, or is damaged"
        legal = f"{path.name} cannot be read ({said})"
        raise UnsupportedCheckpoint(legal) from error

    def wrong(what, value):
        legal = f"{what} is a {type(value).__name__}, must be tensors by name"
        return UnsupportedCheckpoint(f"{path.name} cannot be read ({legal})")

    if not isinstance(tensors, dict):
        raise wrong("it", tensors)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise wrong(repr(name), tensor)

    def get(name):
        tensor = tensors[name].detach()
        if tensor.is_floating_point() and tensor.element_size() < 2:
            reason = f"{name} holds {tensor.dtype}, must be of 16 bits or more"
            raise UnsupportedCheckpoint(reason)
        try:
            return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except (RuntimeError, TypeError) as error:  # sparse or quantised
            said = f"{name} cannot be read ({foreign.reason(error)})"
            raise UnsupportedCheckpoint(said) from error

    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, get


def save_hugging_face(
    folder: str | Path,
    params: dict,
    config: EncoderConfig,
    *,
    tokenizer: Any = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes a dense model, and its tokenizer, for transformers' `from_pretrained`.

    `folder` must not exist yet; it appears once it is complete. `labels` are the names
    of the classes.

    Raises:
      UserError: as `to_hugging_face`, and where `folder` exists.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise reject("folder", str(folder), "exists; nothing is written over")
    tensors, fields = to_hugging_face(params, config, labels)
    with files.new_folder(folder) as partial:
        write_tensors(partial, tensors, fields)
        if tokenizer is not None:
            tokenizers.write(tokenizer, partial, config)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], fields: dict) -> None:
    """Writes `model.safetensors` and `config.json` into an existing folder."""
    from safetensors.numpy import save

    # The library writes the memory of an array as it lies, transposed or not.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    (folder / _WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
