"""Reports to look at: `report.html` of one run, `compare.html` of several.

    python -m cofi_jax.report runs/sst2-0.60 runs/sst2-0.95 --to runs/compared

writes `compare.html`, `tradeoff.png` and `structures.png`. A page is a single file that
asks for no other: it can be sent, and read without a network.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from cofi_jax import config as config_lib
from cofi_jax import files
from cofi_jax.errors import UserError, reject
from cofi_jax.report import compare, figures, html, tables
from cofi_jax.report.compare import Report

_USAGE = "python -m cofi_jax.report RUN [RUN ...] --to FOLDER"


_PICTURES = {"tradeoff.png": compare.plot_trades, "structures.png": compare.plot_kept}


_PAGE, _GENERATOR = "compare.html", "cofi-jax compare"


_COLUMNS = 8  # configs in one heat map, on a page


def run_page(report: Report, metrics: Sequence[dict[str, Any]], config: str) -> str:
    """The text of a run's `report.html`.

    Args:
      report: the content of its `report.json`.
      metrics: the lines of its `metrics.jsonl`.
      config: its `config.json`.
    """
    sparsity = f"{100 * report['sparsity']:.1f} %"
    title = f"{report['task']}: {sparsity} pruned"
    columns, fold = ("", "dense", "pruned", "note"), "The exact config of this run"
    # Evaluations of the pruning stage count from here on, as they did in the run.
    epsilon = config_lib.flatten(config).get("prune.sparsity_epsilon", 0.0)
    least = report["target_sparsity"] - epsilon
    stages = tables.stages(metrics, least)
    body = (
        html.title(title),
        html.paragraph(
            f"{sparsity} of the encoder's parameters are gone; the model runs "
            f"{report['speedup']:.1f} times as fast, with {report['metric']} "
            f"{report['pruned']['score']:.4f} where the dense one has "
            f"{report['teacher']['score']:.4f}."
        ),
        html.tiles(tables.headline(report)),
        html.section(
            "Dense and pruned",
            html.table(
                "Dense and pruned", columns, tables.comparison(report), words=[3]
            ),
        ),
        html.section("What is left", *_structure(report)),
        html.section("While pruning", _pruning(report, metrics)),
        html.section(
            "Stage by stage",
            _stages(report, metrics, least, stages),
            html.table("The stages", tables.STAGES, stages),
        ),
        html.section("How it was measured", html.facts(tables.method(report))),
        html.section("Config", html.folded(fold, html.code(config))),
    )
    return html.document(title, body, generator="cofi-jax")


def _structure(report):
    rows = tables.layers(report)
    heads, widths = (report["kept"][key] for key in ("heads", "intermediate"))
    yield html.paragraph(
        f"{sum(map(bool, heads))} of {len(rows)} attention blocks and "
        f"{sum(map(bool, widths))} of {len(rows)} feed-forward blocks are left; hidden "
        f"width {report['kept']['hidden']} of {report['dense']['hidden']}."
    )
    pictures = []
    for column, (key, title) in enumerate(
        (("heads", "Attention heads"), ("intermediate", "Feed-forward width")), start=1
    ):
        said = "; ".join(f"layer {row[0]}: {row[column]}" for row in rows)
        height = 1.5 + 0.28 * len(rows)
        figure = figures.small(figures.width_panel, report, key, height=height)
        alt = f"Bar chart of what each layer keeps. {said}."
        pictures.append(html.chart(title, figure, alt))
    yield html.charts(*pictures)
    head = ("layer", "heads", "feed-forward width")
    table = html.table("What each layer keeps", head, rows)
    yield html.folded("The same as a table", table)


def _pruning(report, metrics):
    lines = [line for line in metrics if line["stage"] == "prune"]
    ends = [line["expected_sparsity"] for line in lines if "expected_sparsity" in line]
    reached = f", which ends at {100 * ends[-1]:.1f} %" if ends else ""
    return html.charts(
        html.chart(
            "Sparsity and its target",
            figures.small(figures.sparsity_panel, metrics),
            f"Line chart over the steps: the expected sparsity{reached}; the exact one "
            "at each evaluation; the target, which rises to "
            f"{100 * report['target_sparsity']:.1f} %.",
        ),
        html.chart(
            "Lagrange multipliers",
            figures.small(figures.multiplier_panel, metrics),
            "Line chart over the steps: the linear and the quadratic multiplier.",
        ),
    )


def _stages(report, metrics, least, stages):
    said = [f"{row[0]} {row[4]}" for row in stages]
    pictures = [
        html.chart(
            f"Validation {report['metric']}",
            figures.small(figures.score_panel, metrics, report, least, height=3.5),
            "Line chart of the evaluations of all stages; the best of each: "
            f"{', '.join(said)}.",
        )
    ]
    for stage, (name, *_) in figures.STAGES.items():
        losses = [x["loss"] for x in metrics if x["stage"] == stage and "loss" in x]
        if losses:
            figure = figures.small(figures.loss_panel, metrics, stage, height=3.5)
            alt = "Line chart over the steps: the training loss and its terms; in all "
            alt += f"{losses[0]:.3g} at first and {losses[-1]:.3g} in the end."
            pictures.append(html.chart(f"Losses, {name}", figure, alt))
    return html.charts(*pictures)


def compare_page(runs: Sequence[tuple[str, Report]]) -> str:
    """The text of `compare.html`.

    Args:
      runs: the name and the content of the `report.json` of each, at least one; those
        of one name, task and target are seeds of one config.
    """
    by_task = compare.tasks(runs)
    points = [point for group in by_task.values() for point in group]
    rows = [tables.run(*run) for run in runs]
    names = ", ".join(sorted({report["task"] for _, report in runs}))
    title = f"{len(runs)} pruned model{'s' if len(runs) > 1 else ''}: {names}"
    body = [html.title(title)]
    places = {tables.where(report) for _, report in runs}
    timed = f"Timed on {', '.join(places)}."
    if len(places) > 1:
        timed = "The models were not all timed in the same way, as the last column of "
        timed += "the table says, so their speedups should not be compared directly."
    body.append(html.paragraph(timed))
    words = [tables.RUNS.index(name) for name in ("task", "metric", "timed on")]
    table = html.table("Runs", tables.RUNS, rows, words=words)
    if len(points) < len(runs):
        means = map(tables.seeds, points)
        note = "Means and standard deviations over the seeds."
        body.append(
            html.section(
                "Configs",
                html.table("Configs", tables.SEEDS, means, words=[1]),
                html.paragraph(note, quiet=True),
                html.folded("All runs", table),
            )
        )
    else:
        body.append(html.section("Runs", table))
    for task, group in by_task.items():
        body.append(html.section(task, _trades(task, group), _kept(task, group)))
    return html.document(title, body, generator=_GENERATOR)


def _trades(task, points):
    height = 3.2 + 0.2 * len(compare.series(points))
    pictures = []
    for key, what in (("speedup", "speedup"), ("size", "encoder parameters")):
        of, form = compare.TRADES[key][1], ".1f" if key == "speedup" else ",.0f"
        said = (
            f"{point.name} {point.mean(compare.score):.4f} at {point.mean(of):{form}}"
            for point in points
        )
        figure = figures.small(compare.trade_panel, points, key, height=height)
        alt = f"Chart of {task}: score against {what}. {'; '.join(said)}."
        pictures.append(html.chart(f"Score against {what}", figure, alt))
    return html.charts(*pictures)


def _kept(task, points):
    pictures, columns = [], compare.columns(points)
    for key, title in (
        ("heads", "Attention heads by layer"),
        ("intermediate", "Feed-forward width by layer"),
        ("totals", "In all"),
    ):
        for start in range(0, len(columns), _COLUMNS):
            group = columns[start : start + _COLUMNS]
            height = compare.height(group, key)
            figure = figures.small(compare.kept_panel, group, key, height=height)
            said = ", ".join(name for name, _ in group)
            alt = f"Heat map of {task}: what is kept in the runs {said}."
            pictures.append(html.chart(title, figure, alt))
    return html.charts(*pictures)


def check_folder(folder: pathlib.Path, field: str = "--to") -> None:
    """A UserError, of `field`, where a comparison would replace files of others."""
    page = folder / _PAGE
    marker = f'<meta name="generator" content="{_GENERATOR}">'.encode()
    try:
        ours = page.exists() and marker in page.read_bytes()
        for name in (_PAGE, *_PICTURES):
            if (folder / name).exists() and not ours:
                legal = f"has a {name} that is not of an earlier comparison"
                raise reject(field, str(folder), legal)
    except OSError as error:
        raise _unwritable(folder, field, error) from error


def _unwritable(folder, field, error):
    legal = f"must be a folder that can be written ({error.strerror})"
    return reject(field, str(folder), legal)


def write_comparison(
    folder: pathlib.Path, runs: Sequence[tuple[str, Report]], field: str = "--to"
) -> list[str]:
    """Writes `compare.html` and its pictures into `folder`; returns their names.

    Raises:
      UserError: the folder, of `field`, cannot be written, or has files of these names
        that are not an earlier comparison.
    """
    check_folder(folder, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The page first: from then on the pictures are known to be ours.
        files.write_atomically(folder / _PAGE, compare_page(runs))
        for name, plot in _PICTURES.items():
            plot(compare.tasks(runs), folder / name)
    except OSError as error:
        raise _unwritable(folder, field, error) from error
    return [_PAGE, *_PICTURES]


def load_runs(folders: Sequence[pathlib.Path]) -> list[tuple[str, Report]]:
    """The name, as of `tables.names`, and the report of each run.

    Raises:
      UserError: a folder is not that of a finished run, or is there twice.
    """
    paths = [pathlib.Path(os.path.realpath(folder)) for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise reject("RUN", str(folder), "stands there twice")
    reports = [_load(folder) for folder in folders]
    return list(zip(tables.names(paths, reports), reports, strict=True))


def _load(folder):
    path = folder / "report.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        if not folder.is_dir():
            raise reject("RUN", str(folder), "is not a folder") from error
        found = sorted(entry.name for entry in folder.iterdir())
        there = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        legal = f"has no report.json of a finished run; it has: {there or 'nothing'}"
        raise reject("RUN", str(folder), legal) from error
    try:
        report = json.loads(text)
    except ValueError as error:
        raise reject("RUN", str(path), f"is damaged: {error}") from error
    try:
        tables.run("", report)
        tables.layers(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        legal = f"is not the report of a run ({type(error).__name__}: {error})"
        raise reject("RUN", str(path), legal) from error
    return report


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; usage: {_USAGE}")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = _Parser(usage=_USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--to", required=True, type=pathlib.Path)
    try:
        found = parser.parse_args(argv[1:])
        names = write_comparison(found.to, load_runs(found.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {found.to}: {', '.join(names)}")
    return 0
