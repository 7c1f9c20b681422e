"""Several finished runs side by side: which belong together, tables and pictures.

A run is a name and the content of its `report.json`. Runs of one name, task and target
are seeds of one config, and make one point of a chart and one column of a heat map.
"""

import pathlib
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cofi_jax import files
from cofi_jax.report import figures, tables
from cofi_jax.report.figures import GREY, INK, Chart
from cofi_jax.report.tables import TOTALS, Report, Table, count, percent

Runs = Sequence[tuple[str, Report]]

_COLUMNS = 8  # the most configs in one heat map


class Point(NamedTuple):
    """One config, whose runs differ by their seed alone."""

    name: str
    task: str  # and its metric
    target: float  # a sparsity, or a speedup, see `tables.target`
    reports: list[Report]

    def mean(self, of: Callable[[Report], float]) -> float:
        """The mean over the seeds."""
        return statistics.fmean(map(of, self.reports))

    def sd(self, of: Callable[[Report], float]) -> float:
        """The standard deviation over the seeds, of which there are several."""
        return statistics.stdev(map(of, self.reports))


def score(report: Report) -> float:
    """The score of the pruned model."""
    return report["pruned"]["score"]


def dense_score(report: Report) -> float:
    """The score of the dense model."""
    return report["teacher"]["score"]


# What the score is traded for: the label of the axis, its value, that of the dense
# model, and how a value is written.
TRADES = {
    "speedup": (
        "times as fast as the dense model",
        lambda report: report["speedup"],
        lambda _: 1.0,
        "{:g}x".format,
    ),
    "encoder parameters": (
        "encoder parameters, logarithmic scale",
        lambda report: report["params"]["encoder"]["pruned"],
        lambda report: report["params"]["encoder"]["dense"],
        lambda size: count(size, ".9g"),
    ),
}


# What a heat map shows of the configs: a row for each layer, or one for each total. For
# each, its title and what is counted.
KEPT = {
    "heads": ("Attention heads by layer", "heads"),
    "intermediate": ("Feed-forward width by layer", "FFN width"),
    "totals": ("In all", "counts"),
}


def names(paths: Sequence[pathlib.Path], reports: Sequence[Report]) -> list[str]:
    """The names of the runs in these folders: one for all seeds of a config.

    Runs are seeds of one config if `sweep` named their folders `<config>-seed<n>`, side
    by side, and all but the seed agrees. All other names differ, by as many of the last
    parts of the path as it takes.
    """
    cut = [path.parent / re.sub(r"(?<=.)-seed\d+$", "", path.name) for path in paths]
    keys = ("task", "metric", "dense")

    def alike(path):
        """Whether it is no run itself, and its runs differ by their seed alone."""
        pairs = zip(cut, reports, strict=True)
        group = [report for other, report in pairs if other == path]
        kinds = {
            str([tables.target(report), *(report[key] for key in keys)])
            for report in group
        }
        seeds = {str(report["seed"]) for report in group}
        return path not in paths and len(kinds) == 1 and len(seeds) == len(group)

    pairs = zip(cut, paths, strict=True)
    return files.short_names([short if alike(short) else path for short, path in pairs])


def points(runs: Runs) -> list[Point]:
    """The points of the runs, sorted by target, then as the runs are."""
    found: dict[tuple, Point] = {}
    for name, report in runs:
        key = name, f"{report['task']}: {report['metric']}", tables.target(report)
        found.setdefault(key, Point(*key, [])).reports.append(report)
    return sorted(found.values(), key=lambda point: point.target)


def tasks(runs: Runs) -> dict[str, list[Point]]:
    """The points of each task and metric."""
    by_task: dict[str, list[Point]] = {}
    for point in points(runs):
        by_task.setdefault(point.task, []).append(point)
    return dict(sorted(by_task.items()))


def table(points: Sequence[Point]) -> Table:
    """A row for each config: means over its seeds, and deviations if it has several."""
    rows = [_row(point) for point in points]
    cells = [list(row.values()) for row in rows]
    return Table("<<<>>>>>>>>>>>><", list(rows[0]), cells)


def _row(point):
    """The cells of a row by the title of their column."""
    _, size, dense_size, _ = TRADES["encoder parameters"]
    spreads = [report["speedup_spread"] for report in point.reports]
    dense = point.reports[0]["dense"]
    layers = len(dense["heads"])

    def mean(of, form):
        sd = f" ± {form(point.sd(of))}" if len(point.reports) > 1 else ""
        return f"{form(point.mean(of))}{sd}"

    def kept(total):
        return f"{point.mean(lambda report: TOTALS[total](report['kept'])):.4g}"

    def each(of):
        return ", ".join(dict.fromkeys(str(of(report)) for report in point.reports))

    return {
        "run": point.name,
        "task": each(lambda report: report["task"]),
        "metric": each(lambda report: report["metric"]),
        "dense": mean(dense_score, "{:.4f}".format),
        "pruned": mean(score, "{:.4f}".format),
        "change": f"{point.mean(score) - point.mean(dense_score):+.4f}",
        "sparsity": percent(point.mean(lambda report: report["sparsity"])),
        "speedup": mean(lambda report: report["speedup"], "{:.1f}x".format),
        "target": tables.target_text(point.target, ".1f"),
        "seed": each(lambda report: report["seed"]),
        "speedup, 5th to 95th percentile": tables.spread(
            {"speedup_spread": np.mean(spreads, axis=0)}
        ),
        "encoder parameters": f"{count(point.mean(size))} of "
        f"{count(point.mean(dense_size))}",
        "attention blocks": f"{kept('attention blocks')} of {layers}",
        "FFN blocks": f"{kept('FFN blocks')} of {layers}",
        "hidden width": f"{kept('hidden width')} of {dense['hidden']}",
        "timed on": each(tables.where),
    }


def series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The lines that connect the points of one task.

    If no two configs have the same target, there is one line. Otherwise a line joins
    the runs whose names differ by the target alone, as sst2_60 and sst2_95 do; if that
    would join two of one target (sst2_95, sst2-95), it joins the runs of one name.
    """
    for name_of in (lambda _: "pruned", _without_target, lambda point: point.name):
        lines: dict[str, list[Point]] = {}
        for point in points:
            lines.setdefault(name_of(point), []).append(point)
        if all(len({p.target for p in line}) == len(line) for line in lines.values()):
            break
    return lines


def _without_target(point):
    forms = {f"{point.target:g}", f"{point.target:.2f}", f"{100 * point.target:g}"}
    if point.target > 1:
        forms = {tables.target_text(point.target)}
    choices = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    name = re.sub(rf"[-_,]?(?<![\d.])({choices})(?![\d.])", "", point.name, count=1)
    return name.strip("-_,") or point.name


def columns(points: Sequence[Point]) -> list[tuple[str, Point]]:
    """The points of one task with their titles: line, if there are several; target."""
    lines = series(points)
    return [
        (f"{line} {_target(point)}" if len(lines) > 1 else _target(point), point)
        for line, group in lines.items()
        for point in group
    ]


def _target(point):
    return tables.target_text(point.target)


def trades(points: Sequence[Point]) -> list[Chart]:
    """The score of one task against speedup and against size."""
    charts = []
    for key, (_, of, _, form) in TRADES.items():
        places = (
            f"{point.name} {point.mean(score):.4f} at {form(point.mean(of))}"
            for point in points
        )
        alt = f"Chart of {points[0].task}: score against {key}. {'; '.join(places)}."
        height = 3.2 + 0.2 * len(series(points))
        data = (points, key)
        charts.append(Chart(f"Score against {key}", trade_panel, data, alt, height))
    return charts


def structures(points: Sequence[Point]) -> list[Chart]:
    """What the configs of one task keep, a few of them in each heat map."""
    charts = []
    titled = columns(points)
    for start in range(0, len(titled), _COLUMNS):
        group = titled[start : start + _COLUMNS]
        names = [figures.plain(title) for title, _ in group]
        for key, (title, _) in KEPT.items():
            rows = max(len(_counts(point.reports[0], key)) for _, point in group)
            height = 1.7 + 0.3 * rows + 0.075 * max(map(len, names))
            alt = f"Heat map of {points[0].task}: what is kept in the runs "
            alt += f"{', '.join(title for title, _ in group)}."
            charts.append(Chart(title, kept_panel, (group, key), alt, height))
    return charts


def trade_panel(axes, points: Sequence[Point], key: str) -> None:
    """Draws the scores of one task against speedup or size (paper, figure 2).

    Seeds are pale dots around their mean, whose bars are the standard deviations.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      points: the configs of the task.
      key: a key of `TRADES`.
    """
    label, of, of_dense, form = TRADES[key]
    lines = series(points)
    reports = [report for point in points for report in point.reports]
    dense = sorted({(of_dense(report), dense_score(report)) for report in reports})
    level = statistics.fmean(value for _, value in dense)
    colors = figures.BLUE, figures.RED, figures.GREEN, figures.PURPLE, figures.ORANGE
    axes.axhline(level, color=GREY, ls="--", lw=1, label="_")
    pale = {"ls": "none", "alpha": 0.4, "mew": 0}
    for number, (name, group) in enumerate(lines.items()):
        look = {"color": (*colors, INK)[number % 6], "marker": "osD^vPX"[number % 7]}
        group = sorted(group, key=lambda point: point.mean(of))
        x, y = ([point.mean(what) for point in group] for what in (of, score))
        axes.plot(
            x, y, label=figures.plain(name), lw=1.4, zorder=3, mec="white", ms=7, **look
        )
        for point in (point for point in group if len(point.reports) > 1):
            place = [(of(report), score(report)) for report in point.reports]
            axes.plot(*zip(*place, strict=True), ms=5, label="_", **look, **pale)
            axes.errorbar(
                point.mean(of),
                point.mean(score),
                point.sd(score),
                point.sd(of),
                color=look["color"],
                capsize=2,
                elinewidth=1,
                label="_",
            )
    if len(reports) > len(points):
        axes.plot(
            [], [], "o", color=GREY, label="bars: sd of the seeds; pale: each", **pale
        )
    star = {"ls": "none", "marker": "*", "ms": 13, "color": INK, "mec": "white"}
    axes.plot(*zip(*dense, strict=True), label="dense", **star)
    figures.finish(axes, label, figures.plain(points[0].task))
    axes.margins(0.25, 0.14)  # the targets beside the points need room
    if key == "speedup":
        axes.set_xlim(0, 1.25 * axes.dataLim.xmax)
        axes.xaxis.set_major_formatter(lambda x, _: form(x))
    else:
        figures.log_scale(axes, "x", form)
    if len(lines) == 1:
        _annotate(axes, points, of, side=1 if key == "speedup" else -1)


def _annotate(axes, points, of, side):
    """Writes the targets beside the points that have room, beginning with the last."""
    axes.autoscale_view()
    to_axes = axes.transScale + axes.transLimits
    taken = []
    for point in (points[-1], *points[:-1]):
        place = point.mean(of), point.mean(score)
        x, y = to_axes.transform(place)
        if all(abs(x - a) > 0.13 or abs(y - b) > 0.1 for a, b in taken):
            taken.append((x, y))
            style = {"textcoords": "offset points", "color": INK, "fontsize": 9}
            style["ha"] = "left" if side > 0 else "right"
            axes.annotate(_target(point), place, (6 * side, 5), **style)


def kept_panel(axes, columns: Sequence[tuple[str, Point]], key: str) -> None:
    """Draws what each config keeps (paper, figures 3 and 5), as means over its seeds.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      columns: the titled configs of one task, from `columns`.
      key: a key of `KEPT`.
    """
    from matplotlib.colors import LinearSegmentedColormap  # slow to import

    hue = LinearSegmentedColormap.from_list("kept", ["#F1F5F8", figures.BLUE])
    cells = [np.mean([_counts(r, key) for r in p.reports], axis=0) for _, p in columns]
    size = max(map(len, cells)), len(cells)
    shares = np.full(size, np.nan)  # models may differ in their number of layers
    for column, rows in enumerate(cells):
        for row, (kept, dense) in enumerate(rows):
            share = shares[row, column] = kept / dense if dense else 0.0
            text = f"{kept:.0f}" if kept >= 10 else f"{kept:.2g}"
            ink = "white" if share > 0.55 else INK if kept else GREY
            middle = {"ha": "center", "va": "center", "fontsize": 9}
            axes.text(column, row, text if kept else "\N{EN DASH}", color=ink, **middle)
    edges = (np.arange(n + 1) - 0.5 for n in size[::-1])
    mesh = axes.pcolormesh(*edges, shares, cmap=hue, vmin=0, vmax=1, ec="white", lw=1.5)
    task = columns[0][1].reports[0]["task"]
    ylabel = f"{task}: {'all layers' if key == 'totals' else 'layer'}"
    figures.finish(axes, "run, by target sparsity", figures.plain(ylabel))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    rows = list(TOTALS) if key == "totals" else range(1, size[0] + 1)
    axes.set_yticks(range(size[0]), [textwrap.fill(str(name), 12) for name in rows])
    names = [figures.plain(name) for name, _ in columns]
    turn = {"rotation": 90} if max(map(len, names)) > 7 else {}
    axes.set_xticks(range(size[1]), names, **turn)
    bar = axes.figure.colorbar(mesh, ax=axes, location="top", aspect=40, shrink=0.9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=INK)
    bar.ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    bar.set_label(f"kept share of the dense {KEPT[key][1]}", color=INK)


def _counts(report, key):
    """The kept and the dense count of each row."""
    pair = report["kept"], report["dense"]
    if key == "totals":
        return [[of(widths) for widths in pair] for of in TOTALS.values()]
    return list(zip(*(widths[key] for widths in pair), strict=True))
