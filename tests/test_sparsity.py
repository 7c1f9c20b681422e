"""The cost against really sliced models, enumeration, sampling and hand-made sums."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import constraint, cost, masks, transforms
from cofi_jax.pruning.slicing import prune

pytestmark = pytest.mark.usefixtures("quick_compile")

LOW, HIGH = math.log(0.01), math.log(100)


CLOSING = 2 / 3 * math.log(0.1 / 1.1)


SUBSETS = [s for n in range(1, 6) for s in itertools.combinations(KINDS, n)]


BERT_BASE = EncoderConfig(30522, 768, (12,) * 12, 64, (3072,) * 12, 768, 2)


BERT_SIZE = 12 * (4 * 768 * 768 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768)


# Each gate of this one can be enumerated: 3 + 2 * (2 + 1 + 2 + 1) = 15.
TOY = EncoderConfig(3, 3, (2, 2), 2, (2, 2), 3, 2)


SMALL = EncoderConfig(3, 10, (4,) * 3, 5, (24,) * 3, 3, 2)


def count(gates, config):
    """Weights and biases left by boolean gates with any leading axes, in integers."""
    d, size = config.head_size, 0
    hidden = gates["hidden"].sum(-1) if "hidden" in gates else config.hidden_size
    for layer in range(len(config.heads)):

        def left(inner, outer, full, layer=layer):
            units = full[layer]
            if inner in gates:
                units = gates[inner][..., layer, :].sum(-1)
            return units * gates[outer][..., layer] if outer in gates else units

        heads = left("head", "mha", config.heads)
        units = left("intermediate", "ffn", config.intermediate)
        query_key_value = 3 * (hidden * heads * d + heads * d)
        output = heads * d * hidden + np.where(heads > 0, hidden, 0)
        up = hidden * units + units
        down = units * hidden + np.where(units > 0, hidden, 0)
        size = size + query_key_value + output + up + down
    return size


def open_(gates):
    return {kind: np.asarray(value) > 0 for kind, value in gates.items()}


def draw(rng, config, kinds=KINDS):
    """Soft gates; whole blocks are empty often, one hidden dimension stays open."""
    gates = {}
    for kind, shape in masks.mask_shapes(config, kinds).items():
        chance = rng.choice([0.0, 0.5, 1.0], (shape[0], *[1] * (len(shape) - 1)))
        values = rng.uniform(0.01, 1, shape) * (rng.random(shape) < chance)
        gates[kind] = values.astype(np.float32)
    if "hidden" in gates:
        gates["hidden"][rng.integers(config.hidden_size)] = 0.7
    return gates


# The exact count


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_count_is_that_of_the_really_sliced_parameters(kinds, tiny, tiny_params):
    rng = np.random.default_rng(len(kinds))

    def elements(params):
        return sum(
            leaf.size
            for name, layer in params.items()
            for block in ("attention", "ffn")
            for leaf in jax.tree.leaves(layer.get(block, {}))
            if name.startswith("layer_")
        )

    dense = elements(tiny_params)
    for _ in range(2):
        gates = draw(rng, tiny, kinds)
        sliced, spec = prune(tiny_params, gates, tiny)
        number = elements(sliced)
        assert cost.num_params(gates, tiny) == number
        assert cost.num_params({}, spec.config(tiny)) == number
        assert cost.exact_sparsity(gates, tiny) == pytest.approx(1 - number / dense)
        assert count(open_(gates), tiny) == number


def test_bert_base_by_hand():
    layer_norms = 12 * 2 * 2 * 768
    assert BERT_SIZE == 85_017_600 == 85_054_464 - layer_norms
    assert cost.num_params({}, BERT_BASE) == BERT_SIZE
    ones = {k: np.ones(s) for k, s in masks.mask_shapes(BERT_BASE).items()}
    assert cost.num_params(ones, BERT_BASE) == BERT_SIZE
    assert cost.exact_sparsity(ones, BERT_BASE) == 0

    gates = dict(ones)
    gates["head"] = np.eye(12)  # one head in each layer
    gates["mha"] = np.arange(12) < 5  # five attention blocks
    gates["ffn"] = np.arange(12) == 11
    gates["hidden"] = np.arange(768) < 760
    attention = 4 * 760 * 64 + 3 * 64 + 760
    feed_forward = 2 * 760 * 3072 + 3072 + 760
    assert cost.num_params(gates, BERT_BASE) == 5 * attention + feed_forward


@pytest.mark.parametrize("value", [1e-30, 0.3, 1.0])
def test_exact_count_sees_only_what_is_open(value):
    gates = draw(np.random.default_rng(0), TOY)
    scaled = {kind: (gate > 0) * value for kind, gate in gates.items()}
    assert cost.num_params(scaled, TOY) == count(open_(gates), TOY)


def test_count_of_hard_gates_in_large_models_is_exact():
    rng = np.random.default_rng(4)
    for _ in range(5):
        gates = draw(rng, BERT_BASE)
        assert cost.num_params(gates, BERT_BASE) == count(open_(gates), BERT_BASE)


# The expected size


def probability(log_alpha):
    return 1 / (1 + np.exp(CLOSING - np.asarray(log_alpha, np.float64)))


STATES = np.array(list(itertools.product([False, True], repeat=15)))


def split(flat, kinds=KINDS):
    """The 15 columns of `flat` as gates of TOY, the kinds' leading axes first."""
    shapes, gates, start = masks.mask_shapes(TOY), {}, 0
    for kind in KINDS:
        stop = start + math.prod(shapes[kind])
        if kind in kinds:
            gates[kind] = flat[..., start:stop].reshape(*flat.shape[:-1], *shapes[kind])
        start = stop
    return gates


SIZES = count(split(STATES), TOY)


def enumerated_sparsity(flat, kinds=KINDS):
    """1 - the mean over all 2^15 states of the gates; a missing kind is open."""
    missing = split(np.arange(15), set(KINDS) - set(kinds))
    p = probability(flat)
    for columns in missing.values():
        p[columns.ravel()] = 1
    chances = np.prod(np.where(STATES, p, 1 - p), axis=1)
    assert chances.sum() == pytest.approx(1)
    return 1 - chances @ SIZES / SIZES[-1]


def as_float32(gates):
    return {kind: jnp.asarray(value, jnp.float32) for kind, value in gates.items()}


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_expected_sparsity_is_the_mean_over_all_states(kinds):
    for seed in range(3):
        flat = np.random.default_rng(seed).uniform(LOW, HIGH, 15)
        log_alpha = as_float32(split(flat, kinds))
        expected = enumerated_sparsity(flat, kinds)
        result = constraint.expected_sparsity(log_alpha, TOY)
        assert float(result) == pytest.approx(expected, abs=1e-6)


SPREAD = {
    "open": lambda rng, kind, shape: rng.normal(4.5, 0.01, shape),
    "halfway": lambda rng, kind, shape: np.zeros(shape),
    "mixed": lambda rng, kind, shape: rng.uniform(LOW, HIGH, shape),
    "blocks close often": lambda rng, kind, shape: np.full(
        shape,
        {"head": -2.5, "mha": -0.5, "intermediate": -4.5, "ffn": -1.0}.get(kind, 1.0),
    ),
}


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize(
    "kinds",
    [KINDS, ("head", "intermediate"), ("mha", "ffn", "hidden")],
    ids="+".join,
)
def test_mean_size_of_samples_is_the_expected_size(spread, kinds):
    rng = np.random.default_rng(0)
    shapes = masks.mask_shapes(SMALL, kinds)
    log_alpha = as_float32({k: SPREAD[spread](rng, k, s) for k, s in shapes.items()})
    draws = 20_000
    keys = jax.random.split(jax.random.key(8), draws)
    gates = open_(jax.vmap(masks.sample, in_axes=(None, 0))(log_alpha, keys))
    if spread == "blocks close often" and "head" in kinds:
        assert (~gates["head"].any(-1)).mean() > 0.1

    sizes = count(gates, SMALL)
    full = count({}, SMALL)
    expected = (1 - float(constraint.expected_sparsity(log_alpha, SMALL))) * full
    assert sizes.mean() == pytest.approx(expected, rel=0.01)
    error = 4.5 * sizes.std() / math.sqrt(draws)
    assert sizes.mean() == pytest.approx(expected, abs=error + 1e-5 * full)


@pytest.mark.parametrize("log_alpha", [LOW, CLOSING, 0.0, HIGH])
def test_expected_sparsity_of_bert_base_by_hand(log_alpha):
    p = float(probability(log_alpha))
    hidden, some_head, some_unit = 768 * p, 1 - (1 - p) ** 12, 1 - (1 - p) ** 3072
    attention = 12 * p * (4 * 64 * hidden + 3 * 64) + some_head * hidden
    feed_forward = 3072 * p * (2 * hidden + 1) + some_unit * hidden
    size = 12 * p * (attention + feed_forward)
    shapes = masks.mask_shapes(BERT_BASE)
    gates = {kind: jnp.full(shape, log_alpha) for kind, shape in shapes.items()}
    result = jax.jit(lambda g: constraint.expected_sparsity(g, BERT_BASE))(gates)
    assert float(result) == pytest.approx(1 - size / BERT_SIZE, abs=2e-6)


def test_cost_is_linear_in_each_gate():
    rng = np.random.default_rng(5)
    shapes = masks.mask_shapes(TOY)
    gates = {kind: rng.random(shape) for kind, shape in shapes.items()}
    for kind, shape in shapes.items():
        for index in np.ndindex(shape):
            costs = []
            for value in (0.0, 0.25, 1.0):
                gates[kind][index], old = value, gates[kind][index]
                costs.append(cost.PARAMETERS.expected(gates, TOY))
                gates[kind][index] = old
            assert costs[1] == pytest.approx(0.75 * costs[0] + 0.25 * costs[2])
            assert costs[0] < costs[2]


# Gradients


def central_differences(function, x, step=1e-4):
    steps = step * np.eye(x.size)
    return np.array([(function(x + s) - function(x - s)) / (2 * step) for s in steps])


@pytest.mark.parametrize("kinds", [KINDS, ("head", "intermediate"), ("hidden", "ffn")])
def test_gradient_of_expected_sparsity_is_that_of_the_enumeration(kinds):
    flat = np.random.default_rng(6).uniform(LOW, HIGH, 15)
    expected = central_differences(lambda x: enumerated_sparsity(x, kinds), flat)
    gradient = jax.grad(constraint.expected_sparsity)(
        as_float32(split(flat, kinds)), TOY
    )
    for kind, value in split(expected, kinds).items():
        # Differences of step h are off by O(h^2), float32 by its epsilon.
        np.testing.assert_allclose(gradient[kind], value, atol=3e-7, err_msg=kind)
        assert (np.asarray(gradient[kind]) < 0).all()  # opening a gate costs


@pytest.mark.parametrize("gates_are", [LOW, HIGH])
def test_gradient_is_finite_at_both_ends_of_the_clamp(gates_are):
    shapes = masks.mask_shapes(BERT_BASE)
    gates = {kind: jnp.full(shape, gates_are) for kind, shape in shapes.items()}
    function = jax.jit(jax.grad(lambda g: constraint.expected_sparsity(g, BERT_BASE)))
    for value in function(gates).values():
        assert np.isfinite(value).all() and (np.asarray(value) < 0).all()


@pytest.mark.parametrize(("linear", "quadratic"), [(0.0, 0.0), (-0.7, 3.0), (2.0, 0.5)])
def test_gradients_of_the_lagrangian(linear, quadratic):
    target = 0.6
    flat = np.random.default_rng(7).uniform(LOW, HIGH, 15)

    def by_hand(x):
        gap = enumerated_sparsity(x[:15]) - target
        return x[15] * gap + x[16] * gap * gap

    def ours(log_alpha, multipliers):
        expected = constraint.expected_sparsity(log_alpha, TOY)
        return constraint.lagrangian(expected, target, multipliers)

    point = np.concatenate([flat, [linear, quadratic]])
    expected = central_differences(by_hand, point)
    multipliers = {"linear": jnp.float32(linear), "quadratic": jnp.float32(quadratic)}
    arguments = as_float32(split(flat)), multipliers
    value, (gates, lambdas) = jax.value_and_grad(ours, argnums=(0, 1))(*arguments)
    assert float(value) == pytest.approx(by_hand(point), abs=1e-6)
    for kind, gradient in split(expected[:15]).items():
        np.testing.assert_allclose(gates[kind], gradient, atol=1e-6, err_msg=kind)
    found = [float(lambdas["linear"]), float(lambdas["quadratic"])]
    np.testing.assert_allclose(found, expected[15:], atol=1e-6)
    # The ascent: the first follows the sign of the gap, the second only rises.
    gap = enumerated_sparsity(flat) - target
    np.testing.assert_allclose(found, [gap, gap**2], atol=1e-6)


# Target and limits


@pytest.mark.parametrize(
    ("step", "warmup", "expected"),
    [
        (0, 100, 0.0),
        (1, 100, 0.008),
        (50, 100, 0.4),
        (99, 100, 0.792),
        (100, 100, 0.8),
        (10**6, 100, 0.8),
        (0, 1, 0.0),
        (1, 1, 0.8),
        (0, 0, 0.8),  # no warm-up: the target from the first step
        (7, 0, 0.8),
    ],
)
def test_target_rises_linearly(step, warmup, expected):
    arguments = jnp.int32(step), jnp.float32(0.8), jnp.int32(warmup)
    for function in (constraint.target_at, jax.jit(constraint.target_at)):
        assert float(function(*arguments)) == pytest.approx(expected, rel=1e-6)


def test_highest_sparsity_of_bert_base():
    floor = float(probability(LOW))
    attention = 12 * (4 * 768 * 768 + 4 * 768)
    bias_stays = 12 * 768 * (1 - (1 - floor) ** 12)
    left = floor * (attention - 12 * 768) + bias_stays
    heads = constraint.max_sparsity(BERT_BASE, ("head",))
    assert heads == pytest.approx((attention - left) / BERT_SIZE, abs=1e-6)
    assert 0.31 < heads < attention / BERT_SIZE < 0.334

    layers = constraint.max_sparsity(BERT_BASE, ("mha", "ffn"))
    assert layers == pytest.approx(1 - floor, abs=1e-6)
    everything = constraint.max_sparsity(BERT_BASE)
    assert everything == pytest.approx(0.99989, abs=1e-5)
    for kinds in (("head", "mha"), ("intermediate", "ffn"), KINDS[:4]):
        assert heads < constraint.max_sparsity(BERT_BASE, kinds) < everything


# Masks that meet the target


def trained(rng, config, kinds=KINDS):
    """Log-alphas as training leaves them: most at an end of the clamp."""
    log_alpha = {}
    for kind, shape in masks.mask_shapes(config, kinds).items():
        open_share = rng.uniform(0.8, 1.0) if kind == "hidden" else rng.uniform(0.2, 1)
        ends = np.where(rng.random(shape) < open_share, HIGH, LOW)
        between = rng.uniform(LOW, HIGH, shape)
        values = np.where(rng.random(shape) < 0.2, between, ends)
        values = np.clip(values + rng.normal(0, 0.01, shape), LOW, HIGH)
        log_alpha[kind] = jnp.asarray(values, jnp.float32)
    return log_alpha


def removed(gates, config):
    return 1 - count(open_(gates), config) / count({}, config)


@pytest.mark.parametrize("seed", range(6))
def test_target_is_met_in_bert_base(seed):
    rng = np.random.default_rng(seed)
    log_alpha = trained(rng, BERT_BASE)
    reached = removed(masks.evaluation_masks(log_alpha), BERT_BASE)
    target = float(np.clip(reached + rng.uniform(-0.02, 0.02), 0.05, 0.97))
    gates = constraint.target_masks(log_alpha, BERT_BASE, target)
    assert abs(removed(gates, BERT_BASE) - target) <= 1e-3


@pytest.mark.parametrize("target", [0.0, 0.5, 0.9, 0.95])
def test_target_is_met_from_gates_that_were_never_trained(target):
    log_alpha = masks.init_log_alpha(BERT_BASE, jax.random.key(0))
    gates = constraint.target_masks(log_alpha, BERT_BASE, target)
    assert abs(removed(gates, BERT_BASE) - target) <= 1e-3
    assert (np.asarray(gates["hidden"]) > 0).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kinds", [("head",), ("mha", "ffn"), ("head", "hidden")])
def test_coarse_kinds_are_pruned_by_the_smallest_offset_that_will_do(kinds, seed):
    rng = np.random.default_rng(seed)
    log_alpha = trained(rng, SMALL, kinds)
    target = rng.uniform(0.02, 0.3)
    gates = constraint.target_masks(log_alpha, SMALL, target)
    sparsities = [
        removed(masks.evaluation_masks({k: v + o for k, v in log_alpha.items()}), SMALL)
        for o in np.linspace(-12, 12, 161)
    ]
    start = removed(masks.evaluation_masks(log_alpha), SMALL)
    if abs(start - target) > 1e-3:
        result = removed(gates, SMALL)
        assert result >= target
        # No offset comes closer from above.
        assert result <= min(s for s in sparsities if s >= target) + 1e-9


@pytest.mark.parametrize("seed", range(1, 31, 3))
def test_target_is_never_undershot_and_open_gates_keep_their_values(seed):
    """In a small model a single gate weighs more than the tolerance."""
    rng = np.random.default_rng(seed)
    kinds = SUBSETS[seed]
    log_alpha = trained(rng, SMALL, kinds)
    before = masks.evaluation_masks(log_alpha)
    highest = removed({k: np.zeros_like(v) for k, v in log_alpha.items()}, SMALL)
    target = rng.uniform(0.1, 0.9) * highest
    gates = constraint.target_masks(log_alpha, SMALL, target)
    assert set(gates) == set(kinds)
    assert removed(gates, SMALL) >= target - 1e-3
    # A gate that stays open keeps the value that training saw.
    for kind, gate in gates.items():
        both = (np.asarray(gate) > 0) & (np.asarray(before[kind]) > 0)
        np.testing.assert_array_equal(gate[both], before[kind][both])


def test_overshoot_never_ends_in_an_empty_encoder():
    """All blocks closed, their inner gates open: blocks must come back."""
    rng = np.random.default_rng(0)
    middle = {"mha": -3.0, "ffn": -3.0}
    log_alpha = {
        kind: jnp.asarray(rng.normal(middle.get(kind, 2.0), 0.5, shape), jnp.float32)
        for kind, shape in masks.mask_shapes(BERT_BASE).items()
    }
    for target in (0.95, 0.6):
        gates = constraint.target_masks(log_alpha, BERT_BASE, target)
        assert abs(removed(gates, BERT_BASE) - target) <= 1e-3


TWO = EncoderConfig(3, 64, (2, 2), 32, (256, 256), 3, 2)  # one unit is 0.13 % of it


@pytest.mark.parametrize("target", [0.6, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("kinds", [KINDS, KINDS[:4]], ids="+".join)
def test_two_layers_meet_the_target_to_one_unit(target, kinds):
    """Blocks that would close too much at once stay open, or all would be lost."""
    unit = (2 * 64 + 1) / count({}, TWO)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        log_alpha = {}
        for kind, shape in masks.mask_shapes(TWO, kinds).items():
            values = rng.normal(rng.uniform(-2, 3), rng.uniform(0.1, 2), shape)
            log_alpha[kind] = jnp.asarray(np.clip(values, LOW, HIGH), jnp.float32)
        gates = constraint.target_masks(log_alpha, TWO, target)
        assert -1e-3 <= removed(gates, TWO) - target <= 1.5 * unit


@pytest.mark.parametrize("full", [1, 7, 2068, 85_017_600, 2**33 + 1])
def test_target_count_is_the_most_that_meets_the_target(full):
    rng = np.random.default_rng(full)
    exact = 1 - rng.integers(0, full, 50, endpoint=True) / full
    for target in {0.0, 0.1, 0.3, *rng.random(50), *exact}:
        most = constraint.target_count(float(target), full)
        assert 0 <= most <= full
        assert 1 - most / full >= target
        assert most == full or 1 - (most + 1) / full < target


@pytest.mark.parametrize("gap", [-9e-4, 0.0, 9e-4])
def test_masks_within_the_tolerance_are_left_alone(gap):
    log_alpha = trained(np.random.default_rng(1), SMALL)
    before = masks.evaluation_masks(log_alpha)
    target = removed(before, SMALL) + gap
    after = constraint.target_masks(log_alpha, SMALL, target)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_tolerance_is_an_argument():
    log_alpha = trained(np.random.default_rng(1), BERT_BASE)
    before = masks.evaluation_masks(log_alpha)
    target = removed(before, BERT_BASE) + 0.004
    same = constraint.target_masks(log_alpha, BERT_BASE, target, tolerance=0.005)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    closer = constraint.target_masks(log_alpha, BERT_BASE, target, tolerance=1e-4)
    assert 0 <= removed(closer, BERT_BASE) - target <= 1e-4


def products(jaxpr):
    """Multiply-adds of the matrix products in a traced function, one by one."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                total += products(getattr(inner, "jaxpr", inner))
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += out * math.prod(shape[axis] for axis in summed)
    return total


RAGGED = EncoderConfig(11, 13, (3, 0, 1), 5, (0, 17, 4), 7, 3)


@pytest.mark.parametrize("problem", ["classification", "span"])
@pytest.mark.parametrize("config", [RAGGED, TOY, SMALL])
def test_multiply_adds_are_those_of_the_traced_model(config, problem):
    config = dataclasses.replace(config, problem=problem)
    params = abstract_params(config)
    for length, batch in ((1, 1), (9, 2)):
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
        traced = jax.make_jaxpr(Encoder(config).apply)({"params": params}, inputs)
        expected = products(traced.jaxpr)
        assert batch * cost.multiply_adds(config, length) == expected > 0


def test_multiply_adds_of_bert_base():
    """22.4 GFLOPs for 128 tokens, as it is often said of its encoder."""
    count = cost.multiply_adds(BERT_BASE, 128)
    attention = 12 * (4 * 128 * 768 * 768 + 2 * 128 * 128 * 768)
    assert count == attention + 12 * 2 * 128 * 768 * 3072 + 768 * 768 + 768 * 2
    assert 2 * count == pytest.approx(22.35e9, rel=1e-3)


# Closing gates of masks until they meet the target


def levels(seed, config, kinds=KINDS):
    """Gates of few different values, so that many are equal; some are closed."""
    rng = np.random.default_rng(seed)
    return {
        kind: rng.choice(
            [0, 0.25, 0.7, 0.9, 1], shape, p=[0.1, 0.1, 0.1, 0.2, 0.5]
        ).astype(np.float32)
        for kind, shape in masks.mask_shapes(config, kinds).items()
    }


def one_by_one(gates, config):
    """The masks after each further gate is closed, in the order that is promised."""
    finest_first = ["intermediate", "head", "hidden", "mha", "ffn"]
    places = [
        (value, finest_first.index(kind), *index[::-1], kind, index)
        for kind, gate in gates.items()
        for index, value in np.ndenumerate(gate)
        if value > 0
    ]
    now = {kind: gate.copy() for kind, gate in gates.items()}
    yield now
    for *_, kind, index in sorted(places):
        if kind == "hidden" and (now["hidden"] > 0).sum() == 1:
            continue
        now[kind][index] = 0
        yield now


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_the_fewest_of_the_least_open_gates_close(kinds):
    gates = levels(len(kinds), SMALL, kinds)
    steps = [removed(step, SMALL) for step in one_by_one(gates, SMALL)]
    assert steps == sorted(steps)
    between = np.random.default_rng(0).uniform(steps[0], steps[-1], 3)
    # Some that can be met exactly, the ends among them.
    exact = {steps[0], steps[len(steps) // 2], steps[-1]} - {1.0}
    for target in {0.0, *between, *exact}:
        result = constraint.meet_target(SMALL, target)(gates)
        expected = next(
            step for step in one_by_one(gates, SMALL) if removed(step, SMALL) >= target
        )
        assert set(result) == set(kinds)
        for kind, gate in result.items():
            assert gate.dtype == jnp.float32
            np.testing.assert_array_equal(gate, expected[kind], err_msg=kind)
        assert cost.exact_sparsity(result, SMALL) >= target


@pytest.mark.parametrize("target", [0.0, 0.3, 0.77])
def test_meeting_the_target_under_jit_again_and_from_the_host(target):
    transform = constraint.meet_target(SMALL, target)
    jitted = jax.jit(transform)
    for seed in range(3):
        gates = levels(seed, SMALL)
        before = {kind: gate.copy() for kind, gate in gates.items()}
        result = transform(gates)
        for same in (jitted(gates), transform(result), transform(as_float32(gates))):
            jax.tree.map(np.testing.assert_array_equal, same, result)
        jax.tree.map(np.testing.assert_array_equal, gates, before)


def test_masks_that_meet_the_target_are_left_alone():
    for seed in range(2):
        gates = levels(seed, BERT_BASE)
        reached = cost.exact_sparsity(gates, BERT_BASE)
        for target in (reached, reached - 0.1, 0.0):
            result = constraint.meet_target(BERT_BASE, target)(gates)
            jax.tree.map(np.testing.assert_array_equal, result, gates)
        # One bias more: float32 would not notice.
        result = constraint.meet_target(BERT_BASE, reached + 1 / BERT_SIZE)(gates)
        assert cost.exact_sparsity(result, BERT_BASE) > reached
        changed = sum((np.asarray(result[k]) != gates[k]).sum() for k in KINDS)
        assert changed >= 1


def test_hard_masks_are_thinned_evenly():
    ones = {k: np.ones(s) for k, s in masks.mask_shapes(BERT_BASE).items()}
    result = constraint.meet_target(BERT_BASE, 0.5)(ones)
    widths = (np.asarray(result["intermediate"]) > 0).sum(-1)
    assert widths.max() - widths.min() <= 1
    unit = 2 * 768 + 1
    number = math.ceil(0.5 * BERT_SIZE / unit)
    assert widths.sum() == 12 * 3072 - number
    assert all((np.asarray(result[k]) == 1).all() for k in KINDS if k != "intermediate")


@pytest.mark.parametrize("kinds", [("hidden",), ("hidden", "head"), ("hidden", "ffn")])
def test_one_hidden_dimension_stays(kinds):
    gates = levels(1, SMALL, kinds)
    lowest = {kind: np.zeros_like(gate) for kind, gate in gates.items()}
    lowest["hidden"][0] = 1
    highest = cost.exact_sparsity(lowest, SMALL)
    result = constraint.meet_target(SMALL, highest)(gates)
    (kept,) = np.flatnonzero(result["hidden"])
    assert gates["hidden"][kept] == gates["hidden"].max()
    with pytest.raises(UserError, match=f"target=.*hidden.*at most {highest:.3f}"):
        constraint.meet_target(SMALL, highest + 1e-6)(gates)


@pytest.mark.parametrize("target", [-0.1, 1.0, 95, math.nan])
def test_wrong_targets_are_named(target):
    with pytest.raises(UserError, match=f"target={target}"):
        constraint.meet_target(SMALL, target)


def test_masks_of_no_kind_meet_no_target_but_none():
    assert constraint.meet_target(SMALL, 0.0)({}) == {}
    with pytest.raises(UserError, match="target=0.1"):
        constraint.meet_target(SMALL, 0.1)({})


def test_models_of_billions_of_weights():
    """More than int32 counts: here to the precision of float32."""
    huge = EncoderConfig(3, 4096, (32,) * 48, 128, (16384,) * 48, 3, 2)
    assert cost.num_params({}, huge) > 2**33
    gates = levels(0, huge, ("head", "mha"))
    target = cost.exact_sparsity(gates, huge) + 0.1
    result = jax.jit(constraint.meet_target(huge, target))(gates)
    block = (32 * (4 * 4096 * 128 + 3 * 128) + 4096) / cost.num_params({}, huge)
    assert -1e-6 < cost.exact_sparsity(result, huge) - target < block + 1e-6


# A cost that is not a number of parameters


def milliseconds(gates, config):
    """A time that rises in steps of eight units and has a fixed part for each block."""
    total = 0.0
    for outer, inner, width, per_step in (
        ("mha", "head", config.heads[0], 0.21),
        ("ffn", "intermediate", config.intermediate[0], 0.05),
    ):
        open_ = np.full((len(config.heads),), width)
        if inner in gates:
            open_ = (gates[inner] > 0).sum(-1)
        steps = np.ceil(open_ / (1 if inner == "head" else 8))
        times = np.where(open_ > 0, 0.03 + per_step * steps, 0)
        if outer in gates:
            times = np.where(gates[outer] > 0, times, 0)
        total += times.sum()
    return total


def as_python(gates, config):
    return float(milliseconds({k: np.asarray(v) for k, v in gates.items()}, config))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("exact", [milliseconds, as_python])
def test_targets_of_a_measured_time_are_met(target, exact):
    time = cost.Cost(expected=milliseconds, exact=exact)
    full = milliseconds({}, SMALL)
    assert not full.is_integer()
    step = max(0.03 + 0.21, 0.03 + 3 * 0.05) / full  # the last one ends a block

    def saved(gates):
        return 1 - as_python(gates, SMALL) / full

    kinds = KINDS[:4]  # all of them cost time
    for seed in range(3):
        rng = np.random.default_rng(seed)
        gates = levels(seed, SMALL, kinds)
        closed = constraint.meet_target(SMALL, target, time)(gates)
        steps = [saved(state) for state in one_by_one(gates, SMALL)]
        expected = next(reached for reached in steps if reached >= target)
        assert saved(closed) == pytest.approx(expected)
        log_alpha = trained(rng, SMALL, kinds)
        found = constraint.target_masks(log_alpha, SMALL, target, cost=time)
        assert target - 1e-3 <= saved(found) <= target + step
        rounded = constraint.final_masks(
            log_alpha, SMALL, target, transforms.round_to_multiple(head=2), time
        )
        assert saved(rounded) >= target - 1e-3
        assert cost.exact_sparsity(found, SMALL, time) == pytest.approx(saved(found))
    with pytest.raises(UserError, match="target=0.9.*at most 0.[0-8]"):
        ones = {"head": np.ones((3, 4))}
        constraint.meet_target(SMALL, 0.9, time)(ones)
    assert 0.5 < constraint.max_sparsity(SMALL, ("mha", "ffn"), PROBABLE) < 1


def expected_time(probabilities, config):
    """The mean time of blocks that are there or not, given their own probabilities."""
    attention, ffn = 0.03 + 4 * 0.21, 0.03 + 3 * 0.05
    whole = np.ones(len(config.heads))
    return (probabilities.get("mha", whole) * attention).sum() + (
        probabilities.get("ffn", whole) * ffn
    ).sum()


PROBABLE = cost.Cost(expected=expected_time, exact=as_python)


def test_expected_sparsity_is_that_of_the_cost():
    log_alpha = {"mha": jnp.array([0.0, 2.0, -1.0]), "ffn": jnp.zeros(3)}
    p = {kind: probability(value) for kind, value in log_alpha.items()}
    expected = 1 - expected_time(p, SMALL) / milliseconds({}, SMALL)
    found = constraint.expected_sparsity(log_alpha, SMALL, PROBABLE)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_composed_with_rounding_the_target_is_nearly_met():
    gates = levels(3, BERT_BASE)
    transform = transforms.chain(
        constraint.meet_target(BERT_BASE, 0.9),
        transforms.drop_empty(),
        transforms.round_to_multiple(intermediate=64, head=2),
    )
    result = jax.jit(transform)(gates)
    widths = (np.asarray(result["intermediate"]) > 0).sum(-1)
    assert (widths % 64 == 0).all()
    # At most 63 units and one head more in each of 12 layers.
    more = 12 * (63 * (2 * 768 + 1) + 4 * 768 * 64 + 3 * 64) / BERT_SIZE
    assert 0.9 - more <= cost.exact_sparsity(result, BERT_BASE) < 0.91
