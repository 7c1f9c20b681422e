"""What a run starts from: a teacher whose classes are the task's."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.checkpoints import saved_model
from cofi_jax.config import Config
from cofi_jax.data import tasks, toy
from cofi_jax.errors import UserError
from cofi_jax.run import setup

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A saved model for the classes no, maybe, yes; and its parameters."""
    tokenizer = toy.demo_tokenizer()
    sizes = dataclasses.replace(tiny, vocab_size=len(tokenizer))
    params, path = random_params(sizes, seed=0), tmp_path_factory.mktemp("x") / "saved"
    about = {"labels": ["no", "maybe", "yes"]}
    saved_model.save_model(path, params, sizes, tokenizer=tokenizer, about=about)
    return path, params


def load(path, *labels):
    config = Config()
    config.teacher.path = str(path)
    config.data.task, config.data.columns = "own", ("text",)
    config.data.labels = labels
    return setup.load_teacher(config, tasks.find(config.data))


def test_classes_of_a_saved_teacher_come_in_the_tasks_order(teacher, tiny_batch):
    path, params = teacher
    model, same, _ = load(path, "no", "maybe", "yes")
    jax.tree.map(np.testing.assert_array_equal, same, params)
    _, other, _ = load(path, "yes", "no", "maybe")
    logits, permuted = (
        model.apply({"params": p}, tiny_batch).logits for p in (params, other)
    )
    np.testing.assert_allclose(permuted, logits[:, [2, 0, 1]], atol=1e-6)


def test_a_saved_teacher_of_other_classes(teacher):
    with pytest.raises(UserError, match=r"teacher.path=.*'maybe'.*'perhaps'"):
        load(teacher[0], "no", "perhaps", "yes")


def test_a_saved_teacher_at_home(teacher, monkeypatch):
    monkeypatch.setenv("HOME", str(teacher[0].parent))
    assert load("~/saved", "no", "maybe", "yes")[0].config.num_labels == 3
