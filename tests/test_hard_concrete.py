"""The distribution against its closed form and against sampling in NumPy.

The stretched variable has the distribution function

    F(x) = sigmoid(T * logit((x - low) / (high - low)) - log_alpha)

with T = 2/3, low = -0.1, high = 1.1. Clipping gives P(0) = F(0), P(1) = 1 - F(1).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from cofi_jax.pruning import hard_concrete

LOG_ALPHAS = [-4.605, -3.0, -1.5986, -0.4, 0.0, 2.0, 3.3, 4.605]


GRID = (np.arange(200_000, dtype=np.float64) + 0.5) / 200_000


def cdf(x, log_alpha):
    return expit(2 / 3 * logit((x + 0.1) / 1.2) - log_alpha)


def mean(log_alpha):
    # E z is the integral of 1 - F over [0, 1].
    x = (np.arange(10_000) + 0.5) / 10_000
    return np.mean(1 - cdf(x, log_alpha))


def on_grid(log_alpha):
    """Gates at evenly spaced noise: averages over them are integrals over u."""
    return np.asarray(hard_concrete.quantile(jnp.asarray(GRID, jnp.float32), log_alpha))


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_gates_have_the_closed_form_masses_and_mean(log_alpha):
    gates = on_grid(log_alpha)
    assert np.mean(gates == 0) == pytest.approx(cdf(0, log_alpha), abs=2e-5)
    assert np.mean(gates == 1) == pytest.approx(1 - cdf(1, log_alpha), abs=2e-5)
    for x in (0.1, 0.5, 0.9):
        assert np.mean(gates <= x) == pytest.approx(cdf(x, log_alpha), abs=2e-5)
    assert gates.mean(dtype=float) == pytest.approx(mean(log_alpha), abs=2e-5)
    active = float(hard_concrete.prob_active(jnp.float32(log_alpha)))
    assert active == pytest.approx(1 - cdf(0, log_alpha), rel=1e-5)


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_gates_agree_with_a_sample_drawn_in_numpy(log_alpha):
    size = 400_000
    logistic = np.random.default_rng(3).logistic(size=size)
    sample = np.clip(expit((logistic + log_alpha) / (2 / 3)) * 1.2 - 0.1, 0, 1)
    gates = on_grid(log_alpha)
    for statistic in (lambda z: z == 0, lambda z: z == 1, lambda z: z):
        drawn = statistic(sample).astype(float)
        error = 4 * drawn.std() / np.sqrt(size) + 1e-5
        assert statistic(gates).mean(dtype=float) == pytest.approx(
            drawn.mean(), abs=error
        )
    active = float(hard_concrete.prob_active(jnp.float32(log_alpha)))
    assert active == pytest.approx(np.mean(sample > 0), abs=4 / np.sqrt(size) / 2)


@pytest.mark.parametrize(
    ("log_alpha", "zero", "one", "average", "soft"),
    [
        (-4.605, 0.953, 0.002, 0.013, 0.0040),
        (-1.5986, 0.500, 0.039, 0.194, 0.128),
        (0.0, 0.168, 0.168, 0.500, 0.500),
        (2.0, 0.027, 0.599, 0.857, 0.917),
        (4.605, 0.002, 0.953, 0.987, 0.9960),
    ],
)
def test_table_of_the_original(log_alpha, zero, one, average, soft):
    gates = on_grid(log_alpha)
    assert np.mean(gates == 0) == pytest.approx(zero, abs=6e-4)
    assert np.mean(gates == 1) == pytest.approx(one, abs=6e-4)
    assert gates.mean(dtype=float) == pytest.approx(average, abs=6e-4)
    assert 1 - hard_concrete.prob_active(log_alpha) == pytest.approx(zero, abs=6e-4)
    assert hard_concrete.deterministic(log_alpha) == pytest.approx(soft, abs=6e-4)


def test_deterministic_is_a_sigmoid_of_slope_1_2():
    x = np.linspace(-4.6, 4.6, 47)
    values = hard_concrete.deterministic(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(values, expit(1.2 * x), rtol=2e-6)


def test_quantile_inverts_the_distribution_function():
    x, log_alpha = np.meshgrid(np.linspace(0.02, 0.98, 25), LOG_ALPHAS)
    u = jnp.asarray(cdf(x, log_alpha), jnp.float32)
    # F rises steeply in x where log_alpha is far from 0, and u is rounded there.
    np.testing.assert_allclose(hard_concrete.quantile(u, log_alpha), x, atol=2e-5)


def test_quantile_rises_with_the_noise_and_with_log_alpha():
    u = jnp.linspace(1e-6, 1 - 1e-6, 5001)[:, None]
    gates = np.asarray(
        hard_concrete.quantile(u, jnp.linspace(*hard_concrete.LOG_ALPHA_RANGE, 41))
    )
    assert (np.diff(gates, axis=0) >= 0).all() and (np.diff(gates, axis=1) >= 0).all()
    assert gates.min() == 0 and gates.max() == 1
    inside = (gates[1:] > 0) & (gates[:-1] < 1)
    assert (np.diff(gates, axis=0)[inside] > 0).mean() > 0.99


def test_quantile_is_symmetric():
    """Noise and location mirrored: the gate is mirrored, as STRETCH is around 1/2."""
    u = jnp.linspace(0.001, 0.999, 999)
    for log_alpha in LOG_ALPHAS:
        mirrored = 1 - hard_concrete.quantile(1 - u, -log_alpha)
        np.testing.assert_allclose(
            hard_concrete.quantile(u, log_alpha), mirrored, atol=3e-5
        )


def test_gradients_inside_the_clamp_are_finite_and_right():
    log_alpha = np.linspace(*hard_concrete.LOG_ALPHA_RANGE, 93)
    noise = np.concatenate([[1e-6, 1e-3], np.linspace(0.01, 0.99, 33), [1 - 1e-6]])
    u, la = (a.ravel() for a in np.meshgrid(noise, log_alpha))
    gradient = jax.vmap(jax.grad(hard_concrete.quantile, argnums=1))(
        jnp.asarray(u, jnp.float32), jnp.asarray(la, jnp.float32)
    )
    assert np.isfinite(gradient).all()
    s = expit((logit(u) + la) * 1.5)
    edge = np.minimum(np.abs(1.2 * s - 0.1), np.abs(1.2 * s - 1.1)) < 1e-4
    inside = (1.2 * s > 0.1) & (1.2 * s < 1.1)
    expected = np.where(inside, 1.2 * 1.5 * s * (1 - s), 0)
    np.testing.assert_allclose(gradient[~edge], expected[~edge], atol=2e-5)

    p = 1 - cdf(0, log_alpha)
    slope = jax.vmap(jax.grad(hard_concrete.prob_active))(
        jnp.asarray(log_alpha, jnp.float32)
    )
    # 1 - p is rounded to the grid of float32 below 1.
    np.testing.assert_allclose(slope, p * (1 - p), atol=1.2e-7)
    assert (np.asarray(slope) > 1e-3).all()  # a gate can always come back


def test_clamp_keeps_the_range():
    low, high = np.log(0.01), np.log(100)
    assert pytest.approx((low, high)) == hard_concrete.LOG_ALPHA_RANGE
    x = jnp.array([-jnp.inf, -10, -4.6, 0, 4.6, 10, jnp.inf])
    expected = np.array([low, low, -4.6, 0, 4.6, high, high])
    np.testing.assert_allclose(hard_concrete.clamp(x), expected, rtol=1e-6)
    np.testing.assert_array_equal(
        hard_concrete.clamp(hard_concrete.clamp(x)), hard_concrete.clamp(x)
    )


def test_closing_distance_leads_from_fully_open_to_one_half():
    assert pytest.approx(6.2, abs=0.01) == hard_concrete.CLOSING_DISTANCE
    middle = hard_concrete.LOG_ALPHA_RANGE[1] - hard_concrete.CLOSING_DISTANCE
    assert cdf(0, middle) == pytest.approx(0.5, abs=1e-12)
    assert float(hard_concrete.prob_active(middle)) == pytest.approx(0.5, abs=1e-6)
