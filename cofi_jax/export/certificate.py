"""What a lower precision costs and gains: scores, their errors, bytes and latency.

Two models that answer the same rows mostly fail on the same ones. The standard error of
the difference of their scores is therefore that of the differences row by row, which is
smaller than those of the scores themselves:

    d_i = a_i - b_i,    standard error = sqrt(sum_i (d_i - mean d)^2 / (N - 1) / N)

It is so for metrics that are means over the N examples. For others, both models are
scored on the same resampled examples, and it is the standard deviation of the
differences.
"""

import functools
import math
import pathlib
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cofi_jax.data import batches
from cofi_jax.data.tasks import Task
from cofi_jax.evaluation import evaluate, latency, timing
from cofi_jax.export import verify
from cofi_jax.models.bert import Batch
from cofi_jax.report import tables
from cofi_jax.report.tables import escape

# Instructions that multiply 8-bit integers, as Linux calls them on x86 and on ARM.
_FEATURES = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX-INT8",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
# For about so long after a pass, onnxruntime's threads wait for work and use the cores.
_REST_MS = 20.0


class Result(NamedTuple):
    """What a model gives on N rows, and what that is worth.

    Attributes:
      logits: (N, C), or (N, T, C) where the head reads every token.
      scores: each metric, the one that decides first.
      values: (Q,) values of each of the Q examples, for metrics that are their means.
      draws: (RESAMPLES,) values of the other metrics on resampled examples.
      answers: what answers each example, a class or text say; or None for numbers.
      by_class: what `metrics.rates` says of each class; {} where there are none.
    """

    logits: np.ndarray
    scores: dict[str, float]
    values: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    answers: list[Any]
    by_class: dict[str, dict[str, float]]


def result(task: Task, examples: batches.Examples, logits: np.ndarray) -> Result:
    """Scores the logits of all rows."""
    count, score = task.scorer(logits, examples)
    values = task.problem.per_example(logits, examples, task.metrics)
    others = set(task.metrics) - set(values)
    draws = evaluate.resampled(score, count) if others else {}
    decoded = task.problem.decode(logits, examples, task.labels)
    answers = [task.problem.decision(answer) for answer in decoded]
    by_class = task.problem.by_class(logits, examples, task.labels)
    return Result(logits, score(np.arange(count)), values, draws, answers, by_class)


def standard_error(metric: str, before: Result, after: Result) -> float:
    """Returns the standard error of the difference of two models' scores.

    Both are of the same rows. A single row tells nothing of it; then it is 0.
    """
    if metric not in before.values:
        return float(np.std(after.draws[metric] - before.draws[metric], ddof=1))
    differences = after.values[metric].astype(float) - before.values[metric]
    if len(differences) < 2:
        return 0.0
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))


def compare(
    task: Task, examples: batches.Examples, before: Result, after: Result
) -> dict[str, Any]:
    """What changes from one model to another one, on the same rows.

    Returns:
      `differences`         of the scores by metric, after minus before
      `standard_errors`     of these differences, by metric
      `max_abs_difference`  of the logits
      `flips`               the number of examples that get another answer; it is left
                            out where the answers are numbers
      `worst_recall`        the `class` whose recall falls most, and the `change` of
                            its recall; it is left out where there are no classes
    """
    found = {
        "differences": {m: after.scores[m] - before.scores[m] for m in task.metrics},
        "standard_errors": {m: standard_error(m, before, after) for m in task.metrics},
        "max_abs_difference": float(
            verify.differences(after.logits, before.logits, examples).max()
        ),
    }
    if None not in before.answers:
        pairs = zip(before.answers, after.answers, strict=True)
        found["flips"] = sum(one != other for one, other in pairs)
    recalls = {
        name: after.by_class[name]["recall"] - rates["recall"]
        for name, rates in before.by_class.items()
        if rates["count"]
    }
    if recalls:
        worst = min(recalls, key=recalls.__getitem__)
        found["worst_recall"] = {"class": worst, "change": recalls[worst]}
    return found


def loses(task: Task, before: Result, after: Result, max_loss: float) -> bool:
    """Whether the score that decides falls by too much.

    It does where it falls by more than `max_loss` and also by more than two standard
    errors of the difference.
    """
    metric = task.metrics[0]
    fall = before.scores[metric] - after.scores[metric]
    limit = max(max_loss, 2 * standard_error(metric, before, after))
    # A fall that is the limit but for rounding is allowed, and one that is nan is not.
    return not (fall <= limit or math.isclose(fall, limit))


def time(
    models: Mapping[str, Callable[[Batch], Any]],
    vocab_size: int,
    *,
    batch_size: int,
    seq_length: int,
    repeats: int,
    last: str,
) -> dict[str, Any]:
    """Times all models in turn, one sequence at a time and in batches.

    Args:
      models: what gives the logits of a batch, by name; the first is the slow one.
      vocab_size: the tokens that the batches are drawn from.
      batch_size: sequences in a batch (B).
      seq_length: tokens of each (T).
      repeats: the turns of each model.
      last: the model whose speedup over the first one is returned.

    Returns:
      A part of `check.json`: `latency` of one sequence and of batches, each with the
      median, the 5th and the 95th percentile in ms by model; and for batches what
      `verify.speed` says.
    """
    cells, found = [], {}
    for rows in sorted({1, batch_size}):
        sizes = {"batch_size": rows, "seq_length": seq_length}
        batch = jax.device_get(latency.random_batch(vocab_size, **sizes))
        calls = {k: functools.partial(call, batch) for k, call in models.items()}
        timings = timing.side_by_side(calls, repeats=repeats, rest_ms=_REST_MS)
        spreads = {name: each.spread_ms for name, each in timings.items()}
        cells.append(sizes | {"latency_ms": spreads})
        how = {"dtype": "int8", **sizes, "repeats": repeats}
        found = verify.speed(timings, last, how)
    return found | {"latency": cells}


def cpu() -> dict[str, Any]:
    """Names the CPU, its instructions for 8-bit integers and the threads of a pass."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    line = re.search(r"^(?:flags|Features)\s*: (.+)", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    return {
        "name": timing.describe(jax.local_devices(backend="cpu")[0]),
        "machine": platform.machine(),
        "int8": [name for flag, name in _FEATURES.items() if flag in flags],
        "threads": timing.cores(),
    }


def section(check: Mapping[str, Any]) -> str:
    """What the model card says of a `check.json` that holds a certificate."""
    if "certificate" not in check:
        return ""
    found = check["certificate"]
    models, cells = found["models"], check["latency"]
    rows = []
    for name, model in models.items():
        scores = model.get("scores", {})
        rows.append(
            (
                name,
                *(f"{scores[m]:.4f}" if scores else "-" for m in check["scores"]),
                f"{model['bytes'] / 1e6:.1f} MB",
                *(_spread(cell["latency_ms"][name]) for cell in cells),
            )
        )
    times = [f"ms, {cell['batch_size']} x {cell['seq_length']}" for cell in cells]
    head = ("model", *check["scores"], "size", *times)
    by_model = tables.Table("<" + ">" * (len(head) - 1), head, rows)
    metrics = list(check["scores"])
    rows = [
        (
            f"{each['from']} to {each['to']}",
            *(
                f"{each['differences'][m]:+.4f} ({each['standard_errors'][m]:.4f})"
                for m in metrics
            ),
            str(each.get("flips", "-")),
            _recall(each),
            f"{each['max_abs_difference']:.2g}",
        )
        for each in found["changes"]
    ]
    head = ("change", *metrics, "flips", "worst recall", "largest difference")
    by_change = tables.Table("<" + ">" * (len(head) - 1), head, rows)
    return "\n\n".join(
        (
            f"### What int8 costs and gains in `{check['format']}/`",
            f"{by_model}\n\n{by_change}",
            " ".join(_words(check)),
        )
    )


def _words(check):
    """The sentences below the tables."""
    found, where = check["certificate"], check["certificate"]["cpu"]
    yield (
        f"All models answered the same {check['rows']:,} rows of {check['split']}, in "
        "batches of 32. In brackets are the standard errors of the differences, taken "
        "row by row or on the same resampled rows; flips are examples that get another "
        "answer."
    )
    if not all("scores" in model for model in found["models"].values()):
        yield (
            "The dense model was not at hand: a model of its sizes was timed in its "
            "place, which has no score."
        )
    kept = ", ".join(f"`{name}`" for name in found["kept_in_float32"])
    yield (
        f"The products that int8 harms most are kept in float32: {kept}."
        if kept
        else "All products with weights but the classifier's are computed in int8."
    )
    runtime = check["versions"]["onnxruntime"]
    yield (
        f"Latency is the median, and in brackets the 5th and 95th percentile; all "
        f"models were timed in turn by onnxruntime {runtime} with {where['threads']} "
        f"threads on {escape(where['name'])}, whose instructions for int8 are "
        f"{' and '.join(where['int8']) or 'not known'}. On x86, a CPU without VNNI "
        "gains less."
    )


def _spread(figures):
    median, low, high = (f"{x:.1f}" if x >= 10 else f"{x:.2f}" for x in figures)
    return f"{median} ({low} to {high})"


def _recall(change):
    if "worst_recall" not in change:
        return "-"
    worst = change["worst_recall"]
    return f"{worst['change']:+.4f}, {worst['class']}"
