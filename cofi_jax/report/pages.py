"""The reports that people look at: `report.md` and `report.html`, `compare.html`.

    python -m cofi_jax.report runs/sst2-0.60 runs/sst2-0.95 --to runs/compared

writes `compare.html`, `tradeoff.png` and `structures.png`. A page is a single file that
refers to no other, so it can be sent to someone and read without a network.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from cofi_jax import commands, files
from cofi_jax import config as config_lib
from cofi_jax.errors import reject
from cofi_jax.report import compare, figures, html, tables
from cofi_jax.report.html import Chart
from cofi_jax.report.tables import Report, escape

_USAGE = "python -m cofi_jax.report RUN [RUN ...] --to FOLDER"
_PICTURES = {"tradeoff.png": compare.plot_trades, "structures.png": compare.plot_kept}
_PAGE, _GENERATOR = "compare.html", "cofi-jax compare"
_COLUMNS = 8  # the most configs in one heat map of a page


def markdown(report: Report, metrics: Sequence[dict[str, Any]], config: str) -> str:
    """The text of a run's `report.md`, which shows the pictures beside it.

    Args:
      report: the content of its `report.json`.
      metrics: the lines of its `metrics.jsonl`.
      config: its `config.json`.
    """
    heads, widths = (report["kept"][key] for key in ("heads", "intermediate"))
    layers = str(tables.layers(report))
    stages = tables.stages(metrics, _least(report, config))
    code = f"```json\n{config.strip()}\n```"
    return f"""# {escape(report["task"])}: {tables.percent(report["sparsity"])} pruned

{tables.headline(report)}

{_key_figures(report)}

## Dense and pruned

{tables.comparison(report)}

## What is left

{sum(map(bool, heads))} of {len(heads)} attention blocks and \
{sum(map(bool, widths))} of {len(widths)} feed-forward blocks are left; hidden \
width {report["kept"]["hidden"]} of {report["dense"]["hidden"]}.

![What is left of each layer](structure.png)

{tables.folded("The same as a table", layers)}

## How the run went

![Sparsity, multipliers and losses while pruning](sparsity.png)

{stages}

## How it was measured

{_method(report)}

## Config

{tables.folded("The exact config of this run", code)}
"""


def _key_figures(report):
    """The figures that matter most, and what each of them is."""
    dense, pruned = report["teacher"]["score"], report["pruned"]["score"]
    encoder, total = (
        f"{tables.count(pair['dense'])} → {tables.count(pair['pruned'])}"
        for pair in (report["params"]["encoder"], report["params"]["total"])
    )
    return f"""\
- **{dense:.3f} → {pruned:.3f}** {escape(report["metric"])}, dense to pruned: \
{pruned - dense:+.4f}
- **{tables.percent(report["sparsity"])}** sparsity, target \
{tables.percent(report["target_sparsity"])}
- **{report["speedup"]:.1f}x** speedup, {tables.spread(report)} in 90 % of the \
turns; {escape(tables.where(report))}
- **{encoder}** encoder parameters; with all others {total}"""


def _method(report):
    """How each of the figures was measured, and on what."""
    seconds, versions = report["seconds"].items(), report["versions"].items()
    return f"""\
- **Score:** The {escape(report["metric"])} on the validation set, the first one \
where there are several. Dense is the teacher, pruned the sliced model after \
fine-tuning.
- **Encoder parameters:** The weights and biases of attention and feed-forward \
blocks; sparsity is the fraction of them that was removed. All parameters are those \
and embeddings, LayerNorms, pooler and head.
- **Latency:** The median of the passes. Both models took turns in one process after \
warming up, {report["benchmark"]["repeats"]} turns each, of at least 50 ms (less the \
first pass) or one pass; all turns weigh the same. Timed on \
{escape(tables.where(report))}.
- **Speedup:** The median of the ratios turn by turn, with their 5th and 95th \
percentile in brackets.
- **Slicing:** Evaluated in float32 on the validation set, the logits of the masked \
and the sliced model differ by at most {report["masked_vs_sliced_max_abs_diff"]:.1e}.
- **Time:** {", ".join(f"{stage} {time / 60:.1f} min" for stage, time in seconds)}
- **Seed:** {report["seed"]}
- **Versions:** {escape(", ".join(f"{name} {v}" for name, v in versions))}"""


def _least(report, config):
    """The sparsity from which on an evaluation of the pruning stage counted."""
    epsilon = config_lib.flatten(config).get("prune.sparsity_epsilon", 0.0)
    return report["target_sparsity"] - epsilon


def run_page(report: Report, metrics: Sequence[dict[str, Any]], config: str) -> str:
    """The text of a run's `report.html`: its `markdown`, with larger pictures."""
    charts = {
        "structure.png": _structure(report),
        "sparsity.png": _curves(report, metrics, _least(report, config)),
    }
    text = markdown(report, metrics, config)
    return html.page(text, charts, generator="cofi-jax")


def _structure(report):
    layers = tables.layers(report).rows
    charts = []
    for column, (key, title) in enumerate(
        (("heads", "Attention heads"), ("intermediate", "Feed-forward width")), start=1
    ):
        kept = "; ".join(f"layer {row[0]}: {row[column]}" for row in layers)
        height = 1.5 + 0.28 * len(layers)
        figure = figures.small(figures.width_panel, report, key, height=height)
        alt = f"Bar chart of what each layer keeps. {kept}."
        charts.append(Chart(title, figure, alt))
    return charts


def _curves(report, metrics, least):
    expected = [
        line["expected_sparsity"]
        for line in metrics
        if line["stage"] == "prune" and "expected_sparsity" in line
    ]
    reached = f", which ends at {tables.percent(expected[-1])}" if expected else ""
    best = [f"{row[0]} {row[4]}" for row in tables.stages(metrics, least).rows]
    charts = [
        Chart(
            "Sparsity and its target while pruning",
            figures.small(figures.sparsity_panel, metrics, height=3.5),
            f"Line chart over the steps: the expected sparsity{reached}; the exact one "
            "at each evaluation; the target, which rises to "
            f"{tables.percent(report['target_sparsity'])}.",
        ),
        Chart(
            "Lagrange multipliers while pruning",
            figures.small(figures.multiplier_panel, metrics, height=3.5),
            "Line chart over the steps: the linear and the quadratic multiplier.",
        ),
        Chart(
            f"Validation {report['metric']}",
            figures.small(figures.score_panel, metrics, report, least, height=3.5),
            "Line chart of the evaluations of all stages; the best of each: "
            f"{', '.join(best)}.",
        ),
    ]
    for stage, (name, *_) in figures.STAGES.items():
        losses = [x["loss"] for x in metrics if x["stage"] == stage and "loss" in x]
        if losses:
            figure = figures.small(figures.loss_panel, metrics, stage, height=3.5)
            alt = "Line chart over the steps: the training loss and its terms; in all "
            alt += f"{losses[0]:.3g} at first and {losses[-1]:.3g} in the end."
            charts.append(Chart(f"Losses, {name}", figure, alt))
    return charts


def compare_page(runs: Sequence[tuple[str, Report]]) -> str:
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
    table = str(compare.runs_table(runs))
    if len(points) < len(runs):
        note = "Means and standard deviations over the seeds."
        parts += ["## Configs", str(compare.configs_table(points)), note]
        parts += [tables.folded("All runs", table)]
    else:
        parts += ["## Runs", table]
    charts = {}
    for task, group in by_task.items():
        address = f"task-{len(charts)}"
        charts[address] = [*_trades(task, group), *_kept(task, group)]
        parts += [f"## {escape(task)}", f"![Charts]({address})"]
    return html.page("\n\n".join(parts), charts, generator=_GENERATOR)


def _trades(task, points):
    height = 3.2 + 0.2 * len(compare.series(points))
    for key, name in (("speedup", "speedup"), ("size", "encoder parameters")):
        of, form = compare.TRADES[key][1], ".1f" if key == "speedup" else ",.0f"
        places = (
            f"{point.name} {point.mean(compare.score):.4f} at {point.mean(of):{form}}"
            for point in points
        )
        figure = figures.small(compare.trade_panel, points, key, height=height)
        alt = f"Chart of {task}: score against {name}. {'; '.join(places)}."
        yield Chart(f"Score against {name}", figure, alt)


def _kept(task, points):
    columns = compare.columns(points)
    for key, title in (
        ("heads", "Attention heads by layer"),
        ("intermediate", "Feed-forward width by layer"),
        ("totals", "In all"),
    ):
        for start in range(0, len(columns), _COLUMNS):
            group = columns[start : start + _COLUMNS]
            height = compare.height(group, key)
            figure = figures.small(compare.kept_panel, group, key, height=height)
            names = ", ".join(name for name, _ in group)
            alt = f"Heat map of {task}: what is kept in the runs {names}."
            yield Chart(title, figure, alt)


def check_folder(folder: pathlib.Path, field: str = "--to") -> None:
    """Raises UserError of `field` where a comparison would replace files of others."""
    page = folder / _PAGE
    marker = html.generator_tag(_GENERATOR).encode()
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
        that are not of an earlier comparison.
    """
    check_folder(folder, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The page comes first, because it marks the pictures as ours.
        files.write_atomically(folder / _PAGE, compare_page(runs))
        for name, plot in _PICTURES.items():
            plot(compare.tasks(runs), folder / name)
    except OSError as error:
        raise _unwritable(folder, field, error) from error
    return [_PAGE, *_PICTURES]


def load_runs(folders: Sequence[pathlib.Path]) -> list[tuple[str, Report]]:
    """The name (see `compare.names`) and the report of each run.

    Raises:
      UserError: a folder is not that of a finished run, or is given twice.
    """
    paths = [pathlib.Path(os.path.realpath(folder)) for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise reject("RUN", str(folder), "is given twice")
    reports = [_load(folder) for folder in folders]
    return list(zip(compare.names(paths, reports), reports, strict=True))


def _load(folder):
    try:
        return tables.read_report(folder / "report.json", "RUN")
    except OSError as error:
        if not os.path.isdir(folder):
            raise reject("RUN", str(folder), "is not a folder") from error
        if not isinstance(error, FileNotFoundError):
            legal = f"its report.json cannot be read ({error.strerror})"
            raise reject("RUN", str(folder), legal) from error
        found = sorted(entry.name for entry in folder.iterdir())
        names = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        legal = f"has no report.json of a finished run; it has: {names or 'nothing'}"
        raise reject("RUN", str(folder), legal) from error


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--to", required=True, type=pathlib.Path)
    found = parser.parse_args(argv[1:])
    names = write_comparison(found.to, load_runs(found.runs))
    print(f"Written to {found.to}: {', '.join(names)}")
    return 0
