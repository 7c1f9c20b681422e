"""Files survive a kill, tables hold the numbers, pictures show what is there."""

import json
import os

import numpy as np
import pytest
from scipy import stats

from cofi_jax import files
from cofi_jax.config import Config, to_json
from cofi_jax.export import certificate
from cofi_jax.report import figures, pages
from cofi_jax.report import tables as tables_lib
from cofi_jax.run import results
from cofi_jax.run import run as run_lib
from cofi_jax.training import log as log_lib


def make_report(heads=(2, 0, 1, 4), widths=(30, 64, 0, 1), num_heads=4, width=256):
    layers = len(heads)
    return {
        "task": "sst2",
        "metric": "accuracy",
        "teacher": {"score": 0.9243, "scores": {"validation": {"accuracy": 0.9243}}},
        "pruned": {
            "score": 0.9060,
            "score_before_finetune": 0.8933,
            "scores": {"validation": {"accuracy": 0.9060}},
        },
        "sparsity": 0.95041,
        "target_sparsity": 0.95,
        "params": {
            "encoder": {"dense": 85_000_000, "pruned": 4_250_000},
            "total": {"dense": 109_483_778, "pruned": 27_933},
        },
        "kept": {"hidden": 61, "heads": list(heads), "intermediate": list(widths)},
        "dense": {
            "hidden": 64,
            "heads": [num_heads] * layers,
            "intermediate": [width] * layers,
        },
        "latency_ms": {"dense": 41.234, "pruned": 3.3512},
        "speedup": 12.304,
        "speedup_spread": [11.91, 12.71],
        "benchmark": {
            "device": "NVIDIA H200",
            "dtype": "bfloat16",
            "batch_size": 128,
            "seq_length": 64,
            "repeats": 30,
            "latency_spread_ms": {"dense": [40, 43], "pruned": [3.1, 4]},
            "examples_per_second": {"dense": 3104.0, "pruned": 38195.0},
        },
        "masked_vs_sliced_max_abs_diff": 3.24e-6,
        "seconds": {"teacher": 90.0, "prune": 3906.0},
        "seed": 57,
        "versions": {"jax": "0.10.2"},
    }


def make_metrics():
    def line(step):
        rest = {"multiplier_linear": -0.1, "multiplier_quadratic": 0.2}
        rest |= {"loss": 2.0, "loss_layers": 1.5, "lagrangian": 0.1}
        rest |= {"expected_sparsity": step / 500, "target_sparsity": step / 400}
        return {"stage": "prune", "step": step} | rest

    evaluation = {"stage": "prune", "step": 200, "score": 0.8, "sparsity": 0.4}
    evaluation["counts"] = 0
    other = {"stage": "finetune", "step": 900, "loss": 1.0, "sparsity": 0.9}
    return [line(step) for step in (100, 200, 300)] + [evaluation, other]


def cells(markdown):
    """The tables' rows as lists of stripped cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": [2, 3]})
    assert json.loads(path.read_text()) == {"a": [2, 3]}
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": 2, "b": object()})

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        files.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_log_reads_back_what_was_written(tmp_path):
    log = log_lib.MetricsLog(tmp_path / "metrics.jsonl")
    assert log_lib.read_metrics(log.path) == []
    log.write(stage="prune", step=50, loss=np.float32(0.5), rows=np.int64(3))
    log.write(stage="prune", step=100, score=0.75)
    assert log_lib.read_metrics(log.path) == [
        {"stage": "prune", "step": 50, "loss": 0.5, "rows": 3},
        {"stage": "prune", "step": 100, "score": 0.75},
    ]


@pytest.mark.parametrize("tail", ['{"stage": "pr', '{"stage": "prune", "step"', "\0"])
def test_broken_last_line_is_dropped_and_the_log_goes_on(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    log_lib.MetricsLog(path).write(stage="prune", step=1)
    with open(path, "a") as file:
        file.write(tail)
    assert len(log_lib.read_metrics(path)) == 1
    log_lib.MetricsLog(path).write(stage="prune", step=2)
    assert [line["step"] for line in log_lib.read_metrics(path)] == [1, 2]


def test_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "prune", "step": 1}')
    log_lib.MetricsLog(path).write(stage="prune", step=2)
    assert [line["step"] for line in log_lib.read_metrics(path)] == [1, 2]


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "prune", "step": 1}\n{"sta\n{"stage": "x", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl': line 2"):
        log_lib.read_metrics(path)


def test_rewinding_drops_the_later_lines_of_that_stage_only(tmp_path):
    log = log_lib.MetricsLog(tmp_path / "metrics.jsonl")
    for stage in ("teacher", "prune"):
        for step in (0, 50, 100, 150):
            log.write(stage=stage, step=step)
    log.write(stage="prune", step=100, score=0.5)
    log.rewind("prune", 100)
    steps = [(line["stage"], line["step"]) for line in log_lib.read_metrics(log.path)]
    assert steps == [("teacher", s) for s in (0, 50, 100, 150)] + [
        ("prune", s) for s in (0, 50, 100, 100)
    ]
    log.rewind("prune", -1)
    assert {line["stage"] for line in log_lib.read_metrics(log.path)} == {"teacher"}


def test_resumed_log_equals_one_that_was_never_interrupted(tmp_path):
    def write(log, steps):
        for step in steps:
            log.write(stage="prune", step=step, loss=1 / step)

    whole = log_lib.MetricsLog(tmp_path / "whole.jsonl")
    write(whole, range(1, 10))
    killed = log_lib.MetricsLog(tmp_path / "killed.jsonl")
    write(killed, range(1, 8))
    resumed = log_lib.MetricsLog(killed.path)
    resumed.rewind("prune", 5)
    write(resumed, range(6, 10))
    assert killed.path.read_bytes() == whole.path.read_bytes()


def test_table_holds_the_numbers():
    rows = cells(tables_lib.table(make_report()))
    assert rows[:1] + rows[2:14] == [
        ["", "dense", "pruned", "note"],
        ["accuracy", "0.9243", "0.9060", "-0.0183; 0.8933 before fine-tuning"],
        ["sparsity", "-", "95.0 %", "target 95.0 %"],
        ["encoder parameters", "85,000,000", "4,250,000", "5.0 % left"],
        ["all parameters", "109,483,778", "27,933", "0.0 % left"],
        ["heads", "16", "7", "43.8 % left"],
        ["FFN width", "1,024", "95", "9.3 % left"],
        ["hidden width", "64", "61", "95.3 % left"],
        ["attention blocks", "4", "3", "75.0 % left"],
        ["FFN blocks", "4", "3", "75.0 % left"],
        [
            "latency of a batch",
            "41.23 ms",
            "3.35 ms",
            "12.3x as fast (11.9x to 12.7x)",
        ],
        ["5th to 95th percentile", "40–43 ms", "3.1–4 ms", ""],
        ["examples per second", "3,104", "38,195", ""],
    ]
    assert rows[14:15] + rows[16:] == [
        ["layer", "heads kept", "FFN width kept"],
        ["1", "2 / 4", "30 / 256"],
        ["2", "absent", "64 / 256"],
        ["3", "1 / 4", "absent"],
        ["4", "4 / 4", "1 / 256"],
    ]


def several(**teacher_and_pruned):
    """A report with these scores in place of the one."""
    content = make_report()
    for model, scores in teacher_and_pruned.items():
        first = next(iter(next(iter(scores.values())).values()))
        content[model] |= {"score": first, "scores": scores}
    return content


def test_table_holds_every_metric():
    content = several(
        teacher={"validation": {"f1": 0.88, "exact_match": 0.81}},
        pruned={"validation": {"f1": 0.825, "exact_match": 0.823}},
    )
    rows = cells(tables_lib.table(content | {"metric": "f1"}))
    assert rows[2:5] == [
        ["f1", "0.8800", "0.8250", "-0.0550; 0.8933 before fine-tuning"],
        ["exact_match", "0.8100", "0.8230", "+0.0130"],
        ["sparsity", "-", "95.0 %", "target 95.0 %"],
    ]


def test_table_holds_every_split():
    content = several(
        teacher={"matched": {"accuracy": 0.84}, "mismatched": {"accuracy": 0.85}},
        pruned={"matched": {"accuracy": 0.80}, "mismatched": {"accuracy": 0.81}},
    )
    rows = cells(tables_lib.table(content))
    assert rows[2][:3] == ["accuracy", "0.8400", "0.8000"]
    assert rows[3] == ["accuracy, mismatched", "0.8500", "0.8100", "-0.0400"]
    assert rows[4][0] == "sparsity"


def evaluated(name, score=0.8, heads=(2, 0), **more):
    """What eval.py says of one model of MNLI."""

    def scores(matched, mismatched):
        return {
            "matched": {"accuracy": matched},
            "mismatched": {"accuracy": mismatched},
        }

    return {
        "model": f"runs/x/{name}",
        "name": name,
        "scores": scores(score, score + 0.01),
        "standard_errors": scores(0.0041, 0.0042),
        "differences": scores(score - 0.8, score - 0.8),
        "difference_errors": scores(0.0021, 0.0022),
        "params": {"encoder": 4_250_000, "total": 27_933_000},
        "sparsity": 0.95,
        "bytes": 111_732_000,
        "multiply_adds": {"64": 280_000_000},
        "kept": {
            "hidden": 760,
            "heads": list(heads),
            "intermediate": [*range(30, 30 + len(heads) - 1), 0],
        },
        **more,
    }


def evaluation(*models):
    def timing(model):
        return {
            "batch_size": 128,
            "seq_length": 64,
            "model": model["name"],
            "latency_ms": 3.3512,
            "latency_p95_ms": 0.4444,
            "examples_per_second": 38_195.0,
            "speedup": 9.876,
            "speedup_spread": [9.7, 10.1],
        }

    return {
        "task": "mnli",
        "metric": "accuracy",
        "data": "path/to/mnli",
        "examples": {"matched": 9815, "mismatched": 9832},
        "models": list(models),
        "grid": [timing(model) for model in models],
        "benchmark": {
            "device": "NVIDIA H200",
            "dtype": "bfloat16",
            "matmul_precision": "default",
            "repeats": 30,
        },
    }


def test_evaluation_of_one_model():
    text = tables_lib.evaluation(evaluation(evaluated("pruned")))
    rows = cells(text)
    assert rows[0] == ["", "pruned"]
    assert rows[2:12] == [
        ["accuracy, matched", "0.8000 ± 0.0041"],
        ["accuracy, mismatched", "0.8100 ± 0.0042"],
        ["encoder parameters", "4.2 M"],
        ["all parameters", "27.9 M"],
        ["sparsity", "95.0 %"],
        ["on disk", "111.7 MB"],
        ["multiply-adds, 64 tokens", "280.0 M"],
        ["hidden width", "760"],
        ["layer 1: heads, FFN", "2, 30"],
        ["layer 2: heads, FFN", "none, none"],
    ]
    assert rows[12:] == [
        ["batch", "model", "median", "95 %", "examples/s"],
        rows[13],
        ["128 x 64", "pruned", "3.35 ms", "0.444 ms", "38,195"],
    ]
    assert "speedup" not in text and "difference" not in text
    for said in ("- pruned: runs/x/pruned", "9815 and 9832 examples", "path/to/mnli"):
        assert said in text
    assert "bfloat16, matrix precision default, in 30 turns." in text
    assert "on NVIDIA H200;" in text


def test_evaluation_compares_with_the_first_model():
    pruned = evaluated("pruned", score=0.7, heads=(1,))
    text = tables_lib.evaluation(evaluation(evaluated("teacher"), pruned))
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows["accuracy, matched, difference"] == ["-", "-0.1000 ± 0.0021"]
    assert rows["accuracy, mismatched, difference"] == ["-", "-0.1000 ± 0.0022"]
    assert rows["layer 2: heads, FFN"] == ["none, none", ""]
    first, second = (row for row in cells(text) if row[0] == "128 x 64")
    assert first[1:] == ["teacher", "3.35 ms", "0.444 ms", "38,195", "-"]
    assert second[-1] == "9.88x (9.70x to 10.10x)"
    assert "differences are those to teacher." in text
    assert "speedup over teacher" in text


def test_evaluation_of_many_models_fits_a_terminal():
    names = [f"runs-{i}/{'pruned' if i else 'teacher'}" for i in range(9)]
    models = [evaluated(name, score=0.8 - i / 100) for i, name in enumerate(names)]
    text = tables_lib.evaluation(evaluation(*models))
    assert max(map(len, text.splitlines())) <= 100
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    *tables, grid = map(cells, blocks)
    assert sum((table[0][1:] for table in tables), []) == names
    assert len(tables) == 3
    labels = [row[0] for row in tables[0]]
    assert all([row[0] for row in table] == labels for table in tables)
    assert sum((table[2][1:] for table in tables), [])[3] == "0.7700 ± 0.0041"
    assert [row[1] for row in grid[2:]] == names


def test_table_says_where_the_latency_was_measured():
    text = tables_lib.table(make_report())
    assert "NVIDIA H200, bfloat16, batches of 128 x 64 tokens" in text


def test_table_lines_up_on_a_terminal():
    first, second = tables_lib.table(make_report()).split("\n\n")[::2]
    for grid in (first, second):
        assert len({len(line) for line in grid.splitlines()}) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (999_949, "999.9 k"),
        (999_951, "1.0 M"),
        (4_900_000, "4.9 M"),
        (1_340_000_000, "1.3 B"),
    ],
)
def test_counts_are_readable(number, text):
    assert tables_lib.count(number) == text


def test_markdown_is_complete():
    content = make_report()
    text = pages.markdown(content, make_metrics(), '{\n  "seed": 57\n}\n')
    assert "12.3x as fast, with accuracy 0.9060 where the dense one has 0.9243" in text
    assert str(tables_lib.comparison(content)) in text
    assert str(tables_lib.layers(content)) in text
    assert "(sparsity.png)" in text and "(structure.png)" in text
    assert "differ by at most 3.2e-06" in text and "warming up, 30 turns each" in text
    assert "teacher 1.5 min, prune 65.1 min" in text and "jax 0.10.2" in text
    assert "NVIDIA H200, bfloat16, batches of 128 x 64 tokens" in text
    fold = "<details>\n<summary>The exact config of this run</summary>\n\n"
    assert fold + '```json\n{\n  "seed": 57\n}\n```\n\n</details>\n' in text


def test_markdown_shows_each_class():
    content, none = make_report(), make_report()
    for model, f1 in (("teacher", 0.75), ("pruned", 0.5)):
        rates = {"precision": 1.0, "recall": 0.6, "f1": f1, "count": 1234}
        content[model]["by_class"] = {"good": rates}
    text = pages.markdown(content, make_metrics(), "{}")
    assert ["good", "1,234", "0.7500", "0.5000", "-0.2500"] in cells(text)
    assert "Class by class" not in pages.markdown(none, make_metrics(), "{}")


def assert_png(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000
    assert list(path.parent.iterdir()) == [path]


def draw_course(metrics):
    return figures.draw(figures.course(make_report(), metrics), columns=2)


def test_course_shows_the_pruning_stage(tmp_path):
    path = tmp_path / "sparsity.png"
    figure = figures.save(draw_course(make_metrics()), path)
    assert_png(path)
    first, second, _, fourth, fifth = figure.axes
    panels = first, second, fourth
    labels = [axes.get_ylabel() for axes in panels]
    assert labels == ["sparsity", "multiplier", "loss"]
    for axes in panels:
        assert axes.get_xlabel() == "optimizer step of the pruning stage"
    assert fifth.get_xlabel() == "optimizer step of the fine-tuning stage"
    curves = {line.get_label(): line for line in first.lines}
    expected = "expected, at most 0.15 off"  # 0.6 where the target is 0.75
    assert set(curves) == {expected, "exact, as evaluated", "target"}
    assert curves[expected].get_xydata().tolist() == [
        [100, 0.2],
        [200, 0.4],
        [300, 0.6],
    ]
    assert curves["exact, as evaluated"].get_xydata().tolist() == [[200, 0.4]]
    assert [line.get_label() for line in second.lines] == ["linear", "quadratic"]
    assert [line.get_label() for line in fourth.lines] == ["total", "layers"]
    for axes in panels:
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [line.get_label() for line in axes.lines]


def test_course_shows_which_kinds_close():
    metrics = make_metrics()
    for line in metrics[:3]:
        line |= {"closed_head": line["step"] / 1000, "undecided": 0.25}
    axes = draw_course(metrics).axes[1]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "head": [[100, 0.1], [200, 0.2], [300, 0.3]],
        "undecided, of all": [[100, 0.25], [200, 0.25], [300, 0.25]],
    }


def test_loss_below_zero_is_drawn_on_a_linear_scale():
    metrics = make_metrics()
    assert draw_course(metrics).axes[3].get_yscale() == "log"
    metrics[0]["loss"] = -1.0
    assert draw_course(metrics).axes[3].get_yscale() == "linear"


def test_course_of_nothing_is_empty(tmp_path, recwarn):
    path = tmp_path / "sparsity.png"
    (scores,) = figures.save(draw_course([]), path).axes
    assert_png(path)
    assert [line.get_label() for line in scores.lines] == ["dense"] and not recwarn


def test_course_without_learned_masks_is_that_of_the_recovery():
    """The one evaluation before a cut is no curve of the sparsity."""
    cut = {"stage": "prune", "step": 0, "score": 0.5, "sparsity": 0.6}
    metrics = [x for x in make_metrics() if x["stage"] == "finetune"]
    scores, losses = draw_course([cut, *metrics]).axes
    assert scores.get_ylabel() != "sparsity" and losses.get_ylabel() == "loss"
    assert losses.get_xlabel() == "optimizer step of the fine-tuning stage"


@pytest.mark.parametrize("layers", [4, 12])
def test_structure_picture_shows_every_layer(tmp_path, layers):
    heads = [2, 0, 1, 4] * (layers // 4)
    widths = [30, 64, 0, 1] * (layers // 4)
    path = tmp_path / "structure.png"
    figure = figures.plot_structure(make_report(heads, widths), path)
    assert_png(path)
    assert figure.get_suptitle() == "What is left: hidden width 61 of 64"
    left, right = figure.axes
    assert left.get_xlabel() == "attention heads kept"
    assert right.get_xlabel() == "feed-forward width kept"
    assert left.get_ylabel() == "layer" and left.yaxis_inverted()
    for axes, kept, full in ((left, heads, 4), (right, widths, 256)):
        bars = [bar.get_width() for bar in axes.patches]
        assert bars == [w for width in kept for w in (full, width)]
        hatched = [bool(bar.get_hatch()) for bar in axes.patches[::2]]
        assert hatched == [width == 0 for width in kept]
        texts = [text.get_text() for text in axes.texts]
        assert texts == [f"{width} / {full}" if width else "absent" for width in kept]


def test_layer_without_a_block_to_begin_with_can_be_drawn(tmp_path):
    content = make_report()
    content["dense"]["heads"][1] = 0
    figure = figures.plot_structure(content, tmp_path / "structure.png")
    assert figure.axes[0].texts[1].get_text() == "absent"


def timed_report():
    """The report of a model that was to be 12 times as fast."""
    report = make_report()
    del report["target_sparsity"]
    first = {"aim": 12.12, "predicted": 12.13, "measured": 12.9, "error": 0.002}
    second = {"aim": 11.4, "predicted": 11.41, "measured": 12.11, "error": 0.003}
    attention = {"counts": [1, 2, 4], "ms": [0.5, 0.7, 1.25], "spread": [0.01] * 3}
    ffn = {"counts": [16, 256], "ms": [0.25, 4.5], "spread": [0.01] * 2}
    report["target_speedup"] = {
        "asked": 12,
        "predicted": 11.41,
        "chosen": second,
        "passes": [first, second],
        "table": {
            "overhead_ms": 1.5,
            "dense_ms": 41.0,
            "additivity": 0.97,
            "blocks": {"attention": attention, "ffn": ffn},
        },
    }
    return report


def test_a_report_says_what_speedup_was_asked_predicted_and_measured(tmp_path):
    report = timed_report()
    row = tables_lib.comparison(report).rows[-1]
    assert row[2:] == [
        "12.30x",
        "target 12x; 11.41x by the table, 12.11x when it was sliced",
    ]
    assert "12.3x as fast, where 12x was asked for, with" in tables_lib.headline(report)
    assert tables_lib.passes(report).rows == [
        ("1", "12.12x", "12.13x", "12.90x", "0.20 %"),
        ("2, chosen", "11.40x", "11.41x", "12.11x", "0.30 %"),
    ]
    text = pages.markdown(report, make_metrics(), "{}")
    assert "speedup, 12x asked for, " in text and "(latency.png)" in text
    assert "What cannot be pruned takes 1.5 ms of the 41 ms" in text
    heads, widths = figures.times(report)
    assert "1: 0.5 ms; 2: 0.7 ms; 4: 1.25 ms" in heads.alt
    assert "16: 0.25 ms; 256: 4.5 ms" in widths.alt
    (axes,) = figures.draw([widths]).axes
    np.testing.assert_array_equal(
        axes.lines[0].get_xydata(), [[0, 0], [16, 0.25], [256, 4.5]]
    )
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert tables_lib.read_report(path, "RUN") == report
    assert "latency.png" not in pages.markdown(make_report(), make_metrics(), "{}")


def test_a_structure_for_parameters_stands_beside_that_for_time(tmp_path):
    report = timed_report()
    older = tables_lib.table(report)
    report["target_speedup"]["for_parameters"] = {
        "hidden": 64,
        "heads": [1, 1, 0, 3],
        "intermediate": [90, 0, 10, 0],
        "encoder": 4_200_000,
        "predicted": 9.876,
    }
    layers = tables_lib.layers(report)
    assert layers.head[3:] == ("heads for parameters", "FFN width for parameters")
    assert layers.rows[0] == ("1", "2 / 4", "30 / 256", "1 / 4", "90 / 256")
    assert layers.rows[2] == ("3", "1 / 4", "absent", "absent", "10 / 256")
    page = pages.markdown(report, make_metrics(), "{}")
    said = "4.2 M of them where the model has 4.2 M, and by the table of times 9.88x "
    for text in (page, tables_lib.table(report)):
        assert str(layers) in text and f"{said}as fast where it is 11.41x." in text
    html = pages.run_page(report, make_metrics(), "{}")
    assert "FFN width for parameters" in html
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert tables_lib.read_report(path, "RUN") == report
    # An older report has neither, like one without a speedup.
    del report["target_speedup"]["for_parameters"]
    assert tables_lib.table(report) == older and "for parameters" not in older
    assert len(tables_lib.layers(report).head) == 3


def test_stages_of_speedups_have_their_names():
    steps = [
        {"stage": f"{kind}-{n}x"} for n in (12, 2.5) for kind in ("finetune", "prune")
    ]
    assert tables_lib.stages_of(steps) == {
        "prune-2.5x": "pruning, 2.5x",
        "finetune-2.5x": "fine-tuning, 2.5x",
        "prune-12x": "pruning, 12x",
        "finetune-12x": "fine-tuning, 12x",
    }


def dropped(fall, target, *, error=0.004, allowed=0.01):
    beyond = fall - allowed - 1.645 * error
    drop = {"allowed": allowed, "fall": fall, "error": error, "beyond": beyond}
    drop["kept"] = beyond <= 0
    return make_report() | {"target_sparsity": target, "drop": drop}


def test_the_report_is_that_of_the_smallest_model_that_keeps_the_score():
    family = [dropped(0.001, 0.6), dropped(0.015, 0.8), dropped(0.05, 0.9)]
    whole = results.of_run(family)
    assert whole == family[1] | {"family": family}
    text = tables_lib.drops(whole)
    assert "may fall by 0.01; that of the model of 80 % falls by 0.0150" in text
    assert (
        "counts as kept. The first to fail is the next one: that of the model of 90 %"
        in text
    )
    assert "0.0334 beyond" in text  # 0.05 - 0.01 - 1.645 * 0.004
    page = pages.markdown(whole, make_metrics(), "{}")
    assert text in page and "the smallest one that keeps the score." in page
    assert text in tables_lib.table(whole)
    every = tables_lib.drops(results.of_run(family[:2]))
    assert "All models of the run keep it." in every
    better = tables_lib.drops(dropped(-0.002, 0.6))
    assert "that of the model of 60 % rises by 0.0020 with a standard error" in better
    # A model's own card is written before the smaller ones are made.
    assert tables_lib.drops(family[0]).endswith("and counts as kept.")
    none = results.of_run(family[2:])
    assert none == family[2] and "which is too far" in tables_lib.drops(none)
    assert results.of_run([make_report()] * 2)["target_sparsity"] == 0.95
    assert tables_lib.drops(make_report()) == ""


@pytest.mark.parametrize("flips, kept", [(30, True), (60, False)])
def test_a_score_is_kept_by_a_one_sided_test(flips, kept):
    """Of 400 rows, all of which the dense model gets right."""
    right = np.ones(400)
    wrong = np.where(np.arange(400) < flips, 0.0, 1.0)
    before, after = (
        certificate.Result(
            np.zeros((400, 2)), {"accuracy": v.mean()}, {"accuracy": v}, {}, [], {}
        )
        for v in (right, wrong)
    )
    found = results.drop("accuracy", before, after, 0.06)
    share = flips / 400
    error = np.sqrt(share * (1 - share) / 399)
    assert found["fall"] == pytest.approx(share)
    assert found["error"] == pytest.approx(error)
    z = (share - 0.06) / error
    assert found["kept"] == kept == (stats.norm.sf(z) > 0.05)
    assert found["beyond"] == pytest.approx(
        share - 0.06 - stats.norm.ppf(0.95) * error, abs=1e-5
    )


def test_a_run_is_finished_with_the_first_model_that_fails(tmp_path, monkeypatch):
    config = Config()
    config.prune.targets, config.prune.max_drop = (0.6, 0.8, 0.9), 0.01
    saved = {"pruned-60": dropped(0.001, 0.6), "pruned-80": dropped(0.05, 0.8)}

    def read_about(path):
        return None, None, {"report": saved[path.name]}

    monkeypatch.setattr(run_lib.saved_model, "read_about", read_about)
    whole = json.loads(json.dumps(results.of_run([*saved.values()])))
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert run_lib._finished(config, tmp_path) == whole
    saved["pruned-80"] = dropped(0.001, 0.8)  # Then the third one is missing.
    assert run_lib._finished(config, tmp_path) is None
