"""Pictures show what the numbers say, name their axes, and explain their lines."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from test_report import make_metrics, make_report

from cofi_jax.report import figures

PANELS = {
    "sparsity": (figures.sparsity_panel, make_metrics()),
    "multipliers": (figures.multiplier_panel, make_metrics()),
    "losses": (figures.loss_panel, make_metrics()),
    "scores": (figures.score_panel, make_metrics(), make_report()),
    "heads": (figures.width_panel, make_report(), "heads"),
    "widths": (figures.width_panel, make_report(), "intermediate"),
}


def draw(panel, *data):
    return figures.draw([figures.Chart("", panel, data, "")])


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_names_its_axes_and_has_a_legend(name):
    figure = draw(*PANELS[name])
    (axes,) = figure.axes
    assert axes.get_xlabel() and axes.get_ylabel() and legend(axes)
    assert figure.get_figwidth() <= 4.8  # inches: legible on a phone


def test_legend_stays_inside_of_the_figure():
    figure = draw(*PANELS["scores"])
    figure.draw_without_rendering()
    box = figure.axes[0].get_legend().get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width


def evaluations(mark_early=True):
    lines = [("teacher", 10, 0.7), ("teacher", 20, 0.8), ("prepruning", 5, 0.75)]
    metrics = [{"stage": s, "step": n, "score": score} for s, n, score in lines]
    pruning = [(10, 0.74, 0.2), (20, 0.6, 0.94), (30, 0.61, 0.951)]
    metrics += [
        {"stage": "prune", "step": n, "score": score, "sparsity": removed}
        | ({} if removed >= 0.94 or not mark_early else {"counts": 0})
        for n, score, removed in pruning
    ]
    return [*metrics, {"stage": "finetune", "step": 7, "score": 0.65}]


def test_scores_of_all_stages_follow_one_another():
    figure = draw(figures.score_panel, evaluations(), make_report())
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["teacher"] == [[10, 0.7], [20, 0.8]]
    assert curves["pre-pruning"] == [[25, 0.75]]
    assert curves["pruning"] == [[35, 0.74], [45, 0.6], [55, 0.61]]
    assert curves["fine-tuning"] == [[62, 0.65]]
    assert curves["dense"] == [[0, 0.9243], [1, 0.9243]]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[35, 0.74]]]
    assert "sparsity too low" in legend(axes)
    assert axes.get_ylabel() == "accuracy"
    figure.draw_without_rendering()
    assert axes.get_position().height > 0.5  # the legend leaves room for the curves


def test_without_early_evaluations_none_are_explained():
    (axes,) = draw(figures.score_panel, evaluations(False), make_report()).axes
    assert "sparsity too low" not in legend(axes)


def losses(count, **terms):
    rng = np.random.default_rng(0)
    return [
        {"stage": "finetune", "step": 10 * n}
        | {key: float(value * rng.uniform(0.5, 1.5)) for key, value in terms.items()}
        for n in range(1, count + 1)
    ]


def test_a_single_point_is_to_be_seen():
    (axes,) = draw(figures.loss_panel, losses(1, loss=1.0), "finetune").axes
    assert axes.lines[0].get_marker() == "o"
    axes.figure.draw_without_rendering()
    texts = [text.get_text() for text in axes.get_xticklabels() if text.get_text()]
    assert len(set(texts)) == len(texts)


def test_losses_of_a_stage_are_its_own():
    metrics = make_metrics() + losses(4, loss=1.0, loss_layers=0.4, loss_logits=0.2)
    (axes,) = draw(figures.loss_panel, metrics, "finetune").axes
    assert legend(axes) == ["total", "layers", "logits"]
    assert axes.get_xlabel() == "optimizer step of the fine-tuning stage"
    expected = [[line["step"], line["loss_layers"]] for line in metrics[-4:]]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), expected)


def test_a_single_term_is_drawn_once():
    metrics = [line | {"loss_task": line["loss"]} for line in losses(3, loss=1.0)]
    (axes,) = draw(figures.loss_panel, metrics, "finetune").axes
    assert legend(axes) == ["task"]
    metrics[0]["loss_task"] += 0.1
    (axes,) = draw(figures.loss_panel, metrics, "finetune").axes
    assert legend(axes) == ["total", "task"]


def test_many_losses_are_running_means_over_what_was_logged():
    metrics = losses(1000, loss=1.0)
    (axes,) = draw(figures.loss_panel, metrics, "finetune").axes
    values = np.array([line["loss"] for line in metrics])
    pale, strong = axes.lines
    np.testing.assert_array_equal(pale.get_ydata(), values)
    for n in (10, 500, 989):  # a fiftieth of the points, ten to either side
        assert strong.get_ydata()[n] == pytest.approx(values[n - 10 : n + 11].mean())
    assert len(strong.get_ydata()) == 1000 and strong.get_ydata().std() < 0.1
    assert legend(axes) == ["total"] and axes.get_ylabel() == "loss, running mean"


@pytest.mark.parametrize("top", [0.9, 7.0, 90.0, 1e5])
def test_logarithmic_axes_have_plain_numbers(top):
    def panel(axes):
        axes.plot([1, 2], [0.5, top])
        figures.log_scale(axes, "y", "{:g}".format)

    figure = draw(panel)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [
        (text.get_position()[1], text.get_text())
        for text in axes.get_yticklabels(which="both")
        if text.get_text() and low <= text.get_position()[1] <= high
    ]
    assert 2 <= len(shown) <= 10
    assert all(float(text) == pytest.approx(place) for place, text in shown)


def test_svg_is_complete_and_always_the_same():
    first, second = (figures.svg(draw(*PANELS["scores"])) for _ in range(2))
    assert first == second
    tree = ElementTree.fromstring(first)
    for element in tree.iter():
        assert not element.tag.endswith(("}text", "}image", "}script"))  # no font
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith("#")


@pytest.mark.parametrize("text", ["$x^$", "a$b", "_hidden", r"\frac", "<b>&"])
def test_any_text_can_be_shown(text):
    def panel(axes):
        axes.plot([1, 2], label=figures.plain(text))
        figures.finish(axes, figures.plain(text), "y")

    figure = draw(panel)
    assert len(legend(*figure.axes)) == 1
    figures.svg(figure)
