"""What units are worth if others make up for them: against brute force."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.spec import INNER
from cofi_jax.pruning import masks
from cofi_jax.training import surgeon
from cofi_jax.training.surgeon import compensated_importance

pytestmark = pytest.mark.usefixtures("quick_compile")


def single_tokens(tiny, count):
    """Batches of one row of one token each, so that their gradients have closed forms.

    The gradient with respect to a bias is that with respect to the sum it is added to.
    """
    rng = np.random.default_rng(8)
    for _ in range(count):
        yield {
            "input_ids": rng.integers(0, tiny.vocab_size, (1, 1)).astype(np.int32),
            "attention_mask": np.ones((1, 1), np.int32),
            "token_type_ids": rng.integers(0, 2, (1, 1)).astype(np.int32),
            "labels": rng.integers(0, tiny.num_labels, 1),
            "weight": np.ones(1, np.float32),
        }


def least_added(outputs, kernel, units):
    """What units add that are removed one by one, each by a search over all others.

    For each candidate, the quadratic form is minimised over all rows that are left.
    """
    width = len(kernel) // units
    damping = surgeon._DAMPING * np.trace(outputs) / len(outputs)
    outputs = outputs + damping * np.eye(len(outputs))
    kernel = np.concatenate([kernel, np.zeros_like(kernel[:1])])

    def least(removed):
        rows = [unit * width + i for unit in removed for i in range(width)]
        free = np.setdiff1d(np.arange(len(kernel)), rows)
        change = -np.where(np.isin(np.arange(len(kernel)), rows)[:, None], kernel, 0)
        forces = outputs[np.ix_(free, rows)] @ change[rows]
        change[free] = np.linalg.solve(outputs[np.ix_(free, free)], -forces)
        return np.trace(change.T @ outputs @ change)

    removed, added, before = [], np.zeros(units), 0.0
    while len(removed) < units:
        left = [unit for unit in range(units) if unit not in removed]
        losses = {unit: least([*removed, unit]) for unit in left}
        unit = min(left, key=losses.get)
        added[unit] = max(losses[unit] - before, added.max())
        removed, before = [*removed, unit], losses[unit]
    return added


@pytest.mark.parametrize("units, width", [(7, 1), (4, 3), (1, 2)])
def test_units_are_removed_as_a_search_over_all_changes_removes_them(units, width):
    rng = np.random.default_rng(units)
    seen = rng.standard_normal((40, units * width + 1))
    seen[:, 1] = seen[:, 0] + 0.1 * seen[:, 1]
    seen[:, -1] = 1
    kernel = rng.standard_normal((units * width, 5))
    found = surgeon._added_losses(seen.T @ seen, kernel, units)
    expected = least_added(seen.T @ seen, kernel, units)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_to_remove_several_at_once_changes_little(monkeypatch):
    rng = np.random.default_rng(1)
    seen, kernel = rng.standard_normal((900, 201)), rng.standard_normal((200, 3))
    found = surgeon._added_losses(seen.T @ seen, kernel, 200)
    monkeypatch.setattr(surgeon, "_AT_ONCE", 0)
    one_by_one = surgeon._added_losses(seen.T @ seen, kernel, 200)
    ranks = [np.argsort(np.argsort(added)) for added in (found, one_by_one)]
    assert np.corrcoef(*ranks)[0, 1] > 0.99
    assert found.sum() == pytest.approx(one_by_one.sum(), rel=0.01)


@pytest.mark.parametrize("name", ["attention", "ffn"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_curvature_is_that_of_gradients_of_the_bias(layer, name, tiny):
    """Of the output's bias, and of the kernel, whose gradient is u g^T."""
    params, model = jax.device_put(random_params(tiny, seed=6)), Encoder(tiny)
    block = {"attention": "output", "ffn": "down"}[name]
    batches = [*single_tokens(tiny, 5)]

    @jax.jit
    @jax.grad
    def gradient(own, batch):
        changed = params[f"layer_{layer}"][name] | {block: own}
        changed = params | {
            f"layer_{layer}": params[f"layer_{layer}"] | {name: changed}
        }
        logits = model.apply({"params": changed}, batch).logits
        return PROBLEMS[tiny.problem].loss(logits, batch)

    outputs, curvature = 0, 0
    for batch in batches:
        own = gradient(params[f"layer_{layer}"][name][block], batch)
        g = np.float64(own["bias"])
        both = np.concatenate([np.reshape(own["kernel"], (-1, len(g))), g[None]])
        outputs, curvature = outputs + both @ both.T, curvature + np.outer(g, g)
    outputs = outputs / np.trace(curvature)  # Each batch has one row.
    kernel = params[f"layer_{layer}"][name][block]["kernel"]
    kernel = np.reshape(kernel, (-1, tiny.hidden_size))
    root = np.linalg.cholesky(curvature / 5 + 1e-12 * np.eye(len(curvature)))
    inner = {"attention": "head", "ffn": "intermediate"}[name]
    units = {"head": tiny.heads, "intermediate": tiny.intermediate}[inner][layer]
    expected = least_added(outputs, kernel @ root, units)
    found = compensated_importance(model, params, batches, kinds=(inner,))[inner]
    np.testing.assert_allclose(found[layer], expected, rtol=2e-3)


def test_a_unit_that_another_can_stand_in_for_is_worth_little(tiny, tiny_batch):
    params = random_params(tiny, seed=2)
    ffn = params["layer_0"]["ffn"]
    for array in (ffn["up"]["kernel"], ffn["up"]["bias"]):
        array[..., 4] = array[..., 1]
    batch = tiny_batch | {"labels": np.array([0, 2, 1]), "weight": np.ones(3)}
    found = compensated_importance(Encoder(tiny), params, [batch])["intermediate"][0]
    pair, others = found[[1, 4]], np.delete(found, [1, 4])
    assert min(pair) < 0.05 * max(pair)  # The damping leaves a part of it.
    assert max(pair) > np.median(others)


def test_padding_and_rows_that_fill_up_a_batch_are_not_read(tiny, tiny_params):
    rng = np.random.default_rng(4)
    lengths = np.array([3, 2, 3])
    batch = {
        "input_ids": rng.integers(0, tiny.vocab_size, (3, 5)).astype(np.int32),
        "attention_mask": (np.arange(5) < lengths[:, None]).astype(np.int32),
        "token_type_ids": np.zeros((3, 5), np.int32),
        "labels": np.array([1, 0, 2]),
        "weight": np.float32([1, 1, 0]),
    }
    other = jax.tree.map(np.copy, batch)
    other["input_ids"][:, 3:] = 1
    other["input_ids"][2] = 2
    other["labels"][2] = 0
    model = Encoder(tiny)
    one, two = (compensated_importance(model, tiny_params, [b]) for b in (batch, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), one, two)


def test_a_row_counts_alike_in_a_full_and_in_a_short_batch(tiny, tiny_batch):
    """Three rows in one batch, and the same rows in batches of two and of one."""
    params, labels = random_params(tiny, seed=5), np.array([0, 2, 1])
    full = tiny_batch | {"labels": labels, "weight": np.ones(3, np.float32)}
    parts = [full | {"weight": np.float32(weight)} for weight in ([1, 1, 0], [0, 0, 1])]
    whole = compensated_importance(Encoder(tiny), params, [full])
    found = compensated_importance(Encoder(tiny), params, parts)
    for kind in whole:
        np.testing.assert_allclose(found[kind], whole[kind], rtol=1e-4)


def test_what_is_not_finite_is_said(tiny, tiny_batch):
    params = random_params(tiny, seed=5)
    params["classifier"]["kernel"][:] = np.nan
    batch = tiny_batch | {"labels": np.array([0, 2, 1]), "weight": np.ones(3)}
    with pytest.raises(ValueError, match="layer_0/attention: a gradient is not finite"):
        compensated_importance(Encoder(tiny), params, [batch])


def test_of_a_ragged_model_what_is_not_there_is_0(tiny, tiny_batch):
    sizes = dataclasses.replace(tiny, heads=(3, 0, 1), intermediate=(0, 2, 5))
    batch = tiny_batch | {"labels": np.array([0, 2, 1]), "weight": np.ones(3)}
    args = Encoder(sizes), random_params(sizes, seed=5), [batch, batch]
    found = compensated_importance(*args)
    for outer, inner in INNER.items():
        real = masks.real_positions(sizes)[inner]
        assert (found[inner][real] > 0).all()
        assert not found[inner][~real].any()
        np.testing.assert_allclose(found[outer], found[inner].sum(-1))
    # The mean over batches of one kind is that of one of them.
    once = compensated_importance(*args[:2], [batch])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, once)


def test_what_nothing_depends_on_is_worth_nothing(tiny, tiny_batch):
    params = random_params(tiny, seed=5)
    params["classifier"]["kernel"][:] = 0
    batch = tiny_batch | {"labels": np.array([0, 2, 1]), "weight": np.ones(3)}
    found = compensated_importance(Encoder(tiny), params, [batch])
    assert not any(values.any() for values in found.values())


def test_without_labels_they_are_not_read(tiny, tiny_params, tiny_batch):
    batch = tiny_batch | {"weight": np.ones(3, np.float32)}
    args = Encoder(tiny), tiny_params, [batch]
    found = compensated_importance(*args, kinds=("ffn",), labels=False)
    assert (found["ffn"] > 0).all()


def test_what_cannot_be_measured_is_refused(tiny, tiny_params, tiny_batch):
    args = Encoder(tiny), tiny_params
    with pytest.raises(ValueError, match="at least one"):
        compensated_importance(*args, [])
    for kinds, said in ((("head", "hidden"), "hidden"), (("heads",), "heads")):
        with pytest.raises(UserError, match=said):
            compensated_importance(*args, [tiny_batch], kinds=kinds)
