"""What saved models, and those of others, are and do: loading, scores, sizes, speed.

A score is of the examples at hand; on others it would be another. How far off, says the
bootstrap: the score of n examples drawn from the n with replacement, again and again.
The draws are the same for every model, so the difference of two models, taken draw by
draw, has its own standard error, smaller than those of the scores where both models
fail on the same examples.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax import (
    benchmark,
    checkpoint,
    inputs,
    loop,
    pretrained,
    sparsity,
    squad,
    stages,
    tasks,
    timing,
    training,
    validation,
)
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import DTYPES, Data, reject
from cofi_jax.metrics import METRICS
from cofi_jax.model import Encoder, EncoderConfig

RESAMPLES = 200
_DESCRIBES_TASK = ("task", "columns", "label_column", "problem", "labels")


class Loaded(NamedTuple):
    """A model, the task it was made for, and the dense sizes it was cut from."""

    path: str
    folder: pathlib.Path
    model: Encoder
    params: dict
    tokenizer: Any
    data: Data
    dense: EncoderConfig


def load(
    paths: Sequence[str],
    *,
    task: str = "",
    labels: Sequence[str] = (),
    dtype: str = "",
) -> list[Loaded]:
    """Saved models, and Hugging Face folders or names, all of one task.

    Args:
      paths: one or more.
      task: of the Hugging Face models; that of the first saved model if not given.
      labels: their classes in their order; () for the task's.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given.

    Raises:
      UserError: for what is neither, and for tasks that do not fit.
    """
    if dtype not in ("", *DTYPES):
        raise reject("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    known = [saved_data(p) if checkpoint.is_model(p) else None for p in paths]
    for flag, value in (("task", task), ("labels", tuple(labels))):
        if value and all(known):
            legal = "is for Hugging Face models; a saved model knows its own"
            raise reject(flag, value, legal)
    data = next(filter(None, known), None)
    if task and not (data and data.task == task):
        data = Data(task=task)
    for path, own in zip(paths, known, strict=True):
        for field in _DESCRIBES_TASK if data else ():
            mine, wanted = (getattr(d or data, field) for d in (own, known[0]))
            if mine != wanted:
                legal = f"its data.{field} is {mine!r}, that of {paths[0]} {wanted!r}"
                raise reject("model", path, f"{legal}; all must be of one task")
    return [
        _load_saved(path, own, dtype) if own else _load_other(path, data, labels, dtype)
        for path, own in zip(paths, known, strict=True)
    ]


def saved_data(path: str) -> Data:
    """The data that a saved model was made for; a UserError where it says none."""
    _, spec, about = checkpoint.read_about(path)
    wanted = {"data"} | ({"dense"} if spec else set())
    if missing := sorted(wanted - about.keys()):
        legal = f"saved without {', '.join(missing)} in `about`, needed here"
        raise reject("model", path, legal)
    data = validation.section(Data, about["data"], field="model", path=path)
    if not tasks.find(data).num_outputs:
        raise reject("model", path, "saved without the names of its classes")
    return data


def _load_saved(path, data, dtype):
    model, params, spec = checkpoint.load_model(path, dtype=dtype)
    dense = model.config
    if spec:
        dense = EncoderConfig.from_json(checkpoint.read_about(path)[2]["dense"])
    tokenizer = checkpoint.load_tokenizer(path)
    folder = pathlib.Path(path).expanduser()
    return Loaded(path, folder, model, params, tokenizer, data, dense)


def _load_other(path, data, labels, dtype):
    folder = pathlib.Path(path).expanduser()
    local = path.startswith((".", "/", "~")) or path.count("/") > 1
    described = (folder / "config.json").exists()
    if (folder.is_dir() or local and not data) and not described:
        checkpoint.read_about(path)  # says what it found instead
    if not data:
        legal = f"must name the task that {path} was made for: {', '.join(tasks.TASKS)}"
        raise reject("task", "", legal)
    row = tasks.find(data)
    folder = pretrained.resolve(path, "model")
    settings = config_lib.Model(dtype=dtype or "float32")
    config, params = pretrained.load_classifier(
        folder,
        field="model",
        problem=row.problem,
        labels=row.labels,
        label_order=tuple(labels),
        model=settings,
    )
    params = jax.tree.map(lambda x: jnp.asarray(x, settings.dtype), params)
    sizes = row.num_outputs, settings, row.problem
    dense = pretrained.read_config(folder, "model", *sizes)
    tokenizer = pretrained.load_tokenizer(folder, "model")
    inputs.check_tokenizer(tokenizer, config, field="model", path=path)
    length = min(row.max_length, config.longest)
    data = dataclasses.replace(data, max_length=length)
    return Loaded(path, folder, Encoder(config), params, tokenizer, data, dense)


def names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, as short as they can be and still differ.

    A path that comes again is numbered.
    """
    here = (pathlib.Path.cwd().name,)  # for "."
    parts = [pathlib.PurePath(path).parts or here for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    ends = ["/".join(p[-depth:]) for p in parts]
    before = [ends[:i].count(end) for i, end in enumerate(ends)]
    return [f"{e} #{n + 1}" if n else e for e, n in zip(ends, before, strict=True)]


class Scored(NamedTuple):
    """What a model reaches, by validation split and metric."""

    values: dict[str, dict[str, float]]
    draws: dict[str, dict[str, np.ndarray]]  # (RESAMPLES,) on resampled examples
    examples: dict[str, int]  # of SQuAD, questions; by split


def scored(loaded: Loaded, task: tasks.Task, columns: dict[str, Any]) -> Scored:
    """The metrics of a model on the splits that `rows.load` read."""
    predict = training.make_predict(loaded.model)
    found = Scored({}, {}, {})
    for split in task.validation:
        examples = data_lib.tokenise(
            columns[split],
            task,
            loaded.tokenizer,
            max_length=tasks.max_length(loaded.data),
        )
        logits = loop.predict_all(
            predict,
            loaded.params,
            {},
            examples,
            batch_size=64,
            buckets=data_lib.bucket_lengths(loaded.data, examples.lengths),
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
        "score": stages.main_score(scored.values),
        "scores": scored.values,
        "standard_errors": each(error(lambda s, m: scored.draws[s][m])),
        "differences": each(gap("values")),
        "difference_errors": each(error(gap("draws"))),
    }


def scorer(
    task: tasks.Task, logits: np.ndarray, examples: data_lib.Examples
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


def disk_bytes(loaded: Loaded) -> int:
    """The size of the files that hold the parameters."""
    if checkpoint.is_model(loaded.folder):
        files = [*(loaded.folder / "params").rglob("*")]
    else:
        files = [*loaded.folder.glob("model.safetensors")]
        files = files or [*loaded.folder.glob("pytorch_model.bin")]
    return sum(file.stat().st_size for file in files if file.is_file())


def sizes(loaded: Loaded, seq_lengths: Sequence[int]) -> dict[str, Any]:
    """Parameters, sparsity, bytes, multiply-adds and widths of a model."""
    config = loaded.model.config
    encoder = sparsity.num_params({}, config)
    return {
        "params": {
            "encoder": encoder,
            "total": sum(x.size for x in jax.tree.leaves(loaded.params)),
        },
        "sparsity": 1 - encoder / sparsity.num_params({}, loaded.dense),
        "bytes": disk_bytes(loaded),
        "multiply_adds": {
            str(length): sparsity.multiply_adds(config, length)
            for length in seq_lengths
        },
        "kept": config.widths(),
    }


def grid(
    models: dict[str, tuple[Any, Any]],
    *,
    batch_sizes: Sequence[int],
    seq_lengths: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """The `grid` of `eval.evaluate`: all models at every batch size and length."""
    found = []
    for batch_size, seq_length in itertools.product(batch_sizes, seq_lengths):
        cell = {"batch_size": batch_size, "seq_length": seq_length}
        timings = benchmark.passes(models, **cell, repeats=repeats)
        first = next(iter(timings.values()))
        for name, each in timings.items():
            ratio, spread = timing.speedup(first, each)
            measured = {
                "model": name,
                "latency_ms": each.median_ms,
                "latency_p95_ms": each.percentile_ms(95),
                "examples_per_second": 1e3 * batch_size / each.median_ms,
                "speedup": ratio,
                "speedup_spread": list(spread),
            }
            found.append(cell | measured)
    return found
