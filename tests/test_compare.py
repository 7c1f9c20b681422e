"""Runs are grouped as they belong, and their pictures hold means and deviations."""

import statistics

import numpy as np
import pytest
from test_plots import draw
from test_report import make_report

from cofi_jax.report import compare, figures


def run(task="sst2", target=0.95, score=0.9, speedup=10.0, seed=1, **kept):
    report = make_report(kept.get("heads", (2, 0)), kept.get("widths", (30, 0)))
    report |= {"task": task, "target_sparsity": target, "sparsity": target + 4e-4}
    report |= {"speedup": speedup, "seed": seed}
    report["pruned"]["score"] = score
    report["params"]["encoder"]["pruned"] = round(85e6 * (1 - target))
    return report


def points(*runs):
    (found,) = compare.tasks(runs).values()
    return found


def test_seeds_tasks_and_targets_are_told_apart():
    runs = [
        ("b-95", run(seed=1)),
        ("b-95", run(seed=2)),
        ("b-60", run(target=0.6)),
        ("b-95", run(task="mrpc")),
        ("a-95", run()),
    ]
    found = {
        task: [(point.name, point.target, len(point.reports)) for point in group]
        for task, group in compare.tasks(runs).items()
    }
    assert found == {
        "mrpc: accuracy": [("b-95", 0.95, 1)],
        "sst2: accuracy": [("b-60", 0.6, 1), ("b-95", 0.95, 2), ("a-95", 0.95, 1)],
    }


def test_one_line_where_no_target_is_there_twice():
    group = points(("x", run(target=0.6)), ("y", run(target=0.95)))
    assert {k: [p.name for p in v] for k, v in compare.series(group).items()} == {
        "pruned": ["x", "y"]
    }
    assert [title for title, _ in compare.columns(group)] == ["60 %", "95 %"]


@pytest.mark.parametrize(
    ("name", "target", "without"),
    [
        ("sst2_95", 0.95, "sst2"),
        ("short-cola-0.60-no_layers", 0.6, "short-cola-no_layers"),
        ("short-cola-0.6", 0.6, "short-cola"),
        ("0.95", 0.95, "0.95"),
        ("run195", 0.95, "run195"),
        ("v0.955-0.95", 0.95, "v0.955"),
        ("plain", 0.95, "plain"),
    ],
)
def test_names_of_lines_lack_the_target(name, target, without):
    group = points((name, run(target=target)), ("other", run(target=target)))
    assert list(compare.series(group)) == [without, "other"]


@pytest.mark.parametrize(
    ("name", "target", "without"),
    [
        ("fast-sst2-2x", 2, "fast-sst2"),
        ("fast-sst2-2.5x-all", 2.5, "fast-sst2-all"),
        ("fast-sst2-12x", 2, "fast-sst2-12x"),
        ("bert-8-heads", 8, "bert-8-heads"),
    ],
)
def test_names_of_lines_lack_the_speedup(name, target, without):
    def timed():
        report = run() | {"target_speedup": {"asked": target}}
        del report["target_sparsity"]
        return report

    group = points((name, timed()), ("other", timed()))
    assert list(compare.series(group)) == [without, "other"]


def test_lines_connect_what_differs_by_the_target():
    names = ("all-0.60", "all-0.95", "bare-0.60", "bare-0.95")
    group = points(*((name, run(target=float(name[-4:]))) for name in names))
    lines = {k: [p.target for p in v] for k, v in compare.series(group).items()}
    assert lines == {"all": [0.6, 0.95], "bare": [0.6, 0.95]}
    titles = [title for title, _ in compare.columns(group)]
    assert sorted(titles) == ["all 60 %", "all 95 %", "bare 60 %", "bare 95 %"]


def test_no_line_has_a_target_twice_and_no_two_titles_are_one():
    group = points(("a_60", run(target=0.6)), ("a_95", run()), ("a-95", run()))
    lines = {k: [p.target for p in v] for k, v in compare.series(group).items()}
    assert lines == {"a_60": [0.6], "a_95": [0.95], "a-95": [0.95]}
    titles = [title for title, _ in compare.columns(group)]
    assert titles == ["a_60 60 %", "a_95 95 %", "a-95 95 %"]


SEEDS = [
    ("x", run(target=0.6, score=0.91, speedup=2.0)),
    ("x", run(target=0.95, score=0.80, speedup=9.0, seed=1)),
    ("x", run(target=0.95, score=0.84, speedup=12.0, seed=2)),
    ("x", run(target=0.95, score=0.88, speedup=15.0, seed=3)),
]


def test_trade_off_shows_means_deviations_and_the_dense_model():
    (axes,) = draw(compare.trade_panel, points(*SEEDS), "speedup").axes
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    expected = [[2.0, 0.91], [12.0, 0.84]]
    np.testing.assert_allclose(curves["pruned"], expected)
    np.testing.assert_allclose(curves["dense"], [[1.0, 0.9243]])
    segments = [bar.get_segments()[0] for bar in axes.collections]
    across, up = sorted(segments, key=lambda s: np.ptp(s[:, 1]))
    sd = statistics.stdev([9.0, 12.0, 15.0]), statistics.stdev([0.80, 0.84, 0.88])
    np.testing.assert_allclose(across, [[12 - sd[0], 0.84], [12 + sd[0], 0.84]])
    np.testing.assert_allclose(up, [[12, 0.84 - sd[1]], [12, 0.84 + sd[1]]])
    pale = [line.get_xdata() for line in axes.lines if line.get_alpha()]
    assert sorted(np.concatenate(pale)) == [9.0, 12.0, 15.0]
    assert {text.get_text() for text in axes.texts} == {"60 %", "95 %"}
    assert axes.get_xlim()[0] == 0 and axes.get_ylabel() == "sst2: accuracy"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "pruned",
        "bars: sd of the seeds; pale: each",
        "dense",
    ]


def test_size_is_that_of_the_encoder():
    (axes,) = draw(compare.trade_panel, points(*SEEDS), "encoder parameters").axes
    curves = {line.get_label(): line.get_xdata() for line in axes.lines}
    np.testing.assert_allclose(curves["pruned"], [4.25e6, 34e6])
    np.testing.assert_allclose(curves["dense"], [85e6])
    assert axes.get_xscale() == "log"


def test_labels_that_would_overlap_are_left_out():
    runs = [
        ("x", run(target=target, score=0.9, speedup=speedup))
        for target, speedup in ((0.6, 5.0), (0.7, 5.01), (0.95, 12.0))
    ]
    (axes,) = draw(compare.trade_panel, points(*runs), "speedup").axes
    assert [text.get_text() for text in axes.texts] == ["95 %", "60 %"]


@pytest.mark.parametrize("key", compare.TRADES)
@pytest.mark.parametrize("speedups", [(2.4, 13.4), (1.0, 1.2), (15.0, 15.5)])
def test_labels_stay_inside_of_the_panel(key, speedups):
    targets = 0.6, 0.9525
    pairs = zip(targets, speedups, strict=True)
    runs = [("x", run(target=t, score=1 - t, speedup=s)) for t, s in pairs]
    figure = draw(compare.trade_panel, points(*runs), key)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.texts
    for text in axes.texts:
        box, panel = text.get_window_extent(), axes.get_window_extent()
        assert panel.x0 + 2 < box.x0 and box.x1 < panel.x1
        assert panel.y0 < box.y0 and box.y1 < panel.y1


@pytest.mark.parametrize("target", [0.001, 0.01, 0.05, 0.3, 0.6, 0.95, 0.9999])
def test_ticks_of_sizes_differ_and_are_where_they_say(target):
    runs = points(("x", run(target=target)))
    figure = draw(compare.trade_panel, runs, "encoder parameters")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    units = {"k": 1e3, "M": 1e6, "B": 1e9}
    low, high = axes.get_xlim()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    shown = [(x, text.get_text().split()) for x, text in ticks if low <= x <= high]
    assert len(shown) >= 2
    for place, (number, *unit) in shown:
        size = units[unit[0]] if unit else 1
        assert float(number) * size == pytest.approx(place, rel=1e-6)
    assert len({tuple(words) for _, words in shown}) == len(shown)


def test_kept_structure_is_the_mean_of_the_seeds():
    runs = [
        ("x", run(target=0.6, heads=(4, 4), widths=(256, 100))),
        ("x", run(target=0.95, heads=(2, 0), widths=(30, 0), seed=1)),
        ("x", run(target=0.95, heads=(1, 0), widths=(33, 2), seed=2)),
    ]
    table = compare.columns(points(*runs))
    figure = draw(compare.kept_panel, table, "heads")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["4", "4", "1.5", "\N{EN DASH}"]  # down the columns
    (cells,) = figure.axes[0].collections
    assert cells.get_array().tolist() == [[1, 1.5 / 4], [1, 0]]
    pale, full = cells.get_cmap()([0.0, 1.0])
    assert sum(full) < sum(pale)
    wide = draw(compare.kept_panel, table, "intermediate").axes[0]
    assert [text.get_text() for text in wide.texts] == ["256", "100", "32", "1"]
    totals = draw(compare.kept_panel, table, "totals").axes[0]
    assert [text.get_text() for text in totals.texts] == [
        *("8", "356", "61", "2", "2"),
        *("1.5", "32", "61", "1", "1.5"),
    ]
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["60 %", "95 %"]
    assert axes.get_xlabel() and axes.get_ylabel() and bar.get_xlabel()


def test_pictures_of_several_tasks(tmp_path):
    runs = [*SEEDS, ("y", run(task="mrpc", heads=(1, 2, 3), widths=(1, 2, 3)))]
    groups = compare.tasks(runs).values()
    trades = [chart for points in groups for chart in compare.trades(points)]
    kept = [chart for points in groups for chart in compare.structures(points)]
    trades, kept = figures.draw(trades, 2), figures.draw(kept, 3)
    assert len(trades.axes) == 4 and len(kept.axes) == 12  # with the colour bars
    names = [axes.get_ylabel() for axes in trades.axes[::2]]
    assert names == ["mrpc: accuracy", "sst2: accuracy"]
    names = [axes.get_ylabel().split(":")[0] for axes in kept.axes]
    assert list(filter(None, names)) == [*3 * ["mrpc"], *3 * ["sst2"]]
    for axes in trades.axes:
        assert axes.get_xlabel() and axes.get_legend().get_texts()
    for figure in (trades, kept):
        figures.save(figure, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_models_of_one_task_may_differ_in_their_layers():
    runs = [("x", run(heads=(1, 2))), ("y", run(heads=(1, 2, 3), widths=(1, 2, 3)))]
    table = compare.columns(points(*runs))
    texts = draw(compare.kept_panel, table, "heads").axes[0].texts
    assert [text.get_text() for text in texts] == ["1", "2", "1", "2", "3"]
