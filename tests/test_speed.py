"""`python -m cofi_jax.benchmarks`: what is run and counted; none asserts a speed."""

import collections
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
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.checkpoints.hf_config import is_dense
from cofi_jax.config import Distill
from cofi_jax.data import batches, toy
from cofi_jax.errors import UserError
from cofi_jax.evaluation import timing
from cofi_jax.models.bert import Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import constraint, cost, masks, slicing
from cofi_jax.training import objectives
from cofi_jax.training import teacher as teacher_lib

pytestmark = pytest.mark.usefixtures("quick_compile", "code_cache")


SIZES = ["--layers=2", "--hidden=12", "--heads=3", "--intermediate=20"]


@pytest.fixture(scope="module")
def dense():
    return EncoderConfig.dense(
        num_layers=4,
        num_heads=3,
        hidden_size=12,
        intermediate_size=20,
        vocab_size=31,
        num_labels=2,
        max_positions=8,
        dropout=0.0,
    )


@pytest.fixture(scope="module")
def subject(dense):
    small = workload.like_the_paper(dense)
    params = random_params(dense, seed=0), random_params(small, seed=1)
    return workload.Subject(dense, small, *params)


def random_batch(count, length):
    rows = workload.random_rows(count, length, 31)
    return step_lib.Work(rows, [length]).batches()[0]


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


@pytest.mark.parametrize("kind", step_lib.KINDS)
def test_a_steps_operations_are_those_of_its_products(subject, kind):
    batch, by_the_teacher = taught(subject, random_batch(3, 5))
    step, state, context = step_lib.prepared(subject, kind)
    student = subject.sliced if kind == "finetune" else subject.dense
    how = {"masked": kind in ("masked", "exact", "speedup")}
    counted = roofline.step_flops(student, subject.dense, [5] * 3, **how)
    alone = roofline.step_flops(student, subject.dense, [5] * 3, **how, taught=True)
    assert counted - alone == by_the_teacher
    if how["masked"]:  # what the sparsity itself is summed up with

        def removed(log_alpha):
            if kind in ("exact", "speedup"):
                log_alpha = constraint.at_target(log_alpha, subject.dense, 0.95)
            return constraint.expected_sparsity(log_alpha, subject.dense)

        log_alpha = state.trainable["log_alpha"]
        if kind == "masked":
            removed = jax.value_and_grad(removed)
        alone += products(removed, log_alpha)
    assert alone == products(step, state, context, batch)


def test_operations_of_a_student_without_attention_in_its_first_layer(subject):
    """The first block there is needs no gradient to its input, whichever it is."""
    sizes = dataclasses.replace(subject.sliced, heads=(0, 0, 2, 0))
    params = random_params(sizes, seed=2)
    other = subject._replace(sliced=sizes, sliced_params=params)
    batch, by_the_teacher = taught(other, random_batch(2, 7))
    step, state, context = step_lib.prepared(other, "finetune")
    counted = roofline.step_flops(sizes, subject.dense, [7, 7])
    assert counted == products(step, state, context, batch) + by_the_teacher


def test_operations_are_summed_over_the_rows_own_lengths(dense):
    def count(*lengths):
        return roofline.step_flops(dense, dense, lengths)

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


def base(layers=12, hidden=768, heads=12, intermediate=3072):
    return EncoderConfig.dense(
        num_layers=layers,
        num_heads=heads,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=30522,
        num_labels=2,
        max_positions=512,
    )


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
    found = inference.round_widths(sliced, base(intermediate=3071))
    assert found.hidden_size == 760 and found.heads == sliced.heads
    assert found.intermediate == (0, 64, 64, 128) + (3071,) * 8


def test_sampled_batches_come_as_often_as_in_an_epoch():
    examples = rows_of_lengths(*np.repeat([3, 9, 30], [400, 200, 40]))
    found = step_lib.sampled(examples, (4, 16, 32), 16, 8)
    assert collections.Counter(found.padded) == {4: 10, 16: 5, 32: 1}
    assert len({row.tobytes() for row in found.examples.input_ids}) > 100  # of 128
    for batch, length in zip(found.batches(), found.padded, strict=True):
        assert batch["input_ids"].shape == (8, length)
    with pytest.raises(UserError, match="batches=81: must be at most 80"):
        step_lib.sampled(examples, (4, 16, 32), 81, 8)


@pytest.mark.parametrize("count, padded", [(1, [16]), (2, [16] * 2), (8, [16] * 8)])
def test_rare_lengths_are_rare_among_few_batches(count, padded):
    examples = rows_of_lengths(*np.repeat([3, 9, 30], [24, 752, 24]))  # 3, 94, 3 %
    assert list(step_lib.sampled(examples, (4, 16, 32), count, 8).padded) == padded


def test_a_sliced_model_of_equal_layers_is_not_a_dense_one():
    dense = base()
    assert is_dense(dense)
    for change in (
        {"heads": (6,) * 12},
        {"intermediate": (0,) * 12},
        {"hidden_size": 760},
    ):
        assert not is_dense(dataclasses.replace(dense, **change))


def test_random_batches_hold_the_same_rows_and_are_as_long_as_their_longest():
    examples = rows_of_lengths(*np.random.default_rng(0).integers(1, 99, 32))
    found = step_lib.at_random(step_lib.Work(examples, [99] * 4))
    assert sorted(found.examples.lengths) == sorted(examples.lengths)
    assert list(found.examples.lengths) != list(examples.lengths)
    for rows, length in zip(found.rows(), found.padded, strict=True):
        assert len(rows) == 8 and length == found.examples.lengths[rows].max()


@pytest.mark.torch
@pytest.mark.parametrize("weights", [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_pytorch_does_the_same_work(dense, weights):
    """Equal losses and gradients, of rows of unequal lengths."""
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


@pytest.mark.torch
def test_pytorch_learns(dense):
    """Its optimizer moves what is trained: the same batch's loss falls."""
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


@pytest.fixture
def turns(monkeypatch):
    """Has the n-th of all calls that are timed take n ms, then 2 n, then 4 n."""

    def side_by_side(calls, **how):
        return {
            name: timing.Timing(((n,), (2 * n,), (4 * n,)))
            for n, name in enumerate(calls, 1)
        }

    monkeypatch.setattr(timing, "side_by_side", side_by_side)


def test_spans_within_others_count_once():
    """A program is traced within that which calls it."""
    spans = [(4.0, 5.0), (3.0, 7.0), (3.0, 4.0), (8.0, 9.5), (7.0, 7.25)]
    assert startup.outermost(spans) == 4 + 1.5 + 0.25
    assert startup.outermost([]) == 0


def test_starts_are_compared_turn_by_turn(monkeypatch):
    starts = iter([(9, 1), (3, 2), (40, 2), (10, 4), (10, 1), (2, 1)])
    found = ({"whole": whole, "trace": trace} for whole, trace in starts)
    monkeypatch.setattr(startup, "_start", lambda flags, workdir: next(found))
    about, (whole, trace) = startup.measure((), repeats=3)
    assert about["warm_is_faster"][0] == 4
    assert (whole["cold"][0], whole["warm"][0]) == (10, 3)
    assert (trace["cold"][0], trace["warm"][0]) == (1, 2)


@pytest.mark.parametrize("kind", ["masked", "plain"])
def test_a_step_holds_its_state_the_teacher_and_the_batch(subject, kind):
    batch = random_batch(3, 5)
    before, highest = memory.stated(subject, kind, batch)
    state = step_lib.prepared(subject, kind)[1]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, subject.dense_params)))
    # Few bytes are the batch, the teacher's outputs and what the step reads besides.
    outputs, _ = taught(subject, batch)
    few = sum(leaf.nbytes for leaf in jax.tree.leaves(outputs))
    assert held < before <= held + few + 100
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params))
    trained -= sum(
        leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params["embeddings"])
    )
    # A gradient of all that is trained lives at some moment.
    assert highest - before > trained / 2


def run(*arguments):
    return benchmarks.main(["benchmark", *arguments])


def test_step_writes_all_its_figures(turns, tmp_path, capsys):
    file = tmp_path / "step.json"
    how = ["--batches=2", "--batch_size=3", "--seq_length=4", "--repeats=1"]
    assert run("step", *SIZES, *how, f"--json={file}") == 0
    result, text = json.loads(file.read_text()), capsys.readouterr().out
    assert result["device"] in text and "dtype: float32" in text
    assert result["batches_by_length"] == {"4": 2} and result["examples"] == 6
    assert result["sliced"]["hidden"] == 12 and result["dense"]["sparsity"] == 0
    names = ["masked", "plain", "finetune", "exact", "speedup"]
    names += ["masked, kept teacher outputs", "finetune, kept teacher outputs"]
    if not baselines.missing("torch"):
        names += ["pytorch, random batches", "pytorch, our batches"]
    assert [row["step"] for row in result["rows"]] == names
    assert all(name in text for name in names)
    for n, row in enumerate(result["rows"], 1):
        assert row["examples_per_second"] == [6e3 / n / x for x in (2, 4, 1)]
        assert row["masked_is_faster"] == [n, n, n]
        assert row["padding"] == 0
    # The slowest of the plain distillations does as much as the fastest, in more time.
    plain, pytorch = result["rows"][1], result["rows"][-1]
    if "pytorch" in pytorch["step"]:
        ratio = plain["of_peak"] / pytorch["of_peak"]
        assert ratio == pytest.approx(len(names) / 2)


@pytest.mark.parametrize("kind", ["dense", "sliced", "hugging face"])
def test_rows_and_models_of_folders(kind, tmp_path, monkeypatch):
    """Beside what a folder holds stands a random model; its tokenizer reads rows."""
    tokenizer = toy.demo_tokenizer()
    dense = dataclasses.replace(base(2, 12, 3, 20), vocab_size=len(tokenizer))
    small = dataclasses.replace(dense, heads=(1, 0), intermediate=(0, 7))
    saved = small if kind == "sliced" else dense
    params = random_params(saved, seed=0)
    if kind == "hugging face":
        folder = tmp_path / "model"
        huggingface.save_hugging_face(folder, params, saved, tokenizer=tokenizer)
    else:
        spec = None
        if kind == "sliced":
            gates = {k: np.ones(s) for k, s in masks.mask_shapes(dense, KINDS).items()}
            gates["head"][0, 1:] = gates["mha"][1] = gates["ffn"][0] = 0
            gates["intermediate"][1, 7:] = 0
            full = random_params(dense, seed=0)
            params, spec = slicing.prune(full, gates, dense)
        data = {"task": "sst2", "path": str(tmp_path)}
        about = {"data": data, "dense": dataclasses.asdict(dense)}
        saved_model.save_model(
            tmp_path / "model", params, saved, spec, tokenizer=tokenizer, about=about
        )
    lines = [f"{sentence}\t{label}\n" for sentence, label in toy.generate(24, 0)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    seen = []

    def ours(*given):
        seen.extend(given)
        raise UserError("enough")

    monkeypatch.setattr(step_lib, "ours", ours)
    how = ["--batch_size=4", "--batches=3", f"--data={tmp_path}"]
    assert run("step", f"--model={tmp_path / 'model'}", *how) == 2
    subject, work = seen
    assert subject.dense.widths() == dense.widths()
    like = small if kind == "sliced" else workload.like_the_paper(dense)
    assert subject.sliced.widths() == like.widths()
    for config, given in (
        (subject.dense, subject.dense_params),
        (subject.sliced, subject.sliced_params),
    ):
        shapes = jax.tree.map(np.shape, abstract_params(config))
        assert jax.tree.map(np.shape, given) == shapes
    kept = subject.sliced_params if kind == "sliced" else subject.dense_params
    jax.tree.map(np.testing.assert_array_equal, kept["layer_0"], params["layer_0"])
    assert len(work.examples) == 12 and len(work.padded) == 3
    texts = [sentence for sentence, _ in toy.generate(24, 0)]
    known = set(map(tuple, tokenizer(texts)["input_ids"]))
    assert all(tuple(row.tolist()) in known for row in work.examples.input_ids)


@pytest.mark.torch
def test_inference_writes_a_row_for_each_runtime(turns, tmp_path):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "inference.json"
    how = ["--batch_size=1,2", "--seq_length=4", "--repeats=1", f"--json={file}"]
    assert run("inference", *SIZES, *how) == 0
    result = json.loads(file.read_text())
    models = ("dense", "sliced", "rounded")
    runtimes = ("cofi_jax", "pytorch", "onnxruntime")
    rows = [
        tuple(row[k] for k in ("batch_size", "seq_length", "model", "runtime"))
        for row in result["rows"]
    ]
    assert rows == [(b, 4, m, r) for b in (1, 2) for m in models for r in runtimes]
    assert len(result["differences"]) == 6  # of all from ours
    assert max(result["differences"].values()) < 1e-3
    for n, row in enumerate(result["rows"]):
        n = n % 9 + 1
        model, runtime = divmod(n - 1, 3)
        assert row["latency_ms"] == [2 * n, n, 4 * n]
        assert row["times_the_roofline"] == pytest.approx(2 * n / row["roofline_ms"])
        assert row["speedup"][0] == pytest.approx((runtime + 1) / n)
        assert row["ours_is_faster"][0] == pytest.approx(n / (3 * model + 1))


def test_a_runtime_that_computes_something_else_is_found_out():
    calls = {
        ("dense", "cofi_jax"): lambda: np.zeros((1, 2)),
        ("dense", "pytorch"): lambda: np.full((1, 2), 0.01),
    }
    found = inference.compare(calls, "bfloat16")
    assert found == {"dense, pytorch": pytest.approx(0.01)}
    with pytest.raises(RuntimeError, match="pytorch differs from ours by 0.0"):
        inference.compare(calls, "float32")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["step", "--model=./nowhere"], "model='./nowhere': no such folder"),
        (["step", "--seq_length=600", "--model={bert}"], "seq_length=600: must be at"),
        (["step", "--batch_size=0"], "--batch_size: '0': must be a whole number"),
        (["step", "--dtype=float16"], "--dtype: invalid choice: 'float16'"),
        (["step", "--task=sst3", "--data=.", "--model={bert}"], "must be one of"),
        (["step", "--data=."], "model='': must be given with data"),
        (["step", "--hidden=10", "--heads=3"], "hidden=10: must be a multiple"),
        (["inference", "--batch_size=1,x"], "'x': must be a whole number above 0"),
        (["inference", "--seq_length=9999", "--model={bert}"], "seq_length=9999"),
        (["startup", "--config=x.py"], "unrecognized arguments: --config=x.py"),
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
    assert run("step", *SIZES, "--torch_compile") == 2
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


@pytest.mark.torch
@pytest.mark.slow
def test_memory_of_each_kind(tmp_path):
    file = tmp_path / "memory.json"
    assert run("memory", *SIZES, "--batch_size=2", "--repeats=1", f"--json={file}") == 0
    found = json.loads(file.read_text())["rows"]
    assert [each["step"] for each in found] == ["masked", "plain", "pytorch"]
    for each in found:
        assert 0 < each["before"] <= each["highest"]


@pytest.mark.slow
def test_startup_of_the_demo(tmp_path, capsys):
    assert run("startup", "--", "--config=./nowhere.py") == 2
    assert "train.py said" in capsys.readouterr().err
    file = tmp_path / "startup.json"
    assert run("startup", "--repeats=1", f"--json={file}") == 0
    rows = json.loads(file.read_text())["rows"]
    cold, warm = (
        {row["seconds"]: row[kind][0] for row in rows} for kind in ("cold", "warm")
    )
    for seconds in (cold, warm):
        assert 0 < seconds["trace"] + seconds["lower"] < seconds["whole"]
    compiled = "compile or read the cache"
    assert cold["read the cache"] < warm["read the cache"] < warm[compiled]
    assert warm["whole"] < cold["whole"]


def test_positions_of_a_random_model_suffice():
    sizes = {"layers": 1, "hidden": 2, "heads": 1, "intermediate": 1}
    found = workload.load("", dtype="float32", longest=700, **sizes)
    assert found.dense.longest == 700
