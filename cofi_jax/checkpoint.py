"""What goes to disk and comes back; the only file that imports orbax.

Two things are stored: a stage's resumable state, in numbered checkpoints of which
the newest two are kept, and saved models,

    <path>/README.md     the model card
    <path>/model.json    sizes, what was kept of the dense model, task and labels
    <path>/params/       orbax
    <path>/tokenizer/    Hugging Face

Both appear under their names only once they are complete. Where a run has several
processes, each of them calls `Checkpoints` and `save_model`, as the storage library
wants it; each loads by itself.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
from orbax.checkpoint import v1 as ocp

from cofi_jax import card, parallel, pretrained
from cofi_jax.config import DTYPES, UserError, reject
from cofi_jax.model import Encoder, EncoderConfig, abstract_params
from cofi_jax.slicing import PrunedSpec

_KEEP = 2
_FORMAT = 1
_FILES = ("model.json", "params", "tokenizer")


class Checkpoints:
    """The states of one stage, copied off the device and written in the background.

    Attributes:
      skipped: one line for each checkpoint that could not be read.
    """

    def __init__(self, path: Path):
        self.skipped: list[str] = []
        self._path = Path(path).absolute()
        self.skipped += parallel.first(self._set_unreadable_aside)
        self._manager = ocp.training.Checkpointer(
            self._path,
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def _set_unreadable_aside(self):
        """Renames what would keep the storage library from opening the others.

        Returns:
          A line for each of them.
        """
        skipped = []
        steps = self._path.iterdir() if self._path.is_dir() else ()
        for found in [path for path in steps if path.name.isdigit()]:
            try:
                ocp.metadata(found)
            except Exception as error:
                skipped.append(self._damaged(found.name, type(error).__name__))
                aside = self._path / f"damaged-{found.name}"
                shutil.rmtree(aside, ignore_errors=True)
                found.rename(aside)
        return skipped

    def _damaged(self, step, reason):
        return f"{self._path}/{step} is damaged ({reason})"

    def save(self, state: Any) -> None:
        """Starts to write `state` under its `step`; waits for the write before."""
        # Checksums of our own: the storage format finds truncation, not every flip.
        digest = parallel.digest(_storable(state))
        self._manager.save_async(
            int(jax.device_get(state.step)),
            _storable(state),
            force=True,
            overwrite=True,  # a damaged one may stand there
            custom_metadata={"crc32": digest},
        )

    def restore(self, like: Any) -> Any | None:
        """The newest state that can be read, or None; `like` gives tree and shapes.

        What could not be read is reported in `skipped`.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            _storable(like),
        )
        steps = parallel.first(lambda: [c.step for c in self._manager.checkpoints])
        for step in sorted(steps, reverse=True):
            try:
                with parallel.together(), _alone():
                    stored = self._load(step, abstract)
                return _restored(stored, like)
            except UserError as error:
                self.skipped.append(self._damaged(step, error))
        return None

    def _load(self, step, abstract):
        try:
            stored = self._manager.load(step, abstract)
            digest = self._manager.metadata(step).custom_metadata["crc32"]
        # Whatever a damaged file makes of itself inside the storage library.
        except Exception as error:
            raise UserError(type(error).__name__) from error
        if parallel.digest(stored) != digest:
            raise UserError("checksum mismatch")
        return stored


def _storable(state):
    return state.replace(key=jax.random.key_data(state.key))


def _restored(stored, like):
    key = jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key))
    return stored.replace(key=key)


def _alone():
    """Within it a process loads by itself: none waits for one whose file is damaged."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    options, me = ocp.Context(), jax.process_index()
    options.multiprocessing.primary_host = me
    options.multiprocessing.active_processes = {me}
    options.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    return options


def save_model(
    path: str | Path,
    params: dict,
    config: EncoderConfig,
    spec: PrunedSpec | None = None,
    *,
    tokenizer: Any,
    about: dict,
) -> None:
    """Writes a model that loads without knowing how it was trained.

    Args:
      path: a folder that does not exist yet; it appears once it is complete.
      params: the parameters.
      config: their sizes (of the sliced model where it is one).
      spec: what was kept of the dense model; None for a dense one.
      tokenizer: the Hugging Face tokenizer.
      about: JSON-able: `task`, `labels`, `data` (the fields of `config.Data`), of a
        sliced one `dense` (the sizes it was cut from) and `sparsity`; for the model
        card `base_model` (a name on the hub), `scores` by split or the `report`.

    Raises:
      UserError: where `path` exists, or the parameters do not fit the sizes.
    """
    path = Path(path).absolute()
    readme = card.text(config, about, {})
    if parallel.first(path.exists):
        raise reject("path", str(path), "exists; nothing is written over")
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
    except AssertionError as error:
        legal = "must have the structure, shapes and float32 that config initialises"
        raise reject("params", "...", legal) from error
    partial = path.with_name(f".{path.name}.partial")

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    parallel.first(begin)
    checksum = {"crc32": parallel.digest(params)}
    ocp.save(partial / "params", parallel.replicate(params), custom_metadata=checksum)
    described = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "spec": spec and dataclasses.asdict(spec),
        "about": about,
    }

    def finish():
        tokenizer.save_pretrained(partial / "tokenizer")
        (partial / "model.json").write_text(json.dumps(described, indent=1) + "\n")
        (partial / "README.md").write_text(readme)
        os.replace(partial, path)

    parallel.first(finish)


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
        raise reject(field, str(path), f"must be a folder with {_FILES}; found {found}")
    try:
        described = json.loads((path / "model.json").read_text())
        version = described["format"]
        if version > _FORMAT:
            raise reject(
                field,
                str(path),
                f"written in format {version} by a newer cofi-jax; this one reads "
                f"up to {_FORMAT}",
            )
        config = EncoderConfig.from_json(described["config"])
        spec = described["spec"] and PrunedSpec.from_json(described["spec"])
        about = dict(described["about"])
        if "dense" in about:
            EncoderConfig.from_json(about["dense"])
        return config, spec, about
    except (KeyError, TypeError, UnicodeError, json.JSONDecodeError) as error:
        raise reject(field, str(path), f"model.json is damaged ({error!r})") from error


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
        params = _load_params(path / "params", config, sharding)
    except Exception as error:  # whatever the storage library makes of the damage
        reason = f"params are damaged ({type(error).__name__})"
        raise reject(field, str(path), reason) from error
    if dtype:
        config = dataclasses.replace(config, dtype=dtype)
        params = jax.tree.map(lambda array: array.astype(dtype), params)
    return Encoder(config), params, spec


def _load_params(path, config, sharding):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(config),
    )
    with _alone():
        params = ocp.load(path, abstract)
        digest = ocp.metadata(path).custom_metadata["crc32"]
    if parallel.digest(params) != digest:
        raise ValueError("checksum mismatch")
    return params


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a saved model.

    Raises:
      UserError: where it is missing or damaged.
    """
    return pretrained.load_tokenizer(Path(path).expanduser() / "tokenizer", "model")
