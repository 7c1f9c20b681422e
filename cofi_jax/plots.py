"""The pictures of a run: sparsity against its target, and the structure left."""

import io
import itertools
import os
from collections.abc import Sequence
from typing import Any

from cofi_jax.report import write_atomically

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _RED, _GREEN, _PURPLE, _ORANGE = (
    "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00".split()
)
_INK, _GREY, _PALE = "#333333", "#8A8A8A", "#ECEFF1"


def plot_sparsity(metrics: Sequence[dict[str, Any]], path: str | os.PathLike):
    """Draws sparsity, multipliers and losses over the steps of the pruning stage.

    Args:
      metrics: the lines of `metrics.jsonl`; keys that are absent are not drawn.
      path: of the PNG file.

    Returns:
      The `matplotlib.figure.Figure`, three panels.
    """
    from matplotlib.figure import Figure  # slow to import

    lines = [line for line in metrics if line["stage"] == "prune"]
    losses = sorted({key for line in lines for key in line if key.startswith("loss")})
    names = {key: key.removeprefix("loss_") for key in losses} | {"loss": "total"}
    dots = {"color": _RED, "ls": "none", "marker": "o", "mec": "white", "zorder": 4}
    colors = itertools.cycle((_INK, _ORANGE, _BLUE, _GREEN, _PURPLE))
    figure = Figure(figsize=(8, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(3, sharex=True, height_ratios=(4, 3, 3))
    for panel, key, label, style in (
        (0, "expected_sparsity", "expected", {"color": _BLUE, "lw": 2.4}),
        (0, "sparsity", "exact, as evaluated", dots),
        (0, "target_sparsity", "target", {"color": _INK, "ls": "--"}),
        (1, "multiplier_linear", "linear", {"color": _GREEN}),
        (1, "multiplier_quadratic", "quadratic", {"color": _PURPLE}),
        *((2, key, names[key], {"color": next(colors)}) for key in losses),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            panels[panel].plot(steps, values, label=label, **{"lw": 1.6} | style)
    for axes, ylabel in zip(panels, ("sparsity", "multiplier", "loss"), strict=True):
        _clean(axes)
        axes.set(ylabel=ylabel, xmargin=0.01)
        axes.grid(color=_PALE, lw=0.8)
        if axes.lines:  # above the panel, where it hides nothing
            place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98), "ncols": 4}
            axes.legend(frameon=False, labelcolor=_INK, borderaxespad=0.2, **place)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.0f} %")
    if all(line[key] > 0 for line in lines for key in losses if key in line):
        panels[2].set_yscale("log")
    panels[2].set_xlabel("optimizer step of the pruning stage")
    panels[2].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    return _save(figure, path)


def plot_structure(report: dict[str, Any], path: str | os.PathLike):
    """Draws the heads and the feed-forward width that each layer keeps.

    Args:
      report: the content of `report.json`.
      path: of the PNG file.

    Returns:
      The `matplotlib.figure.Figure`, two panels.
    """
    from matplotlib.figure import Figure  # slow to import

    kept, dense = report["kept"], report["dense"]
    layers = range(1, len(kept["heads"]) + 1)
    figure = Figure(figsize=(8, 1.3 + 0.3 * len(layers)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label, color in (
        (panels[0], "heads", "attention heads kept", _BLUE),
        (panels[1], "intermediate", "feed-forward width kept", _ORANGE),
    ):
        end = max(1, *dense[key])
        for layer, width, full in zip(layers, kept[key], dense[key], strict=True):
            look = {"color": _PALE} if width else {"fc": "none", "ec": "#D5DADD"}
            axes.barh(layer, full or end, 0.7, hatch=None if width else "////", **look)
            axes.barh(layer, width, 0.7, color=color)
            text, ink = (f"{width} / {full}", _INK) if width else ("absent", _GREY)
            axes.text(end * 1.03, layer, text, color=ink, va="center")
        _clean(axes)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=label, xlim=(0, end), ylim=(len(layers) + 0.6, 0.4))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(ylabel="layer", yticks=layers)
    title = f"What is left: hidden width {kept['hidden']} of {dense['hidden']}"
    figure.suptitle(title, color=_INK, fontsize=13)
    return _save(figure, path)


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(which="both", color=_GREY, labelcolor=_INK)
    axes.xaxis.label.set(color=_INK, fontsize=11)
    axes.yaxis.label.set(color=_INK, fontsize=11)


def _save(figure, path: str | os.PathLike):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
    return figure
