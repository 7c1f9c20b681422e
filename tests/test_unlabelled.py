"""Rows without labels: a teacher's answers take their place, of every kind."""

import json
import shutil

import numpy as np
import pytest
from conftest import complaint, random_params

import cofi_jax as cofi
from cofi_jax import config as config_lib
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.data import toy
from cofi_jax.evaluation import evaluate, predict
from cofi_jax.export import export
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import tables
from cofi_jax.run import run as run_lib
from cofi_jax.run import setup, stages

pytestmark = pytest.mark.usefixtures("quick_compile", "without_pictures")


class Kind:
    """What a kind of output is asked for with, and the rows of a test."""

    def __init__(self, labels=(), settings=None, columns=("text",), metric="", **model):
        self.labels, self.settings = labels, settings or {}
        self.columns, self.metrics = columns, (metric,) if metric else ()
        self.model = model

    def cells(self, split):
        """The texts of a split by column, of which there are 24."""
        first, second = (
            [text for text, _ in toy.generate(24, seed=f"{split} {name}")]
            for name in ("a", "b")
        )
        if self.columns == ("tokens",):
            return {"tokens": [text.split() for text in first]}
        if self.columns == ("text",):
            return {"text": first}
        return {
            "query": [f"the {toy.NOUNS[i // 6]}" for i in range(24)],
            "passage": second,
        }


KINDS = {
    "classification": Kind(("poor", "fair", "great"), num_labels=3),
    "multilabel": Kind(
        ("long", "sad"), {"thresholds": [0.73, 0.66]}, metric="macro_f1", num_labels=2
    ),
    "regression": Kind(num_labels=1),
    "entities": Kind(
        ("O", "B-FILM", "I-FILM"),
        columns=("tokens",),
        num_labels=3,
        head="every",
        pooler_size=0,
    ),
    "ranking": Kind(columns=("query", "passage"), metric="mrr_at_10", num_labels=1),
}


def model_of(kind, tokenizer):
    """The sizes and parameters of a small model, whose answers differ."""
    sizes = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        heads=(2,),
        head_size=8,
        intermediate=(16,),
        max_positions=24,
        dropout=0.0,
        problem=kind,
        **{"pooler_size": 16} | KINDS[kind].model,
    )
    params = random_params(sizes, 7 if kind == "entities" else 2)
    head = params["classifier"]
    head = {"kernel": 2 * head["kernel"], "bias": 0 * head["bias"]}
    return sizes, params | {"classifier": head}


def save_teacher(path, kind, tokenizer):
    """As its own run would, which had labels."""
    sizes, params = model_of(kind, tokenizer)
    about = {
        "task": "own",
        "labels": list(KINDS[kind].labels),
        "data": vars(data_of(kind)) | {"labels": KINDS[kind].labels},
        "scores": {"validation": {"accuracy": 0.9}},
    }
    if KINDS[kind].settings:
        about["settings"] = KINDS[kind].settings
    saved_model.save_model(path, params, sizes, tokenizer=tokenizer, about=about)


def data_of(kind, top="", **more):
    fields = {"columns": KINDS[kind].columns, "metrics": KINDS[kind].metrics}
    fields |= {"problem": kind, "max_length": 24, "buckets": (24,)}
    return config_lib.Data(task="own", path=str(top), **fields | more)


def config_of(kind, top, teacher="teacher", **more):
    found = config_lib.Config(data=data_of(kind, top, label_column="", **more))
    found.teacher.path = str(top / teacher) if teacher else ""
    found.model.dropout = 0.0
    found.eval_batch_size = 32  # as that of pipelines, whose programs are the same
    found.benchmark = config_lib.Benchmark(batch_size=1, seq_length=24, repeats=1)
    found.prune.mask_learning_rate = 10.0
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return toy.demo_tokenizer()


@pytest.fixture(scope="module")
def tops(tmp_path_factory, tokenizer):
    """By kind, a folder with rows that have no labels and with a teacher."""
    found = {}
    for kind in KINDS:
        found[kind] = top = tmp_path_factory.mktemp(kind)
        for split in ("train", "validation"):
            cells = KINDS[kind].cells(split)
            rows = (
                dict(zip(cells, row, strict=True))
                for row in zip(*cells.values(), strict=True)
            )
            (top / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        save_teacher(top / "teacher", kind, tokenizer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_what_the_teacher_answers(kind, tops):
    """As its pipeline does, text by text."""
    top, texts = tops[kind], KINDS[kind].cells("validation")
    inputs = setup.load_inputs(config_of(kind, top))
    assert inputs.task.labels == KINDS[kind].labels
    assert len(inputs.examples["train"]) == len(inputs.examples["validation"]) == 24
    examples = inputs.examples["validation"]
    asked = [*zip(*texts.values(), strict=True)]
    asked = [row if len(row) > 1 else row[0] for row in asked]
    if kind == "entities":
        asked = [" ".join(words) for words in asked]
    answers = cofi.pipeline(top / "teacher")(asked)
    if kind == "classification":
        given = [KINDS[kind].labels.index(x["label"]) for x in answers]
        assert len({*given}) > 1 and examples.labels.tolist() == given
    elif kind == "multilabel":
        given = [[name in x["labels"] for name in ("long", "sad")] for x in answers]
        assert 0 < np.mean(given) < 1
        np.testing.assert_array_equal(examples.labels, given)
    elif kind == "regression":
        given = [x["value"] for x in answers]
        np.testing.assert_allclose(examples.labels, given, rtol=1e-5)
    elif kind == "ranking":
        given = [x["score"] for x in answers]
        assert np.std(given) > 0.01
        np.testing.assert_allclose(examples.labels[:, 0], given, rtol=1e-5)
        logits = np.log(given) - np.log1p(-np.array(given))
        np.testing.assert_allclose(examples.labels[:, 1], logits, atol=1e-5)
        assert examples.labels[:, 2].tolist() == [i // 6 for i in range(24)]
    else:
        words = [word for row in texts["tokens"] for word in row]
        labels = np.array(KINDS[kind].labels)[examples.uncut.labels]
        inside = [w for w, label in zip(words, labels, strict=True) if label != "O"]
        found = [x["text"] for answer in answers for x in answer["entities"]]
        assert 0 < len(inside) < len(words) and " ".join(found).split() == inside
        assert (examples.labels >= 0).sum() == len(words)
    # What it says itself agrees with it.
    model = predict.make_predict(inputs.model)
    task = setup._as_the_teacher(config_of(kind, top), inputs.task)
    logits = predict.logits(model, inputs.params, task, examples, batch_size=32)
    assert task.scores(logits, examples) == {task.metrics[0]: pytest.approx(1)}


def test_a_teacher_keeps_the_thresholds_that_its_answers_went_by(tops, tmp_path):
    """Others may answer the training rows alike, but not all that is asked later."""
    config = config_of("multilabel", tops["multilabel"])
    inputs = setup.load_inputs(config)
    train, *validation = inputs.examples.values()
    how = {"log": None, "validation": {"validation": validation[0]}, "train": train}
    how |= {"task": inputs.task, "dense": inputs.model.config, "judge": inputs.judge}
    run = stages.Run(config, tmp_path, **how)
    reached = run_lib._save_teacher(run, inputs, inputs.params)
    assert reached["settings"] == KINDS["multilabel"].settings
    assert reached["scores"] == {"validation": {"macro_f1": pytest.approx(1)}}
    answers = run.answers(inputs.model, inputs.params, by=run.judge).answers
    texts = KINDS["multilabel"].cells("validation")["text"]
    for path in (tops["multilabel"] / "teacher", tmp_path / "teacher"):
        assert [x["labels"] for x in cofi.pipeline(path)(texts)] == answers
    # A student has thresholds of its own.
    assert run.reached(inputs.model, inputs.params)["settings"] != reached["settings"]


def test_labels_need_a_teacher_or_a_column(tops, tmp_path):
    config = config_of("regression", tops["regression"], teacher="")
    message = complaint(setup.load_inputs, config)
    assert message.startswith("data.label_column=''") and "teacher.path" in message
    message = complaint(run_lib.run, config, tmp_path / "run")
    assert message.startswith("data.label_column=''")
    assert not (tmp_path / "run").exists()
    config.data.task, config.data.columns, config.data.problem = (
        "sst2",
        (),
        "classification",
    )
    config.data.metrics = ()
    assert "only the task own takes it" in complaint(setup.load_inputs, config)


def forget(path, name):
    """Saves a model anew without what its description says of something."""
    described = json.loads((path / "model.json").read_text())
    del described["about"][name]
    (path / "model.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("multilabel", lambda x: (x / "model.json").write_text("[]"), "is damaged"),
        ("regression", lambda x: forget(x, "data"), "saved without data"),
        ("regression", lambda x: shutil.rmtree(x / "tokenizer"), "has no tokenizer"),
    ],
)
def test_a_teacher_that_is_damaged(kind, spoil, said, tops, tmp_path):
    """The message names the field that says where it is."""
    config = config_of(kind, tops[kind])
    config.teacher.path = str(tmp_path / "teacher")
    shutil.copytree(tops[kind] / "teacher", tmp_path / "teacher")
    spoil(tmp_path / "teacher")
    message = complaint(setup.load_inputs, config)
    assert message.startswith("teacher.path=") and said in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_labels_where_others_have_some(kind, tmp_path, tops):
    labels = {"classification": "fair", "regression": 0.5, "ranking": 1}
    labels |= {"multilabel": ["sad"], "entities": ["O"] * 9}
    for split in ("train", "validation"):
        cells = KINDS[kind].cells(split)
        rows = [
            dict(zip(cells, row, strict=True))
            for row in zip(*cells.values(), strict=True)
        ]
        for number, row in enumerate(rows[:4]):
            row["label"] = labels[kind] if number != 2 else None
            if kind == "entities":
                row["tokens"] = row["tokens"][:1] * 9
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    config = config_of(kind, tmp_path, teacher="")
    config.data.label_column = "label"
    config.data.labels = KINDS[kind].labels
    message = complaint(setup.load_inputs, config)
    assert "train.jsonl, row 2 (the first is 0) has label=None" in message


def test_the_classes_are_those_of_the_teacher(tops, tokenizer, tmp_path):
    kind = "classification"
    top, (sizes, params) = tops[kind], model_of(kind, tokenizer)
    expected = setup.load_inputs(config_of(kind, top)).examples["train"].labels
    hub = {"tokenizer": tokenizer, "labels": KINDS[kind].labels}
    huggingface.save_hugging_face(top / "hub", params, sizes, **hub)
    inputs = setup.load_inputs(config_of(kind, top, "hub"))
    assert inputs.task.labels == ("poor", "fair", "great")
    np.testing.assert_array_equal(inputs.examples["train"].labels, expected)
    # The names of the task are in its own order, and so are its numbers.
    config = config_of(kind, top, "hub", labels=("great", "poor", "fair"))
    inputs = setup.load_inputs(config)
    found = inputs.examples["train"].labels
    np.testing.assert_array_equal(found, np.array([1, 2, 0])[expected])
    config.teacher.path = str(top / "teacher")
    message = complaint(setup.find_task, config)
    assert message.startswith("data.labels=('great', 'poor', 'fair')")
    config = config_of(kind, top)
    config.teacher.path = str(tops["ranking"] / "teacher")
    message = complaint(setup.load_inputs, config)
    assert message.startswith("teacher.path=") and "names no classes" in message
    # A folder without names needs them.
    fields = json.loads((top / "hub" / "config.json").read_text())
    del fields["id2label"], fields["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = config_of(kind, top)
    config.teacher.path = str(tmp_path)
    message = complaint(setup.find_task, config)
    assert message.startswith("teacher.path=") and "teacher.labels" in message
    config.teacher.labels = ("a", "b", "c")
    assert setup.find_task(config).labels == ("a", "b", "c")


@pytest.fixture(scope="module")
def finished(tops):
    """The workdir and the report of a run on rows that have no labels."""
    top = tops["ranking"]
    config = config_of("ranking", top)
    config.prune.targets, config.prune.constraint = (0.4,), "exact"
    config.prune.seeds = "importance"
    config.prune.prepruning_epochs = config.prune.epochs = 0
    config.prune.seed_batches, config.prune.warmup_epochs = 2, 0
    config.finetune.epochs, config.finetune.learning_rate = 3, 1e-3
    config.prune.batch_size = config.finetune.batch_size = 12
    workdir = top / "run"
    return workdir, run_lib.run(config, workdir), config


def test_the_score_is_agreement_with_the_teacher(finished, capsys):
    workdir, report, config = finished
    assert report["agreement"] is True
    assert report["teacher"]["score"] == pytest.approx(1)
    assert 0 < report["pruned"]["score"] <= 1
    said = "Scores are agreement with the dense model, and not with labels."
    for text in (
        tables.table(report),
        (workdir / "report.md").read_text(),
        (workdir / "pruned" / "README.md").read_text(),
    ):
        assert text.count(said) == 1
    said = "agreement with the answers of the model that it was made from"
    assert said in (workdir / "teacher" / "README.md").read_text()
    # Masks have different seeds, which the loss of one's own answers would not give.
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert all("loss_task" not in json.loads(line) for line in lines)
    assert run_lib.run(config, workdir) == report


def test_saved_models_are_compared_with_the_first_one(finished):
    workdir, report, _ = finished
    paths = [workdir / name for name in ("teacher", "pruned")]
    found = evaluate.evaluate(paths, batch_sizes=[1], repeats=1)
    assert found["agreement"] is True and found["examples"] == {"validation": 4}
    for model, name in zip(found["models"], ("teacher", "pruned"), strict=True):
        scores = report[name]["scores"]["validation"]
        assert model["scores"]["validation"] == pytest.approx(scores, abs=1e-6)
    assert "Scores are agreement with teacher, and not" in tables.evaluation(found)
    (alone,) = evaluate.evaluate(paths[1:], batch_sizes=[1], repeats=1)["models"]
    assert alone["score"] == pytest.approx(1)


def test_saved_models_are_scored_by_labels_where_there_are_some(finished, tmp_path):
    """The passage that the teacher ranks last of six is the relevant one.

    The teacher itself was trained with labels, which were in another column.
    """
    workdir, _, _ = finished
    cells = KINDS["ranking"].cells("validation")
    pairs = [*zip(cells["query"], cells["passage"], strict=True)]
    scores = [x["score"] for x in cofi.pipeline(workdir / "teacher")(pairs)]
    last = np.argmin(np.reshape(scores, (4, 6)), axis=1) + np.arange(0, 24, 6)
    with (tmp_path / "validation.jsonl").open("w") as file:
        for row, (query, passage) in enumerate(pairs):
            cells = {"query": query, "passage": passage, "good": int(row in last)}
            print(json.dumps(cells), file=file)
    paths = [workdir.parent / "teacher", workdir / "pruned"]
    sizes = {"data_path": str(tmp_path), "batch_sizes": [1], "repeats": 1}
    found = evaluate.evaluate(paths, data={"label_column": "good"}, **sizes)
    assert "agreement" not in found
    assert found["models"][0]["score"] == pytest.approx(1 / 6)
    assert found["models"][1]["score"] > 1 / 6
    for column, said in (
        ("other", "needs a column 'other'"),
        ("query", "data.columns=('query', 'passage'): names one twice, data.label_col"),
    ):
        how = {"data": {"label_column": column}, **sizes}
        assert said in complaint(lambda how=how: evaluate.evaluate(paths, **how))


def test_exports_are_scored_by_the_teacher_beside_them(finished, tmp_path):
    workdir, report, _ = finished
    sizes = {"batch_size": 1, "seq_length": 24, "repeats": 1}
    (check,) = export.export(workdir / "pruned", (), **sizes).values()
    assert check["agreement"] == "the teacher"
    scores = report["pruned"]["scores"]["validation"]
    assert check["scores"] == pytest.approx(scores, abs=1e-6)
    said = "Scores are agreement with the teacher, and not with labels."
    assert said in (workdir / "pruned" / "README.md").read_text()
    (check,) = export.export(workdir / "teacher", (), **sizes).values()
    assert check["agreement"] == "the saved model"
    assert check["scores"] == {"mrr_at_10": pytest.approx(1)}
    (tmp_path / "texts.txt").write_text("the film was great\n")
    texts = str(tmp_path / "texts.txt")
    (check,) = export.export(workdir / "pruned", (), vocabulary=texts, **sizes).values()
    assert check["vocabulary"]["validation"]["compared"] == 24
    assert check["scores"] == pytest.approx(scores, abs=1e-6)


def test_a_digest_does_not_hold_answers(tops):
    """Which differ in their last bits from one kind of device to another."""
    config = config_of("regression", tops["regression"])
    inputs = setup.load_inputs(config)
    before = setup.digest(config, inputs)
    part = inputs.examples["train"]
    part.labels[:] += 1
    assert setup.digest(config, inputs) == before


def test_a_digest_holds_which_rows_are_of_one_query(tops):
    config = config_of("ranking", tops["ranking"])
    inputs = setup.load_inputs(config)
    before = setup.digest(config, inputs)
    inputs.examples["train"].uncut.of_row[-1] += 1
    assert setup.digest(config, inputs) != before
