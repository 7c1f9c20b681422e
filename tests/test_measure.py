"""Standard errors against their closed forms; names, bytes, scores of a choice."""

import types

import numpy as np
import pytest

from cofi_jax.checkpoints import load
from cofi_jax.data import tasks
from cofi_jax.data.batches import Examples
from cofi_jax.data.squad import Questions
from cofi_jax.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)


def examples_of(labels):
    """Examples as the metrics see them."""
    return Examples([np.zeros(1)] * len(labels), [], labels)


def classified(right, seed=0):
    """Logits of two classes that are right where `right` says so, and the labels."""
    labels = np.random.default_rng(seed).integers(2, size=len(right))
    answers = np.where(right, labels, 1 - labels)
    return np.eye(2)[answers], labels


def scored(task, logits, labels):
    count, score = task.scorer(logits, examples_of(labels))
    values = {"validation": score(np.arange(count))}
    draws = {"validation": evaluate.resampled(score, count)}
    return evaluate.Scored(values, draws, {"validation": count})


# 200 draws give a standard error to 1 / sqrt(400) = 5 %.
close = pytest.approx


@pytest.mark.parametrize("rows, share", [(100, 0.5), (500, 0.8), (3000, 0.97)])
def test_standard_error_of_an_accuracy(rows, share):
    right = RNG.permutation(np.arange(rows) < share * rows)
    one = scored(tasks.TASKS["sst2"], *classified(right))
    found = evaluate.compared(one, one)
    assert found["score"] == found["scores"]["validation"]["accuracy"] == close(share)
    expected = np.sqrt(share * (1 - share) / rows)
    error = found["standard_errors"]["validation"]["accuracy"]
    assert error == close(expected, rel=0.15)
    assert found["differences"] == {"validation": {"accuracy": 0}}
    assert found["difference_errors"] == {"validation": {"accuracy": 0}}


@pytest.mark.parametrize("overlap", ["same mistakes", "unrelated", "no mistake twice"])
def test_standard_error_of_a_difference_is_paired(overlap):
    """Of n rows a share b is right for the one alone, c for the other alone:
    the variance is (b + c - (b - c)^2) / n."""
    rows = 2000
    dense = np.arange(rows) >= 0.2 * rows  # wrong on the first fifth
    pruned = {
        "same mistakes": np.arange(rows) >= 0.3 * rows,
        "unrelated": RNG.permutation(rows) >= 0.3 * rows,
        "no mistake twice": np.arange(rows) < 0.7 * rows,
    }[overlap]
    first = scored(tasks.TASKS["sst2"], *classified(dense))
    second = scored(tasks.TASKS["sst2"], *classified(pruned))
    found = evaluate.compared(second, first)
    assert found["differences"]["validation"]["accuracy"] == close(-0.1)
    b, c = np.mean(pruned & ~dense), np.mean(dense & ~pruned)
    expected = np.sqrt((b + c - (b - c) ** 2) / rows)
    error = found["difference_errors"]["validation"]["accuracy"]
    assert error == close(expected, rel=0.15)
    # Not what two independent samples would have.
    alone = [x.draws["validation"]["accuracy"].std(ddof=1) for x in (first, second)]
    ratio = error / np.hypot(*alone)
    low, high = {
        "same mistakes": (0.4, 0.7),
        "unrelated": (0.85, 1.15),
        "no mistake twice": (1.1, 1.4),
    }[overlap]
    assert low < ratio < high


def test_standard_error_of_a_correlation():
    """(1 - r^2) / sqrt(n) for Pearson's of two normal variables."""
    rows, r = 1000, 0.6
    x, noise = RNG.standard_normal((2, rows))
    y = r * x + np.sqrt(1 - r**2) * noise
    one = scored(tasks.TASKS["stsb"], x[:, None], y)
    found = evaluate.compared(one, one)
    r = found["scores"]["validation"]["pearson"]
    error = found["standard_errors"]["validation"]["pearson"]
    assert error == close((1 - r**2) / np.sqrt(rows), rel=0.15)
    assert found["score"] == found["scores"]["validation"]["spearman"]


def test_draws_belong_together_and_are_the_same_each_time():
    rows = []

    def score(chosen):
        rows.append(chosen)
        return {"mean": float(chosen.mean())}

    first, second = (evaluate.resampled(score, 50)["mean"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(rows) == 2 * evaluate.RESAMPLES
    assert len({chosen.tobytes() for chosen in rows}) == evaluate.RESAMPLES
    assert all(chosen.min() >= 0 and chosen.max() < 50 for chosen in rows)
    assert np.unique(np.concatenate(rows)).size == 50
    # With replacement: a share 1 - 1/e of the rows is in each.
    shares = [np.unique(chosen).size / 50 for chosen in rows]
    assert np.mean(shares) == close(1 - 1 / np.e, abs=0.02)


@pytest.mark.parametrize("name", ["mrpc", "cola", "stsb"])
def test_scorer_is_the_score_of_those_rows(name):
    task = tasks.TASKS[name]
    logits = RNG.standard_normal((60, max(task.num_outputs, 1)))
    labels = RNG.integers(2, size=60)
    if task.problem.name == "regression":
        labels = labels + RNG.random(60)
    count, score = task.scorer(logits, examples_of(labels))
    assert count == 60
    for rows in (np.arange(60), RNG.integers(60, size=60), np.array([3, 3, 7, 9])):
        there = examples_of(labels[rows])
        assert score(rows) == task.scores(logits[rows], there)


def test_of_spans_questions_are_drawn_whatever_windows_they_have():
    contexts = ["red blue green", "one two", "north south east west"]
    of_row = np.array([0, 0, 1, 2, 2, 2], np.int32)  # question of each window
    offsets = []
    for question in of_row:
        ends = np.cumsum([len(word) + 1 for word in contexts[question].split()]) - 1
        starts = np.concatenate([[0], ends[:-1] + 1])
        offsets.append(np.stack([starts, ends], -1).astype(np.int32))
    answers = [["red"], ["two", "one two"], ["south east"]]
    questions = Questions(contexts, answers, of_row, offsets)
    logits = RNG.standard_normal((6, 4, 2))
    examples = types.SimpleNamespace(uncut=questions)
    count, score = tasks.TASKS["squad"].scorer(logits, examples)
    assert count == 3
    whole = tasks.TASKS["squad"].scores(logits, examples)
    assert score(np.arange(3)) == whole
    single = [score(np.array([i])) for i in range(3)]
    for metric in whole:
        twice = score(np.array([0, 2, 2, 1, 1, 1]))[metric]
        weights = np.array([1, 3, 2]) / 6
        assert twice == close(weights @ [found[metric] for found in single])


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["runs/x/pruned"], ["pruned"]),
        (["runs/x/teacher", "runs/x/pruned/"], ["teacher", "pruned"]),
        (["runs/a/pruned", "runs/b/pruned"], ["a/pruned", "b/pruned"]),
        (["a/x/pruned", "b/x/pruned", "c"], ["a/x/pruned", "b/x/pruned", "c"]),
        (["princeton-nlp/CoFi-SST2-s95"], ["CoFi-SST2-s95"]),
        (["a/b", "a/b", "c"], ["b", "b #2", "c"]),
        (["pruned", "x/pruned"], ["pruned", "x/pruned"]),
        (["/a/b", "a/b"], ["//a/b", "a/b"]),
    ],
)
def test_names_are_short_and_differ(paths, expected):
    assert evaluate.names(paths) == expected


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"model.json": 9, "params/a": 100, "params/d/b": 20, "tokenizer/x": 7}, 120),
        ({"config.json": 9, "model.safetensors": 300, "pytorch_model.bin": 5}, 300),
        ({"config.json": 9, "pytorch_model.bin": 50, "vocab.txt": 7}, 50),
    ],
)
def test_bytes_are_those_of_the_parameters(files, expected, tmp_path):
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert load.disk_bytes(types.SimpleNamespace(folder=tmp_path)) == expected
