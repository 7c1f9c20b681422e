"""What came out of a run, from plain data: `report.json`, log and tables.

Everything is written atomically: a reader sees the old file or the new one,
whatever moment the run is killed at.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

_TERMINAL = 100  # characters


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Replaces the file at `path`, or leaves it as it was."""
    path = pathlib.Path(path)
    # Beside its destination, because a rename is atomic only in one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one cut off at the end is left out.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    lines = pathlib.Path(path).read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON") from error
    return metrics


class MetricsLog:
    """Appends to a `metrics.jsonl`, one JSON object a line.

    Each line goes to the operating system at once, so a killed run loses at most
    the line it was writing; the next run's `MetricsLog` removes a broken one.
    """

    def __init__(self, path: str | os.PathLike, mirror: Any = None):
        """Opens the log at `path`, new or continued; `mirror`: an `events.Events`."""
        self.path, self._mirror = pathlib.Path(path), mirror
        self._rewrite(read_metrics(path) if self.path.exists() else [])

    def rewind(self, stage: str, step: int) -> float:
        """Forgets the lines of `stage` after `step`, where the stage resumes.

        Lines at `step` itself stay, so a run logs a step before it saves it. A
        stage that starts over passes -1.

        Returns:
          The seconds that the stage had taken at the last line left, or 0.
        """
        lines = [
            line
            for line in read_metrics(self.path)
            if line["stage"] != stage or line["step"] <= step
        ]
        self._rewrite(lines)
        return max(
            (line.get("seconds", 0.0) for line in lines if line["stage"] == stage),
            default=0.0,
        )

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Adds a line; scalars may be Python's, NumPy's or JAX's."""
        line = _line({"stage": stage, "step": step} | values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        if self._mirror:
            self._mirror.write(json.loads(line))

    def _rewrite(self, metrics: Iterable[dict[str, Any]]) -> None:
        write_atomically(self.path, "".join(map(_line, metrics)))
        if self._mirror:
            self._mirror.rewrite(metrics)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, default=lambda scalar: scalar.item()) + "\n"


def table(report: dict[str, Any]) -> str:
    """The `report.json` in `report` as two tables, in GitHub-flavoured markdown."""
    before, after = report["teacher"]["score"], report["pruned"]["score"]
    note = f"{after - before:+.4f}"
    if "score_before_finetune" in report["pruned"]:
        note += f"; {report['pruned']['score_before_finetune']:.4f} before fine-tuning"
    rows = [("", "dense", "pruned", "")]
    rows.append((report["metric"], f"{before:.4f}", f"{after:.4f}", note))
    pair = [score_rows(report[key]["scores"]) for key in ("teacher", "pruned")]
    for (name, dense), (_, pruned) in list(zip(*pair, strict=True))[1:]:
        change = f"{pruned - dense:+.4f}"
        rows.append((name, f"{dense:.4f}", f"{pruned:.4f}", change))
    for part, name in (("encoder", "encoder parameters"), ("total", "all parameters")):
        dense, pruned = (report["params"][part][key] for key in ("dense", "pruned"))
        left = f"{percent(pruned / dense)} left"
        rows.append((name, count(dense), count(pruned), left))
    target = f"target {percent(report['target_sparsity'])}"
    rows.append(("sparsity", "-", percent(report["sparsity"]), target))
    hidden = [str(report[key]["hidden"]) for key in ("dense", "kept")]
    rows.append(("hidden width", *hidden, ""))
    latency = [f"{report['latency_ms'][key]:.2f} ms" for key in ("dense", "pruned")]
    low, high = report["speedup_spread"]
    gain = f"{report['speedup']:.1f}x as fast ({low:.1f}x to {high:.1f}x)"
    rows.append(("latency of a batch", *latency, gain))
    how = report["benchmark"]
    where = (
        f"Latency on {how['device']}, {how['dtype']}, batches of "
        f"{how['batch_size']} x {how['seq_length']} tokens."
    )
    tables = _grid(rows, "<>><"), _grid(_layer_rows(report), ">>>")
    return f"\n\n{where}\n\n".join(tables)


def score_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, float]]:
    """(name, value) of all scores; the split is named where there are several."""
    return [
        (f"{metric}, {split}" if len(scores) > 1 else metric, value)
        for split, values in scores.items()
        for metric, value in values.items()
    ]


def _layer_rows(report: dict[str, Any]) -> list[Sequence[str]]:
    columns = []
    for key in ("heads", "intermediate"):
        pairs = zip(report["kept"][key], report["dense"][key], strict=True)
        columns.append([f"{kept} / {of}" if kept else "-" for kept, of in pairs])
    names = map(str, range(1, len(columns[0]) + 1))
    rows = zip(names, *columns, strict=True)
    return [("layer", "heads kept", "FFN width kept"), *rows]


def _grid(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """A markdown table whose columns also line up on a terminal."""
    columns = []
    for side, column in zip(alignment, zip(*rows, strict=True), strict=True):
        width = max(map(len, column))
        title, *cells = (f"{cell:{side}{width}}" for cell in column)
        rule = "-" * (width - 1) + (":" if side == ">" else "-")
        columns.append((title, rule, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def percent(fraction: float) -> str:
    """`0.953` as `95.3 %`."""
    return f"{100 * fraction:.1f} %"


def count(number: int) -> str:
    """`10_600_000` as `10.6 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * size:  # 999 950 would read 1000.0 k
            return f"{number / size:.1f} {unit}"
    return str(number)


def evaluation(result: dict[str, Any]) -> str:
    """What `eval.py` found, as GitHub-flavoured markdown: a column for each model."""
    models, how = result["models"], result["benchmark"]
    first, several = models[0]["name"], len(models) > 1
    columns = [_evaluation_column(model, reference=first) for model in models]
    names = max(columns, key=len)  # models may differ in layers
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    titles = ["", *(model["name"] for model in models)]
    times = [("batch", "model", "median", "95 %", "examples/s", "speedup")]
    times += [_timing_row(cell, reference=first) for cell in result["grid"]]
    if not several:
        times = [row[:-1] for row in times]
    paths = [f"- {m['name']}: {m['model']}" for m in models if m["name"] != m["model"]]
    counts = " and ".join(map(str, result["examples"].values()))
    scored = f"Scores on {counts} examples ({result['data']}), ± one standard error"
    timed = f"Timed on {how['device']};\n{how['dtype']}, matrix precision "
    timed += f"{how['matmul_precision']}, in {how['repeats']} turns"
    if several:
        scored += f";\ndifferences are those to {first}"
        timed += f" of each model;\nspeedup over {first}: median of the turns, "
        timed += "5th to 95th percentile"
    tables = _fitting([titles, *rows])
    tables += [f"{scored}.", _grid(times, "<<>>>>"[: len(times[0])]), f"{timed}."]
    return "\n\n".join(filter(None, ["\n".join(paths), *tables]))


def _evaluation_column(model, reference):
    cells = {}
    keys = ("scores", "standard_errors", "differences", "difference_errors")
    for found in zip(*(score_rows(model[key]) for key in keys), strict=True):
        name, (score, error, gap, its_error) = found[0][0], [v for _, v in found]
        cells[name] = f"{score:.4f} ± {error:.4f}"
        gap = f"{gap:+.4f} ± {its_error:.4f}"
        cells[f"{name}, difference"] = "-" if model["name"] == reference else gap
    cells["encoder parameters"] = count(model["params"]["encoder"])
    cells["all parameters"] = count(model["params"]["total"])
    cells["sparsity"] = percent(model["sparsity"])
    cells["on disk"] = f"{model['bytes'] / 1e6:.1f} MB"
    for length, products in model["multiply_adds"].items():
        cells[f"multiply-adds, {length} tokens"] = count(products)
    cells["hidden width"] = str(model["kept"]["hidden"])
    widths = zip(model["kept"]["heads"], model["kept"]["intermediate"], strict=True)
    for layer, (heads, units) in enumerate(widths, start=1):
        cells[f"layer {layer}: heads, FFN"] = f"{heads or 'none'}, {units or 'none'}"
    return cells


def _timing_row(cell, reference):
    low, high = cell["speedup_spread"]
    gain = f"{cell['speedup']:.2f}x ({low:.2f}x to {high:.2f}x)"
    return (
        f"{cell['batch_size']} x {cell['seq_length']}",
        cell["model"],
        *(_milliseconds(cell[key]) for key in ("latency_ms", "latency_p95_ms")),
        f"{cell['examples_per_second']:,.0f}",
        "-" if cell["model"] == reference else gain,
    )


def _milliseconds(number):
    return f"{number:.{3 if number < 1 else 2}f} ms"


def _fitting(rows):
    """The table, cut into several where the columns are too many for a terminal."""
    names, *columns = zip(*rows, strict=True)
    parts = [[names]]
    for column in columns:
        together = [*parts[-1], column]
        width = sum(max(map(len, column)) + 3 for column in together)
        if width < _TERMINAL or len(together) == 2:
            parts[-1] = together
        else:
            parts.append([names, column])
    return [_grid([*zip(*p, strict=True)], "<" + ">" * (len(p) - 1)) for p in parts]


def markdown(report: dict[str, Any], config_json: str) -> str:
    """The text of `report.md`, which shows the pictures that lie beside it."""
    seconds, versions = report["seconds"].items(), report["versions"].items()
    return f"""# Pruned for {report["task"]}

{percent(report["sparsity"])} of the encoder's parameters are gone; the model runs \
{report["speedup"]:.1f}x as fast, with {report["metric"]} \
{report["pruned"]["score"]:.4f} where the dense one has \
{report["teacher"]["score"]:.4f}.

{table(report)}

![What is left of each layer](structure.png)

![Sparsity, multipliers and losses while pruning](sparsity.png)

## How it was measured

- Score: {report["metric"]} on the validation set, the first one where there are \
several; dense is the teacher, pruned the \
sliced model after fine-tuning.
- Encoder parameters: weights and biases of attention and feed-forward blocks. \
Sparsity is the fraction of them that was removed. All parameters: those and \
embeddings, LayerNorms, pooler and head.
- Latency: the median of the passes in {report["benchmark"]["repeats"]} turns, which \
weigh the same, of at least 50 ms (less the first pass) or one pass, both models in \
turn in one process after warming up. \
Speedup: the median of the ratios turn by turn, in brackets their 5th and 95th \
percentile.
- Evaluated in float32 on the validation set, the logits of the masked and the \
sliced model differ by at most \
{report["masked_vs_sliced_max_abs_diff"]:.1e}.
- Time: {", ".join(f"{stage} {time / 60:.1f} min" for stage, time in seconds)}.
- Seed {report["seed"]}; {", ".join(f"{name} {v}" for name, v in versions)}.

<details>
<summary>Config</summary>

```json
{config_json.strip()}
```

</details>
"""
