"""A saved model in other formats, each of which is checked before it gets its name.

    saved model -> write -> load in its own runtime -> compare -> measure -> <format>/

Each is compared with the masked model: the dense model's sizes, the sliced weights put
back where they came from, and hard masks. A `check.json` in each folder holds the
results, from which the model card is written anew.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cofi_jax import files
from cofi_jax.checkpoints import saved_model, tokenizers
from cofi_jax.checkpoints import vocabulary as vocabulary_lib
from cofi_jax.config import DTYPES
from cofi_jax.errors import reject
from cofi_jax.export import trim, verify
from cofi_jax.export.base import Format
from cofi_jax.export.formats import CARDS, FORMATS
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing
from cofi_jax.report import model_card

CHECK = "check.json"
MAX_LOSS = 0.01


def export(
    path: str | Path,
    formats: Sequence[str],
    *,
    vocabulary: str = "",
    data_path: str = "",
    num_rows: int = 0,
    dtype: str = "float32",
    batch_size: int = 32,
    seq_length: int = 0,
    repeats: int = 30,
    max_loss: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the saved model at `path` in each of `formats`, into folders of that name.

    All of it runs on the CPU, in float32.

    Args:
      path: a folder that `save_model` wrote.
      formats: keys of `FORMATS`; with none the saved model alone is checked.
      vocabulary: a file or a folder of texts. If given, a model with the tokens that
        they need is saved first, see `trim.trim`, and all else is done with that one.
      data_path: a name on the hub or a folder; "" for the one the model was made with.
      num_rows: how many rows of the first validation split are compared; 0 for all. All
        windows of longer texts are compared.
      dtype: the dtype that the weights are stored in. With bfloat16, which only some
        formats take, the masked model's weights are rounded likewise.
      batch_size: sequences in a batch of the timed passes.
      seq_length: tokens of a sequence there; 0 for 64 or the model's longest input.
      repeats: the number of timed turns.
      max_loss: the most that the score of a format in a lower precision may fall, as a
        difference of the metric that decides; None for `MAX_LOSS`. A fall within two of
        its standard errors is not refused.

    Returns:
      The content of each `check.json`, by format; that of the saved model by "".

    Raises:
      UserError: for input that does not fit, a missing package, an option that one of
        `formats` would ignore, and a format that fails its check. What stood in the
        folder of that format before stays as it was.
    """
    path = Path(path).expanduser().absolute()
    _check_request(formats, dtype, max_loss)
    max_loss = MAX_LOSS if max_loss is None else max_loss
    config, *_ = saved_model.read_about(path)  # It says what is there instead of one.
    if seq_length > config.longest:
        raise reject("seq_length", seq_length, f"must be at most {config.longest}")
    seq_length = seq_length or min(64, config.longest)
    sizes = {"batch_size": batch_size, "seq_length": seq_length, "repeats": repeats}
    with files.locked(path):
        if vocabulary:
            path = trim.trim(path, vocabulary, data_path=data_path, num_rows=num_rows)
        return _export(path, formats, data_path, num_rows, dtype, sizes, max_loss)


def _export(path, formats, data_path, num_rows, dtype, sizes, max_loss):
    """The rest of `export`, in which no other process changes the folder."""
    config, spec, about = saved_model.read_about(path)
    task = saved_model.saved_task(str(path))
    if data_path:
        task = task.at(data_path)
    try:
        files.check_writable(path / CHECK)
    except OSError as error:
        legal = f"must be a folder that can be written ({error.strerror})"
        raise reject("model", str(path), legal) from error
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = verify.params_on_cpu(path)
        tokenizer = saved_model.load_tokenizer(path)
        source = {"field": "model", "path": str(path)}
        tokenizers.check_tokenizer(tokenizer, config, **source)
        tokenizers.check_writable(tokenizer, config, **source)
        read = verify.validation(task, tokenizer, num_rows, **source)

        def subject(params, dtype):
            model = verify.in_jax(params, config)
            dense, reference, name = None, model, "the saved model"
            if spec:
                sizes_before = EncoderConfig.from_json(about["dense"])
                whole = slicing.expand(params, spec, abstract_params(sizes_before))
                dense = verify.in_jax(whole, sizes_before)
                masks, name = spec.masks(sizes_before), "the masked model"
                reference = verify.in_jax(whole, sizes_before, masks)
            return verify.Subject(
                model,
                dense,
                teacher,
                read(reference, name, teacher),
                about.get("labels", ()),
                dtype,
                sizes,
                max_loss,
                task,
                tokenizer,
            )

        lossy = any(FORMATS[name].lossy for name in formats)
        wanted = lossy or not task.label_column
        teacher = _teacher(path, about) if spec and wanted else None
        original = stored = subject(params, "float32")
        checks = {"": verify.compare("cofi-jax", original.model, original.rows)}
        if original.dense:
            checks[""] |= verify.time(original.model, original.dense, ("jax",), **sizes)
        checks[""] |= verify.files(path, saved_model.FILES)
        if "vocabulary" in about:
            checks[""]["vocabulary"] = about["vocabulary"]
        try:
            if dtype != "float32":
                rounded = jax.tree.map(
                    lambda x: x.astype(dtype).astype(x.dtype), params
                )
                stored = subject(rounded, dtype)
            for name in formats:
                checks[name] = _write(FORMATS[name], path / name, stored)
        finally:  # The formats before one that fails its check are there.
            files.write_json(path / CHECK, checks[""])
            write_card(path)
    return checks


def _teacher(path, about):
    """The dense model of the run that made the saved model, or None.

    It lies beside the saved model. One of other sizes, task or scores is not it. For a
    trimmed model, it gets the same tokens.
    """
    other = path.with_name("teacher")
    if not saved_model.is_model(other):
        return None
    config, _, described = saved_model.read_about(other)
    sizes = EncoderConfig.from_json(about["dense"])
    if trimmed := "vocabulary" in about:
        config = dataclasses.replace(config, vocab_size=sizes.vocab_size)
    scores = about.get("report", {}).get("teacher", described).get("scores")
    if (
        dataclasses.replace(config, dtype=sizes.dtype, dropout=sizes.dropout) != sizes
        or any(described.get(key) != about.get(key) for key in ("task", "labels"))
        or described.get("scores") != scores
    ):
        return None
    params = verify.params_on_cpu(other)
    if trimmed:
        before, after = map(saved_model.load_tokenizer, (other, path))
        try:
            params = vocabulary_lib.take(params, vocabulary_lib.rows(before, after))
        except KeyError:  # It lacks a token.
            return None
    task = saved_model.saved_task(str(other))
    return verify.in_jax(params, config)._replace(task=task)


def _check_request(formats, dtype, max_loss):
    """Refuses what is not known, lacks a package or ignores an option."""
    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    for name in formats:
        if name not in FORMATS:
            raise reject("formats", name, f"must be among {', '.join(FORMATS)}")
    if max_loss is not None:
        if not 0 <= max_loss < math.inf:
            raise reject("max_loss", max_loss, "must be a number, 0 or more")
        lossy = [name for name, form in FORMATS.items() if form.lossy]
        if not {*lossy} & {*formats}:
            legal = f"is for the formats {', '.join(lossy)} alone; give --formats"
            raise reject("max_loss", max_loss, legal)
    takers = [name for name, form in FORMATS.items() if dtype in form.dtypes]
    if not {*formats} <= {*takers} or (dtype != "float32" and not formats):
        legal = f"is for the formats {', '.join(takers)} alone; give --formats"
        raise reject("dtype", dtype, legal)
    for form in map(FORMATS.__getitem__, formats):
        form.check_packages("formats")


def _write(form: Format, folder: Path, subject: verify.Subject) -> dict[str, Any]:
    """Writes one format, which gets its name if it passes its check; returns that."""
    if folder.exists() and not (folder / CHECK).exists():
        raise reject("formats", folder.name, f"{folder} is not an export; move it away")
    model, task, tokenizer = subject.model, subject.task, subject.tokenizer
    options = {} if subject.dtype == "float32" else {"dtype": subject.dtype}
    with files.new_folder(folder, replace=True) as partial:
        form.write(partial, model.params, model.config, subject.labels, **options)
        check = form.check(form, partial, subject)
        source = {"field": "model", "path": str(folder.parent)}
        cut = {"max_length": task.max_length}
        tokenizers.write(tokenizer, partial, model.config, **cut, **source)
        exact = subject.dtype == "float32" and not form.lossy
        verify.run_card(form, partial, model, task, tokenizer, exact=exact)
        check |= {"weights": subject.dtype} | form.facts(model.config)
        if not tokenizer.is_fast:
            check["tokenizer"] = f"{type(tokenizer).__name__}, in Python"
        check |= verify.files(partial)
        files.write_json(partial / CHECK, check)
    return check


def _read_check(path):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):  # There is none, or it is not ours.
        return {}


def write_card(path: Path) -> None:
    """Writes the `README.md` of the saved model, from what lies beside it."""
    config, spec, about = saved_model.read_about(path)
    found = {name: _read_check(path / name / CHECK) for name in ("", *FORMATS)}
    checks = {name: check for name, check in found.items() if check}
    card = model_card.text(config, about, checks, CARDS)
    files.write_atomically(path / "README.md", card)
