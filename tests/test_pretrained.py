"""PyTorch's BERT and ours agree on every hidden state; bad folders are named."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import record_parity
from safetensors.numpy import load_file, save_file

from cofi_jax import pretrained
from cofi_jax.config import Model, UserError
from cofi_jax.model import Encoder

TINY = record_parity.FIXTURES / "tiny_bert"
TOLERANCE = 1e-4
FIELD = "model.path"

needs_encoder = pytest.mark.skipif(
    "COFI_JAX_ENCODER" not in os.environ,
    reason="COFI_JAX_ENCODER does not name the folder of a pretrained encoder",
)


def load(folder, num_labels=3, model=None, seed=0):
    return pretrained.load_encoder(
        Path(folder),
        field=FIELD,
        num_labels=num_labels,
        model=model or Model(),
        key=jax.random.key(seed),
    )


def outputs(config, params, batch):
    batch = {name: np.asarray(array, np.int32) for name, array in batch.items()}
    with jax.default_matmul_precision("highest"):
        return jax.jit(Encoder(config).apply)({"params": params}, batch)


def assert_same(ours, batch, expected):
    """All hidden states of real tokens, and the logits where there are some."""
    states = np.stack(ours.hidden_states)
    assert states.shape == expected["hidden_states"].shape
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(
        states[:, real], expected["hidden_states"][:, real], rtol=0, atol=TOLERANCE
    )
    if "logits" in expected:
        np.testing.assert_allclose(
            ours.logits, expected["logits"], rtol=0, atol=TOLERANCE
        )


def group(record, name):
    """The arrays of batch `name`, split into inputs and expected outputs."""
    arrays = {k[2:]: v for k, v in record.items() if k.startswith(f"{name}.")}
    expected = {k: arrays.pop(k) for k in ("hidden_states", "logits")}
    return arrays, expected


@pytest.mark.parametrize("name", ["a", "b"])
def test_recorded_tiny_model(name):
    batch, expected = group(load_file(TINY / "expected.safetensors"), name)
    config, params = load(TINY)
    # A test of weights that make no difference would test nothing.
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.1
    assert_same(outputs(config, params, batch), batch, expected)


@needs_encoder
def test_recorded_real_encoder():
    batch = load_file(record_parity.FIXTURES / "minilm_expected.safetensors")
    expected = batch.pop("sample")
    config, params = load(os.environ["COFI_JAX_ENCODER"])
    states = np.stack(outputs(config, params, batch).hidden_states)
    np.testing.assert_allclose(
        record_parity.sample(states, batch["attention_mask"]),
        expected,
        rtol=1e-5,  # the norms are about 10
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_live_tiny_model(tmp_path, seed):
    pytest.importorskip("torch")
    model = record_parity.tiny_bert(seed)
    model.save_pretrained(tmp_path)
    batch = record_parity.padded_batch((1, 7, 16), 20, 101, seed)
    config, params = load(tmp_path)
    expected = record_parity.torch_outputs(model, batch)
    assert_same(outputs(config, params, batch), batch, expected)


@needs_encoder
def test_live_real_encoder():
    pytest.importorskip("torch")
    folder = os.environ["COFI_JAX_ENCODER"]
    batch = record_parity.sentence_batch(folder)
    model = record_parity.real_encoder(folder)
    config, params = load(folder)
    expected = record_parity.torch_outputs(model, batch)
    assert_same(outputs(config, params, batch), batch, expected)


# What a folder may look like.


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


def assert_trees_equal(ours, others):
    jax.tree.map(np.testing.assert_array_equal, ours, others)


@pytest.fixture(scope="module")
def tiny_bert():
    return load(TINY)[1]


def test_sizes_come_from_the_folder_and_the_rest_from_the_config(folder):
    config, _ = load(folder, model=Model(dropout=0.25, dtype="bfloat16"))
    assert config.vocab_size == 101
    assert config.widths() == {"hidden": 32, "heads": [4, 4], "intermediate": [64, 64]}
    assert (config.head_size, config.max_positions, config.num_labels) == (8, 24, 3)
    assert (config.dropout, config.dtype) == (0.25, "bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_weights_become_float32(folder, tiny_bert, dtype):
    import ml_dtypes

    low = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rewrite(folder, lambda w: {k: v.astype(low) for k, v in w.items()})
    _, params = load(folder)
    jax.tree.map(
        lambda ours, full: np.testing.assert_array_equal(
            ours, full.astype(low).astype(np.float32), strict=True
        ),
        params,
        tiny_bert,
    )


def test_prefix_is_optional(folder, tiny_bert):
    rewrite(folder, lambda w: {k.removeprefix("bert."): v for k, v in w.items()})
    assert "encoder.layer.0.output.dense.bias" in load_file(
        folder / "model.safetensors"
    )
    assert_trees_equal(load(folder)[1], tiny_bert)


def test_layer_norms_under_their_old_names(folder, tiny_bert):
    """bert-base-uncased itself says gamma and beta."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(weights):
        for new, was in old.items():
            weights = {k.replace(new, was): v for k, v in weights.items()}
        return weights

    rewrite(folder, rename)
    assert_trees_equal(load(folder)[1], tiny_bert)


def test_heads_that_do_not_fit_are_initialised_from_the_key(folder, tiny_bert):
    def headless(weights):
        return {k: v for k, v in weights.items() if "pooler" not in k}

    rewrite(folder, headless)
    first, again, other = (load(folder, 5, seed=seed)[1] for seed in (0, 0, 1))
    assert first["classifier"]["kernel"].shape == (32, 5)
    assert_trees_equal(first, again)
    for head in ("classifier", "pooler"):
        kernel = first[head]["kernel"]
        assert 0.01 < kernel.std() < 0.03
        assert np.abs(kernel - other[head]["kernel"]).max() > 0
    for name in ("embeddings", "layer_0", "layer_1"):
        assert_trees_equal(first[name], tiny_bert[name])


def test_load_classifier_has_the_folders_classes(tiny_bert):
    config, params = pretrained.load_classifier(TINY, field=FIELD, model=Model())
    assert config.num_labels == 3
    assert_trees_equal(params, tiny_bert)


# What is wrong with a folder is said in one line.


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose(folder):
    def without(weights):
        del weights["bert.encoder.layer.1.output.LayerNorm.bias"]
        return weights

    rewrite(folder, without)


def misshape(folder):
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    rewrite(folder, lambda w: w | {name: np.zeros((64, 31), np.float32)})


def configure(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def unconfigure(name):
    def change(folder):
        file = folder / "config.json"
        fields = json.loads(file.read_text())
        del fields[name]
        file.write_text(json.dumps(fields))

    return change


def scribble(text):
    return lambda folder: (folder / "config.json").write_text(text)


BAD_FOLDERS = {
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "tensor missing": (lose, "lacks bert.encoder.layer.1.output.LayerNorm"),
    "tensor misshapen": (misshape, r"intermediate.dense.weight has shape \(64, 31\)"),
    "roberta": (configure(model_type="roberta"), "model_type is 'roberta'"),
    "relu": (configure(hidden_act="relu"), "hidden_act is 'relu'"),
    "relative": (configure(position_embedding_type="relative_key"), "relative_key"),
    "no config": (remove("config.json"), "config.json cannot be read"),
    "config cut off": (scribble('{"model_type": "be'), "config.json cannot be read"),
    "config a list": (scribble("[1, 2]"), "config.json"),
    "config lacks": (unconfigure("intermediate_size"), "lacks 'intermediate_size'"),
    "odd heads": (configure(num_attention_heads=5), "num_attention_heads"),
    "no heads": (configure(num_attention_heads=0), "num_attention_heads"),
    "too deep": (configure(num_hidden_layers=3), "lacks bert.encoder.layer.2"),
    "wrong vocabulary": (configure(vocab_size=100), "config.json asks for"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
@pytest.mark.parametrize("loader", ["encoder", "classifier"])
def test_bad_folder(folder, case, loader):
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        if loader == "encoder":
            load(folder)
        else:
            pretrained.load_classifier(folder, field=FIELD, model=Model())
    assert str(caught.value).startswith(f"{FIELD}={str(folder)!r}: ")
    assert "\n" not in str(caught.value)


def test_load_classifier_without_a_classifier(folder):
    rewrite(
        folder, lambda w: {k: v for k, v in w.items() if not k.startswith("classifier")}
    )
    with pytest.raises(UserError, match=f"{FIELD}=.*has no classifier.weight"):
        pretrained.load_classifier(folder, field=FIELD, model=Model())


def test_folder_without_a_tokenizer(folder):
    """Left alone, transformers makes up a tokenizer that knows no word."""
    with pytest.raises(UserError, match=f"{FIELD}=.*{folder.name}.*no tokenizer"):
        pretrained.load_tokenizer(folder, FIELD)


def test_folder_with_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=f"{FIELD}=.*{folder.name}.*tokenizer"):
        pretrained.load_tokenizer(folder, FIELD)


def test_folder_with_a_vocabulary_alone(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = pretrained.load_tokenizer(folder, FIELD)
    assert tokenizer("good bad ugly")["input_ids"] == [2, 5, 6, 1, 3]


# Where a folder comes from.


def test_resolve_takes_a_folder_as_it_is(folder):
    assert pretrained.resolve(str(folder), FIELD) == folder


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none", "a/b/c"])
def test_resolve_says_when_there_is_no_such_folder(path):
    with pytest.raises(UserError, match=f"{FIELD}='{path}': no such folder"):
        pretrained.resolve(path, FIELD)


def test_resolve_without_a_hub_says_how_to_do_without(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        pretrained.resolve("some-user/some-encoder", FIELD)
    message = str(caught.value)
    assert message.startswith(f"{FIELD}='some-user/some-encoder': ")
    assert "--config.model.path=path/to/folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, RuntimeError])
def test_resolve_whatever_the_hub_raises(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("a message\nof two lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"{error.__name__}.*path/to/folder"):
        pretrained.resolve("bert-base-uncased", FIELD)
