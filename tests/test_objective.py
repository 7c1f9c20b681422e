"""Losses and layer matching, against closed forms and brute force."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from cofi_jax import objective, sparsity
from cofi_jax.config import Distill
from cofi_jax.masks import mask_shapes
from cofi_jax.model import Encoder

LN2 = float(np.log(2))

pytestmark = pytest.mark.usefixtures("quick_compile")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Task loss


def test_task_loss_by_hand():
    """Probabilities 1/2 and 1/4 of the label: ln 2 and 2 ln 2."""
    logits = np.array([[0, 0], [3 * LN2, 2 * LN2], [7, -7]], np.float32)
    logits[1] = np.log([3, 1])
    labels = np.array([0, 1, 1])
    loss = objective.task_loss(logits, labels, np.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss, 1.5 * LN2, rtol=1e-6)
    loss = objective.task_loss(logits, labels, np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss, 2 * LN2, rtol=1e-6)


def test_weighted_mean_of_nothing_is_zero():
    assert objective.weighted_mean(np.ones(3), np.zeros(3)) == 0


# Logit distillation


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distill_logits_is_the_scaled_divergence(temperature):
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    weight = np.array([1.0, 1.0, 0.0, 1.0])
    p = softmax(teacher.astype(float) / temperature, axis=-1)
    q = softmax(student.astype(float) / temperature, axis=-1)
    divergence = rel_entr(p, q).sum(-1)
    expected = temperature**2 * (divergence * weight).sum() / 3
    loss = objective.distill_logits(student, teacher, weight, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_distill_logits_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL = ln(2 / sqrt 3)."""
    student, teacher = np.log([[1.0, 3.0]]), np.zeros((1, 2))
    loss = objective.distill_logits(student, teacher, np.ones(1), 1.0)
    np.testing.assert_allclose(loss, np.log(2 / np.sqrt(3)), rtol=1e-6)


def test_distill_logits_of_equals_is_zero_and_ignores_filling():
    logits = draw(3, 4) * 10
    ones = np.ones(3)
    assert objective.distill_logits(logits, logits + 5, ones, 2.0) < 1e-5
    other = logits.copy()
    other[2] = -other[2]
    weight = np.array([1.0, 1.0, 0.0])
    assert objective.distill_logits(other, logits, weight, 2.0) < 1e-5
    assert objective.distill_logits(other, logits, ones, 2.0) > 1


def test_distill_logits_gradient_is_t_times_the_gap():
    """d/ds T^2 KL = T (softmax(s / T) - softmax(t / T))."""
    student, teacher, temperature = draw(1, 5), draw(1, 5, seed=1), 3.0
    gradient = jax.grad(objective.distill_logits)(
        student, teacher, np.ones(1), temperature
    )
    gap = softmax(student / temperature) - softmax(teacher / temperature)
    np.testing.assert_allclose(gradient, temperature * gap, atol=1e-6)


# Which layers are compared


@pytest.mark.parametrize(
    "layers, count, expected",
    [
        (12, 4, (2, 5, 8, 11)),  # the paper's 3, 6, 9, 12
        (24, 4, (5, 11, 17, 23)),
        (6, 4, (1, 2, 4, 5)),  # 1.5, 3, 4.5, 6, halves up
        (4, 4, (0, 1, 2, 3)),
        (3, 4, (0, 1, 2)),
        (1, 4, (0,)),
        (12, 1, (11,)),
    ],
)
def test_taught_layers(layers, count, expected):
    assert objective.taught_layers(layers, count) == expected


def test_taught_layers_rise_to_the_last():
    for layers, count in itertools.product(range(1, 30), range(1, 30)):
        taught = objective.taught_layers(layers, count)
        assert len(taught) == min(layers, count)
        assert list(taught) == sorted(set(taught))
        assert taught[0] >= 0 and taught[-1] == layers - 1


def closest_by_hand(costs, alive):
    living = [i for i, a in enumerate(alive) if a]
    return [min(living, key=lambda i: row[i], default=0) for row in costs]


def ordered_by_hand(costs, alive):
    living = [i for i, a in enumerate(alive) if a]
    matched, bound = [], len(alive)
    for row in reversed(costs):
        below = [i for i in living if i < bound]
        lowest = living[0] if living else 0
        bound = min(below, key=lambda i: row[i]) if below else lowest
        matched.append(bound)
    return matched[::-1]


_match = jax.jit(objective.match_layers, static_argnames="ordered")


@st.composite
def matchings(draw):
    taught, layers = draw(st.sampled_from([(4, 6), (4, 3), (1, 4)]))
    # XLA takes subnormal numbers for 0.
    cost = st.floats(0, 1e6, width=32, allow_subnormal=False)
    row = st.lists(cost, min_size=layers, max_size=layers)
    costs = draw(st.lists(row, min_size=taught, max_size=taught))
    alive = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    return costs, alive


@settings(deadline=None, max_examples=200, derandomize=True)
@given(matchings())
def test_match_layers(matching):
    costs, alive = matching
    arrays = np.array(costs, np.float32), np.array(alive)
    closest = _match(*arrays, ordered=False)
    ordered = _match(*arrays, ordered=True)
    assert closest.dtype == ordered.dtype == jnp.int32
    assert closest.tolist() == closest_by_hand(costs, alive)
    assert ordered.tolist() == ordered_by_hand(costs, alive)
    if any(alive):
        assert all(alive[i] for i in (*closest.tolist(), *ordered.tolist()))
        lowest = alive.index(True)
        for low, high in itertools.pairwise(ordered.tolist()):
            assert low < high or low == high == lowest


def test_match_layers_examples():
    costs = np.array([[0.0, 5, 1, 9], [5, 4, 0, 9], [9, 2, 0, 1]])
    alive = np.ones(4, bool)
    assert _match(costs, alive, ordered=False).tolist() == [0, 2, 2]
    # Last: 2; then below 2: 1; then below 1: 0.
    assert _match(costs, alive, ordered=True).tolist() == [0, 1, 2]
    # With 0 dead, nothing is left below 1: the lowest alive one.
    alive[0] = False
    assert _match(costs, alive, ordered=True).tolist() == [1, 1, 2]
    assert _match(costs, alive, ordered=False).tolist() == [2, 2, 2]
    alive[:] = False
    for ordered in (False, True):
        assert _match(costs, alive, ordered=ordered).tolist() == [0, 0, 0]


def test_alive_layers_by_config_and_masks(tiny):
    """A layer lives while a block has its own gate and one inner gate open."""
    assert objective.alive_layers(tiny, {}).tolist() == [True, True]
    config = dataclasses.replace(tiny, heads=(3, 0, 0), intermediate=(0, 6, 0))
    assert objective.alive_layers(config, {}).tolist() == [True, True, False]
    shapes = mask_shapes(tiny)
    for mha, ffn, head, unit in itertools.product((0.0, 0.4), repeat=4):
        masks = {kind: np.full(shape, 0.4) for kind, shape in shapes.items()}
        masks["mha"][1], masks["ffn"][1] = mha, ffn
        masks["head"][1], masks["intermediate"][1] = [0, head, 0], 5 * [0] + [unit]
        for left_out in [(), ("mha",), ("head", "intermediate"), ("hidden",)]:
            gates = {k: v for k, v in masks.items() if k not in left_out}
            attention = ("mha" not in gates or mha) and ("head" not in gates or head)
            feed = ("ffn" not in gates or ffn) and ("intermediate" not in gates or unit)
            alive = objective.alive_layers(tiny, gates).tolist()
            assert alive == [True, bool(attention or feed)]


# Layer distillation

L, B, T, D, NARROW, K = 3, 2, 4, 5, 3, 2


@pytest.fixture
def layers():
    """Student, teacher, projection; row 0 has 4 real tokens and row 1 has 1."""
    weight = np.array([[1.0, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    student, teacher = draw(L, B, T, NARROW), draw(K, B, T, D, seed=1)
    return student, teacher, draw(NARROW, D, seed=2), weight


def layers_by_hand(student, teacher, projection, weight, alive, match):
    def distance(t, s):
        squares = []
        for b, i in zip(*np.nonzero(weight), strict=True):
            squares.append(np.mean((t[b, i] - s[b, i] @ projection) ** 2))
        return np.mean(squares)

    costs = [[distance(t, s) for s in student] for t in teacher]
    matched = match(costs, alive)
    return sum(row[i] for row, i in zip(costs, matched, strict=True)), matched


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("alive", [(1, 1, 1), (0, 1, 1), (1, 0, 0)])
def test_distill_layers_by_hand(layers, alive, ordered):
    alive = np.array(alive, bool)
    match = ordered_by_hand if ordered else closest_by_hand
    expected, matched = layers_by_hand(*layers, alive, match)
    loss = objective.distill_layers(*layers, alive, ordered=ordered)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    # Padding is not looked at, not even by the matching.
    student, teacher, projection, weight = layers
    noise = 100 * (1 - weight[..., None])
    noisy = student + noise, teacher - noise, projection, weight
    again = objective.distill_layers(*noisy, alive, ordered=ordered)
    np.testing.assert_allclose(again, expected, rtol=1e-5)

    # d/ds = 2 (sW - t) W' / (D tokens), of the layers that were chosen.
    gradient = jax.grad(objective.distill_layers)(*layers, alive, ordered=ordered)
    closed_form = np.zeros_like(student)
    for t, i in zip(teacher, matched, strict=True):
        gap = (student[i] @ projection - t) * weight[..., None]
        closed_form[i] += 2 * gap @ projection.T / (D * weight.sum())
    np.testing.assert_allclose(gradient, closed_form, atol=1e-6)
    others = np.array([i not in matched for i in range(L)])
    np.testing.assert_array_equal(gradient[others], 0)


def test_distill_layers_projection_learns(layers):
    """d/dW = 2 s' (sW - t) / (D tokens): the projection is trained as well."""
    student, teacher, projection, weight = layers
    alive = np.array([False, True, False])
    gradient = jax.grad(objective.distill_layers, argnums=2)(
        *layers, alive, ordered=False
    )
    s = student[1][weight > 0]
    gaps = sum(s @ projection - t[weight > 0] for t in teacher)
    np.testing.assert_allclose(gradient, 2 * s.T @ gaps / (D * weight.sum()), atol=1e-5)


# Whole objectives


@pytest.fixture(scope="module")
def world(tiny, tiny_batch):
    """A teacher of four layers, a narrower student with blocks missing, a batch."""
    base = dataclasses.replace(tiny, dropout=0.0)
    teacher = dataclasses.replace(base, heads=(3,) * 4, intermediate=(6,) * 4)
    student = dataclasses.replace(
        base, hidden_size=10, heads=(3, 0, 0), intermediate=(0, 0, 4)
    )
    batch = tiny_batch | {
        "labels": np.array([0, 2, 1]),
        "weight": np.array([1.0, 1.0, 0.0], np.float32),
    }
    return teacher, random_params(teacher, 1), student, random_params(student, 2), batch


@pytest.mark.parametrize("match", ["closest", "ordered"])
def test_distillation_objective_by_hand(world, match):
    teacher, teacher_params, student, params, batch = world
    distill = Distill(0.3, 0.7, 2.0, match, num_layers=2)
    projection = draw(10, 16, seed=5) / 4
    loss_of = objective.distillation_objective(
        Encoder(student), Encoder(teacher), distill
    )
    embeddings = {"embeddings": params["embeddings"]}
    rest = {k: v for k, v in params.items() if k != "embeddings"}
    theta = {"params": rest, "distill_projection": projection}
    key = jax.random.key(0)
    (loss, metrics), gradient = jax.jit(
        jax.value_and_grad(loss_of, argnums=2, has_aux=True)
    )(theta, embeddings, {"teacher": teacher_params}, batch, key)

    ours, target = (
        Encoder(config).apply({"params": p}, batch)
        for config, p in ((student, params), (teacher, teacher_params))
    )
    logits = 4 * np.mean(
        rel_entr(softmax(target.logits / 2, -1), softmax(ours.logits / 2, -1)).sum(-1)[
            :2
        ]
    )
    layers, matched = layers_by_hand(
        np.stack(ours.hidden_states[1:]),
        np.stack([target.hidden_states[i] for i in (2, 4)]),
        projection,
        batch["attention_mask"] * batch["weight"][:, None],
        [True, False, True],
        ordered_by_hand if match == "ordered" else closest_by_hand,
    )
    assert 1 not in matched
    np.testing.assert_allclose(metrics["loss_logits"], logits, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_layers"], layers, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.3 * logits + 0.7 * layers, rtol=1e-4)
    for leaf in jax.tree.leaves(gradient):  # nobody teaches the teacher
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("logits, layers", [(0.0, 1.0), (1.0, 0.0)])
def test_a_term_of_weight_zero_is_not_computed(world, logits, layers):
    teacher, params, _, _, batch = world
    loss_of = objective.distillation_objective(
        Encoder(teacher), Encoder(teacher), Distill(logits, layers)
    )
    theta = {"params": params, "distill_projection": jnp.eye(16)}
    loss, metrics = loss_of(theta, {}, {"teacher": params}, batch, jax.random.key(0))
    assert set(metrics) == {"loss_logits" if logits else "loss_layers"}
    assert abs(loss) < 1e-5  # a copy of the teacher has nothing to learn


def test_pruning_objective_with_open_gates(tiny, world):
    """Gates that are surely open leave imitation; then s = 0 and s - t = -t."""
    batch = world[-1]
    config = dataclasses.replace(tiny, dropout=0.0)
    params, other = random_params(config, 3), random_params(config, 4)
    model, distill = Encoder(config), Distill()
    key = jax.random.key(0)
    theta = {"params": params, "distill_projection": jnp.eye(16)}
    imitation, _ = objective.distillation_objective(model, model, distill)(
        theta, {}, {"teacher": other}, batch, key
    )
    theta |= {
        "log_alpha": {
            k: jnp.full(shape, 50.0) for k, shape in mask_shapes(config).items()
        },
        "multipliers": {"linear": jnp.float32(2.0), "quadratic": jnp.float32(3.0)},
    }
    context = {
        "teacher": other,
        "target_sparsity": np.float32(0.6),
        "warmup_steps": np.int32(8),
    }
    loss_of = jax.jit(
        jax.value_and_grad(
            objective.pruning_objective(model, model, distill), has_aux=True
        )
    )
    for step, target in ((0, 0.0), (2, 0.15), (8, 0.6), (100, 0.6)):
        context["step"] = np.int32(step)
        (loss, metrics), gradient = loss_of(theta, {}, context, batch, key)
        np.testing.assert_allclose(metrics["target_sparsity"], target, atol=1e-6)
        np.testing.assert_allclose(metrics["expected_sparsity"], 0, atol=1e-5)
        penalty = -2 * target + 3 * target**2
        np.testing.assert_allclose(metrics["loss_lagrangian"], penalty, atol=1e-4)
        np.testing.assert_allclose(loss, imitation + penalty, atol=1e-4)
        multipliers = gradient["multipliers"]
        np.testing.assert_allclose(multipliers["linear"], -target, atol=1e-5)
        np.testing.assert_allclose(multipliers["quadratic"], target**2, atol=1e-5)


def test_pruning_objective_draws_gates_from_the_key(tiny, world):
    batch = world[-1]
    model = Encoder(dataclasses.replace(tiny, dropout=0.0))
    params = random_params(tiny, 3)
    log_alpha = {kind: jnp.zeros(shape) for kind, shape in mask_shapes(tiny).items()}
    theta = {
        "params": params,
        "distill_projection": jnp.eye(16),
        "log_alpha": log_alpha,
        "multipliers": {"linear": 0.0, "quadratic": 0.0},
    }
    context = {
        "teacher": params,
        "target_sparsity": 0.5,
        "warmup_steps": 0,
        "step": 0,
    }
    loss_of = jax.jit(objective.pruning_objective(model, model, Distill()))
    first, again, other = (
        loss_of(theta, {}, context, batch, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert first[0] == again[0] != other[0]
    expected = sparsity.expected_sparsity(log_alpha, tiny)
    np.testing.assert_allclose(first[1]["expected_sparsity"], expected, rtol=1e-5)
