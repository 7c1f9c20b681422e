"""Folders of all layouts: read as transformers reads them, or refused in one line."""

import gzip
import json
import math

import foreign_folders as folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_folders import ROBERTA, WORDS, change, make, write
from safetensors.numpy import load_file, save_file

from cofi_jax.checkpoints import (
    foreign,
    hf_config,
    huggingface,
    saved_model,
    tokenizers,
)
from cofi_jax.config import Data, Model
from cofi_jax.data import tasks
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder

pytestmark = pytest.mark.usefixtures("quick_compile")

FIELD = "model.path"
TEXTS = ["warm tea", "cold cup a", "", "Tea \u4e16 caf\u00e9"]
XLMR = ROBERTA | {"model_type": "xlm-roberta"}


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "encoder")
    return tmp_path / "encoder"


def refused(folder, call=None):
    """The one line that refuses a folder."""
    with pytest.raises(UserError) as caught:
        (call or tokenizers.load_tokenizer)(folder, FIELD)
    said = str(caught.value)
    assert said.startswith(f"{FIELD}={str(folder)!r}: ") and "\n" not in said
    return said


def load(folder, labels=("x", "y"), problem="classification"):
    return huggingface.load_classifier(
        folder, field=FIELD, problem=problem, labels=labels, model=Model()
    )


def read_fields(folder, field):
    huggingface.read_config(folder, field, 2, Model())


# Tokenizers that know the texts

SLOW = {"sentencepiece.bpe.model": folders.sentencepiece_model}

GOOD = {
    "WordPiece": ({}, folders.wordpiece_files, {}),
    "WordPiece, lines of Windows": (
        {},
        lambda: {"vocab.txt": "\r\n".join(WORDS) + "\r\n"},
        {},
    ),
    "byte-level BPE": (ROBERTA, folders.bpe_files, {}),
    "Unigram": (XLMR, folders.unigram_files, {}),
    "slow": (XLMR, lambda: {k: v() for k, v in SLOW.items()}, {}),
    "slow, CamemBERT": (
        ROBERTA | {"model_type": "camembert"},
        lambda: {k: v() for k, v in SLOW.items()},
        {},
    ),
    "in Python": ({}, folders.wordpiece_files, folders.JAPANESE),
    "BPE for a BERT": ({}, folders.bpe_files, {"tokenizer_class": "RobertaTokenizer"}),
    "WordPiece for a RoBERTa": (
        ROBERTA,
        folders.wordpiece_files,
        {"tokenizer_class": "BertTokenizer"},
    ),
    "Unigram for a BERT": (
        {},
        folders.unigram_files,
        {"tokenizer_class": "XLMRobertaTokenizer"},
    ),
    "special tokens added": (
        {},
        folders.wordpiece_files,
        {"tokenizer_class": "BertTokenizer", "extra_special_tokens": ["[A]", "[B]"]},
    ),
}


def tokenizer_folder(folder, case):
    sizes, files, settings = GOOD[case]
    if "slow" in case:
        pytest.importorskip("sentencepiece")
    _, config = make(folder, **sizes)
    write(folder, files())
    if settings:
        change(folder, "tokenizer_config.json", **settings)
    return config


@pytest.mark.parametrize("case", GOOD)
def test_ids_are_those_of_transformers(case, tmp_path):
    """Also once the tokenizer is written for other programs."""
    from transformers import AutoTokenizer

    folder = tmp_path / "encoder"
    config = tokenizer_folder(folder, case)
    ours = tokenizers.load_tokenizer(folder, FIELD)
    tokenizers.check_tokenizer(ours, config, field=FIELD, path="encoder")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours("warm tea")["input_ids"] != ours("tea cup")["input_ids"]
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "config.json").write_bytes(
        (folder / "config.json").read_bytes()
    )
    tokenizers.write(ours, tmp_path / "written", config, max_length=12)
    again = AutoTokenizer.from_pretrained(tmp_path / "written")
    for pair in ((TEXTS,), (TEXTS, TEXTS[::-1])):
        assert again(*pair)["input_ids"] == theirs(*pair)["input_ids"]
    found = again("tea " * 60, truncation=True)
    assert len(found["input_ids"]) == 12
    assert ("token_type_ids" in found) == (config.type_vocab_size > 1)


def settings(**fields):
    return {"tokenizer_config.json": json.dumps(fields)}


def bpe_with(**changes):
    names = {"vocab": "vocab.json", "merges": "merges.txt"}
    changes = {names[kind]: content for kind, content in changes.items()}
    return lambda: folders.bpe_files() | changes


def vocab_json(**ids):
    def files():
        found = folders.bpe_files()
        vocabulary = json.loads(found["vocab.json"]) | ids
        return found | {"vocab.json": json.dumps(vocabulary)}

    return files


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
SHALLOWER = '{"a":' * 300 + "1" + "}" * 300  # than Python's stack, not than the limit
VOCAB = "\n".join(WORDS) + "\n"

BAD = {
    "RoBERTa with vocab.txt": (ROBERTA, {"vocab.txt": VOCAB}, "vocab.json and merges"),
    "BERT with RoBERTa's files": ({}, folders.bpe_files, "reads vocab.txt; the folder"),
    "BERT with sentencepiece": (
        {},
        {"sentencepiece.bpe.model": b"\x0a\x05"},
        "reads vocab.txt; the folder holds sentencepiece.bpe.model",
    ),
    "XLM-R with vocab.txt": (XLMR, {"vocab.txt": VOCAB}, "reads sentencepiece.bpe"),
    "BERT's class says XLM-R": (
        {},
        {"vocab.txt": VOCAB} | settings(tokenizer_class="XLMRobertaTokenizer"),
        "XLMRobertaTokenizer reads sentencepiece.bpe.model; the folder holds vocab.txt",
    ),
    "a byte order mark": ({}, {"vocab.txt": "\ufeff" + VOCAB}, "vocab.txt begins with"),
    "a byte order mark of merges": (
        ROBERTA,
        lambda: {k: "\ufeff" + v for k, v in folders.bpe_files().items()},
        "begins with a byte order mark",
    ),
    "a mark of JSON": (
        {},
        {"vocab.txt": VOCAB, "tokenizer_config.json": "\ufeff{}"},
        "tokenizer_config.json begins with a byte order mark",
    ),
    "a pointer": ({}, {"vocab.txt": POINTER}, "vocab.txt is a pointer of Git LFS"),
    "a pointer to JSON": (
        {},
        {"vocab.txt": VOCAB, "tokenizer.json": POINTER},
        "tokenizer.json is a pointer of Git LFS",
    ),
    "a page": ({}, {"vocab.txt": VOCAB, "config.json": "<!doctype html>"}, "of HTML"),
    "an added id of 5000 digits": (
        {},
        {"vocab.txt": VOCAB}
        | settings(added_tokens_decoder={"9" * 5000: {"content": "[X]"}}),
        "is '9999",
    ),
    **{
        f"{name} twice": (
            {},
            lambda name=name: (
                folders.wordpiece_files() | {name: '{"a": {"b": [{"c": 1, "c": 1}]}}'}
            ),
            f"{name} cannot be read .names 'c' twice",
        )
        for name in tokenizers._JSON
    },
    **{
        f"{name} is {value!r}": (
            {},
            {"vocab.txt": VOCAB} | settings(**{name: value}),
            f"tokenizer_config.json: {name} is .*, must be of type",
        )
        for name in tokenizers._SETTINGS
        for value in ("false" if name != "tokenizer_class" else 7, [["512"]], True)
        if not (value is True and bool in tokenizers._SETTINGS[name])
        and type(value) not in tokenizers._SETTINGS[name]
    },
    "special tokens of another style": (
        {},
        {"vocab.txt": VOCAB.replace("[CLS]", "<s>").replace("[SEP]", "</s>")},
        r"lacks '\[CLS\]', its cls_token",
    ),
    "no unknown token": ({}, {"vocab.txt": VOCAB.replace("[UNK]", "unk")}, "UNK"),
    "lost merges": (
        ROBERTA,
        bpe_with(merges="#version: 0.2\n"),
        "no merges",
    ),
    "merges of a comment alone": (ROBERTA, bpe_with(merges="#\n"), "Merges text file"),
    "special tokens alone": (
        {},
        {"vocab.txt": "\n".join(folders.SPECIAL) + "\n"},
        "knows special tokens alone",
    ),
    "empty vocab.txt": ({}, {"vocab.txt": ""}, "vocab.txt is empty"),
    "empty vocab.json": (
        ROBERTA,
        bpe_with(vocab=""),
        "vocab.json is empty",
    ),
    "empty merges": (ROBERTA, bpe_with(merges=""), "merges.txt is empty"),
    "empty sentencepiece": (XLMR, {"sentencepiece.bpe.model": b""}, "model is empty"),
    "empty tokenizer.json": (
        {},
        {"vocab.txt": VOCAB, "tokenizer.json": ""},
        "tokenizer.json is empty",
    ),
    "vocab.json an empty object": (ROBERTA, bpe_with(vocab="{}"), "token"),
    "an id of 2^32 - 1": (
        ROBERTA,
        vocab_json(wa=2**32 - 1),
        "id of 'wa' is 4294967295",
    ),
    "an id of 2^40": (ROBERTA, vocab_json(wa=2**40), "id of 'wa' is 1099511627776"),
    "a negative id": (ROBERTA, vocab_json(wa=-1), "id of 'wa' is -1, must be 0 to"),
    "an id that is a word": (ROBERTA, vocab_json(wa="one"), "id of 'wa' is 'one'"),
    "an id of 4301 digits": (
        ROBERTA,
        bpe_with(vocab='{"a": ' + "1" * 4301 + "}"),
        "vocab.json cannot be read",
    ),
    "an added id beyond int32": (
        {},
        {"vocab.txt": VOCAB}
        | settings(added_tokens_decoder={"4294967295": {"content": "[X]"}}),
        r"is 4294967295, must be 0 to 2147483647",
    ),
    "an added id in a file": (
        {},
        {"vocab.txt": VOCAB, "added_tokens.json": '{"[X]": 2147483648}'},
        "is 2147483648, must be",
    ),
    "deep tokenizer_config": (
        {},
        {"vocab.txt": VOCAB, "tokenizer_config.json": DEEP},
        "tokenizer_config.json is nested deeper than 100",
    ),
    "deep tokenizer.json": (
        {},
        {"tokenizer.json": SHALLOWER},
        "nested deeper than 100",
    ),
    "deep special_tokens_map": (
        {},
        {"vocab.txt": VOCAB, "special_tokens_map.json": SHALLOWER},
        "nested deeper",
    ),
    "deep vocab.json": (ROBERTA, bpe_with(vocab=DEEP), "nested deeper"),
    "deep config.json": (
        {},
        {"vocab.txt": VOCAB, "config.json": DEEP},
        "nested deeper",
    ),
    "settings a list": (
        {},
        {"vocab.txt": VOCAB, "tokenizer_config.json": "[1]"},
        "tokenizer_config.json holds a list, must be an object",
    ),
    "vocab.txt not UTF-8": (
        {},
        {"vocab.txt": VOCAB.encode() + b"caf\xe9"},
        "vocab.txt .*utf-8.*0xe9",
    ),
    "settings not UTF-8": (
        {},
        {"vocab.txt": VOCAB, "tokenizer_config.json": b'{"a": "\xe9"}'},
        "tokenizer_config.json cannot be read .*0xe9",
    ),
    "vocab.json in UTF-16": (
        ROBERTA,
        bpe_with(vocab="{}".encode("utf-16")),
        "vocab.json cannot be read",
    ),
    **{
        f"class {name}": (
            {},
            folders.bpe_files() | {"vocab.txt": VOCAB} | settings(tokenizer_class=name),
            reason,
        )
        for name, reason in {
            "LayoutLMv3Tokenizer": "is not one of texts .Words must be",
            "LayoutLMv2Tokenizer": "is not one of texts .Words must be",
            "TapasTokenizer": "is not one of texts",
            "CLIPImageProcessor": "cannot be read",
            "BertConfig": "BertConfig is no tokenizer",
            "NoSuchTokenizer": "cannot be read",
        }.items()
    },
    "code of its own": (
        {},
        {"vocab.txt": VOCAB}
        | settings(
            tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tokenizer_that_is_refused(case, tmp_path, capfd):
    sizes, files, reason = BAD[case]
    folder = tmp_path / "encoder"
    _, config = make(folder, **sizes)
    write(folder, files() if callable(files) else files)
    capfd.readouterr()

    def check(folder, field):
        tokenizer = tokenizers.load_tokenizer(folder, field)
        tokenizers.check_tokenizer(tokenizer, config, field=field, path=str(folder))

    said = refused(folder, check)
    with pytest.raises(UserError, match=reason):
        check(folder, FIELD)
    for word in ("(ValueError)", "(Exception)", "(AttributeError)", "(RecursionError)"):
        assert word not in said
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "model.safetensors"])
def test_link_to_a_file_that_is_gone(folder, name):
    write(folder, folders.wordpiece_files())
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")

    def check(folder, field):
        tokenizers.load_tokenizer(folder, field)
        load(folder)

    assert f"{name} is a link to a file that is gone" in refused(folder, check)


def test_damaged_sentencepiece(tmp_path):
    pytest.importorskip("sentencepiece")
    make(tmp_path / "encoder", **XLMR)
    for content in (b"\x00broken", folders.sentencepiece_model()[:40]):
        write(tmp_path / "encoder", {"sentencepiece.bpe.model": content})
        refused(tmp_path / "encoder")


def test_tokens_outside_the_weights(tmp_path):
    """Whatever their number: ids may have gaps."""
    _, config = make(tmp_path / "encoder", vocab_size=len(WORDS))
    write(tmp_path / "encoder", folders.wordpiece_files())
    tokenizer = tokenizers.load_tokenizer(tmp_path / "encoder", FIELD)
    where = {"field": FIELD, "path": "encoder"}
    tokenizers.check_tokenizer(tokenizer, config, **where)
    tokenizer.add_special_tokens({"mask_token": "[OTHER]"})
    with pytest.raises(UserError, match=r"'\[OTHER\]' the id 61, but its weights have"):
        tokenizers.check_tokenizer(tokenizer, config, **where)


# The share of pieces that are unknown

OWN = Data(task="own", columns=("text",), labels=("x", "y"), max_length=16)


def check_rows(folder, texts, **options):
    task, tokenizer = tasks.find(OWN), tokenizers.load_tokenizer(folder, FIELD)
    columns = {"text": texts, "label": np.zeros(len(texts), np.int32)}
    examples = task.tokenise(columns, tokenizer)
    where = {"field": FIELD, "path": str(folder)}
    tokenizers.check_texts(tokenizer, examples, columns, task, **where, **options)


@pytest.mark.parametrize(
    ("unknown", "outcome"),
    [(0, ""), (2, ""), (3, "warning"), (50, "warning"), (51, "")],
)
def test_unknown_pieces_are_counted(folder, unknown, outcome, capsys):
    """Of 100 pieces: above 2 of them a warning, above 50 an error."""
    write(folder, folders.wordpiece_files())
    texts = ["tea"] * (100 - unknown) + ["\u4e16"] * unknown
    if unknown > 50:
        with pytest.raises(UserError, match=r"51.0% of the pieces .* as in '\\u4e16'"):
            check_rows(folder, texts)
        check_rows(folder, texts, refuse=False)  # as `pipeline`, for the texts it gets
        assert capsys.readouterr().err.startswith("warning: ")
        return
    check_rows(folder, texts)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 * bool(outcome)  # of pieces, and of whole texts
    assert all(line.startswith("warning: ") for line in err.splitlines())


def test_texts_without_a_piece_are_counted(folder, capsys):
    write(folder, folders.wordpiece_files())
    with pytest.raises(UserError, match="60.0% of the texts have no piece.* as in ' '"):
        check_rows(folder, ["tea"] * 4 + [" "] * 6)
    check_rows(folder, ["tea"] * 6 + [" "] * 4)
    assert "40.0% of the texts have no piece" in capsys.readouterr().err


# Fields of config.json


def outputs(folder):
    config, params = load(folder)
    ids = jnp.array([[2, 9, 30, 3]], jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    return config, jax.jit(Encoder(config).apply)({"params": params}, batch).logits


@pytest.mark.parametrize("name", ["attention_head_size", "head_dim"])
def test_head_size_that_is_stated(tmp_path, name):
    """Half of four heads of 4, under the sizes before and after."""
    folder = tmp_path / "encoder"
    make(folder, heads=(4, 4), head_size=4)
    cut = load_file(folder / "model.safetensors")
    for tensor, values in cut.items():
        if ".attention.self." in tensor:
            cut[tensor] = np.ascontiguousarray(values[:8]) * 9
        if tensor.endswith("attention.output.dense.weight"):
            cut[tensor] = np.ascontiguousarray(values[:, :8]) * 9
    save_file(cut, folder / "model.safetensors")
    before, expected = outputs(folder)
    change(folder, num_attention_heads=2, **{name: 4})
    config, found = outputs(folder)
    assert (config.heads, config.head_size) == (before.heads, 4) == ((2, 2), 4)
    np.testing.assert_array_equal(found, expected)


REFUSED = {
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "position_embedding_type": "relative_key_query",
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": "c2p|p2c",
    "rotary": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "norm_first": True,
    "pre_norm": True,
    "layer_norm_type": "pre",
    "use_bias": False,
    "attention_bias": False,
    "parallel_attn": True,
    "use_parallel_residual": True,
    "tie_layers": True,
    "share_layers": True,
    "num_hidden_groups": 1,
    "inner_group_num": 2,
    "num_key_value_heads": 1,
    "embedding_size": 8,
    "num_experts": 4,
    "quantization_config": {"bits": 8},
    "adapters": {"adapters": {"a": 1}},
    "pooler_act": "gelu",
    "activation_function": "relu",
    "hidden_act": "gelu_10",
    "model_type": "deberta",
    "attention_window": [4, 4],
    "token_dropout": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_change_the_function(folder, name):
    change(folder, **{name: REFUSED[name]})
    assert f"{name} is " in refused(folder, read_fields)


NUMBERS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings type_vocab_size pad_token_id layer_norm_eps "
    "attention_head_size num_labels"
).split()
NO_NUMBERS = {
    "2^31": 2**31,
    "2^32 - 1": 2**32 - 1,
    "10^300": 10**300,
    "negative": -1,
    "fraction": 2.5,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "text": "12",
    "list": [12],
    "nested": [[[[[[1]]]]]],
    "object": {"a": 1},
}


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_their_range(folder, name, value):
    change(folder, **{name: NO_NUMBERS[value]})
    said = refused(folder, read_fields)
    assert f"{name} is " in said and "must be" in said
    assert len(said) < 300 + len(str(folder))


def test_deep_and_other_json(folder):
    for text, reason in (
        (DEEP, "config.json is nested deeper than 100 levels"),
        (SHALLOWER, "config.json is nested deeper than 100 levels"),
        ("[" * 5000 + "]" * 5000, "config.json is nested deeper than 100 levels"),
        ('{"a": ' + "1" * 5000 + "}", "config.json cannot be read (Exceeds the limit"),
        ("", "config.json is empty"),
        ("3", "config.json holds a int, must be an object"),
    ):
        (folder / "config.json").write_text(text)
        assert reason in refused(folder, read_fields)
    (folder / "config.json").write_bytes(b'{"a": "\xe9"}')
    assert "config.json cannot be read ('utf-8' codec" in refused(folder, read_fields)


def test_unknown_fields_are_named_once(folder, capsys):
    change(folder, colour="green", empty="", shade=None)
    load(folder)
    err = capsys.readouterr().err
    assert err.count("are not known: 'colour'; they are not read") == 1
    assert "empty" not in err


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_no_field_of_transformers_own_is_unknown(kind):
    import transformers

    fields = getattr(transformers, f"{kind}Config")(num_labels=2).to_dict()
    assert hf_config.unknown_fields(fields) == []
    hf_config.from_fields(fields, 2, Model(), "classification")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gelu_python", "gelu"),
        ("gelu_fast", "gelu_new"),
        ("gelu_accurate", "gelu_new"),
        ("gelu_python_tanh", "gelu_pytorch_tanh"),
    ],
)
def test_other_names_of_our_activations(folder, name, same):
    import torch
    from transformers.activations import ACT2FN

    from cofi_jax.models.layers import ACTIVATIONS

    change(folder, hidden_act=name)
    config = huggingface.read_config(folder, FIELD, 2, Model())
    assert config.activation == same
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    theirs = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[same](jnp.array(x)), theirs, atol=2e-6)


@pytest.mark.parametrize(
    "tables",
    [
        {"id2label": {"0": "spam", "1": "ham"}, "label2id": None},
        {"id2label": None, "label2id": {"spam": 0, "ham": 1}},
        {"id2label": None, "label2id": {"ham": 1, "spam": 0}},
        {"id2label": None, "label2id": {"ham": "1", "spam": "0"}},
        {"id2label": ["spam", "ham"], "label2id": None},
        {"id2label": {"1": "ham", "0": "spam"}, "label2id": {"spam": 0, "ham": 1}},
        {"label2id": {"spam": 0, "ham": 1}},  # beside LABEL_0 and LABEL_1
        {"id2label": {"0": "spam", "1": "ham"}},  # beside them, the other way round
        {"id2label": {"0": "SPAM", "1": "Ham"}, "label2id": None},
    ],
)
def test_names_of_classes_in_every_form(folder, tables, capsys):
    _, before = load(folder)
    change(folder, **tables)
    _, found = load(folder, ("ham", "spam"))
    kernel = before["classifier"]["kernel"]
    np.testing.assert_array_equal(found["classifier"]["kernel"], kernel[:, ::-1])
    capsys.readouterr()


def test_length_without_a_limit(folder):
    """transformers stores 1e30 where a tokenizer has no longest input."""
    write(folder, folders.wordpiece_files())
    _, config = make(folder)
    for limit in (1e30, 10**30, None, -1):
        change(folder, "tokenizer_config.json", model_max_length=limit)
        tokenizer = tokenizers.load_tokenizer(folder, FIELD)
        columns = {"text": ["tea " * 99], "label": np.zeros(1, np.int32)}
        rows = tasks.find(OWN).tokenise(columns, tokenizer).input_ids
        assert len(rows[0]) == OWN.max_length
        (folder / "written").mkdir(exist_ok=True)
        tokenizers.write(tokenizer, folder / "written", config)
        written = json.loads((folder / "written/tokenizer_config.json").read_text())
        assert written["model_max_length"] == config.longest


@pytest.mark.parametrize(
    "tables",
    [
        {"id2label": {"0": "x", "2": "y"}},
        {"id2label": {"1": "y", "2": "x"}},
        {"id2label": {"-1": "y", "0": "x"}},
        {"id2label": {"0": "x", "1": "x"}},
        {"id2label": {"0": "x", "00": "x", "1": "y"}},
        {"id2label": {"no": "x", "yes": "y"}},
        {"id2label": None, "label2id": {"x": 1, "y": 2}},
        {"id2label": None, "label2id": {"x": 0, "y": 0}},
        {"id2label": None, "label2id": {"x": 0.5, "y": 1}},
        {"id2label": None, "label2id": {"x": math.inf, "y": 1}},
        {"id2label": None, "label2id": {"x": [0], "y": [1]}},
        {"id2label": None, "label2id": {"x": {}, "y": 1}},
        {"id2label": None, "label2id": {"x": False, "y": True}},
        {"id2label": None, "label2id": {"x": 0, "LABEL_1": 0}},
        {"id2label": {"0": "x", "2": "y"}, "label2id": {"x": 0, "y": 2}},
    ],
    ids=str,
)
def test_names_of_classes_that_make_no_sense(folder, tables, capsys):
    """Unless somebody says the order; the numbers alone would give one silently."""
    change(folder, **{"label2id": None} | tables)
    said = refused(folder, lambda folder, field: load(folder))
    table = "label2id" if tables["id2label"] is None else "id2label"
    assert (
        f"config.json: {table} is {{" in said and "must number different names" in said
    )
    assert said.endswith("give them in the order of the model: model.labels")
    options = {"field": FIELD, "problem": "classification", "model": Model()}
    options |= {"labels": ("x", "y"), "label_order": ("y", "x")}
    huggingface.load_classifier(folder, **options)
    assert capsys.readouterr() == ("", "")


def test_names_of_classes_that_disagree(folder):
    names = {"id2label": {"0": "x", "1": "y"}, "label2id": {"x": 1, "y": 0}}
    change(folder, **names)
    said = refused(folder, lambda folder, field: load(folder))
    assert "id2label and label2id disagree" in said


@pytest.mark.parametrize("given", ["multi_label_classification", "regression", 3])
def test_head_of_another_kind(folder, given, capsys):
    change(folder, problem_type=given)
    said = refused(folder, lambda folder, field: load(folder))
    assert f"problem_type is {given!r}, must be 'single_label_classification'" in said


# Tensors


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def same_as_before(folder, change_folder):
    before = load(folder)
    change_folder()
    after = load(folder)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "module.model.", "_orig_mod.", "_orig_mod.module."],
)
def test_prefix_of_wrapped_models(folder, prefix):
    """The head's tensors have it as well."""
    same_as_before(
        folder, lambda: rewrite(folder, lambda w: {prefix + k: w[k] for k in w})
    )


def split(folder, parts=2, **changes):
    tensors = load_file(folder / "model.safetensors")
    table = {}
    for row, name in enumerate(tensors):
        table[name] = f"model-{row % parts + 1:05}-of-{parts:05}.safetensors"
    for file in set(table.values()):
        save_file({k: v for k, v in tensors.items() if table[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": table} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return table


def test_weights_in_several_files(folder):
    same_as_before(folder, lambda: split(folder, 3))


def test_index_that_does_not_fit(folder):
    table = split(folder)
    name, file = next(iter(table.items()))
    other = next(x for x in table.values() if x != file)
    index = folder / "model.safetensors.index.json"
    for content, reason in (
        ({}, "must hold a `weight_map`"),
        ({"weight_map": []}, "must hold a `weight_map`"),
        ({"weight_map": table | {name: other}}, "which lacks it"),
        ({"weight_map": table | {name: "gone.safetensors"}}, "not in the folder"),
        ({"weight_map": table | {name: "../model.safetensors"}}, "not in the folder"),
        ({"weight_map": {k: v for k, v in table.items() if k != name}}, "lacks"),
        ({"weight_map": table | {name: 3}}, "not in the folder"),
    ):
        index.write_text(json.dumps(content))
        assert reason in refused(folder, lambda folder, field: load(folder))
    for content, reason in (
        (DEEP, "nested deeper"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "names 'a' twice"),
        (POINTER, "is a pointer of Git LFS"),
    ):
        index.write_text(content)
        assert reason in refused(folder, lambda folder, field: load(folder))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_float8(folder, dtype, file):
    import torch
    from safetensors.torch import save_file as save_torch

    name = "bert.encoder.layer.0.output.dense.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: torch.from_numpy(v) for k, v in tensors.items()}
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    (folder / "model.safetensors").unlink()
    if file == "pytorch_model.bin":
        torch.save(tensors, folder / file)
    else:
        save_torch(tensors, folder / file)
    assert f"{name} holds " in refused(folder, lambda folder, field: load(folder))


NOT_FINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "too large": 1e300}


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=list(NOT_FINITE))
def test_weights_that_are_not_finite(folder, value, recwarn):
    """One value of one tensor is enough to make every output nan."""
    name = "bert.encoder.layer.1.output.dense.weight"

    def spoil(tensors):
        tensors = {k: v.astype(np.float64) for k, v in tensors.items()}
        tensors[name][3, 5] = value
        return tensors

    rewrite(folder, spoil)
    said = refused(folder, lambda folder, field: load(folder))
    assert f"{name} holds values that are infinite or nan, must be finite" in said
    assert not recwarn.list


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        pytest.param("pytorch_model.bin", marks=pytest.mark.torch),
    ],
)
@pytest.mark.parametrize(
    "content, said",
    [
        (POINTER.encode(), "is a pointer of Git LFS"),
        (b"<html>", "is a page of HTML"),
        (gzip.compress(b"x"), "is compressed by gzip"),
        (b"\x80\x02x", "cannot be read"),
    ],
    ids=["a pointer", "a page", "gzip", "damage"],
)
def test_weights_that_are_something_else(folder, file, content, said):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    found = refused(folder, lambda folder, field: load(folder))
    assert f"{file} {said}" in found and "weights_only" not in found


def test_a_header_as_long_as_the_mark_of_gzip(folder):
    """The file begins with the length of its header, and 35,615 is 1f 8b."""
    path, expected = folder / "model.safetensors", load(folder)[1]
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].ljust(0x8B1F)
    start = len(header).to_bytes(8, "little")
    path.write_bytes(start + header + data[8 + size :])
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)


@pytest.mark.torch
@pytest.mark.parametrize(
    "make_content, said",
    [
        (lambda torch, t: {"state_dict": t, "epoch": 3}, "'state_dict' is a dict"),
        (lambda torch, t: {0: t["classifier.bias"]}, "0 is a Tensor, must be"),
        (lambda torch, t: {**t, "steps": 3}, "'steps' is a int"),
        (lambda torch, t: [*t.values()], "must be tensors by name"),
        (lambda torch, t: t["classifier.bias"], "a Tensor, must be tensors by name"),
        (lambda torch, t: torch.nn.Linear(2, 2), "more than tensors, or is damaged"),
        (
            lambda torch, t: (
                t | {"classifier.weight": t["classifier.weight"].to_sparse()}
            ),
            "classifier.weight cannot be read",
        ),
        (
            lambda torch, t: (
                t | {"classifier.weight": t["classifier.weight"].to(torch.complex64)}
            ),
            "classifier.weight holds complex64, must be floating point",
        ),
    ],
    ids=[
        "nested",
        "numbered",
        "a number",
        "a list",
        "a tensor",
        "a module",
        "sparse",
        "complex",
    ],
)
def test_files_of_pytorch_that_hold_something_else(folder, make_content, said):
    import torch

    tensors = load_file(folder / "model.safetensors")
    tensors = {k: torch.from_numpy(v) for k, v in tensors.items()}
    (folder / "model.safetensors").unlink()
    torch.save(make_content(torch, tensors), folder / "pytorch_model.bin")
    assert said in refused(folder, lambda folder, field: load(folder))


def test_googles_config_without_a_family(folder):
    write(folder, folders.wordpiece_files())
    kept = (
        "attention_probs_dropout_prob hidden_act hidden_dropout_prob hidden_size "
        "intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers type_vocab_size vocab_size"
    ).split()
    fields = json.loads((folder / "config.json").read_text())

    def reduce():
        (folder / "config.json").write_text(json.dumps({k: fields[k] for k in kept}))

    same_as_before(folder, reduce)
    tokenizer = tokenizers.load_tokenizer(folder, FIELD)
    assert tokenizer("warm tea")["input_ids"] == [2, 7, 5, 3]


@pytest.mark.parametrize("alone", [False, True])
def test_roberta_without_a_family(tmp_path, alone):
    """It is not read as a BERT, also where its encoder was saved alone."""
    folder = tmp_path / "encoder"
    make(folder, **ROBERTA)
    if alone:
        rewrite(
            folder,
            lambda w: {
                k.removeprefix("roberta."): v
                for k, v in w.items()
                if k.startswith("roberta.")
            },
        )
    change(folder, model_type=None)

    def check(folder, field):
        huggingface.load_encoder(
            folder,
            field=field,
            num_labels=2,
            problem="classification",
            model=Model(),
            key=jax.random.key(0),
        )

    assert "lacks 'model_type', and" in refused(folder, check)


# Saved models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    top = tmp_path_factory.mktemp("saved")
    params, config = make(top / "encoder")
    write(top / "encoder", folders.wordpiece_files())
    tokenizer = tokenizers.load_tokenizer(top / "encoder", FIELD)
    about = {"task": "own", "labels": ["x", "y"], "data": {}}
    saved_model.save_model(
        top / "model", params, config, tokenizer=tokenizer, about=about
    )
    return top / "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 2**31),
        ("hidden_size", 2**40),
        ("heads", [2, 2**33]),
        ("heads", 3),
        ("intermediate", ["a", 1]),
        ("max_positions", 2.5),
        ("num_labels", -1),
        ("type_vocab_size", "2"),
    ],
)
def test_sizes_of_a_saved_model(saved, tmp_path, field, value):
    import shutil

    copy = shutil.copytree(saved, tmp_path / "model")
    content = json.loads((copy / "model.json").read_text())
    content["config"][field] = value
    (copy / "model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="model.json is damaged") as caught:
        saved_model.load_model(copy)
    assert "\n" not in str(caught.value)
    (copy / "model.json").write_text(DEEP)
    with pytest.raises(UserError, match="nested deeper"):
        saved_model.load_model(copy)


def test_damaged_saved_model_prints_nothing(saved, tmp_path):
    """Neither at once nor when what was left unread is collected, in a new process."""
    import shutil
    import subprocess
    import sys

    copy = shutil.copytree(saved, tmp_path / "model")
    for file in (copy / "params").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[::7] = bytes(x ^ 0x5A for x in data[::7])
        file.write_bytes(bytes(data))
    program = (
        "import cofi_jax, gc, sys\n"
        "try: cofi_jax.load_model(sys.argv[1])\n"
        "except cofi_jax.UserError as error: print(error)\n"
        "gc.collect()\n"
    )
    command = [sys.executable, "-c", program, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1 and "params are damaged" in done.stdout
    assert done.stderr == ""


def test_reason_is_the_first_line():
    assert foreign.reason(ValueError("one\ntwo")) == "one"
    assert foreign.reason(ValueError("\n  first:\nsecond")) == "first"
    assert foreign.reason(ValueError()) == "ValueError"
    assert foreign.reason(KeyError("name")) == "lacks 'name'"
    assert foreign.reason(FileNotFoundError(2, "No such file", "x")) == "No such file"
