"""Laws of the encoder: padding, masks, dropout, precision and absent blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.models.bert import Encoder, abstract_params, init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning.masks import mask_shapes

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.partial(jax.jit, static_argnames=("config", "train"))
def apply(config, params, batch, masks=None, key=None, train=False):
    variables = {"params": params} | ({"masks": masks} if masks is not None else {})
    rngs = {"dropout": key} if train else {}
    return Encoder(config).apply(variables, batch, train=train, rngs=rngs)


def open_masks(config):
    return {k: jnp.ones(shape) for k, shape in mask_shapes(config).items()}


def pad(batch, extra, fill):
    """`extra` more positions, masked; their ids and types are `fill`."""
    width = ((0, 0), (0, extra))
    return {
        name: np.pad(array, width, constant_values=0 if "mask" in name else fill)
        for name, array in batch.items()
    }


# Parameters


@pytest.fixture(scope="module")
def fresh(tiny):
    return init_params(tiny, jax.random.key(0))


def test_abstract_params_are_the_shapes_of_the_real_ones(tiny, fresh):
    shape_of = jax.eval_shape(lambda x: x, fresh)
    assert shape_of == abstract_params(tiny)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_parameter_count_is_that_of_bert_base():
    """109 483 778 with a classifier of two, as everyone counts it."""
    config = EncoderConfig(30522, 768, (12,) * 12, 64, (3072,) * 12, 768, 2)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(config))]
    assert sum(sizes) == 109_483_778


def test_init_is_berts(fresh):
    for path, leaf in jax.tree.leaves_with_path(fresh):
        if path[-1].key == "bias":
            np.testing.assert_array_equal(leaf, 0)
        elif path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            error = 5 / np.sqrt(leaf.size)  # five standard errors
            assert abs(float(leaf.std()) / 0.02 - 1) < error
            assert abs(float(leaf.mean())) / 0.02 < error


def test_absent_blocks_have_no_parameters(tiny, tiny_batch):
    config = dataclasses.replace(tiny, heads=(0, 2), intermediate=(0, 0))
    params = random_params(config, 0)
    assert set(params) == {"embeddings", "layer_1", "pooler", "classifier"}
    assert set(params["layer_1"]) == {"attention", "attention_norm"}
    assert params["layer_1"]["attention"]["query"]["kernel"].shape == (16, 2, 4)
    states = apply(config, params, tiny_batch).hidden_states
    assert len(states) == 3
    np.testing.assert_array_equal(states[0], states[1])
    assert jnp.abs(states[2] - states[1]).max() > 0.1


def test_config_survives_json(tiny):
    fields = dataclasses.asdict(tiny) | {"heads": [3, 0], "intermediate": [0, 6]}
    config = EncoderConfig.from_json(fields)
    assert config == dataclasses.replace(tiny, heads=(3, 0), intermediate=(0, 6))
    hash(config)  # jax.jit takes it as a static argument


# The forward pass


def test_numpy_agrees(tiny, tiny_params, tiny_batch):
    """The paper's equations, written once more with loops instead of einsums."""
    from scipy.special import erf

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), tiny_params)

    def norm(x, node):
        centred = x - x.mean()
        normal = centred / np.sqrt((centred**2).mean() + tiny.layer_norm_eps)
        return normal * node["scale"] + node["bias"]

    def dense(x, node):
        return x @ node["kernel"] + node["bias"]

    for row in range(3):
        length = tiny_batch["attention_mask"][row].sum()
        ids, types = (
            tiny_batch[k][row, :length] for k in ("input_ids", "token_type_ids")
        )
        tables = p["embeddings"]
        x = tables["word"][ids] + tables["position"][:length] + tables["type"][types]
        x = np.stack([norm(token, tables["norm"]) for token in x])
        expected = [x]
        for i in range(2):
            layer = p[f"layer_{i}"]
            attention, ffn = layer["attention"], layer["ffn"]
            y = np.zeros_like(x) + attention["output"]["bias"]
            for h in range(3):
                q, k, v = (
                    x @ attention[n]["kernel"][:, h] + attention[n]["bias"][h]
                    for n in ("query", "key", "value")
                )
                weights = np.exp(q @ k.T / np.sqrt(4))
                weights /= weights.sum(-1, keepdims=True)
                y += weights @ v @ attention["output"]["kernel"][h]
            x = np.stack([norm(token, layer["attention_norm"]) for token in x + y])
            up = dense(x, ffn["up"])
            y = dense(up * 0.5 * (1 + erf(up / np.sqrt(2))), ffn["down"])
            x = np.stack([norm(token, layer["ffn_norm"]) for token in x + y])
            expected.append(x)
        logits = dense(np.tanh(dense(x[0], p["pooler"])), p["classifier"])
        output = apply(tiny, tiny_params, tiny_batch)
        states = np.stack(output.hidden_states)[:, row, :length]
        np.testing.assert_allclose(states, np.stack(expected), rtol=0, atol=2e-5)
        np.testing.assert_allclose(output.logits[row], logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fill", [0, 1])
def test_padding_changes_nothing(tiny, tiny_params, tiny_batch, fill):
    plain = apply(tiny, tiny_params, tiny_batch)
    padded = apply(tiny, tiny_params, pad(tiny_batch, 3, fill))
    np.testing.assert_allclose(padded.logits, plain.logits, rtol=0, atol=1e-5)
    real = tiny_batch["attention_mask"] > 0
    for ours, theirs in zip(padded.hidden_states, plain.hidden_states, strict=True):
        np.testing.assert_allclose(ours[:, :6][real], theirs[real], rtol=0, atol=1e-5)


def test_company_changes_nothing(tiny, tiny_params, tiny_batch):
    together = apply(tiny, tiny_params, tiny_batch).logits
    for row in range(3):
        length = tiny_batch["attention_mask"][row].sum()
        alone = {k: v[row : row + 1, :length] for k, v in tiny_batch.items()}
        logits = apply(tiny, tiny_params, alone).logits
        np.testing.assert_allclose(logits[0], together[row], rtol=0, atol=1e-5)


# Masks


def test_open_masks_are_no_masks(tiny, tiny_params, tiny_batch):
    plain = apply(tiny, tiny_params, tiny_batch)
    gated = apply(tiny, tiny_params, tiny_batch, open_masks(tiny))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), plain, gated
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        plain,
        apply(tiny, tiny_params, tiny_batch, {}),
    )


@pytest.mark.parametrize(
    "closed",
    [("mha", "ffn"), ("head", "intermediate"), ("mha", "intermediate")],
    ids="+".join,
)
def test_closed_blocks_pass_their_input_on(tiny, tiny_params, tiny_batch, closed):
    masks = open_masks(tiny)
    for kind in closed:
        masks[kind] = masks[kind].at[0].set(0)
    states = apply(tiny, tiny_params, tiny_batch, masks).hidden_states
    np.testing.assert_array_equal(states[1], states[0])
    assert jnp.abs(states[2] - states[1]).max() > 0.1


def test_closed_hidden_dimensions_stay_zero(tiny, tiny_params, tiny_batch):
    gates = jnp.ones(16).at[jnp.array([0, 5, 15])].set(0)
    masks = open_masks(tiny) | {"hidden": gates}
    states = jnp.stack(apply(tiny, tiny_params, tiny_batch, masks).hidden_states)
    np.testing.assert_array_equal(jnp.abs(states[..., gates == 0]), 0)
    # The others' statistics are their own: LayerNorm undone, mean 0 and variance 1.
    norm = tiny_params["layer_1"]["ffn_norm"]
    normal = ((states[-1] - norm["bias"]) / norm["scale"])[..., gates > 0]
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normal.var(-1), 1, atol=1e-4)


def test_unknown_mask_kind_is_refused(tiny, tiny_params, tiny_batch):
    with pytest.raises(ValueError, match="heads"):
        apply(tiny, tiny_params, tiny_batch, {"heads": jnp.ones((2, 3))})


# Dropout


def test_dropout_only_in_training(tiny, tiny_params, tiny_batch):
    config = dataclasses.replace(tiny, dropout=0.5)
    evaluate = apply(config, tiny_params, tiny_batch).logits
    none = dataclasses.replace(tiny, dropout=0.0)
    np.testing.assert_array_equal(evaluate, apply(none, tiny_params, tiny_batch).logits)
    keys = jax.random.split(jax.random.key(0))
    train = [
        apply(config, tiny_params, tiny_batch, key=k, train=True).logits for k in keys
    ]
    again = apply(config, tiny_params, tiny_batch, key=keys[0], train=True).logits
    np.testing.assert_array_equal(train[0], again)
    assert jnp.abs(train[0] - train[1]).max() > 1e-3
    assert jnp.abs(train[0] - evaluate).max() > 1e-3


def test_dropout_zeroes_its_share_of_the_embeddings(tiny, tiny_params):
    config = dataclasses.replace(tiny, dropout=0.3, heads=(0, 0), intermediate=(0, 0))
    shape = (200, 9)
    batch = {k: np.ones(shape, np.int32) for k in ("input_ids", "attention_mask")}
    batch["token_type_ids"] = np.zeros(shape, np.int32)
    plain = apply(config, tiny_params, batch).hidden_states[0]
    key = jax.random.key(1)
    dropped = apply(config, tiny_params, batch, key=key, train=True).hidden_states[0]
    share = float((dropped == 0).mean())
    assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / plain.size)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.7, rtol=1e-5)


# Precision


def test_every_dropout_has_a_key_of_its_own(tiny, tiny_params, tiny_batch, monkeypatch):
    bits, keys = jax.random.bits, []

    def seen(key, *args):
        jax.debug.callback(
            lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key)
        )
        return bits(key, *args)

    monkeypatch.setattr(jax.random, "bits", seen)
    model = Encoder(dataclasses.replace(tiny, dropout=0.3))  # that none has traced
    noise = {"dropout": jax.random.key(0)}
    model.apply({"params": tiny_params}, tiny_batch, train=True, rngs=noise)
    jax.effects_barrier()
    # Embeddings, pooler; in each of two layers the attention and after each block.
    assert len(keys) == len(set(keys)) == 2 + 2 * 3


def test_bfloat16_is_close_and_float32_outside(tiny, tiny_params, tiny_batch):
    config = dataclasses.replace(tiny, dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))}
    assert dtypes == {jnp.dtype("float32")}
    low = apply(config, tiny_params, tiny_batch)
    assert low.logits.dtype == jnp.float32
    assert {h.dtype for h in low.hidden_states} == {jnp.dtype("bfloat16")}
    exact = apply(tiny, tiny_params, tiny_batch).logits
    error = jnp.linalg.norm(low.logits - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 5e-2


def test_bfloat16_gradients_are_float32(tiny, tiny_params, tiny_batch):
    config = dataclasses.replace(tiny, dtype="bfloat16")

    def loss(params, masks):
        return apply(config, params, tiny_batch, masks).logits.sum()

    gradients = jax.grad(loss, argnums=(0, 1))(tiny_params, open_masks(tiny))
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()


def test_gradients_are_finite_where_all_gates_are_closed(tiny, tiny_params, tiny_batch):
    def loss(params, masks):
        return apply(tiny, params, tiny_batch, masks).logits.sum()

    masks = jax.tree.map(jnp.zeros_like, open_masks(tiny))
    for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(tiny_params, masks)):
        assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gates_stay_float32(tiny, tiny_params, tiny_batch, kind):
    """A gate that bfloat16 would round to 1 still tells."""
    config = dataclasses.replace(tiny, dtype="bfloat16")
    gate = np.float32(1 - 2**-10)
    assert jnp.bfloat16(gate) == 1
    shape = mask_shapes(config)[kind]
    whole, less = (
        apply(config, tiny_params, tiny_batch, {kind: np.full(shape, value)})
        for value in (np.float32(1), gate)
    )
    assert (whole.logits != less.logits).any()

    def loss(gates):
        return apply(config, tiny_params, tiny_batch, {kind: gates}).logits.sum()

    assert jax.grad(loss)(np.full(shape, gate)).dtype == jnp.float32


def test_what_is_absent_has_no_gradient(tiny, tiny_params, tiny_batch):
    masks = {
        kind: np.full(shape, 0.7, np.float32)
        for kind, shape in mask_shapes(tiny).items()
    }
    masks["mha"][0] = masks["head"][1] = masks["ffn"][1] = 0

    def loss(params, masks):
        return jnp.square(apply(tiny, params, tiny_batch, masks).logits).sum()

    gradients, of_masks = jax.grad(loss, (0, 1))(tiny_params, masks)
    for block in ("layer_0", "attention"), ("layer_1", "attention"), ("layer_1", "ffn"):
        for name in (block[1], f"{block[1]}_norm"):
            for leaf in jax.tree.leaves(gradients[block[0]][name]):
                np.testing.assert_array_equal(leaf, 0)
    for kind, layer in ("mha", 0), ("head", 0), ("mha", 1), ("ffn", 1):
        np.testing.assert_array_equal(of_masks[kind][layer], 0)
    assert (gradients["layer_0"]["ffn"]["up"]["kernel"] != 0).any()
    assert (of_masks["intermediate"][0] != 0).all()
