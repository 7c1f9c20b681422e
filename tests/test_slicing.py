"""The masked model against the sliced one, and both against plain NumPy."""

import dataclasses
import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from cofi_jax.models.bert import Encoder, abstract_params
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning import transforms
from cofi_jax.pruning.slicing import PrunedSpec, expand, fold, prune, spec_of, take

pytestmark = pytest.mark.usefixtures("quick_compile")

SUBSETS = [s for n in range(1, 6) for s in itertools.combinations(KINDS, n)]


# Each set of kinds is one compilation of the masked model.
DRAWN_SUBSETS = [
    KINDS,
    ("head", "mha", "intermediate", "ffn"),
    ("head", "intermediate"),
    ("mha", "ffn", "hidden"),
    ("intermediate", "hidden"),
]


FULL = {"head": 3, "intermediate": 6, "hidden": 16}  # of the fixture `tiny`


def gates_with(rng, counts, *, soft):
    """Gates of which each row has the given number open, at places drawn by `rng`."""

    def row(kind, number):
        size = FULL.get(kind, 1)
        values = rng.uniform(0.004, 1, size) if soft else np.ones(size)
        values[rng.permutation(size)[number:]] = 0
        return values

    gates = {}
    for kind, numbers in counts.items():
        rows = np.array([row(kind, number) for number in numbers], np.float32)
        shape = {"hidden": (-1,), "mha": (-1,), "ffn": (-1,)}.get(kind, rows.shape)
        gates[kind] = rows.reshape(shape)
    return gates


# Few sizes, so that few shapes are compiled: none, one, all but one, all. Fewer than
# four hidden dimensions can be so close to each other that LayerNorm multiplies the
# rounding of float32 beyond 1e-5 (a single one: by 1e6), in either model.
SIZES = {
    "head": (0, 1, 2, 3),
    "mha": (0, 1),
    "intermediate": (0, 1, 5, 6),
    "ffn": (0, 1),
    "hidden": (4, 7, 15, 16),
}


@st.composite
def drawn_gates(draw):
    kinds = draw(st.sampled_from(DRAWN_SUBSETS))
    counts = {
        kind: [
            draw(st.sampled_from(SIZES[kind])) for _ in range(1 + (kind != "hidden"))
        ]
        for kind in kinds
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return gates_with(rng, counts, soft=draw(st.booleans()))


def random_gates(seed, kinds=KINDS):
    rng = np.random.default_rng(seed)
    counts = {k: rng.choice(SIZES[k], 1 + (k != "hidden")) for k in kinds}
    return gates_with(rng, counts, soft=seed % 3 > 0)


@pytest.fixture(scope="module")
def run_masked(tiny, tiny_params, tiny_batch):
    """The tiny model under masks: one compilation for each set of kinds."""

    @jax.jit
    def run(gates):
        return Encoder(tiny).apply({"params": tiny_params, "masks": gates}, tiny_batch)

    return run


def assert_close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert (np.abs(a - b) / np.maximum(1, np.abs(b))).max() < tolerance


def to_json(value):
    return json.loads(json.dumps(dataclasses.asdict(value)))


@functools.cache
def shapes_of(config):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config))


def assert_sliced_equals_masked(masked, gates, config, params, batch):
    sliced, spec = prune(params, gates, config)
    small = spec.config(config)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), sliced)
    assert found == shapes_of(small)

    kept = np.array(spec.hidden)
    with jax.disable_jit():  # many structures: nothing to compile for each
        result = Encoder(small).apply({"params": sliced}, batch)
    assert_close(masked.logits, result.logits)
    for ours, theirs in zip(masked.hidden_states, result.hidden_states, strict=True):
        assert_close(ours[..., kept], theirs)
        assert not np.delete(ours, kept, axis=-1).any()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(gates=drawn_gates())
def test_masked_equals_sliced(gates, run_masked, tiny, tiny_params, tiny_batch):
    masked = run_masked(gates)
    assert_sliced_equals_masked(masked, gates, tiny, tiny_params, tiny_batch)


@pytest.mark.parametrize("seed", range(10))
def test_expanded_equals_sliced(seed, tiny, tiny_params, tiny_batch):
    sliced, spec = prune(tiny_params, random_gates(seed), tiny)
    whole = expand(sliced, spec, tiny_params)
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, tiny_params)
    chex.assert_trees_all_equal(take(whole, spec), sliced)
    gates = spec.masks(tiny)
    assert spec_of(gates, tiny) == spec
    masked = Encoder(tiny).apply({"params": whole, "masks": gates}, tiny_batch)
    small = Encoder(spec.config(tiny)).apply({"params": sliced}, tiny_batch)
    assert_close(masked.logits, small.logits)


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_masked_equals_sliced_for_every_subset(kinds, tiny, tiny_params, tiny_batch):
    gates = random_gates(len(kinds) * 3 + 1, kinds)
    masked = Encoder(tiny).apply({"params": tiny_params, "masks": gates}, tiny_batch)
    assert_sliced_equals_masked(masked, gates, tiny, tiny_params, tiny_batch)


def test_activations_are_of_order_one(run_masked, tiny, tiny_params, tiny_batch):
    """Or else 1e-5 would say little; and the gates do change the outputs."""
    dense = Encoder(tiny).apply({"params": tiny_params}, tiny_batch)
    for state in dense.hidden_states:
        assert 0.5 < np.std(state) < 2
    assert 0.1 < np.std(dense.logits) < 3
    pruned = run_masked(random_gates(1))
    assert np.abs(dense.logits - pruned.logits).max() > 0.1


# An independent forward pass


def forward(params, batch, gates, config):
    """Post-LayerNorm BERT in float64, one row, one head and one layer at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    gates = {kind: np.asarray(gate, np.float64) for kind, gate in gates.items()}
    z = gates.get("hidden", np.ones(config.hidden_size))
    kept = np.flatnonzero(z)

    def layer_norm(x, p):
        part = x[:, kept]
        part = part - part.mean(1, keepdims=True)
        part = part / np.sqrt((part**2).mean(1, keepdims=True) + config.layer_norm_eps)
        out = np.zeros_like(x)
        out[:, kept] = z[kept] * (part * p["scale"][kept] + p["bias"][kept])
        return out

    def attention(x, real, p, head_gates):
        out = np.zeros_like(x) + p["output"]["bias"]
        for h, gate in enumerate(head_gates):
            q, k, v = (
                x @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                for name in ("query", "key", "value")
            )
            weights = np.exp(q @ k[real].T / np.sqrt(config.head_size))
            weights /= weights.sum(1, keepdims=True)
            out += gate * weights @ v[real] @ p["output"]["kernel"][h]
        return out

    def feed_forward(x, p, unit_gates):
        x = x @ p["up"]["kernel"] + p["up"]["bias"]
        x = unit_gates * x * (1 + erf(x / np.sqrt(2))) / 2
        return x @ p["down"]["kernel"] + p["down"]["bias"]

    def row(ids, types, real):
        tables = params["embeddings"]
        x = tables["word"][ids] + tables["type"][types]
        x = x + tables["position"][: len(ids)]
        states = [layer_norm(z * x, tables["norm"])]
        for i in range(len(config.heads)):
            x, layer = states[-1], params[f"layer_{i}"]
            heads = gates.get("head", {i: np.ones(config.heads[i])})[i]
            mha = gates.get("mha", {i: 1.0})[i]
            if mha != 0 and heads.any():
                y = attention(x, real, layer["attention"], heads)
                x = layer_norm(x + z * mha * y, layer["attention_norm"])
            units = gates.get("intermediate", {i: np.ones(config.intermediate[i])})[i]
            ffn = gates.get("ffn", {i: 1.0})[i]
            if ffn != 0 and units.any():
                y = feed_forward(x, layer["ffn"], units)
                x = layer_norm(x + z * ffn * y, layer["ffn_norm"])
            states.append(x)
        pooled = params["pooler"]["kernel"].T @ states[-1][0] + params["pooler"]["bias"]
        head = params["classifier"]
        return np.tanh(pooled) @ head["kernel"] + head["bias"], states

    rows = [
        row(ids, types, mask.astype(bool))
        for ids, types, mask in zip(
            batch["input_ids"],
            batch["token_type_ids"],
            batch["attention_mask"],
            strict=True,
        )
    ]
    logits, states = zip(*rows, strict=True)
    return np.array(logits), np.array(states).swapaxes(0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_masked_model_agrees_with_numpy(
    seed, run_masked, tiny, tiny_params, tiny_batch
):
    gates = random_gates(seed, DRAWN_SUBSETS[seed % 5])
    result = run_masked(gates)
    logits, states = forward(tiny_params, tiny_batch, gates, tiny)
    assert_close(result.logits, logits)
    assert len(result.hidden_states) == len(tiny.heads) + 1
    assert_close(jnp.stack(result.hidden_states), states)


def test_dense_model_agrees_with_numpy(tiny, tiny_params, tiny_batch):
    result = Encoder(tiny).apply({"params": tiny_params}, tiny_batch)
    logits, states = forward(tiny_params, tiny_batch, {}, tiny)
    assert_close(result.logits, logits)
    assert_close(jnp.stack(result.hidden_states), states)


def test_padding_does_not_reach_real_tokens(run_masked, tiny, tiny_params, tiny_batch):
    gates = random_gates(5)
    short = {name: value[1:2, :4] for name, value in tiny_batch.items()}
    expected = Encoder(tiny).apply({"params": tiny_params, "masks": gates}, short)
    result = run_masked(gates)
    assert_close(result.logits[1:2], expected.logits)
    assert_close(result.hidden_states[-1][1:2, :4], expected.hidden_states[-1])


# Laws of fold, prune and the spec


@pytest.mark.parametrize("seed", range(8))
def test_folding_makes_the_gates_hard(seed, run_masked, tiny, tiny_params, tiny_batch):
    gates = random_gates(seed)
    variables = {
        "params": fold(tiny_params, gates, tiny),
        "masks": transforms.harden()(gates),
    }
    shapes = jax.tree.map(np.shape, variables["params"])
    assert shapes == jax.tree.map(np.shape, tiny_params)
    folded, soft = Encoder(tiny).apply(variables, tiny_batch), run_masked(gates)
    jax.tree.map(assert_close, folded, soft)


@pytest.mark.parametrize("gates", [{}, random_gates(0)], ids=["no masks", "all open"])
def test_open_gates_change_nothing(gates, tiny, tiny_params):
    gates = {kind: np.ones_like(value) for kind, value in gates.items()}
    before = jax.tree.map(np.copy, tiny_params)
    sliced, spec = prune(tiny_params, gates, tiny)
    jax.tree.map(np.testing.assert_array_equal, sliced, before)
    jax.tree.map(np.testing.assert_array_equal, tiny_params, before)
    assert spec.config(tiny) == tiny
    everything = tuple(range(3)), tuple(range(6)), tuple(range(16))
    assert spec == PrunedSpec(
        heads=everything[:1] * 2, intermediate=everything[1:2] * 2, hidden=everything[2]
    )


def test_spec_names_what_stays(tiny, tiny_params):
    gates = {
        "head": np.array([[0.5, 0, 1], [1, 1, 0.1]]),
        "mha": np.array([0.3, 0]),
        "intermediate": np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0.2, 0, 1]]),
        "ffn": np.array([1, 0.9]),
        "hidden": np.eye(16)[3] + 0.25 * np.eye(16)[9],
    }
    sliced, spec = prune(tiny_params, gates, tiny)
    assert spec == PrunedSpec(
        heads=((0, 2), ()), intermediate=((), (1, 3, 5)), hidden=(3, 9)
    )
    small = spec.config(tiny)
    assert (small.hidden_size, small.heads, small.intermediate) == (2, (2, 0), (0, 3))
    changed = {"hidden_size": 16, "heads": (3, 3), "intermediate": (6, 6)}
    assert dataclasses.replace(small, **changed) == tiny
    # Rows and columns by hand, the gates of a head, its layer and the hidden width.
    kernel = tiny_params["layer_0"]["attention"]["output"]["kernel"]
    expected = kernel[[0, 2]][:, :, [3, 9]] * 0.3 * np.array([1, 0.25])
    expected *= np.array([0.5, 1])[:, None, None]
    found = sliced["layer_0"]["attention"]["output"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    up = tiny_params["layer_1"]["ffn"]["up"]["kernel"]
    np.testing.assert_array_equal(
        sliced["layer_1"]["ffn"]["up"]["kernel"], up[[3, 9]][:, [1, 3, 5]]
    )
    bias = tiny_params["layer_1"]["ffn"]["down"]["bias"]
    np.testing.assert_allclose(
        sliced["layer_1"]["ffn"]["down"]["bias"],
        bias[[3, 9]] * 0.9 * np.array([1, 0.25]),
        rtol=1e-6,
    )
    for name in ("pooler", "classifier"):
        bias = tiny_params[name]["bias"]
        np.testing.assert_array_equal(sliced[name]["bias"], bias)


def test_model_without_any_block_is_its_embeddings(tiny, tiny_params, tiny_batch):
    gates = {"mha": np.zeros(2), "ffn": np.zeros(2)}
    sliced, spec = prune(tiny_params, gates, tiny)
    assert set(sliced) == {"embeddings", "pooler", "classifier"}
    model = Encoder(spec.config(tiny))
    states = model.apply({"params": sliced}, tiny_batch).hidden_states
    assert len(states) == 3
    for state in states:
        np.testing.assert_array_equal(state, states[0])


@pytest.mark.parametrize("kinds", [("hidden",), KINDS], ids="+".join)
def test_no_hidden_dimension_left_is_an_error(kinds, tiny, tiny_params):
    gates = {k: np.ones(s) for k, s in masks_lib.mask_shapes(tiny, kinds).items()}
    gates["hidden"] = np.zeros(16)
    with pytest.raises(ValueError, match="hidden"):
        prune(tiny_params, gates, tiny)


@pytest.mark.parametrize("seed", range(6))
def test_spec_and_config_survive_json(seed, tiny, tiny_params):
    _, spec = prune(tiny_params, random_gates(seed), tiny)
    for value in (spec, tiny, spec.config(tiny)):
        restored = type(value).from_json(to_json(value))
        assert restored == value and hash(restored) == hash(value)


@pytest.mark.parametrize("kind", ["heads", "layer", "hidden_z"])
def test_unknown_kind_of_mask_is_an_error(kind, tiny, tiny_params, tiny_batch):
    masks = {"hidden": np.ones(16), kind: np.ones(2)}
    with pytest.raises(ValueError, match=kind):
        Encoder(tiny).apply({"params": tiny_params, "masks": masks}, tiny_batch)
