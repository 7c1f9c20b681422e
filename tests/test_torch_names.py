"""Parameters under PyTorch's names: sliced models read, dense ones written back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import record_parity
from conftest import random_params
from safetensors.numpy import load_file, save_file

from cofi_jax.checkpoints import hf_config, hf_names, huggingface, tokenizers
from cofi_jax.config import Model
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing

pytestmark = pytest.mark.usefixtures("quick_compile")


LABELS = ("entailment", "neutral", "contradiction")


FIELD = "teacher.path"


KINDS = [
    ("bert", "classification"),
    ("bert", "span"),
    ("roberta", "classification"),
    ("roberta", "span"),
]


def sizes(family, problem, hidden=48, **others):
    """Of a dense model that transformers could have made."""
    return EncoderConfig(
        **{
            "vocab_size": 31,
            "hidden_size": hidden,
            "heads": (6,) * 4,
            "head_size": hidden // 6,
            "intermediate": (20,) * 4,
            "pooler_size": 0 if problem == "span" else hidden,
            "num_labels": {"span": 2, "regression": 1}.get(problem, 3),
            "max_positions": 16,
            "type_vocab_size": 2 if family == "bert" else 1,
            "problem": problem,
            "model_type": family,
            "pooler_activation": "relu" if family == "distilbert" else "tanh",
            "position_offset": 0 if family in ("bert", "distilbert") else 2,
        }
        | others
    )


def batch_of(config, seed=0):
    rng = np.random.default_rng(seed)
    real = np.arange(9) < np.array([9, 5, 1])[:, None]
    return {
        "input_ids": np.where(real, rng.integers(3, config.vocab_size, real.shape), 1),
        "attention_mask": real.astype(np.int32),
        "token_type_ids": rng.integers(0, config.type_vocab_size, real.shape),
    }


def logits_of(config, params, batch, masks=None):
    """Float32 logits, of real tokens only where there is one for each."""
    variables = {"params": params} | ({"masks": masks} if masks else {})
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(Encoder(config).apply)(variables, batch).logits
    return logits[batch["attention_mask"] > 0] if logits.ndim == 3 else logits


def load(folder, problem="classification", labels=(), order=(), field=FIELD):
    return huggingface.load_classifier(
        folder,
        field=field,
        problem=problem,
        labels=labels,
        label_order=order,
        model=Model(),
    )


def assert_trees_equal(ours, others):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y, strict=True), ours, others
    )


# Sliced checkpoints.


def random_masks(config, seed):
    """Ragged, some gates soft, a layer without attention, one without anything."""
    rng = np.random.default_rng(seed)

    def gates(*shape, closed):
        soft = rng.uniform(0.2, 1, shape) if seed % 2 else np.ones(shape)
        return np.where(rng.random(shape) < closed, 0, soft).astype(np.float32)

    layers = len(config.heads)
    masks = {
        "head": gates(layers, config.heads[0], closed=0.5),
        "mha": gates(layers, closed=0.2),
        "intermediate": gates(layers, config.intermediate[0], closed=0.6),
        "ffn": gates(layers, closed=0.2),
        "hidden": gates(config.hidden_size, closed=0),
    }
    masks["hidden"][rng.permutation(config.hidden_size)[:4]] = 0
    bare, *others = rng.permutation(layers)
    masks["mha"][bare] = masks["ffn"][bare] = 0
    masks["mha"][others[0]] = masks["ffn"][others[1]] = 0
    masks["mha"][others[2]] = masks["head"][others[2], 0] = 1
    return masks


def original_checkpoint(params, sliced, dense):
    """What the original's `torch.save(model.state_dict())` holds, written by hand."""
    family, d = dense.model_type, dense.head_size
    kept, tensors = sliced.hidden_size, {}

    def put(name, array, *shape):
        assert array.shape == shape, name
        tensors[name] = np.ascontiguousarray(array)

    def put_norm(name, node, width):
        put(f"{name}.weight", node["scale"], width)
        put(f"{name}.bias", node["bias"], width)

    tables = params["embeddings"]
    start = f"{family}.embeddings."
    put(f"{start}word_embeddings.weight", tables["word"], dense.vocab_size, kept)
    put(
        f"{start}position_embeddings.weight",
        tables["position"],
        dense.max_positions,
        kept,
    )
    put(
        f"{start}token_type_embeddings.weight",
        tables["type"],
        dense.type_vocab_size,
        kept,
    )
    put_norm(f"{start}LayerNorm", tables["norm"], kept)
    put(f"{start}position_ids", np.arange(dense.max_positions)[None], 1, 16)
    # The LayerNorm of a block that is not there: of the dense width after attention.
    unit, left = {"scale": np.ones(48), "bias": np.zeros(48)}, {}
    left["scale"], left["bias"] = np.ones(kept), np.zeros(kept)
    for i in range(len(dense.heads)):
        start = f"{family}.encoder.layer.{i}."
        layer = params.get(f"layer_{i}", {})
        heads, width = sliced.heads[i], sliced.intermediate[i]
        if heads:
            for name in ("query", "key", "value"):
                node = layer["attention"][name]
                rows = [node["kernel"][:, head].T for head in range(heads)]
                place = f"{start}attention.self.{name}"
                put(f"{place}.weight", np.concatenate(rows), heads * d, kept)
                put(f"{place}.bias", np.concatenate(node["bias"]), heads * d)
            node = layer["attention"]["output"]
            columns = [node["kernel"][head].T for head in range(heads)]
            place = f"{start}attention.output.dense"
            put(f"{place}.weight", np.concatenate(columns, 1), kept, heads * d)
            put(f"{place}.bias", node["bias"], kept)
            put_norm(
                f"{start}attention.output.LayerNorm", layer["attention_norm"], kept
            )
        else:
            put_norm(f"{start}attention.output.LayerNorm", unit, 48)
        if width:
            up, down = layer["ffn"]["up"], layer["ffn"]["down"]
            put(f"{start}intermediate.dense.weight", up["kernel"].T, width, kept)
            put(f"{start}intermediate.dense.bias", up["bias"], width)
            put(f"{start}output.dense.weight", down["kernel"].T, kept, width)
            put(f"{start}output.dense.bias", down["bias"], kept)
            put_norm(f"{start}output.LayerNorm", layer["ffn_norm"], kept)
        else:
            put_norm(f"{start}output.LayerNorm", left, kept)
    put("layer_transformation.weight", np.eye(48, kept), 48, kept)
    put("layer_transformation.bias", np.zeros(48), 48)
    last = params["classifier"]
    if dense.problem == "span":
        put("qa_outputs.weight", last["kernel"].T, 2, kept)
        put("qa_outputs.bias", last["bias"], 2)
        put(f"{family}.pooler.dense.weight", np.zeros((48, kept)), 48, kept)
        put(f"{family}.pooler.dense.bias", np.zeros(48), 48)
        return tensors
    first = "bert.pooler.dense" if family == "bert" else "classifier.dense"
    final = "classifier" if family == "bert" else "classifier.out_proj"
    put(f"{first}.weight", params["pooler"]["kernel"].T, 48, kept)
    put(f"{first}.bias", params["pooler"]["bias"], 48)
    put(f"{final}.weight", last["kernel"].T, 3, 48)
    put(f"{final}.bias", last["bias"], 3)
    return tensors


def dense_config_json(config):
    return {
        "architectures": ["CoFiBertForSequenceClassification"],
        "do_layer_distill": True,
        "pruned_heads": {"0": [0, 2], "3": [1]},
        "model_type": config.model_type,
        "hidden_act": "gelu",
        "hidden_size": 48,
        "intermediate_size": 20,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 16,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "pad_token_id": 0 if config.model_type == "bert" else 1,
        "type_vocab_size": config.type_vocab_size,
        "vocab_size": 31,
    }


def write_sliced(folder, family, problem, seed):
    """A sliced checkpoint of a random structure.

    Returns:
      The dense config and parameters, the masks, the sliced config and parameters.
    """
    dense = sizes(family, problem)
    params = random_params(dense, seed)
    masks = random_masks(dense, seed)
    small, spec = slicing.prune(params, masks, dense)
    sliced = spec.config(dense)
    tensors = original_checkpoint(jax.tree.map(np.asarray, small), sliced, dense)
    tensors = {
        k: v.astype(np.float32) if v.dtype == float else v for k, v in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dense_config_json(dense)))
    return dense, params, masks, sliced, small


@pytest.mark.parametrize(("family", "problem"), KINDS)
def test_sliced_checkpoint_computes_what_the_masked_model_does(
    tmp_path, family, problem
):
    structures = set()
    for seed in range(3):
        written = write_sliced(tmp_path, family, problem, seed)
        dense, params, masks, sliced, small = written
        config, loaded = load(tmp_path, problem)
        assert config == sliced
        assert 0 in config.heads and 0 in config.intermediate
        assert config.hidden_size == 44
        assert config.longest == (16 if family == "bert" else 14)
        assert_trees_equal(loaded, jax.tree.map(np.asarray, small))
        batch = batch_of(dense, seed)
        expected = logits_of(dense, params, batch, masks)
        assert expected.std() > 0.05
        np.testing.assert_allclose(
            logits_of(config, loaded, batch), expected, rtol=0, atol=1e-5
        )
        structures.add((config.heads, config.intermediate))
    assert len(structures) == 3


@pytest.mark.torch
def test_sliced_checkpoint_as_a_torch_file(tmp_path):
    """As those of the original are published."""
    import torch

    *_, small = write_sliced(tmp_path, "bert", "classification", 3)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_trees_equal(load(tmp_path)[1], jax.tree.map(np.asarray, small))


def test_sliced_checkpoint_is_no_encoder_to_start_from(tmp_path):
    write_sliced(tmp_path, "bert", "classification", 3)
    with pytest.raises(UserError, match="'hidden': 44.*a pruned model; give a dense"):
        huggingface.load_encoder(
            tmp_path,
            field=FIELD,
            num_labels=3,
            problem="classification",
            model=Model(),
            key=jax.random.key(0),
        )


def change_sliced(folder, change):
    write_sliced(folder, "bert", "classification", 3)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "lost", ["attention.self.key.bias", "attention.output.dense.weight"]
)
def test_sliced_checkpoint_with_half_a_block(tmp_path, lost):
    *_, sliced, _ = write_sliced(tmp_path, "bert", "classification", 3)
    layer = next(i for i, heads in enumerate(sliced.heads) if heads)
    name = f"bert.encoder.layer.{layer}.{lost}"
    change_sliced(tmp_path, lambda w: {k: v for k, v in w.items() if k != name})
    with pytest.raises(UserError, match=f"lacks {name}$"):
        load(tmp_path)


def test_sliced_checkpoint_with_half_a_head(tmp_path):
    *_, sliced, _ = write_sliced(tmp_path, "bert", "classification", 3)
    layer = next(i for i, heads in enumerate(sliced.heads) if heads)
    name = f"bert.encoder.layer.{layer}.attention.self.query.weight"
    change_sliced(tmp_path, lambda w: w | {name: w[name][:-3]})
    with pytest.raises(UserError, match=f"{name} has .* whole heads of 8"):
        load(tmp_path)


def test_sliced_checkpoint_that_lacks_a_layer_altogether(tmp_path):
    """A slicer leaves LayerNorms; without them config.json is that of another model."""
    change_sliced(tmp_path, lambda w: {k: v for k, v in w.items() if "r.2." not in k})
    with pytest.raises(UserError, match=r"lacks bert.encoder.layer.2.\*, .* 4 layers"):
        load(tmp_path)


# The order of the classes.


def with_id2label(folder, names):
    fields = json.loads((folder / "config.json").read_text())
    fields["id2label"] = names
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def classifier(tmp_path):
    shutil.copytree(record_parity.FIXTURES / "tiny_bert", tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture(scope="module")
def last_layer():
    tensors = load_file(record_parity.FIXTURES / "tiny_bert" / "model.safetensors")
    return tensors["classifier.weight"].T, tensors["classifier.bias"]


def assert_rows(folder, rows, last_layer, order=()):
    classifier = load(folder, labels=LABELS, order=order)[1]["classifier"]
    kernel, bias = last_layer
    np.testing.assert_array_equal(classifier["kernel"], kernel[:, rows])
    np.testing.assert_array_equal(classifier["bias"], bias[rows])


def test_rows_go_into_the_tasks_order(classifier, last_layer):
    """Published CoFi models of MNLI say contradiction, entailment, neutral."""
    order = ("contradiction", "entailment", "neutral")
    assert_rows(classifier, [1, 2, 0], last_layer, order)
    assert_rows(classifier, [0, 1, 2], last_layer, LABELS)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ({"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}, [2, 1, 0]),
        ({"2": "neutral", "1": "Entailment", "0": "contradiction"}, [1, 2, 0]),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, [0, 1, 2]),
        (["neutral", "entailment", "contradiction"], [1, 0, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_names_in_config_json_count_where_they_are_the_tasks(
    classifier, last_layer, names, rows
):
    with_id2label(classifier, names)
    assert_rows(classifier, rows, last_layer)


def test_what_the_user_says_counts_more_than_config_json(classifier, last_layer):
    with_id2label(classifier, {"0": "neutral", "1": "entailment", "2": "contradiction"})
    order = ("contradiction", "entailment", "neutral")
    assert_rows(classifier, [1, 2, 0], last_layer, order)


@pytest.mark.parametrize("field", ["teacher.path", "teacher"])
@pytest.mark.parametrize(
    "order", [("neutral",), ("yes", "no", "maybe"), (*LABELS, "neutral")]
)
def test_an_order_of_other_classes(classifier, order, field):
    with pytest.raises(UserError) as caught:
        load(classifier, labels=LABELS, order=order, field=field)
    assert str(caught.value) == (
        f"teacher.labels={order!r}: must be a permutation of {LABELS}, in the order "
        "of the model"
    )


# Dense models written back.


def save(folder, config, seed=0, labels=()):
    params = random_params(config, seed)
    huggingface.save_hugging_face(folder, params, config, labels=labels)
    return params


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("problem", ["classification", "regression", "span"])
def test_ours_to_theirs_to_ours_is_the_identity(tmp_path, family, problem):
    config = sizes(family, problem, activation="relu", layer_norm_eps=1e-5)
    params = save(tmp_path / "model", config)
    loaded, again = load(tmp_path / "model", problem)
    assert loaded == config
    assert_trees_equal(again, params)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize(
    ("fixture", "problem"),
    [
        ("tiny_bert", "classification"),
        ("tiny_roberta", "classification"),
        ("tiny_span", "span"),
    ],
)
def test_theirs_to_ours_to_theirs_is_the_identity(fixture, problem):
    folder = record_parity.FIXTURES / fixture
    config, params = load(folder, problem)
    tensors, fields = hf_names.to_hugging_face(params, config)
    theirs = load_file(folder / "model.safetensors")
    assert tensors.keys() == theirs.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True)
        assert array.flags.c_contiguous
    described = json.loads((folder / "config.json").read_text())
    same = "architectures model_type hidden_size num_hidden_layers vocab_size pad_token"
    same += "_id type_vocab_size max_position_embeddings layer_norm_eps hidden_act"
    for name in same.split():
        assert fields[name] == described[name]


def test_transformers_reads_the_config(tmp_path):
    from transformers import AutoConfig

    labels = ("contradiction", "entailment", "neutral")
    save(tmp_path / "model", sizes("xlm-roberta", "classification"), labels=labels)
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == "XLMRobertaConfig"
    assert theirs.architectures == ["XLMRobertaForSequenceClassification"]
    assert theirs.id2label == dict(enumerate(labels))
    assert theirs.label2id == {label: row for row, label in enumerate(labels)}
    assert (theirs.num_labels, theirs.pad_token_id) == (3, 1)
    assert theirs.problem_type == "single_label_classification"
    # And so do we, whatever order the task has.
    _, params = load(tmp_path / "model")
    _, ordered = load(tmp_path / "model", labels=LABELS)
    kernel = params["classifier"]["kernel"][:, [1, 2, 0]]
    np.testing.assert_array_equal(ordered["classifier"]["kernel"], kernel)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "problem", "architecture"),
    [
        ("bert", "classification", "BertForSequenceClassification"),
        ("bert", "regression", "BertForSequenceClassification"),
        ("bert", "span", "BertForQuestionAnswering"),
        ("roberta", "classification", "RobertaForSequenceClassification"),
        ("roberta", "span", "RobertaForQuestionAnswering"),
        ("xlm-roberta", "classification", "XLMRobertaForSequenceClassification"),
        ("camembert", "span", "CamembertForQuestionAnswering"),
    ],
)
def test_pytorch_computes_the_same_from_what_is_saved(
    tmp_path, family, problem, architecture
):
    import transformers

    config = sizes(family, problem)
    params = save(tmp_path / "model", config)
    model, report = getattr(transformers, architecture).from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values()), report
    batch = batch_of(config)
    expected = record_parity.torch_outputs(
        model.eval(), {k: v.astype(np.int64) for k, v in batch.items()}
    )["logits"]
    if problem == "span":
        expected = expected[batch["attention_mask"] > 0]
    np.testing.assert_allclose(
        logits_of(config, params, batch), expected, rtol=0, atol=1e-5
    )


DENSE = sizes("bert", "classification")


@pytest.mark.parametrize(
    "sliced",
    [
        {"heads": (6, 5, 6, 6)},
        {"heads": (5, 5, 5, 5)},
        {"heads": (0, 0, 0, 0)},
        {"intermediate": (20, 20, 0, 20)},
        {"intermediate": (0, 0, 0, 0)},
        {"hidden_size": 44},
        {"hidden_size": 44, "pooler_size": 44},
        {"pooler_size": 32},
        {"heads": (), "intermediate": ()},
    ],
    ids=str,
)
def test_transformers_cannot_hold_a_sliced_model(tmp_path, sliced):
    config = dataclasses.replace(DENSE, **sliced)
    with pytest.raises(UserError, match="^config=.*must be a dense model's") as caught:
        save(tmp_path / "model", config)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    with pytest.raises(UserError, match="^folder=.*exists; nothing is written over"):
        save(tmp_path, DENSE)
    assert not any(tmp_path.iterdir())


def test_classes_without_a_name(tmp_path):
    with pytest.raises(UserError, match="has 3 classes, labels has 2"):
        save(tmp_path / "model", DENSE, labels=("no", "yes"))


def test_parameters_of_another_model(tmp_path):
    params = random_params(sizes("bert", "classification", hidden=24), 0)
    with pytest.raises(UserError, match="^params=.*must have the structure"):
        huggingface.save_hugging_face(tmp_path / "model", params, DENSE)
    assert not any(tmp_path.iterdir())


def test_a_folder_appears_only_once_it_is_complete(tmp_path):
    class Broken:
        is_fast = False

        def save_pretrained(self, path):
            raise RuntimeError("disk full")

    folder, params = tmp_path / "model", random_params(DENSE, 0)
    with pytest.raises(RuntimeError, match="disk full"):
        huggingface.save_hugging_face(folder, params, DENSE, tokenizer=Broken())
    assert not folder.exists()
    huggingface.save_hugging_face(folder, params, DENSE)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_comes_along(tmp_path):
    from cofi_jax.data.toy import demo_tokenizer

    tokenizer = demo_tokenizer()
    config = dataclasses.replace(DENSE, vocab_size=len(tokenizer))
    folder = tmp_path / "deep" / "model"
    huggingface.save_hugging_face(
        folder, random_params(config, 0), config, tokenizer=tokenizer
    )
    again = tokenizers.load_tokenizer(folder, FIELD)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_classes_that_differ_in_case_alone():
    fields = {"id2label": {"0": "us", "1": "US"}}
    assert hf_config.class_rows(fields, ("US", "us"), (), "model") == [1, 0]
    assert hf_config.class_rows({}, ("US", "us"), ("us", "US"), "model") == [1, 0]


def test_classes_of_other_names_are_not_guessed():
    labels = ("entailment", "not_entailment")
    fields = {"id2label": {"0": "not entailment", "1": "entailment"}}
    with pytest.raises(
        hf_config.UnsupportedCheckpoint, match="not entailment.*teacher.labels"
    ):
        hf_config.class_rows(fields, labels, (), "teacher.path")
    for nameless in ({}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}):
        assert hf_config.class_rows(nameless, labels, (), "model") is None
