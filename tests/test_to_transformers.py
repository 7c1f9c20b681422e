"""Exported folders compute in PyTorch what our model computes, or do not load."""

import ast
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from conftest import random_params
from safetensors.numpy import load_file, save_file

from cofi_jax.checkpoints import hf_config, hf_names
from cofi_jax.data.toy import demo_tokenizer
from cofi_jax.errors import UserError
from cofi_jax.export import to_transformers
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig

torch = pytest.importorskip("torch")


TOLERANCE = 1e-5


# An empty layer, either block alone, both; one head, one unit.
HEADS, UNITS = (3, 0, 0, 1, 2), (17, 5, 0, 0, 1)


TENSOR = "bert.encoder.layer.{}.{}"


pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("quick_compile", "code_cache"),
]


def sizes(family="bert", problem="classification", **others):
    """Of a model sliced from one of 48 hidden dimensions and 6 heads."""
    offset = 0 if family == "bert" else 2
    return EncoderConfig(
        **{
            "vocab_size": 31,
            "hidden_size": 44,
            "heads": HEADS,
            "head_size": 8,
            "intermediate": UNITS,
            "pooler_size": 0 if problem == "span" else 48,
            "num_labels": {"span": 2, "regression": 1}.get(problem, 3),
            "max_positions": 16 + offset,
            "type_vocab_size": 1 if offset else 2,
            "problem": problem,
            "model_type": family,
            "position_offset": offset,
        }
        | others
    )


def random_widths(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 6))

    def widths(most):
        drawn = rng.integers(0, most, layers, endpoint=True)
        return tuple((drawn * (rng.random(layers) < 0.6)).tolist())

    return {"heads": widths(6), "intermediate": widths(30)}


def batch_of(config, seed=0, lengths=(9, 5, 1, 0)):
    """Pairs of sentences, padded on the right; the last row is padding alone."""
    rng = np.random.default_rng(seed)
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    second = np.arange(max(lengths)) >= np.array(lengths)[:, None] // 2
    return {
        "input_ids": np.where(real, rng.integers(3, config.vocab_size, real.shape), 1),
        "attention_mask": real.astype(np.int32),
        "token_type_ids": (real & second & (config.type_vocab_size > 1)).astype(int),
    }


def ours(config, params, batch):
    with jax.default_matmul_precision("highest"):
        return jax.jit(Encoder(config).apply)({"params": params}, batch)


def exported(folder, config, seed=0, labels=(), **options):
    """The parameters of a random model, and `folder` with that model."""
    folder.mkdir(parents=True)
    params = random_params(config, seed)
    to_transformers.write(folder, params, config, labels, **options)
    return params


def auto(folder, name="SequenceClassification", **options):
    import transformers

    auto_class = getattr(transformers, f"AutoModelFor{name}" if name else "AutoModel")
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def tensors_of(batch):
    return {k: torch.tensor(np.asarray(v, np.int64)) for k, v in batch.items()}


def assert_close(theirs, expected, real=...):
    theirs = np.asarray(theirs.detach() if torch.is_tensor(theirs) else theirs)
    expected = np.asarray(expected)
    assert theirs.shape == expected.shape and theirs.dtype == expected.dtype
    np.testing.assert_allclose(theirs[real], expected[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        sizes(),
        sizes(problem="span"),
        sizes(problem="regression"),
        sizes("roberta"),
        sizes("xlm-roberta", "span"),
        sizes("camembert", "regression"),
        sizes(type_vocab_size=1, pooler_activation="relu"),
        *(sizes(**random_widths(seed)) for seed in range(4)),
        sizes(heads=(0, 0), intermediate=(0, 0)),
        *(sizes(activation=name) for name in ("gelu_new", "relu", "silu")),
    ],
    ids=lambda c: f"{c.model_type}-{c.problem}-{c.activation}-{c.heads}",
)
def test_logits_are_ours(tmp_path, config):
    params = exported(tmp_path / "pruned", config)
    batch = batch_of(config)
    logits = ours(config, params, batch).logits
    # A test of weights that make no difference would test nothing.
    assert np.abs(np.diff(logits[:3], axis=0)).max() > 0.1
    predict = to_transformers.load(tmp_path / "pruned")
    real = batch["attention_mask"] > 0 if config.problem == "span" else ...
    assert_close(predict(batch), logits, real)


def test_every_length(tmp_path):
    """RoBERTa has no token in the first two rows of its position table."""
    config = sizes("roberta")
    params = exported(tmp_path / "pruned", config)
    predict = to_transformers.load(tmp_path / "pruned")
    for lengths in [(1,), (16, 3)]:
        batch = batch_of(config, seed=1, lengths=lengths)
        assert_close(predict(batch), ours(config, params, batch).logits)
    with pytest.raises(IndexError):
        predict(batch_of(config, lengths=(17,)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_alone(tmp_path, attention):
    """Both kinds of attention; hidden states; a mask may be left out."""
    config = sizes()
    params = exported(tmp_path / "pruned", config)
    model = auto(tmp_path / "pruned", "", attn_implementation=attention)
    batch = batch_of(config, lengths=(9, 9))
    inputs = tensors_of(batch)
    del inputs["attention_mask"]
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    output = model(**inputs, output_hidden_states=True)
    expected = ours(config, params, batch).hidden_states
    for theirs, state in zip(output.hidden_states, expected, strict=True):
        assert_close(theirs, state)
    assert_close(output.last_hidden_state, expected[-1])
    del inputs["input_ids"]
    again = model(**inputs, inputs_embeds=embedded, return_dict=False)
    assert_close(again[0], expected[-1])
    with pytest.raises(ValueError, match="either"):
        model(**inputs)
    if attention == "eager":
        weights = model(**inputs, inputs_embeds=embedded, output_attentions=True)
        heads = [w if w is None else w.shape[1] for w in weights.attentions]
        assert heads == [h or None for h in config.heads]
    else:
        with pytest.raises(ValueError, match="eager"):
            model(**inputs, inputs_embeds=embedded, output_attentions=True)


# A dense one is a BERT.


def dense_pair(folder, problem, **fields):
    """Our model and transformers' own with the same tensors."""
    import transformers

    config = sizes(
        problem=problem,
        hidden_size=48,
        heads=(6, 6),
        intermediate=(20, 20),
        dropout=0.0,
    )
    params = exported(folder, config)
    described = hf_config.to_fields(config) | fields
    name = described["architectures"][0]
    described = transformers.BertConfig(**described, attn_implementation="eager")
    stock = getattr(transformers, name)(described)
    tensors = hf_names.to_torch(params, config)
    stock.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
    options = {"attn_implementation": "eager"} | fields
    return auto(folder, name.removeprefix("BertFor"), **options), stock, config


@pytest.mark.parametrize(
    ("problem", "fields", "targets"),
    [
        ("classification", {}, {"labels": torch.tensor([0, 2])}),
        ("classification", {"problem_type": None}, {"labels": torch.tensor([1, 1])}),
        (
            "classification",
            {"problem_type": "multi_label_classification"},
            {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0]])},
        ),
        ("regression", {}, {"labels": torch.tensor([0.5, 3.0])}),
        (
            "span",
            {},
            {
                "start_positions": torch.tensor([2, 99]),
                "end_positions": torch.tensor([[3], [1]]),
            },
        ),
    ],
)
def test_dense_one_is_bert(tmp_path, problem, fields, targets):
    """Losses, hidden states and attention too, and all of their gradients."""
    model, stock, config = dense_pair(tmp_path / "dense", problem, **fields)
    inputs = tensors_of(batch_of(config, lengths=(9, 5)))
    more = {"output_hidden_states": True, "output_attentions": True}
    theirs, expected = (m(**inputs, **targets, **more) for m in (model, stock))
    assert list(theirs) == list(expected)
    for one, other in zip(theirs.to_tuple(), expected.to_tuple(), strict=True):
        if torch.is_tensor(one):
            one, other = (one,), (other,)
        for x, y in zip(one, other, strict=True):
            assert_close(x, y.detach())
    theirs.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients.pop(name))
    assert not gradients


# What does not fit is never a model.


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes):
    def edit(folder):
        fields = json.loads((folder / "config.json").read_text())
        for name, change in changes.items():
            fields[name] = change(fields[name])
        (folder / "config.json").write_text(json.dumps(fields))

    return edit


def lacks(name):
    return edit_tensors(lambda tensors: tensors.pop(name))


def has(name):
    extra = np.zeros(44, np.float32)
    return edit_tensors(lambda tensors: tensors.__setitem__(name, extra))


def at(layer, value):
    return lambda widths: [*widths[:layer], value, *widths[layer + 1 :]]


QUERY = TENSOR.format(0, "attention.self.query.weight")


DOWN = TENSOR.format(4, "output.dense.bias")


ABSENT = TENSOR.format(1, "attention.output.LayerNorm.weight")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lacks(QUERY), QUERY),
        (lacks(DOWN), DOWN),
        (lacks("bert.embeddings.LayerNorm.bias"), "embeddings.LayerNorm.bias"),
        (lacks("bert.pooler.dense.weight"), "pooler.dense.weight"),
        (lacks("classifier.bias"), "classifier.bias"),
        (has(ABSENT), ABSENT),
        (has("bert.encoder.layer.5.output.dense.bias"), "layer.5.output.dense.bias"),
        (has("classifier.out_proj.bias"), "classifier.out_proj.bias"),
        (edit_config(attention_heads=at(4, 0)), "layer.4.attention"),
        (edit_config(attention_heads=at(4, 1)), "layer.4.attention"),
        (edit_config(intermediate_sizes=at(1, 6)), "layer.1.intermediate"),
        (edit_config(intermediate_sizes=at(2, 6)), "layer.2.intermediate"),
        (edit_config(hidden_size=lambda width: width + 4), "embeddings"),
        (edit_config(head_dim=lambda width: width * 2), "attention"),
        (edit_config(pooler_size=lambda width: width + 1), "pooler"),
        (edit_config(attention_heads=lambda heads: heads[1:]), "attention_heads"),
        (edit_config(num_hidden_layers=lambda _: 4), "num_hidden_layers is 4"),
        (edit_config(num_attention_heads=lambda _: 2), "num_attention_heads is 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_never_loads(tmp_path, edit, named):
    folder = tmp_path / "pruned"
    exported(folder, sizes())
    edit(folder)
    # Of shapes transformers itself complains, and names them in its log only.
    with pytest.raises((ValueError, RuntimeError)):
        auto(folder)
    with pytest.raises(ValueError, match=named):
        auto(folder, ignore_mismatched_sizes=True)


def test_another_head_is_asked_for_not_stumbled_into(tmp_path):
    config, folder = sizes(), tmp_path / "pruned"
    params = exported(folder, config)
    batch = batch_of(config)
    states = ours(config, params, batch).hidden_states
    with pytest.raises(RuntimeError):
        auto(folder, num_labels=5)
    wider = auto(folder, num_labels=5, ignore_mismatched_sizes=True).eval()
    output = wider(**tensors_of(batch), output_hidden_states=True)
    assert output.logits.shape == (4, 5)
    assert_close(output.hidden_states[-1], states[-1])
    # The encoder alone, saved, is the start of another classifier.
    auto(folder, "").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="classifier.weight"):
        edit_tensors(lambda tensors: tensors.pop("classifier.weight"))(folder)
        auto(folder)
    output = auto(tmp_path / "encoder")(**tensors_of(batch), output_hidden_states=True)
    assert_close(output.hidden_states[-1], states[-1])


# Code that travels with the weights.


def test_code_needs_nothing_of_ours(tmp_path):
    exported(tmp_path / "pruned", sizes())
    files = sorted((tmp_path / "pruned").glob("*.py"))
    assert [f.name for f in files] == ["configuration_cofi.py", "modeling_cofi.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"torch"}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ("torch", "transformers")


def test_each_folder_runs_its_own_code(tmp_path, monkeypatch):
    """Two runs leave folders of one name; a later version's code may differ."""
    config, batch = sizes(), batch_of(sizes())
    params = exported(tmp_path / "a" / "pruned", config)
    shutil.copytree(to_transformers._CODE, tmp_path / "code")
    path = tmp_path / "code" / "modeling_cofi.py"
    before, after = "logits = self.classifier(", "logits = 100 + self.classifier("
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    monkeypatch.setattr(to_transformers, "_CODE", tmp_path / "code")
    exported(tmp_path / "b" / "pruned", config)
    expected = ours(config, params, batch).logits
    for parent, shift in (("a", 0), ("b", 100), ("a", 0)):
        predict = to_transformers.load(tmp_path / parent / "pruned")
        np.testing.assert_allclose(predict(batch), expected + shift, rtol=0, atol=1e-4)


@pytest.mark.parametrize("problem", ["classification", "span"])
def test_saved_again(tmp_path, problem):
    config, folder = sizes(problem=problem), tmp_path / "pruned"
    params = exported(folder, config, labels=("no", "yes", "so")[: config.num_labels])
    name = "QuestionAnswering" if problem == "span" else "SequenceClassification"
    auto(folder, name).save_pretrained(tmp_path / "again")
    batch = batch_of(config)
    real = batch["attention_mask"] > 0 if problem == "span" else ...
    theirs = to_transformers.load(tmp_path / "again")(batch)
    assert_close(theirs, ours(config, params, batch).logits, real)
    written, again = (
        json.loads((path / "config.json").read_text())
        for path in (folder, tmp_path / "again")
    )
    assert not {k for k in written if written[k] != again.get(k)}
    for file in folder.glob("*.py"):
        assert file.read_text() == (tmp_path / "again" / file.name).read_text()


SCRIPT = """
import json, sys

blocked = ("jax", "jaxlib", "flax", "orbax", "cofi_jax", "ml_dtypes")
sys.modules.update({name: None for name in blocked})

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, rows = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True
)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(*zip(*rows), padding=True, return_tensors="pt")
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
pairs = [{"text": one, "text_pair": other} for one, other in rows]
compiled = torch.export.export(model, (), dict(inputs)).module()
answer = {
    "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
    "logits": model(**inputs).logits.tolist(),
    "exported": compiled(**inputs).logits.tolist(),
    "one by one": classify(pairs, top_k=None),
    "in a batch": classify(pairs, top_k=None, batch_size=2),
}
assert not any(sys.modules[name] for name in blocked)
print(json.dumps(answer))
"""


def test_nothing_of_jax_is_needed(tmp_path):
    """In another process, by its name, a pipeline, and frozen by torch.export."""
    folder, tokenizer = tmp_path / "pruned", demo_tokenizer()
    config = sizes(vocab_size=len(tokenizer))
    labels = ("no", "maybe", "yes")
    params = exported(folder, config, labels=labels)
    tokenizer.save_pretrained(folder)
    rows = [["the plot is great", "the cast was never dull"], ["the film", "bad"]]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, json.dumps(rows)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    batch = {k: np.array(v, np.int32) for k, v in answer["inputs"].items()}
    for name in ("token_type_ids", "attention_mask"):
        assert set(batch[name].flat) == {0, 1}
    logits = ours(config, params, batch).logits
    for key in ("logits", "exported"):
        assert_close(np.float32(answer[key]), logits)
    for key in ("one by one", "in a batch"):
        scores = [{s["label"]: s["score"] for s in row} for row in answer[key]]
        scores = [[row[label] for label in labels] for row in scores]
        assert_close(np.float32(scores), jax.nn.softmax(logits))


# Training and storage.


@pytest.mark.parametrize("problem", ["classification", "regression", "span"])
def test_gradients_reach_every_parameter(tmp_path, problem):
    config, folder = sizes(problem=problem), tmp_path / "pruned"
    exported(folder, config)
    name = "QuestionAnswering" if problem == "span" else "SequenceClassification"
    model = auto(folder, name).train()
    torch.manual_seed(0)
    output = model(**tensors_of(batch_of(config, lengths=(9, 5, 4, 2))))
    logits = torch.cat([x for x in output.values()], -1)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # A bias of the keys moves all scores of a query alike.
        if not name.endswith("self.key.bias"):
            assert parameter.grad.abs().max() > 1e-4, name


def test_bfloat16_is_half_the_size(tmp_path):
    config = sizes(vocab_size=300)
    params = exported(tmp_path / "whole", config)
    exported(tmp_path / "half", config, dtype="bfloat16")
    whole, half = (
        (tmp_path / name / "model.safetensors").stat().st_size
        for name in ("whole", "half")
    )
    stored = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert whole - half == pytest.approx(stored, abs=200)  # of the header's padding
    with safetensors.safe_open(
        tmp_path / "half" / "model.safetensors", framework="pt"
    ) as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}
    assert auto(tmp_path / "half").dtype == torch.bfloat16
    # What is computed in float32 with the rounded weights is exact.
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    batch = batch_of(config)
    theirs = to_transformers.load(tmp_path / "half")(batch)
    assert_close(theirs, ours(config, rounded, batch).logits)
    assert np.abs(theirs - ours(config, params, batch).logits).max() > TOLERANCE


def test_jax_arrays_are_taken_too(tmp_path):
    config = sizes("roberta")
    exported(tmp_path / "numpy", config)
    (tmp_path / "jax").mkdir()
    params = jax.tree.map(jax.numpy.asarray, random_params(config, 0))
    to_transformers.write(tmp_path / "jax", params, config, ())
    for file in (tmp_path / "numpy").iterdir():
        assert file.read_bytes() == (tmp_path / "jax" / file.name).read_bytes()


def test_config_json(tmp_path):
    labels = ("no", "maybe", "yes")
    exported(tmp_path / "pruned", sizes("roberta"), labels=labels)
    fields = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert fields["attention_heads"] == list(HEADS)
    assert fields["intermediate_sizes"] == list(UNITS)
    assert (fields["num_hidden_layers"], fields["num_attention_heads"]) == (5, 3)
    assert (fields["intermediate_size"], fields["max_position_embeddings"]) == (17, 16)
    assert fields["id2label"] == dict(zip("012", labels, strict=True))
    assert fields["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert fields["pad_token_id"] == 1


@pytest.mark.parametrize(
    ("labels", "dtype", "said"),
    [((), "float16", "dtype='float16'"), (("no", "yes"), "float32", "labels=")],
)
def test_what_is_not_legal(tmp_path, labels, dtype, said):
    with pytest.raises(UserError, match=said):
        exported(tmp_path / "pruned", sizes(), labels=labels, dtype=dtype)
    assert not list((tmp_path / "pruned").iterdir())
