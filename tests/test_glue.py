"""Every kind of task, from files as the hub has them to a model that is read again.

Each run also has a variant of the method that is chosen by the config alone.
"""

import functools
import json
import math
import pathlib
import random
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file, save_file
from scipy.special import expit

import cofi_jax as cofi
import train
from cofi_jax import UserError
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.data import sources, toy
from cofi_jax.evaluation import evaluate, predict
from cofi_jax.run import stages as stages_lib
from cofi_jax.training import log

TINY_BERT = pathlib.Path(__file__).parent / "fixtures" / "tiny_bert"


ROWS = {"train": 48, "validation": 23}


CONFIG = """
from cofi_jax.config import Config


def get_config():
    config = Config()
    config.data.max_length = 24
    config.data.buckets = (24,)
    config.teacher.epochs = 20
    config.teacher.learning_rate = 5e-3
    config.teacher.warmup_steps = 15
    config.prune.targets = (0.5,)
    config.prune.epochs = 8
    config.prune.prepruning_epochs = 0
    config.prune.warmup_epochs = 2
    config.prune.learning_rate = 1e-3
    config.prune.mask_learning_rate = 2.0
    config.prune.multiplier_learning_rate = 2.0
    config.finetune.epochs = 1
    config.finetune.learning_rate = 1e-3
    for stage in (config.teacher, config.prune, config.finetune):
        stage.batch_size = 16
    config.benchmark.batch_size = 1
    config.benchmark.seq_length = 24
    config.benchmark.repeats = 1
    config.log_every = 1
    config.eval_every = 20
    return config
"""


pytestmark = pytest.mark.usefixtures("quick_compile", "without_pictures")


# The data


def pairs(first, second, classes):
    """Columns like those of the hub's GLUE; the second text tells the class."""

    def rows(rng, split):
        groups = (toy.PRAISE, toy.BLAME, toy.NOUNS)
        labels = [i % classes for i in range(ROWS[split])]
        return pa.table(
            {
                first: sentences(rng, split),
                second: [" ".join(rng.sample(groups[label], 3)) for label in labels],
                "label": pa.array(labels, pa.int64()),
                "idx": pa.array(range(len(labels)), pa.int32()),
            }
        )

    return rows


def sentences(rng, split):
    return [text for text, _ in toy.generate(ROWS[split], seed=rng.random())]


def values(rng, split):
    praise = [i % 5 for i in range(ROWS[split])]
    words = [rng.sample(toy.PRAISE, k) + rng.sample(toy.BLAME, 4 - k) for k in praise]
    noise = [rng.uniform(0, 1) for _ in praise]
    labels = [k + more for k, more in zip(praise, noise, strict=True)]  # in [0, 5]
    return pa.table(
        {
            "sentence1": sentences(rng, split),
            "sentence2": [" ".join(some) for some in words],
            "label": pa.array(labels, pa.float32()),
            "idx": pa.array(range(len(labels)), pa.int32()),
        }
    )


def questions(rng, split):
    """Contexts of several windows; one training row's answer is not at its place."""
    rows = []
    for i in range(ROWS[split] // 2):
        texts = [text for text, _ in toy.generate(3, seed=rng.random())]
        context = " . ".join(texts)
        answer = texts[1].split()[-1]
        start = len(texts[0]) + len(" . ") + len(texts[1]) - len(answer)
        many = 3 if split == "validation" else 1  # as the hub's
        if split == "train" and i == 4:
            start += 1
        rows.append(
            {
                "id": f"{i:024x}",
                "title": "Film",
                "context": context,
                "question": f"the {texts[1].split()[1]} was",
                "answers": {"text": [answer] * many, "answer_start": [start] * many},
            }
        )
    answers = {"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())}
    fields = dict.fromkeys(("id", "title", "context", "question"), pa.string())
    schema = pa.schema(fields | {"answers": pa.struct(answers.items())})
    return pa.Table.from_pylist(rows, schema)


def moods(rng, split):
    """Texts with any number of labels, each of which one of their words tells."""
    groups = {"poor": toy.BLAME, "great": toy.PRAISE, "short": toy.ADVERBS}
    rows = []
    for _ in range(ROWS[split]):
        labels = [name for name in groups if rng.random() < 0.5]
        words = [rng.choice(groups[name]) for name in labels]
        rows.append({"text": " ".join(["the film", *words]), "label": labels})
    return pa.Table.from_pylist(rows)


def names(rng, split):
    """Words of which a mood and the noun behind it are an entity; some long texts."""
    groups = {"poor": toy.BLAME, "great": toy.PRAISE}
    rows = []
    for row in range(ROWS[split]):
        tokens, labels = [], []
        for _ in range(12 if row % 8 == 0 else rng.randint(1, 4)):
            kind = rng.choice(list(groups))
            tokens += [rng.choice(toy.VERBS), rng.choice(groups[kind])]
            labels += ["O", f"B-{kind}"]
            if rng.random() < 0.5:
                tokens.append(rng.choice(toy.NOUNS))
                labels.append(f"I-{kind}")
        rows.append({"tokens": tokens, "ner_tags": labels})
    return pa.Table.from_pylist(rows)


def passages(rng, split):
    """Queries for praise or blame, each with four passages, one of which has it."""
    rows = []
    for row in range(ROWS[split]):
        query, place = divmod(row, 4)
        wanted = (toy.PRAISE, toy.BLAME)[query % 2]
        other = (toy.BLAME, toy.PRAISE)[query % 2]
        right = place == query // 2 % 4 or (split, query) == ("validation", 5)
        words = rng.sample(wanted if right else other, 2)
        rows.append(
            {
                "query": f"the {wanted[0]} film",
                "passage": " ".join(words),
                "query_id": query,
                "label": int(right),
            }
        )
    return pa.Table.from_pylist(rows)


HUB = {
    "mnli": pairs("premise", "hypothesis", 3),
    "qqp": pairs("question1", "question2", 2),
    "qnli": pairs("question", "sentence", 2),
    "mrpc": pairs("sentence1", "sentence2", 2),
    "stsb": values,
    "squad": questions,
    "moods": moods,
    "names": names,
    "passages": passages,
}


MNLI_SPLITS = ("validation_matched", "validation_mismatched")


def write_rows(top):
    for task, rows in HUB.items():
        (top / task).mkdir(parents=True)
        rng = random.Random(task)
        splits = MNLI_SPLITS if task == "mnli" else ("validation",)
        for split in ("train", *splits):
            table = rows(rng, split.partition("_")[0])
            parquet.write_table(table, top / task / f"{split}.parquet")

    # Half as many again for one of them: other columns in another order, and names.
    lines = ["label\tsentence2\tsentence1"]
    lines += [
        f"equivalent\t{a} {b}\tfilm" for a in toy.BLAME[:4] for b in "but ,".split()
    ]
    lines += [
        f"not_equivalent\t{a} {b}\tfilm" for a in toy.PRAISE[:8] for b in ["so", "very"]
    ]
    (top / "more.tsv").write_text("\n".join(lines) + "\n")

    rng = random.Random("own")
    (top / "reviews").mkdir()
    (top / "stars").mkdir()
    groups = {"poor": toy.BLAME, "great": toy.PRAISE, "so, so": toy.NOUNS}
    for split, count in ROWS.items():
        lines = ["id,text,verdict"]
        for i in range(count):
            verdict = rng.choice(list(groups))
            words = " ".join(rng.sample(groups[verdict], 3))
            lines.append(f'{i},"the film , {words}","{verdict}"')
        (top / "reviews" / f"{split}.csv").write_text("\n".join(lines) + "\n")
        table = values(rng, split).to_pylist()
        lines = ["stars\tbefore\tafter"]
        lines += [
            f"{r['label']:.3f}\t{r['sentence1']}\t{r['sentence2']}" for r in table
        ]
        (top / "stars" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def write_encoder(folder):
    """Of one layer: steps are quick to compile, which is what takes the time here."""
    shutil.copytree(TINY_BERT, folder)
    words = [*toy.SPECIAL, *toy.OTHER, *toy.NEGATIONS, *toy.VERBS]
    words += [*toy.ADVERBS, *toy.NOUNS, *toy.PRAISE, *toy.BLAME]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    left = {name: x for name, x in weights.items() if "layer.1." not in name}
    save_file(left, folder / "model.safetensors")


# The runs


class Case(NamedTuple):
    """What a command line asks for, and what its report must have."""

    flags: list[str]
    metrics: list[str]
    splits: tuple[str, ...] = ("validation",)


CASES = {
    "mnli": Case(
        ["data.task=mnli", "prune.prepruning_epochs=1"], ["accuracy"], MNLI_SPLITS
    ),
    "mrpc": Case(
        [
            "data.task=mrpc",
            "data.extra_file={top}/more.tsv",
            "prune.prepruning_epochs=1",
            "distill.logits=0",
            "distill.layers=0",
        ],
        ["accuracy", "f1"],
    ),
    "stsb": Case(
        ["data.task=stsb", "prune.kinds=('head','intermediate','hidden')"],
        ["spearman", "pearson"],
    ),
    "squad": Case(
        ["data.task=squad", "distill.match=fixed", "distill.taught=random"],
        ["f1", "exact_match"],
    ),
    "reviews": Case(
        [
            "data.task=own",
            "data.path={top}/reviews",
            "data.columns=('text',)",
            "data.label_column=verdict",
            "data.metrics=('matthews','accuracy')",
            "prune.kinds=('head','mha','intermediate','ffn')",
        ],
        ["matthews", "accuracy"],
    ),
    "moods": Case(
        [
            "data.task=own",
            "data.path={top}/moods",
            "data.columns=('text',)",
            "data.problem=multilabel",
            "data.metrics=('macro_f1','micro_f1')",
        ],
        ["macro_f1", "micro_f1"],
    ),
    "names": Case(
        [
            "data.task=own",
            "data.path={top}/names",
            "data.columns=('tokens',)",
            "data.label_column=ner_tags",
            "data.problem=entities",
            "data.metrics=('f1','recall')",
            "prune.micro_batches=2",
        ],
        ["f1", "recall"],
    ),
    "passages": Case(
        [
            "data.task=own",
            "data.path={top}/passages",
            "data.columns=('query','passage')",
            "data.group_column=query_id",
            "data.problem=ranking",
            "data.metrics=('mrr_at_10','ndcg_at_10')",
            "distill.layers=0",
        ],
        ["mrr_at_10", "ndcg_at_10"],
    ),
    "qqp": Case(["data.task=qqp", "distill.match=fixed"], ["accuracy", "f1"]),
    "qnli": Case(["data.task=qnli", "distill.taught=random"], ["accuracy"]),
    "stars": Case(
        [
            "data.task=own",
            "data.path={top}/stars",
            "data.columns=('before','after')",
            "data.label_column=stars",
            "data.problem=regression",
            "data.metrics=('pearson',)",
            "distill.match=ordered",
        ],
        ["pearson"],
    ),
}


# After the teacher these differ from the others in nothing that knows of the task.
LIKE_OTHERS = ["qqp", "qnli", "stars"]


every_case = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS))
        for name in CASES
    ],
)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    top = tmp_path_factory.mktemp("top")
    (top / "config.py").write_text(CONFIG)
    write_encoder(top / "bert")
    write_rows(top)
    return top


def command(top, workdir, flags):
    flags = [f"model.path={top / 'bert'}", f"data.path={top}", *flags]
    flags = [f"--config.{flag.format(top=top)}" for flag in flags]
    return ["train.py", f"--config={top / 'config.py'}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def finished(top, quick_compile):
    """From the name of a case to its workdir and report.json; each is run once."""

    def run(name):
        workdir = top / "runs" / name
        assert train.main(command(top, workdir, CASES[name].flags)) == 0
        return workdir, json.loads((workdir / "report.json").read_text())

    return functools.cache(run)


def stop(*_):
    raise UserError("stop")


@pytest.mark.parametrize("name", LIKE_OTHERS)
def test_the_teacher_is_saved(name, top, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages_lib, "preprune", stop)
    assert train.main(command(top, tmp_path / "run", CASES[name].flags)) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: stop"
    path = str(tmp_path / "run" / "teacher")
    (found,) = evaluate.evaluate([path], batch_sizes=[1], repeats=1)["models"]
    scores = found["scores"]
    assert list(scores) == ["validation"]
    assert list(scores["validation"]) == CASES[name].metrics
    metric = CASES[name].metrics[0]
    score = scores["validation"][metric]
    assert f"teacher: {metric} {score:.4f}\n" in out
    assert score > (0.2 if metric == "pearson" else 0.8)


@every_case
def test_report_has_every_metric_of_every_split(name, finished):
    workdir, result = finished(name)
    case = CASES[name]
    for model in ("teacher", "pruned"):
        scores = result[model]["scores"]
        assert list(scores) == list(case.splits)
        for values in scores.values():
            assert list(values) == case.metrics
            assert all(-1 <= value <= 1 for value in values.values())
        first = scores[case.splits[0]]
        assert result[model]["score"] == first[case.metrics[0]]
    assert result["metric"] == case.metrics[0]
    assert result["masked_vs_sliced_max_abs_diff"] <= 1e-4
    assert 0.499 <= result["sparsity"] < 0.8
    text = (workdir / "report.md").read_text()
    for split in case.splits:
        for metric in case.metrics:
            value = result["pruned"]["scores"][split][metric]
            title = f"{metric}, {split}" if len(case.splits) > 1 else metric
            first = (split, metric) == (case.splits[0], case.metrics[0])
            assert f"| {metric if first else title} " in text
            assert f"{value:.4f}" in text


@every_case
def test_every_loss_is_finite(name, finished):
    workdir, _ = finished(name)
    lines = log.read_metrics(workdir / "metrics.jsonl")
    stages = {line["stage"] for line in lines}
    first = {"teacher", "prepruning"} if name in ("mnli", "mrpc") else {"teacher"}
    assert stages == first | {"prune", "finetune"}
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.isfinite(losses).all()


@every_case
def test_the_saved_model_scores_the_same(name, finished):
    workdir, result = finished(name)
    found = evaluate.evaluate([workdir / "pruned"], batch_sizes=[1], repeats=1)
    (again,) = found["models"]
    assert again["scores"] == result["pruned"]["scores"]
    assert again["score"] == result["pruned"]["score"]
    assert found["metric"] == result["metric"]
    assert again["sparsity"] == pytest.approx(result["sparsity"])
    assert again["kept"] == result["kept"]
    rows = ROWS["validation"] * len(CASES[name].splits)
    if name == "passages":  # Each query has four of them.
        rows = math.ceil(rows / 4)
    assert (sum(found["examples"].values()) == rows) == (name != "squad")


@pytest.mark.parametrize(
    "name", ["mnli", "stsb", "squad", "reviews", "moods", "names", "passages"]
)
def test_the_teacher_has_learnt(name, finished):
    """Else the scores would be equal because nothing is predicted."""
    chance = {"mnli": 0.5, "stsb": 0.2, "squad": 0.05, "reviews": 0.3, "moods": 0.7}
    chance |= {"names": 0.5, "passages": 0.6}
    assert finished(name)[1]["teacher"]["score"] > chance[name]


def about(path):
    return json.loads((path / "model.json").read_text())["about"]


def test_saved_models_say_what_they_are_for(top, finished):
    workdir, result = finished("reviews")
    found = about(workdir / "pruned")
    classes = ["great", "poor", "so, so"]  # as they stand in the rows, sorted
    assert (found["task"], found["labels"]) == ("own", classes)
    assert found["data"]["labels"] == classes
    assert found["data"]["columns"] == ["text"]
    assert found["sparsity"] == result["sparsity"]
    assert found["dense"]["hidden_size"] == 32
    assert about(workdir / "teacher").keys() == {
        "task",
        "labels",
        "data",
        "scores",
        "by_class",
    }

    found = about(finished("mnli")[0] / "teacher")
    assert found["labels"] == ["entailment", "neutral", "contradiction"]
    assert found["data"] == {
        **found["data"],
        "task": "mnli",
        "path": str(top),
        "max_length": 24,
        "labels": [],
    }


def test_thresholds_are_those_of_the_training_rows(finished):
    """Each model has its own, by which it is scored, answers and is described."""
    workdir, result = finished("moods")
    for name in ("teacher", "pruned"):
        path = workdir / name
        task = saved_model.saved_task(str(path))
        model, params, _ = saved_model.load_model(path)
        tokenizer = saved_model.load_tokenizer(path)
        _, columns = sources.load(task, ("train", "validation"))
        logits, labels = {}, {}
        for split, texts in columns.items():
            examples = task.tokenise(texts, tokenizer)
            run = predict.make_predict(model)
            logits[split] = predict.logits(run, params, task, examples, batch_size=64)
            labels[split] = examples.labels > 0
        thresholds = np.array(about(path)["settings"]["thresholds"])
        chances = {split: expit(np.float64(x)) for split, x in logits.items()}

        def f1(split, label, threshold, chances=chances, labels=labels):
            given, gold = chances[split][:, label] > threshold, labels[split][:, label]
            return 2 * (given & gold).sum() / max(given.sum() + gold.sum(), 1)

        for label, threshold in enumerate(thresholds):
            others = [f1("train", label, x) for x in np.arange(1, 100) / 100]
            assert f1("train", label, threshold) == max(others)
        by_class = result[name]["by_class"]
        assert list(by_class) == list(task.labels) == ["great", "poor", "short"]
        found = [f1("validation", k, t) for k, t in enumerate(thresholds)]
        assert [rates["f1"] for rates in by_class.values()] == pytest.approx(found)
        assert result[name]["score"] == pytest.approx(np.mean(found))
        answers = cofi.pipeline(path)(columns["validation"]["text"])
        given = [[label in a["labels"] for label in task.labels] for a in answers]
        np.testing.assert_array_equal(given, chances["validation"] > thresholds)
        card = (path / "README.md").read_text()
        assert all(f"{t:g}" in card for t in thresholds) and "threshold" in card
    paths = [str(workdir / name) for name in ("teacher", "pruned")]
    both = evaluate.evaluate(paths, batch_sizes=[1], repeats=1)["models"]
    for model, name in zip(both, ("teacher", "pruned"), strict=True):
        assert model["scores"] == result[name]["scores"]
    text = (workdir / "report.md").read_text()
    assert "| short " in text and "The F1 of each class" in text


def test_entities_are_found_in_whole_texts(finished):
    """As the report says: the F1 of all of them, and that of each type."""
    workdir, result = finished("names")
    task = saved_model.saved_task(str(workdir / "pruned"))
    _, columns = sources.load(task, ("validation",))
    rows = columns["validation"]
    texts = [" ".join(words) for words in rows["tokens"]]
    answers = cofi.pipeline(workdir / "pruned")(texts)
    given, gold = set(), set()
    for number, (text, labels) in enumerate(zip(texts, rows["ner_tags"], strict=True)):
        for x in answers[number]["entities"]:
            assert x["text"] == text[x["start"] : x["end"]]
            given.add((number, x["type"], x["start"], x["end"]))
        parts = [task.labels[k].partition("-") for k in labels]
        stops = np.cumsum([len(word) + 1 for word in text.split()]) - 1
        for word, (letter, _, kind) in enumerate(parts):
            last = word + (parts[word + 1 : word + 2] == [("I", "-", kind)])
            if letter == "B":
                start = stops[word] - len(text.split()[word])
                gold.add((number, kind, start, stops[last]))

    def f1(kinds):
        one, two = ({x for x in found if x[1] in kinds} for found in (given, gold))
        return pytest.approx(2 * len(one & two) / (len(one) + len(two)))

    assert result["pruned"]["score"] == f1({"poor", "great"})
    by_class = result["pruned"]["by_class"]
    assert {kind: by_class[kind]["f1"] for kind in by_class} == {
        "great": f1({"great"}),
        "poor": f1({"poor"}),
    }


def test_the_scores_of_passages_rank_them(finished):
    """By the pipeline, query by query: the place of the one that is relevant."""
    workdir, result = finished("passages")
    task = saved_model.saved_task(str(workdir / "pruned"))
    _, columns = sources.load(task, ("validation",))
    rows = columns["validation"]
    pairs = [*zip(rows["query"], rows["passage"], strict=True)]
    scores = np.array([x["score"] for x in cofi.pipeline(workdir / "pruned")(pairs)])
    found = []
    for query in set(rows["query_id"]):
        here = np.array(rows["query_id"]) == query
        best = scores[here & (rows["label"] == 1)].max()
        found.append(1 / (scores[here] >= best).sum())
    assert result["pruned"]["score"] == pytest.approx(np.mean(found))
    assert "the sigmoid of the logit" in (workdir / "pruned" / "README.md").read_text()


def terms(workdir, stage):
    lines = log.read_metrics(workdir / "metrics.jsonl")
    return {key for line in lines if line["stage"] == stage for key in line}


def test_without_distillation_the_labels_are_learnt(finished):
    workdir, _ = finished("mrpc")
    for stage in ("prepruning", "prune", "finetune"):
        found = terms(workdir, stage)
        assert "loss_task" in found
        assert not found & {"loss_logits", "loss_layers"}
    found = terms(finished("squad")[0], "prune")
    assert {"loss_logits", "loss_layers"} <= found and "loss_task" not in found


def test_units_that_are_not_pruned_stay(finished):
    assert finished("reviews")[1]["kept"]["hidden"] == 32
    kept = finished("stsb")[1]["kept"]
    assert kept["hidden"] < 32


def test_extra_rows_are_trained_on(finished):
    workdir, _ = finished("mrpc")
    lines = log.read_metrics(workdir / "metrics.jsonl")
    steps = max(line["step"] for line in lines if line["stage"] == "teacher")
    assert steps == 20 * math.ceil((48 + 24) / 16)


# Models of others


def test_a_hugging_face_teacher_whose_classes_are_in_another_order(
    top, finished, tmp_path, capsys, monkeypatch
):
    workdir, _ = finished("mnli")
    model, params, _ = saved_model.load_model(workdir / "teacher")
    head = {name: leaf[..., [2, 0, 1]] for name, leaf in params["classifier"].items()}
    huggingface.save_hugging_face(
        tmp_path / "hf",
        params | {"classifier": head},
        model.config,
        tokenizer=saved_model.load_tokenizer(workdir / "teacher"),
    )

    monkeypatch.setattr(stages_lib, "preprune", stop)
    order = "teacher.labels=('contradiction','entailment','neutral')"
    flags = ["data.task=mnli", f"teacher.path={tmp_path / 'hf'}", order]
    assert train.main(command(top, tmp_path / "run", flags)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: stop"
    _, again, _ = saved_model.load_model(tmp_path / "run" / "teacher")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", ["stsb", "squad"])
def test_values_and_spans_of_hugging_face(name, top, finished, tmp_path):
    workdir, result = finished(name)
    model, params, _ = saved_model.load_model(workdir / "teacher")
    huggingface.save_hugging_face(
        tmp_path / "hf",
        params,
        model.config,
        tokenizer=saved_model.load_tokenizer(workdir / "teacher"),
    )
    options = {"task": name, "data_path": str(top), "batch_sizes": [1], "repeats": 1}
    (found,) = evaluate.evaluate([tmp_path / "hf"], **options)["models"]
    assert found["scores"]["validation"] == pytest.approx(
        result["teacher"]["scores"]["validation"], abs=1e-6
    )
    assert found["sparsity"] == 0
