"""The time as a cost: by convolution, sampling and differences; a made-up device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from cofi_jax.config import Distill
from cofi_jax.evaluation import timing
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost, latency, masks, speedup, transforms
from cofi_jax.pruning.latency import Curve, Table
from cofi_jax.training import objectives

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = EncoderConfig(17, 12, (12,) * 6, 1, (96,) * 6, 7, 2)
KINDS = ("mha", "head", "ffn", "intermediate")
# Stairs of widths, as on devices that multiply in tiles.
WIDTHS = np.array([8, 16, 17, 32, 33, 48, 64, 65, 96])
TABLE = Table(
    0.7,
    {
        "attention": Curve(np.arange(1, 13), 0.5 + 0.13 * np.arange(1, 13) ** 1.1),
        "ffn": Curve(WIDTHS, np.array([1, 1.1, 1.6, 1.9, 2.4, 2.9, 3.1, 3.9, 5.0])),
    },
)
TIME = latency.cost(TABLE)


def seconds(gates, config=CONFIG, table=TABLE):
    """The time of a structure, block by block."""
    total = table.overhead
    for outer, inner, name in (
        ("mha", "head", "attention"),
        ("ffn", "intermediate", "ffn"),
    ):
        curve = table.curves[name]
        sizes = config.heads if inner == "head" else config.intermediate
        for layer, size in enumerate(sizes):
            count = size
            if inner in gates:
                count = (np.asarray(gates[inner][layer])[:size] > 0).sum()
            if count and (outer not in gates or gates[outer][layer] > 0):
                total += np.interp(count, curve.counts, curve.ms)
    return total


def hard(seed, kinds, config=CONFIG):
    """Masks of 0 and 1 of which some rows are empty, and some full."""
    rng, gates = np.random.default_rng(seed), {}
    for kind, shape in masks.mask_shapes(config, kinds).items():
        chance = rng.choice([0, 0.1, 0.6, 1], (shape[0], *[1] * (len(shape) - 1)))
        gates[kind] = (rng.random(shape) < chance).astype(np.float32)
    return gates


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([KINDS, ("head", "ffn"), ("mha", "intermediate")]),
    st.booleans(),
)
def test_expected_time_of_decided_gates_is_that_of_the_structure(seed, kinds, ragged):
    config = CONFIG
    if ragged:
        config = dataclasses.replace(
            config, heads=(12, 0, 3, 1, 0, 7), intermediate=(96, 5, 0, 40, 33, 0)
        )
    gates = hard(seed, kinds, config)
    gates = masks.without_padding(gates, config)
    exact = TIME.exact(gates, config)
    assert exact == pytest.approx(seconds(gates, config), rel=1e-14)
    decided = transforms.drop_empty()(gates)
    assert TIME.exact(decided, config) == exact
    found = float(expected(decided, TABLE, config))
    assert found == pytest.approx(exact, rel=3e-7)  # the last digit of float32


@functools.partial(jax.jit, static_argnums=2)
def expected(gates, table, config):
    return latency.cost(table).expected(gates, config)


def probabilities(seed, kinds=KINDS):
    rng = np.random.default_rng(seed)
    return {
        kind: jnp.asarray(rng.uniform(0, 1, shape) ** rng.choice([0.3, 1, 3]))
        for kind, shape in masks.mask_shapes(CONFIG, kinds).items()
    }


mean = jax.jit(latency._mean)


def by_convolution(chances):
    number = np.ones(1)
    for chance in chances:
        number = np.convolve(number, [1 - chance, chance])
    return number


@pytest.mark.parametrize("seed", range(4))
def test_expected_time_of_a_row_is_that_of_the_distribution(seed):
    """Heads to the precision of float32; of 96 units, to the normal approximation."""
    chances = probabilities(seed)
    for kind, name, rel in (("head", "attention", 1e-5), ("intermediate", "ffn", 2e-3)):
        curve = TABLE.curves[name]
        found = mean(curve, chances[kind])
        for row, value in zip(np.asarray(chances[kind], float), found, strict=True):
            number = by_convolution(row)
            values = np.interp(np.arange(len(number)), curve.counts, curve.ms)
            assert float(value) == pytest.approx(number @ values, rel=rel)


@pytest.mark.parametrize("kinds", [KINDS, ("head", "ffn")], ids="+".join)
def test_expected_time_is_the_mean_over_sampled_masks(kinds):
    log_alpha = {
        kind: jax.random.normal(jax.random.key(len(kind)), shape) + 1.5
        for kind, shape in masks.mask_shapes(CONFIG, kinds).items()
    }
    chances = masks.prob_active(log_alpha)
    rng, total, many = np.random.default_rng(0), 0.0, 20_000
    for block in range(many // 2000):
        drawn = {k: rng.random((2000, *v.shape)) < v for k, v in chances.items()}
        del block
        total += _times(drawn).sum()
    found = float(expected(chances, TABLE, CONFIG))
    assert found == pytest.approx(float(total) / many, rel=1e-3)


def _times(gates):
    """The times of many structures, (N, L, ...) each; rows are not empty by chance."""
    total = TABLE.overhead
    for outer, inner, name in (
        ("mha", "head", "attention"),
        ("ffn", "intermediate", "ffn"),
    ):
        curve = TABLE.curves[name]
        units = gates[inner].sum(-1) if inner in gates else curve.counts[-1]
        there = (units > 0) | (outer in gates)
        times = np.interp(units, curve.counts, curve.ms) * there
        total = total + (times * gates.get(outer, np.ones(6))).sum(-1)
    return total


def test_gradients_are_central_differences():
    with jax.enable_x64(True):
        chances = {k: jnp.asarray(v, jnp.float64) for k, v in probabilities(5).items()}
        table = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), TABLE)
        time = jax.jit(lambda p: latency.cost(table).expected(p, CONFIG))
        gradient = jax.jit(jax.grad(time))(chances)
        rng = np.random.default_rng(0)
        for _ in range(5):
            way = {k: rng.standard_normal(v.shape) for k, v in chances.items()}
            ahead, behind = (
                time({k: v + step * way[k] for k, v in chances.items()})
                for step in (1e-6, -1e-6)
            )
            slope = sum((gradient[k] * way[k]).sum() for k in way)
            np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-5)


def test_gradients_of_decided_gates_are_finite_and_point_upwards():
    """A thin block still costs what its presence costs."""
    gates = {k: jnp.asarray(v) for k, v in hard(3, KINDS).items()}
    found = jax.jit(jax.grad(lambda p: expected(p, TABLE, CONFIG)))(gates)
    for kind, gradient in found.items():
        assert np.isfinite(gradient).all() and (np.asarray(gradient) >= 0).all()
        if kind in ("mha", "ffn"):
            least = TABLE.curves["attention" if kind == "mha" else "ffn"].ms[0]
            assert (np.asarray(gradient) >= least * (1 - 1e-6)).all()


def test_a_block_that_is_probably_empty_is_not_free():
    chances = {"head": jnp.full((6, 12), 0.047), "mha": jnp.ones(6)}
    ffn = 6 * TABLE.curves["ffn"].ms[-1]
    least = TABLE.overhead + 6 * TABLE.curves["attention"].ms[0] + ffn
    assert float(expected(chances, TABLE, CONFIG)) >= least


def test_rising_curves():
    counts = np.array([1, 2, 4, 8, 16])
    noisy = np.array([2.0, 3.0, 2.5, 5.0, 5.0])
    found = latency.rising(counts, noisy)
    least = 0.01 * 3 / 15
    expected = [2, 2.75, 2.75 + 2 * least, 5 + 2 * least, 5 + 10 * least]
    np.testing.assert_allclose(found.ms, expected)
    clean = TABLE.curves["ffn"]
    np.testing.assert_allclose(latency.rising(*clean).ms, clean.ms, rtol=0.02)
    assert (latency.rising(counts, -noisy).ms > 0).all()


def test_straight_curves_share_a_block_among_its_units():
    line = TABLE.straight()
    gates = {kind: np.ones(s) for kind, s in masks.mask_shapes(CONFIG, KINDS).items()}
    assert latency.cost(line).exact(gates, CONFIG) == pytest.approx(
        TIME.exact(gates, CONFIG)
    )
    gates["intermediate"][:, :48] = 0
    half = 6 * TABLE.curves["ffn"].ms[-1] / 2
    assert latency.cost(line).exact(gates, CONFIG) == pytest.approx(
        TIME.exact({}, CONFIG) - half
    )


# A device that the table does not quite know. Of a twelfth of its time, a head takes
# 4 %, 16 units 2 %, and a block that is there 5 %.

DEEP = EncoderConfig(17, 12, (12,) * 12, 1, (384,) * 12, 7, 2)
STAIRS = np.array([16, 17, 32, 64, 65, 96, 128, 129, 192, 256, 320, 384])
KNOWN = Table(
    1.0,
    {
        "attention": Curve(np.arange(1, 13), 0.27 + 0.22 * np.arange(1, 13)),
        "ffn": Curve(STAIRS, 0.3 + 2.4 * STAIRS / 384 + 0.05 * (STAIRS % 2)),
    },
)
BY_TABLE = latency.cost(KNOWN)
WHOLE = {kind: np.ones(s) for kind, s in masks.mask_shapes(DEEP, KINDS).items()}


def trained(seed):
    """Log-alphas as at the end of pruning: layers differ, and blocks close late."""
    rng, found = np.random.default_rng(seed), {}
    for kind, shape in masks.mask_shapes(DEEP, KINDS).items():
        layers = rng.normal(0, 2, (shape[0], *[1] * (len(shape) - 1)))
        later = 3 if kind in ("mha", "ffn") else 0
        drawn = rng.normal(later, 2, shape) + layers
        found[kind] = jnp.asarray(drawn, jnp.float32)
    return found


def choose(asked, log_alpha, multiple=1):
    """Masks that have a speedup by the table, and which they have."""
    gates = speedup.masks_at(
        log_alpha,
        DEEP,
        latency.sparsity_of(asked),
        BY_TABLE,
        transforms.chain(),
        multiple,
    )
    removed = cost.exact_sparsity(gates, DEEP, BY_TABLE)
    return gates, latency.speedup_of(removed)


@pytest.mark.parametrize("asked", [2, 12])
@pytest.mark.parametrize("multiple", [1, 16])
def test_masks_fill_the_time_to_a_few_units(asked, multiple):
    for seed in range(2):
        gates, found = choose(asked, trained(seed), multiple)
        assert asked * (1 - 2e-3) <= found <= asked * (1.005 if multiple == 1 else 1.02)
        assert seconds(WHOLE, DEEP, KNOWN) / seconds(gates, DEEP, KNOWN) == (
            pytest.approx(found)
        )
        widths = (gates["intermediate"] > 0).sum(-1)
        assert widths.any() and not (widths % multiple).any()


def test_a_block_stays_up_to_the_largest_speedup():
    """The most open block is a feed-forward one, which takes too long."""
    ffn = KNOWN.curves["ffn"]
    attention = Curve(np.arange(1, 13), 0.1 + 0.22 * np.arange(1, 13))
    slow = Table(1.0, {"attention": attention, "ffn": ffn._replace(ms=ffn.ms + 0.5)})
    largest = speedup.largest(DEEP, KINDS, slow)
    whole, time = seconds(WHOLE, DEEP, slow), latency.cost(slow)
    assert largest == pytest.approx(whole / (1.0 + 0.1 + 0.22))
    for seed, share in itertools.product(range(2), (0.7, 0.9, 1)):
        allowed = whole / (share * largest)
        target = latency.sparsity_of(share * largest)
        log_alpha = trained(seed) | {"ffn": trained(seed)["ffn"] + 9}
        gates = speedup.masks_at(log_alpha, DEEP, target, time, transforms.chain())
        left = seconds(gates, DEEP, slow)
        assert left > 1.0 and 0 <= allowed * (1 + 1e-9) - left < 0.22  # of a head


def test_the_largest_speedup_leaves_what_no_mask_can_make_smaller():
    whole = seconds(WHOLE, DEEP, KNOWN)
    least = {"attention": 0.49, "ffn": 0.3 + 2.4 * 16 / 384}
    all_units = {"attention": 0.27 + 0.22 * 12, "ffn": 0.3 + 2.4}
    for kinds, block in (
        (KINDS, min(least.values())),
        (("mha", "ffn"), min(all_units.values())),
        (("mha", "ffn", "head"), least["attention"]),
    ):
        found = speedup.largest(DEEP, kinds, KNOWN)
        assert found == pytest.approx(whole / (1 + block))
    only = dataclasses.replace(DEEP, intermediate=(0,) * 12, heads=(0,) * 11 + (3,))
    found = speedup.largest(only, ("mha", "head"), KNOWN)
    assert found == pytest.approx((1 + 0.27 + 0.22 * 3) / (1 + least["attention"]))
    assert speedup.largest(only, ("mha",), KNOWN) == pytest.approx(1)


def device(gates):
    """Blocks of a layer that are both there slow each other down, by 8 % in all."""
    both = (gates["mha"] > 0) & (gates["ffn"] > 0)
    return seconds(gates, DEEP, KNOWN) * (1 + 0.08 * float(np.mean(both)))


def measured(rng, gates, turns=150):
    """What the clock says: 2 % of noise in each turn, of either model."""
    pair = [
        timing.Timing(
            tuple((t,) for t in device(each) * np.exp(0.02 * rng.normal(size=turns)))
        )
        for each in (WHOLE, gates)
    ]
    return timing.speedup(*pair)[0], timing.speedup_error(*pair)


@pytest.mark.parametrize("asked", [2, 4, 8, 12])
def test_the_loop_reaches_the_speedup_on_a_made_up_device(asked):
    for draw in range(25):
        log_alpha, rng = trained(draw), np.random.default_rng(draw)
        found = speedup.reach(
            asked,
            functools.partial(choose, log_alpha=log_alpha),
            functools.partial(measured, rng),
        )
        assert len(found.passes) <= 4
        assert found.chosen in found.passes
        assert 0 <= found.chosen.measured / asked - 1 <= 0.02
        assert abs(device(WHOLE) / device(found.masks) / asked - 1) <= 0.02


def test_the_loop_stops_at_the_noise():
    """Nothing is gained by another pass that cannot tell what it did."""
    found = speedup.reach(4, lambda aim: ({}, aim), lambda gates: (4.3, 0.08))
    assert [each.error for each in found.passes] == [0.08]
    found = speedup.reach(4, lambda aim: ({}, aim), lambda gates: (4.3, 0.03))
    assert len(found.passes) == 4


def test_the_standard_error_of_a_speedup():
    rng, found, errors = np.random.default_rng(0), [], []
    for _ in range(200):
        pair = [
            timing.Timing(tuple((t,) for t in np.exp(0.03 * rng.normal(size=60))))
            for _ in range(2)
        ]
        found.append(timing.speedup(*pair)[0])
        errors.append(timing.speedup_error(*pair))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


# In the objective


def test_the_time_falls_geometrically_and_the_gap_is_that_of_its_logarithm():
    """The table is an argument: another one needs no new compilation."""
    config = dataclasses.replace(
        CONFIG, hidden_size=12, heads=(12,), intermediate=(96,)
    )
    student = Encoder(config)
    batch = {
        "input_ids": np.zeros((1, 2), np.int32),
        "attention_mask": np.ones((1, 2), np.int32),
        "token_type_ids": np.zeros((1, 2), np.int32),
        "weight": np.ones(1, np.float32),
        "labels": np.zeros(1, np.int32),
    }
    log_alpha = {
        kind: np.full(size, 50.0, np.float32)  # surely open
        for kind, size in masks.mask_shapes(config, KINDS).items()
    }
    multipliers = {"linear": jnp.float32(2), "quadratic": jnp.float32(3)}
    trainable = {"params": random_params(config, 0), "log_alpha": log_alpha}
    objective = objectives.PruningObjective(student, Distill(logits=0.0, layers=0.0))
    loss_of = jax.jit(objective)
    asked, share, key = 8.0, 0.5, jax.random.key(0)
    for table in (TABLE, TABLE._replace(overhead=50.0)):
        for step, expected in ((0, 2.0), (5, 4.0), (10, 8.0), (12, 8.0)):
            context = {
                "step": np.int32(step),
                "warmup_steps": np.int32(10),
                "target_sparsity": np.float32(1 - 1 / asked),
                "share": np.float32(share),
                "table": jax.tree.map(np.float32, table),
            }
            players = trainable | {"multipliers": multipliers}
            _, metrics = loss_of(players, {}, context, batch, key)
            target = 1 / (1 - metrics["target_sparsity"])
            assert float(target) == pytest.approx(expected, rel=1e-5)
            assert float(metrics["expected_sparsity"]) == pytest.approx(0.5, abs=1e-6)
            gap = (np.log(2) - np.log(expected)) / np.log(asked)
            penalty = 2 * gap + 3 * gap**2
            assert float(metrics["loss_lagrangian"]) == pytest.approx(penalty, abs=1e-5)
    assert loss_of._cache_size() == 1
    context["table"] = jax.tree.map(np.float32, TABLE)
    _, metrics = jax.jit(objective)(trainable, {}, context, batch, key)
    found = metrics["expected_sparsity"], metrics["target_sparsity"]
    np.testing.assert_allclose(*found, atol=1e-5)
