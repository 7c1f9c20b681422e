"""Widths that are rounded, and the target that is met all the same."""

import jax
import numpy as np
import pytest

from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import constraint, cost, masks, transforms

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
