"""Saved models, one folder each.

    <path>/README.md     the model card
    <path>/model.json    sizes, what was kept of the dense model, task and labels
    <path>/params/       orbax
    <path>/tokenizer/    Hugging Face

The folder appears under its name only once it is complete. Where a run has several
processes, each of them calls `save_model`, as the storage library wants it.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
from orbax.checkpoint import v1 as ocp

from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.checkpoints import foreign, state, tokenizers
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.config import DTYPES, Data
from cofi_jax.data import tasks
from cofi_jax.errors import reject
from cofi_jax.models.bert import Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning.slicing import PrunedSpec

FILES = ("model.json", "params", "tokenizer")  # beside the model card

_FORMAT = 1


def save_model(
    path: str | Path,
    params: dict,
    config: EncoderConfig,
    spec: PrunedSpec | None = None,
    *,
    tokenizer: Any,
    about: dict,
    readme: str = "",
) -> None:
    """Writes a model that loads without knowing how it was trained.

    Args:
      path: a folder that does not exist yet; it appears once it is complete.
      params: the parameters.
      config: their sizes (of the sliced model where it is one).
      spec: what was kept of the dense model; None for a dense one.
      tokenizer: the Hugging Face tokenizer.
      about: JSON-able: `task`, `labels`, `data` (the fields of `config.Data`), of a
        sliced one `dense` (the sizes it was cut from) and `sparsity`; `settings` where
        `Problem.fit` chose some; for the model card `base_model` (a name on the hub),
        `scores` by split or the `report`.
      readme: the text of the model card, see `report.model_card`.

    Raises:
      UserError: where `path` exists, or the parameters do not fit the sizes.
    """
    path = Path(path).absolute()
    if distributed.on_process_zero(path.exists):
        raise reject("path", str(path), "exists; nothing is written over")
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
    except AssertionError as error:
        legal = "must have the structure, shapes and float32 that config initialises"
        raise reject("params", "...", legal) from error
    described = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "spec": spec and dataclasses.asdict(spec),
        "about": about,
    }
    with contextlib.ExitStack() as stack:  # The first process alone makes the folder.
        partial = distributed.on_process_zero(
            lambda: str(stack.enter_context(files.new_folder(path)))
        )
        ocp.save(
            Path(partial) / "params",
            distributed.replicate(params),
            custom_metadata={"crc32": distributed.digest(params)},
        )

        def finish():
            tokenizer.save_pretrained(Path(partial) / "tokenizer")
            files.write_json(Path(partial) / "model.json", described)
            files.write_atomically(Path(partial) / "README.md", readme)
            stack.close()

        distributed.on_process_zero(finish)


def is_model(path: str | Path) -> bool:
    """Whether `path` is a folder that `save_model` wrote."""
    return (Path(path).expanduser() / "model.json").is_file()


def read_about(
    path: str | Path, *, field: str = "model"
) -> tuple[EncoderConfig, PrunedSpec | None, dict]:
    """Sizes, spec and description of a saved model, without its parameters.

    Args:
      path: a folder that `save_model` wrote.
      field: what messages call the path.

    Raises:
      UserError: where there is no such model, or a newer version wrote it.
    """
    path = Path(path).expanduser()
    if not is_model(path):
        found = sorted(p.name for p in path.iterdir()) if path.is_dir() else "nothing"
        raise reject(field, str(path), f"must be a folder with {FILES}; found {found}")
    try:
        described = foreign.read_json(path / "model.json")
        version = described["format"]
        if version > _FORMAT:
            legal = f"written in format {version} by a newer cofi-jax; this one reads "
            raise reject(field, str(path), f"{legal}up to {_FORMAT}")
        config = EncoderConfig.from_json(described["config"])
        spec = described["spec"] and PrunedSpec.from_json(described["spec"])
        about = dict(described["about"])
        sizes = [config]
        if "dense" in about:
            sizes.append(EncoderConfig.from_json(about["dense"]))
        for each in sizes:
            _check_sizes(each)
        return config, spec, about
    except (AttributeError, KeyError, TypeError, UnsupportedCheckpoint) as error:
        legal = f"model.json is damaged ({foreign.reason(error)})"
        raise reject(field, str(path), legal) from error


def _check_sizes(config):
    """Raises UnsupportedCheckpoint where a size is none, or is beyond int32."""
    may_be_0 = ("heads", "intermediate", "pooler_size", "position_offset")
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), int(field.name not in may_be_0)
        if field.type in ("int", int):
            foreign.number(field.name, value, least=least)
        elif field.name in may_be_0:
            for each in value:
                foreign.number(field.name, each, least=least)


def load_model(
    path: str | Path,
    *,
    dtype: str = "",
    sharding: jax.sharding.Sharding | None = None,
    field: str = "model",
) -> tuple[Encoder, dict, PrunedSpec | None]:
    """A saved model: the module, its parameters and what it kept of the dense one.

    Args:
      path: a folder that `save_model` wrote.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given
        (parameters float32).
      sharding: where every parameter lies, on however many devices; the first device
        if not given.
      field: what messages call the path.

    Raises:
      UserError: where there is no such model, it is damaged or too new.
    """
    path = Path(path).expanduser().absolute()
    config, spec, _ = read_about(path, field=field)
    if dtype not in ("", *DTYPES):
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        abstract = state.abstract_like(abstract_params(config), lambda x: sharding)
        params = state.read(ocp, path / "params", abstract)
    except Exception as error:  # also of a damaged description
        said = foreign.reason(error)
        raise reject(field, str(path), f"params are damaged ({said})") from error
    if dtype:
        config = dataclasses.replace(config, dtype=dtype)
        params = jax.tree.map(lambda array: array.astype(dtype), params)
    return Encoder(config), params, spec


def load_tokenizer(path: str | Path, *, field: str = "model") -> Any:
    """The tokenizer of a saved model; `field` is what messages call the path.

    Raises:
      UserError: where it is missing or damaged.
    """
    return tokenizers.load_tokenizer(Path(path).expanduser() / "tokenizer", field)


def saved_task(path: str, *, field: str = "model") -> tasks.Task:
    """The task that a saved model was made for; `field` is what messages call the path.

    Raises:
      UserError: where its description says none.
    """
    _, spec, about = read_about(path, field=field)
    wanted = {"data"} | ({"dense"} if spec else set())
    if missing := sorted(wanted - about.keys()):
        legal = f"saved without {', '.join(missing)} in `about`, needed here"
        raise reject(field, path, legal)
    data = config_lib.section(Data, about["data"], field=field, path=path)
    task = tasks.find(data)
    if task.problem.names_classes and not task.labels:
        raise reject(field, path, "saved without the names of its classes")
    try:
        return task.with_settings(about.get("settings", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        legal = f"model.json is damaged (settings: {foreign.reason(error)})"
        raise reject(field, path, legal) from error
