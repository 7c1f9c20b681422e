"""The pictures of a run: how it went and what it left.

A panel is a function that draws one chart into given axes. Pages show one panel in each
figure (`small`), which is still legible on a phone; the PNG files that lie beside a
report (`plot_...`) put several panels together.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cofi_jax.files import write_atomically

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, RED, GREEN, PURPLE, ORANGE = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00".split()
INK, GREY, PALE = "#333333", "#757575", "#E4E8EA"

_MANY = 150  # the points of a curve from which on single ones cannot be seen

# The stages in their order, each with its name for readers, colour and marker.
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
    """Draws the sparsity and its target over the steps of the pruning stage."""
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
    """Draws the Lagrange multipliers over the steps of the pruning stage."""
    lines = _of_stage(metrics, "prune")
    _line(axes, lines, "multiplier_linear", "linear", color=GREEN)
    _line(axes, lines, "multiplier_quadratic", "quadratic", color=PURPLE)
    finish(axes, "optimizer step of the pruning stage", "multiplier")


def loss_panel(axes, metrics: Sequence[dict[str, Any]], stage: str = "prune") -> None:
    """Draws the loss and its terms, unweighted, over the steps of a stage.

    A curve of many points is a running mean, over a pale line of what was logged.
    """
    lines = _of_stage(metrics, stage)
    keys = sorted({key for line in lines for key in line if key.startswith("loss")})
    if len(keys) == 2 and all(line.get(keys[0]) == line.get(keys[1]) for line in lines):
        keys = keys[1:]  # the only term equals the total
    many = len(lines) > _MANY
    for key in keys:
        label = "total" if key == "loss" else key.removeprefix("loss_")
        color, window = _LOSSES.get(key, RED), len(lines) // 50 if many else 1
        if many:
            _line(axes, lines, key, "_", color=color, lw=0.5, alpha=0.25)
        _line(axes, lines, key, label, window, color=color)
    ylabel = "loss, running mean" if many else "loss"
    finish(axes, f"optimizer step of the {STAGES[stage][0]} stage", ylabel)
    if all(line[key] > 0 for line in lines for key in keys if key in line):
        log_scale(axes, "y", "{:g}".format)


def score_panel(
    axes, metrics: Sequence[dict[str, Any]], report: dict[str, Any], least: float = 0.0
) -> None:
    """Draws validation scores over the steps of all stages, one after another.

    Args:
      axes: the `matplotlib.axes.Axes` to draw into.
      metrics: the lines of `metrics.jsonl`.
      report: the content of `report.json`, which has the dense model's score.
      least: the sparsity from which on an evaluation of the pruning stage counts; the
        markers of those that do not count are hollow.
    """
    start, hollow = 0, False
    for stage, (name, color, marker) in STAGES.items():
        lines = _of_stage(metrics, stage)
        if start and lines:
            axes.axvline(start, color=GREY, lw=0.8, ls=":", label="_")
        scored = [line for line in lines if "score" in line]
        if scored:
            size = 5 if len(scored) <= _MANY // 5 else 2
            look = {"color": color, "marker": marker, "ms": size}
            points = [(start + line["step"], line["score"]) for line in scored]
            axes.plot(*zip(*points, strict=True), label=name, lw=1.4, **look)
            for point, line in zip(points, scored, strict=True):
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
    """Draws what each layer keeps of its `key`, which is `heads` or `intermediate`."""
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
    """Writes and returns the figure of sparsity, multipliers and losses while pruning.

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
    """Writes and returns the figure of the heads and the width that each layer keeps.

    Args:
      report: the content of `report.json`.
      path: the PNG file to write.
    """
    kept, dense = report["kept"], report["dense"]
    figure = new_figure(8, 1.6 + 0.3 * len(kept["heads"]))
    for axes, key in zip(figure.subplots(1, 2, sharey=True), _WIDTHS, strict=True):
        width_panel(axes, report, key)
        axes.label_outer()
    title = f"What is left: hidden width {kept['hidden']} of {dense['hidden']}"
    figure.suptitle(title, color=INK, fontsize=13)
    return save(figure, path)


def small(panel: Callable, *data: Any, height: float = 3.2, **settings: Any):
    """Returns a `matplotlib.figure.Figure` of one panel, 4.6 by `height` inches."""
    figure = new_figure(4.6, height)
    panel(figure.subplots(), *data, **settings)
    return figure


def new_figure(width: float, height: float):
    """Returns an empty `matplotlib.figure.Figure` of so many inches."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def finish(axes, xlabel: str, ylabel: str, handles: Sequence[Any] = ()) -> None:
    """Gives axes, once all is drawn, the frame, grid, labels and legend of a panel.

    Args:
      axes: the `matplotlib.axes.Axes`.
      xlabel: the label of the x axis, with the unit, where there is one.
      ylabel: likewise, of the y axis.
      handles: the artists that the legend explains; by default the labelled lines.
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
    if handles:  # above the panel, where it hides nothing
        place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98)}
        look = {"frameon": False, "labelcolor": INK, "borderaxespad": 0.2}
        columns = _columns(axes, [len(handle.get_label()) for handle in handles])
        axes.legend(handles=handles, ncols=columns, **place, **look)


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
    if len(text) > 36:
        text = f"{text[:17]}\N{HORIZONTAL ELLIPSIS}{text[-18:]}"
    text = text.replace("$", r"\$")  # it is not a formula
    # A legend leaves out labels that begin with an underscore.
    return f" {text}" if text.startswith("_") else text


def save(figure, path: str | os.PathLike):
    """Writes a figure as a PNG file, atomically, and returns the figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
    return figure


def svg(figure) -> bytes:
    """Returns an SVG that needs no font; equal figures give equal bytes."""
    import matplotlib  # slow to import

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cofi", "svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _columns(axes, lengths):
    """Returns how many columns fit in a legend whose entries have these lengths."""
    width = axes.figure.get_figwidth() / axes.get_gridspec().ncols - 0.6
    for columns in range(len(lengths), 1, -1):
        parts = np.array_split(lengths, columns)
        if sum(0.62 + 0.083 * max(part) for part in parts) <= width:  # inches
            return columns
    return 1


def _of_stage(metrics, stage):
    return [line for line in metrics if line["stage"] == stage]


def _line(axes, lines, key, label, mean_of=1, **look):
    """Draws `key`, or its running mean over `mean_of` points, over the steps."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        steps, values = zip(*points, strict=True)
        half = mean_of // 2
        values = np.pad(values, half, mode="edge")
        values = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), "valid")
        alone = {"marker": "o"} if len(points) == 1 else {}
        axes.plot(steps, values, label=label, **{"lw": 1.6} | alone | look)
