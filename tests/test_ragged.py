"""Models whose layers differ in width, as slicing leaves them, can be pruned again.

The rows of their masks are padded. Whatever knows the sizes ignores the padding, so
the tests fill it with values that would be seen.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.models.bert import Encoder
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import constraint, cost, masks, slicing, transforms
from cofi_jax.training.losses import alive_layers

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDTHS = {"head": (3, 0, 1), "intermediate": (5, 2, 0)}

SUBSETS = [
    KINDS,
    ("head", "intermediate"),
    ("mha", "intermediate", "hidden"),
    ("head", "ffn"),
    ("hidden",),
]


@pytest.fixture(scope="module")
def ragged(tiny):
    return dataclasses.replace(
        tiny, heads=WIDTHS["head"], intermediate=WIDTHS["intermediate"]
    )


@pytest.fixture(scope="module")
def params(ragged):
    return random_params(ragged, seed=3)


def draw(seed, config, kinds=KINDS, padding=0.0):
    """Soft masks of which many are closed, with `padding` beyond each row's width."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for kind, shape in masks.mask_shapes(config, kinds).items():
        values = rng.uniform(0.1, 1, shape) * (rng.random(shape) < 0.7)
        if kind in ("head", "intermediate"):
            widths = config.heads if kind == "head" else config.intermediate
            for row, width in zip(values, widths, strict=True):
                row[width:] = padding
        drawn[kind] = values.astype(np.float32)
    if "hidden" in drawn:
        drawn["hidden"][:6] = 0.7
    return drawn


def count(given, config):
    """The weights that masks leave, layer by layer, each of its own width."""
    hidden = (given["hidden"] > 0).sum() if "hidden" in given else config.hidden_size
    d, total = config.head_size, 0
    for i, (heads, units) in enumerate(
        zip(config.heads, config.intermediate, strict=True)
    ):
        if "head" in given:
            heads = (given["head"][i][:heads] > 0).sum()
        if "intermediate" in given:
            units = (given["intermediate"][i][:units] > 0).sum()
        if heads and ("mha" not in given or given["mha"][i] > 0):
            total += heads * (4 * d * hidden + 3 * d) + hidden
        if units and ("ffn" not in given or given["ffn"][i] > 0):
            total += units * (2 * hidden + 1) + hidden
    return total


def close(ours, theirs):
    scale = np.maximum(1, np.abs(theirs))
    assert (np.abs(np.asarray(ours) - theirs) / scale).max() < 2e-5


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_masked_equals_sliced_and_padding_is_ignored(kinds, ragged, params, tiny_batch):
    for seed in range(2):
        given = draw(seed, ragged, kinds, padding=0.9)
        variables = {"params": params, "masks": given}
        masked = Encoder(ragged).apply(variables, tiny_batch)
        small, spec = slicing.prune(params, given, ragged)
        config = spec.config(ragged)
        with jax.disable_jit():
            sliced = Encoder(config).apply({"params": small}, tiny_batch)
        close(masked.logits, sliced.logits)
        assert cost.num_params(given, ragged) == count(given, ragged)
        assert cost.num_params({}, config) == count(given, ragged)
        assert alive_layers(ragged, given).tolist() == [
            bool(heads or units)
            for heads, units in zip(config.heads, config.intermediate, strict=True)
        ]
        folded = slicing.fold(params, given, ragged)
        hard = transforms.harden()(given)
        again = Encoder(ragged).apply({"params": folded, "masks": hard}, tiny_batch)
        close(again.logits, sliced.logits)


@pytest.mark.parametrize("kind", ["head", "intermediate"])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_masks_of_another_model_are_refused(kind, width, ragged, params, tiny_batch):
    variables = {"params": params, "masks": {kind: np.ones((3, width))}}
    with pytest.raises(ValueError, match=f"masks.*{kind}.*\\(3, [35]\\)"):
        Encoder(ragged).apply(variables, tiny_batch)


@pytest.mark.parametrize("seed", range(4))
def test_a_slice_of_a_slice_is_a_slice_of_the_dense_model(
    seed, tiny, tiny_params, tiny_batch
):
    first = draw(seed, tiny)
    first["mha"][1] = 0.4
    first["head"][:, 1] = 0.5
    once, one = slicing.prune(tiny_params, first, tiny)
    middle = one.config(tiny)
    second = draw(seed + 10, middle)
    twice, two = slicing.prune(once, second, middle)
    spec = one.compose(two)
    assert spec.config(tiny) == two.config(middle)
    for ours, theirs in zip(
        jax.tree.leaves(slicing.take(tiny_params, spec)),
        jax.tree.leaves(slicing.take(slicing.take(tiny_params, one), two)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    whole = slicing.expand(twice, spec, tiny_params)
    with jax.disable_jit():
        model = Encoder(tiny)
        variables = {"params": whole, "masks": spec.masks(tiny)}
        masked = model.apply(variables, tiny_batch)
        small = Encoder(spec.config(tiny)).apply({"params": twice}, tiny_batch)
        before = Encoder(middle).apply({"params": once, "masks": second}, tiny_batch)
    close(masked.logits, small.logits)
    close(before.logits, small.logits)
    assert slicing.spec_of(spec.masks(tiny), tiny) == spec
    through = one.masks(tiny)
    assert slicing.spec_of(two.masks(middle), middle) == two
    assert cost.num_params(through, tiny) == cost.num_params({}, middle)


@pytest.mark.parametrize(
    "heads, intermediate", [((0, 0), (6, 1)), ((0, 2), (0, 4)), ((0, 0), (0, 0))]
)
def test_models_without_some_block_are_pruned_again(
    heads, intermediate, tiny, tiny_batch
):
    config = dataclasses.replace(tiny, heads=heads, intermediate=intermediate)
    params, given = random_params(config, seed=0), draw(1, config, padding=0.9)
    masked = Encoder(config).apply({"params": params, "masks": given}, tiny_batch)
    small, spec = slicing.prune(params, given, config)
    with jax.disable_jit():
        sliced = Encoder(spec.config(config)).apply({"params": small}, tiny_batch)
    close(masked.logits, sliced.logits)
    assert cost.num_params(given, config) == count(given, config)
    assert slicing.spec_of(spec.masks(config), config) == spec
    log_alpha = masks.init_log_alpha(config, jax.random.key(0))
    assert all(
        value.shape == log_alpha[kind].shape
        for kind, value in masks.evaluation_masks(log_alpha).items()
    )


def test_absent_blocks_do_not_count_as_kept_layers(ragged):
    """Attention is absent in layer 1, the feed-forward block in layer 2."""
    log_alpha = masks.init_log_alpha(ragged, jax.random.key(0))
    for made in (masks.evaluation_masks(log_alpha), masks.prob_active(log_alpha)):
        assert (made["mha"] > 0).tolist() == [True, False, True]
        assert (made["ffn"] > 0).tolist() == [True, True, False]
    gates = {"mha": jnp.array([0.0, 1.0, 0.0]), "ffn": jnp.zeros(3)}
    kept = transforms.keep_at_least(ragged, mha=2, ffn=9)(gates)
    assert (kept["mha"] > 0)[jnp.array([0, 2])].all()
    assert kept["ffn"].tolist() == [1, 1, 0]


def test_padding_never_opens_and_never_competes(ragged):
    log_alpha = masks.init_log_alpha(ragged, jax.random.key(0))
    rng = np.random.default_rng(0)
    log_alpha = {k: v - rng.uniform(0, 9, v.shape) for k, v in log_alpha.items()}
    found = masks.evaluation_masks(log_alpha)
    made = [found, masks.prob_active(log_alpha)]
    made += [masks.sample(log_alpha, jax.random.key(i)) for i in range(9)]
    for kind, widths in WIDTHS.items():
        for i, width in enumerate(widths):
            row = log_alpha[kind][i, :width]
            alone = masks.evaluation_masks({"hidden": row})["hidden"] if width else row
            np.testing.assert_array_equal(found[kind][i, :width], alone)
            for each in made:
                assert not np.asarray(each[kind])[i, width:].any()
    # Nor does a step of training open it: nothing pulls at it, and the clamp keeps it.
    gradient = jax.grad(
        lambda x: (
            constraint.expected_sparsity(x, ragged)
            + sum(v.sum() for v in masks.sample(x, jax.random.key(1)).values())
        )
    )(log_alpha)
    moved = masks.clamp({k: v - 100 * gradient[k] for k, v in log_alpha.items()})
    for kind, value in moved.items():
        np.testing.assert_array_equal(np.isneginf(value), np.isneginf(log_alpha[kind]))
        assert not np.isnan(gradient[kind]).any()
        assert np.nanmax(np.where(np.isneginf(value), np.nan, value)) < 4.7


@pytest.mark.parametrize(
    "transform",
    [
        lambda config: transforms.keep_at_least(config, head=2, intermediate=9),
        lambda config: transforms.round_to_multiple(config, head=2, intermediate=4),
        lambda config: transforms.round_to_device("gpu", config),
        lambda config: transforms.chain(transforms.drop_layers(1), transforms.harden()),
        lambda config: transforms.drop_empty(),
        lambda config: constraint.meet_target(config, 0.5),
    ],
)
def test_no_transform_opens_padding(transform, ragged):
    for seed in range(4):
        given = draw(seed, ragged)
        found = transform(ragged)(given)
        for kind, widths in WIDTHS.items():
            for row, width in zip(np.asarray(found[kind]), widths, strict=True):
                assert not row[width:].any()
    least = transforms.keep_at_least(ragged, intermediate=4)(draw(0, ragged))
    assert (np.asarray(least["intermediate"]) > 0).sum(1).tolist() == [
        max(4, int((draw(0, ragged)["intermediate"][0] > 0).sum())),
        2,
        0,
    ]


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_expected_sparsity_is_the_mean_of_the_exact_one(kinds, ragged):
    log_alpha = masks.init_log_alpha(ragged, jax.random.key(0), kinds)
    rng = np.random.default_rng(1)
    log_alpha = {
        k: (v - rng.uniform(2, 8, v.shape)).astype(jnp.float32)
        for k, v in log_alpha.items()
    }
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.vmap(masks.sample, in_axes=(None, 0))(log_alpha, keys)
    drawn = {kind: np.asarray(value) for kind, value in drawn.items()}
    sizes = [
        count({k: v[i] for k, v in drawn.items()}, ragged) for i in range(len(keys))
    ]
    full = count({}, ragged)
    expected = (1 - float(constraint.expected_sparsity(log_alpha, ragged))) * full
    error = 4.5 * np.std(sizes) / np.sqrt(len(keys))
    assert np.mean(sizes) == pytest.approx(expected, abs=error + 1e-5 * full)
    # Padding that is said to be open does not count either.
    shapes = masks.mask_shapes(ragged, kinds).items()
    ones = {kind: np.ones(shape) for kind, shape in shapes}
    assert cost.PARAMETERS.expected(ones, ragged) == full
    assert cost.exact_sparsity(ones, ragged) == 0


@pytest.mark.parametrize("target", [0.1, 0.5, 0.8])
def test_targets_are_met(target, ragged):
    log_alpha = masks.init_log_alpha(ragged, jax.random.key(0))
    rng = np.random.default_rng(2)
    log_alpha = {k: v - rng.uniform(0, 9, v.shape) for k, v in log_alpha.items()}
    unit = (3 * 16 + 1) / count({}, ragged)  # the last one takes the bias with it
    for found in (
        constraint.target_masks(log_alpha, ragged, target),
        constraint.meet_target(ragged, target)(draw(0, ragged)),
        jax.jit(constraint.meet_target(ragged, target))(draw(0, ragged)),
    ):
        reached = 1 - count(jax.tree.map(np.asarray, found), ragged) / count({}, ragged)
        assert reached >= target - 1e-3
        for kind, widths in WIDTHS.items():
            for row, width in zip(np.asarray(found[kind]), widths, strict=True):
                assert not row[width:].any()
    found = constraint.target_masks(log_alpha, ragged, target)
    assert cost.exact_sparsity(found, ragged) - target <= unit + 1e-3


def test_shapes_are_those_of_the_widest_layer(ragged):
    shapes = masks.mask_shapes(ragged)
    assert shapes["head"] == (3, 3) and shapes["intermediate"] == (3, 5)
    for kinds in itertools.combinations(KINDS, 2):
        log_alpha = masks.init_log_alpha(ragged, jax.random.key(0), kinds)
        assert {k: v.shape for k, v in log_alpha.items()} == {
            kind: shapes[kind] for kind in kinds
        }
