"""Tables of times on a made-up clock, their files, and a stage that goes by one."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.config import Config
from cofi_jax.data import tasks
from cofi_jax.data.batches import Examples
from cofi_jax.errors import UserError
from cofi_jax.evaluation import latency, latency_table
from cofi_jax.evaluation.timing import Timing
from cofi_jax.export import runtimes
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, cost, masks, speedup, transforms
from cofi_jax.pruning import latency as latency_cost
from cofi_jax.pruning.slicing import prune, spec_of
from cofi_jax.run import results, speed, stages
from cofi_jax.training import log as log_lib

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = EncoderConfig(17, 8, (3,) * 3, 2, (40,) * 3, 8, 2, 9, dropout=0.0)


def milliseconds(config, cross=0.0):
    """A device: 2 ms, for heads 0.3 + 0.2 h each, for units 0.4 + 0.1 w."""
    heads, units = np.array(config.heads), np.array(config.intermediate)
    total = 2 + ((heads > 0) * (0.3 + 0.2 * heads)).sum()
    total += ((units > 0) * (0.4 + 0.1 * units)).sum()
    return total * (1 + cross * ((heads > 0) & (units > 0)).mean())


@pytest.fixture
def device(monkeypatch):
    """A clock that runs at random paces, and which calls it timed."""
    rng, seen = np.random.default_rng(0), []
    noise = {"all": 0.0, "cross": 0.0, "attention 2": 0.0}

    def passes(calls, vocab_size, *, repeats, **how):
        seen.append(len(calls))
        pace = np.exp(0.5 * rng.normal(size=repeats))  # of all that is timed in a turn
        found = {}
        for name, structure in calls.items():
            spread = noise["all"] + noise.get(name, 0.0)
            times = milliseconds(structure, noise["cross"]) * pace
            times = times * np.exp(spread * rng.normal(size=repeats))
            found[name] = Timing(tuple((time,) for time in times))
        return found

    monkeypatch.setattr(latency, "passes", passes)
    return noise, seen


def opener(params, config):
    assert params["embeddings"]["word"].shape == (17, 8)
    return config


def key(**changes):
    how = {"runtime": "jax", "batch_size": 2, "seq_length": 5}
    return latency_table.key_of(SIZES, **how) | changes


def measured(noise=None, **how):
    return latency_table.measure(SIZES, opener, key(), **{"repeats": 40} | how)


def test_knots():
    assert latency_table.knots(5) == [1, 2, 3, 4, 5]
    assert latency_table.knots(40) == [16, 32, 40]
    assert latency_table.knots(1536)[-4:] == [768, 1024, 1280, 1536]
    assert len(latency_table.knots(3072)) == 23


def test_a_table_has_the_times_of_blocks_however_the_pace_changes(device):
    content = measured(repeats=401)  # an odd number, so the median is one of them
    assert json.loads(json.dumps(content)) == content
    table, exact = latency_table.table(content), milliseconds(SIZES)
    attention, ffn = content["blocks"]["attention"], content["blocks"]["ffn"]
    scale = content["dense_ms"] / exact  # of the median pace
    assert scale == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(attention["ms"], scale * np.array([0.5, 0.7, 0.9]))
    np.testing.assert_allclose(ffn["ms"], scale * np.array([2.0, 3.6, 4.4]))
    assert content["overhead_ms"] == pytest.approx(2 * scale)
    assert content["additivity"] == pytest.approx(1)
    for structure in latency_table.random(SIZES, 20):
        found = latency_cost.cost(table).exact({}, structure)
        counts = [w for w in structure.intermediate if w]
        # Below the first knot a block takes as long as there.
        more = sum(0.1 * max(0, 16 - width) for width in counts)
        expected = scale * (milliseconds(structure) + more)
        assert found == pytest.approx(expected, rel=1e-6)


def test_noisy_knots_are_timed_anew_and_said(device, tmp_path, capsys):
    noise, seen = device
    noise["attention 2"] = 0.2
    content = measured()
    assert seen == [8, 2, 2]  # with the base each time
    latency_table.write(tmp_path / "t.json", content)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "t.json" in said
    assert "attention blocks" in said and "at 2 (" in said and "at 1" not in said
    assert latency_table.read(tmp_path / "t.json", "table") == content
    noise["attention 2"], content["blocks"]["attention"]["ms"][1] = 0.0, 0.1
    smooth = latency_table.table(content).curves["attention"].ms
    assert (np.diff(smooth) > 0).all() and smooth[0] == pytest.approx(
        smooth[1], rel=0.1
    )


def test_residuals_show_what_the_table_does_not_know(device):
    noise, _ = device
    content = measured()
    noise["cross"] = 0.08
    rows = latency_table.residuals(content, SIZES, opener, structures=12, repeats=40)
    assert len(rows) == 12 and set(rows[0]) >= {"heads", "intermediate"}
    for row, structure in zip(rows, latency_table.random(SIZES, 12), strict=True):
        assert row["heads"] == "-".join(map(str, structure.heads))
        assert row["ratio"] == row["measured_ms"] / row["predicted_ms"]


@pytest.mark.parametrize(
    "field, other",
    [
        ("device", "NVIDIA H200"),
        ("batch_size", 3),
        ("hidden_size", 16),
        ("head", "cls"),
    ],
)
def test_a_table_of_another_key_is_refused(field, other, device, tmp_path):
    path = tmp_path / "t.json"
    content = measured(repeats=3)
    latency_table.check_key(content, key(), "table", path)
    content["key"][field] = other
    with pytest.raises(UserError, match=f"table='.*t.json': is of {field}=.*not") as e:
        latency_table.check_key(content, key(), "table", path)
    assert repr(other) in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema_version=2),
        lambda content: content.pop("blocks"),
        lambda content: content["blocks"]["ffn"].update(counts=[16, 16, 40]),
        lambda content: content["blocks"]["ffn"]["ms"].pop(),
        lambda content: content.update(overhead_ms=float("nan")),
        lambda content: content.update(overhead_ms=float("inf")),
        lambda content: content.update(key={}),
        lambda content: content["blocks"].pop("attention"),
        lambda content: content["blocks"]["ffn"].update(counts=[], ms=[]),
        lambda content: content["blocks"]["ffn"].pop("spread"),
        lambda content: content.pop("additivity"),
        lambda content: content.update(dense_ms="1.0"),
        lambda content: content.update(seconds=None),
    ],
)
def test_what_is_no_table_is_refused(change, device, tmp_path):
    content = measured(repeats=3)
    change(content)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="table=.*is not a table of times"):
        latency_table.read(tmp_path / "t.json", "table")


def run_config(*speedups):
    config = Config(log_every=9, eval_every=9, checkpoint_every=9, eval_batch_size=6)
    config.data.task, config.data.max_length, config.data.buckets = "demo", 9, (9,)
    config.distill.logits = config.distill.layers = 0.0
    config.prune.batch_size = 6
    config.prune.epochs = config.prune.warmup_epochs = (
        config.prune.prepruning_epochs
    ) = 0
    config.prune.constraint, config.prune.seeds = "exact", "magnitude"
    config.prune.kinds = ("mha", "head", "ffn", "intermediate")
    config.prune.targets, config.prune.target_speedup = (), speedups
    config.benchmark.batch_size, config.benchmark.seq_length = 2, 5
    config.benchmark.repeats = 3
    return config


def test_a_speedup_out_of_reach_is_refused_with_the_largest(device, tmp_path):
    content = measured(repeats=3)
    path = tmp_path / "t.json"
    latency_table.write(path, content)
    config = run_config(2.0, 9.0)
    config.prune.latency_table = str(path)
    largest = (2 + 3 * (0.9 + 4.4)) / (2 + 0.5)  # Of one block one head stays.

    def refused():
        with pytest.raises(UserError, match=r"target_speedup=\(2.0, 9.0\): ") as error:
            speed.check(config, SIZES)
        return float(re.search("at most ([0-9.]+) by", str(error.value))[1])

    assert refused() == pytest.approx(largest, rel=1e-3)
    config.prune.target_speedup = (0.99 * largest,)
    speed.check(config, SIZES)
    config.prune.kinds = ("head", "ffn")
    config.prune.target_speedup = (largest,)
    speed.check(config, SIZES)
    config.prune.kinds = ("head", "mha", "intermediate")
    speed.check(config, SIZES)
    config.prune.kinds, config.prune.target_speedup = ("head", "mha"), (2.0, 9.0)
    named = refused()  # It is rounded down, since it would be refused, too.
    assert named == 1.177 < 17.9 / 15.2 < 1.178
    config.prune.target_speedup = (named,)
    speed.check(config, SIZES)


def test_a_block_stays_where_the_largest_speedup_is_asked_for(device, monkeypatch):
    """Whatever share of the dense model's time the model before has."""
    sizes = dataclasses.replace(SIZES, heads=(3, 3, 0), intermediate=(40, 0, 0))
    log_alpha = masks.init_log_alpha(sizes, jax.random.key(0), run_config().prune.kinds)
    found = latency_table.table(measured(repeats=3))
    for overhead in np.linspace(1, 3, 9):
        table = found._replace(overhead=overhead)
        asked = speedup.largest(SIZES, [*log_alpha], table)
        clock = types.SimpleNamespace(speedup=lambda _, asked=asked: (asked, 1.0))
        monkeypatch.setattr(speed, "Clock", lambda *_, clock=clock: clock)
        how = run_config(asked), SIZES, sizes, log_alpha, asked, table
        small = spec_of(speed.search(*how, transforms.harden()).masks, sizes)
        assert sum(map(bool, small.heads)) == 1 and not any(small.intermediate)


def test_a_table_belongs_to_the_process_that_measures(device, tmp_path, monkeypatch):
    """The machine of another process may have another key, or no such file."""
    config, content = run_config(2.0), measured(repeats=3)
    config.prune.latency_table = str(tmp_path / "not there")
    monkeypatch.setattr(speed.distributed, "is_first", lambda: False)
    monkeypatch.setattr(speed.distributed, "on_process_zero", lambda _: content)
    speed.check(config, SIZES)
    assert speed.table_of(config, SIZES, tmp_path) is content


def test_a_runs_own_table_of_another_key_is_refused_with_what_to_do(device, tmp_path):
    content = measured(repeats=3)
    content["key"]["device"] = "NVIDIA H200"
    latency_table.write(tmp_path / "latency.json", content)
    with pytest.raises(UserError, match="without it, .* measured anew"):
        speed.table_of(run_config(2.0), SIZES, tmp_path)


def test_a_table_is_made_once_and_speedups_are_measured(tmp_path, capsys):
    """With the real clock, of which nothing is asserted."""
    sizes = dataclasses.replace(SIZES, heads=(1, 1), intermediate=(1, 1))
    config = run_config(1.01)
    assert speed.table_of(run_config(), sizes, tmp_path) is None
    config.prune.kinds = ("ffn", "mha")
    try:
        content = speed.table_of(config, sizes, tmp_path)
    except UserError as error:  # The clock may say that nothing can be gained.
        assert "reach at most" in str(error)
        content = latency_table.read(tmp_path / "latency.json", "table")
    assert "a table of times, measured in" in capsys.readouterr().out
    before = (tmp_path / "latency.json").read_bytes()
    assert content == json.loads(before)
    ratio, error = speed.Clock(config, sizes).speedup(
        dataclasses.replace(sizes, heads=(1, 0))
    )
    assert ratio > 0 and error >= 0
    config.prune.target_speedup = ()
    assert (tmp_path / "latency.json").read_bytes() == before


def test_a_single_turn_does_not_pass_for_a_measurement(device, monkeypatch):
    noise, seen = device
    noise["all"] = 0.1
    config = run_config(2.0)
    config.benchmark.repeats = 1
    monkeypatch.setattr(speed.runtimes, "timed", lambda *_: lambda _, sizes: sizes)
    _, error = speed.Clock(config, SIZES).speedup(SIZES)
    assert error > 0.01 and len(seen) == 5


def test_a_stage_is_cut_to_the_speedup_that_the_clock_shows(
    device, tmp_path, monkeypatch, capsys
):
    """Without a step, the masks follow from the seeds; one model from the other."""
    content = measured()
    noise, _ = device
    noise["cross"] = 0.08
    config = run_config(1.5, 2.0)
    rng = np.random.default_rng(0)
    rows = Examples(
        [rng.integers(0, 17, 5).astype(np.int32) for _ in range(12)],
        [np.zeros(5, np.int32)] * 12,
        rng.integers(0, 2, 12).astype(np.int32),
    )
    monkeypatch.setattr(speed.runtimes, "timed", lambda *_: lambda _, sizes: sizes)
    monkeypatch.setattr(stages.Run, "score", lambda *_: 0.0)
    log = log_lib.MetricsLog(tmp_path / "metrics.jsonl")
    run = stages.Run(
        config,
        tmp_path,
        tasks.find(config.data),
        SIZES,
        rows,
        {"validation": rows},
        log,
        times=content,
    )
    model, params = Encoder(SIZES), jax.device_put(random_params(SIZES, 0))
    student = stages.Student(params, jnp.eye(8))
    both = stages.stairs((), config.prune.target_speedup)
    assert [stair.suffix for stair in both] == ["-1.5x", "-2x"]
    for stair in both:
        student, gates, _ = stages.learn_masks(run, stair, model, student, None)
        chosen = stages.passes(run, stair)[0]
        assert 0 <= chosen.measured / stair.speedup - 1 <= 0.02
        assert all(((gate == 0) | (gate == 1)).all() for gate in gates.values())
        params, spec = prune(student.params, gates, model.config)
        small = spec.config(model.config)
        true = milliseconds(SIZES, 0.08) / milliseconds(small, 0.08)
        assert chosen.measured == pytest.approx(true)
        asked = results._asked(run, stair, small)
        _beside_stands_what_parameters_would_keep(
            run, stair, asked, model, student, small
        )
        assert asked["asked"] == stair.speedup and asked["chosen"] in asked["passes"]
        assert asked["predicted"] == pytest.approx(chosen.predicted)
        student, model = stages.Student(params, jnp.eye(8)), Encoder(small)
    _another_table_makes_the_masks_anew(run, both[0])
    _masks_that_are_not_needed_any_more_have_no_passes(run, model, student)
    said = capsys.readouterr().err
    assert "prune-1.2x: by the table of times, the model before is 1.9" in said


def _beside_stands_what_parameters_would_keep(run, stair, asked, model, student, small):
    """As many parameters, of the same seeds, cut as a run for a sparsity cuts them."""
    found, sizes = asked["for_parameters"], model.config
    left, whole = (cost.num_params({}, each) for each in (small, sizes))
    unit = 2 * 8 + 1
    assert -1e-3 * whole <= left - found["encoder"] <= 1e-3 * whole + unit
    seeds, _ = stages._first_log_alpha(run, stair, model, student.params)
    target = 1 - left / whole
    moved = constraint.at_target(seeds, sizes, target)
    gates = constraint.target_masks(moved, sizes, target)
    other = spec_of(gates, sizes).config(sizes)
    assert found["heads"] == list(other.heads)
    assert found["intermediate"] == list(other.intermediate)
    time = latency_cost.cost(run.table).exact
    faster = time({}, SIZES) / time(gates, sizes)
    assert found["predicted"] == pytest.approx(faster)


def _another_table_makes_the_masks_anew(run, stair):
    """What was learned by one table is not mixed with what another one says."""
    start = stages.Student(jax.device_put(random_params(SIZES, 0)), jnp.eye(8))
    path = run.workdir / f"masks{stair.suffix}.npz"
    before = path.read_bytes()
    stages.learn_masks(run, stair, Encoder(SIZES), start, None)
    assert path.read_bytes() == before
    other = run.times | {"overhead_ms": 1.5 * run.times["overhead_ms"]}
    run = dataclasses.replace(run, times=other)
    stages.learn_masks(run, stair, Encoder(SIZES), start, None)
    time = latency_cost.cost(run.table)
    chosen = stages.passes(run, stair)[0]
    with np.load(path) as file:
        gates = {kind: file[kind] for kind in run.config.prune.kinds}
    found = time.exact({}, SIZES) / time.exact(gates, SIZES)
    assert chosen.predicted == pytest.approx(found)


def _masks_that_are_not_needed_any_more_have_no_passes(run, model, student):
    first, _ = stages.stairs((), (1.2, 9.0))  # The model is faster already.
    np.savez(run.workdir / "masks-1.2x.npz", passes=np.ones((2, 4)))
    same, _, _ = stages.learn_masks(run, first, model, student, None)
    assert same is student and stages.passes(run, first) == []
    assert "for_parameters" not in results._asked(run, first, model.config)


def test_the_least_speedup_that_counts_is_a_fraction_of_it():
    (only,) = stages.stairs((0.5,), (8,))
    assert only.suffix == "" and only.last and only.target == 1 - 1 / 8
    assert only.least(0.01) == pytest.approx(1 - 8**-0.99)
    assert only.tolerance == pytest.approx(1e-3 / 8)


def test_the_report_names_the_precision_of_a_runtime():
    """A graph of onnxruntime is in float32, whatever the model is trained in."""
    pytest.importorskip("onnxruntime")
    params, found = latency_table.random_params(SIZES), []
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch["token_type_ids"] = np.zeros_like(ids)
    for dtype in ("float32", "bfloat16"):
        sizes = dataclasses.replace(SIZES, dtype=dtype)
        call = runtimes.timed("onnx", "benchmark.runtime")(params, sizes)
        found.append(np.asarray(call(batch)))
        assert found[-1].dtype == runtimes.precision("onnx", dtype)
    np.testing.assert_array_equal(*found)
    assert runtimes.precision("onnx-int8", "float32") == "int8"
    assert runtimes.precision("jax", "bfloat16") == "bfloat16"
