import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax.models.layers import if_present

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


def cond(present, block, fixed, x, *operands):
    """What JAX makes of it."""
    return jax.lax.cond(present, block, lambda _, x, *__: x, fixed, x, *operands)


def agree(of, dtype=jnp.float32):
    found, expected = of(if_present), of(cond)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-5 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("frozen", ["x", "params", "gates", "all"])
def test_one_program_with_several_things_frozen(frozen):
    """A layer is traced once, whatever is differentiated of it in each place."""
    fixed, *others = inputs()
    known = dict(zip(("x", "params", "gates"), others, strict=True))
    frozen = set(known) if frozen == "all" else {frozen}

    def of(choose):
        @jax.jit
        def layer(*rest):
            return choose(jnp.array(True), block, fixed, *rest)

        def several(x, params, gates):
            given = dict(x=x, params=params, gates=gates)
            some = (known[n] if n in frozen else given[n] for n in known)
            y = layer(*some)
            y = layer(y, known["params"], gates)
            y = layer(y + x, params, known["gates"])
            return jnp.sin(layer(y, params, gates)).sum()

        return jax.grad(several, (0, 1, 2))(*others)

    agree(of)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("present", [True, False])
def test_dtypes_are_kept(dtype, present):
    fixed, x, params, gates = inputs()
    x, params = jax.tree.map(lambda a: a.astype(dtype), (x, params))

    def low(fixed, x, params, gates):
        return block(fixed, x, params, gates).astype(dtype)

    def of(choose):
        def total(*rest):
            return choose(jnp.array(present), low, fixed, *rest).sum()

        return jax.value_and_grad(total, (0, 1, 2))(x, params, gates)

    agree(of, dtype)


def test_the_same_array_twice_and_computed_again():
    fixed, x, params, gates = inputs()

    def of(choose):
        def both(fixed, x, one, other):
            return block(fixed, block(fixed, x, one, gates), other, gates)

        @jax.checkpoint
        def total(x, params):
            return choose(jnp.array(True), both, fixed, x, params, params).sum()

        return jax.grad(total, (0, 1))(x, params)

    agree(of)


def test_a_block_is_traced_once():
    fixed, *rest = inputs()
    traced = chex.assert_max_traces(block, n=1)

    def total(*rest):
        return if_present(jnp.array(True), traced, fixed, *rest).sum()

    jax.jit(jax.grad(total))(*rest)


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
