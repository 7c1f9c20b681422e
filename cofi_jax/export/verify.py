"""Comparisons of an exported model, in its own runtime, with the masked model.

The masked model has the dense one's sizes and hard masks. The logits of both are
compared and scored on the same rows. A pass is timed beside one of the dense model.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from cofi_jax.checkpoints import foreign, saved_model, tokenizers
from cofi_jax.data import batches, sources
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.data.tasks import Task
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.evaluation import timing as timing_lib
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning.masks import Masks
from cofi_jax.report import model_card

if TYPE_CHECKING:
    from cofi_jax.export.base import Format

TOLERANCE = 1e-4  # The largest difference of logits, relative where they exceed 1.


class Model(NamedTuple):
    """A model in one runtime.

    Attributes:
      params: the parameters.
      config: their sizes.
      predict: from a batch to its logits.
      task: of the dense model that is scored beside a pruned one, its task, with the
        settings that were chosen for it.
    """

    params: dict
    config: EncoderConfig
    predict: Callable[[Batch], Any]
    task: Task | None = None


class Validation(NamedTuple):
    """The rows that models are compared on, and the masked model's logits of them."""

    task: Task
    examples: batches.Examples
    split: str
    against: str  # The name of the model whose logits these are.
    logits: np.ndarray  # (N, C), or (N, T, C) where the head reads every token
    judge: str = ""  # The model whose answers are the labels, if there are none.

    @property
    def described(self) -> dict[str, Any]:
        """What `check.json` says of it."""
        found = {"checked_against": self.against, "split": self.split}
        found["rows"] = len(self.examples)
        return found | ({"agreement": self.judge} if self.judge else {})


class Subject(NamedTuple):
    """What each format is made from and compared with.

    Attributes:
      model: the saved model.
      dense: a model of the sizes that it was cut from, or None; it is only timed.
      teacher: the dense model of its run, as it was fine-tuned, or None. Only formats
        that are `lossy` are compared with it.
      rows: the rows of the comparison, and the masked model's logits.
      labels: the names of the classes.
      dtype: the dtype that the weights are stored in.
      sizes: those of the timed passes, the arguments of `time`.
      max_loss: the most that the score of a `lossy` format may fall.
      task: what the model was made for.
      tokenizer: the saved model's.
    """

    model: Model
    dense: Model | None
    teacher: Model | None
    rows: Validation
    labels: Sequence[str]
    dtype: str
    sizes: Mapping[str, int]
    max_loss: float
    task: Task
    tokenizer: Any


def in_jax(params: dict, config: EncoderConfig, masks: Masks | None = None) -> Model:
    """Returns a model that jax runs in float32, with masks or without."""
    config = dataclasses.replace(config, dtype="float32")
    predict = predict_lib.make_predict(Encoder(config))
    arrays = jax.device_put((params, masks or {}))
    return Model(params, config, lambda batch: predict(*arrays, batch))


def params_on_cpu(path: str | Path) -> dict:
    """Loads the parameters of a saved model on the CPU, whatever the first device."""
    cpu = jax.local_devices(backend="cpu")[0]
    sharding = jax.sharding.SingleDeviceSharding(cpu)
    return saved_model.load_model(path, sharding=sharding)[1]


def validation(
    task: Task, tokenizer: Any, num_rows: int, *, field: str, path: str
) -> Callable[..., Validation]:
    """Reads the rows to compare models on, once for all models.

    Args:
      task: where they come from; the first validation split is taken.
      tokenizer: the tokenizer of the models.
      num_rows: how many rows to take; 0, or more than there are, for all of them.
        Windows of longer texts, and the passages of queries, are taken all.
      field: what messages call the tokenizer's folder.
      path: its path, for them.

    Returns:
      A function of a reference model and its name, which adds that model's logits. It
      also takes the teacher or None: where the rows have no labels, the answers of the
      teacher take their place, or else those of the reference model.
    """
    split = task.validation[0]
    task, columns = sources.load(task, (split,))
    examples = task.tokenise(columns[split], tokenizer)
    source = {"field": field, "path": path}
    tokenizers.check_texts(tokenizer, examples, columns[split], task, **source)

    def of(reference, against, teacher=None):
        rows, name = examples, ""
        if task.lacks_labels(columns[split]):
            judge, name = reference, against
            if teacher:
                judge, name = teacher, "the teacher"
            texts = answered(judge, judge.task or task, columns[split], tokenizer)
            rows = task.tokenise(texts, tokenizer)
        rows = chosen(rows, num_rows)
        logits = logits_of(reference.predict, task, rows)
        return Validation(task, rows, split, against, logits, name)

    return of


def chosen(examples: batches.Examples, num_rows: int) -> batches.Examples:
    """As many of the examples as `validation` takes, chosen by chance."""
    if examples.uncut:  # A text is scored by all of its windows, a query likewise.
        return examples
    wanted = min(num_rows, len(examples))
    return batches.first_rows(examples, wanted, field="rows")


def run_card(
    form: "Format",
    folder: Path,
    model: Model,
    task: Task,
    tokenizer: Any,
    *,
    exact: bool = True,
) -> None:
    """Runs the lines of the model card that load a folder, on a text and on a pair.

    Args:
      form: the format of the folder.
      folder: what `form.write` wrote, with its tokenizer.
      model: the model in jax, whose answers these lines must give.
      task: its task, at whose length texts are cut.
      tokenizer: the saved model's tokenizer.
      exact: whether they must do so up to rounding; not where the lines compute in a
        lower precision.

    Raises:
      UserError: where the lines do not run, or give something else.
    """
    one, two = PROBLEMS[model.config.problem].example
    long = f"{two} " * (model.config.longest // 2)
    scope, ran = {}, []
    examples = ((one,), (one, two), (one, long))
    for texts in ((one,), (long,)) if model.config.pooling else examples:
        lines = model_card.snippet(form.card, model.config, texts)
        where = model_card.FOLDER
        lines = lines.replace(f"{where}/{form.name}", str(folder))
        try:
            with tokenizers.quiet():
                found = _result(lines, scope, ran)
        except Exception as error:  # Each runtime has its own ways to fail.
            said = foreign.reason(error)
            legal = f"the lines of its card fail on {len(texts)} texts ({said})"
            raise reject("formats", form.name, f"{legal}; not written") from error
        expected = _answer(model, task, tokenizer, texts)
        same = found.shape == expected.shape
        if same and exact:
            scale = max(1.0, float(np.abs(expected).max()))
            same = np.abs(found - expected).max() <= TOLERANCE * scale
        if not same:
            legal = "the lines of its card give something else than the saved model"
            raise reject("formats", form.name, f"{legal}; not written")


def _result(lines, scope, ran):
    """What the last line of a program would print, as one array of logits.

    The statements that it begins with like the program before it, which load the model,
    are not run again: `ran` are those of that program, and `scope` holds its variables.
    """
    *before, last = ast.parse(lines).body
    statements = [*map(ast.unparse, before)]
    pairs = itertools.zip_longest(statements, ran)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    for statement in statements[same:]:
        exec(compile(statement, "<card>", "exec"), scope)
    ran[:] = statements
    value = ast.Expression(last.value.args[0])  # what `print` is given
    found = eval(compile(value, "<card>", "eval"), scope)
    if hasattr(found, "start_logits"):
        found = [found.start_logits, found.end_logits]
    found = getattr(found, "logits", found)
    found = found if isinstance(found, list) else [found]
    # PyTorch's tensors may need a gradient, and may be of a dtype that NumPy lacks.
    found = [x.detach().float() if hasattr(x, "detach") else x for x in found]
    arrays = [*map(np.asarray, found)]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, -1)


def _answer(model, task, tokenizer, texts):
    """The logits of one row, cut as `pipeline` cuts rows of a task."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    row = tokenizer(
        *texts,
        truncation=True,
        max_length=min(task.max_length, model.config.longest),
        return_token_type_ids=True,
        return_attention_mask=True,
        verbose=False,
    )
    return np.asarray(model.predict({k: np.array([row[k]], np.int32) for k in names}))


def answered(
    model: Model, task: Task, columns: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """The columns with the model's answers as labels, see `predict.answered`."""

    def of(params, masks, batch):
        return model.predict(batch)

    return predict_lib.answered(of, {}, task, columns, tokenizer, batch_size=32)


def logits_of(
    predict: Callable[[Batch], Any], task: Task, examples: batches.Examples
) -> np.ndarray:
    """Returns the logits of all rows, which the model is given in batches of 32."""

    def of(params, masks, batch):
        return predict(batch)

    return predict_lib.logits(of, {}, task, examples, batch_size=32)


def check(form: "Format", folder: Path, subject: Subject) -> dict[str, Any]:
    """Compares what was written with the masked model, and times it beside the dense.

    See `Format.check`: this is the check of the formats that change nothing.
    """

    def loaded(model, folder):
        return model._replace(predict=form.load(folder))

    model, dense = loaded(subject.model, folder), subject.dense
    found = compare(form.name, model, subject.rows)
    if not dense:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        # Its name is known: transformers caches code under names of folders.
        scratch = Path(scratch) / "dense"
        scratch.mkdir()
        options = {} if subject.dtype == "float32" else {"dtype": subject.dtype}
        form.write(scratch, dense.params, dense.config, subject.labels, **options)
        packages = form.packages or ("jax",)
        dense = loaded(dense, scratch)
        return found | time(model, dense, packages, **subject.sizes)


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
    task, examples, expected = validation.task, validation.examples, validation.logits
    found = logits_of(model.predict, task, examples)
    worst = float(differences(found, expected, examples).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not worst <= tolerance * scale:
        legal = f"its logits differ from {validation.against}'s by {worst:.1e}; not "
        legal += "written"
        raise reject("formats", name, legal)
    return {
        "format": name,
        **validation.described,
        "max_abs_difference": worst,
        "tolerance": tolerance * scale,
        "scores": task.scores(found, examples),
        "reference_scores": task.scores(expected, examples),
    }


def differences(
    found: np.ndarray, expected: np.ndarray, examples: batches.Examples
) -> np.ndarray:
    """Returns those of two models' logits of all rows, in absolute value."""
    difference = np.abs(found - expected)
    if difference.ndim == 3:  # What a model says of padding is never read.
        for row, length in zip(difference, examples.lengths, strict=True):
            row[length:] = 0
    return difference


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
    how = {"dtype": "float32", **sizes, "repeats": repeats}
    return speed(timings, "pruned", how) | {"versions": versions(packages)}


def speed(
    timings: Mapping[str, timing_lib.Timing], name: str, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the part of `check.json` on the speed of one model on a CPU.

    Args:
      timings: those of models that took turns, by name; the first is the slow one.
      name: the model whose speedup over the first one is told.
      how: the dtype, the sizes and the number of turns.
    """
    ratio, *spread = timing_lib.speedup(next(iter(timings.values())), timings[name])
    device = timing_lib.describe(jax.local_devices(backend="cpu")[0])
    return {
        "speedup": ratio,
        "speedup_spread": spread,
        "latency_ms": {name: each.median_ms for name, each in timings.items()},
        "benchmark": {"device": device, **how},
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the version of each module."""
    return {p: importlib.import_module(p).__version__ for p in packages}


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
