"""`python -m cofi_jax.benchmarks`: what is run and counted; none asserts a speed."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import random_params
from jax.extend.core import jaxprs_in_params

from cofi_jax.benchmarks import __main__ as benchmarks
from cofi_jax.benchmarks import (
    baselines,
    inference,
    memory,
    roofline,
    startup,
    workload,
)
from cofi_jax.benchmarks import step as step_lib
from cofi_jax.config import Distill
from cofi_jax.data import batches
from cofi_jax.errors import UserError
from cofi_jax.evaluation import timing
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, cost
from cofi_jax.training import objectives
from cofi_jax.training import teacher as teacher_lib

pytestmark = pytest.mark.usefixtures("quick_compile")


SIZES = ["--layers=2", "--hidden=12", "--heads=3", "--intermediate=20"]


@pytest.fixture(scope="module")
def dense():
    config = workload.dense(
        layers=4, hidden=12, heads=3, intermediate=20, vocab_size=31, longest=8
    )
    return dataclasses.replace(config, dropout=0.0)


@pytest.fixture(scope="module")
def subject(dense):
    small = workload.like_the_paper(dense)
    params = random_params(dense, seed=0), random_params(small, seed=1)
    return workload.Subject(dense, small, *params, None)


def products(function, *args):
    """Operations of all matrix products that `function` is made of."""

    def walk(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                inner = math.prod(shape[axis] for axis in contracted)
                total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
            total += sum(map(walk, jaxprs_in_params(equation.params)))
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


def taught(subject, batch):
    """The batch with its teacher_outputs, and the operations of that."""
    teach = teacher_lib.make_teacher_forward(Encoder(subject.dense), Distill())
    counted = products(teach, subject.dense_params, batch)
    return batch | {"teacher_outputs": teach(subject.dense_params, batch)}, counted


@pytest.mark.parametrize("kind", ["masked", "late masked", "plain", "finetune"])
def test_a_steps_operations_are_those_of_its_products(subject, kind):
    rows = workload.random_rows(3, 5, 31)
    batch = step_lib.batches(rows, [(5, np.arange(3))])[0]
    batch, by_the_teacher = taught(subject, batch)
    step, state, context = step_lib.prepared(subject, Distill(), kind)
    student = subject.sliced if kind == "finetune" else subject.dense
    how = {"masked": "masked" in kind}
    counted = roofline.step_flops(student, subject.dense, [5] * 3, Distill(), **how)
    alone = roofline.step_flops(
        student, subject.dense, [5] * 3, Distill(), **how, taught=True
    )
    assert counted - alone == by_the_teacher
    if "masked" in kind:  # what the sparsity itself is summed up with

        def removed(log_alpha):
            return constraint.expected_sparsity(log_alpha, subject.dense)

        log_alpha = state.trainable["log_alpha"]
        alone += products(jax.value_and_grad(removed), log_alpha)
    assert alone == products(step, state, context, batch)


def test_operations_of_a_student_without_attention_in_its_first_layer(subject):
    """The first block there is needs no gradient to its input, whichever it is."""
    sizes = dataclasses.replace(subject.sliced, heads=(0, 0, 2, 0))
    params = random_params(sizes, seed=2)
    other = subject._replace(sliced=sizes, sliced_params=params)
    batch = step_lib.batches(workload.random_rows(2, 7, 31), [(7, np.arange(2))])[0]
    batch, by_the_teacher = taught(other, batch)
    step, state, context = step_lib.prepared(other, Distill(), "finetune")
    counted = roofline.step_flops(sizes, subject.dense, [7, 7], Distill())
    assert counted == products(step, state, context, batch) + by_the_teacher


def test_operations_are_summed_over_the_rows_own_lengths(dense):
    def count(*lengths):
        return roofline.step_flops(dense, dense, lengths, Distill())

    assert count(3, 5, 5) == count(3) + 2 * count(5)


def test_a_pass_moves_its_parameters_and_the_states_between_blocks(dense):
    config = dataclasses.replace(dense, heads=(3, 0, 1, 0), intermediate=(0, 20, 0, 7))
    params = random_params(config, seed=0)
    tables = params.pop("embeddings")
    held = sum(x.size for x in jax.tree.leaves([params, tables["norm"]]))
    rows = (2 * 6 + 6 + 1) * 12  # a word each, the positions, a type
    states = 2 * 6 * 12 * (1 + 2 * 4)  # out of the embeddings; in and out of blocks
    moved = roofline.pass_bytes(config, batch_size=2, seq_length=6)
    assert moved == 4 * (held + rows + states)
    half = dataclasses.replace(config, dtype="bfloat16")
    assert roofline.pass_bytes(half, batch_size=2, seq_length=6) == moved / 2


def test_the_roofline_is_the_slower_of_work_and_traffic(dense):
    cell = {"batch_size": 2, "seq_length": 6}
    work = 2 * 2 * cost.multiply_adds(dense, 6)
    moved = roofline.pass_bytes(dense, **cell)
    for slow in (1e-3, 1e3):
        rates = {"flops_per_second": 1.0, "bytes_per_second": slow}
        found = roofline.pass_seconds(dense, **cell, rates=rates)
        assert found == max(work, moved / slow)


def base(**widths):
    sizes = dict(layers=12, hidden=768, heads=12, intermediate=3072)
    return workload.dense(**sizes | widths, vocab_size=30522, longest=512)


def test_a_model_like_the_papers():
    found = workload.like_the_paper(base())
    assert found.hidden_size == 760
    assert (
        sum(h > 0 for h in found.heads) == sum(f > 0 for f in found.intermediate) == 3
    )
    assert {h for h in found.heads if h} <= {2, 3, 4, 5}
    assert all(100 <= f <= 700 for f in found.intermediate if f)
    removed = workload.described(found, base())["sparsity"]
    assert 0.94 < removed < 0.96


@pytest.mark.parametrize("layers", [1, 2, 6, 24])
def test_other_depths_keep_a_block_of_each_kind(layers):
    dense = base(layers=layers, hidden=24, heads=2, intermediate=6)
    found = workload.like_the_paper(dense)
    assert len(found.heads) == layers and any(found.heads) and any(found.intermediate)


def test_rounded_widths_are_multiples_or_the_dense_ones():
    sliced = dataclasses.replace(
        workload.like_the_paper(base()), intermediate=(0, 1, 64, 65) + (3070,) * 8
    )
    found = workload.rounded(sliced, base(intermediate=3071), 64)
    assert found.hidden_size == 760 and found.heads == sliced.heads
    assert found.intermediate == (0, 64, 64, 128) + (3071,) * 8


def test_sampled_batches_come_as_often_as_in_an_epoch():
    lengths = np.repeat([3, 9, 30], [400, 200, 40])
    plan = batches.epoch_plan(
        lengths, batch_size=8, buckets=(4, 16, 32), stage="", seed=0, epoch=0
    )
    found = workload.sampled_plan(plan, 16, batch_size=8)
    often = {length: sum(n == length for n, _ in found) for length in (4, 16, 32)}
    assert often == {4: 10, 16: 5, 32: 1}
    rows = np.concatenate([rows for _, rows in found])
    assert len(set(rows)) == len(rows) == 16 * 8
    assert len(workload.sampled_plan(plan, 80, batch_size=8)) == 80
    with pytest.raises(UserError, match="batches=81: must be at most 80"):
        workload.sampled_plan(plan, 81, batch_size=8)


def test_random_batches_hold_the_same_rows_and_are_as_long_as_their_longest():
    lengths = np.random.default_rng(0).integers(1, 99, 64)
    plan = [(99, rows) for rows in np.arange(2, 34).reshape(4, 8)]
    found = workload.at_random(plan, lengths)
    assert sorted(np.concatenate([rows for _, rows in found])) == list(range(2, 34))
    assert all(length == lengths[rows].max() for length, rows in found)
    assert all(len(rows) == 8 for _, rows in found)


@pytest.mark.parametrize("weights", [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_pytorch_does_the_same_work(dense, weights):
    """Equal losses and gradients, of rows of unequal lengths."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    distill = Distill(*weights, num_layers=3)
    student, teacher = (random_params(dense, seed) for seed in (0, 1))
    shift = np.random.default_rng(2).standard_normal((12, 12)) / 9
    projection = (np.eye(12) + shift).astype(np.float32)
    batch = batches.make_batch(
        rows_of_lengths(2, 6, 4), np.arange(3), length=8, batch_size=3
    )
    frozen = {"embeddings": student["embeddings"]}
    trained = {k: v for k, v in student.items() if k != "embeddings"}
    trainable = {"params": trained, "distill_projection": projection}
    teacher_outputs = teacher_lib.make_teacher_forward(Encoder(dense), distill)(
        teacher, batch
    )
    loss = objectives.DistillationObjective(Encoder(dense), distill)

    def ours(trainable):
        key = jax.random.key(0)
        return loss(
            trainable, frozen, {}, batch | {"teacher_outputs": teacher_outputs}, key
        )[0]

    expected, gradients = jax.jit(jax.value_and_grad(ours))(trainable)
    leaves = jax.tree.leaves(gradients)
    norm = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in leaves))
    step = baselines.pytorch_step(student, teacher, projection, dense, distill)
    found = [float(x) for x in step(baselines.tensors(batch))]
    np.testing.assert_allclose(found, [float(expected), norm], rtol=1e-5)


def test_pytorch_learns(dense):
    """Its optimizer moves what is trained: the same batch's loss falls."""
    pytest.importorskip("torch")
    params = [random_params(dense, seed) for seed in (0, 1)]
    eye = np.eye(12, dtype=np.float32)
    step = baselines.pytorch_step(*params, eye, dense, Distill())
    batch = batches.make_batch(
        rows_of_lengths(5, 5), np.arange(2), length=5, batch_size=2
    )
    losses = [float(step(baselines.tensors(batch))[0]) for _ in range(20)]
    assert losses[-1] < losses[0]


def rows_of_lengths(*lengths):
    rng = np.random.default_rng(0)
    ids = [rng.integers(31, size=n, dtype=np.int32) for n in lengths]
    types = [rng.integers(2, size=n, dtype=np.int32) for n in lengths]
    return batches.Examples(ids, types, np.zeros(len(ids), np.int32))


def turns(*milliseconds):
    return timing.Timing(tuple((time,) for time in milliseconds))


def test_figures_of_a_step():
    found = step_lib.described(
        turns(200, 100, 400),
        turns(100, 100, 100),
        examples=8,
        tokens=30,
        padded=40,
        flops=6_000,
        rate=60_000.0,
    )
    assert found["turn_ms"] == 200 and found["examples_per_second"] == 40
    assert found["spread"] == [20, 80]
    assert found["masked_is_faster"] == 2
    assert found["padding"] == 0.25
    assert found["useful_flops_per_second"] == pytest.approx(30_000)
    assert found["utilisation"] == pytest.approx(0.5)


def test_figures_of_a_pass():
    found = inference.described(
        turns(2, 4, 6), turns(8, 8, 6), turns(1, 1, 2), 32, roofline_ms=0.5
    )
    assert found["latency_ms"] == 4 and found["times_the_roofline"] == 8
    assert found["examples_per_second"] == 8_000
    assert found["speedup"] == 2 and found["ours_is_faster"] == 3


def test_spans_within_others_count_once():
    """A program is traced within that which calls it."""
    spans = [(4.0, 5.0), (3.0, 7.0), (3.0, 4.0), (8.0, 9.5), (7.0, 7.25)]
    assert startup.outermost(spans) == 4 + 1.5 + 0.25
    assert startup.outermost([]) == 0


def test_starts_are_compared_turn_by_turn():
    def start(whole, trace, read):
        return {"whole": whole, "trace": trace, "read": read}

    starts = {
        "cold": [start(9.0, 1.0, 0.0), start(40.0, 2.0, 0.0), start(10.0, 1.0, 0.0)],
        "warm": [start(3.0, 1.0, 2.0), start(10.0, 6.0, 4.0), start(2.0, 1.0, 1.0)],
    }
    found = startup.summary(starts)
    assert found["seconds"]["cold"] == {"whole": 10, "trace": 1, "read": 0}
    assert found["seconds"]["warm"] == {"whole": 3, "trace": 1, "read": 2}
    assert found["warm_is_faster"] == 4
    assert "4.00x" in startup.table(found)


@pytest.mark.parametrize("kind", ["masked", "plain"])
def test_a_step_holds_its_state_the_teacher_and_the_batch(subject, kind):
    batch = step_lib.batches(workload.random_rows(3, 5, 31), [(5, np.arange(3))])[0]
    found = memory.ours(subject, kind, batch)
    state = step_lib.prepared(subject, Distill(), kind)[1]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, subject.dense_params)))
    # Few bytes are the batch, the teacher's outputs and what the step reads besides.
    outputs, _ = taught(subject, batch)
    few = sum(leaf.nbytes for leaf in jax.tree.leaves(outputs))
    assert held < found["before_bytes"] <= held + few + 100
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params))
    trained -= sum(
        leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params["embeddings"])
    )
    # A gradient of all that is trained lives at some moment.
    assert found["peak_bytes"] - found["before_bytes"] > trained / 2


@pytest.fixture
def small_rates(monkeypatch):
    monkeypatch.setattr(roofline, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(roofline, "_NUMBERS", {"cpu": 64})


def run(*arguments):
    return benchmarks.main(["benchmark", *arguments])


def test_step_writes_all_its_figures(small_rates, tmp_path, capsys):
    file = tmp_path / "step.json"
    how = ["--batches=2", "--batch_size=3", "--seq_length=4", "--repeats=1"]
    assert run("step", *SIZES, *how, f"--json={file}") == 0
    result, text = json.loads(file.read_text()), capsys.readouterr().out
    assert result["command"] == "step" and result["device"] in text
    assert result["batches"] == {"4": 2} and result["examples"] == 6
    names = ["masked", "late masked", "plain", "finetune"]
    names += ["masked, kept teacher outputs", "finetune, kept teacher outputs"]
    if not baselines.missing("torch"):
        names += ["pytorch, random batches", "pytorch, our batches"]
    assert list(result["steps"]) == names
    assert all(name in text for name in names)
    assert result["masked_over_plain"] > 0
    assert result["sliced"]["hidden"] == 12 and result["dense"]["sparsity"] == 0


def test_inference_writes_a_row_for_each_runtime(small_rates, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "inference.json"
    how = ["--batch_size=1,2", "--seq_length=4", "--repeats=1", f"--json={file}"]
    assert run("inference", *SIZES, *how) == 0
    result = json.loads(file.read_text())
    models = ("dense", "sliced", "rounded")
    runtimes = ("cofi_jax", "pytorch", "onnxruntime")
    rows = [
        tuple(row[k] for k in ("batch_size", "seq_length", "model", "runtime"))
        for row in result["grid"]
    ]
    assert rows == [(b, 4, m, r) for b in (1, 2) for m in models for r in runtimes]
    assert len(result["differences"]) == 6  # of all from ours
    assert max(result["differences"].values()) < 1e-3
    for row in result["grid"]:
        least, took = row["roofline_ms"], row["latency_ms"]
        assert row["times_the_roofline"] == pytest.approx(took / least)


def test_a_runtime_that_computes_something_else_is_found_out():
    calls = {
        ("dense", "cofi_jax"): lambda: np.zeros((1, 2)),
        ("dense", "pytorch"): lambda: np.full((1, 2), 0.01),
    }
    found = inference._differences(calls, "bfloat16")
    assert found == {"dense, pytorch": pytest.approx(0.01)}
    with pytest.raises(RuntimeError, match="pytorch differs from ours by 0.0"):
        inference._differences(calls, "float32")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["step", "--model=./nowhere"], "model='./nowhere': no such folder"),
        (["step", "--seq_length=600", "--model={bert}"], "seq_length=600: must be at"),
        (["step", "--batch_size=0"], "--batch_size: '0': must be a whole number"),
        (["step", "--dtype=float16"], "dtype='float16': must be one of float32"),
        (["step", "--torch_dtype=half"], "torch_dtype='half': must be one of"),
        (["step", "--task=sst3", "--data=."], "data.task='sst3': must be one of"),
        (["step", "--data=."], "vocab=''"),
        (["step", "--hidden=10", "--heads=3"], "hidden=10: must be a multiple"),
        (["inference", "--batch_size=1,x"], "'x': must be a whole number above 0"),
        (["inference", "--seq_length=9999", "--model={bert}"], "seq_length=9999"),
        (["startup", "--model={bert}"], "needs --data"),
        (["memory", "--vocab=./nowhere"], "vocab='./nowhere': no such folder"),
        (["sing"], "invalid choice: 'sing'"),
        ([], "required: command"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, said, capsys):
    bert = "tests/fixtures/tiny_bert"
    arguments = [each.format(bert=bert) for each in arguments]
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert said in output.err and not output.out


def test_nothing_is_written_over(tmp_path, capsys):
    file = tmp_path / "kept.json"
    file.write_text("{}")
    assert run("step", "--model=./nowhere", f"--json={file}") == 2
    assert f"json='{file}': must be a new file" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert run("step", f"--json={tmp_path / 'no' / 'such.json'}") == 2


def test_pytorch_is_missed_only_where_it_is_asked_for(monkeypatch, capsys, dense):
    def find_spec(name):
        return None if name == "torch" else name

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert baselines.unfit(dense) == "torch not installed"
    for flag in ("--torch_dtype=bfloat16", "--torch_compile"):
        assert run("step", *SIZES, flag) == 2
        assert "needs PyTorch: pip install torch" in capsys.readouterr().err


def test_lack_of_memory_is_said_whoever_lacks_it():
    for text in ("RESOURCE_EXHAUSTED: 9 bytes", "CUDA out of memory. Tried"):
        with pytest.raises(UserError, match="batch_size=2: too much"):
            with timing.memory_suffices(2, 3):
                raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="another"):
        with timing.memory_suffices(2, 3):
            raise RuntimeError("another")


def test_the_module_runs_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "cofi_jax.benchmarks", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "startup" in done.stdout


@pytest.mark.slow
def test_memory_of_each_kind(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "memory.json"
    assert run("memory", *SIZES, "--batch_size=2", "--repeats=1", f"--json={file}") == 0
    found = json.loads(file.read_text())["steps"]
    assert list(found) == ["masked", "plain", "pytorch"]
    for each in found.values():
        assert 0 < each["before_bytes"] <= each["peak_bytes"]


@pytest.mark.slow
def test_startup_of_the_demo(tmp_path):
    file = tmp_path / "startup.json"
    assert run("startup", *SIZES, "--repeats=1", f"--json={file}") == 0
    starts = json.loads(file.read_text())["starts"]
    for kind in ("cold", "warm"):
        (seconds,) = starts[kind]
        assert 0 < seconds["trace"] + seconds["lower"] < seconds["whole"]
    (cold,), (warm,) = starts.values()
    compiled = "compile or read the cache"
    assert cold["read the cache"] < warm["read the cache"] < warm[compiled]
    assert warm["whole"] < cold["whole"]


def test_positions_of_a_random_model_suffice():
    found = workload.dense(
        layers=1, hidden=2, heads=1, intermediate=1, vocab_size=3, longest=700
    )
    assert isinstance(found, EncoderConfig) and found.longest == 700
