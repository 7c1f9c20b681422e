"""Importance, the order and log-alphas that follow from it, and the exact target."""

import dataclasses
import functools
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.spec import INNER, KINDS
from cofi_jax.pruning import constraint, cost, masks, transforms
from cofi_jax.pruning.importance import ranks, removed_alone, seed_log_alpha
from cofi_jax.training.importance import importance

pytestmark = pytest.mark.usefixtures("quick_compile")

SUBSETS = [KINDS, ("head", "intermediate"), ("mha", "ffn", "hidden"), ("hidden",)]


@pytest.fixture(scope="module", params=["dense", "ragged"])
def sizes(request, tiny):
    if request.param == "dense":
        return tiny
    return dataclasses.replace(tiny, heads=(3, 0, 1), intermediate=(5, 2, 0))


@pytest.fixture(scope="module")
def batch(tiny_batch):
    more = {"labels": np.array([0, 2, 1]), "weight": np.ones(3, np.float32)}
    return tiny_batch | more


def real(config, kind):
    return masks.real_positions(config).get(kind, np.array(True))


def closed(config, kinds, kind, index):
    found = {k: np.ones(s) for k, s in masks.mask_shapes(config, kinds).items()}
    found[kind][index] = 0
    return found


# What is measured


def test_importance_is_the_mean_square_of_finite_differences(sizes, batch):
    model, params = Encoder(sizes), random_params(sizes, seed=5)
    other = batch | {"labels": np.array([1, 1, 0])}
    found = importance(model, params, [batch, other])

    ones = {k: jnp.ones(s) for k, s in masks.mask_shapes(sizes).items()}
    flat, unflatten = jax.flatten_util.ravel_pytree(ones)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def losses(given, labels):
        given = {"params": params, "masks": unflatten(given)}
        logits = model.apply(given, batch).logits
        return PROBLEMS["classification"].loss(logits, batch | {"labels": labels})

    step = 1e-2 * jnp.eye(len(flat))
    squares = [
        ((losses(flat + step, labels) - losses(flat - step, labels)) / 2e-2) ** 2
        for labels in (batch["labels"], other["labels"])
    ]
    expected = masks.without_padding(unflatten(sum(squares) / 2), sizes)
    for kind, values in found.items():
        np.testing.assert_allclose(values, expected[kind], rtol=0.05, atol=1e-5)


def test_without_labels_they_are_not_read(tiny, tiny_params, batch):
    model, kinds = Encoder(tiny), ("head", "ffn")
    found = importance(model, tiny_params, [batch], kinds=kinds, labels=False)
    other = batch | {"labels": np.array([1, 1, 0])}
    again = importance(model, tiny_params, [other], kinds=kinds, labels=False)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert all((value > 0).any() for value in found.values())
    labelled = importance(model, tiny_params, [batch], kinds=kinds)
    assert not np.allclose(found["head"], labelled["head"])


def test_importance_needs_a_batch_and_known_kinds(tiny, tiny_params, batch):
    with pytest.raises(ValueError, match="at least one"):
        importance(Encoder(tiny), tiny_params, [])
    with pytest.raises(UserError, match="neuron"):
        importance(Encoder(tiny), tiny_params, [batch], kinds=("neuron",))


# The order


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_what_a_mask_removes_alone_is_the_count_without_it(kinds, sizes):
    shapes = masks.mask_shapes(sizes, kinds)
    removes = removed_alone(sizes, {k: np.zeros(s) for k, s in shapes.items()})
    whole = cost.num_params({}, sizes)
    for kind, shape in shapes.items():
        for index in np.ndindex(shape):
            if not np.broadcast_to(real(sizes, kind), shape)[index]:
                assert removes[kind][index] == 0
                continue
            left = cost.num_params(closed(sizes, kinds, kind, index), sizes)
            assert removes[kind][index] == pytest.approx(whole - left, rel=1e-5)


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_ranks_are_shares_of_the_cost_in_the_order_of_worth(kinds, sizes):
    rng = np.random.default_rng(0)
    shapes = masks.mask_shapes(sizes, kinds)
    measured = {k: rng.exponential(size=s) for k, s in shapes.items()}
    removes, found = removed_alone(sizes, measured), ranks(measured, sizes)
    for group in [
        [k for k in kinds if k not in INNER],
        *([k] for k in kinds if k in INNER),
    ]:
        members = [
            (measured[k][i] / removes[k][i], float(found[k][i]), removes[k][i])
            for k in group
            for i in np.ndindex(shapes[k])
            if removes[k][i] > 0
        ]
        if group and group[0] in INNER:
            members = [(worth, rank, 1) for worth, rank, _ in members]
        members.sort()
        total = sum(share for *_, share in members)
        shares = itertools.accumulate(share / total for *_, share in members)
        got = [rank for _, rank, _ in members]
        blocks_missing = group and group[0] in INNER and len(got) < shapes[group[0]][0]
        if not blocks_missing:
            assert got == pytest.approx(list(shares), abs=1e-5)
        assert got == sorted(got)


def test_a_structure_at_a_target_from_importance_alone(tiny):
    rng = np.random.default_rng(1)
    shapes = masks.mask_shapes(tiny, ("head", "intermediate"))
    measured = {k: rng.exponential(size=s) for k, s in shapes.items()}
    one_shot = transforms.chain(
        constraint.meet_target(tiny, 0.5), transforms.harden(), transforms.drop_empty()
    )
    given = one_shot(ranks(measured, tiny))
    assert 0.5 <= cost.exact_sparsity(given, tiny) < 0.5 + 1 / 6
    removes = removed_alone(tiny, measured)
    worth = {k: measured[k] / removes[k] for k in measured}
    kept = np.concatenate([worth[k][np.asarray(given[k]) > 0] for k in worth])
    gone = np.concatenate([worth[k][np.asarray(given[k]) == 0] for k in worth])
    assert kept.min() > gone.max()


def test_seeds_are_spread_in_the_order_of_ranks(sizes):
    rng = np.random.default_rng(2)
    shapes = masks.mask_shapes(sizes)
    measured = {k: rng.exponential(size=s) for k, s in shapes.items()}
    seeds, found = seed_log_alpha(measured, sizes, spread=12.0), ranks(measured, sizes)
    for kind, seed in seeds.items():
        there = np.broadcast_to(real(sizes, kind), seed.shape)
        assert np.isneginf(seed[~there]).all() and np.isfinite(seed[there]).all()
        slope = np.ptp(seed[there]) - 12 * np.ptp(found[kind][there])
        assert slope == pytest.approx(0, abs=1e-4)
        order = np.argsort(found[kind][there], kind="stable")
        assert (np.diff(np.asarray(seed[there])[order]) >= 0).all()


# The exact target


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_offset_meets_every_target(kinds, scale, sizes):
    rng = np.random.default_rng(3)
    log_alpha = {}
    for kind, shape in masks.mask_shapes(sizes, kinds).items():
        drawn = scale * rng.standard_normal(shape)
        log_alpha[kind] = np.where(real(sizes, kind), drawn, -np.inf)
    log_alpha = jax.tree.map(jnp.float32, log_alpha)
    nothing = {k: np.zeros(v.shape, np.float32) for k, v in log_alpha.items()}
    highest = float(
        1 - cost.PARAMETERS.expected(nothing, sizes) / cost.num_params({}, sizes)
    )
    move = jax.jit(constraint.at_target, static_argnames="config")
    for target in (0.0, 0.1, 0.6, 0.95):
        if target > highest:
            continue
        moved = move(log_alpha, config=sizes, target=target)
        found = float(constraint.expected_sparsity(moved, sizes))
        assert found == pytest.approx(target, abs=2e-5)
        for kind, before in log_alpha.items():
            there = np.isfinite(before)
            assert np.isneginf(moved[kind][~there]).all()
            by = (before - moved[kind])[there]
            np.testing.assert_allclose(by, by[0], atol=1e-4)


def test_the_offset_has_no_gradient(tiny):
    log_alpha = masks.init_log_alpha(tiny, jax.random.key(0), ("head", "ffn"))
    weights = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=float).reshape(x.shape), log_alpha
    )

    def total(log_alpha):
        moved = constraint.at_target(log_alpha, tiny, 0.4)
        return sum(jnp.vdot(weights[k], moved[k]) for k in moved)

    jax.tree.map(np.testing.assert_array_equal, jax.grad(total)(log_alpha), weights)


def test_sparsity_of_a_part_and_of_the_whole():
    """A part of 40 % that loses half of it leaves 20 % of the whole."""
    assert constraint.of_whole(0.5, 0.4) == pytest.approx(0.8)
    assert constraint.of_part(0.8, 0.4) == pytest.approx(0.5)
    assert constraint.of_part(0.7, 1.0) == pytest.approx(0.7)


def test_without_bounds_more_can_be_reached(tiny):
    """All that is left of heads and units is nothing; bounds leave 4.7 % of each."""
    kinds = ("head", "intermediate")
    assert constraint.max_sparsity(tiny, kinds, lowest=-np.inf) == 1
    assert 0.94 < constraint.max_sparsity(tiny, kinds) < 0.96


def test_masks_of_what_is_gone_need_no_offset(tiny):
    """An earlier target may have removed all attention blocks."""
    gone = dataclasses.replace(tiny, heads=(0, 0))
    log_alpha = masks.init_log_alpha(gone, jax.random.key(0))
    moved = constraint.at_target(log_alpha, gone, 0.5)
    found = float(constraint.expected_sparsity(moved, gone))
    assert found == pytest.approx(0.5, abs=2e-5)


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_most_removable_is_what_masks_that_meet_it_remove(kinds, tiny):
    most = constraint.most_removable(tiny, kinds)
    ones = {k: np.ones(s) for k, s in masks.mask_shapes(tiny, kinds).items()}
    given = constraint.meet_target(tiny, most - 1e-6)(ones)
    assert cost.exact_sparsity(given, tiny) == pytest.approx(most)
    if most < 1:
        with pytest.raises(UserError, match="reach at most"):
            constraint.meet_target(tiny, most + 1e-6)(ones)


@pytest.mark.parametrize(
    "widths, left",
    [
        ({}, KINDS),
        ({"heads": (0, 0)}, ("intermediate", "ffn", "hidden")),
        ({"intermediate": (0, 0)}, ("head", "mha", "hidden")),
        ({"heads": (0, 2)}, KINDS),
    ],
)
def test_kinds_left_have_something_to_close(widths, left, tiny):
    assert masks.kinds_left(dataclasses.replace(tiny, **widths), KINDS) == left
