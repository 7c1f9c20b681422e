"""What stages share: padded lengths; widths that are rounded to meet a target."""

import dataclasses

import jax
import numpy as np
import pytest

from cofi_jax.config import Config
from cofi_jax.data import batches, tasks
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, cost, masks, transforms
from cofi_jax.run import stages

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = EncoderConfig(
    vocab_size=17,
    hidden_size=64,
    heads=(4,) * 6,
    head_size=16,
    intermediate=(256,) * 6,
    pooler_size=64,
    num_labels=2,
)


def learned(seed):
    """Log-alphas as after pruning: of every kind some open, some closed."""
    rng = np.random.default_rng(seed)
    return {
        kind: rng.normal(1.0, 2.0, shape).astype(np.float32)
        for kind, shape in masks.mask_shapes(CONFIG).items()
    }


def widths(gates):
    return (np.asarray(gates["intermediate"]) > 0).sum(-1)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_rounded_widths_meet_the_target(seed, target):
    log_alpha = learned(seed)
    plain = constraint.target_masks(log_alpha, CONFIG, target)
    assert (widths(plain) % 32).any()
    gates = constraint.final_masks(
        log_alpha, CONFIG, target, transforms.round_to_multiple(intermediate=32)
    )
    assert not (widths(gates) % 32).any()
    assert cost.exact_sparsity(gates, CONFIG) >= target - 1e-3


def test_what_cannot_be_rounded_stays_as_it_is():
    """Every unit would be opened again, and no target be met."""
    log_alpha = learned(0)
    plain = constraint.target_masks(log_alpha, CONFIG, 0.9)

    def open_all(gates):
        return jax.tree.map(np.ones_like, gates)

    gates = constraint.final_masks(log_alpha, CONFIG, 0.9, open_all)
    jax.tree.map(np.testing.assert_array_equal, gates, plain)


def test_a_cpu_likes_all_widths_and_a_gpu_multiples_of_64():
    gates = constraint.target_masks(learned(1), CONFIG, 0.8)
    same = transforms.round_to_device("cpu")(gates)
    jax.tree.map(np.testing.assert_array_equal, same, gates)
    rounded = transforms.round_to_device("gpu")(gates)
    assert (widths(gates) % 64).any() and not (widths(rounded) % 64).any()
    assert (widths(rounded) >= widths(gates)).all()
    assert ((widths(rounded) == 0) == (widths(gates) == 0)).all()


# Padded lengths


def run_of(lengths, recover_epochs=1, buckets=()):
    """A run of two targets whose teacher is given."""
    config = Config()
    config.data.max_length, config.data.buckets = 64, buckets
    config.prune.targets, config.prune.recover_epochs = (0.5, 0.8), recover_epochs
    config.prune.epochs = config.prune.prepruning_epochs = 0
    config.finetune.epochs, config.teacher.path = 9, "some/teacher"
    ids = [np.full(length, 5, np.int32) for length in lengths]
    types = [np.zeros_like(row) for row in ids]
    rows = batches.Examples(ids, types, np.zeros(len(ids), np.int32))
    return stages.Run(config, None, tasks.find(config.data), CONFIG, rows, {}, None)


@pytest.mark.parametrize(
    "epochs, buckets, expected",
    [(2, (), (64,)), (3, (), (8, 64)), (3, (32,), (32, 64))],
)
def test_padded_lengths_suit_the_mean_of_the_stages(epochs, buckets, expected):
    """Of 640 rows, a second length saves 17,920 tokens of an epoch: 2.8 are enough."""
    run = run_of([8, 64] * 320, recover_epochs=epochs - 1, buckets=buckets)
    run.config.finetune.epochs = epochs + 1
    assert run.buckets == expected


def test_padded_lengths_suit_the_training_of_a_teacher_too():
    run = run_of([8, 64] * 320)
    run.config.finetune.epochs, run.config.teacher.epochs = 1, 30
    assert dataclasses.replace(run).buckets == (64,)  # The teacher is given.
    run.config.teacher.path = ""
    assert run.buckets == (8, 64)


def test_few_batches_share_a_length():
    """Also where the stages have more of them, but for those that are given."""
    run = run_of([8, 64] * 320, recover_epochs=30)
    assert run.buckets == (8, 64)
    found = list(stages._some_batches(run, "importance", 5))
    assert [batch["input_ids"].shape for batch in found] == [(32, 64)] * 5
    found = stages._some_batches(run_of([8, 64] * 3200), "importance", 100)
    assert {batch["input_ids"].shape[1] for batch in found} == {8, 64}
    given = run_of([8, 29] * 320, buckets=(12,))
    found = stages._some_batches(given, "importance", 20)
    assert {batch["input_ids"].shape[1] for batch in found} == {12, 64}
