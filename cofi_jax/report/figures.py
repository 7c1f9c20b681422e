"""The pictures of a run: how it went and what it left.

A panel is a function that draws into given axes, and a chart is a panel with its data.
Pages show each chart in a figure of its own, which is still legible on a phone; the PNG
files that lie beside a report show the same charts side by side.
"""

import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cofi_jax.errors import printable
from cofi_jax.files import write_atomically
from cofi_jax.report.tables import (
    Metrics,
    Report,
    kind_of,
    layers,
    percent,
    stages,
    stages_of,
    target,
    target_text,
)

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00".split()
INK, GREY, PALE = "#333333", "#757575", "#E4E8EA"

_STYLE = pathlib.Path(__file__).with_name("figures.mplstyle")
_MANY = 150  # the points of a curve from which on single ones cannot be seen

# The colour and the marker of each kind of stage.
_STAGE_LOOKS = {
    "teacher": (INK, "o"),
    "prepruning": (ORANGE, "s"),
    "prune": (BLUE, "D"),
    "finetune": (GREEN, "^"),
}
_LOSS_COLORS = {
    "loss": INK,
    "loss_lagrangian": ORANGE,
    "loss_layers": BLUE,
    "loss_logits": GREEN,
    "loss_task": PURPLE,
}
_KIND_COLORS = {
    "mha": RED,
    "head": BLUE,
    "ffn": PURPLE,
    "intermediate": ORANGE,
    "hidden": GREEN,
}
_WIDTHS = {
    "heads": ("attention heads", BLUE),
    "intermediate": ("feed-forward width", ORANGE),
}


_BLOCKS = {"attention": _WIDTHS["heads"], "ffn": _WIDTHS["intermediate"]}


class Chart(NamedTuple):
    """A panel with its data, its title, and what it shows in words."""

    title: str
    panel: Callable[..., None]  # takes a `matplotlib.axes.Axes` and the data
    data: tuple
    alt: str
    height: float = 3.5  # inches


def structure(report: Report) -> list[Chart]:
    """What each layer keeps, given the content of a `report.json`."""
    rows = layers(report).rows
    charts = []
    for column, (key, (name, _)) in enumerate(_WIDTHS.items(), start=1):
        kept = "; ".join(f"layer {row[0]}: {row[column]}" for row in rows)
        alt = f"Bar chart of what each layer keeps. {kept}."
        data, height = (report, key), 1.5 + 0.28 * len(rows)
        charts.append(Chart(name.capitalize(), width_panel, data, alt, height))
    return charts


def times(report: Report) -> list[Chart]:
    """What a block takes by the number of its units, by the table of times of a run."""
    charts = []
    for name, block in report["target_speedup"]["table"]["blocks"].items():
        label, color = _BLOCKS.get(name, (f"{name} units", BLUE))
        pairs = zip(block["counts"], block["ms"], strict=True)
        points = "; ".join(f"{units}: {ms:.3g} ms" for units, ms in pairs)
        title = f"Milliseconds of a block by {label}"
        alt = f"Line chart. {title}: {points}."
        charts.append(Chart(title, time_panel, (block, label, color), alt))
    return charts


def time_panel(axes, block: dict[str, Any], label: str, color: str) -> None:
    """Draws the times of one kind of block; no unit takes none.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      block: its `counts` and `ms`.
      label: what is counted.
      color: of the line.
    """
    look = {"marker": "o", "ms": 3.5, "lw": 1.4, "color": color}
    axes.plot([0, *block["counts"]], [0, *block["ms"]], label="_", **look)
    finish(axes, label, "milliseconds of a block")
    axes.yaxis.set_major_formatter("{x:.3g}")


def course(report: Report, metrics: Metrics) -> list[Chart]:
    """How a run went.

    Args:
      report: the content of its `report.json`.
      metrics: the lines of its `metrics.jsonl`.
    """
    best = ", ".join(f"{row[0]} {row[4]}" for row in stages(metrics).rows)
    charts = [
        Chart(
            f"Validation {report['metric']}",
            score_panel,
            (metrics, report),
            f"Line chart of the evaluations of all stages; the best of each: {best}.",
        ),
    ]
    expected = [x["expected_sparsity"] for x in metrics if "expected_sparsity" in x]
    if expected:  # Else no mask was learned.
        reached = f", which ends at {percent(expected[-1])}"
        if lag := _lag(metrics):
            reached += f" and is {lag}"
        removed = "removed time" if "target_speedup" in report else "sparsity"
        title = f"{removed.capitalize()} and its target while pruning"
        alt = f"Line chart over the steps: the expected {removed}{reached}; the exact "
        alt += "one at each evaluation; the target, which rises to "
        alt += f"{target_text(target(report), '.1f')}."
        charts.insert(0, Chart(title, sparsity_panel, (metrics, removed), alt))
    if any("multiplier_linear" in line for line in metrics):
        alt = "Line chart over the steps: the linear and the quadratic multiplier."
        title = "Lagrange multipliers while pruning"
        charts.insert(1, Chart(title, multiplier_panel, (metrics,), alt))
    if any("undecided" in line for line in metrics):
        alt = "Line chart over the steps: the closed fraction of each kind of masks, "
        alt += "and the fraction of all masks that are undecided."
        charts.insert(
            1, Chart("Closed masks while pruning", decision_panel, (metrics,), alt)
        )
    for stage, name in stages_of(metrics).items():
        losses = [x["loss"] for x in metrics if x["stage"] == stage and "loss" in x]
        if losses:
            alt = "Line chart over the steps: the training loss and its terms; in all "
            alt += f"{losses[0]:.3g} at first and {losses[-1]:.3g} in the end."
            charts.append(Chart(f"Losses, {name}", loss_panel, (metrics, stage), alt))
    return charts


def sparsity_panel(axes, metrics: Metrics, removed: str = "sparsity") -> None:
    """Draws the sparsity and its target over the steps in which masks are learned.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      metrics: the lines of `metrics.jsonl`.
      removed: what the sparsity is called.
    """
    lines = _pruning(metrics)
    dots = {"color": RED, "ls": "none", "marker": "o", "mec": "white", "zorder": 4}
    if len(lines) > _MANY:
        dots |= {"ms": 2, "mew": 0}
    label = f"expected, {lag}" if (lag := _lag(metrics)) else "expected"
    _line(axes, lines, "expected_sparsity", label, color=BLUE, lw=2.4)
    _line(axes, lines, "sparsity", "exact, as evaluated", **dots)
    _line(axes, lines, "target_sparsity", "target", color=INK, ls="--")
    finish(axes, "optimizer step of the pruning stage", removed)
    _percent_axis(axes)


def decision_panel(axes, metrics: Metrics) -> None:
    """Draws the closed fraction of each kind over the steps that learn masks."""
    lines = _pruning(metrics)
    for kind, color in _KIND_COLORS.items():
        _line(axes, lines, f"closed_{kind}", kind, color=color)
    _line(axes, lines, "undecided", "undecided, of all", color=INK, ls=":")
    finish(axes, "optimizer step of the pruning stage", "closed fraction of a kind")
    _percent_axis(axes)


def _percent_axis(axes):
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.0f} %")


def multiplier_panel(axes, metrics: Metrics) -> None:
    """Draws the Lagrange multipliers over the steps in which masks are learned."""
    lines = _pruning(metrics)
    _line(axes, lines, "multiplier_linear", "linear", color=GREEN)
    _line(axes, lines, "multiplier_quadratic", "quadratic", color=PURPLE)
    finish(axes, "optimizer step of the pruning stage", "multiplier")


def loss_panel(axes, metrics: Metrics, stage: str = "prune") -> None:
    """Draws the loss and its terms, unweighted, over the steps of a stage.

    A curve of many points is a running mean, over a pale line of what was logged.
    """
    lines = [line for line in metrics if line["stage"] == stage]
    keys = sorted({key for line in lines for key in line if key.startswith("loss")})
    if len(keys) == 2 and all(line.get(keys[0]) == line.get(keys[1]) for line in lines):
        keys = keys[1:]  # the only term equals the total
    many = len(lines) > _MANY
    for key in keys:
        label = "total" if key == "loss" else key.removeprefix("loss_")
        color, window = _LOSS_COLORS.get(key, RED), len(lines) // 50 if many else 1
        if many:
            _line(axes, lines, key, "_", color=color, lw=0.5, alpha=0.25)
        _line(axes, lines, key, label, window, color=color)
    ylabel = "loss, running mean" if many else "loss"
    finish(
        axes,
        f"optimizer step of the {stages_of(lines).get(stage, stage)} stage",
        ylabel,
    )
    if all(line[key] > 0 for line in lines for key in keys if key in line):
        log_scale(axes, "y", "{:g}".format)


def score_panel(axes, metrics: Metrics, report: Report) -> None:
    """Draws validation scores over the steps of all stages, one after another.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      metrics: the lines of `metrics.jsonl`.
      report: the content of `report.json`, which has the dense model's score.

    Evaluations that do not count, as the sparsity is too low, have hollow markers.
    """
    start = 0
    for stage, name in stages_of(metrics).items():
        lines = [line for line in metrics if line["stage"] == stage]
        if start:
            axes.axvline(start, color=GREY, lw=0.8, ls=":", label="_")
        scored = [line for line in lines if "score" in line]
        color, marker = _STAGE_LOOKS[kind_of(stage)]
        look = {"color": color, "marker": marker}
        look["ms"] = 5 if len(scored) <= _MANY // 5 else 2
        early = [line for line in scored if not line.get("counts", 1)]
        hollow = {"ls": "none", "mfc": "white"}
        for group, label, more in (
            (scored, name, {"lw": 1.4}),
            (early, "sparsity too low", hollow),
        ):
            if group:
                points = [(start + line["step"], line["score"]) for line in group]
                axes.plot(*zip(*points, strict=True), label=label, **look, **more)
        start += max(line["step"] for line in lines)
    axes.axhline(report["teacher"]["score"], color=GREY, ls="--", lw=1.4, label="dense")
    finish(axes, "optimizer step, all stages in turn", plain(report["metric"]))


def width_panel(axes, report: Report, key: str) -> None:
    """Draws what each layer keeps of its `key`, which is `heads` or `intermediate`."""
    from matplotlib.patches import Patch  # slow to import

    name, color = _WIDTHS[key]
    kept, dense = report["kept"][key], report["dense"][key]
    end = max(1, *dense)
    looks = {
        "kept": {"fc": color},
        "removed": {"fc": PALE},
        "block absent": {"fc": "none", "ec": "#C3C9CD", "hatch": "////", "lw": 0},
    }
    for layer, (width, full) in enumerate(zip(kept, dense, strict=True), start=1):
        behind = looks["removed" if width else "block absent"]
        axes.barh(layer, full or end, 0.7, **behind)
        axes.barh(layer, width, 0.7, **looks["kept"])
        text, ink = (f"{width} / {full}", INK) if width else ("absent", GREY)
        axes.text(end * 1.03, layer, text, color=ink, va="center")
    handles = [Patch(label=label, **look) for label, look in looks.items()]
    finish(axes, f"{name} kept", "layer", handles)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set(yticks=range(1, len(kept) + 1), xlim=(0, end), ylim=(len(kept) + 0.6, 0.4))
    axes.xaxis.get_major_locator().set_params(nbins=6)


def plot_structure(report: Report, path: str | os.PathLike):
    """Writes the charts of `structure` as a PNG file, and returns the figure.

    Of `report`, the widths `dense` and `kept` are enough.
    """
    figure = draw(structure(report), columns=2)
    kept, dense = (report[model]["hidden"] for model in ("kept", "dense"))
    title = f"What is left: hidden width {kept} of {dense}"
    figure.suptitle(title, color=INK, fontsize=13)
    return save(figure, path)


def draw(charts: Sequence[Chart], columns: int = 1):
    """Returns a `matplotlib.figure.Figure` of the charts, row by row."""
    from matplotlib import style  # slow to import
    from matplotlib.figure import Figure

    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in row) for row in rows]
    with style.context(_STYLE):
        figure = Figure(figsize=(4.6 * columns, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for cell, chart in zip(grid, charts, strict=False):  # rows may end early
            chart.panel(figure.add_subplot(cell), *chart.data)
    return figure


def finish(axes, xlabel: str, ylabel: str, handles: Sequence[Any] = ()) -> None:
    """Gives axes, once all is drawn, their labels and a legend.

    Args:
      axes: the `matplotlib.axes.Axes`.
      xlabel: the label of the x axis, with the unit, where there is one.
      ylabel: likewise, of the y axis.
      handles: the artists that the legend explains; by default the labelled lines.
    """
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles = handles or axes.get_legend_handles_labels()[0]
    if handles:  # above the panel, where it hides nothing
        columns = _columns(axes, [len(handle.get_label()) for handle in handles])
        axes.legend(handles=handles, ncols=columns, bbox_to_anchor=(0, 0.98))


def log_scale(axes, which: str, form: Callable[[float], str]) -> None:
    """Makes an axis, x or y, logarithmic, with ticks that `form` writes out."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    subs = (1,) if high / low > 1e3 else (1, 2, 5)
    axis.set_major_locator(MaxNLocator(5) if high / low < 10 else LogLocator(subs=subs))
    axis.set_major_formatter(lambda number, _: form(number))
    axis.minorticks_off()


def plain(text: str) -> str:
    """Returns a text that matplotlib shows as it is, but shortens a long one."""
    text = printable(text)
    if len(text) > 36:
        text = f"{text[:17]}\N{HORIZONTAL ELLIPSIS}{text[-18:]}"
    text = text.replace("$", r"\$")  # it is not a formula
    # A legend leaves out labels that begin with an underscore.
    return f" {text}" if text.startswith("_") else text


def save(figure, path: str | os.PathLike):
    """Writes a figure as a PNG file, atomically, and returns the figure."""
    write_atomically(path, _picture(figure, format="png", dpi=150))
    return figure


def svg(figure) -> bytes:
    """Returns an SVG that needs no font; equal figures give equal bytes."""
    return _picture(figure, format="svg", metadata={"Date": None})


def _picture(figure, **how):
    from matplotlib import style  # slow to import

    picture = io.BytesIO()
    with style.context(_STYLE):
        figure.savefig(picture, **how)
    return picture.getvalue()


def _columns(axes, lengths):
    """Returns how many columns fit in a legend whose entries have these lengths."""
    width = axes.figure.get_figwidth() / axes.get_gridspec().ncols - 0.6
    for columns in range(len(lengths), 1, -1):
        parts = np.array_split(lengths, columns)
        if sum(0.62 + 0.083 * max(part) for part in parts) <= width:  # inches
            return columns
    return 1


def _pruning(metrics):
    """The lines in which masks are learned, their steps counted through all targets."""
    found, start = [], 0
    for stage in stages_of(metrics):
        if kind_of(stage) == "prune":
            lines = [line for line in metrics if line["stage"] == stage]
            found += [line | {"step": start + line["step"]} for line in lines]
            start += max(line["step"] for line in lines)
    return found


def _lag(metrics):
    """Says by how much the expected sparsity misses its target at most, or nothing."""
    both = ("expected_sparsity", "target_sparsity")
    lines = [line for line in _pruning(metrics) if all(key in line for key in both)]
    if not lines:
        return ""
    return f"at most {max(abs(x[both[0]] - x[both[1]]) for x in lines):.2g} off"


def _line(axes, lines, key, label, mean_of=1, **look):
    """Draws `key`, or its running mean over `mean_of` points, over the steps."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        steps, values = zip(*points, strict=True)
        half = mean_of // 2
        values = np.pad(values, half, mode="edge")
        values = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), "valid")
        alone = {"marker": "o"} if len(points) == 1 else {}
        axes.plot(steps, values, label=label, **alone | look)
