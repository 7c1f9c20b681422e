"""Comparisons of an exported model, in its own runtime, with the masked model.

The masked model has the dense one's sizes and hard masks. The logits of both are
compared and scored on the same rows. A pass is timed beside one of the dense model.
"""

import dataclasses
import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax.data import batches, sources
from cofi_jax.data.tasks import Task
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.evaluation import timing as timing_lib
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning.masks import Masks

TOLERANCE = 1e-4  # The largest difference of logits, relative where they exceed 1.


class Model(NamedTuple):
    """A model in one runtime."""

    params: dict
    config: EncoderConfig
    predict: Callable[[Batch], Any]  # The logits of a batch.


class Validation(NamedTuple):
    """The rows that models are compared on, and the masked model's logits of them."""

    task: Task
    examples: batches.Examples
    split: str
    against: str  # The name of the model whose logits these are.
    logits: np.ndarray  # (N, C), or (N, T, C) where the head reads every token


def in_jax(params: dict, config: EncoderConfig, masks: Masks | None = None) -> Model:
    """Returns a model that jax runs in float32, with masks or without."""
    config = dataclasses.replace(config, dtype="float32")
    predict = predict_lib.make_predict(Encoder(config))
    arrays = jax.device_put((params, masks or {}))
    return Model(params, config, lambda batch: predict(*arrays, batch))


def validation(
    task: Task, tokenizer: Any, num_rows: int
) -> Callable[[Model, str], Validation]:
    """Reads the rows to compare models on, once for all models.

    Args:
      task: where they come from; the first validation split is taken.
      tokenizer: the tokenizer of the models.
      num_rows: how many rows to take; 0, or more than there are, for all of them. The
        windows of questions are taken all.

    Returns:
      A function of a reference model and its name, which adds that model's logits.
    """
    split = task.validation[0]
    task, columns = sources.load(task, (split,))
    examples = task.tokenise(columns[split], tokenizer)
    if not examples.questions:  # A question is scored by all of its windows.
        wanted = min(num_rows, len(examples))
        examples = batches.first_rows(examples, wanted, field="rows")

    def of(reference, against):
        logits = _logits(reference, task, examples)
        return Validation(task, examples, split, against, logits)

    return of


def check_tokenizer(tokenizer: Any, original: Any) -> None:
    """Raises UserError where two tokenizers give other ids to a few hard texts."""
    hard = "caf\u00e9 \u4e16\u754c  two  spaces"
    texts = ["", "A text, it's one.", hard, "long " * 600]
    for pair in ((texts,), (texts, texts[::-1])):
        ours, theirs = (each(*pair, verbose=False) for each in (tokenizer, original))
        if ours["input_ids"] != theirs["input_ids"]:
            legal = "as exported gives other ids than the saved model's; not written"
            raise reject("tokenizer", type(original).__name__, legal)


def _logits(model, task, examples):
    def predict(params, masks, batch):
        return model.predict(batch)

    return predict_lib.logits(predict, {}, task, examples, batch_size=32)


def compare(
    name: str, model: Model, validation: Validation, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Compares a model's logits and scores with those of the reference.

    Args:
      name: what the model is called in `check.json`, whose content is returned.
      model: the model as it was loaded.
      validation: the rows and the reference's logits.
      tolerance: the largest difference of logits, relative where they exceed 1.

    Raises:
      UserError: where the logits differ by more than the tolerance.
    """
    task, examples, split, against, expected = validation
    found = _logits(model, task, examples)
    difference = np.abs(found - expected)
    if difference.ndim == 3:  # What a model says of padding is never read.
        for row, length in zip(difference, examples.lengths, strict=True):
            row[length:] = 0
    worst, scale = float(difference.max()), max(1.0, float(np.abs(expected).max()))
    if not worst <= tolerance * scale:
        legal = f"its logits differ from {against}'s by {worst:.1e}; not written"
        raise reject("formats", name, legal)
    return {
        "format": name,
        "checked_against": against,
        "split": split,
        "rows": len(examples),
        "max_abs_difference": worst,
        "tolerance": tolerance * scale,
        "scores": task.scores(found, examples),
        "reference_scores": task.scores(expected, examples),
    }


def time(
    pruned: Model,
    dense: Model,
    packages: Sequence[str],
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
) -> dict[str, Any]:
    """Measures the speedup over the dense model in the same runtime, on a CPU.

    The passes, of (B, T) random tokens, take turns. `packages` are the modules whose
    versions are named in the result, a part of `check.json`.
    """
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    batch = jax.device_get(latency.random_batch(pruned.config.vocab_size, **sizes))
    models = {"dense": dense, "pruned": pruned}
    calls = {k: functools.partial(m.predict, batch) for k, m in models.items()}
    timings = timing_lib.side_by_side(calls, repeats=repeats)
    ratio, *spread = timing_lib.speedup(*timings.values())
    return {
        "speedup": ratio,
        "speedup_spread": spread,
        "latency_ms": {name: each.median_ms for name, each in timings.items()},
        "benchmark": {
            "device": timing_lib.describe(jax.local_devices(backend="cpu")[0]),
            "dtype": "float32",
            **sizes,
            "repeats": repeats,
        },
        "versions": {p: importlib.import_module(p).__version__ for p in packages},
    }


def files(folder: Path, parts: Sequence[str] = (".",)) -> dict[str, Any]:
    """Returns the size and the SHA-256 of every file in these parts of the folder."""
    trees = [[folder / part, *(folder / part).rglob("*")] for part in parts]
    found = sorted(path for tree in trees for path in tree if path.is_file())
    return {
        "bytes": sum(path.stat().st_size for path in found),
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in found
        },
    }
