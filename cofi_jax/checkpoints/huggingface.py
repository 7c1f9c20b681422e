"""Hugging Face folders of BERT and RoBERTa, dense and sliced, to our parameters.

Sliced are the checkpoints of the original CoFi: tensors have their pruned shapes,
absent blocks are missing, config.json has the dense sizes. Dense ones are written.
"""

import contextlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import hf_names
from cofi_jax.checkpoints.hf_config import (
    UnsupportedCheckpoint,
    class_rows,
    from_fields,
)
from cofi_jax.checkpoints.hf_names import to_hugging_face
from cofi_jax.config import Model
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject, warn
from cofi_jax.models.bert import init_params
from cofi_jax.models.config import EncoderConfig

_WEIGHTS = "model.safetensors"
_TORCH = "pytorch_model.bin"  # where there is no other

# Each of these makes a tokenizer.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json and merges.txt",
    "sentencepiece.bpe.model",
)
_PATTERNS = "config.json *.index.json *token* vocab* special* merges.txt sentencepiece*"


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
        for weights in (_WEIGHTS, _TORCH):
            found = snapshot_download(
                path, allow_patterns=[weights, *_PATTERNS.split()]
            )
            if (Path(found) / weights).exists():
                break
        return Path(found)
    # The hub's client raises dozens of kinds, those of its HTTP library included.
    except Exception as error:
        legal = f"cannot be had from the Hugging Face hub ({type(error).__name__}); "
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
        rows = class_rows(_read_json(folder), labels, label_order, field)
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


def _read_json(folder):
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        reason = f"config.json cannot be read ({type(error).__name__})"
        raise UnsupportedCheckpoint(reason) from error


@contextlib.contextmanager
def _misfits_rejected(field, folder):
    try:
        yield
    except UnsupportedCheckpoint as error:
        raise reject(field, str(folder), str(error)) from error


def _open_weights(folder, config):
    """The shapes of a folder's tensors by name, and how to read one as an array."""
    openers = {_WEIGHTS: _open_safetensors, _TORCH: _open_torch}
    there = [name for name in openers if (folder / name).is_file()]
    if not there:
        found = sorted(path.name for path in folder.iterdir())
        legal = f"must hold {_WEIGHTS} or {_TORCH}; it holds {found}"
        if any(name.endswith(".index.json") for name in found):
            legal = f"is cut into several files; merge them into {_WEIGHTS}"
        raise UnsupportedCheckpoint(legal)
    shapes, get = openers[there[0]](folder / there[0])
    stored = hf_names.stored_names(shapes, config)
    modern = {name: shapes[old] for name, old in stored.items()}
    return modern, lambda name: get(stored[name])


def _open_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UnsupportedCheckpoint(f"{path.name} cannot be read ({error})") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes, file.get_tensor


def _open_torch(path):
    try:
        import torch
    except ImportError as error:
        reason = f"{path.name} needs PyTorch: pip install torch, or give {_WEIGHTS}"
        raise UnsupportedCheckpoint(reason) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        reason = f"{path.name} needs PyTorch 2.6, which reads weights alone"
        raise UnsupportedCheckpoint(reason)
    try:
        tensors = torch.load(
            path,
            weights_only=True,  # nothing in the file is executed
            map_location="cpu",
            mmap=zipfile.is_zipfile(path),  # since PyTorch 1.6
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Of damage, of what is no tensor, and of what would be executed.
    except Exception as error:
        reason = f"{path.name} cannot be read ({type(error).__name__})"
        raise UnsupportedCheckpoint(reason) from error

    def get(name):
        tensor = tensors[name].detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    return shapes, get


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
            tokenizer.save_pretrained(partial)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], fields: dict) -> None:
    """Writes `model.safetensors` and `config.json` into an existing folder."""
    from safetensors.numpy import save

    # The library writes the memory of an array as it lies, transposed or not.
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    (folder / _WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")


def load_tokenizer(folder: Path, field: str):
    """The folder's tokenizer.

    Raises:
      UserError: where there is none.
    """
    from transformers import AutoTokenizer

    # Without the files transformers makes one up that knows no word at all.
    sets = [names.split(" and ") for names in _VOCABULARIES]
    if not any(all((folder / name).is_file() for name in names) for names in sets):
        legal = f"has no tokenizer; must hold {' or '.join(_VOCABULARIES)}"
        raise reject(field, str(folder), legal)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"its tokenizer cannot be read ({type(error).__name__})"
        raise reject(field, str(folder), reason) from error
    if tokenizer.pad_token_id is None:
        raise reject(field, str(folder), "its tokenizer has no padding token")
    return tokenizer


def check_tokenizer(
    tokenizer: Any, sizes: EncoderConfig, *, field: str, path: str
) -> None:
    """Raises UserError where the tokenizer has tokens that the model has not."""
    if len(tokenizer) > sizes.vocab_size:
        legal = f"its tokenizer has {len(tokenizer)} tokens, its weights "
        raise reject(field, path, legal + str(sizes.vocab_size))
