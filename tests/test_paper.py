"""The paper's figures, looked up for a config."""

import pytest

from cofi_jax.config import Config
from cofi_jax.models.spec import KINDS
from cofi_jax.report import paper


def figures(task, target, model="bert-base-uncased", kinds=KINDS, **distill):
    config = Config()
    config.data.task = task
    config.model.path = model
    config.prune.targets = (target,)
    config.prune.kinds = kinds
    for name, value in distill.items():
        setattr(config.distill, name, value)
    return paper.figures(config)


# As printed: in percent.
@pytest.mark.parametrize(
    "task, target, score, speedup",
    [
        ("sst2", 0.95, 90.6, 12.2),
        ("qnli", 0.95, 86.1, 12.1),
        ("mnli", 0.95, 80.6, 12.1),
        ("qqp", 0.95, 90.1, None),
        ("squad", 0.95, 82.6, 8.7),
        ("rte", 0.95, 64.7, None),
        ("mrpc", 0.95, 82.6, 12.2),
        ("mnli", 0.70, 84.9, 2.7),
        ("squad", 0.60, 89.1, 2.0),
        ("cola", 0.60, 60.4, 2.0),
    ],
)
def test_whole_recipe(task, target, score, speedup):
    found = figures(task, target)
    assert found["score"] == pytest.approx(score / 100)
    assert found["speedup"] == speedup
    assert found["source"]


@pytest.mark.parametrize("match", ["closest", "ordered"])
def test_both_ways_of_matching_are_the_papers(match):
    assert figures("mrpc", 0.6, match=match)["score"] == pytest.approx(0.868)


def test_distillation_ablation():
    none = figures("squad", 0.95, logits=0.0, layers=0.0)
    assert none == {"score": 0.758, "speedup": None, "source": "table 5"}
    assert figures("sst2", 0.95, logits=1.0, layers=0.0)["score"] == 0.911


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "sst2", "target": 0.94},
        {"task": "stsb", "target": 0.95},
        {"task": "demo", "target": 0.95},
        {"task": "sst2", "target": 0.6, "logits": 0.0, "layers": 0.0},
        {"task": "rte", "target": 0.95, "layers": 0.0},
        {"task": "sst2", "target": 0.95, "kinds": ("head", "intermediate")},
        {"task": "sst2", "target": 0.95, "match": "fixed"},
        {"task": "sst2", "target": 0.95, "taught": "random"},
        {"task": "sst2", "target": 0.95, "logits": 0.0},
        {"task": "sst2", "target": 0.95, "model": "path/to/RoBERTa-base"},
    ],
)
def test_nothing_is_said_where_nothing_is_known(arguments):
    assert figures(**arguments) is None


def test_nothing_is_said_of_a_model_that_may_not_be_the_last_one():
    config = Config()
    config.data.task, config.model.path = "sst2", "bert-base-uncased"
    config.prune.targets = (0.6, 0.95)
    assert paper.figures(config) == figures("sst2", 0.95)
    config.prune.max_drop = 0.01
    assert paper.figures(config) is None
    config.prune.targets = (0.95,)
    assert paper.figures(config) == figures("sst2", 0.95)


def test_order_of_kinds_does_not_matter():
    assert figures("sst2", 0.6, kinds=KINDS[::-1]) == figures("sst2", 0.6)


def test_curves_fall_and_speed_rises():
    for task in ("sst2", "qnli", "mnli", "squad"):
        targets = (0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
        rows = [figures(task, target) for target in targets]
        scores, speedups = ([row[key] for row in rows] for key in ("score", "speedup"))
        assert scores == sorted(scores, reverse=True)
        assert speedups == sorted(speedups)
