"""Scores, sizes and speed of several models, saved ones or Hugging Face's, compared.

A score belongs to the examples at hand, and on others it would differ. The bootstrap
estimates by how much: it scores n examples that are drawn from the n with replacement,
again and again. The draws are the same for every model, so that the difference of two
models, taken draw by draw, has a standard error of its own. It is smaller than those of
the scores where both models fail on the same examples.
"""

import dataclasses
import pathlib
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import load, tokenizers
from cofi_jax.checkpoints.load import Loaded
from cofi_jax.data import sources
from cofi_jax.data.metrics import main_score
from cofi_jax.data.problems import Problem
from cofi_jax.data.problems.base import Scorer
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.models.bert import Batch

RESAMPLES = 200

# The fields of `config.Data` that say what is scored, of saved models too.
_OF_ROWS = ("quoting", "pairs", "retrieval")


def names(paths: Sequence[str]) -> list[str]:
    """Names for the paths: their ends, as short as they can be and still differ.

    The second and later copies of a path get a number.
    """
    here = pathlib.Path.cwd().name  # The path "." has no parts.
    ends = files.short_names([p if pathlib.PurePath(p).parts else here for p in paths])
    before = [ends[:i].count(end) for i, end in enumerate(ends)]
    return [f"{e} #{n + 1}" if n else e for e, n in zip(ends, before, strict=True)]


class Scored(NamedTuple):
    """What a model reaches on each validation split, by metric."""

    values: dict[str, dict[str, float]]
    draws: dict[str, dict[str, np.ndarray]]  # (RESAMPLES,) values on resampled examples
    examples: dict[str, int]  # how many: of SQuAD, questions; of a ranking, queries


# Opens a model in another runtime than JAX: writes it into an existing, empty folder,
# and returns the function from a batch, of arrays (B, T), to logits.
Opener = Callable[[Loaded, pathlib.Path], Callable[[Batch], Any]]

JAX: Mapping[str, Opener | None] = types.MappingProxyType({"jax": None})
REST_MS = 50.0  # in which the threads of another runtime stop waiting for work


class Opened(NamedTuple):
    """A model in one of the runtimes."""

    name: str
    loaded: Loaded
    predict: Callable[..., Any]  # of parameters, masks and a batch
    call: Callable[[Batch], Any]
    sizes: dict[str, int]  # what differs from `load.sizes`


def opened(
    models: Mapping[str, Loaded],
    runtimes: Mapping[str, Opener | None],
    folder: pathlib.Path,
) -> list[Opened]:
    """Opens each model in each of the runtimes, which write into the folder."""
    found = []
    for runtime, opener in runtimes.items():
        for number, (name, one) in enumerate(models.items()):
            name = name if runtimes == JAX else f"{name}, {runtime}"
            if opener is None:
                predict = predict_lib.make_predict(one.model)
                call = latency.call(one.model, one.params)
                found.append(Opened(name, one, predict, call, {}))
                continue
            there = folder / f"{runtime}-{number}"
            there.mkdir()
            call = opener(one, there)
            written = [path for path in there.rglob("*") if path.is_file()]
            sizes = {"bytes": sum(path.stat().st_size for path in written)}

            def predict(params, masks, batch, call=call):
                return call(batch)

            found.append(Opened(name, one, predict, call, sizes))
    return found


def answered(opened: Opened, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of all splits, with the model's answers where there are no labels."""
    loaded = opened.loaded
    return {
        split: predict_lib.answered(
            opened.predict,
            loaded.params,
            loaded.task,
            columns[split],
            loaded.tokenizer,
            batch_size=64,
        )
        for split in columns
    }


def scored(opened: Opened, columns: dict[str, Any]) -> Scored:
    """The metrics of a model on the splits that `sources.load` read."""
    loaded, predict, task = opened.loaded, opened.predict, opened.loaded.task
    found = Scored({}, {}, {})
    for split in task.validation:
        examples = task.tokenise(columns[split], loaded.tokenizer)
        source = {"field": "model", "path": loaded.path}
        tokenizers.check_texts(
            loaded.tokenizer, examples, columns[split], task, **source
        )
        logits = predict_lib.logits(
            predict, loaded.params, task, examples, batch_size=64
        )
        if np.isnan(logits).any():
            raise reject("model", loaded.path, "gives logits that are not numbers")
        count, score = task.scorer(logits, examples)
        found.values[split] = score(np.arange(count))
        found.draws[split] = resampled(score, count)
        found.examples[split] = count
    return found


def compared(scored: Scored, first: Scored) -> dict[str, Any]:
    """What `evaluate` says of a model's scores, beside those of the first.

    Returns:
      `score`              the metric that decides, on the split that decides
      `scores`             {split: {metric: value}}, as the three that follow
      `standard_errors`    of the scores, over the examples, by bootstrap
      `differences`        of the scores to those of the first model (its own: 0)
      `difference_errors`  standard errors of these, both on the same examples
    """
    values, draws = scored.values, scored.draws

    def each(rule):
        return {s: {m: float(rule(s, m)) for m in values[s]} for s in values}

    def error(found):
        return np.std(found, ddof=1)

    return {
        "score": main_score(values),
        "scores": values,
        "standard_errors": each(lambda s, m: error(draws[s][m])),
        "differences": each(lambda s, m: values[s][m] - first.values[s][m]),
        "difference_errors": each(lambda s, m: error(draws[s][m] - first.draws[s][m])),
    }


def resampled(score: Scorer, count: int) -> dict[str, np.ndarray]:
    """(RESAMPLES,) values of each metric, on rows drawn alike for every model."""
    draws = [
        score(np.random.default_rng((0, draw)).integers(count, size=count))
        for draw in range(RESAMPLES)
    ]
    return {name: np.array([draw[name] for draw in draws]) for name in draws[0]}


def evaluate(
    paths: Sequence[str],
    *,
    task: str = "",
    labels: Sequence[str] = (),
    data_path: str = "",
    data: Mapping[str, Any] = types.MappingProxyType({}),
    batch_sizes: Sequence[int] = (),
    seq_lengths: Sequence[int] = (),
    repeats: int = 30,
    dtype: str = "",
    runtimes: Mapping[str, Opener | None] = JAX,
) -> dict[str, Any]:
    """What the command prints, as plain data.

    Args:
      paths: folders that `save_model` wrote, Hugging Face folders or names. The others
        are compared with the first one.
      task: of the task table, for the Hugging Face models; that of the first saved
        model if not given.
      labels: the classes of the Hugging Face models in their order; () for the task's.
      data_path: hub name or folder; empty for the one that the first saved model was
        made with.
      data: other fields of `config.Data`. `quoting` says how the files of rows
        are read, `pairs` and `retrieval` what vectors are scored by, and without `task`
        `label_column` where the labels of a task `own` stand, if not where they did in
        training; the rest describes the task of the Hugging Face models.
      batch_sizes: of the timed passes; () for the paper's 128 on a GPU, and on a CPU
        32, or 8 for SQuAD.
      seq_lengths: of the timed passes; () for the paper's 128 on a GPU, 64 on a CPU, or
        384 for SQuAD, or the models' longest input where that is shorter.
      repeats: turns of each model, each of 50 ms or one pass.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given,
        or float32 where there are other runtimes than JAX.
      runtimes: what each model is opened in, by name; None is JAX. The others write
        the model in float32 and run on the CPU.

    Returns:
      `task`, its `metric` that decides, `data` (where the rows came from), `examples`
      (their number by split; of SQuAD, questions; of a ranking, queries), and the
      `grid` of `latency.grid`; `agreement`, where rows have no labels and the answers
      of the first model take their place;
      `models`, of each its path (`model`), the short and unique end of that (`name`),
      and what `compared` and `load.sizes` say;
      `benchmark`: `device`, `dtype`, `matmul_precision`, `repeats`.

    Raises:
      UserError: for a path, data set or length that does not fit.
    """
    paths = [str(path) for path in paths]
    how = {name: data[name] for name in _OF_ROWS if name in data}
    described = {name: value for name, value in data.items() if name not in how}
    label_column = None if task else described.pop("label_column", None)
    if runtimes != JAX:  # A model beside another runtime's is to compute the same.
        dtype = dtype or "float32"
    loaded = load.load(
        paths,
        task=task,
        labels=labels,
        dtype=dtype,
        described=described,
        label_column=label_column,
    )
    loaded = [one._replace(task=_rows_of(one.task, data_path, how)) for one in loaded]
    rows_of = loaded[0].task
    batch_sizes, seq_lengths = _timed_sizes(loaded, batch_sizes, seq_lengths)
    _, columns = sources.load(rows_of, rows_of.validation)
    models = dict(zip(names(paths), loaded, strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        all_opened = opened(models, runtimes, pathlib.Path(scratch))
    columns = answered(all_opened[0], columns)
    scores = [scored(one, columns) for one in all_opened]
    timed = {name: (one.model, one.params) for name, one in models.items()}
    return {
        "task": rows_of.name,
        "metric": rows_of.metrics[0],
        **({"agreement": True} if rows_of.scored_by_answers else {}),
        "data": rows_of.pairs or rows_of.path or rows_of.hub or rows_of.name,
        "examples": scores[0].examples,
        "models": [
            {"model": one.loaded.path, "name": one.name}
            | compared(its_scores, scores[0])
            | load.sizes(one.loaded, seq_lengths)
            | one.sizes
            for one, its_scores in zip(all_opened, scores, strict=True)
        ],
        "grid": latency.grid(
            {one.name: one.call for one in all_opened},
            min(one.model.config.vocab_size for one in loaded),
            batch_sizes=batch_sizes,
            seq_lengths=seq_lengths,
            repeats=repeats,
            rest_ms=0.0 if runtimes == JAX else REST_MS,
        ),
        "benchmark": latency.conditions(timed) | {"repeats": repeats},
    }


def _rows_of(task, path, fields):
    """The task with other rows, which may have metrics of their own."""
    if path and fields.get("pairs"):
        legal = "goes without --config.data.pairs, in whose place it would be read"
        raise reject("data", path, legal)
    task = dataclasses.replace(task, **fields)
    task = task.at(path) if path else task
    return task.problem.described(task)


def _timed_sizes(loaded, batch_sizes, seq_lengths):
    """The sizes of the timed passes, which every model must have the positions for."""
    shortest = min(loaded, key=lambda one: one.model.config.longest)
    longest = shortest.model.config.longest
    batch_size, seq_length = usual_sizes(loaded[0].task.problem, longest)
    batch_sizes, seq_lengths = batch_sizes or [batch_size], seq_lengths or [seq_length]
    if max(seq_lengths) > longest:
        legal = f"must be at most {longest}, the positions of {shortest.path}"
        raise reject("seq_length", max(seq_lengths), legal)
    return batch_sizes, seq_lengths


def usual_sizes(problem: Problem, longest: int) -> tuple[int, int]:
    """Batch size and length of timed passes: the paper's on a GPU, smaller on a CPU.

    Args:
      problem: that of the task.
      longest: the most tokens that the models take.
    """
    on_cpu = jax.default_backend() == "cpu"
    batch_size, seq_length = problem.timed_on_cpu if on_cpu else problem.timed_on_gpu
    return batch_size, min(seq_length, longest)
