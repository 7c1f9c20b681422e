"""PyTorch's models and ours agree on every hidden state; bad folders are named."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import record_parity
from safetensors.numpy import load_file, save_file

from cofi_jax.checkpoints import huggingface, tokenizers
from cofi_jax.config import Model
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder

TINY = record_parity.FIXTURES / "tiny_bert"


ROBERTA = record_parity.FIXTURES / "tiny_roberta"


SPAN = record_parity.FIXTURES / "tiny_span"


TOLERANCE = 1e-4


FIELD = "model.path"


pytestmark = pytest.mark.usefixtures("quick_compile")


def load(folder, num_labels=3, problem="classification", model=None, seed=0):
    return huggingface.load_encoder(
        Path(folder),
        field=FIELD,
        num_labels=num_labels,
        problem=problem,
        model=model or Model(),
        key=jax.random.key(seed),
    )


def load_trained(folder, problem="classification", labels=(), order=()):
    return huggingface.load_classifier(
        Path(folder),
        field=FIELD,
        problem=problem,
        labels=labels,
        label_order=order,
        model=Model(),
    )


def outputs(config, params, batch):
    batch = {name: np.asarray(array, np.int32) for name, array in batch.items()}
    with jax.default_matmul_precision("highest"):
        return jax.jit(Encoder(config).apply)({"params": params}, batch)


def assert_same(ours, batch, expected):
    """All hidden states, and the logits where there are some, at real tokens."""
    states = np.stack(ours.hidden_states)
    assert states.shape == expected["hidden_states"].shape
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(
        states[:, real], expected["hidden_states"][:, real], rtol=0, atol=TOLERANCE
    )
    if "logits" in expected:
        ours, theirs = np.asarray(ours.logits), expected["logits"]
        if theirs.ndim == 3:
            ours, theirs = ours[real], theirs[real]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def group(record, name):
    """The arrays of batch `name`, split into inputs and expected outputs."""
    arrays = {k[2:]: v for k, v in record.items() if k.startswith(f"{name}.")}
    expected = {k: arrays.pop(k) for k in ("hidden_states", "logits")}
    return arrays, expected


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("folder", [TINY, ROBERTA, SPAN], ids=lambda path: path.name)
def test_recorded_tiny_model(folder, name):
    batch, expected = group(load_file(folder / "expected.safetensors"), name)
    config, params = load_trained(
        folder, "span" if folder == SPAN else "classification"
    )
    # A test of weights that make no difference would test nothing.
    assert np.abs(expected["logits"][0] - expected["logits"][1]).max() > 0.1
    assert_same(outputs(config, params, batch), batch, expected)


@pytest.mark.encoder
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


def assert_parity(folder, architecture, lengths, seed=0, **sizes):
    """A random model of PyTorch's and what we read of it compute the same."""
    problem = "span" if "Question" in architecture else "classification"
    sizes["num_labels"] = 2 if problem == "span" else 3
    model = record_parity.tiny_model(architecture, seed, **sizes)
    model.save_pretrained(folder)
    batch = record_parity.padded_batch(lengths, max(lengths), model.config, seed)
    config, params = load_trained(folder, problem)
    assert config.longest >= max(lengths)
    expected = record_parity.torch_outputs(model, batch)
    assert "logits" in expected
    assert_same(outputs(config, params, batch), batch, expected)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("architecture", "depth"),
    [
        ("BertForSequenceClassification", 2),
        ("BertForSequenceClassification", 12),
        ("BertForQuestionAnswering", 6),
        ("RobertaForSequenceClassification", 6),
        ("RobertaForQuestionAnswering", 2),
        ("RobertaForQuestionAnswering", 12),
    ],
)
def test_live_model_at_every_length(tmp_path, architecture, depth):
    """512 tokens are all that BERT's table has rows for; RoBERTa's has two more."""
    bert = architecture.startswith("Bert")
    assert_parity(
        tmp_path,
        architecture,
        (1, 7, 128, 384, 512),
        seed=depth,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=depth,
        max_position_embeddings=512 if bert else 514,
        type_vocab_size=2 if bert else 1,
    )


@pytest.mark.torch
@pytest.mark.parametrize(
    "activation", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"]
)
def test_live_activation(tmp_path, activation):
    assert_parity(
        tmp_path, "BertForSequenceClassification", (1, 7, 16), hidden_act=activation
    )


@pytest.mark.torch
@pytest.mark.parametrize("family", ["XLMRoberta", "Camembert"])
def test_live_family(tmp_path, family):
    assert_parity(tmp_path, f"{family}ForSequenceClassification", (1, 7, 16))
    assert_parity(tmp_path, f"{family}ForQuestionAnswering", (1, 7, 16))


@pytest.mark.torch
def test_live_padding_id(tmp_path):
    """RoBERTa's first position follows its padding token's id."""
    assert_parity(
        tmp_path, "RobertaForSequenceClassification", (1, 7, 16), pad_token_id=4
    )
    assert load(tmp_path)[0].position_offset == 5


@pytest.mark.encoder
@pytest.mark.torch
def test_live_real_encoder():
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
    return load_trained(TINY)[1]


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
    rewrite(folder, without_prefix)
    assert "encoder.layer.0.output.dense.bias" in load_file(
        folder / "model.safetensors"
    )
    assert_trees_equal(load(folder)[1], tiny_bert)


def test_layer_norms_under_their_old_names(folder, tiny_bert):
    """bert-base-uncased itself says gamma and beta."""
    rewrite(folder, old_names)
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
    config, params = load(TINY)
    assert load_trained(TINY)[0] == config
    assert_trees_equal(params, tiny_bert)


def test_a_head_of_another_problem_is_initialised(tiny_bert):
    """Of a classifier's head nothing goes into a head for spans."""
    config, params = load(TINY, 2, "span")
    assert (config.problem, config.pooler_size, config.num_labels) == ("span", 0, 2)
    assert "pooler" not in params
    assert params["classifier"]["kernel"].shape == (32, 2)
    assert_trees_equal(params["layer_1"], tiny_bert["layer_1"])


def test_robertas_pooler_is_its_classifiers_first_layer():
    weights = load_file(ROBERTA / "model.safetensors")
    for config, params in (load(ROBERTA), load(ROBERTA, 5), load_trained(ROBERTA)):
        np.testing.assert_array_equal(
            params["pooler"]["kernel"].T, weights["classifier.dense.weight"]
        )
        assert config.longest == 22
    assert params["classifier"]["kernel"].shape == (24, 3)


@pytest.mark.parametrize(("pad", "longest"), [(1, 22), (4, 19)])
def test_robertas_positions_start_after_its_padding_token(folder, pad, longest):
    configure(model_type="roberta", pad_token_id=pad)(folder)
    config = huggingface.read_config(folder, FIELD, 3, Model())
    assert (config.position_offset, config.longest) == (pad + 1, longest)


def test_pretrained_encoders_bring_heads_that_are_ignored(folder, tiny_bert):
    """As bert-base-uncased has them."""
    extra = {
        "cls.predictions.bias": np.zeros(101, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
        "lm_head.dense.weight": np.zeros((32, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(24)[None],
    }
    rewrite(folder, lambda w: w | extra)
    assert_trees_equal(load(folder)[1], tiny_bert)
    assert_trees_equal(load_trained(folder)[1], tiny_bert)


# pytorch_model.bin.


def to_bin(folder, change=lambda weights: weights, **options):
    import torch

    weights = change(load_file(folder / "model.safetensors"))
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    return tensors


def old_names(weights):
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name, was in new.items():
        weights = {k.replace(name, was): v for k, v in weights.items()}
    return weights


def without_prefix(weights):
    return {k.removeprefix("bert."): v for k, v in weights.items()}


@pytest.mark.torch
@pytest.mark.parametrize("change", [dict, old_names, without_prefix])
def test_torch_file_reads_as_the_safetensors(folder, tiny_bert, change):
    to_bin(folder, change)
    assert_trees_equal(load_trained(folder)[1], tiny_bert)
    assert_trees_equal(load(folder)[1], tiny_bert)


@pytest.mark.torch
def test_torch_file_of_before_2020(folder, tiny_bert):
    to_bin(folder, _use_new_zipfile_serialization=False)
    assert_trees_equal(load_trained(folder)[1], tiny_bert)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_file_of_another_precision(folder, dtype):
    import torch

    tensors = to_bin(folder)
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    _, params = load_trained(folder)
    name = "bert.encoder.layer.1.output.dense.weight"
    down = params["layer_1"]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(down.T, tensors[name].float().numpy(), strict=True)


@pytest.mark.torch
def test_torch_file_of_parameters(folder, tiny_bert):
    """As `torch.save(dict(model.named_parameters()), ...)` writes it."""
    import torch

    tensors = {k: torch.nn.Parameter(v) for k, v in to_bin(folder).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_trees_equal(load_trained(folder)[1], tiny_bert)


def test_safetensors_are_preferred(folder, tiny_bert):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert_trees_equal(load_trained(folder)[1], tiny_bert)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.torch
@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
def test_torch_file_is_never_executed(folder, tmp_path, how):
    import torch

    (folder / "model.safetensors").unlink()
    file, trace = folder / "pytorch_model.bin", tmp_path / "trace"
    harmful = {"bert.embeddings.word_embeddings.weight": Intruder(trace)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(harmful, protocol=2))
    else:
        torch.save(harmful, file, _use_new_zipfile_serialization=how == "zip")
    for loader in (load, load_trained):
        with pytest.raises(UserError, match="pytorch_model.bin cannot be") as caught:
            loader(folder)
        assert "\n" not in str(caught.value)
    assert not trace.exists()
    if how == "pickle":
        pickle.loads(file.read_bytes())
        assert trace.exists()  # harmful it was


def test_torch_file_without_torch(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=f"{FIELD}=.*pip install torch") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {"epoch": 3}, 7])
def test_torch_file_of_something_else(folder, content):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read"):
        load_trained(folder)


@pytest.mark.torch
def test_torch_file_cut_off(folder):
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read"):
        load_trained(folder)


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


def shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


def reshape(name, *shape):
    return lambda folder: rewrite(folder, lambda w: w | {name: w[name].reshape(shape)})


def rename(was, name):
    return lambda folder: rewrite(
        folder, lambda w: {name if k == was else k: v for k, v in w.items()}
    )


def add(name, shape):
    return lambda folder: rewrite(
        folder, lambda w: w | {name: np.zeros(shape, np.float32)}
    )


def quantise(name):
    return lambda folder: rewrite(folder, lambda w: w | {name: w[name].astype(np.int8)})


def scribble(text):
    return lambda folder: (folder / "config.json").write_text(text)


BAD_FOLDERS = {
    "no weights": (
        remove("model.safetensors"),
        r"must hold model.safetensors or pytorch_model.bin; it holds \['config.json'",
    ),
    "sharded": (shard, "index.json must hold a `weight_map` of tensors and files"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "tensor missing": (lose, "lacks bert.encoder.layer.1.output.LayerNorm"),
    "tensor misshapen": (
        misshape,
        r"intermediate.dense.weight has shape \(64, 31\), must be \(64, 32\)",
    ),
    "embeddings a vector": (
        reshape("bert.embeddings.word_embeddings.weight", -1),
        r"word_embeddings.weight has shape \(3232,\), must be a matrix",
    ),
    "embeddings missing": (
        rename("bert.embeddings.word_embeddings.weight", "bert.words.weight"),
        "lacks embeddings.word_embeddings.weight",
    ),
    "block in part": (
        rename(
            "bert.encoder.layer.0.attention.self.query.weight",
            "bert.encoder.layer.0.attention.self.q.weight",
        ),
        "lacks bert.encoder.layer.0.attention.self.query.weight",
    ),
    "unknown tensor": (
        add("bert.encoder.layer.0.attention.self.distance_embedding.weight", (47, 8)),
        "unknown tensor bert.encoder.layer.0.attention.self.distance_embedding.weight",
    ),
    "two models": (
        add("embeddings.word_embeddings.weight", (101, 32)),
        "holds both .*embeddings.word_embeddings.weight and ",
    ),
    "too shallow": (
        configure(num_hidden_layers=1),
        "has an unknown tensor bert.encoder.layer.1.",
    ),
    "quantised": (
        quantise("bert.encoder.layer.1.output.dense.weight"),
        "layer.1.output.dense.weight holds int8, must be floating point",
    ),
    "part of a head": (
        configure(num_attention_heads=4, hidden_size=36),
        r"query.weight has 32 rows, must be whole heads of 9",
    ),
    "electra": (
        configure(model_type="electra"),
        "model_type is 'electra', must be 'bert' or 'roberta' or 'xlm-roberta' or",
    ),
    "quick_gelu": (
        configure(hidden_act="quick_gelu"),
        "hidden_act is 'quick_gelu', must be 'gelu' or 'gelu_new' or",
    ),
    "a decoder": (configure(is_decoder=True), "is_decoder is True, must be False"),
    "relative": (configure(position_embedding_type="relative_key"), "relative_key"),
    "no config": (remove("config.json"), "config.json cannot be read"),
    "config cut off": (scribble('{"model_type": "be'), "config.json cannot be read"),
    "config a list": (scribble("[1, 2]"), "config.json"),
    "config lacks": (unconfigure("intermediate_size"), "lacks 'intermediate_size'"),
    "odd heads": (configure(num_attention_heads=5), "num_attention_heads"),
    "no heads": (configure(num_attention_heads=0), "num_attention_heads is 0, must be"),
    "size a word": (configure(vocab_size="many"), "vocab_size is 'many', must be"),
    "size a list": (configure(hidden_size=[32]), r"hidden_size is \[32\], must be"),
    "size null": (configure(intermediate_size=None), "intermediate_size is None, must"),
    "epsilon a word": (configure(layer_norm_eps="small"), "layer_norm_eps is 'small'"),
    "too deep": (configure(num_hidden_layers=3), "lacks bert.encoder.layer.2"),
    "wrong vocabulary": (
        configure(vocab_size=100),
        r"word_embeddings.weight has shape \(101, 32\), must be \(100, 32\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
@pytest.mark.parametrize("loader", ["encoder", "classifier"])
def test_bad_folder(folder, case, loader):
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder) if loader == "encoder" else load_trained(folder)
    assert str(caught.value).startswith(f"{FIELD}={str(folder)!r}: ")
    assert "\n" not in str(caught.value)


def test_load_classifier_without_a_classifier(folder):
    rewrite(
        folder, lambda w: {k: v for k, v in w.items() if not k.startswith("classifier")}
    )
    with pytest.raises(UserError, match=f"{FIELD}=.*has no classifier.weight"):
        load_trained(folder)
    with pytest.raises(UserError, match="has no qa_outputs.weight.* span"):
        load_trained(TINY, "span")
    with pytest.raises(UserError, match="has no classifier.out_proj.weight"):
        configure(model_type="roberta")(folder)
        load_trained(folder)


@pytest.mark.parametrize(
    ("problem", "labels", "task"),
    [
        ("classification", ("no", "yes"), 2),
        ("classification", ("a", "b", "c", "d"), 4),
        ("regression", (), 1),
    ],
)
def test_load_classifier_of_another_number_of_classes(problem, labels, task):
    with pytest.raises(UserError, match=f"has 3 classes, the task has {task}$"):
        load_trained(TINY, problem, labels)


def test_folder_without_a_tokenizer(folder):
    """Left alone, transformers makes up a tokenizer that knows no word."""
    with pytest.raises(UserError, match=f"{FIELD}=.*{folder.name}.*no tokenizer"):
        tokenizers.load_tokenizer(folder, FIELD)


def test_folder_with_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=f"{FIELD}=.*{folder.name}.*tokenizer"):
        tokenizers.load_tokenizer(folder, FIELD)


def test_folder_with_a_vocabulary_alone(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = tokenizers.load_tokenizer(folder, FIELD)
    assert tokenizer("good bad ugly")["input_ids"] == [2, 5, 6, 1, 3]


def roberta_tokenizer_files(folder):
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "g", "o", "d", "go", "god"]
    ids = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\ng o\ngo d\n")
    configure(model_type="roberta")(folder)


def test_folder_with_robertas_vocabulary_and_merges(folder):
    roberta_tokenizer_files(folder)
    tokenizer = tokenizers.load_tokenizer(folder, FIELD)
    assert tokenizer("godgo")["input_ids"] == [0, 9, 8, 2]


@pytest.mark.parametrize("lost", ["vocab.json", "merges.txt"])
def test_folder_with_half_of_robertas_tokenizer(folder, lost):
    roberta_tokenizer_files(folder)
    (folder / lost).unlink()
    with pytest.raises(UserError, match="no tokenizer.*vocab.json and merges.txt"):
        tokenizers.load_tokenizer(folder, FIELD)


def test_folder_with_a_damaged_sentencepiece_model(folder):
    configure(model_type="xlm-roberta")(folder)
    (folder / "sentencepiece.bpe.model").write_bytes(b"\x00broken")
    with pytest.raises(UserError, match="its tokenizer cannot be read") as caught:
        tokenizers.load_tokenizer(folder, FIELD)
    assert "\n" not in str(caught.value)


# Where a folder comes from.


def test_resolve_takes_a_folder_as_it_is(folder):
    assert huggingface.resolve(str(folder), FIELD) == folder


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none", "a/b/c"])
def test_resolve_says_when_there_is_no_such_folder(path):
    with pytest.raises(UserError, match=f"{FIELD}='{path}': no such folder"):
        huggingface.resolve(path, FIELD)


def test_resolve_without_a_hub_says_how_to_do_without(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        huggingface.resolve("some-user/some-encoder", FIELD)
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
        huggingface.resolve("bert-base-uncased", FIELD)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_resolve_downloads_torchs_file_only_where_there_is_no_other(
    monkeypatch, tmp_path, weights
):
    import fnmatch

    hub = {"config.json", "tokenizer.json", "merges.txt", "vocab.json"}
    hub |= {"pytorch_model.bin", "tf_model.h5", "sentencepiece.bpe.model", weights}

    def download(path, allow_patterns):
        for name in hub:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert huggingface.resolve("some-user/some-encoder", FIELD) == tmp_path
    others = {"tf_model.h5", "pytorch_model.bin"} - {weights}
    assert {path.name for path in tmp_path.iterdir()} == hub - others
