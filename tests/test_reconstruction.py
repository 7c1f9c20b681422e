"""Output projections that are fitted after a cut: against NumPy's least squares."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import masks, slicing
from cofi_jax.training import reconstruction
from cofi_jax.training.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("quick_compile")


def batches_of(tiny, count, seed=3):
    """Batches of rows of 1 to 7 tokens, and padding of which nothing may depend.

    The last row only fills up its batch, so nothing may depend on it either.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        lengths = rng.integers(1, 8, 4)
        yield {
            "input_ids": rng.integers(0, tiny.vocab_size, (4, 7)).astype(np.int32),
            "attention_mask": (np.arange(7) < lengths[:, None]).astype(np.int32),
            "token_type_ids": rng.integers(0, 2, (4, 7)).astype(np.int32),
            "weight": np.float32([1, 1, 1, 0]),
        }


def cut(config, params, closed):
    """The model without some units: {kind: {layer: indices}}."""
    found = {k: np.ones(s) for k, s in masks.mask_shapes(config, [*closed]).items()}
    for kind, layers in closed.items():
        for layer, units in layers.items():
            found[kind][layer, units] = 0
    params, spec = slicing.prune(params, found, config)
    return Encoder(spec.config(config)), params


def states(model, params, batch):
    with jax.default_matmul_precision("highest"):
        found = model.apply({"params": params}, batch).hidden_states
    real = (batch["attention_mask"] > 0) & (batch["weight"] > 0)[:, None]
    return [np.asarray(x)[real] for x in found]


def test_a_model_of_which_nothing_is_cut_stays_as_it_is(tiny, tiny_params):
    model = Encoder(tiny)
    found = reconstruct(model, tiny_params, model, tiny_params, batches_of(tiny, 2))
    assert jax.tree.structure(found) == jax.tree.structure(tiny_params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, tiny_params
    )


def test_the_solution_is_that_of_least_squares(tiny):
    """Of one block, whose outputs are computed here once more.

    Of what it writes, only the first token is read, which has half of the weight.
    """
    sizes = dataclasses.replace(tiny, heads=(0,), intermediate=(5,))
    params = random_params(sizes, seed=4)
    model, left = cut(sizes, params, {"intermediate": {0: [1, 4]}})
    batches = [*batches_of(tiny, 3)]
    found = reconstruct(model, left, Encoder(sizes), params, batches)["layer_0"]

    x = np.concatenate([states(model, left, each)[0] for each in batches])
    x = x.astype(np.float64)
    own = jax.tree.map(np.float64, params["layer_0"]["ffn"])
    u = x @ own["up"]["kernel"] + own["up"]["bias"]
    u = u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
    missing = u @ own["down"]["kernel"] + own["down"]["bias"]
    kept = [0, 2, 3]
    u = np.concatenate([u[:, kept], np.ones((len(u), 1))], 1)
    before = np.concatenate([own["down"]["kernel"][kept], own["down"]["bias"][None]])
    lengths = [n for each in batches for n in each["attention_mask"][:3].sum(-1)]
    of_row = [[max(n - 1, 1)] + [1] * (n - 1) for n in lengths]
    roots = np.sqrt(np.concatenate(of_row))[:, None]
    u, missing = u * roots, missing * roots
    weight = math.sqrt(reconstruction._PENALTY * (u**2).sum(0).mean())
    rows = np.concatenate([u, weight * np.eye(4)])
    expected = np.linalg.lstsq(rows, np.concatenate([missing, weight * before]))[0]
    assert np.abs(expected - before).max() > 0.1
    down = found["ffn"]["down"]
    np.testing.assert_allclose(down["kernel"], expected[:-1], atol=1e-4)
    np.testing.assert_allclose(down["bias"], expected[-1], atol=1e-4)
    up = found["ffn"]["up"], left["layer_0"]["ffn"]["up"]
    jax.tree.map(np.testing.assert_array_equal, *up)


def twice(params, layer):
    """Each feed-forward unit of a layer twice: half of them can be left out."""
    ffn = params[f"layer_{layer}"]["ffn"]
    up = {name: np.concatenate([x, x], -1) for name, x in ffn["up"].items()}
    kernel = np.concatenate([0.3 * ffn["down"]["kernel"], 0.7 * ffn["down"]["kernel"]])
    ffn = {"up": up, "down": {"kernel": kernel, "bias": ffn["down"]["bias"]}}
    return params | {f"layer_{layer}": params[f"layer_{layer}"] | {"ffn": ffn}}


def test_what_other_units_compute_too_is_not_lost(tiny, tiny_params, monkeypatch):
    monkeypatch.setattr(reconstruction, "_PENALTY", 1e-9)
    width = tiny.intermediate[1]
    params = twice(twice(tiny_params, 0), 1)
    sizes = dataclasses.replace(tiny, intermediate=(2 * width,) * 2)
    closed = {"intermediate": dict.fromkeys(range(2), range(width))}
    model, left = cut(sizes, params, closed)
    batches = [*batches_of(tiny, 8)]
    found = reconstruct(model, left, Encoder(sizes), params, batches)
    for each in batches_of(tiny, 2, seed=9):  # They are others.
        *_, expected = states(Encoder(sizes), params, each)
        *_, before = states(model, left, each)
        *_, after = states(model, found, each)
        assert np.abs(before - expected).max() > 0.1
        np.testing.assert_allclose(after, expected, atol=2e-3)


@pytest.mark.parametrize(
    "closed, fitted, place",
    [
        # All that follows the first feed-forward block is gone, or its attention.
        (
            {"head": {1: [0, 1, 2]}, "intermediate": {1: range(6)}},
            (0, "ffn"),
            (1, "ffn"),
        ),
        ({"head": {1: [0, 1, 2]}}, (0, "ffn"), (1, "attention")),
        ({"intermediate": {0: range(6)}}, (0, "attention"), (0, "ffn")),
    ],
)
def test_the_block_before_stands_in_for_blocks_that_are_gone(
    closed, fitted, place, tiny, tiny_params
):
    model, left = cut(tiny, tiny_params, closed)
    batches = [*batches_of(tiny, 8)]
    found = reconstruct(model, left, Encoder(tiny), tiny_params, batches)
    norms = [
        params[f"layer_{layer}"][f"{block}_norm"]
        for params, (layer, block) in ((found, fitted), (tiny_params, place))
    ]
    jax.tree.map(np.testing.assert_array_equal, *norms)

    def error(params):
        pairs = (
            (states(model, params, b), states(Encoder(tiny), tiny_params, b))
            for b in batches
        )
        return sum(np.square(x[-1] - y[-1]).sum() for x, y in pairs)

    assert error(found) < 0.8 * error(left)


def test_a_model_may_have_lost_everything(tiny, tiny_params):
    closed = {"head": {0: range(3), 1: range(3)}}
    closed["intermediate"] = {0: range(6), 1: range(6)}
    model, left = cut(tiny, tiny_params, closed)
    found = reconstruct(model, left, Encoder(tiny), tiny_params, batches_of(tiny, 1))
    jax.tree.map(np.testing.assert_array_equal, found, left)


@pytest.mark.parametrize(
    "other", [{"heads": (3,) * 3, "intermediate": (6,) * 3}, {"hidden_size": 8}]
)
def test_a_model_of_another_shape(other, tiny, tiny_params):
    """A deeper one would have been read at the wrong layers, and nobody told."""
    whole = dataclasses.replace(tiny, **other)
    with pytest.raises(ValueError, match="whole: must have the layers and hidden"):
        reconstruct(Encoder(tiny), tiny_params, Encoder(whole), {}, [{}])


def test_no_batch(tiny, tiny_params):
    with pytest.raises(ValueError, match="batches: there must be at least one"):
        reconstruct(Encoder(tiny), tiny_params, Encoder(tiny), tiny_params, [])
