"""A new kind of output is one class: nothing else in the package knows of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_params

import cofi_jax as cofi
from cofi_jax import config as config_lib
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.config import Distill
from cofi_jax.data import batches, metrics, sources, tasks, toy
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.data.problems.base import Problem, WrongLabel, mean_over_rows
from cofi_jax.evaluation import predict
from cofi_jax.export import to_onnx, to_transformers
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import model_card
from cofi_jax.training import objectives

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = ("acting", "plot", "script")  # a row has each label whose word is in its text


class Several(Problem):
    """Any number of the labels, in one cell with spaces between them."""

    name = "several"
    own_metrics = ("exact",)
    names_classes = True
    problem_type = "multi_label_classification"

    def num_outputs(self, labels):
        return len(labels)

    def class_names(self, cells, column):
        return tuple(sorted({name for cell in cells for name in cell.split()}))

    def encode(self, cells, labels, *, numbered):
        for row, cell in enumerate(cells):
            if not set(cell.split()) <= set(labels):
                raise WrongLabel(row, f"must be among {labels}")
        sets = [set(cell.split()) for cell in cells]
        return np.array([[n in s for n in labels] for s in sets], np.float32)

    def loss(self, logits, batch):
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(-1)
        return mean_over_rows(losses, batch["weight"], batch)

    def distill(self, student, teacher, batch, temperature):
        labels = jax.nn.sigmoid(teacher / temperature)
        return self.loss(student / temperature, batch | {"labels": labels})

    def decode(self, logits, examples, labels):
        return [
            {"labels": [n for n, z in zip(labels, row, strict=True) if z > 0]}
            for row in logits
        ]


def exact(logits, labels):
    return float(np.mean(np.all((logits > 0) == labels, -1)))


class Tokens(Several):
    """A class for every token; its loss and scores are not tried here."""

    name = "tokens"
    head = "every"
    auto_model = "TokenClassification"
    pipeline_tag = "token-classification"
    output_class = "TokenClassifierOutput"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for problem in (Several(), Tokens()):
        monkeypatch.setitem(PROBLEMS, problem.name, problem)
    monkeypatch.setitem(metrics.METRICS, "exact", exact)


@pytest.fixture
def task(tmp_path):
    """An `own` task, told by its rows."""
    for split, seed in (("train", 0), ("validation", 1)):
        texts = [text for text, _ in toy.generate(300, seed)]
        rows = [
            {"text": t, "label": " ".join(w for w in WORDS if w in t)} for t in texts
        ]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{split}.jsonl").write_text(lines)
    data = config_lib.Data(
        "own", str(tmp_path), columns=("text",), problem="several", max_length=24
    )
    return tasks.find(data)


def sizes(task, vocab_size):
    problem = task.problem
    return EncoderConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        heads=(2,),
        head_size=8,
        intermediate=(16,),
        pooler_size=0 if problem.head == "every" else 16,
        num_labels=task.num_outputs,
        max_positions=24,
        dropout=0.0,
        problem=problem.name,
        head="every" if problem.head == "every" else "",
    )


def learnt(objective, params, examples, steps, **batch_extra):
    """Parameters after some steps of Adam on all rows at once."""
    rows = np.arange(len(examples))
    batch = batches.make_batch(examples, rows, length=24, batch_size=len(rows))
    optimizer, batch = optax.adam(1e-2), batch | batch_extra
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            return objective({"params": params}, {}, {}, batch, key)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params


def test_a_new_kind_from_its_rows_to_its_export(task, tmp_path):
    tokenizer = toy.demo_tokenizer()
    task, columns = sources.load(task, ("train", "validation"))
    assert task.labels == WORDS and task.num_outputs == 3
    assert task.metrics == ("exact",)
    train, validation = (task.tokenise(columns[s], tokenizer) for s in columns)
    assert train.labels.shape == (300, 3)

    config = sizes(task, len(tokenizer))
    model = cofi.Encoder(config)
    params = random_params(config, 0)
    teacher = learnt(objectives.task_objective(model), params, train, 150)
    run = predict.make_predict(model)

    def logits(params, examples):
        return predict.logits(run, params, task, examples, batch_size=64)

    found = logits(teacher, validation)
    assert task.scores(found, validation)["exact"] > 0.9
    assert task.scores(logits(params, validation), validation)["exact"] < 0.5
    outputs = {"logits": jnp.asarray(logits(teacher, train))}
    imitate = objectives.DistillationObjective(model, Distill(1.0, 0.0))
    unlabelled = dataclasses.replace(train, labels=np.zeros_like(train.labels))
    student = learnt(imitate, params, unlabelled, 150, teacher_outputs=outputs)
    assert task.scores(logits(student, validation), validation)["exact"] > 0.9

    data = {"task": "own", "columns": ["text"], "problem": "several"}
    about = {"task": "own", "labels": task.labels, "data": data | {"labels": WORDS}}
    path = tmp_path / "model"
    saved_model.save_model(path, teacher, config, tokenizer=tokenizer, about=about)
    texts = columns["validation"]["text"]
    answers = cofi.pipeline(path)(texts)
    right = [
        answer["labels"] == [word for word in WORDS if word in text]
        for answer, text in zip(answers, texts, strict=True)
    ]
    assert np.mean(right) == pytest.approx(task.scores(found, validation)["exact"])
    assert "text-classification" in model_card.text(config, about, {})
    cofi.save_hugging_face(tmp_path / "hub", teacher, config, labels=task.labels)
    fields = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert fields["problem_type"] == "multi_label_classification"
    again, _ = huggingface.load_classifier(
        tmp_path / "hub",
        field="model",
        problem="several",
        labels=WORDS,
        model=config_lib.Model(dropout=0.0),
    )
    assert dataclasses.replace(again, max_positions=24) == config


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("several", to_onnx),
        ("tokens", to_onnx),
        pytest.param("several", to_transformers, marks=pytest.mark.torch),
    ],
)
def test_a_new_kind_in_other_runtimes(kind, runtime, task, tmp_path):
    task = dataclasses.replace(task, labels=WORDS, problem=PROBLEMS[kind])
    config = sizes(task, 30)
    params = cofi.init_params(config, jax.random.key(0))
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    expected = cofi.Encoder(config).apply({"params": params}, batch).logits
    assert expected.shape == ((2, 3) if kind == "several" else (2, 6, 3))
    runtime.write(tmp_path, params, config, WORDS)
    if runtime is to_onnx:
        fields = json.loads((tmp_path / "config.json").read_text())
        assert fields["architectures"] == [f"BertFor{task.problem.auto_model}"]
        pytest.importorskip("onnxruntime")
    found = runtime.load(tmp_path)(batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)
