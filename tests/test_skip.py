import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax.skip import if_present

KERNEL = (6, 5)


def block(fixed, x, params, gates):
    """Saves operands (x, kernel) and what it computes of them for the way back."""
    shift, mask = fixed
    y = jnp.tanh(x @ params["kernel"] + shift) * gates["unit"]
    return x + mask * (y @ params["kernel"].T) * gates["outer"]


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 6))
    params = {"kernel": jax.random.normal(keys[1], KERNEL)}
    gates = {"unit": jax.random.uniform(keys[2], (5,)), "outer": jnp.float32(0.7)}
    return (jnp.float32(0.3), jnp.int32(1)), x, params, gates


def loss(choose, present, operands):
    fixed, *rest = operands
    return jax.value_and_grad(
        lambda *rest: jnp.sum(jnp.sin(choose(present, fixed, *rest))), (0, 1, 2)
    )(*rest)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("jitted", [True, False])
def test_values_and_gradients_are_those_of_a_choice(present, jitted):
    def skipping(present, fixed, *rest):
        return if_present(present, block, fixed, *rest)

    def choosing(present, fixed, *rest):
        return block(fixed, *rest) if present else rest[0]

    run = functools.partial(loss, skipping)
    found = (jax.jit(run) if jitted else run)(jnp.array(present), inputs())
    expected = loss(choosing, present, inputs())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected
    )


def test_it_differentiates_in_a_loop():
    fixed, x, params, gates = inputs()

    def repeat(params):
        def once(x, present):
            return if_present(present, block, fixed, x, params, gates), None

        return jax.lax.scan(once, x, jnp.array([True, False, True]))[0].sum()

    def twice(params):
        return block(fixed, block(fixed, x, params, gates), params, gates).sum()

    found, expected = jax.grad(repeat)(params), jax.grad(twice)(params)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=1e-5)


def test_forward_pass_hands_no_operand_over():
    fixed, x, params, gates = inputs()

    def forward(present, params):
        out, pull = jax.vjp(
            lambda p: if_present(present, block, fixed, x, p, gates), params
        )
        return out, pull(out)

    text = jax.make_jaxpr(forward)(jnp.array(True), params)
    first, second = (eqn for eqn in text.eqns if eqn.primitive.name == "cond")
    assert KERNEL not in [v.aval.shape for v in first.outvars]
    assert KERNEL in [v.aval.shape for v in second.outvars]  # its gradient
    assert (3, 5) in [v.aval.shape for v in first.outvars]  # what was computed


def test_a_gpu_chooses(monkeypatch):
    fixed, *rest = inputs()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = jax.make_jaxpr(lambda p: if_present(p, block, fixed, *rest))(jnp.array(True))
    assert "cond" not in [eqn.primitive.name for eqn in text.eqns]
    for present in (True, False):
        found = if_present(jnp.array(present), block, fixed, *rest)
        expected = block(fixed, *rest) if present else rest[0]
        np.testing.assert_array_equal(found, expected)
