"""The step: Adam by hand, two players, randomness, one trace, no hidden transfers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.config import Distill
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import hard_concrete, masks
from cofi_jax.pruning.masks import init_log_alpha
from cofi_jax.training import objectives
from cofi_jax.training import step as step_lib
from cofi_jax.training import teacher as teacher_lib
from cofi_jax.training.step import learning_rate

pytestmark = pytest.mark.usefixtures("quick_compile")


# Learning rates


def rate_at(rate, steps):
    return [float(step_lib.rate_at(step, **rate)) for step in steps]


def test_constant_rate():
    rate = learning_rate(0.3, "constant", 10)
    np.testing.assert_allclose(rate_at(rate, (0, 5, 10, 1000)), 0.3, rtol=1e-6)


def test_linear_rate_ends_at_zero():
    rate = learning_rate(2.0, "linear", 8)
    np.testing.assert_allclose(
        rate_at(rate, (0, 2, 4, 7, 8, 100)), [2, 1.5, 1, 0.25, 0, 0], atol=1e-6
    )


@pytest.mark.parametrize("schedule, end", [("constant", 1), ("linear", 0)])
def test_warm_up(schedule, end):
    """Step n of 4 has (n + 1) / 4 of the rate; not 0, which would waste the first."""
    rate = learning_rate(1.0, schedule, 100, warmup_steps=4)
    steps = np.arange(101)
    after = np.interp(steps, [4, 100], [1, end])
    expected = np.where(steps < 4, (steps + 1) / 4, after)
    np.testing.assert_allclose(rate_at(rate, steps), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 30, 99, 100, 150])
def test_every_rate_reaches_its_peak(schedule, warmup_steps):
    """And never goes beyond it, or below 0; unless the stage ends before that."""
    rate = learning_rate(1e-3, schedule, 100, warmup_steps)
    rates = rate_at(rate, range(100))
    peak = 1e-3 * min(1, 100 / max(warmup_steps, 1))
    np.testing.assert_allclose(max(rates), peak, rtol=1e-6)
    assert min(rates) > 0


# One step, with gradients that the test chooses


def chosen_gradients(trainable, frozen, context, batch, key):
    """A linear loss: its gradients are the batch."""
    del key
    both = dict(trainable, frozen=frozen)
    products = jax.tree.map(lambda x, g: jnp.sum(x * g), both, batch)
    return sum(jax.tree.leaves(products)), {}


class NumpyAdam:
    """Adam as in its paper (Kingma and Ba, algorithm 1)."""

    def __init__(self):
        self.step, self.mean, self.square = 0, 0.0, 0.0

    def __call__(self, gradient, rate):
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.step)
        square = self.square / (1 - 0.999**self.step)
        return -rate * mean / (np.sqrt(square) + 1e-8)


def toy_state(**rates):
    rates = {"weights": 0.1, "masks": 0.2, "multipliers": 0.3} | rates
    return step_lib.create_state(
        {
            "embeddings": {"word": np.array([5.0, 6.0], np.float32)},
            "layer": np.array([1.0, 2.0], np.float32),
        },
        seed=0,
        stage="toy",
        rates={k: learning_rate(v, "linear", 10) for k, v in rates.items()},
        freeze_embeddings=True,
        distill_projection=np.eye(2, dtype=np.float32),
        log_alpha={"ffn": np.array([0.5, -0.5], np.float32)},
        multipliers={"linear": 0.0, "quadratic": 0.0},
    )


def toy_gradients(rng, scale):
    return {
        "params": {"layer": scale * rng.standard_normal(2)},
        "distill_projection": scale * rng.standard_normal((2, 2)),
        "log_alpha": {"ffn": 1e3 * rng.standard_normal(2)},
        "multipliers": {"linear": rng.standard_normal(), "quadratic": 2.0},
        "frozen": {"embeddings": {"word": np.full(2, 1e6)}},
    }


def test_four_steps_of_numpy_adam():
    """Clipping sees the weights alone: not gates, not multipliers, nothing frozen."""
    step, state = step_lib.make_step(chosen_gradients), toy_state()
    adam = {k: NumpyAdam() for k in ("layer", "projection", "ffn", "l1", "l2")}
    layer, projection, ffn = np.array([1.0, 2.0]), np.eye(2), np.array([0.5, -0.5])
    l1 = l2 = 0.0
    rng = np.random.default_rng(0)
    # Adam forgets a constant factor, so norms on both sides of 1 have to alternate.
    for i, scale in enumerate((3.0, 0.05, 30.0, 0.2)):
        g = toy_gradients(rng, scale)
        batch = jax.tree.map(lambda x: np.asarray(x, np.float32), g)
        state, _ = step(state, {}, batch)
        weights = g["params"]["layer"], g["distill_projection"]
        norm = np.sqrt(sum((w**2).sum() for w in weights))
        assert (norm > 1) == (scale > 1)
        clip, decay = min(1, 1 / norm), 1 - i / 10
        layer = layer + adam["layer"](clip * weights[0], 0.1 * decay)
        projection = projection + adam["projection"](clip * weights[1], 0.1 * decay)
        ffn = ffn + adam["ffn"](g["log_alpha"]["ffn"], 0.2 * decay)
        l1 -= adam["l1"](g["multipliers"]["linear"], 0.3 * decay)
        l2 -= adam["l2"](g["multipliers"]["quadratic"], 0.3 * decay)
        for ours, expected in (
            (state.trainable["params"]["layer"], layer),
            (state.trainable["distill_projection"], projection),
            (state.trainable["log_alpha"]["ffn"], ffn),
            (state.trainable["multipliers"]["linear"], l1),
            (state.trainable["multipliers"]["quadratic"], l2),
        ):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert state.step == 4
    np.testing.assert_array_equal(state.frozen["embeddings"]["word"], [5.0, 6.0])


def test_first_step_goes_one_rate_down_and_multipliers_up():
    gradients = toy_gradients(np.random.default_rng(1), 0.1)
    state, _ = step_lib.make_step(chosen_gradients)(toy_state(), {}, gradients)
    signs = jax.tree.map(np.sign, gradients)
    np.testing.assert_allclose(
        state.trainable["params"]["layer"],
        [1, 2] - 0.1 * signs["params"]["layer"],
        rtol=1e-5,
    )
    for name in ("linear", "quadratic"):
        np.testing.assert_allclose(
            state.trainable["multipliers"][name],
            0.3 * signs["multipliers"][name],
            rtol=1e-5,
        )


def test_log_alpha_is_clamped():
    step, state = step_lib.make_step(chosen_gradients), toy_state(masks=3.0)
    gradients = toy_gradients(np.random.default_rng(0), 1.0)
    gradients["log_alpha"]["ffn"] = np.array([1.0, -1.0])
    for _ in range(3):
        state, _ = step(state, {}, gradients)
    # ln 0.01 and ln 100, each way.
    np.testing.assert_allclose(
        state.trainable["log_alpha"]["ffn"], [-4.60517, 4.60517], rtol=1e-6
    )


def test_embeddings_are_trained_where_they_are_not_frozen(tiny_params):
    rates = {"weights": learning_rate(1e-3, "constant", 1)}
    for frozen in (True, False):
        state = step_lib.create_state(
            tiny_params, seed=0, stage="x", rates=rates, freeze_embeddings=frozen
        )
        assert ("embeddings" in state.frozen) == frozen
        assert ("embeddings" in state.trainable["params"]) != frozen
        whole = objectives.whole_params(state.trainable, state.frozen)
        jax.tree.map(np.testing.assert_array_equal, whole, tiny_params)
    assert "embeddings" in tiny_params  # the caller's dict is left alone


# The pruning step on a small encoder

TOKENS = ("input_ids", "attention_mask", "token_type_ids")


class Pruning:
    """A pruning step that is compiled once for all tests below, and its teacher."""

    def __init__(self, config, batch):
        self.config, self.traces = config, 0
        self.teacher = jax.device_put(random_params(config, seed=3))
        model = Encoder(config)
        distill = Distill(num_layers=2)
        loss = objectives.PruningObjective(model, distill)

        def counted(*args):
            self.traces += 1
            return loss(*args)

        self.step = step_lib.make_step(counted)
        rows = {"labels": np.zeros(3, np.int32), "weight": np.ones(3, np.float32)}
        self.batch = jax.device_put(batch | rows)
        teach = teacher_lib.make_teacher_forward(model, distill)
        self.batch["teacher_outputs"] = teach(self.teacher, self.batch)

    def state(
        self,
        *,
        seed=0,
        stage="prune",
        rates=(1e-3, 0.1, 0.1),
        schedule=("constant", 100),
    ):
        names = ("weights", "masks", "multipliers")
        return step_lib.create_state(
            self.teacher,
            seed=seed,
            stage=stage,
            rates={
                name: learning_rate(peak, *schedule)
                for name, peak in zip(names, rates, strict=True)
            },
            freeze_embeddings=True,
            distill_projection=jnp.eye(self.config.hidden_size),
            log_alpha=init_log_alpha(self.config, jax.random.key(seed)),
            multipliers={"linear": 0.0, "quadratic": 0.0},
        )

    def context(self, target=0.5, warmup_steps=5):
        return jax.device_put(
            {
                "target_sparsity": np.float32(target),
                "warmup_steps": np.int32(warmup_steps),
                "share": np.float32(1),
            }
        )

    def run(self, steps, context=None, **settings):
        state, context = self.state(**settings), context or self.context()
        for _ in range(steps):
            state, metrics = self.step(state, context, self.batch)
        return state, metrics


@pytest.fixture(scope="module")
def pruning(tiny, tiny_batch):
    return Pruning(dataclasses.replace(tiny, dropout=0.1), tiny_batch)


def leaves(state):
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same(state, other):
    pairs = zip(leaves(state), leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_family_of_runs_is_one_program(pruning):
    """Rates, schedules, target, warm-up and seed are arrays: nothing is retraced."""
    pruning.run(2)
    pruning.run(2, pruning.context(target=0.9, warmup_steps=50), seed=9)
    pruning.run(2, rates=(1e-5, 0.01, 1.0), stage="another")
    pruning.run(2, schedule=("linear", 40, 3))
    assert pruning.traces == 1


def test_one_trace_for_each_length(pruning):
    pruning.run(1)
    before = pruning.traces
    longer = jax.device_get(pruning.batch)
    states = longer["teacher_outputs"]["states"]
    longer = {
        k: np.pad(v, ((0, 0), (0, 2))) if k in TOKENS else v for k, v in longer.items()
    }
    states = np.pad(states, ((0, 0), (0, 2), (0, 0), (0, 0)))
    longer["teacher_outputs"] = longer["teacher_outputs"] | {"states": states}
    state = pruning.state()
    for batch in (longer, pruning.batch, longer):
        state, _ = pruning.step(state, pruning.context(), jax.device_put(batch))
    assert pruning.traces == before + 1


def test_step_transfers_nothing(pruning):
    state, context = pruning.state(), pruning.context()
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = pruning.step(state, context, pruning.batch)
        with pytest.raises(Exception, match="[Dd]isallowed"):  # the guard guards
            pruning.step(state, context, jax.tree.map(np.asarray, pruning.batch))


def products(jaxpr):
    """The types of what each matrix product multiplies, in all programs within."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [variable.aval for variable in equation.invars]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: x is None):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("absent", ["skipped", "selected"])
def test_matrix_products_are_in_the_models_dtype(tiny, tiny_batch, absent, monkeypatch):
    """Forward and backward; but for the classifier's, which is float32."""
    config = dataclasses.replace(tiny, dtype="bfloat16", num_labels=5)
    if absent == "selected":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pruning = Pruning(config, tiny_batch)
    arguments = pruning.state(), pruning.context(), pruning.batch
    found = list(products(jax.make_jaxpr(pruning.step)(*arguments)))
    others = [pair for pair in found if not any(5 in x.shape for x in pair)]
    # Of each block 2 (6 of attention, 2 of the feed-forward) and the way back twice.
    assert len(others) > 2 * (6 + 2) * 3
    assert {x.dtype for pair in others for x in pair} == {jnp.dtype("bfloat16")}


def test_donation_leaves_what_others_hold(pruning):
    """The step may take the state's memory, and only that."""
    teacher = jax.device_get(pruning.teacher)
    names = ("weights", "masks", "multipliers")
    rates = jax.device_put({k: learning_rate(0.1, "constant", 1) for k in names})
    log_alpha = init_log_alpha(pruning.config, jax.random.key(0))
    projection = jnp.eye(16)
    context = pruning.context()
    state = step_lib.create_state(
        pruning.teacher,
        seed=0,
        stage="prune",
        rates=rates,
        freeze_embeddings=True,
        distill_projection=projection,
        log_alpha=log_alpha,
        multipliers={"linear": jnp.float32(0), "quadratic": jnp.float32(0)},
    )
    new, _ = pruning.step(state, context, pruning.batch)
    assert jax.tree.leaves(state.trainable)[0].is_deleted()
    for leaf in jax.tree.leaves((pruning.teacher, context, rates, log_alpha)):
        assert not leaf.is_deleted()
    assert not projection.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, pruning.teacher, teacher)
    # The best is a copy that outlives the trainable it was taken from.
    new, _ = pruning.step(new, context, pruning.batch)
    jax.block_until_ready(new.best)


def test_frozen_embeddings_stay_bit_for_bit(pruning):
    state, _ = pruning.run(5)
    jax.tree.map(
        np.testing.assert_array_equal,
        state.frozen["embeddings"],
        pruning.teacher["embeddings"],
    )
    layer = state.trainable["params"]["layer_0"]["ffn"]["up"]["kernel"]
    assert jnp.abs(layer - pruning.teacher["layer_0"]["ffn"]["up"]["kernel"]).max() > 0


def test_randomness_is_a_function_of_seed_stage_and_step(pruning):
    reference, metrics = pruning.run(3)
    again, same_metrics = pruning.run(3)
    assert same(reference, again)
    assert metrics == same_metrics
    # The same values at the start, so that only the noise can differ.
    for other in (
        pruning.state().replace(key=pruning.state(seed=1).key),
        pruning.state(stage="finetune"),
        pruning.state().replace(step=jnp.int32(1)),
    ):
        _, noisy = pruning.step(other, pruning.context(), pruning.batch)
        _, first = pruning.run(1)
        assert noisy["loss_layers"] != first["loss_layers"]


def test_expected_sparsity_reaches_the_target(pruning):
    """The game's equilibrium: the multipliers stop pushing where s = t."""
    state, context = pruning.state(rates=(1e-3, 0.1, 0.1)), pruning.context(0.5, 50)
    history = []
    for _ in range(400):
        state, metrics = pruning.step(state, context, pruning.batch)
        history.append(metrics["expected_sparsity"])
    history = np.array(jax.device_get(history))
    assert history[0] < 0.05  # it starts open
    assert np.abs(history[-50:] - 0.5).max() < 0.02
    gates = masks.evaluation_masks(state.trainable["log_alpha"])
    assert any((gate == 0).any() for gate in gates.values())
    for value in state.trainable["log_alpha"].values():
        low, high = hard_concrete.LOG_ALPHA_RANGE
        assert low - 1e-6 <= value.min() and value.max() <= high + 1e-6


# Prediction


def test_predict_is_the_model_in_evaluation(tiny, tiny_params, tiny_batch):
    model = Encoder(tiny)
    predict = predict_lib.make_predict(model)
    gates = {"ffn": jnp.array([0.0, 0.5])}
    for given in ({}, gates):
        expected = model.apply({"params": tiny_params, "masks": given}, tiny_batch)
        np.testing.assert_allclose(
            predict(tiny_params, given, tiny_batch), expected.logits, atol=1e-5
        )


def test_predictions_of_spans_are_zero_at_padding(tiny, tiny_batch):
    sizes = dataclasses.replace(tiny, problem="span", num_labels=2)
    model, params = Encoder(sizes), random_params(sizes, 5)
    real = tiny_batch["attention_mask"] > 0
    for given in ({}, {"ffn": jnp.array([0.0, 0.5])}):
        logits = predict_lib.make_predict(model)(params, given, tiny_batch)
        assert logits.shape == (*real.shape, 2)
        np.testing.assert_array_equal(logits[~real], 0)
        expected = model.apply({"params": params, "masks": given}, tiny_batch).logits
        np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)
        assert (np.abs(expected[~real]) > 0).all()  # else it would test nothing


# A batch in parts


@pytest.mark.parametrize(
    ("problem", "outputs"),
    [("classification", 3), ("regression", 1), ("span", 2), ("entities", 3)],
)
def test_parts_of_a_batch_are_the_batch(tiny, problem, outputs):
    """Losses and steps, with rows of different lengths and one without weight."""
    config = dataclasses.replace(
        tiny,
        dropout=0.0,
        problem=problem,
        num_labels=outputs,
        head="every" if problem == "entities" else "",
    )
    model, distill = Encoder(config), Distill(num_layers=2, match="fixed")
    rng = np.random.default_rng(0)
    lengths = np.array([6, 4, 1, 2, 6, 3])
    batch = {
        "input_ids": rng.integers(0, 17, (6, 6)).astype(np.int32),
        "attention_mask": (np.arange(6) < lengths[:, None]).astype(np.int32),
        "token_type_ids": np.zeros((6, 6), np.int32),
        "labels": np.zeros((6, 2) if problem == "span" else 6, np.int32),
        "weight": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }
    if problem == "entities":  # Each row has other words than the next one.
        labels = rng.integers(-1, 3, (6, 8)).astype(np.int16)
        batch["labels"] = np.where(np.arange(8) < lengths[:, None], labels, -1)
    teach = teacher_lib.make_teacher_forward(model, distill)
    batch["teacher_outputs"] = teach(random_params(config, 4), batch)
    names = ("weights", "masks", "multipliers")
    context = {
        "target_sparsity": np.float32(0.5),
        "warmup_steps": np.int32(1),
        "share": np.float32(1),
    }
    games = {
        "task": (objectives.task_objective(model), {}),
        "prune": (
            objectives.PruningObjective(model, distill),
            {
                "distill_projection": jnp.eye(16),
                "log_alpha": init_log_alpha(config, jax.random.key(0)),
                "multipliers": {"linear": 0.3, "quadratic": 0.2},
            },
        ),
    }
    if problem not in ("classification", "entities"):
        del games["task"]
    for stage, (game, trainable) in games.items():
        found = []
        for parts in (1, 3):
            state = step_lib.create_state(
                random_params(config, 3),
                seed=0,
                stage=stage,
                rates={n: learning_rate(1e-2, "constant", 1) for n in names},
                freeze_embeddings=False,
                **trainable,
            )
            step = step_lib.make_step(game, parts)
            state = state.replace(step=jnp.int32(5))  # past the target's warm-up
            state, metrics = step(state, context, batch)
            # Adam's moments after a step are those of the gradient, which is compared
            # here: where it is 0 but for rounding, the step's sign is chance.
            found.append((metrics, state.optimizer))
        for metrics, moments in found[1:]:
            for name, value in found[0][0].items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
                moments,
                found[0][1],
            )
    assert metrics["loss_lagrangian"] != 0


def test_parts_have_noise_of_their_own(pruning):
    """The gates are drawn once; with two equal halves only dropout tells them apart."""
    batch = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, 0), pruning.batch)
    model = Encoder(pruning.config)
    seen = []

    def loss(trainable, frozen, context, batch, key):
        gates = masks.sample(trainable["log_alpha"], objectives.key_for(key, "masks"))
        game = objectives.PruningObjective(model, Distill(num_layers=2))
        value, metrics = game(trainable, frozen, context, batch, key)
        jax.debug.callback(lambda *x: seen.append(x), gates["head"], value)
        return value, metrics

    step_lib.make_step(loss, 2)(pruning.state(), pruning.context(), batch)
    jax.effects_barrier()
    (gates, first), (others, second) = seen
    np.testing.assert_array_equal(gates, others)
    assert first != second
