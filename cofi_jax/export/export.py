"""A saved model in other formats, each checked before it gets its name.

    saved model -> write -> load in its own runtime -> compare -> measure -> <format>/

What it is compared with is the masked model: the dense one's sizes, the sliced weights
put back where they came from, and hard gates. A `check.json` beside each part says what
was found; so does the model card, which is written anew.
"""

import dataclasses
import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from cofi_jax import files
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.config import DTYPES
from cofi_jax.errors import reject
from cofi_jax.export import (
    to_onnx,
    to_stablehlo,
    to_stock_bert,
    to_transformers,
    verify,
)
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing
from cofi_jax.report import model_card

FORMATS: dict[str, ModuleType] = {
    "transformers": to_transformers,
    "onnx": to_onnx,
    "stablehlo": to_stablehlo,
    "stock": to_stock_bert,
}


CHECK = "check.json"


def export(
    path: str | Path,
    formats: Sequence[str],
    *,
    data_path: str = "",
    num_rows: int = 0,
    dtype: str = "float32",
    batch_size: int = 32,
    seq_length: int = 0,
    repeats: int = 30,
) -> dict[str, dict[str, Any]]:
    """Writes the saved model at `path` in each of `formats`, into folders of that name.

    All of it runs on the CPU, in float32.

    Args:
      path: a folder that `save_model` wrote.
      formats: of `FORMATS`; with none the saved model alone is checked.
      data_path: hub name or folder; empty for the one the model was made with.
      num_rows: of the first validation split to compare; 0 for all of them. The
        windows of questions come all.
      dtype: of the weights that `transformers` stores; with bfloat16 it is compared
        with a masked model whose weights are so rounded.
      batch_size: of the timed passes.
      seq_length: of the timed passes; 0 for 64 or the model's longest input.
      repeats: timed passes.

    Returns:
      The content of each `check.json`, by format; that of the saved model by "".

    Raises:
      UserError: for what does not fit, for a package that is missing and for a part
        that fails its check; what was there of that part stays as it was.
    """
    path = Path(path).expanduser().absolute()
    _check_formats(formats)
    config, spec, about = saved_model.read_about(path)
    task = saved_model.saved_task(str(path))
    if data_path:
        task = dataclasses.replace(task, path=data_path)
    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    seq_length = seq_length or min(64, config.longest)
    if seq_length > config.longest:
        raise reject("seq_length", seq_length, f"must be at most {config.longest}")
    sizes = {"batch_size": batch_size, "seq_length": seq_length, "repeats": repeats}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        _, params, _ = saved_model.load_model(
            path, sharding=jax.sharding.SingleDeviceSharding(cpu)
        )
        read = verify.validation(task, saved_model.load_tokenizer(path), num_rows)

        def prepare(params):
            """The model, the dense one it was cut from, and what to compare with."""
            model = verify.in_jax(params, config)
            if not spec:
                return model, None, read(model, "the saved model")
            dense = EncoderConfig.from_json(about["dense"])
            whole = slicing.expand(params, spec, abstract_params(dense))
            masked = verify.in_jax(whole, dense, spec.masks(dense))
            return model, verify.in_jax(whole, dense), read(masked, "the masked model")

        model, dense, rows = prepare(params)
        checks = {"": verify.compare("cofi-jax", model, rows)}
        if dense:
            checks[""] |= verify.time(model, dense, packages=("jax",), **sizes)
        checks[""] |= verify.files(path, ("model.json", "params", "tokenizer"))
        try:
            for name in formats:
                what = model, dense, rows
                write, said = FORMATS[name].write, {"weights": "float32"}
                if name == "transformers" and dtype == "bfloat16":
                    write = functools.partial(write, dtype=dtype)
                    said["weights"] = dtype
                    what = prepare(jax.tree.map(_rounded, params))
                if name == "stock" and any(config.heads + config.intermediate):
                    said["matrix_weights_ratio"] = to_stock_bert.price(config)
                made = functools.partial(
                    _make, write, FORMATS[name].load, labels=about.get("labels", ())
                )
                checks[name] = _part(path / name, made, *what, sizes, said)
        finally:  # what was written before one failed its check is there
            files.write_json(path / CHECK, checks[""])
            write_card(path)
    return checks


def _rounded(array):
    return array.astype("bfloat16").astype(array.dtype)


def _check_formats(formats):
    for name in formats:
        if name not in FORMATS:
            legal = f"must be among {', '.join(FORMATS)}"
            raise reject("formats", name, legal)
        packages = FORMATS[name].REQUIRES
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            extra = packages[0]
            legal = f"needs {', '.join(missing)}: pip install 'cofi-jax[{extra}]'"
            raise reject("formats", name, legal)


def _make(write, load, model, folder, labels):
    write(folder, model.params, model.config, labels)
    return model._replace(predict=load(folder))


def _part(folder, made, model, dense, rows, sizes, said):
    """Writes one format into a hidden folder; only what passes its check is renamed."""
    partial, old = (folder.with_name(f".{folder.name}.{x}") for x in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between two renames
        old.rename(folder)
    if folder.exists() and not (folder / CHECK).exists():
        raise reject("formats", folder.name, f"{folder} is not an export; move it away")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        written = made(model, partial)
        _save_tokenizer(partial, folder.parent, model.config)
        check = verify.compare(folder.name, written, rows) | said
        if dense:
            with tempfile.TemporaryDirectory() as scratch:
                scratch = Path(scratch) / "dense"
                scratch.mkdir()
                packages = FORMATS[folder.name].REQUIRES or ("jax",)
                against = made(dense, scratch)
                check |= verify.time(written, against, packages=packages, **sizes)
        check |= verify.files(partial)
        files.write_json(partial / CHECK, check)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return check


def _save_tokenizer(folder, model, config):
    """With what transformers 4 and 5 would otherwise guess, each its own way."""
    tokenizer = saved_model.load_tokenizer(model)  # a fresh one: uses leave traces
    with tempfile.TemporaryDirectory() as scratch:  # without code to be trusted
        tokenizer.save_pretrained(scratch)
        path = Path(scratch) / "tokenizer_config.json"
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": list(tokenizer.model_input_names),
            "model_max_length": config.longest,
            "padding_side": "right",  # the exported positions count from the left
        }
        files.write_json(path, json.loads(path.read_text()) | said)
        found = huggingface.load_tokenizer(Path(scratch), "formats")
        verify.check_tokenizer(found, tokenizer)
        shutil.copytree(scratch, folder, dirs_exist_ok=True)


def _read_check(path):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):  # none, or not ours
        return {}


def write_card(path: Path) -> None:
    """Writes the `README.md` of the saved model, from what lies beside it."""
    config, spec, about = saved_model.read_about(path)
    found = {name: _read_check(path / name / CHECK) for name in ("", *FORMATS)}
    checks = {name: check for name, check in found.items() if check}
    files.write_atomically(path / "README.md", model_card.text(config, about, checks))
