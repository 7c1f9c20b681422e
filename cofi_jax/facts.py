"""What pages say of runs, as rows of text: figures, tables, and how it was measured."""

import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any

from cofi_jax import compare, plots
from cofi_jax import report as report_lib
from cofi_jax.compare import Point, Report
from cofi_jax.report import count, percent

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
        report_lib.score_rows(
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
    for stage, (name, *_) in plots.STAGES.items():
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
