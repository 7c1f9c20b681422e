"""The pictures of a run: its course, and what it left of the model.

A panel is a function that draws one chart into given axes. `small` makes a figure of
one panel, which a page shows and which is still legible on a phone. The functions
`plot_...` put several panels into one PNG file, which lies beside a report.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cofi_jax.files import write_atomically

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00".split()
INK, GREY, PALE = "#333333", "#757575", "#E4E8EA"

_MANY = 150  # From so many points on, single points of a curve cannot be told apart.

# The stages in their order, each with what readers call it, its colour and its marker.
STAGES = {
    "teacher": ("teacher", INK, "o"),
    "prepruning": ("pre-pruning", ORANGE, "s"),
    "prune": ("pruning", BLUE, "D"),
    "finetune": ("fine-tuning", GREEN, "^"),
}

_LOSSES = {
    "loss": INK,
    "loss_lagrangian": ORANGE,
    "loss_layers": BLUE,
    "loss_logits": GREEN,
    "loss_task": PURPLE,
}

_WIDTHS = {
    "heads": ("attention heads kept", BLUE),
    "intermediate": ("feed-forward width kept", ORANGE),
}


def sparsity_panel(axes, metrics: Sequence[dict[str, Any]]) -> None:
    """The sparsity and its target over the steps of the pruning stage."""
    lines = _of_stage(metrics, "prune")
    dots = {"color": RED, "ls": "none", "marker": "o", "mec": "white", "zorder": 4}
    if len(lines) > _MANY:
        dots |= {"ms": 2, "mew": 0}
    _line(axes, lines, "expected_sparsity", "expected", color=BLUE, lw=2.4)
    _line(axes, lines, "sparsity", "exact, as evaluated", **dots)
    _line(axes, lines, "target_sparsity", "target", color=INK, ls="--")
    finish(axes, "optimizer step of the pruning stage", "sparsity")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.0f} %")


def multiplier_panel(axes, metrics: Sequence[dict[str, Any]]) -> None:
    """The Lagrange multipliers over the steps of the pruning stage."""
    lines = _of_stage(metrics, "prune")
    _line(axes, lines, "multiplier_linear", "linear", color=GREEN)
    _line(axes, lines, "multiplier_quadratic", "quadratic", color=PURPLE)
    finish(axes, "optimizer step of the pruning stage", "multiplier")


def loss_panel(axes, metrics: Sequence[dict[str, Any]], stage: str = "prune") -> None:
    """The loss and its unweighted terms over the steps of a stage.

    Where there are many points, their running mean is drawn over pale lines of them.
    """
    lines = _of_stage(metrics, stage)
    keys = sorted({key for line in lines for key in line if key.startswith("loss")})
    if len(keys) == 2 and all(line.get(keys[0]) == line.get(keys[1]) for line in lines):
        keys = keys[1:]  # The total has one term only, so both lines are the same.
    many = len(lines) > _MANY
    for key in keys:
        label = "total" if key == "loss" else key.removeprefix("loss_")
        color = _LOSSES.get(key, RED)
        if many:
            _line(axes, lines, key, "_", color=color, lw=0.5, alpha=0.25)
        window = len(lines) // 50 if many else 1
        _line(axes, lines, key, label, mean_of=window, color=color)
    ylabel = "loss, running mean" if many else "loss"
    finish(axes, f"optimizer step of the {STAGES[stage][0]} stage", ylabel)
    if all(line[key] > 0 for line in lines for key in keys if key in line):
        log_scale(axes, "y", "{:g}".format)


def score_panel(
    axes, metrics: Sequence[dict[str, Any]], report: dict[str, Any], least: float = 0.0
) -> None:
    """The validation scores over the steps of all stages, one after another.

    Args:
      axes: where the panel is drawn.
      metrics: the lines of `metrics.jsonl`.
      report: the content of `report.json`, which has the dense model's score.
      least: the sparsity from which on an evaluation of the pruning stage counts; the
        markers of the others are hollow.
    """
    start, hollow = 0, False
    for stage, (name, color, marker) in STAGES.items():
        lines = _of_stage(metrics, stage)
        if start and lines:
            axes.axvline(start, color=GREY, lw=0.8, ls=":", label="_")
        found = [line for line in lines if "score" in line]
        if found:
            size = 5 if len(found) <= _MANY // 5 else 2
            look = {"color": color, "marker": marker, "ms": size}
            points = [(start + line["step"], line["score"]) for line in found]
            axes.plot(*zip(*points, strict=True), label=name, lw=1.4, **look)
            for line, point in zip(found, points, strict=True):
                if line.get("sparsity", 1.0) < least:
                    axes.plot(*point, label="_", mfc="white", **look)
                    hollow = True
        start += max((line["step"] for line in lines), default=0)
    if hollow:
        look = {"ls": "none", "marker": "D", "color": BLUE, "mfc": "white", "ms": 5}
        axes.plot([], [], label="sparsity too low", **look)
    axes.axhline(report["teacher"]["score"], color=GREY, ls="--", lw=1.4, label="dense")
    finish(axes, "optimizer step, all stages in turn", plain(report["metric"]))


def width_panel(axes, report: dict[str, Any], key: str) -> None:
    """The `heads` or the `intermediate` width (`key`) that each layer keeps."""
    from matplotlib.patches import Patch  # slow to import

    label, color = _WIDTHS[key]
    kept, dense = report["kept"][key], report["dense"][key]
    layers, end = range(1, len(kept) + 1), max(1, *dense)
    gone = {"fc": "none", "ec": "#C3C9CD", "hatch": "////", "lw": 0}
    for layer, width, full in zip(layers, kept, dense, strict=True):
        axes.barh(layer, full or end, 0.7, **({"color": PALE} if width else gone))
        axes.barh(layer, width, 0.7, color=color)
        text, ink = (f"{width} / {full}", INK) if width else ("absent", GREY)
        axes.text(end * 1.03, layer, text, color=ink, va="center")
    looks = {"kept": {"fc": color}, "removed": {"fc": PALE}, "block absent": gone}
    handles = [Patch(label=name, **look) for name, look in looks.items()]
    finish(axes, label, "layer", handles)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set(yticks=layers, xlim=(0, end), ylim=(len(layers) + 0.6, 0.4))
    axes.xaxis.get_major_locator().set_params(nbins=6)


def plot_sparsity(metrics: Sequence[dict[str, Any]], path: str | os.PathLike):
    """Draws sparsity, multipliers and losses while pruning; returns the figure.

    Args:
      metrics: the lines of `metrics.jsonl`; keys that are absent are not drawn.
      path: the PNG file to write.
    """
    figure = new_figure(8, 8)
    panels = figure.subplots(3, sharex=True, height_ratios=(4, 3, 3))
    draws = (sparsity_panel, multiplier_panel, loss_panel)
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes, metrics)
        axes.label_outer()
    figure.align_ylabels()
    return save(figure, path)


def plot_structure(report: dict[str, Any], path: str | os.PathLike):
    """Draws what each layer of `report.json` keeps to a PNG; returns the figure."""
    kept, dense = report["kept"], report["dense"]
    figure = new_figure(8, 1.6 + 0.3 * len(kept["heads"]))
    for axes, key in zip(figure.subplots(1, 2, sharey=True), _WIDTHS, strict=True):
        width_panel(axes, report, key)
        axes.label_outer()
    title = f"What is left: hidden width {kept['hidden']} of {dense['hidden']}"
    figure.suptitle(title, color=INK, fontsize=13)
    return save(figure, path)


def small(panel: Callable, *data: Any, height: float = 3.2, **settings: Any):
    """A `matplotlib.figure.Figure` of one panel, 4.6 by `height` inches."""
    figure = new_figure(4.6, height)
    panel(figure.subplots(), *data, **settings)
    return figure


def new_figure(width: float, height: float):
    """An empty `matplotlib.figure.Figure` of that many inches."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def finish(axes, xlabel: str, ylabel: str, handles: Sequence[Any] = ()) -> None:
    """Gives a panel the look of all: frame, grid, labels, and a legend above it.

    Args:
      axes: the panel, in which everything else is drawn already.
      xlabel: the label of the x axis, with the unit, where there is one.
      ylabel: the label of the y axis, likewise.
      handles: what the legend explains; by default, the lines that have labels.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK)
    axes.set_axisbelow(True)
    axes.grid(color=PALE, lw=0.8)
    axes.set(xlabel=xlabel, ylabel=ylabel, xmargin=0.01)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles = handles or axes.get_legend_handles_labels()[0]
    if handles:  # The legend is above the panel, where it hides nothing.
        place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98)}
        look = {"frameon": False, "labelcolor": INK, "borderaxespad": 0.2}
        columns = _columns(axes, [len(handle.get_label()) for handle in handles])
        axes.legend(handles=handles, ncols=columns, **place, **look)


def log_scale(axes, which: str, form: Callable[[float], str]) -> None:
    """Makes the x or the y axis (`which`) logarithmic, with plain numbers for ticks."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    subs = (1,) if high / low > 1e3 else (1, 2, 5)
    axis.set_major_locator(MaxNLocator(5) if high / low < 10 else LogLocator(subs=subs))
    axis.set_major_formatter(lambda number, _: form(number))
    axis.minorticks_off()


def plain(text: str) -> str:
    """Any text, shortened and changed so that matplotlib shows it, in legends too."""
    if len(text) > 36:
        text = f"{text[:17]}\N{HORIZONTAL ELLIPSIS}{text[-18:]}"
    text = text.replace("$", r"\$")  # It is no formula.
    return f" {text}" if text.startswith("_") else text  # Or legends leave it out.


def save(figure, path: str | os.PathLike):
    """Writes the figure as PNG, atomically, and returns it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
    return figure


def svg(figure) -> bytes:
    """The figure as SVG that needs no font; the same bytes for the same figure."""
    import matplotlib  # slow to import

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cofi", "svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _columns(axes, lengths):
    """The most columns that fit for a legend whose entries have these lengths."""
    width = axes.figure.get_figwidth() / axes.get_gridspec().ncols - 0.6
    for columns in range(len(lengths), 1, -1):
        parts = np.array_split(lengths, columns)
        if sum(0.62 + 0.083 * max(part) for part in parts) <= width:  # inches
            return columns
    return 1


def _of_stage(metrics, stage):
    return [line for line in metrics if line["stage"] == stage]


def _line(axes, lines, key, label, mean_of=1, **look):
    """Draws the values of `key`, if any, or their running mean, over the steps."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        steps, values = zip(*points, strict=True)
        half = mean_of // 2
        values = np.pad(values, half, mode="edge")
        values = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), "valid")
        alone = {"marker": "o"} if len(points) == 1 else {}
        axes.plot(steps, values, label=label, **{"lw": 1.6} | alone | look)
