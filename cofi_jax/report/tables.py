"""What came out of a run, from plain data: `report.json`, log and tables.

Everything is written atomically: a reader sees the old file or the new one,
whatever moment the run is killed at.
"""

import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any

from cofi_jax.report import compare, figures
from cofi_jax.report.compare import Point, Report

_TERMINAL = 100  # characters


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


RUNS = (
    "run",
    "task",
    "metric",
    "dense",
    "pruned",
    "change",
    "sparsity",
    "speedup",
    "its 5th to 95th percentile",
    "encoder parameters",
    "attention blocks",
    "FFN blocks",
    "hidden width",
    "target",
    "seed",
    "timed on",
)


SEEDS = ("config", "task", "seeds", "score", "sparsity", "speedup", "target")


STAGES = ("stage", "steps", "time", "examples/s, median", "best score", "last score")


def headline(report: Report) -> list[tuple[str, ...]]:
    """The figures that matter: (name, value, lines of small print...)."""
    before, after = report["teacher"]["score"], report["pruned"]["score"]
    encoder, total = report["params"]["encoder"], report["params"]["total"]
    return [
        (
            report["metric"],
            f"{before:.3f} \N{RIGHTWARDS ARROW} {after:.3f}",
            f"dense to pruned: {after - before:+.4f}",
        ),
        (
            "sparsity",
            percent(report["sparsity"]),
            f"target {percent(report['target_sparsity'])}",
        ),
        (
            "speedup",
            f"{report['speedup']:.1f}x",
            f"{_spread(report)} in 90 % of the turns",
            where(report),
        ),
        (
            "encoder parameters",
            f"{count(encoder['dense'])} \N{RIGHTWARDS ARROW} "
            f"{count(encoder['pruned'])}",
            f"with all others: {count(total['dense'])} to {count(total['pruned'])}",
        ),
    ]


def where(report: Report) -> str:
    """What the latency was measured on."""
    how = report["benchmark"]
    size = f"{how['batch_size']} x {how['seq_length']} tokens"
    return f"{how['device']}, {how['dtype']}, batches of {size}"


def _spread(report):
    return "{:.1f}x to {:.1f}x".format(*report["speedup_spread"])


def comparison(report: Report) -> list[tuple[str, str, str, str]]:
    """(name, dense, pruned, note) of everything that both models have."""
    # Reports of earlier versions have the one score only.
    scores = [
        score_rows(
            model.get("scores") or {"validation": {report["metric"]: model["score"]}}
        )
        for model in (report["teacher"], report["pruned"])
    ]
    rows = []
    for (name, dense), (_, pruned) in zip(*scores, strict=True):
        rows.append((name, f"{dense:.4f}", f"{pruned:.4f}", f"{pruned - dense:+.4f}"))
    if "score_before_finetune" in report["pruned"]:
        before = report["pruned"]["score_before_finetune"]
        note = f"{rows[0][3]}; {before:.4f} before fine-tuning"
        rows[0] = (*rows[0][:3], note)
    counts = [
        (name, *(report["params"][part][model] for model in ("dense", "pruned")))
        for part, name in (
            ("encoder", "encoder parameters"),
            ("total", "all parameters"),
        )
    ]
    counts += [
        (name.replace("\n", " "), of(report["dense"]), of(report["kept"]))
        for name, of in compare.TOTALS.items()
    ]
    for name, dense, pruned in counts:
        left = f"{percent(pruned / dense)} left" if dense else ""
        rows.append((name, f"{dense:,}", f"{pruned:,}", left))
    models, how = ("dense", "pruned"), report["benchmark"]
    gain = f"{report['speedup']:.1f}x as fast ({_spread(report)})"
    latency = [f"{report['latency_ms'][model]:.2f} ms" for model in models]
    rows.append(("latency of a batch", *latency, gain))
    for key, name, form in (
        (
            "latency_spread_ms",
            "5th to 95th percentile",
            "{0[0]:.4g}\N{EN DASH}{0[1]:.4g} ms",
        ),
        ("examples_per_second", "examples per second", "{:,.0f}"),
    ):
        if key in how:
            rows.append((name, *(form.format(how[key][model]) for model in models), ""))
    return rows


def layers(report: Report) -> list[tuple[int, str, str]]:
    """(number, heads, feed-forward width) of each layer."""
    columns = []
    for key in ("heads", "intermediate"):
        pairs = zip(report["kept"][key], report["dense"][key], strict=True)
        columns.append([f"{k} / {full}" if k else "absent" for k, full in pairs])
    return list(zip(range(1, len(columns[0]) + 1), *columns, strict=True))


def stages(
    metrics: Sequence[dict[str, Any]], least: float = 0.0
) -> list[tuple[str, ...]]:
    """The cells of `STAGES` for each stage that ran.

    Args:
      metrics: the lines of `metrics.jsonl`.
      least: the sparsity from which on an evaluation of the pruning stage may be the
        best.
    """
    rows = []
    for stage, (name, *_) in figures.STAGES.items():
        lines = [line for line in metrics if line["stage"] == stage]
        if not lines:
            continue
        values = {
            key: [line[key] for line in lines if key in line]
            for key in ("step", "seconds", "examples_per_second", "score")
        }
        rates, scores = values["examples_per_second"], values["score"]
        able = [line for line in lines if line.get("sparsity", 1.0) >= least]
        best = max((line["score"] for line in able if "score" in line), default=None)
        rows.append(
            (
                name,
                f"{max(values['step']):,}",
                f"{max(values['seconds'], default=0.0) / 60:.1f} min",
                f"{statistics.median(rates):,.0f}" if rates else "-",
                "-" if best is None else f"{best:.4f}",
                f"{scores[-1]:.4f}" if scores else "-",
            )
        )
    return rows


def method(report: Report) -> list[tuple[str, str]]:
    """(what, how) of all that was measured."""
    seconds = (f"{k} {s / 60:.1f} min" for k, s in report["seconds"].items())
    versions = (f"{name} {version}" for name, version in report["versions"].items())
    return [
        (
            "Score",
            f"The {report['metric']} on the validation set, the first one where there "
            "are several. Dense is the teacher, pruned the sliced model after "
            "fine-tuning.",
        ),
        (
            "Encoder parameters",
            "Weights and biases of attention and feed-forward blocks; sparsity is the "
            "fraction of them that was removed. All parameters: those and embeddings, "
            "LayerNorms, pooler and head.",
        ),
        (
            "Latency",
            f"The median. Both models were timed in one process, after warming up, in "
            f"{report['benchmark']['repeats']} turns each, on {where(report)}.",
        ),
        (
            "Speedup",
            "How many times as fast the pruned model is; in brackets the 5th and 95th "
            "percentile of the ratios taken turn by turn.",
        ),
        (
            "Slicing",
            "Evaluated in float32 on the validation set, the logits of the masked and "
            "the sliced model differ by at most "
            f"{report['masked_vs_sliced_max_abs_diff']:.1e}.",
        ),
        ("Time", ", ".join(seconds)),
        ("Seed", str(report["seed"])),
        ("Versions", ", ".join(versions)),
    ]


def names(paths: Sequence[pathlib.Path], reports: Sequence[Report]) -> list[str]:
    """What the runs in these folders are called; seeds of one config alike.

    They are that in `sweep.py`'s folders `<config>-seed<n>` side by side. All others
    differ: by as much of their path as it takes.
    """
    groups: dict[pathlib.Path, list[Report]] = {}
    cut = [path.parent / re.sub(r"(?<=.)-seed\d+$", "", path.name) for path in paths]
    for path, report in zip(cut, reports, strict=True):
        groups.setdefault(path, []).append(report)
    keys = ("task", "metric", "target_sparsity")
    alike = {
        path
        for path, group in groups.items()
        if path not in paths
        and len({str([report[key] for key in keys]) for report in group}) == 1
        and len({str(report["seed"]) for report in group}) == len(group)
    }
    pairs = zip(cut, paths, strict=True)
    parts = [(short if short in alike else path).parts for short, path in pairs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return [str(pathlib.PurePath(*p[-depth:])) for p in parts]


def run(name: str, report: Report) -> tuple[str, ...]:
    """The cells of `RUNS` for one of several runs."""
    dense, pruned = report["teacher"]["score"], report["pruned"]["score"]
    kept = report["kept"]
    blocks = [
        f"{sum(map(bool, kept[key]))} of {len(kept[key])}"
        for key in ("heads", "intermediate")
    ]
    return (
        name,
        report["task"],
        report["metric"],
        f"{dense:.4f}",
        f"{pruned:.4f}",
        f"{pruned - dense:+.4f}",
        percent(report["sparsity"]),
        f"{report['speedup']:.1f}x",
        _spread(report),
        f"{count(report['params']['encoder']['pruned'])} of "
        f"{count(report['params']['encoder']['dense'])}",
        *blocks,
        f"{kept['hidden']} of {report['dense']['hidden']}",
        percent(report["target_sparsity"]),
        str(report["seed"]),
        where(report),
    )


def seeds(point: Point) -> tuple[str, ...]:
    """The cells of `SEEDS` for one config: means, and deviations if there are any."""

    def show(of, form, unit=""):
        text = f"{point.mean(of):{form}}{unit}"
        several = len(point.reports) > 1
        return text + (f" \N{PLUS-MINUS SIGN} {point.sd(of):{form}}" if several else "")

    return (
        point.name,
        point.task,
        str(len(point.reports)),
        show(compare.score, ".4f"),
        percent(point.mean(lambda report: report["sparsity"])),
        show(lambda report: report["speedup"], ".1f", "x"),
        percent(point.target),
    )
