"""A killed run goes on as if nothing had been; the best and the log are right."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.checkpoints.state import Checkpoints
from cofi_jax.config import Config
from cofi_jax.data import batches as batches_lib
from cofi_jax.data import tasks
from cofi_jax.errors import UserError
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.run import stages
from cofi_jax.training import log as log_lib
from cofi_jax.training import loop, objectives, step
from cofi_jax.training.step import learning_rate

BATCH, BUCKETS, STEPS = 6, (4, 9), 12


CLOCKS = ("seconds", "examples_per_second")


pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # What the storage library's own tasks leave behind when a file is damaged.
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
    ),
]


def examples_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 17, n).astype(np.int32) for n in lengths]
    labels = rng.integers(0, 3, len(lengths)).astype(np.int32)
    return batches_lib.Examples(ids, [np.zeros_like(i) for i in ids], labels)


def stream_of(examples, batch_size=BATCH, buckets=BUCKETS):
    sizes = {"batch_size": batch_size, "buckets": buckets}
    return functools.partial(
        batches_lib.stream, examples, **sizes, seed=57, stage="teacher"
    )


@pytest.fixture(scope="module")
def examples():
    """21 rows in batches of 6: 4 steps an epoch, the last one short."""
    return examples_of([1, 9, 4, 3, 5, 2, 8] * 3)


# Prediction in order


@pytest.mark.parametrize("rows, batch_size", [(1, 4), (8, 4), (11, 4), (3, 1)])
def test_predict_all_restores_the_order(rows, batch_size):
    lengths = np.random.default_rng(rows).integers(1, 10, rows)
    examples = examples_of(lengths)
    shapes = set()

    def predict(params, gates, batch):
        """Logits that name the row: the sum of its ids, its length, a constant."""
        real = batch["input_ids"] * batch["attention_mask"]
        shapes.add(real.shape)
        columns = (
            real.sum(1),
            batch["attention_mask"].sum(1),
            gates["x"] + 0 * real[:, 0],
        )
        return params * jnp.stack(columns, 1)

    logits = predict_lib.predict_all(
        predict,
        jnp.float32(2),
        {"x": jnp.float32(3)},
        examples,
        batch_size=batch_size,
        buckets=BUCKETS,
    )
    expected = [(2 * ids.sum(), 2 * len(ids), 6) for ids in examples.input_ids]
    np.testing.assert_array_equal(logits, np.array(expected))
    assert shapes <= {(batch_size, bucket) for bucket in BUCKETS}


@pytest.mark.parametrize("rows, batch_size", [(1, 4), (11, 4), (3, 1)])
def test_predict_all_pads_spans_to_the_last_bucket(rows, batch_size):
    lengths = np.random.default_rng(rows).integers(1, 5, rows)
    lengths[rows // 2] = 7
    examples = examples_of(lengths)
    shapes = set()

    def predict(params, gates, batch):
        """Logits that name the token: its id, and that times a constant."""
        del gates
        real = batch["input_ids"] * batch["attention_mask"]
        shapes.add(real.shape)
        return jnp.stack([real, params * real], -1)

    buckets = (4, 7, 9)  # no row needs the last one
    logits = predict_lib.predict_all(
        predict, jnp.int32(3), {}, examples, batch_size=batch_size, buckets=buckets
    )
    assert {length for _, length in shapes} <= {4, 7}
    assert logits.shape == (rows, 9, 2)
    expected = np.zeros_like(logits)
    for row, ids in zip(expected, examples.input_ids, strict=True):
        row[: len(ids)] = np.stack([ids, 3 * ids], -1)
    np.testing.assert_array_equal(logits, expected)


# Batches are a function of the step


def test_batches_from_any_step_are_those_of_the_whole(examples):
    def batches(first_step, count):
        stream = stream_of(examples)(first_step=first_step)
        return [batch for _, batch in itertools.islice(stream, count)]

    whole = batches(0, STEPS)
    for first in range(STEPS):
        rest = batches(first, STEPS - first)
        for ours, expected in zip(rest, whole[first:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, expected)
    for epoch in range(3):  # each row once an epoch
        seen = [
            tuple(ids[mask > 0])
            for batch in whole[4 * epoch : 4 * epoch + 4]
            for ids, mask, weight in zip(
                batch["input_ids"],
                batch["attention_mask"],
                batch["weight"],
                strict=True,
            )
            if weight
        ]
        assert sorted(seen) == sorted(tuple(ids) for ids in examples.input_ids)
    assert not np.array_equal(whole[0]["input_ids"], whole[4]["input_ids"])


# A real model, killed


class Killed(BaseException):
    """As a signal: nothing may catch it."""


class Training:
    """A one-layer encoder on random labels, with dropout; `run` is one process."""

    def __init__(self, examples):
        self.config = EncoderConfig(17, 8, (2,), 4, (4,), 8, 3, 9, dropout=0.2)
        self.examples, self.traces = examples, 0
        loss = objectives.task_objective(Encoder(self.config))

        def counted(*args):
            self.traces += 1
            return loss(*args)

        self.step = step.make_step(counted)

    def state(self):
        return step.create_state(
            random_params(self.config, 0),
            seed=1,
            stage="teacher",
            rates={"weights": learning_rate(0.01, "linear", STEPS, 3)},
            freeze_embeddings=True,
        )

    @staticmethod
    def evaluate(trainable, frozen):
        """A deterministic score that rises and falls."""
        kernel = jax.device_get(trainable["params"]["layer_0"]["ffn"]["up"]["kernel"])
        return loop.Evaluation(float(np.sin(1e3 * kernel.sum())), values={"extra": 1})

    def run(self, workdir, kill=None):
        """Runs to the end; `kill` is (where, n): its n-th call does not return."""

        def deadly(where, call):
            calls = itertools.count(1)

            def wrapped(*args, **kwargs):
                if kill == (where, next(calls)):
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        log = log_lib.MetricsLog(workdir / "metrics.jsonl")
        log.write = deadly("write", log.write)
        # Where a restored one lies: both run the same compiled step.
        state = jax.device_put(self.state(), jax.devices()[0])
        with (
            Checkpoints(workdir / "checkpoints") as saved,
            jax.transfer_guard("disallow"),  # on a GPU, a slip would cost silently
        ):
            saved.save = deadly("save", saved.save)
            return loop.fit(
                state,
                loop.Loop(
                    stage="teacher",
                    step=deadly("step", self.step),
                    context={},
                    batches=stream_of(self.examples),
                    total_steps=STEPS,
                    evaluate=deadly("evaluate", self.evaluate),
                    checkpoints=saved,
                    log=log,
                    every=loop.Every(log=3, evaluation=2, checkpoint=4),
                    start_counts=True,
                ),
            )


@pytest.fixture(scope="module")
def trained(examples):
    return Training(examples)


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    state, seconds = trained.run(workdir)
    return state, seconds, lines_of(workdir)


def lines_of(workdir):
    lines = log_lib.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def assert_identical(state, other):
    state, other = (s.replace(key=jax.random.key_data(s.key)) for s in (state, other))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, strict=True), state, other
    )


def test_an_uninterrupted_run(trained, uninterrupted):
    state, seconds, lines = uninterrupted
    assert state.step == STEPS and seconds > 0
    losses = [line["step"] for line in lines if "loss" in line]
    scores = {line["step"]: line["score"] for line in lines if "score" in line}
    assert losses == [2, 3, 4, 6, 8, 9, 10, 12]  # multiples of 2, 3 and 4
    assert list(scores) == [0, 2, 4, 6, 8, 10, 12]
    assert state.best_score == np.float32(max(scores.values()))
    best = loop.Evaluation(trained.evaluate(state.best, {}).score)
    assert best.score == max(scores.values())
    assert max(scores, key=scores.get) != STEPS  # else it would test nothing
    # One program for each padded length, evaluations and a new best included.
    assert trained.traces == len(BUCKETS)


KILLS = [
    [("step", 1)],
    [("step", 4)],
    [("step", 5)],
    [("step", 9)],
    [("step", 12)],
    [("evaluate", 2)],
    [("evaluate", 6)],
    [("save", 1)],
    [("save", 2)],
    [("save", 3)],
    [("write", 6)],
    [("step", 6), ("step", 1), ("step", 5), ("save", 1)],
]


@pytest.mark.parametrize("kills", KILLS, ids=str)
def test_a_killed_run_ends_with_the_same_bits(trained, uninterrupted, tmp_path, kills):
    for kill in kills:
        with pytest.raises(Killed):
            trained.run(tmp_path, kill)
    state, _ = trained.run(tmp_path)
    expected, _, lines = uninterrupted
    assert_identical(state, expected)
    assert lines_of(tmp_path) == lines


def test_a_finished_run_does_nothing_more(trained, uninterrupted, tmp_path):
    expected, seconds = trained.run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    state, again = trained.run(tmp_path, kill=("step", 1))
    assert_identical(state, expected)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert 0 < again <= seconds


def test_seconds_add_up_over_restarts(trained, tmp_path):
    with pytest.raises(Killed):
        trained.run(tmp_path, ("step", 9))
    log = tmp_path / "metrics.jsonl"
    lines = log_lib.read_metrics(log)
    for line in lines:
        if "seconds" in line and line["step"] == 8:
            line["seconds"] = 1000.0
    log.write_text("".join(map(log_lib._line, lines)))
    _, seconds = trained.run(tmp_path)
    assert 1000 < seconds < 1100


def test_a_damaged_checkpoint_is_warned_of(trained, uninterrupted, tmp_path, capsys):
    with pytest.raises(Killed):
        trained.run(tmp_path, ("step", 9))
    for file in (tmp_path / "checkpoints" / "8" / "state" / "d").iterdir():
        file.write_bytes(b"")
    state, _ = trained.run(tmp_path)
    assert_identical(state, uninterrupted[0])
    assert lines_of(tmp_path) == uninterrupted[2]
    warning = "checkpoints/8 is damaged"
    printed = capsys.readouterr()
    assert warning in printed.out + printed.err


# The best, and what is not finite, with a scripted step


def scripted_fit(
    tmp_path,
    evaluations,
    losses=None,
    checkpoint_every=4,
    log_every=1,
    start_counts=False,
):
    """Step n adds 1 to trainable; `evaluations` and `losses` are given in order."""
    losses = iter(losses or [{"loss": 1.0}] * len(evaluations))
    given, scores = list(evaluations), iter(evaluations)
    state = step.create_state(
        {"embeddings": np.zeros(1), "w": np.zeros(1)},
        seed=0,
        stage="toy",
        rates={"weights": learning_rate(0.1, "constant", 1)},
        freeze_embeddings=True,
    )

    @jax.jit
    def advance(state):
        trainable = jax.tree.map(lambda x: x + 1, state.trainable)
        return state.replace(step=state.step + 1, trainable=trainable)

    with Checkpoints(tmp_path / "checkpoints") as saved:
        return loop.fit(
            state,
            loop.Loop(
                stage="toy",
                step=lambda state, context, batch: (advance(state), next(losses)),
                context={},
                batches=stream_of(examples_of([3] * 4), 2, (4,)),
                total_steps=len(given) - start_counts,
                evaluate=lambda trainable, frozen: next(scores),
                checkpoints=saved,
                log=log_lib.MetricsLog(tmp_path / "metrics.jsonl"),
                every=loop.Every(
                    log_every, 1 if log_every == 1 else 100, checkpoint_every
                ),
                start_counts=start_counts,
            ),
        )


NAN = float("nan")


@pytest.mark.parametrize(
    "scores, best_step, best_score",
    [
        ([(0.5, True), (0.7, True), (0.6, True)], 2, 0.7),
        ([(0.5, True), (0.9, False), (0.6, True)], 3, 0.6),
        ([(0.7, True), (0.7, True), (0.1, True)], 1, 0.7),  # of equals the first
        ([(-2.0, True), (-1.0, True), (-3.0, True)], 2, -1.0),
        ([(0.5, False), (0.9, False), (0.6, False)], 0, -np.inf),
        ([(NAN, True), (0.5, True), (NAN, True)], 2, 0.5),
    ],
)
def test_the_best_is_kept(tmp_path, scores, best_step, best_score):
    state, _ = scripted_fit(tmp_path, [loop.Evaluation(*pair) for pair in scores])
    assert state.trainable["params"]["w"] == 3
    assert state.best["params"]["w"] == best_step
    assert state.best_score == np.float32(best_score)


@pytest.mark.parametrize(
    "scores, best_step", [([0.5, 0.4, 0.3], 0), ([0.5, 0.6, 0.3], 1), ([1, 1, 1], 0)]
)
def test_the_start_may_be_the_best(tmp_path, scores, best_step):
    evaluations = list(map(loop.Evaluation, scores))
    state, _ = scripted_fit(tmp_path, evaluations, start_counts=True)
    assert state.best["params"]["w"] == best_step
    assert state.best_score == np.float32(max(scores))
    lines = [line for line in lines_of(tmp_path) if "score" in line]
    assert [(line["step"], line["score"]) for line in lines] == [*enumerate(scores)]


@pytest.mark.parametrize("restored", [False, True])
def test_a_new_best_is_no_reason_to_compile_the_step_again(trained, restored):
    def signature(state):
        return jax.tree.map(lambda x: (x.aval, x.committed), state)

    state = trained.state()
    if restored:
        state = jax.device_put(state, jax.devices()[0])
    new = loop._with_best(state, loop.Evaluation(1.0))
    assert new.best_score == 1
    assert signature(new) == signature(state)


def test_evaluations_are_logged(tmp_path):
    evaluations = [loop.Evaluation(0.25 * i, False, {"sparsity": i}) for i in range(3)]
    scripted_fit(tmp_path, evaluations)
    lines = [line for line in lines_of(tmp_path) if "score" in line]
    assert lines == [
        {"stage": "toy", "step": i + 1, "score": 0.25 * i, "sparsity": i, "counts": 0}
        for i in range(3)
    ]


@pytest.mark.parametrize(
    "term, value, spoilt",
    [
        ("loss_layers", NAN, ("loss", "loss_layers", "gradient_norm")),
        ("gradient_norm", np.inf, ("gradient_norm",)),  # of a finite loss
        ("loss", NAN, ("loss",)),
    ],
)
def test_a_loss_that_is_not_finite(tmp_path, term, value, spoilt):
    """The step and the term are named, though the loop looks only now and then."""
    fine = {"loss": 1.0, "loss_layers": 0.5, "gradient_norm": 2.0}
    losses = [dict(fine) for _ in range(12)]
    losses[6] |= dict.fromkeys(spoilt, value)  # step 7
    losses[7] |= dict.fromkeys(fine, NAN)  # and all that follows
    evaluations = [loop.Evaluation(0.0)] * 12
    with pytest.raises(UserError) as caught:
        scripted_fit(tmp_path, evaluations, losses, log_every=4)
    message = str(caught.value)
    assert "toy" in message and f"{term}={value}" in message and "step 7 " in message
    assert "\n" not in message
    assert [line["step"] for line in lines_of(tmp_path)] == [4]
    # The checkpoint of step 4 is still good: going on from there ends well.
    state, _ = scripted_fit(tmp_path, evaluations, [fine] * 8, log_every=4)
    assert state.step == 12 and state.trainable["params"]["w"] == 12


# A start that is better than what training makes of it


@pytest.mark.parametrize("stage", ["teacher", "finetune"])
def test_a_stage_that_only_harms_returns_its_start(stage, tmp_path):
    """The training rows teach the opposite of what the model already knows."""
    config = Config(log_every=1, eval_every=1, checkpoint_every=2, eval_batch_size=6)
    config.data.task, config.data.max_length, config.data.buckets = "demo", 9, (9,)
    config.distill.logits = config.distill.layers = 0.0
    settings = getattr(config, stage)
    settings.batch_size, settings.epochs, settings.learning_rate = 6, 3, 0.5
    sizes = EncoderConfig(17, 8, (2,), 4, (4,), 8, 2, 9, dropout=0.0)
    model, params = Encoder(sizes), jax.device_put(random_params(sizes, 0))
    rows = examples_of([1, 9, 4, 3, 5, 2, 8] * 3)
    logits = predict_lib.predict_all(
        predict_lib.make_predict(model), params, {}, rows, batch_size=6, buckets=(9,)
    )
    known = logits.argmax(-1).astype(np.int32)
    assert 0 < known.sum() < len(known)  # both classes, so a constant is worse
    log = log_lib.MetricsLog(tmp_path / "metrics.jsonl")
    run = stages.Run(
        config,
        tmp_path,
        tasks.find(config.data),
        sizes,
        dataclasses.replace(rows, labels=1 - known),
        {"validation": dataclasses.replace(rows, labels=known)},
        log,
    )
    if stage == "teacher":
        found, _ = stages.train_teacher(run, model, params)
    else:
        student = stages.Student(params, jnp.eye(8))
        stair = stages.stairs(config.prune.targets)[0]
        (found, _), _ = stages.finetune(run, stair, model, student, None)
    scores = [x["score"] for x in log_lib.read_metrics(log.path) if "score" in x]
    assert scores[0] == 1 > max(scores[1:])
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_stages_see_the_same_rows_in_other_orders(tmp_path, monkeypatch):
    """Else pruning's first epoch would repeat that of pre-pruning."""
    config = Config(log_every=9, eval_every=9, checkpoint_every=9, eval_batch_size=6)
    config.data.task, config.data.max_length, config.data.buckets = "demo", 9, (9,)
    config.distill.logits = config.distill.layers = 0.0
    config.prune.batch_size, config.prune.epochs, config.prune.warmup_epochs = 6, 2, 1
    sizes = EncoderConfig(17, 8, (2,), 4, (4,), 8, 2, 9, dropout=0.0)
    model, params = Encoder(sizes), jax.device_put(random_params(sizes, 0))
    rows, seen = examples_of([1, 9, 4, 3, 5, 2, 8] * 3), []

    def look(state, context, batch):
        batch = jax.device_get(batch)
        seen.append(batch["input_ids"][batch["weight"] > 0].tolist())
        return state.replace(step=state.step + 1), {"loss": 1.0}

    monkeypatch.setattr(step, "make_step", lambda *_: look)
    monkeypatch.setattr(stages.Run, "score", lambda *_: 0.0)
    log = log_lib.MetricsLog(tmp_path / "metrics.jsonl")
    validation = {"validation": rows}
    task = tasks.find(config.data)
    run = stages.Run(config, tmp_path, task, sizes, rows, validation, log)
    student, _ = stages.preprune(run, model, params, None)
    stair = stages.stairs(config.prune.targets)[0]
    stages.learn_masks(run, stair, model, student, None)
    assert len(seen) == 8
    first, second = sum(seen[:4], []), sum(seen[4:], [])
    assert first != second and sorted(first) == sorted(second)
