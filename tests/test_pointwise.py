import math

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax.models.layers import ACTIVATIONS, Dropout, Norm, gelu

pytestmark = pytest.mark.usefixtures("quick_compile")


def kept(function, *inputs):
    """The arrays that are kept for the backward pass, but for single numbers."""
    _, pull = jax.vjp(function, *inputs)
    return [x.shape for x in jax.tree.leaves(pull) if x.size > 1]


def drop(x, rate, seed=0, train=True):
    return Dropout(rate).apply(
        {}, x, train=train, rngs={"dropout": jax.random.key(seed)}
    )


def test_gelu_is_x_times_the_distribution():
    x = np.linspace(-12, 12, 4001)
    value = [t * (1 + math.erf(t / math.sqrt(2))) / 2 for t in x]
    slope = [
        (1 + math.erf(t / math.sqrt(2))) / 2
        + t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        for t in x
    ]
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(gelu(x), value, atol=2e-6)
    slopes = jax.vmap(jax.grad(ACTIVATIONS["gelu"]))(x)
    np.testing.assert_allclose(slopes, slope, atol=2e-6)


def test_gelu_rounds_once_in_half_precision():
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        gelu(x), gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_their_input_alone(name):
    assert kept(ACTIVATIONS[name], jnp.ones((3, 5))) == [(3, 5)]


@pytest.mark.parametrize("gates", [None, jnp.ones(5)])
def test_norm_keeps_its_input_alone(gates):
    norm, x = Norm(1e-12, "float32"), jax.random.normal(jax.random.key(0), (3, 5))
    params = norm.init(jax.random.key(0), x, gates)

    def call(params, x, gates):
        return norm.apply(params, x, gates)

    assert sum(shape == (3, 5) for shape in kept(call, params, x, gates)) == 1


def test_norm_is_layer_norm():
    x = 3 + jax.random.normal(jax.random.key(0), (4, 7, 12))
    ours, theirs = Norm(1e-12, "float32"), nn.LayerNorm(1e-12, use_fast_variance=False)
    params = ours.init(jax.random.key(0), x, None)
    params = jax.tree.map(
        lambda p: p + jax.random.normal(jax.random.key(1), p.shape), params
    )
    for open_ in (None, jnp.ones(12)):
        np.testing.assert_allclose(
            ours.apply(params, x, open_), theirs.apply(params, x), atol=1e-5
        )


@pytest.mark.parametrize("closed", [0, 1, 11, 12])
def test_norm_is_that_of_the_open_dimensions(closed):
    keys = jax.random.split(jax.random.key(closed), 6)
    gates = jax.random.uniform(keys[0], (12,), minval=0.2)
    gates = gates * (jax.random.permutation(keys[1], 12) >= closed)
    open_ = np.flatnonzero(gates)
    x = jax.random.normal(keys[2], (2, 3, 12)) * (gates > 0)
    weight = jax.random.normal(keys[3], x.shape)
    scale, bias = jax.random.normal(keys[4], (2, 12))

    def ours(x, scale, bias, gates):
        params = {"scale": scale, "bias": bias}
        return (
            Norm(1e-5, "float32").apply({"params": params}, x, gates) * weight
        ).sum()

    def sliced(x, scale, bias, gates):
        x, scale, bias, gates = (a[..., open_] for a in (x, scale, bias, gates))
        centred = x - x.mean(-1, keepdims=True) if len(open_) else x
        spread = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return (gates * (centred / spread * scale + bias) * weight[..., open_]).sum()

    def by_autodiff(x, scale, bias, gates):
        share = (gates > 0) / jnp.maximum((gates > 0).sum(), 1)
        centred = x - (x * share).sum(-1, keepdims=True)
        spread = jnp.sqrt((centred**2 * share).sum(-1, keepdims=True) + 1e-5)
        return ((centred / spread * scale + bias) * gates * weight).sum()

    inputs, which = (x, scale, bias, gates), (0, 1, 2, 3)
    np.testing.assert_allclose(ours(*inputs), sliced(*inputs), atol=1e-4)
    found, expected = (jax.grad(f, which)(*inputs) for f in (ours, by_autodiff))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.delete(found[0], open_, -1).any()


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(200, 500), (400, 251), (100_001,)])
def test_dropout_drops_so_many(rate, shape):
    found = drop(jnp.ones(shape), rate)
    count, size = int((found == 0).sum()), found.size
    deviation = math.sqrt(size * rate * (1 - rate))
    assert abs(count - size * rate) < 5 * deviation + size / 2**17


@hypothesis.given(st.floats(0, 0.9999), st.integers(1, 9))
@hypothesis.settings(max_examples=25, deadline=None)
def test_what_dropout_leaves_makes_up_for_the_rest(rate, width):
    share = np.float32(1 - round(rate * 2**16) / 2**16)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.linspace(1, 2, 64 * width, dtype=dtype).reshape(64, width)
        found = drop(x, rate)
        scaled = (x.astype(jnp.float32) / share).astype(dtype)
        np.testing.assert_array_equal(found, jnp.where(found == 0, 0, scaled))


def test_dropout_keeps_booleans_alone():
    shapes = kept(lambda x: drop(x, 0.5), jnp.ones((3, 5)))
    assert shapes == [(3, 5)]


def test_seeds_differ():
    one, other = (np.asarray(drop(jnp.ones(1000), 0.5, seed)) for seed in (0, 1))
    assert 400 < (one == other).sum() < 600


def test_halves_of_a_word_are_independent():
    dropped = np.asarray(drop(jnp.ones((2000, 100)), 0.5)) == 0
    both = (dropped[:, :50] & dropped[:, 50:]).sum()
    assert abs(both - 25_000) < 5 * math.sqrt(100_000 * 3 / 16)


def test_dropout_changes_nothing_where_it_does_not_train():
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(drop(x, 0.5, train=False), x)
    np.testing.assert_array_equal(drop(x, 0.0), x)


def test_dropout_at_its_largest_rate_has_finite_gradients():
    gradient = jax.grad(lambda x: drop(x, 1 - 1e-9).sum())(jnp.ones(1000))
    assert np.isfinite(gradient).all()


def test_dropout_keeps_the_dtype():
    assert drop(jnp.ones(8, jnp.bfloat16), 0.1).dtype == jnp.bfloat16
