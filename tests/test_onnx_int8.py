"""Models in int8: how far they are off, what is said of it, and when it is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import random_params
from test_export import DEMO, LABELS, ROWS, run, save, tree
from test_to_onnx import batch_of, sizes

from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Data
from cofi_jax.data import batches, tasks
from cofi_jax.data.toy import demo_tokenizer
from cofi_jax.errors import UserError
from cofi_jax.export import certificate, export, to_onnx, to_onnx_int8, verify
from cofi_jax.models.config import EncoderConfig

onnx = pytest.importorskip("onnx")


numpy_helper = pytest.importorskip("onnx.numpy_helper")


pytest.importorskip("onnxruntime")


pytestmark = pytest.mark.usefixtures("quick_compile")


# What the quantizer makes.


def arrays(folder):
    constants = onnx.load(folder / "model.onnx").graph.initializer
    return {each.name: numpy_helper.to_array(each) for each in constants}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float32 model of ragged layers, and the same in int8."""
    top = tmp_path_factory.mktemp("int8")
    source, folder = top / "float32", top / "int8"
    source.mkdir()
    folder.mkdir()
    config = sizes()
    to_onnx.write(source, random_params(config, 0), config, ())
    to_onnx_int8.quantize(source, folder)
    return source, folder


def test_weights_are_off_by_half_a_step(folders):
    """Each output of a layer has its own scale, the word table a single one."""
    before, after = map(arrays, folders)
    found = to_onnx_int8.products(folders[0])
    # Two attention blocks of several heads, and one that reads the first token alone;
    # two feed-forward blocks; the pooler.
    assert len(found) == 2 * 2 + 3 + 2 * 2 + 1
    for name in found:
        weight = before[f"{name}.weight"].T  # (in, out)
        quantized = after[f"{name}.weight_Transposed_quantized"]
        scale = after[f"{name}.weight_Transposed_scale"]
        assert quantized.dtype == np.int8 and np.abs(quantized).max() == 64
        assert not after[f"{name}.weight_Transposed_zero_point"].any()
        np.testing.assert_allclose(scale, np.abs(weight).max(0) / 64, rtol=1e-5)
        error = np.abs(weight - quantized * scale)
        assert (error <= scale / 2 * (1 + 1e-5)).all()
    name = "bert.embeddings.word_embeddings.weight"
    table, scale = after[f"{name}_quantized"], after[f"{name}_scale"]
    assert table.dtype == np.uint8 and scale.shape == ()
    np.testing.assert_allclose(scale, np.ptp(before[name]) / 255, rtol=1e-5)
    error = before[name] - (table - after[f"{name}_zero_point"].astype(float)) * scale
    assert np.abs(error).max() <= scale * (1 + 1e-5)  # The zero point is rounded, too.
    for name in ("position", "token_type"):
        name = f"bert.embeddings.{name}_embeddings.weight"
        np.testing.assert_array_equal(after[name], before[name])
    kept = after["classifier.weight_Transposed"]
    np.testing.assert_array_equal(kept, before["classifier.weight"].T)
    assert not {f"{name}.weight" for name in found} & set(after)


def test_a_product_is_as_close_as_its_steps(tmp_path):
    """The error of x W + b is bounded by half a step of each factor."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 40)).astype(np.float32) + 0.5
    weight = rng.standard_normal((7, 40)).astype(np.float32)
    bias = rng.standard_normal(7).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["y"], "a", transB=1)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind, [None, 40])],
        [helper.make_tensor_value_info("y", kind, [None, 7])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("a.weight", weight), ("a.bias", bias))
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    source, folder = tmp_path / "float32", tmp_path / "int8"
    source.mkdir()
    folder.mkdir()
    onnx.save_model(model, source / "model.onnx")
    to_onnx_int8.quantize(source, folder)
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {"x": x})
    in_x = (x.max() - x.min()) / 255
    in_weight = np.abs(weight).max(1) / 64  # (out,)
    # The zero point is rounded, too, so values at the end are off by a whole step.
    worst_x = np.full_like(x, in_x / 2) + in_x / 2 * ((x == x.max()) | (x == x.min()))
    bound = (
        worst_x @ np.abs(weight).T
        + np.abs(x).sum(1)[:, None] * in_weight / 2
        + worst_x.sum(1)[:, None] * in_weight / 2
    )
    error = np.abs(found - (x @ weight.T + bias))
    assert error.max() > 1e-3
    assert (error <= bound + 1e-5).all()


@pytest.mark.parametrize("problem", ["classification", "regression", "span"])
def test_logits_are_close_to_those_of_float32(tmp_path, problem):
    config = sizes(problem=problem)
    params, batch = random_params(config, 0), batch_of(config)
    to_onnx_int8.write(tmp_path, params, config, ())
    found = to_onnx.load(tmp_path)(batch)
    (tmp_path / "float32").mkdir()
    to_onnx.write(tmp_path / "float32", params, config, ())
    expected = to_onnx.load(tmp_path / "float32")(batch)
    error = np.abs(found - expected)
    assert found.shape == expected.shape
    assert 1e-5 < error.max() < 0.1 * np.abs(expected).max()


def test_the_quantizer_says_nothing(folders, tmp_path, capfd, caplog):
    to_onnx_int8.quantize(folders[0], tmp_path)
    out, err = capfd.readouterr()
    assert not out and not err and not caplog.records


@pytest.mark.parametrize("at", [0, -1])
def test_a_product_that_is_kept_is_that_of_float32(folders, tmp_path, at):
    """As a trial puts it back, and as the quantizer leaves it out: the same logits."""
    source, folder = folders
    name, batch = to_onnx_int8.products(source)[at], batch_of(sizes())
    to_onnx_int8.quantize(source, tmp_path, [name])
    assert f"{name}.weight_Transposed_quantized" not in arrays(tmp_path)
    written = to_onnx.load(tmp_path)(batch)
    trials = to_onnx_int8._Trials(source, folder)
    np.testing.assert_allclose(trials.predict([name])(batch), written, atol=1e-6)
    np.testing.assert_array_equal(
        trials.predict([])(batch), to_onnx.load(folder)(batch)
    )
    assert np.abs(written - to_onnx.load(folder)(batch)).max() > 1e-6


# Scores of two models on the same rows.


def examples_of(labels):
    rows = [np.zeros(1, np.int32)] * len(labels)
    return batches.Examples(rows, rows, labels)


def two_models(metric, count=120):
    """A task of that metric, rows, and the logits of two models that mostly agree."""
    rng = np.random.default_rng(3)
    if metric == "pearson":
        task, labels = tasks.TASKS["stsb"], rng.standard_normal(count)
        before = labels[:, None] + 0.5 * rng.standard_normal((count, 1))
    else:
        task, labels = tasks.TASKS["sst2"], rng.integers(0, 2, count)
        before = 2 * np.eye(2)[labels] + rng.standard_normal((count, 2))
    after = before + 0.4 * rng.standard_normal(before.shape)
    task = dataclasses.replace(task, metrics=(metric,))
    return task, examples_of(labels), before, after


def score_of(metric, values, labels):
    """(D,) scores of D draws of N rows; (D, N) values are classes or numbers."""
    if metric == "accuracy":
        return (values == labels).mean(1)
    if metric == "f1":
        both = (values * labels).sum(1)
        return 2 * both / (values.sum(1) + labels.sum(1))
    values, labels = (x - x.mean(1, keepdims=True) for x in (values, labels))
    lengths = np.linalg.norm(values, axis=1) * np.linalg.norm(labels, axis=1)
    return (values * labels).sum(1) / lengths


@pytest.mark.parametrize(
    ("metric", "tolerance"), [("accuracy", 0.03), ("f1", 0.15), ("pearson", 0.15)]
)
def test_the_standard_error_of_a_difference(metric, tolerance):
    """Against a bootstrap of 10,000 draws, each of which scores both models."""
    task, examples, *logits = two_models(metric)
    results = [certificate.result(task, examples, each) for each in logits]
    chosen = np.random.default_rng(1).integers(len(examples), size=(10_000, 120))
    values = [x.argmax(1) if x.shape[1] > 1 else x[:, 0] for x in logits]
    draws = [score_of(metric, x[chosen], examples.labels[chosen]) for x in values]
    found = certificate.standard_error(metric, *results)
    assert found == pytest.approx(np.std(np.subtract(*draws)), rel=tolerance)
    # It is that of the pairs: each model's own errors would make it larger.
    assert found < 0.8 * np.hypot(*np.std(draws, axis=1))


def test_what_changes_between_two_models():
    labels = np.array([0, 0, 0, 0, 1, 1])
    before = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    after = np.eye(2)[[0, 1, 1, 0, 1, 1]] * 1.5
    task, examples = tasks.TASKS["sst2"], examples_of(labels)
    results = [certificate.result(task, examples, x) for x in (before, after)]
    found = certificate.compare(task, examples, *results)
    assert found == {
        "differences": {"accuracy": pytest.approx(-1 / 6)},
        # Of the differences 0, -1, -1, 1, 0, 0: sqrt((3 - 1 / 6) / 5 / 6).
        "standard_errors": {"accuracy": pytest.approx(np.sqrt((3 - 1 / 6) / 30))},
        "max_abs_difference": 1.5,
        "flips": 3,
        "worst_recall": {"class": "negative", "change": -0.25},
    }


@pytest.mark.parametrize(
    ("wrong", "count", "max_loss", "refused"),
    [
        (3, 100, 0.01, False),  # 0.03, of a standard error of 0.017
        (8, 100, 0.01, True),
        (8, 100, 0.1, False),
        (10, 2000, 0.01, False),  # 0.005, which is certain but small
        (30, 2000, 0.01, True),
        (10, 1000, 0.01, False),  # 0.01 itself, but 1 - 0.99 is more in floats
        (11, 1000, 0.01, True),
        (0, 100, 0.0, False),
    ],
)
def test_what_is_a_loss(wrong, count, max_loss, refused):
    task, examples = tasks.TASKS["sst2"], examples_of(np.zeros(count, int))
    logits = np.eye(2)[np.zeros(count, int)]
    after = np.eye(2)[(np.arange(count) < wrong).astype(int)]
    results = [certificate.result(task, examples, x) for x in (logits, after)]
    assert certificate.loses(task, *results, max_loss) == refused


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_score_that_is_no_number_is_a_loss(at):
    task, examples = tasks.TASKS["sst2"], examples_of(np.zeros(9, int))
    found = certificate.result(task, examples, np.eye(2)[np.zeros(9, int)])
    results = {"before": found, "after": found}
    results[at] = found._replace(scores={"accuracy": np.nan})
    assert certificate.loses(task, *results.values(), 0.01)


def test_an_answer_may_be_the_empty_text():
    """Its changes are counted, and there are none to count of numbers."""
    task, examples = tasks.TASKS["sst2"], examples_of(np.zeros(2, int))
    task = dataclasses.replace(task, labels=("", "full"))
    logits = np.eye(2)[[0, 0]], np.eye(2)[[0, 1]]
    results = [certificate.result(task, examples, x) for x in logits]
    assert certificate.compare(task, examples, *results)["flips"] == 1
    task, examples, *logits = two_models("pearson")
    results = [certificate.result(task, examples, x) for x in logits]
    assert "flips" not in certificate.compare(task, examples, *results)


# Models that int8 harms, whose own answers are the labels.


def make_teacher(top, spoil=lambda params: None, rows=200):
    """A dense model at `top`/model, with `rows` rows of which it answers all right."""
    tokenizer = demo_tokenizer()
    config = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        heads=(4, 4),
        head_size=4,
        intermediate=(24, 24),
        pooler_size=16,
        num_labels=2,
        max_positions=32,
    )
    params = random_params(config, 3)
    params["classifier"]["bias"][:] = 0
    spoil(params)
    words = [w for w in tokenizer.get_vocab() if w.isalpha()]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(2 * rows)]
    data = Data(task="own", path=str(top), columns=("text",), labels=("n", "y"))
    data = dataclasses.replace(data, max_length=16)
    model = verify.in_jax(params, config)
    tokens = tokenizer(texts, padding=True, return_tensors="np")
    logits = model.predict({k: v.astype(np.int32) for k, v in tokens.items()})
    margins = np.diff(np.asarray(logits))[:, 0]
    # This makes both classes about as frequent.
    params["classifier"]["bias"][1] = -np.median(margins)
    margins -= np.median(margins)
    sure = np.argsort(-np.abs(margins))[:rows]  # That int8 should not change.
    lines = [f"{texts[row]},{'ny'[int(margins[row] > 0)]}" for row in sure]
    (top / "validation.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    about = {"task": "own", "labels": ["n", "y"], "data": dataclasses.asdict(data)}
    path = top / "model"
    saved_model.save_model(path, params, config, tokenizer=tokenizer, about=about)
    return path


def spoil_product(params):
    """One unit that is never active has large weights: all others become 0 in int8."""
    layer = params["layer_1"]["ffn"]
    layer["up"]["kernel"][:, 0] = 0
    layer["up"]["bias"][0] = -50
    layer["down"]["kernel"] *= 4
    layer["down"]["kernel"][0] = 1e4


def spoil_words(params):
    """A word that no row has is far off: all others become 0 in int8."""
    params["embeddings"]["word"][1] = 1e4


SPOILT = "bert.encoder.layer.1.output.dense"


def exported(path, **others):
    settings = {"repeats": 1, "batch_size": 2, "seq_length": 4}
    return export.export(path, ["onnx-int8"], **settings | others)["onnx-int8"]


def test_a_product_that_int8_harms_is_kept_in_float32(tmp_path):
    path = make_teacher(tmp_path, spoil_product)
    check = exported(path)
    found = check["certificate"]
    assert found["kept_in_float32"] == [SPOILT]
    assert check["reference_scores"] == {"accuracy": 1}
    assert check["scores"]["accuracy"] >= 0.95
    assert f"{SPOILT}.weight_Transposed_quantized" not in arrays(path / "onnx-int8")
    card = (path / "README.md").read_text()
    assert f"that int8 harms most are kept in float32: `{SPOILT}`." in card


def test_a_loss_is_refused_and_the_flag_allows_it(tmp_path, monkeypatch):
    path = make_teacher(tmp_path, spoil_words)
    with pytest.raises(UserError) as caught:
        exported(path)
    said = str(caught.value)
    assert said.startswith("max_loss=0.01: the accuracy of onnx-int8 falls from 1.0000")
    assert "not written" in said and "--max_loss" in said and "\n" not in said
    assert not (path / "onnx-int8").exists()
    check = exported(path, max_loss=1)
    (change,) = check["certificate"]["changes"]
    assert change["differences"]["accuracy"] == check["scores"]["accuracy"] - 1 < -0.1
    assert change["flips"] == round(-200 * change["differences"]["accuracy"])
    assert check["certificate"]["kept_in_float32"] == []
    assert check["certificate"]["max_loss"] == 1
    there = tree(path / "onnx-int8")
    with pytest.raises(UserError, match="not written"):
        exported(path)
    assert tree(path / "onnx-int8") == there


def test_the_search_of_products_ends(tmp_path, monkeypatch):
    """After the time that it has, found or not."""
    path = make_teacher(tmp_path, spoil_product)
    monkeypatch.setattr(to_onnx_int8, "_SECONDS", -1)
    with pytest.raises(UserError, match="max_loss=0.01: the accuracy of onnx-int8"):
        exported(path)


# The dense model of the same run.


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "pruned", DEMO, LABELS)


def save_teacher(path, **others):
    """A dense model beside the saved one, which says that it is of the same run."""
    _, _, about = saved_model.read_about(path)
    dense = EncoderConfig.from_json(about["dense"])
    about = {key: about[key] for key in ("task", "labels", "data")} | others
    tokenizer = saved_model.load_tokenizer(path)
    params = random_params(dense, 5)
    saved_model.save_model(
        path.with_name("teacher"), params, dense, tokenizer=tokenizer, about=about
    )
    return params, dense


def test_the_dense_model_is_scored_beside_the_pruned_one(sliced, tmp_path):
    path = shutil.copytree(sliced, tmp_path / "pruned")
    params, dense = save_teacher(path)
    check = run(path, "onnx-int8")["onnx-int8"]
    assert check == json.loads((path / "onnx-int8" / "check.json").read_text())
    models = check["certificate"]["models"]
    names = ["dense", "dense int8", "pruned", "pruned int8"]
    assert [*models] == names
    task = saved_model.saved_task(str(path))
    read = verify.validation(
        task, saved_model.load_tokenizer(path), ROWS, field="model", path=str(path)
    )
    rows = read(verify.in_jax(params, dense), "the dense model")
    assert models["dense"]["scores"] == task.scores(rows.logits, rows.examples)
    assert models["pruned int8"]["scores"] == check["scores"]
    graph = path / "onnx-int8" / "model.onnx"
    assert models["pruned int8"]["bytes"] == graph.stat().st_size
    changes = {(c["from"], c["to"]): c for c in check["certificate"]["changes"]}
    assert [*changes] == [*(("dense", x) for x in names[1:]), ("pruned", "pruned int8")]
    for (one, other), change in changes.items():
        before, after = (models[name]["scores"]["accuracy"] for name in (one, other))
        assert change["differences"]["accuracy"] == after - before
    cells = check["latency"]
    assert [(c["batch_size"], c["seq_length"]) for c in cells] == [(1, 16), (32, 16)]
    for cell in cells:
        assert [*cell["latency_ms"]] == names
        for median, low, high in cell["latency_ms"].values():
            assert 0 < low <= median <= high
    where = check["certificate"]["cpu"]
    assert (
        where["threads"] >= 1 and where["machine"] and isinstance(where["int8"], list)
    )
    card = (path / "README.md").read_text()
    assert "not at hand" not in card
    (line,) = (x for x in card.splitlines() if x.startswith("| dense int8"))
    assert f"{models['dense int8']['scores']['accuracy']:.4f}" in line


@pytest.mark.parametrize(
    "others", [{"labels": ["a", "b"]}, {"scores": {"x": {}}}, None]
)
def test_another_dense_model_is_not_taken_for_it(sliced, tmp_path, others):
    """Of other labels or scores than the report names; or there is none at all."""
    path = shutil.copytree(sliced, tmp_path / "pruned")
    described = json.loads((path / "model.json").read_text())
    described["about"]["report"] = {"teacher": {"scores": {"x": {"accuracy": 0.9}}}}
    (path / "model.json").write_text(json.dumps(described))
    if others is not None:
        save_teacher(path, **{"scores": {"x": {"accuracy": 0.9}}} | others)
    _, _, about = saved_model.read_about(path)
    assert export._teacher(path, about) is None
    if others is not None:
        shutil.rmtree(path.with_name("teacher"))
        save_teacher(path, scores={"x": {"accuracy": 0.9}})
        assert export._teacher(path, about) is not None


def test_the_dense_model_is_loaded_on_the_cpu(sliced, tmp_path, monkeypatch):
    """As all of an export is, where the first device is another one, too."""
    path = shutil.copytree(sliced, tmp_path / "pruned")
    params, _ = save_teacher(path)
    _, _, about = saved_model.read_about(path)
    known = jax.local_devices

    def devices(*args, backend=None):
        assert backend == "cpu"
        return known(backend=backend)

    monkeypatch.setattr(jax, "local_devices", devices)
    found = export._teacher(path, about)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_without_the_dense_model_the_certificate_says_so(sliced, tmp_path):
    path = shutil.copytree(sliced, tmp_path / "pruned")
    check = run(path, "onnx-int8")["onnx-int8"]
    models = check["certificate"]["models"]
    assert ["scores" in model for model in models.values()] == [False] * 2 + [True] * 2
    assert len(check["certificate"]["changes"]) == 1
    assert "The dense model was not at hand" in (path / "README.md").read_text()
