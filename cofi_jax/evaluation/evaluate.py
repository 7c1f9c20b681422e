"""What saved models, and those of others, are and do: loading, scores, sizes, speed.

A score is of the examples at hand; on others it would be another. How far off, says the
bootstrap: the score of n examples drawn from the n with replacement, again and again.
The draws are the same for every model, so the difference of two models, taken draw by
draw, has its own standard error, smaller than those of the scores where both models
fail on the same examples.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import load
from cofi_jax.checkpoints.load import Loaded
from cofi_jax.data import batches, metrics, sources, squad, tasks
from cofi_jax.data.metrics import METRICS
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency
from cofi_jax.evaluation import predict as predict_lib

RESAMPLES = 200


def names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, as short as they can be and still differ.

    A path that comes again is numbered.
    """
    here = pathlib.Path.cwd().name
    ends = files.short_names([p if pathlib.PurePath(p).parts else here for p in paths])
    before = [ends[:i].count(end) for i, end in enumerate(ends)]
    return [f"{e} #{n + 1}" if n else e for e, n in zip(ends, before, strict=True)]


class Scored(NamedTuple):
    """What a model reaches, by validation split and metric."""

    values: dict[str, dict[str, float]]
    draws: dict[str, dict[str, np.ndarray]]  # (RESAMPLES,) on resampled examples
    examples: dict[str, int]  # of SQuAD, questions; by split


def scored(loaded: Loaded, task: tasks.Task, columns: dict[str, Any]) -> Scored:
    """The metrics of a model on the splits that `rows.load` read."""
    predict = predict_lib.make_predict(loaded.model)
    found = Scored({}, {}, {})
    for split in task.validation:
        examples = batches.tokenise(
            columns[split],
            task,
            loaded.tokenizer,
            max_length=tasks.max_length(loaded.data),
        )
        logits = predict_lib.predict_all(
            predict,
            loaded.params,
            {},
            examples,
            batch_size=64,
            buckets=batches.bucket_lengths(loaded.data, examples.lengths),
        )
        if np.isnan(logits).any():
            raise reject("model", loaded.path, "gives logits that are not numbers")
        count, score = scorer(task, logits, examples)
        found.values[split] = score(np.arange(count))
        found.draws[split] = resampled(score, count)
        found.examples[split] = count
    return found


def compared(scored: Scored, first: Scored) -> dict[str, Any]:
    """What `eval.evaluate` says of a model's scores, beside those of the first."""

    def each(rule):
        return {
            split: {metric: float(rule(split, metric)) for metric in values}
            for split, values in scored.values.items()
        }

    def gap(part):
        mine, other = getattr(scored, part), getattr(first, part)
        return lambda split, metric: mine[split][metric] - other[split][metric]

    def error(draws):
        return lambda split, metric: np.std(draws(split, metric), ddof=1)

    return {
        "score": metrics.main_score(scored.values),
        "scores": scored.values,
        "standard_errors": each(error(lambda s, m: scored.draws[s][m])),
        "differences": each(gap("values")),
        "difference_errors": each(error(gap("draws"))),
    }


def scorer(
    task: tasks.Task, logits: np.ndarray, examples: batches.Examples
) -> tuple[int, Callable[[np.ndarray], dict[str, float]]]:
    """The number of examples, and `tasks.scores` as a function of a choice of them."""
    if task.problem == "span":
        questions = examples.questions
        texts = squad.best_answers(logits, questions)
        values = {
            rule.__name__: np.array([*map(rule, texts, questions.answers)])
            for rule in (squad.f1, squad.exact_match)
        }
        return len(texts), lambda rows: {
            name: float(np.mean(value[rows])) for name, value in values.items()
        }
    return len(examples), lambda rows: {
        name: METRICS[name](logits[rows], examples.labels[rows])
        for name in task.metrics
    }


def resampled(
    score: Callable[[np.ndarray], dict[str, float]], count: int
) -> dict[str, np.ndarray]:
    """The score of `count` rows drawn with replacement, the same for every model."""
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
    batch_sizes: Sequence[int] = (),
    seq_lengths: Sequence[int] = (),
    repeats: int = 30,
    dtype: str = "",
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
      batch_sizes: of the timed passes; () for the paper's 128 on a GPU, and on a CPU
        32, or 8 for SQuAD.
      seq_lengths: of the timed passes; () for the paper's 128 on a GPU, 64 on a CPU, or
        384 for SQuAD, or the models' longest input where that is shorter.
      repeats: turns of each model, each of 50 ms or one pass.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given.

    Returns:
      `task`, its `metric` that decides, `data` (where the rows came from) and
      `examples` (their number by split; of SQuAD, questions);

      `models`, of each
        `model`, `name`    the path, and its end, short and unique
        `score`            the metric that decides, on the split that decides
        `scores`           {split: {metric: value}}, as the three that follow
        `standard_errors`  of the scores, over the examples, by bootstrap
        `differences`      of the scores to those of the first model (its own: 0)
        `difference_errors` standard errors of these, both on the same examples
        `params`           `encoder` and `total`
        `sparsity`         the fraction of the dense encoder's parameters removed
        `bytes`            of the parameters' files
        `multiply_adds`    of one sequence, by length
        `kept`             `hidden` width, `heads` and `intermediate` widths by layer

      `grid`, for each batch size, length and model
        `batch_size`, `seq_length`, `model` (its name)
        `latency_ms`, `latency_p95_ms`  median and 95th percentile of a pass
        `examples_per_second`           at the median
        `speedup`, `speedup_spread`     over the first model: median over the turns,
                                        5th and 95th percentile

      `benchmark`: `device`, `dtype`, `matmul_precision`, `repeats`.

    Raises:
      UserError: for a path, data set or length that does not fit.
    """
    paths = [str(path) for path in paths]
    loaded = load.load(paths, task=task, labels=labels, dtype=dtype)
    data = loaded[0].data
    if data_path:
        data = dataclasses.replace(data, path=data_path)
    spans = tasks.find(data).problem == "span"
    shortest = min(loaded, key=lambda one: one.model.config.longest)
    longest = shortest.model.config.longest
    batch_size, seq_length = usual_sizes(spans=spans, longest=longest)
    batch_sizes, seq_lengths = batch_sizes or [batch_size], seq_lengths or [seq_length]
    if max(seq_lengths) > longest:
        legal = f"must be at most {longest}, the positions of {shortest.path}"
        raise reject("seq_length", max(seq_lengths), legal)
    row, columns = sources.load(data, tasks.find(data).validation)

    short_names = names(paths)
    models = {
        name: (one.model, one.params)
        for name, one in zip(short_names, loaded, strict=True)
    }
    found_scores = [scored(one, row, columns) for one in loaded]
    grid = latency.grid(
        models, batch_sizes=batch_sizes, seq_lengths=seq_lengths, repeats=repeats
    )
    return {
        "task": data.task,
        "metric": row.metrics[0],
        "data": data.path or row.hub or data.task,
        "examples": found_scores[0].examples,
        "models": [
            {"model": one.path, "name": name}
            | compared(found, found_scores[0])
            | load.sizes(one, seq_lengths)
            for one, name, found in zip(loaded, short_names, found_scores, strict=True)
        ],
        "grid": grid,
        "benchmark": latency.conditions(models) | {"repeats": repeats},
    }


def usual_sizes(*, spans: bool, longest: int) -> tuple[int, int]:
    """Batch size and length: those of the paper on a GPU, smaller ones on a CPU.

    Args:
      spans: whether the task is SQuAD.
      longest: the most tokens that the models take.
    """
    on_cpu = jax.default_backend() == "cpu"
    batch_size, seq_length = (32, 64) if on_cpu else (128, 128)
    if spans:
        batch_size, seq_length = 8 if on_cpu else 128, 384
    return batch_size, min(seq_length, longest)
