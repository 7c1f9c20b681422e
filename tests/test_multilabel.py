"""Several labels a row: what rows may hold, thresholds, scores and answers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import sklearn.metrics
from pyarrow import parquet
from scipy.special import expit, logit

from cofi_jax import config, errors
from cofi_jax.data import batches, sources, tasks
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.export import certificate

pytestmark = pytest.mark.usefixtures("quick_compile")


def own(path="", **more):
    fields = {"columns": ("text",), "problem": "multilabel"} | more
    return config.Data(task="own", path=str(path), **fields)


def write(folder, cells, split="train", **columns):
    """As many texts as there are cells, in a parquet file."""
    texts = [f"{split} {i}" for i in range(len(cells))]
    table = pyarrow.table({"text": texts, "label": cells, **columns})
    parquet.write_table(table, folder / f"{split}.parquet")
    return folder


def load(data, *splits):
    task, columns = sources.load(tasks.find(data), splits or ("train",))
    return task, *(columns[split][data.label_column] for split in splits or ("train",))


def complaint(data, *splits):
    with pytest.raises(errors.UserError) as caught:
        load(data, *splits)
    message = str(caught.value)
    assert message.isprintable()
    return message


def examples_of(labels):
    rows = [np.zeros(1, np.int32)] * len(labels)
    return batches.Examples(rows, rows, np.asarray(labels, np.float32))


# Rows


def test_lists_of_labels(tmp_path):
    write(tmp_path, [["joy", "awe"], [], ["awe"], ["awe", "awe", "fear"]])
    write(tmp_path, [["fear"], []], "validation")
    task, train, validation = load(own(tmp_path), "train", "validation")
    assert task.labels == ("awe", "fear", "joy") and task.num_outputs == 3
    assert task.metrics == ("micro_f1",)
    expected = [[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(train, expected)
    np.testing.assert_array_equal(validation, [[0, 1, 0], [0, 0, 0]])
    assert train.dtype == np.float32


def test_all_formats_give_the_same_labels(tmp_path):
    some = ["x", "it's", "\N{GRINNING FACE}"]
    rows = [{"text": "a", "label": some}, {"text": "b", "label": []}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, first = load(own(tmp_path))
    assert task.labels == ("it's", "x", "\N{GRINNING FACE}")
    (tmp_path / "train.jsonl").unlink()
    # A list as JSON and as Python writes it, which is how pandas does.
    for rule in (json.dumps, str):
        cells = (rule(row["label"]).replace('"', '""') for row in rows)
        lines = (f'"{c}",{r["text"]}\n' for c, r in zip(cells, rows, strict=True))
        (tmp_path / "train.csv").write_text("label,text\n" + "".join(lines))
        again, found = load(own(tmp_path))
        assert again.labels == task.labels
        np.testing.assert_array_equal(found, first)


@pytest.mark.parametrize("given", [(), ("rude", "kind")])
def test_a_column_for_each_label(tmp_path, given):
    """Of integers, of floats or of booleans; the labels are in the columns' order."""
    columns = {"rude": [1, 0, 0], "kind": [0.0, 1.0, 0.0], "other": [7, 8, 9]}
    data = own(tmp_path, label_column="rude,kind", labels=given)
    write(tmp_path, [None] * 3, **columns)
    write(tmp_path, [None] * 2, "validation", rude=[False, True], kind=[True, True])
    task, train, validation = load(data, "train", "validation")
    assert task.labels == ("rude", "kind")
    np.testing.assert_array_equal(train, [[1, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(validation, [[0, 1], [1, 1]])
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train.csv").write_text("rude,text,kind\n1,a,0\n0,b,1\n0.0,c,0\n")
    np.testing.assert_array_equal(load(data)[1], train)


@pytest.mark.parametrize("cells", [[["b"], [], ["a", "b"]], [[1], [], [0, 1]]])
def test_labels_in_a_given_order_by_name_or_number(tmp_path, cells):
    data = own(write(tmp_path, cells), labels=("a", "b", "c"))
    expected = [[0, 1, 0], [0, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(load(data)[1], expected)


def test_numbers_are_sorted_as_numbers(tmp_path):
    assert load(own(write(tmp_path, [[10], [9, 2]])))[0].labels == ("2", "9", "10")
    some = ["1", "+1", "01", "+01", "001", "0"]  # as they come, where they are alike
    assert load(own(write(tmp_path, [some])))[0].labels == ("0", *some[:-1])


@pytest.mark.parametrize(
    ("cells", "more", "said"),
    [
        ([["a"], None, ["b"]], {}, ["row 1 ", "label=None", "[] for none"]),
        ([["a", "b"], ["a", None]], {}, ["row 1 ", "['a', None]", "among a, b"]),
        ([["a"], ["A"]], {"labels": ("a", "b")}, ["row 1 ", "['A']", "each label"]),
        ([[0], [2]], {"labels": ("a", "b")}, ["row 1 ", "[2]", "0: 'a'"]),
        (["a", "b"], {"labels": ("a", "b")}, ["row 0 ", "'a'", "list of labels"]),
        (["a", "b"], {}, ["data.label_column='label'", "0 different labels"]),
        ([["a"], ["a"]], {}, ["data.label_column='label'", "1 different labels"]),
        ([[], []], {}, ["0 different labels", "hold lists of 2 to 1000"]),
        ([[f"{i}" for i in range(1001)]], {}, ["1001 different labels"]),
    ],
)
def test_labels_that_are_none(tmp_path, cells, more, said):
    message = complaint(own(write(tmp_path, cells), **more))
    assert all(part in message for part in said) and len(message) < 500


@pytest.mark.parametrize("value", ["2", "", "-1", "yes", "nan", "[1]", "{[1]}"])
def test_a_column_holds_0_or_1_or_a_probability(tmp_path, value):
    rows = f"text,rude,kind\na,0,1\nb,1,{value}\n"
    (tmp_path / "train.csv").write_text(rows)
    message = complaint(own(tmp_path, label_column="rude,kind"))
    assert "train.csv, row 1 (the first is 0) has rude,kind={'rude': 1" in message
    assert message.endswith("each must be 0 or 1, or a probability between them")


def test_a_larger_model_s_probabilities_are_what_is_learnt(tmp_path):
    """The loss is least at them, and metrics and thresholds take those above a half."""
    rows = "text,rude,kind\na,0.9,0.25\nb,0.125,0.5\nc,0.75,1\n"
    (tmp_path / "train.csv").write_text(rows)
    chances = load(own(tmp_path, label_column="rude,kind"))[1]
    expected = np.float32([[0.9, 0.25], [0.125, 0.5], [0.75, 1]])
    np.testing.assert_array_equal(chances, expected)
    data = own(tmp_path, label_column="rude,kind", labels=("kind", "rude"))
    np.testing.assert_array_equal(load(data)[1], expected[:, ::-1])
    problem, batch = PROBLEMS["multilabel"], {"labels": chances, "weight": np.ones(3)}
    least = logit(np.clip(chances, 1e-6, 1 - 1e-6))
    slope = jax.grad(problem.loss)(jnp.asarray(least), batch)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    hard, examples = chances > 0.5, examples_of(chances)
    logits = np.random.default_rng(0).standard_normal(hard.shape)
    metrics = ["micro_f1", "macro_f1"]
    for kind in (problem, problem.fit(logits, examples, metrics)):
        _, score = kind.scorer(logits, examples, metrics)
        _, again = kind.scorer(logits, examples_of(hard), metrics)
        assert score(np.arange(3)) == again(np.arange(3))
        given = kind.by_class(logits, examples, ("rude", "kind"))
        assert given == kind.by_class(logits, examples_of(hard), ("rude", "kind"))
    assert problem.fit(logits, examples_of(hard), metrics).settings == kind.settings


def test_columns_that_are_not_there_or_named_twice(tmp_path):
    write(tmp_path, [None, None], rude=[0, 1])
    message = complaint(own(tmp_path, label_column="rude,kind"))
    assert "needs a column 'kind'" in message
    for names in ("rude,rude", "rude,text"):
        message = complaint(own(tmp_path, label_column=names))
        assert message.startswith("data.columns=('text',)") and names in message


@pytest.mark.parametrize(
    ("rows", "column", "labels", "row", "lacking"),
    [
        ([{"rude": 1, "kind": 0}], "rude,kind", ("kind", "sad", "rude"), 0, "sad"),
        ([{"label": {"a": 1, "b": 0}}, {"label": {"a": 1}}], "label", (), 1, "b"),
        ([{"label": {}}], "label", ("rude", "kind"), 0, "rude, kind"),
    ],
)
def test_no_label_is_without_a_value(tmp_path, rows, column, labels, row, lacking):
    """It would be one that no row has. An object in a cell is as good as columns."""
    lines = (json.dumps({"text": "a", **cells}) for cells in rows)
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    message = complaint(own(tmp_path, label_column=column, labels=labels))
    assert f"train.jsonl, row {row} (the first is 0) has {column}={{" in message
    assert message.endswith(f"each label needs a value, there is none for {lacking}")


def test_objects_of_a_single_label(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": {"rude": 1}}')
    assert "1 different labels" in complaint(own(tmp_path))


def test_half_a_letter_in_a_label(tmp_path):
    line = '{"text": "a", "label": ["x", "\\ud800"]}'
    (tmp_path / "train.jsonl").write_text(line)
    assert "row 0 (the first is 0) has half of a surr" in complaint(own(tmp_path))


def test_labels_that_look_like_mistakes_are_said(tmp_path, capsys):
    load(own(write(tmp_path, [["Joy"], ["none", "joy "], ["awe"]])))
    said = capsys.readouterr().err
    assert "row 1 (the first is 0): the class 'none' looks like a missing" in said
    assert "['Joy', 'joy '] are different classes" in said


def test_a_validation_row_has_no_other_label(tmp_path):
    write(tmp_path, [["a"], ["b"]])
    write(tmp_path, [["a"], ["b", "c"]], "validation")
    message = complaint(own(tmp_path), "train", "validation")
    assert "validation.parquet, row 1 (the first is 0) has label=['b', 'c']" in message


# Thresholds


def random_rows(count=300, labels=4):
    """Logits that know something of the labels, the first of which nobody has."""
    rng = np.random.default_rng(0)
    gold = rng.random((count, labels)) < [0, 0.1, 0.4, 0.9]
    return 2 * (gold - 0.5) + 1.5 * rng.standard_normal(gold.shape), gold


def test_by_macro_f1_each_label_has_its_best_threshold():
    logits, gold = random_rows()
    problem = PROBLEMS["multilabel"].fit(logits, examples_of(gold), ["macro_f1"])
    thresholds = problem.settings["thresholds"]
    assert json.loads(json.dumps(problem.settings)) == problem.settings
    assert thresholds[0] == 0.5  # as no row has the label
    for label in (1, 2, 3):

        def f1(threshold, label=label):
            given = expit(logits[:, label]) > threshold
            return sklearn.metrics.f1_score(gold[:, label], given, zero_division=0)

        tried = np.arange(1, 100) / 100
        found = np.array([*map(f1, tried)])
        assert f1(thresholds[label]) == pytest.approx(found.max())
        best = tried[np.isclose(found, found.max(), atol=1e-12)]
        assert abs(thresholds[label] - 0.5) == pytest.approx(abs(best - 0.5).min())
    assert not PROBLEMS["multilabel"].settings  # It is that of other models, too.


@pytest.mark.parametrize("seed", range(3))
def test_by_micro_f1_the_thresholds_are_the_best_together(seed):
    """Against all pairs, of labels that a model knows well and hardly."""
    rng = np.random.default_rng(seed)
    gold = rng.random((60, 2)) < [0.3, 0.1]
    logits = 2 * (gold - 0.5) * [2, 0.2] + rng.standard_normal(gold.shape)
    tried = np.arange(1, 100) / 100
    given = expit(logits) > tried[:, None, None]  # (99, 60, 2)
    right, sizes = (given & gold).sum(1), given.sum(1) + gold.sum(0)
    pairs = (x[:, None, 0] + x[None, :, 1] for x in (2 * right, sizes))
    best = np.divide(*pairs).max()
    problem, examples = PROBLEMS["multilabel"], examples_of(gold)
    found = problem.fit(logits, examples, ["micro_f1", "macro_f1"])
    scores = found.scorer(logits, examples, ["micro_f1", "macro_f1"])[1](np.arange(60))
    assert scores["micro_f1"] == pytest.approx(best)
    other = problem.fit(logits, examples, ["macro_f1"])
    macro = other.scorer(logits, examples, ["macro_f1"])[1](np.arange(60))["macro_f1"]
    assert macro >= scores["macro_f1"]


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1"])
def test_of_perfect_thresholds_a_half_is_taken(metric):
    gold = np.array([[1, 0], [0, 1], [1, 1]])
    problem = PROBLEMS["multilabel"].fit(8.0 * gold - 4, examples_of(gold), [metric])
    assert problem.settings == {"thresholds": [0.5, 0.5]}


def test_a_model_that_knows_nothing_gives_the_frequent_label_alone():
    """By micro F1; by macro F1 it gives every text all labels."""
    gold = np.arange(40)[:, None] % [[1, 10]] == 0
    problem, logits = PROBLEMS["multilabel"], np.full((40, 2), -0.001)
    for metric, expected in (("micro_f1", [True, False]), ("macro_f1", [True, True])):
        found = problem.fit(logits, examples_of(gold), [metric])
        (answer, *_) = found.decode(logits, None, ("frequent", "rare"))
        given = [name in answer["labels"] for name in ("frequent", "rare")]
        assert given == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"thresholds": [0.5]},
        {"thresholds": [0.5, 1.0]},
        {"thresholds": [0.0, 0.5]},
        {"thresholds": [0.5, float("nan")]},
        {"thresholds": 0.5},
        {"thresholds": ["a", "b"]},
        {"others": [0.5, 0.5]},
    ],
)
def test_settings_that_are_damaged(settings):
    task = tasks.find(own(labels=("a", "b")))
    with pytest.raises((KeyError, TypeError, ValueError)):
        task.with_settings(settings)
    with pytest.raises(ValueError, match="a classification has no settings"):
        tasks.TASKS["sst2"].with_settings(settings)


# Scores and answers


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.3, 0.6, 0.95)])
def test_scores_are_those_of_scikit_learn(thresholds):
    logits, gold = random_rows()
    task = tasks.find(own(labels=tuple("abcd"), metrics=("macro_f1", "micro_f1")))
    if thresholds:
        task = task.with_settings({"thresholds": thresholds})
    given = expit(logits) > (thresholds or 0.5)
    examples = examples_of(gold)
    assert task.scores(logits, examples) == {
        f"{average}_f1": pytest.approx(
            sklearn.metrics.f1_score(gold, given, average=average, zero_division=0)
        )
        for average in ("macro", "micro")
    }
    count, score = task.scorer(logits, examples)
    chosen = np.random.default_rng(1).integers(count, size=count)
    part = task.scores(logits[chosen], examples_of(gold[chosen]))
    assert count == 300 and score(chosen) == pytest.approx(part)
    rule = sklearn.metrics.precision_recall_fscore_support
    expected = np.transpose(rule(gold, given, zero_division=0))
    found = task.problem.by_class(logits, examples, task.labels)
    assert [*found] == [*"abcd"]
    for rates, row in zip(found.values(), expected, strict=True):
        assert [*rates.values()] == pytest.approx(row)


def test_scores_by_hand():
    """Of a 1 is right and 1 missed; of b 1 is right and 1 too many; of c, none."""
    gold = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    logits = np.array([[1, 1, -1], [-1, 1, -1], [-1, -1, -1]])
    task = tasks.find(own(labels=tuple("abc"), metrics=("micro_f1", "macro_f1")))
    scores = task.scores(logits, examples_of(gold))
    macro = (2 / 3 + 2 / 3 + 0) / 3
    assert scores == pytest.approx({"micro_f1": 4 / 6, "macro_f1": macro})


def test_all_labels_above_their_thresholds_are_given():
    problem = PROBLEMS["multilabel"].with_settings(
        {"thresholds": [0.2, 0.5, 0.9]}, "abc"
    )
    logits = logit(np.array([[0.3, 0.4, 0.95], [0.1, 0.5, 0.89]]))
    found = problem.decode(logits, None, ("a", "b", "c"))
    assert found == [
        {"labels": ["a", "c"], "scores": pytest.approx([0.3, 0.95])},
        {"labels": [], "scores": []},
    ]
    assert "a 0.2, b 0.5, c 0.9" in problem.describe(("a", "b", "c"))


def test_what_changes_between_two_models():
    """The second one loses a label of one row, and gives another row one too many."""
    gold = np.array([[1, 0], [1, 1], [0, 0], [1, 0]])
    logits = 2.0 * gold - 1, 2.0 * gold - 1
    logits[1][0, 0], logits[1][2, 1] = -1, 1
    task = tasks.find(own(labels=("a", "b")))
    examples = examples_of(gold)
    results = [certificate.result(task, examples, each) for each in logits]
    found = certificate.compare(task, examples, *results)
    assert found["flips"] == 2
    assert found["worst_recall"] == {"class": "a", "change": pytest.approx(-1 / 3)}
    assert found["differences"] == {"micro_f1": pytest.approx(6 / 8 - 1)}
    assert found["standard_errors"]["micro_f1"] > 0
