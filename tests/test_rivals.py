"""Made folders in the layouts of other compressed encoders, beside PyTorch's logits."""

import json

import jax
import numpy as np
import pytest
import record_parity
from conftest import random_params
from foreign_folders import WORDS, change, make, wordpiece_files, write
from safetensors.numpy import load_file, save_file

from cofi_jax.checkpoints import huggingface, load
from cofi_jax.config import Model
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing

TOLERANCE = 1e-4


def classifier(folder, problem="classification"):
    names = {"field": "model", "labels": (), "model": Model()}
    return huggingface.load_classifier(folder, problem=problem, **names)


def assert_parity(model, folder, problem="classification"):
    """The folder, as we read it, gives the logits of PyTorch's model."""
    batch = record_parity.padded_batch((9, 4, 1), 9, model.config, seed=1)
    if model.config.model_type == "distilbert":
        del batch["token_type_ids"]
    expected = record_parity.torch_outputs(model, batch)["logits"]
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # the weights matter
    config, params = classifier(folder, problem)
    batch = {"token_type_ids": np.zeros_like(batch["input_ids"])} | batch
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    with jax.default_matmul_precision("highest"):
        found = jax.jit(Encoder(config).apply)({"params": params}, batch).logits
    real = batch["attention_mask"] > 0 if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=TOLERANCE)
    return config, params


def narrow(model, heads, size, units):
    """Gives a BERT of PyTorch's other widths inside, which no config.json can say."""
    import torch

    torch.manual_seed(1)
    hidden = model.config.hidden_size
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, torch.nn.Linear(hidden, heads * size))
        attention.attention_head_size, attention.all_head_size = size, heads * size
        attention.num_attention_heads, attention.scaling = heads, size**-0.5
        layer.attention.output.dense = torch.nn.Linear(heads * size, hidden)
        layer.intermediate.dense = torch.nn.Linear(hidden, units)
        layer.output.dense = torch.nn.Linear(units, hidden)
    return model.eval()


def bert(**sizes):
    return record_parity.tiny_model("BertForSequenceClassification", **sizes)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["fit_dense", "fit_denses.0"])
def test_tinyberts_maps_to_its_teacher_are_left_out(name, tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    maps = {f"{name}.weight": np.ones((48, 32)), f"{name}.bias": np.ones(48)}
    rewrite(tmp_path, lambda tensors: tensors | maps)
    assert_parity(model, tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("problem", ["classification", "span"])
def test_distilbert(problem, tmp_path):
    head = "QuestionAnswering" if problem == "span" else "SequenceClassification"
    sizes = {"num_labels": 2} if problem == "span" else {}
    sizes |= {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
    import transformers

    model = record_parity.filled(
        getattr(transformers, f"DistilBertFor{head}"),
        transformers.DistilBertConfig(
            vocab_size=101,
            max_position_embeddings=24,
            attn_implementation="eager",
            num_labels=sizes.pop("num_labels", 3),
            **sizes,
        ),
    )
    model.save_pretrained(tmp_path)
    config, params = assert_parity(model, tmp_path, problem)
    assert config.heads == (4, 4, 4) and config.intermediate == (64, 64, 64)
    # Written back, PyTorch reads it, and computes the same.
    types = np.full_like(params["embeddings"]["type"], 0.1)
    types[:, ::2] = -0.2
    moved = params | {"embeddings": params["embeddings"] | {"type": types}}
    again = tmp_path / "again"
    huggingface.save_hugging_face(again, moved, config)
    model, report = type(model).from_pretrained(again, output_loading_info=True)
    assert not any(report.values()), report
    loaded, words = assert_parity(model.eval(), again, problem)
    assert loaded == config
    np.testing.assert_allclose(
        words["embeddings"]["word"],
        params["embeddings"]["word"] + types[0],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.torch
def test_autotinybert_whose_heads_do_not_fill_the_width(tmp_path):
    model = narrow(bert(num_attention_heads=4), heads=4, size=5, units=64)
    model.save_pretrained(tmp_path)
    change(tmp_path, model_type=None, qkv_size=20)
    config, _ = assert_parity(model, tmp_path)
    assert (config.heads, config.head_size, config.hidden_size) == ((4, 4), 5, 32)
    change(tmp_path, qkv_size=22)
    with pytest.raises(UserError, match="num_attention_heads is 4, must divide qkv"):
        classifier(tmp_path)


@pytest.mark.torch
def test_dynabert_with_a_quarter_of_its_width(tmp_path):
    model = bert(hidden_size=24, num_attention_heads=12)
    narrow(model, heads=3, size=2, units=16).save_pretrained(tmp_path)
    config, _ = assert_parity(model, tmp_path)
    assert (config.heads, config.intermediate) == ((3, 3), (16, 16))


@pytest.mark.torch
def test_block_pruned_bert_loses_its_zeros(tmp_path):
    """Heads are gone, and feed-forward units are rows and columns of zeros."""
    import torch

    model = narrow(bert(num_attention_heads=4), heads=2, size=8, units=64)
    with torch.no_grad():
        first, second = model.bert.encoder.layer
        first.intermediate.dense.weight[10:] = 0
        first.intermediate.dense.bias[10:] = 0
        second.output.dense.weight[:] = 0
    model.save_pretrained(tmp_path)
    change(tmp_path, pruned_heads={"0": [0, 2], "1": [1, 3]})
    config, params = assert_parity(model, tmp_path)
    small, spec = slicing.drop_zero_units(params, config)
    assert spec.heads == ((0, 1), (0, 1))
    assert spec.intermediate == (tuple(range(10)), (0,))
    assert_same(params, config, small, spec.config(config))


def assert_same(params, config, small, small_config):
    ids = np.arange(12).reshape(2, 6) % config.vocab_size
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch["token_type_ids"] = np.zeros_like(ids)
    one = Encoder(config).apply({"params": params}, batch)
    other = Encoder(small_config).apply({"params": small}, batch)
    np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_zero_units_of_every_activation(activation):
    config = EncoderConfig(
        17, 16, (3, 3, 0), 4, (6, 6, 6), 7, 3, 9, activation=activation
    )
    params = jax.tree.map(np.array, random_params(config, 0))
    for leaf in ("kernel", "bias"):
        params["layer_0"]["ffn"]["up"][leaf][..., [1, 4]] = 0
        params["layer_0"]["attention"]["value"][leaf][..., 2, :] = 0
    params["layer_1"]["attention"]["output"]["kernel"][:] = 0
    params["layer_2"]["ffn"]["down"]["kernel"][3] = 0
    params["layer_1"]["ffn"]["up"]["kernel"][:, 0] = 0  # Its bias still counts.
    small, spec = slicing.drop_zero_units(params, config)
    assert spec.heads == ((0, 1), (0,), ())
    assert spec.intermediate == ((0, 2, 3, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 5))
    assert len(spec.hidden) == 16
    assert_same(params, config, small, spec.config(config))


def test_eval_measures_without_the_zeros(tmp_path):
    """A folder of another pruner is as fast as it could be."""
    make(tmp_path, vocab_size=len(WORDS))
    write(tmp_path, wordpiece_files())

    def zeroed(tensors):
        for name in list(tensors):
            if "intermediate.dense" in name:
                tensors[name] = np.array(tensors[name])
                tensors[name][5:] = 0
        return tensors

    rewrite(tmp_path, zeroed)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["intermediate_size"] == 24
    (found,) = load.load([str(tmp_path)], task="sst2", labels=("negative", "positive"))
    assert found.model.config.intermediate == (5, 5)
    assert found.dense.intermediate == (24, 24)
