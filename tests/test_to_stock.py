"""The plain BERT of a sliced model, run by transformers, against NumPy and JAX."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf

from cofi_jax.checkpoints.hf_config import to_fields
from cofi_jax.checkpoints.hf_names import to_hugging_face, to_torch
from cofi_jax.errors import UserError
from cofi_jax.export import to_stock_bert
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.layers import ACTIVATIONS

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compile")]


torch = pytest.importorskip("torch")


def sizes(heads, intermediate, hidden=16, pooler=None, **others):
    problem = others.get("problem", "classification")
    return EncoderConfig(
        **{
            "vocab_size": 19,
            "hidden_size": hidden,
            "heads": tuple(heads),
            "head_size": 4,
            "intermediate": tuple(intermediate),
            "pooler_size": 0 if problem == "span" else pooler or hidden,
            "num_labels": {"span": 2, "regression": 1}.get(problem, 3),
            "max_positions": 9,
        }
        | others
    )


ROBERTA = {
    "model_type": "roberta",
    "position_offset": 2,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


DISTILBERT = {
    "model_type": "distilbert",
    "type_vocab_size": 1,
    "pooler_activation": "relu",
}


def random_sizes(seed):
    """Ragged; the pooler and the heads fit the hidden size, or they do not."""
    rng = np.random.default_rng(seed)
    layers = rng.integers(1, 6)
    hidden = int(rng.choice([9, 12, 15, 16, 18, 21, 24]))
    pooler = hidden + int(rng.choice([-2, 0, 0, 0, 1, 3, 3, 6]))
    return sizes(
        (rng.integers(1, 5, layers) * (rng.random(layers) < 0.6)).tolist(),
        (rng.integers(1, 8, layers) * (rng.random(layers) < 0.6)).tolist(),
        hidden,
        pooler,
        head_size=int(rng.choice([2, 3, 4])),
        problem=str(rng.choice(["classification", "regression", "span"])),
        activation=str(rng.choice(list(ACTIVATIONS))),
    )


def random_params(config, seed=0, dtype="float32"):
    """Of order 1, LayerNorms' scales of both signs and biases included."""
    rng = np.random.default_rng(seed)
    width, heads = config.hidden_size, config.head_size

    def linear(*shape, rows=1):
        scale = np.sqrt(np.prod(shape[:rows]))
        bias = 0.5 * rng.standard_normal(shape[rows:])
        return {"kernel": rng.standard_normal(shape) / scale, "bias": bias}

    def norm():
        scale, bias = rng.standard_normal((2, width))
        return {"scale": 1 + 0.5 * scale, "bias": 0.5 * bias}

    tables = {
        "word": config.vocab_size,
        "position": config.max_positions,
        "type": config.type_vocab_size,
    }
    tables = {k: rng.standard_normal((rows, width)) for k, rows in tables.items()}
    params = {"embeddings": tables | {"norm": norm()}}
    for i, (n, units) in enumerate(zip(config.heads, config.intermediate, strict=True)):
        layer = {}
        if n:
            names = ("query", "key", "value")
            layer["attention"] = {k: linear(width, n, heads) for k in names}
            layer["attention"]["output"] = linear(n, heads, width, rows=2)
            layer["attention_norm"] = norm()
        if units:
            layer["ffn"] = {"up": linear(width, units), "down": linear(units, width)}
            layer["ffn_norm"] = norm()
        if layer:
            params[f"layer_{i}"] = layer
    if config.problem != "span":
        params["pooler"] = linear(width, config.pooler_size)
    inputs = config.pooler_size or width
    params["classifier"] = linear(inputs, config.num_labels)
    # What float32 can hold, so that nothing is rounded on the way to it.
    return jax.tree.map(lambda x: x.astype(np.float32).astype(dtype), params)


def batch_of(config, seed=0):
    """Rows of 7, 4 and 1 real tokens, padded to 7."""
    rng = np.random.default_rng(seed)
    real = np.arange(7) < np.array([7, 4, 1])[:, None]
    types = rng.integers(0, config.type_vocab_size, real.shape)
    ids = np.where(real, rng.integers(3, config.vocab_size, real.shape), 1)
    arrays = {"input_ids": ids, "attention_mask": real, "token_type_ids": types}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


TANH = math.sqrt(2 / math.pi)


FUNCTIONS = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(TANH * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


FUNCTIONS["gelu_pytorch_tanh"] = FUNCTIONS["gelu_new"]


FUNCTIONS["swish"] = FUNCTIONS["silu"]


def numpy_logits(params, config, batch):
    """What model.py computes, in plain float64."""

    def norm(x, node):
        x = x - x.mean(-1, keepdims=True)
        variance = (x * x).mean(-1, keepdims=True) + config.layer_norm_eps
        return x / np.sqrt(variance) * node["scale"] + node["bias"]

    def dense(x, node):
        return x @ node["kernel"] + node["bias"]

    tables = params["embeddings"]
    positions = np.arange(batch["input_ids"].shape[1]) + config.position_offset
    x = tables["word"][batch["input_ids"]] + tables["position"][positions]
    x = norm(x + tables["type"][batch["token_type_ids"]], tables["norm"])
    for i in range(len(config.heads)):
        layer = params.get(f"layer_{i}", {})
        if "attention" in layer:
            node, y = layer["attention"], 0
            for h in range(config.heads[i]):
                q, k, v = (
                    x @ node[name]["kernel"][:, h] + node[name]["bias"][h]
                    for name in ("query", "key", "value")
                )
                scores = q @ k.swapaxes(1, 2) / math.sqrt(config.head_size)
                weights = np.exp(scores) * batch["attention_mask"][:, None]
                weights /= weights.sum(-1, keepdims=True)
                y = y + weights @ v @ node["output"]["kernel"][h]
            x = norm(x + y + node["output"]["bias"], layer["attention_norm"])
        if "ffn" in layer:
            y = FUNCTIONS[config.activation](dense(x, layer["ffn"]["up"]))
            x = norm(x + dense(y, layer["ffn"]["down"]), layer["ffn_norm"])
    if config.problem != "span":
        x = np.tanh(dense(x[:, 0], params["pooler"]))
    return dense(x, params["classifier"])


def torch_model(params, config):
    """Transformers' own model of a plain BERT's parameters, in float64."""
    import transformers

    fields = to_fields(config)
    described = transformers.BertConfig(**fields)
    model = getattr(transformers, fields["architectures"][0])(described).double()
    tensors = to_torch(params, config)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def torch_logits(model, batch):
    with torch.inference_mode():
        output = model(**{k: torch.from_numpy(v.astype(int)) for k, v in batch.items()})
    if hasattr(output, "start_logits"):
        return np.stack([output.start_logits, output.end_logits], -1)
    return output.logits.numpy()


def difference(config, seed=0):
    """Between a model and its plain BERT, both in float64."""
    params, batch = random_params(config, seed, "float64"), batch_of(config, seed)
    expected = numpy_logits(params, config, batch)
    model = torch_model(*to_stock_bert.to_stock(params, config, "float64"))
    got = torch_logits(model, batch)
    assert got.shape == expected.shape
    assert expected.std() > 0.01
    return np.abs(got - expected).max()


@pytest.fixture
def no_excess(monkeypatch):
    """The one allowance that is made, taken back as far as float64 goes."""
    monkeypatch.setattr(to_stock_bert, "_EXCESS", 2.0**-46)


@pytest.mark.parametrize("seed", range(60))
def test_computes_the_same(no_excess, seed):
    assert difference(random_sizes(seed), seed) < 1e-10


def test_the_random_models_are_of_all_kinds():
    kinds = {"fits": 0, "wider": 0, "odd": 0, "absent": 0}
    for config in map(random_sizes, range(60)):
        added = to_stock_bert.stock_config(config).hidden_size - config.hidden_size
        kinds["wider" if added else "fits"] += 1
        kinds["odd"] += added % 2
        kinds["absent"] += config.heads.count(0) + config.intermediate.count(0)
    assert min(kinds.values()) > 10, kinds


STRUCTURES = {
    "no attention": ((0, 0, 0), (3, 2, 5)),
    "no feed-forward": ((2, 3, 1), (0, 0, 0)),
    "feed-forward first": ((0, 2, 0), (3, 0, 4)),
    "attention last": ((0, 0, 2), (3, 0, 0)),
    "a chain": ((0, 0, 0, 0, 3), (4, 4, 0, 4, 0)),
    "one block": ((0, 0, 2), (0, 0, 0)),
    "no block": ((0, 0), (0, 0)),
    "no layer": ((), ()),
}


@pytest.mark.parametrize("problem", ["classification", "span"])
@pytest.mark.parametrize("hidden", [16, 13])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_absent_blocks(no_excess, structure, hidden, problem):
    """13 is a prime, too few for two heads of 4."""
    config = sizes(*STRUCTURES[structure], hidden, problem=problem)
    assert difference(config) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("pooler", [16, 20])
def test_epsilon_counts_twice_at_most_where_a_block_is_absent(structure, pooler):
    """Normalising what is normal is the identity up to epsilon alone."""
    config = sizes(*STRUCTURES[structure], pooler=pooler, **ROBERTA)
    assert difference(config) < 1e-4


def test_epsilon_is_exact_where_none_is(no_excess):
    for pooler in (16, 20):
        config = sizes((2, 3), (4, 5), pooler=pooler, layer_norm_eps=0.1)
        assert difference(config) < 1e-10


def test_the_excess_is_what_is_promised():
    """One LayerNorm, its worst input among others: the bound is reached, not passed."""
    rng = np.random.default_rng(0)
    for width, added in itertools.product((6, 13), (2, 3, 8)):
        node = {"scale": rng.standard_normal(width), "bias": rng.standard_normal(width)}
        wide, lift = to_stock_bert._widen(node, added, True)
        centred = node["scale"] - node["scale"].mean()
        y = rng.standard_normal((5, width)) + 3
        y[0] = centred * 7  # the worst
        written = lift(y)
        assert written.shape == (5, width + added)
        np.testing.assert_allclose(written.mean(-1), 0, atol=1e-12)
        variance = written.var(-1) * (width + added) / width
        excess = variance / y.var(-1) - 1
        np.testing.assert_allclose(excess[0], 2**-30, rtol=1e-4)
        assert (excess < 2**-30 * 1.0001).all()
        normal = written / np.sqrt(written.var(-1, keepdims=True))
        out = normal * wide["scale"] + wide["bias"]
        y = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)
        expected = y * node["scale"] + node["bias"]
        np.testing.assert_allclose(out[:, :width], expected, atol=1e-8)
        mean = np.tile(expected.mean(-1, keepdims=True), added)
        np.testing.assert_allclose(out[:, width:], mean, atol=1e-8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_the_identity(activation):
    """f(u) - f(-u) = u, on which the centring of the residual rests."""
    from transformers.activations import ACT2FN

    u = torch.linspace(-9, 9, 101, dtype=torch.float64)
    f = ACT2FN[activation]
    np.testing.assert_allclose(f(u) - f(-u), u, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        sizes((3, 0, 2), (5, 4, 0), 14, 16),
        sizes((0, 4, 2), (5, 0, 3), problem="regression"),
        sizes((3, 0, 1), (5, 4, 0), 13, problem="span", **ROBERTA),
        sizes((3, 2), (5, 0), 12, 16, **ROBERTA),
        sizes((3, 0, 2), (5, 4, 0), 14, 16, **DISTILBERT),
    ],
    ids=["classification", "regression", "span, roberta", "roberta", "distilbert"],
)
def test_a_folder_is_loaded_by_transformers_alone(tmp_path, config):
    params, batch = random_params(config), batch_of(config)
    to_stock_bert.write(tmp_path, jax.tree.map(jax.numpy.asarray, params), config, ())
    got = to_stock_bert.load(tmp_path)(jax.tree.map(jax.numpy.asarray, batch))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(Encoder(config).apply)({"params": params}, batch).logits
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    fields = json.loads((tmp_path / "config.json").read_text())
    stays = config.model_type == "distilbert"
    assert fields["model_type"] == (config.model_type if stays else "bert")
    assert fields["pad_token_id"] == (1 if config.position_offset else 0)
    assert fields["max_position_embeddings"] == config.longest
    assert "auto_map" not in fields
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {np.dtype("float32")}


def test_a_dense_model_stays_what_it_is():
    """To the bit, tensors and config.json."""
    for problem in ("classification", "span"):
        config = sizes((4, 4), (20, 20), problem=problem)
        params = random_params(config)
        ours, fields = to_hugging_face(*to_stock_bert.to_stock(params, config))
        theirs, described = to_hugging_face(params, config)
        assert fields == described
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(ours[name], tensor, strict=True)


@pytest.mark.parametrize(
    ("hidden", "heads", "size", "pooler", "found"),
    [
        (384, 12, 32, 384, (384, 32)),
        (384, 5, 32, 384, (384, 64)),
        (384, 1, 32, 384, (384, 128)),
        (768, 12, 64, 768, (768, 64)),
        (372, 6, 32, 0, (372, 62)),
        (372, 7, 32, 0, (384, 48)),
        (372, 6, 32, 384, (384, 64)),
        (372, 6, 32, 300, (372, 62)),
        (757, 1, 64, 0, (757, 757)),
        (757, 2, 64, 0, (760, 152)),
        (764, 12, 64, 768, (768, 64)),
        (766, 12, 64, 768, (768, 64)),
        (767, 12, 64, 768, (832, 64)),  # one dimension added would not do
    ],
)
def test_the_width_is_the_least_that_fits(hidden, heads, size, pooler, found):
    config = sizes((heads, 1), (9, 0), hidden, head_size=size)
    stock = to_stock_bert.stock_config(dataclasses.replace(config, pooler_size=pooler))
    assert (stock.hidden_size, stock.head_size) == found
    assert stock.heads == (stock.hidden_size // stock.head_size,) * 2
    assert stock.intermediate == ((9,) * 2 if hidden == found[0] else (13,) * 2)


def test_the_price_is_that_of_the_matrices():
    for seed in range(6):
        config = random_sizes(seed)
        params = random_params(config)
        layers = {k: v for k, v in params.items() if k.startswith("layer_")}
        sliced = sum(
            array.size
            for path, array in jax.tree_util.tree_leaves_with_path(layers)
            if path[-1].key == "kernel"
        )
        model = torch_model(*to_stock_bert.to_stock(params, config, "float64"))
        plain = sum(p.numel() for p in model.bert.encoder.parameters() if p.ndim == 2)
        if sliced:
            assert to_stock_bert.price(config) == pytest.approx(
                plain / sliced, rel=1e-12
            )


def test_prices():
    dense = sizes((4, 4), (20, 20))
    assert to_stock_bert.price(dense) == 1
    assert to_stock_bert.price(sizes((0, 0), (0, 0))) == math.inf
    # Four layers of 384, twelve heads' worth of width and four units each.
    config = sizes((0, 2, 0, 5, 5, 4), (0,) * 6, 258, 384, head_size=32)
    plain = 4 * (4 * 384 * 384 + 2 * 384 * 4)
    assert to_stock_bert.price(config) == plain / (4 * 258 * 32 * 16)


def test_half_empty_layers_merge():
    config = sizes((2, 0, 0, 2, 0), (0, 4, 0, 0, 4))
    assert len(to_stock_bert.stock_config(config).heads) == 2


def test_names_of_the_classes(tmp_path):
    config = sizes((2, 0), (3, 0), 14)
    params = random_params(config)
    with pytest.raises(UserError, match="has 3 classes, labels has 2") as caught:
        to_stock_bert.write(tmp_path, params, config, ("no", "yes"))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
    to_stock_bert.write(tmp_path, params, config, ("no", "maybe", "yes"))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
