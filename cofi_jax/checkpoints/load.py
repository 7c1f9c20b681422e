"""Models of any kind, saved ones and Hugging Face's, opened the same way."""

import dataclasses
import operator
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cofi_jax import config as config_lib
from cofi_jax.checkpoints import (
    huggingface,
    saved_model,
    sentence_transformers,
    tokenizers,
)
from cofi_jax.config import DTYPES, Data, Model
from cofi_jax.data import tasks
from cofi_jax.errors import reject
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost, slicing

_DESCRIBES_TASK = (
    "name",
    "columns",
    "label_column",
    "group_column",
    "problem.name",
    "labels",
)


class Loaded(NamedTuple):
    """A model, the task it was made for, and the dense sizes it was cut from."""

    path: str
    folder: pathlib.Path
    model: Encoder
    params: dict
    tokenizer: Any
    task: tasks.Task
    dense: EncoderConfig


def load(
    paths: Sequence[str],
    *,
    task: str = "",
    labels: Sequence[str] = (),
    dtype: str = "",
    described: Mapping[str, Any] = types.MappingProxyType({}),
    label_column: str | None = None,
) -> list[Loaded]:
    """Saved models, and Hugging Face folders or names, all of one task.

    Args:
      paths: one or more.
      task: of the Hugging Face models; that of the first saved model if not given.
      labels: their classes in their order; () for the task's.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given.
      described: of the Hugging Face models, fields of `config.Data` beside the task.
      label_column: where the labels are that saved models are scored by; None where
        they were in training.

    Raises:
      UserError: for what is neither, and for tasks that do not fit.
    """
    if dtype not in ("", *DTYPES):
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    known = [
        saved_model.saved_task(p) if saved_model.is_model(p) else None for p in paths
    ]
    if label_column is not None:
        known = [own and own.with_label_column(label_column) for own in known]
    legal = "is for Hugging Face models; a saved model knows its own"
    for flag, value in (("task", task), ("labels", tuple(labels))):
        if value and all(known):
            raise reject(flag, value, legal)
    for field, value in described.items():  # A saved model also says it for others.
        if any(known):
            raise reject(f"--config.data.{field}", value, legal)
    wanted = next(filter(None, known), None)
    if task and not (wanted and wanted.name == task):
        wanted = _described(Data(task=task, **described))
    for path, own in zip(paths, known, strict=True):
        for field in _DESCRIBES_TASK if wanted else ():
            of = operator.attrgetter(field)
            mine, first = (of(task or wanted) for task in (own, known[0]))
            if mine != first:
                legal = f"its {field} is {mine!r}, that of {paths[0]} {first!r}"
                raise reject("model", path, f"{legal}; all must be of one task")
    return [
        _load_saved(path, own, dtype)
        if own
        else _load_other(path, wanted, labels, dtype)
        for path, own in zip(paths, known, strict=True)
    ]


def _described(data):
    """The task that the settings describe, with the names of its classes."""
    config_lib.validate(config_lib.Config(data=data))
    task = tasks.find(data)
    if task.problem.names_classes and not task.labels:
        legal = "must name the classes, as --config.data.labels=no,yes; there are no "
        legal += "training rows to read them off"
        raise reject("data.labels", data.labels, legal)
    return task


def _load_saved(path, task, dtype):
    model, params, spec = saved_model.load_model(path, dtype=dtype)
    dense = model.config
    if spec:
        dense = EncoderConfig.from_json(saved_model.read_about(path)[2]["dense"])
    tokenizer = saved_model.load_tokenizer(path)
    tokenizers.check_tokenizer(tokenizer, model.config, field="model", path=path)
    folder = pathlib.Path(path).expanduser()
    return Loaded(path, folder, model, params, tokenizer, task, dense)


def _load_other(path, task, labels, dtype):
    folder = pathlib.Path(path).expanduser()
    local = path.startswith((".", "/", "~")) or path.count("/") > 1
    described = (folder / "config.json").exists()
    described = described or sentence_transformers.is_folder(folder)
    if (folder.is_dir() or local and not task) and not described:
        saved_model.read_about(path)  # It says what it found instead.
    if not task:
        legal = f"must name the task that {path} was made for: {', '.join(tasks.TASKS)}"
        raise reject("task", "", legal)
    settings = Model(dtype=dtype or "float32")
    found = load_hugging_face(path, task, labels=labels, model=settings)
    # Some pruners leave zeros in the place of what they cut, which would take time.
    sizes = found.model.config
    params, spec = slicing.drop_zero_units(found.params, sizes)
    return found._replace(
        model=Encoder(spec.config(sizes)),
        params=jax.tree.map(lambda x: jnp.asarray(x, settings.dtype), params),
        task=dataclasses.replace(
            task, max_length=min(task.max_length, found.model.config.longest)
        ),
    )


def load_hugging_face(
    path: str,
    task: tasks.Task,
    *,
    field: str = "model",
    labels: Sequence[str] = (),
    model: Model,
) -> Loaded:
    """A fine-tuned model of a Hugging Face folder or name, dense or already sliced.

    Args:
      path: the folder or name.
      task: the task that the model was made for.
      field: what messages call the path.
      labels: the task's classes in the model's order; () for what the model says.
      model: the settings that `dropout` and `dtype` are taken from.

    Returns:
      The model with float32 parameters.

    Raises:
      UserError: for a model that is not there, damaged, or of another task.
    """
    folder = huggingface.resolve(path, field)
    problem = {"field": field, "problem": task.problem.name, "model": model}
    if task.problem.pools:
        config, params, inside = sentence_transformers.load(folder, **problem)
        dense = config
    else:
        config, params = huggingface.load_classifier(
            folder, labels=task.labels, label_order=tuple(labels), **problem
        )
        dense = huggingface.read_config(
            folder, field, task.num_outputs, model, task.problem.name
        )
        inside = folder
    tokenizer = tokenizers.load_tokenizer(inside, field)
    tokenizers.check_tokenizer(tokenizer, config, field=field, path=path)
    return Loaded(path, folder, Encoder(config), params, tokenizer, task, dense)


def disk_bytes(loaded: Loaded) -> int:
    """The size of the files that hold the parameters."""
    if saved_model.is_model(loaded.folder):
        files = [*(loaded.folder / "params").rglob("*")]
    else:
        kinds = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin")
        found = ([*loaded.folder.glob(kind)] for kind in kinds)
        files = next(filter(None, found), [])
    return sum(file.stat().st_size for file in files if file.is_file())


def sizes(loaded: Loaded, seq_lengths: Sequence[int]) -> dict[str, Any]:
    """What `evaluate` says of a model's size.

    Returns:
      `params`         `encoder` and `total`
      `sparsity`       the fraction of the dense encoder's parameters removed
      `bytes`          of the parameters' files
      `multiply_adds`  of one sequence, by length
      `kept`           `hidden` width, `heads` and `intermediate` widths by layer
    """
    config = loaded.model.config
    encoder = cost.num_params({}, config)
    return {
        "params": {
            "encoder": encoder,
            "total": sum(x.size for x in jax.tree.leaves(loaded.params)),
        },
        "sparsity": 1 - encoder / cost.num_params({}, loaded.dense),
        "bytes": disk_bytes(loaded),
        "multiply_adds": {
            str(length): cost.multiply_adds(config, length) for length in seq_lengths
        },
        "kept": config.widths(),
    }
