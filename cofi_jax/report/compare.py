"""Several finished runs side by side: which belong together, tables and pictures.

A run is a name and the content of its `report.json`. Runs of one name, task and target
are seeds of one config, and make one point of a chart and one column of a heat map.
"""

import os
import pathlib
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cofi_jax import files
from cofi_jax.report import figures, tables
from cofi_jax.report.figures import GREY, INK
from cofi_jax.report.tables import TOTALS, Report, Table, percent

Runs = Sequence[tuple[str, Report]]


class Point(NamedTuple):
    """One config, whose runs differ by their seed alone."""

    name: str
    task: str  # and its metric
    target: float  # sparsity
    reports: list[Report]

    def mean(self, of: Callable[[Report], float]) -> float:
        """The mean over the seeds."""
        return statistics.fmean(map(of, self.reports))

    def sd(self, of: Callable[[Report], float]) -> float:
        """The standard deviation over the seeds; 0 for a single one."""
        values = list(map(of, self.reports))
        return statistics.stdev(values) if len(values) > 1 else 0.0


# What the score is traded for: the label of the axis, its value, and the dense model's.
TRADES = {
    "speedup": (
        "times as fast as the dense model",
        lambda report: report["speedup"],
        lambda _: 1.0,
    ),
    "size": (
        "encoder parameters, logarithmic scale",
        lambda report: report["params"]["encoder"]["pruned"],
        lambda report: report["params"]["encoder"]["dense"],
    ),
}


def names(paths: Sequence[pathlib.Path], reports: Sequence[Report]) -> list[str]:
    """The names of the runs in these folders: one for all seeds of a config.

    Runs are seeds of one config if `sweep` named their folders `<config>-seed<n>`, side
    by side, and all but the seed agrees. All other names differ, by as many of the last
    parts of the path as it takes.
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
    return files.short_names([short if short in alike else p for short, p in pairs])


def runs_table(runs: Runs) -> Table:
    """A row for each run."""
    rows = []
    for name, report in runs:
        dense, pruned = report["teacher"]["score"], report["pruned"]["score"]
        kept, encoder = report["kept"], report["params"]["encoder"]
        rows.append(
            {
                "run": name,
                "task": report["task"],
                "metric": report["metric"],
                "dense": f"{dense:.4f}",
                "pruned": f"{pruned:.4f}",
                "change": f"{pruned - dense:+.4f}",
                "sparsity": percent(report["sparsity"]),
                "speedup": f"{report['speedup']:.1f}x",
                "its 5th to 95th percentile": tables.spread(report),
                "encoder parameters": f"{tables.count(encoder['pruned'])} of "
                f"{tables.count(encoder['dense'])}",
                **{
                    name: f"{TOTALS[name](kept)} of {len(kept['heads'])}"
                    for name in ("attention blocks", "FFN blocks")
                },
                "hidden width": f"{kept['hidden']} of {report['dense']['hidden']}",
                "target": percent(report["target_sparsity"]),
                "seed": str(report["seed"]),
                "timed on": tables.where(report),
            }
        )
    return Table("<<<>>>>>>>>>>>><", list(rows[0]), [list(r.values()) for r in rows])


def configs_table(points: Sequence[Point]) -> Table:
    """A row for each config: means over its seeds, and deviations if it has several."""

    def show(point, of, form, unit=""):
        sd = f" \N{PLUS-MINUS SIGN} {point.sd(of):{form}}"
        return f"{point.mean(of):{form}}{unit}{sd if len(point.reports) > 1 else ''}"

    rows = [
        (
            point.name,
            point.task,
            str(len(point.reports)),
            show(point, score, ".4f"),
            percent(point.mean(lambda report: report["sparsity"])),
            show(point, lambda report: report["speedup"], ".1f", "x"),
            percent(point.target),
        )
        for point in points
    ]
    head = ("config", "task", "seeds", "score", "sparsity", "speedup", "target")
    return Table("<<>>>>>", head, rows)


def score(report: Report) -> float:
    """The score of the pruned model."""
    return report["pruned"]["score"]


def tasks(runs: Runs) -> dict[str, list[Point]]:
    """The points of each task and metric, sorted by target, then as the runs are."""
    points: dict[tuple, Point] = {}
    for name, report in runs:
        key = (name, f"{report['task']}: {report['metric']}", report["target_sparsity"])
        points.setdefault(key, Point(*key, [])).reports.append(report)
    by_task: dict[str, list[Point]] = {}
    for point in sorted(points.values(), key=lambda point: point.target):
        by_task.setdefault(point.task, []).append(point)
    return dict(sorted(by_task.items()))


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
    choices = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    name = re.sub(rf"[-_,]?(?<![\d.])({choices})(?![\d.])", "", point.name, count=1)
    return name.strip("-_,") or point.name


def trade_panel(axes, points: Sequence[Point], key: str) -> None:
    """Draws the scores of one task against speedup or size (paper, figure 2).

    Seeds are pale dots around their mean, whose bars are the standard deviations.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      points: the configs of the task.
      key: a key of `TRADES`.
    """
    label, of, of_dense = TRADES[key]
    lines = series(points)
    reports = [report for point in points for report in point.reports]
    dense = sorted({(of_dense(r), r["teacher"]["score"]) for r in reports})
    level = statistics.fmean(value for _, value in dense)
    axes.axhline(level, color=GREY, ls="--", lw=1, label="_")
    colors = figures.BLUE, figures.RED, figures.GREEN, figures.PURPLE, figures.ORANGE
    for number, (name, group) in enumerate(lines.items()):
        color, marker = (*colors, INK)[number % 6], "osD^vPX"[number % 7]
        group = sorted(group, key=lambda point: point.mean(of))
        x, y = ([point.mean(what) for point in group] for what in (of, score))
        look = {"color": color, "marker": marker, "mec": "white", "ms": 7}
        axes.plot(x, y, label=figures.plain(name), lw=1.4, zorder=3, **look)
        for point, *place in zip(group, x, y, strict=True):
            if len(point.reports) == 1:
                continue
            bars = {"yerr": point.sd(score), "xerr": point.sd(of), "elinewidth": 1}
            axes.errorbar(*place, color=color, capsize=2, label="_", **bars)
            for report in point.reports:
                dot = {"color": color, "alpha": 0.4, "mew": 0, "ms": 5, "label": "_"}
                axes.plot(of(report), score(report), marker, **dot)
    if len(reports) > len(points):
        look = {"ls": "none", "marker": "o", "color": GREY, "alpha": 0.4, "mew": 0}
        axes.plot([], [], label="bars: sd of the seeds; pale: each", **look)
    look = {"ls": "none", "marker": "*", "ms": 13, "color": INK, "mec": "white"}
    axes.plot(*zip(*dense, strict=True), label="dense", **look)
    figures.finish(axes, label, figures.plain(reports[0]["metric"]))
    axes.margins(0.25, 0.14)  # the targets beside the points need room
    if key == "size":
        figures.log_scale(axes, "x", lambda size: tables.count(size, ".9g"))
    else:
        axes.set_xlim(0, 1.25 * axes.dataLim.xmax)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
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
            text = f"{100 * point.target:.4g} %"
            axes.annotate(text, place, (6 * side, 5), **style)


def kept_panel(axes, columns: Sequence[tuple[str, Point]], key: str) -> None:
    """Draws what each config keeps (paper, figures 3 and 5), as means over its seeds.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      columns: the titled configs of one task, from `columns`.
      key: `heads` or `intermediate` for a row per layer, `totals` for one per total.
    """
    from matplotlib.cm import ScalarMappable  # slow to import
    from matplotlib.colors import LinearSegmentedColormap

    hue = LinearSegmentedColormap.from_list("kept", ["#F1F5F8", figures.BLUE])
    rows = list(range(1, _layers(columns) + 1))
    if key == "totals":
        rows = [textwrap.fill(name, 12) for name in TOTALS]
    for column, (_, point) in enumerate(columns):
        for row, (kept, dense) in enumerate(_cells(point, key)):
            share = kept / dense if dense else 0.0
            box = {"fc": hue(share), "ec": "white", "lw": 1.5}
            axes.bar(column, 1, 1, row - 0.5, **box)
            text = f"{kept:.0f}" if kept >= 10 else f"{kept:.2g}"
            ink = "white" if share > 0.55 else INK if kept else GREY
            middle = {"ha": "center", "va": "center", "fontsize": 9}
            axes.text(column, row, text if kept else "\N{EN DASH}", color=ink, **middle)
    ylabel = "all layers" if key == "totals" else "layer"
    figures.finish(axes, "run, by target sparsity", ylabel)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    names = [figures.plain(name) for name, _ in columns]
    turn = {"rotation": 90} if max(map(len, names)) > 7 else {}
    axes.set_xticks(range(len(columns)), names, **turn)
    bar = axes.figure.colorbar(
        ScalarMappable(cmap=hue), ax=axes, location="top", aspect=40, shrink=0.9
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=INK)
    bar.ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    what = {"heads": "heads", "intermediate": "FFN width", "totals": "counts"}[key]
    bar.set_label(f"kept share of the dense {what}", color=INK)


def columns(points: Sequence[Point]) -> list[tuple[str, Point]]:
    """The points of one task with their titles: the targets, if these all differ."""
    targets = [f"{100 * point.target:.4g} %" for point in points]
    for form in ("{0}", "{1} {0}", "{2}", "{2} {0}"):
        titles = [
            form.format(target, _without_target(point), point.name)
            for point, target in zip(points, targets, strict=True)
        ]
        if len(set(titles)) == len(titles):
            break
    return list(zip(titles, points, strict=True))


def height(columns: Sequence[tuple[str, Point]], key: str) -> float:
    """The inches that a `kept_panel` of these columns needs."""
    names = max(len(figures.plain(name)) for name, _ in columns)
    rows = len(TOTALS) if key == "totals" else _layers(columns)
    return 1.7 + 0.3 * rows + (0.075 * names if names > 7 else 0)


def _layers(columns):
    reports = (report for _, point in columns for report in point.reports)
    return max(len(report["kept"]["heads"]) for report in reports)


def _cells(point, key):
    """The kept and the dense count of each row, as means over the seeds."""
    columns = []
    for report in point.reports:
        pair = report["kept"], report["dense"]
        if key == "totals":
            columns.append([[of(widths) for widths in pair] for of in TOTALS.values()])
        else:
            columns.append(list(zip(*(widths[key] for widths in pair), strict=True)))
    return [
        [statistics.fmean(x) for x in zip(*row, strict=True)]
        for row in zip(*columns, strict=False)
    ]


def plot_trades(by_task: Mapping[str, Sequence[Point]], path: str | os.PathLike):
    """Writes and returns a figure of score against speedup and size, a row per task."""
    lines = max(len(series(points)) for points in by_task.values())
    figure = figures.new_figure(9, (3.3 + 0.2 * lines) * len(by_task))
    rows = figure.subplots(len(by_task), 2, sharey="row", squeeze=False)
    for (task, points), row in zip(by_task.items(), rows, strict=True):
        for axes, key in zip(row, TRADES, strict=True):
            trade_panel(axes, points, key)
        row[0].set_ylabel(figures.plain(task))
        row[1].set_ylabel("")
    return figures.save(figure, path)


def plot_kept(by_task: Mapping[str, Sequence[Point]], path: str | os.PathLike):
    """Writes and returns a figure of what the runs keep, a row for each task."""
    tables = list(map(columns, by_task.values()))
    heights = [height(table, "heads") for table in tables]
    figure = figures.new_figure(8 + 1.3 * max(map(len, tables)), sum(heights))
    rows = figure.subplots(len(by_task), 3, squeeze=False, height_ratios=heights)
    for task, table, row in zip(by_task, tables, rows, strict=True):
        for axes, key in zip(row, ("heads", "intermediate", "totals"), strict=True):
            kept_panel(axes, table, key)
        row[0].set_ylabel(figures.plain(f"{task.partition(':')[0]}: layer"))
    return figures.save(figure, path)
