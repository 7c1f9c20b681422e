"""Layer matching and whole objectives, against closed forms and brute force."""

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
from scipy import stats
from scipy.special import expit, log_softmax, rel_entr, softmax

from cofi_jax.config import Distill
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import constraint
from cofi_jax.pruning import masks as masks_lib
from cofi_jax.pruning.masks import mask_shapes
from cofi_jax.training import losses, objectives
from cofi_jax.training import teacher as teacher_lib

pytestmark = pytest.mark.usefixtures("quick_compile")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    assert losses.taught_layers(layers, count) == expected


def test_taught_layers_rise_to_the_last():
    for layers, count in itertools.product(range(1, 30), range(1, 30)):
        taught = losses.taught_layers(layers, count)
        assert len(taught) == min(layers, count)
        assert list(taught) == sorted(set(taught))
        assert taught[0] >= 0 and taught[-1] == layers - 1


def windows(layers, count):
    """Each taught layer and those below it, down to the one taught before."""
    taught = losses.taught_layers(layers, count)
    starts = (0, *(layer + 1 for layer in taught))
    return [range(a, b + 1) for a, b in zip(starts, taught, strict=False)]


@pytest.mark.parametrize(
    "layers, count, expected",
    [
        (12, 4, [3, 3, 3, 3]),
        (6, 4, [2, 1, 2, 1]),
        (24, 4, [6, 6, 6, 6]),
        (7, 3, [2, 3, 2]),
        (3, 5, [1, 1, 1]),  # no more than there are
        (5, 1, [5]),
    ],
)
def test_drawn_layers_are_uniform_in_their_windows(layers, count, expected):
    assert [len(window) for window in windows(layers, count)] == expected
    many = 6000
    keys = jax.random.split(jax.random.key(layers), many)
    drawn = jax.jit(jax.vmap(lambda key: losses.draw_layers(key, layers, count)))(keys)
    assert drawn.dtype == jnp.int32 and drawn.shape == (many, len(expected))
    for ids, window in zip(np.asarray(drawn).T, windows(layers, count), strict=True):
        found, counts = np.unique(ids, return_counts=True)
        assert found.tolist() == list(window)
        if len(window) > 1:
            assert stats.chisquare(counts).pvalue > 1e-4
    # Windows are drawn independently of each other.
    for one, other in itertools.combinations(np.asarray(drawn).T, 2):
        if len(set(one)) > 1 < len(set(other)):
            pairs = np.unique(np.stack([one, other]), axis=1, return_counts=True)[1]
            assert len(pairs) == len(set(one)) * len(set(other))
            assert stats.chisquare(pairs).pvalue > 1e-4


def test_drawn_layers_are_a_function_of_the_key():
    def drawn(seed):
        return losses.draw_layers(jax.random.key(seed), 12, 4).tolist()

    assert [drawn(seed) for seed in range(5)] == [drawn(seed) for seed in range(5)]
    assert len({tuple(drawn(seed)) for seed in range(20)}) > 10


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


@functools.partial(jax.jit, static_argnames="ordered")
def _match(costs, alive, ordered):
    match = losses.MATCHERS["ordered" if ordered else "closest"]
    matched, weights = match(costs, alive, jnp.arange(len(costs)))
    return jnp.where(weights == 1, matched, -1)


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
    assert losses.alive_layers(tiny, {}).tolist() == [True, True]
    config = dataclasses.replace(tiny, heads=(3, 0, 0), intermediate=(0, 6, 0))
    assert losses.alive_layers(config, {}).tolist() == [True, True, False]
    shapes = mask_shapes(tiny)
    for mha, ffn, head, unit in itertools.product((0.0, 0.4), repeat=4):
        masks = {kind: np.full(shape, 0.4) for kind, shape in shapes.items()}
        masks["mha"][1], masks["ffn"][1] = mha, ffn
        masks["head"][1], masks["intermediate"][1] = [0, head, 0], 5 * [0] + [unit]
        for left_out in [(), ("mha",), ("head", "intermediate"), ("hidden",)]:
            gates = {k: v for k, v in masks.items() if k not in left_out}
            attention = ("mha" not in gates or mha) and ("head" not in gates or head)
            feed = ("ffn" not in gates or ffn) and ("intermediate" not in gates or unit)
            alive = losses.alive_layers(tiny, gates).tolist()
            assert alive == [True, bool(attention or feed)]


# Layer distillation

L, B, T, D, NARROW, K = 3, 2, 4, 5, 3, 2


TAUGHT = (0, 2)


@pytest.fixture
def layers():
    """Student, teacher, projection; row 0 has 4 real tokens and row 1 has 1."""
    weight = np.array([[1.0, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    student, teacher = draw(L, B, T, NARROW), draw(K, B, T, D, seed=1)
    return student, teacher, draw(NARROW, D, seed=2), weight


def matches_by_hand(match, costs, alive, taught):
    """By hand, a layer's number or None where nothing is compared."""
    if match == "fixed":
        return [layer if alive[layer] else None for layer in taught]
    by_hand = {"closest": closest_by_hand, "ordered": ordered_by_hand}
    return by_hand[match](costs, alive)


def layers_by_hand(student, teacher, projection, weight, alive, taught, match):
    def distance(t, s):
        squares = []
        for b, i in zip(*np.nonzero(weight), strict=True):
            squares.append(np.mean((t[b, i] - s[b, i] @ projection) ** 2))
        return np.mean(squares)

    costs = [[distance(t, s) for s in student] for t in teacher]
    matched = matches_by_hand(match, costs, alive, taught)
    pairs = zip(costs, matched, strict=True)
    return sum(row[i] for row, i in pairs if i is not None), matched


@functools.partial(jax.jit, static_argnames="match")
def _distill_layers(*arguments, match):
    distill = functools.partial(losses.distill_layers, match=losses.MATCHERS[match])
    return jax.value_and_grad(distill, argnums=(0, 2))(*arguments)


@pytest.mark.parametrize("match", ["closest", "ordered", "fixed"])
@pytest.mark.parametrize("alive", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0)])
def test_distill_layers_by_hand(layers, alive, match):
    alive, taught = np.array(alive, bool), np.array(TAUGHT)
    expected, matched = layers_by_hand(*layers, alive, TAUGHT, match)
    loss, gradients = _distill_layers(*layers, alive, taught, match=match)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    if match == "fixed":
        assert (loss == 0) == (not alive[[0, 2]].any())

    # Padding is not looked at, not even by the matching.
    student, teacher, projection, weight = layers
    noise = 100 * (1 - weight[..., None])
    noisy = student + noise, teacher - noise, projection, weight
    again, _ = _distill_layers(*noisy, alive, taught, match=match)
    np.testing.assert_allclose(again, expected, rtol=1e-5)

    # d/ds = 2 (sW - t) W' / (D tokens), of the layers that were chosen; and
    # d/dW = 2 s' (sW - t) / (D tokens): the projection is trained as well.
    to_student, to_projection = np.zeros_like(student), np.zeros_like(projection)
    for t, i in zip(teacher, matched, strict=True):
        if i is not None:
            gap = 2 * (student[i] @ projection - t) * weight[..., None]
            gap /= D * weight.sum()
            to_student[i] += gap @ projection.T
            to_projection += np.einsum("btn,btd->nd", student[i], gap)
    np.testing.assert_allclose(gradients[0], to_student, atol=1e-6)
    np.testing.assert_allclose(gradients[1], to_projection, atol=1e-5)
    others = np.array([i not in matched for i in range(L)])
    np.testing.assert_array_equal(gradients[0][others], 0)


@pytest.mark.parametrize("match", ["closest", "ordered", "fixed"])
def test_distill_layers_sums_in_one_order(layers, match):
    """A scatter may add up in any order on a GPU, and a resumed run would differ."""
    arguments = *layers, np.ones(L, bool), jnp.array(TAUGHT)
    gradient = jax.grad(losses.distill_layers, argnums=(0, 1, 2))
    matcher = losses.MATCHERS[match]
    program = jax.make_jaxpr(lambda *a: gradient(*a, match=matcher))(*arguments)
    assert "scatter" not in str(program)


# Whole objectives


LABELS = {
    "classification": np.array([0, 2, 1], np.int32),
    "regression": np.array([0.5, -1, 9], np.float32),
    "span": np.array([[1, 5], [2, 2], [0, 0]], np.int32),
    "multilabel": np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1]], np.float32),
}


OUTPUTS = {"classification": 3, "regression": 1, "span": 2, "multilabel": 3}


PROJECTION = draw(10, 16, seed=5) / 4


class World:
    """A teacher of four layers, a narrower student, a batch."""

    def __init__(self, tiny, batch, problem, heads, intermediate):
        base = dataclasses.replace(
            tiny, dropout=0.0, problem=problem, num_labels=OUTPUTS[problem]
        )
        self.problem = problem
        self.teacher = dataclasses.replace(base, heads=(3,) * 4, intermediate=(6,) * 4)
        self.student = dataclasses.replace(
            base, hidden_size=10, heads=heads, intermediate=intermediate
        )
        self.teacher_params = random_params(self.teacher, 1)
        self.params = random_params(self.student, 2)
        weight = np.array([1.0, 1.0, 0.0], np.float32)
        self.batch = batch | {"labels": LABELS[problem], "weight": weight}
        self.target = Encoder(self.teacher).apply(
            {"params": self.teacher_params}, self.batch
        )

    def trainable(self, **more):
        return {"params": self.params, "distill_projection": PROJECTION} | more

    def output(self, masks=None):
        variables = {"params": self.params, "masks": masks or {}}
        return Encoder(self.student).apply(variables, self.batch)

    def teacher_outputs(self, distill):
        """The batch with what the teacher says, of the layers that are taught."""
        taught = range(4) if distill.taught == "random" else (1, 3)
        if distill.num_layers == 4:
            taught = range(4)
        states = [self.target.hidden_states[k + 1] for k in taught]
        teacher_outputs = {"logits": self.target.logits, "states": jnp.stack(states, 2)}
        return self.batch | {"teacher_outputs": teacher_outputs}

    def distillation(self, distill):
        return objectives.DistillationObjective(Encoder(self.student), distill)

    def pruning(self, distill):
        return objectives.PruningObjective(Encoder(self.student), distill)

    def choices(self, logits):
        """What is chosen from, row after row; two choices of each span."""
        for row in (0, 1):  # the third one has no weight
            if self.problem == "span":
                length = self.batch["attention_mask"][row].sum()
                yield from np.float64(logits[row, :length]).T
            else:
                yield np.float64(logits[row])

    def task_by_hand(self, logits):
        labels = self.batch["labels"][:2].reshape(-1)
        if self.problem == "regression":
            return np.mean((logits[:2, 0] - labels) ** 2)
        if self.problem == "multilabel":
            chances = expit(np.float64(logits[:2]).reshape(-1))
            return -np.mean(np.log(np.where(labels == 1, chances, 1 - chances)))
        pairs = zip(self.choices(logits), labels, strict=True)
        return -np.mean([log_softmax(row)[label] for row, label in pairs])

    def logits_by_hand(self, logits, temperature):
        target = self.target.logits
        if self.problem == "regression":
            return np.mean((logits[:2] - target[:2]) ** 2)
        if self.problem == "multilabel":
            s, t = (expit(np.float64(x[:2]) / temperature) for x in (logits, target))
            divergence = rel_entr(t, s) + rel_entr(1 - t, 1 - s)
            return temperature**2 * divergence.sum() / 2
        terms = [
            rel_entr(softmax(t / temperature), softmax(s / temperature)).sum()
            for s, t in zip(self.choices(logits), self.choices(target), strict=True)
        ]
        return temperature**2 * np.mean(terms)

    def layers_by_hand(self, output, taught, match, alive):
        return layers_by_hand(
            np.stack(output.hidden_states[1:]),
            np.stack([self.target.hidden_states[1 + i] for i in taught]),
            PROJECTION,
            self.batch["attention_mask"] * self.batch["weight"][:, None],
            alive,
            taught,
            match,
        )


@pytest.fixture(scope="module")
def worlds(tiny, tiny_batch):
    """By problem; the student is sliced, and nothing is left of its layer 1."""
    widths = (3, 0, 0, 2), (0, 0, 4, 6)
    return {problem: World(tiny, tiny_batch, problem, *widths) for problem in LABELS}


@pytest.fixture(scope="module")
def dense_worlds(tiny, tiny_batch):
    """By problem; the student may have gates."""
    widths = (3,) * 4, (6,) * 4
    return {problem: World(tiny, tiny_batch, problem, *widths) for problem in LABELS}


CASES = [
    ("classification", "closest", "even"),
    ("classification", "fixed", "even"),
    ("span", "fixed", "even"),
    ("classification", "closest", "random"),
    ("span", "ordered", "random"),
    ("regression", "fixed", "random"),
]


@pytest.mark.parametrize("problem, match, which", CASES)
def test_distillation_objective_by_hand(worlds, problem, match, which):
    world = worlds[problem]
    distill = Distill(0.3, 0.7, 2.0, match, num_layers=2, taught=which)
    embeddings = {"embeddings": world.params["embeddings"]}
    trainable = world.trainable()
    trainable["params"] = {k: v for k, v in world.params.items() if k != "embeddings"}
    loss_of = jax.jit(world.distillation(distill))
    output = world.output()
    logits = world.logits_by_hand(output.logits, 2.0)
    seen = set()
    for seed in range(1 if which == "even" else 6):
        key = jax.random.key(seed)
        loss, metrics = loss_of(
            trainable, embeddings, {}, world.teacher_outputs(distill), key
        )
        taught = (1, 3)
        if which == "random":
            taught = losses.draw_layers(
                objectives.key_for(key, "layers"), 4, 2
            ).tolist()
            assert taught[0] in (0, 1) and taught[1] in (2, 3)
        alive = [True, False, True, True]
        layers, matched = world.layers_by_hand(output, taught, match, alive)
        assert 1 not in matched
        assert set(metrics) == {"loss_logits", "loss_layers"}
        np.testing.assert_allclose(metrics["loss_logits"], logits, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss_layers"], layers, rtol=1e-4)
        np.testing.assert_allclose(loss, 0.3 * logits + 0.7 * layers, rtol=1e-4)
        seen.add(tuple(taught))
    assert len(seen) > 1 or which == "even"


@pytest.mark.parametrize("logits, layers", [(0.0, 1.0), (1.0, 0.0)])
def test_a_term_of_weight_zero_is_not_computed(worlds, logits, layers):
    world = worlds["classification"]
    teacher, params = Encoder(world.teacher), world.teacher_params
    for match in ("closest", "fixed"):
        distill = Distill(logits, layers, match=match)
        loss_of = objectives.DistillationObjective(teacher, distill)
        trainable = {"params": params, "distill_projection": jnp.eye(16)}
        if not layers:
            del trainable["distill_projection"]
        key = jax.random.key(0)
        batch = world.teacher_outputs(distill)
        del batch["teacher_outputs"]["states" if not layers else "logits"]
        loss, metrics = loss_of(trainable, {}, {}, batch, key)
        assert set(metrics) == {"loss_logits" if logits else "loss_layers"}
        assert abs(loss) < 1e-5  # a copy of the teacher has nothing to learn


@pytest.mark.parametrize("problem", LABELS)
def test_logits_alone(worlds, problem):
    world = worlds[problem]
    distill = Distill(0.5, 0.0, temperature=3.0)
    trainable, batch = {"params": world.params}, world.teacher_outputs(distill)
    loss_of = jax.jit(world.distillation(distill))
    loss, _ = loss_of(trainable, {}, {}, batch, jax.random.key(0))
    expected = 0.5 * world.logits_by_hand(world.output().logits, 3.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def random_masks(config, seed=7):
    """Gates in (0, 1), a third of them closed."""
    rng = np.random.default_rng(seed)
    return {
        kind: np.where(rng.random(shape) < 1 / 3, 0, rng.random(shape)).astype("f4")
        for kind, shape in mask_shapes(config).items()
    }


@pytest.mark.parametrize("problem", LABELS)
def test_without_a_teacher_the_labels_teach(dense_worlds, problem):
    """No teacher, no context, no projection; the masks count."""
    world = dense_worlds[problem]
    model, none = Encoder(world.student), Distill(logits=0.0, layers=0.0)
    loss_of = jax.jit(objectives.DistillationObjective(model, none))
    trainable, key = {"params": world.params}, jax.random.key(0)
    seen = []
    for masks in ({}, random_masks(world.student)):
        loss, metrics = loss_of(trainable, {}, {}, world.batch, key, masks)
        expected = world.task_by_hand(world.output(masks).logits)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        assert set(metrics) == {"loss_task"} and metrics["loss_task"] == loss
        seen.append(loss)
    assert abs(seen[0] - seen[1]) > 1e-3
    trained, _ = jax.jit(objectives.task_objective(model))(
        trainable, {}, {}, world.batch, key
    )
    np.testing.assert_allclose(trained, seen[0], rtol=1e-6)


def pruning_theta(world, log_alpha, **multipliers):
    multipliers = {"linear": 0.0, "quadratic": 0.0} | multipliers
    return world.trainable(
        log_alpha=log_alpha, multipliers=jax.tree.map(jnp.float32, multipliers)
    )


@pytest.mark.parametrize(
    "problem, distill",
    [
        ("span", Distill(0.0, 0.0)),
        ("span", Distill(0.3, 0.7, 2.0, "fixed", num_layers=2)),
        ("regression", Distill(0.3, 0.7, 2.0, "closest", num_layers=2)),
        (
            "regression",
            Distill(0.3, 0.7, 2.0, "ordered", num_layers=2, taught="random"),
        ),
    ],
    ids=str,
)
def test_pruning_objective_by_hand(dense_worlds, problem, distill):
    """The masks that the key draws, then imitation and penalty, each by hand."""
    world = dense_worlds[problem]
    rng = np.random.default_rng(4)
    log_alpha = {
        kind: rng.normal(0, 1, shape).astype(np.float32)
        for kind, shape in mask_shapes(world.student).items()
    }
    log_alpha["mha"][1] = log_alpha["ffn"][1] = -50  # surely dead
    trainable = pruning_theta(world, log_alpha, linear=2.0, quadratic=3.0)
    context = {"target_sparsity": 0.6, "warmup_steps": 0, "step": 9, "share": 1.0}
    batch = world.teacher_outputs(distill) if distill.logits else world.batch
    loss_of = jax.jit(world.pruning(distill))
    for seed in range(3):
        key = jax.random.key(seed)
        loss, metrics = loss_of(trainable, {}, context, batch, key)
        masks = masks_lib.sample(log_alpha, objectives.key_for(key, "masks"))
        output = world.output(masks)
        if not distill.logits:
            expected = world.task_by_hand(output.logits)
        else:
            taught = (1, 3)
            if distill.taught == "random":
                layers_key = objectives.key_for(key, "layers")
                taught = losses.draw_layers(layers_key, 4, 2).tolist()
            alive = losses.alive_layers(world.student, masks).tolist()
            assert not alive[1]
            layers, _ = world.layers_by_hand(output, taught, distill.match, alive)
            expected = 0.3 * world.logits_by_hand(output.logits, 2.0) + 0.7 * layers
        gap = constraint.expected_sparsity(log_alpha, world.student) - 0.6
        expected += 2 * gap + 3 * gap**2
        np.testing.assert_allclose(loss, expected, rtol=2e-4)
        assert ("loss_task" in metrics) == (not distill.logits)


def test_pruning_objective_with_open_gates(tiny, worlds):
    """Gates that are surely open leave imitation; then s = 0 and s - t = -t."""
    batch = worlds["classification"].batch
    config = dataclasses.replace(tiny, dropout=0.0)
    params, other = random_params(config, 3), random_params(config, 4)
    model, distill = Encoder(config), Distill()
    key = jax.random.key(0)
    batch |= {
        "teacher_outputs": teacher_lib.make_teacher_forward(model, distill)(
            other, batch
        )
    }
    trainable = {"params": params, "distill_projection": jnp.eye(16)}
    imitation, _ = objectives.DistillationObjective(model, distill)(
        trainable, {}, {}, batch, key
    )
    trainable |= {
        "log_alpha": {
            k: jnp.full(shape, 50.0) for k, shape in mask_shapes(config).items()
        },
        "multipliers": {"linear": jnp.float32(2.0), "quadratic": jnp.float32(3.0)},
    }
    context = {
        "target_sparsity": np.float32(0.6),
        "warmup_steps": np.int32(8),
        "share": np.float32(1),
    }
    loss_of = jax.jit(
        jax.value_and_grad(objectives.PruningObjective(model, distill), has_aux=True)
    )
    for step, target in ((0, 0.0), (2, 0.15), (8, 0.6), (100, 0.6)):
        context["step"] = np.int32(step)
        (loss, metrics), gradient = loss_of(trainable, {}, context, batch, key)
        np.testing.assert_allclose(metrics["target_sparsity"], target, atol=1e-6)
        np.testing.assert_allclose(metrics["expected_sparsity"], 0, atol=1e-5)
        penalty = -2 * target + 3 * target**2
        np.testing.assert_allclose(metrics["loss_lagrangian"], penalty, atol=1e-4)
        np.testing.assert_allclose(loss, imitation + penalty, atol=1e-4)
        multipliers = gradient["multipliers"]
        np.testing.assert_allclose(multipliers["linear"], -target, atol=1e-5)
        np.testing.assert_allclose(multipliers["quadratic"], target**2, atol=1e-5)


def test_pruning_objective_draws_gates_from_the_key(tiny, worlds):
    batch = worlds["classification"].batch
    model = Encoder(dataclasses.replace(tiny, dropout=0.0))
    params = random_params(tiny, 3)
    log_alpha = {kind: jnp.zeros(shape) for kind, shape in mask_shapes(tiny).items()}
    trainable = {
        "params": params,
        "distill_projection": jnp.eye(16),
        "log_alpha": log_alpha,
        "multipliers": {"linear": 0.0, "quadratic": 0.0},
    }
    context = {"target_sparsity": 0.5, "warmup_steps": 0, "step": 0, "share": 1.0}
    batch |= {
        "teacher_outputs": teacher_lib.make_teacher_forward(model, Distill())(
            params, batch
        )
    }
    loss_of = jax.jit(objectives.PruningObjective(model, Distill()))
    first, again, other = (
        loss_of(trainable, {}, context, batch, jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert first[0] == again[0] != other[0]
    expected = constraint.expected_sparsity(log_alpha, tiny)
    np.testing.assert_allclose(first[1]["expected_sparsity"], expected, rtol=1e-5)


def test_the_layer_term_in_bfloat16(worlds):
    """Matrix work in bfloat16, the term and the projection's gradient in float32."""
    world = worlds["classification"]
    model = Encoder(dataclasses.replace(world.student, dtype="bfloat16"))
    distill = Distill(num_layers=2)
    loss_of = objectives.DistillationObjective(model, distill)

    def loss(trainable):
        key = jax.random.key(0)
        return loss_of(trainable, {}, {}, world.teacher_outputs(distill), key)

    with_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, metrics), gradient = with_gradient(world.trainable())
    _, exact = world.distillation(distill)(
        world.trainable(), {}, {}, world.teacher_outputs(distill), jax.random.key(0)
    )
    for name, value in metrics.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact[name], rtol=0.05)
    assert gradient["distill_projection"].dtype == jnp.float32
