"""Models with other widths in each layer are pruned like dense ones, and twice."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params

from cofi_jax.models.bert import Encoder
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import constraint, cost, masks, transforms
from cofi_jax.pruning.slicing import PrunedSpec, expand, fold, prune, spec_of, take

RAGGED = dataclasses.replace(
    TINY, heads=(3, 0, 1), intermediate=(5, 2, 0), hidden_size=13
)
# A layer without any block, and blocks that are all absent.
HOLES = dataclasses.replace(TINY, heads=(0, 2, 0), intermediate=(0, 4, 6))
NO_HEADS = dataclasses.replace(TINY, heads=(0, 0), intermediate=(6, 1))
CONFIGS = [RAGGED, HOLES, NO_HEADS]
REAL = {
    "head": [[1, 1, 1], [0, 0, 0], [1, 0, 0]],
    "mha": [1, 0, 1],
    "intermediate": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    "ffn": [1, 1, 0],
    "hidden": [1] * 13,
}
PADDING = {kind: np.array(real) == 0 for kind, real in REAL.items()}

pytestmark = pytest.mark.usefixtures("quick_compile")


def learned(config, seed, kinds=KINDS):
    """Log-alphas as pruning leaves them, of which many are near the middle."""
    key = jax.random.key(seed)
    log_alpha = masks.init_log_alpha(config, key, kinds)
    rng = np.random.default_rng(seed)
    return {
        kind: jnp.asarray(la + rng.normal(-3.5, 3, la.shape), jnp.float32)
        for kind, la in log_alpha.items()
    }


def drawn(config, seed, kinds=KINDS):
    """Soft masks with anything at all in the padding, and a hidden width that stays."""
    rng = np.random.default_rng(seed)
    gates = {
        kind: rng.uniform(0.2, 1, shape) * (rng.random(shape) < 0.7)
        for kind, shape in masks.mask_shapes(config, kinds).items()
    }
    if "hidden" in gates:
        gates["hidden"][rng.permutation(config.hidden_size)[:5]] = 0.8
    return {kind: jnp.asarray(gate, jnp.float32) for kind, gate in gates.items()}


def numpy_count(params):
    """The weights in the blocks of the layers, without LayerNorms."""
    return sum(
        leaf.size
        for name, layer in params.items()
        for block in ("attention", "ffn")
        for leaf in jax.tree.leaves(layer.get(block, {}))
        if name.startswith("layer_")
    )


def apply(config, params, batch, gates=None):
    variables = {"params": params} | ({"masks": gates} if gates is not None else {})
    with jax.default_matmul_precision("highest"), jax.disable_jit():
        return Encoder(config).apply(variables, batch)


def assert_same_function(one, other, hidden):
    np.testing.assert_allclose(one.logits, other.logits, atol=2e-5, rtol=1e-5)
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        np.testing.assert_allclose(a[..., hidden], b, atol=2e-5, rtol=1e-5)


# Shapes and padding


def test_shapes_are_those_of_the_widest_layer():
    shapes = masks.mask_shapes(RAGGED)
    assert shapes == {kind: np.shape(real) for kind, real in REAL.items()}


def test_what_is_beyond_a_layers_width_is_never_open():
    log_alpha = masks.init_log_alpha(RAGGED, jax.random.key(0))
    sampled = masks.sample(log_alpha, jax.random.key(1))
    evaluated = masks.evaluation_masks(log_alpha)
    chances = masks.prob_active(log_alpha)
    for kind, padding in PADDING.items():
        np.testing.assert_array_equal(np.isneginf(log_alpha[kind]), padding)
        np.testing.assert_array_equal(chances[kind][padding], 0)
        np.testing.assert_array_equal(sampled[kind][padding], 0)
        np.testing.assert_array_equal(evaluated[kind][padding], masks.PADDING)
        assert (log_alpha[kind][~padding] > 4).all()
        assert (sampled[kind][~padding] > 0).mean() > 0.5


def test_training_leaves_padding_where_it_is():
    log_alpha = learned(RAGGED, 0)

    def loss(log_alpha):
        drawn = masks.sample(log_alpha, jax.random.key(0))
        total = sum(jnp.square(gates).sum() for gates in drawn.values())
        return total + constraint.expected_sparsity(log_alpha, RAGGED)

    gradient = jax.jit(jax.grad(loss))(log_alpha)
    stepped = masks.clamp(jax.tree.map(lambda a, g: a - 99 * g, log_alpha, gradient))
    for kind, padding in PADDING.items():
        assert np.isfinite(gradient[kind]).all()
        np.testing.assert_array_equal(gradient[kind][padding], 0)
        np.testing.assert_array_equal(np.isneginf(stepped[kind]), padding)
        assert (np.abs(stepped[kind][~padding]) < 4.7).all()


@pytest.mark.parametrize("seed", range(5))
def test_padding_does_not_compete_in_the_ranking(seed):
    """A row is evaluated as if it were alone, without padding."""
    log_alpha = learned(RAGGED, seed)
    found = masks.evaluation_masks(log_alpha)
    for kind in ("head", "intermediate"):
        for row, gates, padding in zip(
            log_alpha[kind], found[kind], PADDING[kind], strict=True
        ):
            alone = masks.evaluation_masks({"hidden": row[~padding]})["hidden"]
            np.testing.assert_array_equal(gates[~padding], alone)


# Counting


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_count_is_that_of_the_sliced_parameters(config, seed):
    params, gates = random_params(config, seed), drawn(config, seed)
    assert cost.num_params({}, config) == numpy_count(params)
    for kinds in (KINDS, ("head", "intermediate"), ("mha", "ffn"), ("hidden",)):
        some = {kind: gates[kind] for kind in kinds}
        sliced, spec = prune(params, some, config)
        assert cost.num_params(some, config) == numpy_count(sliced)
        assert cost.num_params({}, spec.config(config)) == numpy_count(sliced)
    ones = {k: np.ones(s) for k, s in masks.mask_shapes(config).items()}
    assert cost.exact_sparsity(ones, config) == 0


@pytest.mark.parametrize("kinds", [KINDS, ("head", "intermediate"), ("ffn", "hidden")])
def test_expected_sparsity_is_the_mean_of_the_exact_one(kinds):
    log_alpha, draws = learned(RAGGED, 3, kinds), 2000
    keys = jax.random.split(jax.random.key(0), draws)
    gates = jax.vmap(masks.sample, in_axes=(None, 0))(log_alpha, keys)
    exact = jax.vmap(
        lambda gates: cost.PARAMETERS.expected(
            {kind: (gate > 0).astype(jnp.float32) for kind, gate in gates.items()},
            RAGGED,
        )
    )(gates)
    one = {kind: gate[0] for kind, gate in gates.items()}
    assert float(exact[0]) == cost.num_params(one, RAGGED)
    sparsity = 1 - np.asarray(exact, np.float64) / cost.num_params({}, RAGGED)
    expected = float(constraint.expected_sparsity(log_alpha, RAGGED))
    error = 4.5 * sparsity.std() / np.sqrt(draws)
    assert sparsity.mean() == pytest.approx(expected, abs=error)


# The model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_sliced_and_sliced_again(config, seed, tiny_batch):
    params, gates = random_params(config, seed), drawn(config, seed)
    masked = apply(config, params, tiny_batch, gates)
    small, spec = prune(params, gates, config)
    narrow = spec.config(config)
    once = apply(narrow, small, tiny_batch)
    assert_same_function(masked, once, np.array(spec.hidden))
    # The result is ragged too: once more.
    again = drawn(narrow, seed + 100)
    masked = apply(narrow, small, tiny_batch, again)
    smaller, second = prune(small, again, narrow)
    twice = apply(second.config(narrow), smaller, tiny_batch)
    assert_same_function(masked, twice, np.array(second.hidden))
    # Seen from the first model: one spec, its sizes, its hard masks, its indices.
    whole = spec.compose(second)
    assert whole.config(config) == second.config(narrow)
    assert set(whole.hidden) <= set(spec.hidden)
    jax.tree.map(
        np.testing.assert_array_equal,
        take(params, whole),
        take(take(params, spec), second),
    )
    assert (
        PrunedSpec.from_json(json.loads(json.dumps(dataclasses.asdict(whole)))) == whole
    )
    expanded = expand(smaller, whole, params)
    masked = apply(config, expanded, tiny_batch, whole.masks(config))
    assert_same_function(masked, twice, np.array(whole.hidden))
    assert cost.num_params(whole.masks(config), config) == numpy_count(smaller)


def test_composition_is_associative_and_has_a_neutral_element():
    specs, config = [], RAGGED
    for seed in range(3):
        specs.append(spec_of(drawn(config, seed), config))
        config = specs[-1].config(config)
    a, b, c = specs
    assert a.compose(b).compose(c) == a.compose(b.compose(c))
    everything = spec_of({}, RAGGED)
    assert everything.compose(a) == a == a.compose(spec_of({}, a.config(RAGGED)))


@pytest.mark.parametrize("config", CONFIGS)
def test_open_and_folded_masks_of_a_ragged_model(config, tiny_batch):
    params = random_params(config, 0)
    ones = {k: jnp.ones(s) for k, s in masks.mask_shapes(config).items()}
    jax.tree.map(np.testing.assert_array_equal, prune(params, ones, config)[0], params)
    gates = drawn(config, 5)
    hard = transforms.harden()(gates)
    soft = apply(config, params, tiny_batch, gates)
    folded = apply(config, fold(params, gates, config), tiny_batch, hard)
    np.testing.assert_allclose(folded.logits, soft.logits, atol=2e-5, rtol=1e-5)


def test_training_under_sampled_masks_has_finite_gradients(tiny_batch):
    params = random_params(RAGGED, 0)
    log_alpha = learned(RAGGED, 1)

    @jax.jit
    def loss(params, log_alpha):
        drawn = masks.sample(log_alpha, jax.random.key(0))
        variables = {"params": params, "masks": drawn}
        noise = {"dropout": jax.random.key(1)}
        output = Encoder(RAGGED).apply(variables, tiny_batch, train=True, rngs=noise)
        return jnp.square(output.logits).sum()

    for leaf in jax.tree.leaves(jax.grad(loss, (0, 1))(params, log_alpha)):
        assert np.isfinite(leaf).all()


# Transforms and targets

TRANSFORMS = {
    "harden": transforms.harden(),
    "drop_empty": transforms.drop_empty(),
    "keep_at_least": transforms.keep_at_least(head=2, intermediate=3, mha=3, ffn=3),
    "round_to_multiple": transforms.round_to_multiple(head=2, intermediate=4),
    "drop_layers": transforms.drop_layers(0),
    "keep_layers": transforms.keep_layers(0, 1),
    "meet_target": constraint.meet_target(RAGGED, 0.6),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("seed", range(3))
def test_no_transform_opens_padding(name, seed):
    gates = masks.evaluation_masks(learned(RAGGED, seed) | {"hidden": jnp.ones(13)})
    result = TRANSFORMS[name](gates)
    for kind, padding in PADDING.items():
        np.testing.assert_array_equal(result[kind][padding], masks.PADDING)
        assert (result[kind][~padding] >= 0).all()
    if name == "keep_at_least":
        opened = [(row > 0).sum() for row in np.asarray(result["intermediate"])]
        assert opened[0] >= 3 and opened[1:] == [2, 0]
        assert (np.asarray(result["mha"]) > 0).tolist() == [True, False, True]
    for transform in TRANSFORMS.values():  # and the next one does not either
        for kind, padding in PADDING.items():
            np.testing.assert_array_equal(
                transform(result)[kind][padding], masks.PADDING
            )


WIDE = dataclasses.replace(
    TINY, hidden_size=32, heads=(4, 0, 1), head_size=8, intermediate=(300, 120, 0)
)


@pytest.mark.parametrize("target", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_targets_are_met(target, seed):
    log_alpha = learned(WIDE, seed)
    unit = (2 * 32 + 1 + 32) / cost.num_params({}, WIDE)
    found = constraint.target_masks(log_alpha, WIDE, target)
    assert -1e-3 <= cost.exact_sparsity(found, WIDE) - target <= max(unit, 1e-3)
    sliced, spec = prune(random_params(WIDE, 0), found, WIDE)
    assert numpy_count(sliced) == cost.num_params(found, WIDE)
    closed = constraint.meet_target(WIDE, target)(masks.evaluation_masks(log_alpha))
    assert cost.exact_sparsity(closed, WIDE) >= target
    assert constraint.max_sparsity(WIDE) > 0.99
    rounded = constraint.final_masks(
        log_alpha, WIDE, target, transforms.round_to_multiple(intermediate=8)
    )
    assert cost.exact_sparsity(rounded, WIDE) >= target - 1e-3
    for width, full in zip(
        spec_of(rounded, WIDE).intermediate, (300, 120, 0), strict=True
    ):
        assert len(width) % 8 == 0 or len(width) == full


def test_alive_layers_of_a_ragged_model():
    assert masks.alive_layers(RAGGED, {}).tolist() == [True, True, True]
    assert masks.alive_layers(HOLES, {}).tolist() == [False, True, True]
    ones = {k: jnp.ones(s) for k, s in masks.mask_shapes(RAGGED).items()}
    # What is beyond a layer's width does not keep it alive.
    ones["head"] = ones["head"].at[2, 0].set(0)
    ones["intermediate"] = ones["intermediate"].at[1, :2].set(0)
    assert masks.alive_layers(RAGGED, ones).tolist() == [True, False, False]
