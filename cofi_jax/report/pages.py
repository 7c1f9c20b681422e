"""The reports that people look at: `report.md` and `report.html`, `compare.html`.

    python -m cofi_jax.report runs/sst2-0.60 runs/sst2-0.95 --to runs/compared

writes `compare.html`, `tradeoff.png` and `structures.png`. A page is a single file that
refers to no other, so it can be sent to someone and read without a network.
"""

import os
import pathlib
from collections.abc import Sequence

from cofi_jax import commands, files
from cofi_jax.errors import printable, reject
from cofi_jax.report import compare, figures, html, tables
from cofi_jax.report.compare import Runs
from cofi_jax.report.tables import Metrics, Report, escape

_USAGE = "python -m cofi_jax.report RUN [RUN ...] --to FOLDER"
_TEMPLATE = pathlib.Path(__file__).with_name("report.md").read_text()
_PAGE, _FAMILY, _TIMES = "compare.html", "family.png", "latency.png"
# The pictures beside it: their charts of one task, and how many stand in a row.
_PICTURES = {
    "tradeoff.png": (compare.trades, 2),
    "structures.png": (compare.structures, 3),
}


def markdown(report: Report, metrics: Metrics, config: str) -> str:
    """The text of a run's `report.md`, which shows the pictures beside it.

    Args:
      report: the content of its `report.json`.
      metrics: the lines of its `metrics.jsonl`.
      config: its `config.json`.
    """
    dense, pruned = report["teacher"]["score"], report["pruned"]["score"]
    encoder, total = (
        f"{tables.count(pair['dense'])} → {tables.count(pair['pruned'])}"
        for pair in (report["params"]["encoder"], report["params"]["total"])
    )
    minutes = (
        f"{name} {time / 60:.1f} min" for name, time in report["seconds"].items()
    )
    versions = (f"{name} {version}" for name, version in report["versions"].items())
    blocks = (
        f"{sum(map(bool, report['kept'][key]))} of {len(report['kept'][key])}"
        for key in ("heads", "intermediate")
    )
    said = tables.headline, tables.drops, tables.agreement
    speedup = "target_speedup" in report
    target = tables.target_text(tables.target(report), ".1f")
    code = f"```json\n{config.strip()}\n```"
    return _TEMPLATE.format(
        report=report,
        task=escape(report["task"]),
        metric=escape(report["metric"]),
        headline=" ".join(filter(None, (sentence(report) for sentence in said))),
        scores=f"{dense:.3f} → {pruned:.3f}",
        change=f"{pruned - dense:+.4f}",
        sparsity=tables.percent(report["sparsity"]),
        target="" if speedup else f", target {target}",
        asked=f", {target} asked for" if speedup else "",
        times=_times(report),
        spread=tables.spread(report),
        where=escape(tables.where(report)),
        encoder=encoder,
        total=total,
        comparison=tables.comparison(report),
        blocks=" attention blocks and ".join(blocks),
        layers=_layers(report),
        stages=tables.stages(metrics),
        family=_family(report),
        classes=_classes(report),
        minutes=", ".join(minutes),
        versions=escape(", ".join(versions)),
        config=tables.folded("The exact config of this run", code),
    )


def _layers(report):
    """The table of the layers, and what is said of two of its columns."""
    table = tables.folded("The same as a table", str(tables.layers(report)))
    return "\n\n".join(filter(None, [table, tables.for_parameters(report)]))


def _family(report):
    """What is said of all models of a run that made several, with a line after it."""
    if not (points := _members(report)):
        return ""
    which = " that keeps the score" if report.get("drop", {}).get("kept") else ""
    return (
        "## All models of this run\n\n"
        f"This page is about the smallest one{which}.\n\n"
        f"![Score against speed and against size]({_FAMILY})\n\n"
        f"{compare.table(points)}\n\n"
    )


def _times(report):
    """What is said of the way to a speedup, with a line after it; or ""."""
    if "target_speedup" not in report:
        return ""
    table, passes = report["target_speedup"]["table"], tables.passes(report)
    rest = (
        f"What cannot be pruned takes {table['overhead_ms']:.3g} ms of the "
        f"{table['dense_ms']:.4g} ms of the dense model, which takes "
        f"{table['additivity']:.3f} times what its parts add up to by this table. A "
        "structure that is chosen by it is measured, and the next one is chosen for a "
        "speedup that is corrected by what the first one missed."
    )
    return (
        "## What a block takes\n\n"
        f"![Milliseconds of a block by the number of its units]({_TIMES})\n\n"
        f"{rest}\n\n" + (f"{passes}\n\n" if passes.rows else "")
    )


def _classes(report):
    """What is said of each class, with a line after it; "" where there are none."""
    table = tables.by_class(report)
    if not table.rows:
        return ""
    return (
        f"## Class by class\n\n{tables.folded('The F1 of each class', str(table))}\n\n"
    )


def _members(report):
    """The models of a run that made several, as points of a comparison."""
    return compare.points([("this run", member) for member in report.get("family", ())])


def run_page(report: Report, metrics: Metrics, config: str) -> str:
    """The text of a run's `report.html`: its `markdown`, with larger pictures."""
    charts = {
        "structure.png": figures.structure(report),
        "sparsity.png": figures.course(report, metrics),
    }
    if "target_speedup" in report:
        charts[_TIMES] = figures.times(report)
    if points := _members(report):
        charts[_FAMILY] = compare.trades(points)
    return html.page(markdown(report, metrics, config), charts)


def write_run(folder: pathlib.Path, report: Report, metrics: Metrics, config: str):
    """Writes `report.md` with its pictures, and `report.html`, into `folder`."""
    figures.plot_structure(report, folder / "structure.png")
    course = figures.course(report, metrics)
    pruning = [chart for chart in course if " pruning" in chart.title]
    # Where no mask was learned, what there is to see are the scores and the recovery.
    figures.save(figures.draw(pruning or course), folder / "sparsity.png")
    if "target_speedup" in report:
        figures.save(figures.draw(figures.times(report), 2), folder / _TIMES)
    if points := _members(report):
        figures.save(figures.draw(compare.trades(points), 2), folder / _FAMILY)
    for name, text_of in (("report.md", markdown), ("report.html", run_page)):
        files.write_atomically(folder / name, text_of(report, metrics, config))


def compare_page(runs: Runs) -> str:
    """The text of `compare.html`.

    Args:
      runs: the name and the content of the `report.json` of each, at least one; those
        of one name, task and target are seeds of one config.
    """
    by_task = compare.tasks(runs)
    points = [point for group in by_task.values() for point in group]
    names = ", ".join(sorted({report["task"] for _, report in runs}))
    places = {tables.where(report) for _, report in runs}
    timed = f"Timed on {', '.join(places)}."
    if len(places) > 1:
        timed = "The models were not all timed in the same way, as the last column of "
        timed += "the table says, so their speedups should not be compared directly."
    parts = [
        f"# {len(runs)} pruned model{'s' if len(runs) > 1 else ''}: {escape(names)}",
        escape(timed),
    ]
    each = str(compare.table([p for run in runs for p in compare.points([run])]))
    if len(points) < len(runs):
        note = "Means and standard deviations over the seeds."
        parts += ["## Configs", str(compare.table(points)), note]
        parts += [tables.folded("All runs", each)]
    else:
        parts += ["## Runs", each]
    charts = {}
    for task, group in by_task.items():
        address = f"task-{len(charts)}"
        charts[address] = [*compare.trades(group), *compare.structures(group)]
        parts += [f"## {escape(task)}", f"![Charts]({address})"]
    return html.page("\n\n".join(parts), charts)


def prepare_folder(folder: pathlib.Path, field: str) -> None:
    """Makes the folder of a comparison, where there is none.

    Raises:
      UserError: of `field`, where it cannot be written, or a comparison would replace
        files of others.
    """
    page, ours = folder / _PAGE, html.GENERATOR.encode()
    try:
        if not (page.exists() and ours in page.read_bytes()):
            for name in (_PAGE, *_PICTURES):
                if (folder / name).exists():
                    legal = f"has a {name} that is not of an earlier comparison"
                    raise reject(field, str(folder), legal)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        legal = f"must be a folder that can be written ({error.strerror})"
        raise reject(field, str(folder), legal) from error


def write_comparison(folder: pathlib.Path, runs: Runs) -> list[str]:
    """Writes `compare.html` and its pictures into a folder, and returns their names.

    The folder is one that `prepare_folder` has found fit.
    """
    # The page comes first, because it marks the pictures as ours.
    files.write_atomically(folder / _PAGE, compare_page(runs))
    for name, (charts_of, columns) in _PICTURES.items():
        tasks = map(charts_of, compare.tasks(runs).values())
        charts = [chart for charts in tasks for chart in charts]
        figures.save(figures.draw(charts, columns), folder / name)
    return [_PAGE, *_PICTURES]


def load_runs(folders: Sequence[pathlib.Path]) -> list[tuple[str, Report]]:
    """The name (see `compare.names`) and the report of each run.

    Raises:
      UserError: a folder is not that of a finished run, or is given twice.
    """
    paths = [pathlib.Path(os.path.realpath(folder)) for folder in folders]
    reports = []
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise reject("RUN", str(folder), "is given twice")
        if not path.is_dir():
            raise reject("RUN", str(folder), "is not a folder")
        try:
            if not (path / "report.json").exists():
                found = sorted(entry.name for entry in path.iterdir())
                names = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
                legal = "has no report.json of a finished run; it has: "
                raise reject("RUN", str(folder), f"{legal}{names or 'nothing'}")
            reports.append(tables.read_report(folder / "report.json", "RUN"))
        except OSError as error:
            legal = f"its report.json cannot be read ({error.strerror})"
            raise reject("RUN", str(folder), legal) from error
    return list(zip(compare.names(paths, reports), reports, strict=True))


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--to", required=True, type=pathlib.Path)
    found = parser.parse_args(argv[1:])
    runs = load_runs(found.runs)
    prepare_folder(found.to, "--to")
    names = write_comparison(found.to, runs)
    print(f"Written to {printable(found.to)}: {', '.join(names)}")
    return 0
