"""Trimmed vocabularies: the texts that were counted keep their tokens and logits."""

import ast
import dataclasses
import functools
import json
import random
import re
import shutil
import string
import subprocess
import sys

import foreign_folders as folders
import numpy as np
import pyarrow as pa
import pytest
from foreign_folders import ROBERTA, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_exits import available, save
from test_export import LABELS
from test_export import save as save_sliced
from test_onnx_int8 import save_teacher

import cofi_jax as cofi
from cofi_jax.checkpoints import saved_model, tokenizers, vocabulary
from cofi_jax.config import Data
from cofi_jax.data import sources, tasks
from cofi_jax.errors import UserError
from cofi_jax.export import __main__ as export_lib
from cofi_jax.export import export, trim, verify
from cofi_jax.models.config import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick_compile", "code_cache")

CORPUS = [
    *("the cup of tea was warm", "a cold cup, and a colder tea", "teacups are warm"),
    *(
        "tea for two; cups for three",
        "warmer than the coldest cup",
        "caf\u00e9 au lait",
    ),
    *("underneath the warmth", "an unbreakable cup", "breaking the coldness"),
] * 3
UNUSED = ["[PAD]", *(f"[unused{i}]" for i in range(9))]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {
    "bert": dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT, strict=True)),
    "roberta": {
        **{"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>"},
        **{"unk": "<unk>", "mask": "<mask>"},
    },
}


def described(tokenizer, names):
    """The files of a folder with this tokenizer."""
    said = {f"{kind}_token": token for kind, token in NAMES[names].items()}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(said),
    }


def wordpiece():
    """As BERT's, with letters that it does not know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=120,
        special_tokens=[*UNUSED, *BERT[1:]],
        limit_alphabet=15,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer = without_added(tokenizer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.Sequence([processors.BertProcessing(*ids)])
    return described(tokenizer, "bert")


def without_added(tokenizer):
    """Leaves the special tokens alone; the others are of the model's vocabulary."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    known = {*BERT, *FAIRSEQ}
    added = [token for token in content["added_tokens"] if token["content"] in known]
    return Tokenizer.from_str(json.dumps(content | {"added_tokens": added}))


def byte_bpe():
    """As RoBERTa's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=350,
        special_tokens=FAIRSEQ,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.RobertaProcessing(("</s>", 2), ("<s>", 0)),
        ]
    )
    return described(tokenizer, "roberta")


def letter_bpe(**options):
    """As GPT's first one, with ends of words, or with a prefix of their inner parts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256) if "byte_fallback" in options]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = BpeTrainer(
        vocab_size=140 + len(bytes_),
        special_tokens=[*UNUSED, *bytes_, *BERT[1:]],
        limit_alphabet=18,
        show_progress=False,
        **{k: v for k, v in options.items() if k.endswith(("prefix", "suffix"))},
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer = without_added(tokenizer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=ids,
    )
    return described(tokenizer, "bert")


def unigram(byte_fallback=False):
    """As XLM-R's, whose special tokens have fixed ids and whose mask is the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.trainers import UnigramTrainer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=90,
        special_tokens=FAIRSEQ[:4],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    pieces = content["model"]["vocab"]
    if byte_fallback:
        pieces += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        content["model"]["byte_fallback"] = True
    pieces.append(["<mask>", 0.0])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return described(tokenizer, "roberta")


KINDS = {
    "WordPiece": wordpiece,
    "BPE of bytes": byte_bpe,
    "BPE with suffixes": functools.partial(letter_bpe, end_of_word_suffix="</w>"),
    "BPE with prefixes": functools.partial(letter_bpe, continuing_subword_prefix="##"),
    "BPE with bytes as a last resort": functools.partial(
        letter_bpe, byte_fallback=True, ignore_merges=True
    ),
    "Unigram": unigram,
    "Unigram with bytes as a last resort": functools.partial(unigram, True),
}
SIZES = EncoderConfig.dense(
    **{"num_layers": 1, "num_heads": 1, "hidden_size": 4, "intermediate_size": 4},
    vocab_size=700,
    num_labels=2,
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder, KINDS[request.param]())
    return tokenizers.load_tokenizer(folder, "model")


def trimmed(tokenizer, texts):
    ids = vocabulary.kept(tokenizer, vocabulary.seen(tokenizer, texts), SIZES)
    source = {"field": "model", "path": "path"}
    return vocabulary.trim(tokenizer, ids, SIZES, **source)


def tokens(tokenizer, *texts):
    """The names of the tokens of a text or of a pair, special ones included."""
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])


words = st.sampled_from(sorted({word for text in CORPUS for word in text.split()}))
letters = st.text(
    st.sampled_from("abcdeprtuwz \u00e9\u4e16\U0001f375#\u0120\u2581\t'"), max_size=6
)
parts = st.one_of(words, words.map(lambda w: w[1:]), letters, st.just(" "))
lines = st.lists(parts, max_size=12).map("".join)


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(lines, min_size=1, max_size=6))
def check_that_texts_keep_their_tokens(tokenizer, texts):
    small = trimmed(tokenizer, texts)
    for text in texts:
        assert tokens(small, text) == tokens(tokenizer, text)
    pair = texts[0], texts[-1]
    assert tokens(small, *pair) == tokens(tokenizer, *pair)


def test_texts_keep_their_tokens(tokenizer):
    """Whatever they are made of: known words, parts of them, unknown letters."""
    check_that_texts_keep_their_tokens(tokenizer)


def test_what_stays(tokenizer):
    """Ids are numbered from 0 in the old order, and rows of the table go along."""
    small = trimmed(tokenizer, ["warm tea"])
    old, new = tokenizer.get_vocab(), small.get_vocab()
    assert sorted(new.values()) == [*range(len(new))]
    assert sorted(new, key=new.get) == sorted(new, key=old.get)
    assert len(new) < len(old) and {t for t in old if len(t) == 1} <= set(new)
    assert {t for t in old if re.fullmatch("<0x..>", t)} <= set(new)
    for kind in ("pad", "unk", "cls", "sep", "mask"):
        name = f"{kind}_token"
        assert getattr(small, name) == getattr(tokenizer, name)
    assert small.pad_token_id == tokenizer.pad_token_id
    assert sorted(small.all_special_ids) == sorted(
        new[token] for token in tokenizer.all_special_tokens
    )
    rows = vocabulary.rows(tokenizer, small)
    assert [old[token] for token in sorted(new, key=new.get)] == rows.tolist()
    table = np.random.default_rng(0).standard_normal((700, 4)).astype(np.float32)
    params = {"embeddings": {"word": table, "type": 1}, "other": 2}
    found = vocabulary.take(params, rows)
    assert found["other"] == 2 and found["embeddings"]["type"] == 1
    for token, row in new.items():
        np.testing.assert_array_equal(
            found["embeddings"]["word"][row], table[old[token]]
        )
    # All of it survives another trimming, of the same texts.
    assert trimmed(small, ["warm tea"]).get_vocab() == new


def test_added_tokens_stay(tokenizer):
    """Those that split texts, wherever their ids are."""
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["teapot", "<user>"])
    tokenizer.add_tokens(["[URL]"], special_tokens=True)
    small = trimmed(tokenizer, ["warm tea"])
    assert {"teapot", "<user>", "[URL]"} <= set(small.get_vocab())
    text = "warm<user>tea [URL] tea"
    assert tokens(small, text) == tokens(tokenizer, text)


def test_the_padding_token_keeps_its_id(tokenizer):
    """RoBERTa's positions begin behind it, whether or not what is before it is used."""
    sizes = dataclasses.replace(SIZES, **ROBERTA)
    ids = vocabulary.kept(tokenizer, [20], sizes).tolist()
    assert ids[:2] == [0, 1] and 20 in ids


def load(tmp_path, files):
    write(tmp_path, files)
    return tokenizers.load_tokenizer(tmp_path, "model")


def test_a_word_that_is_unknown_stays_so(tmp_path):
    """Without ##b of `abc` it would be a + ##bc, since `ab` would have to give way."""
    pieces = [*BERT, "a", "ab", "x", "##bc", "##d"]
    whole = load(tmp_path, {"vocab.txt": "\n".join(pieces) + "\n"} | BERT_CLASS)
    assert tokens(whole, "abc xbc") == ["[CLS]", "[UNK]", "x", "##bc", "[SEP]"]
    assert tokens(trimmed(whole, ["abc xbc"]), "abc xbc") == tokens(whole, "abc xbc")
    assert "ab" not in trimmed(whole, ["xbc"]).get_vocab()


BERT_CLASS = {"tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer"})}


def test_an_unknown_letter_counts_the_same(tmp_path):
    """A letter without a piece of its own costs 10 more than the worst piece of all.

    Here it is in one that is longer: with -110 for the letter, `?b` + `c` is the best,
    at -40, and with -30 it would be `?` + `bc`, at -31.
    """
    from tokenizers import Tokenizer, models, processors

    scores = [(token, 0.0) for token in FAIRSEQ]
    scores += [("\u00e9b", -20.0), ("b", -20.0), ("c", -20.0), ("bc", -1.0)]
    tokenizer = Tokenizer(models.Unigram([*scores, ("zz", -100.0)], unk_id=3))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    whole = load(tmp_path, described(tokenizer, "roberta"))
    texts = ["\u00e9bc", "bc"]
    assert tokens(whole, texts[0]) == ["<s>", "\u00e9b", "c", "</s>"]
    small = trimmed(whole, texts)
    assert [tokens(small, text) for text in texts] == [
        tokens(whole, text) for text in texts
    ]


def test_merges_of_merges_stay(tmp_path):
    """A token is made of two that no text has, by either of two merges."""
    whole = load(tmp_path, byte_bpe())
    small = trimmed(whole, ["breaking"])
    content = json.loads(small.backend_tokenizer.to_str())["model"]
    made = {a + b for a, b in content["merges"]}
    assert made == {token for token in content["vocab"] if len(token) > 1} - {*FAIRSEQ}
    seen = set(tokens(whole, "breaking"))
    assert made - seen and seen - {*FAIRSEQ, *string.ascii_lowercase} <= made


# Files of texts


TASK = dataclasses.replace(tasks.TASKS["stsb"], name="stsb")


def read(path):
    return sources.texts(str(path), TASK, field="vocabulary")


def test_texts_of_files(tmp_path):
    """Each once, in the order of names; other files and other columns are left out."""
    (tmp_path / "a.txt").write_text("one\ntwo\r\n\n  \none\n")
    (tmp_path / "b.csv").write_text("id,sentence2\n1,three\n2,\n3,one\n")
    lines = [{"sentence1": "four", "sentence2": "five", "score": 1.0}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    below = tmp_path / "d"
    below.mkdir()
    table = {"sentence1": ["six", None], "sentence2": ["", "seven"]}
    parquet.write_table(pa.table(table), below / "train.parquet")
    (tmp_path / "e.md").write_text("eight")
    assert read(tmp_path) == ["one", "two", "three", "four", "five", "six", "seven"]
    assert read(tmp_path / "a.txt") == ["one", "two"]
    assert read(below) == ["six", "seven"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("", None, "must be a file or a folder of texts in .conll, .csv, .json"),
        ("x.md", b"text", "must be a file or a folder of texts in .conll, .csv, .json"),
        ("x.txt", b" \n\n", "all texts there are blank or missing"),
        ("x.txt", b"caf\xe9\n", "x.txt: must be UTF-8; byte 0xe9 in line 1"),
        ("x.txt", b"\x1f\x8b\x08\0", "x.txt: is compressed by gzip"),
        ("x.csv", b"text\na\n", "x.csv needs a column sentence1 or sentence2; it has"),
        ("x.csv", b"sentence1\n\n", "all texts there are blank or missing"),
        ("x.json", b'[{"sentence1": 3}]', "row 0 .the first is 0. has sentence1=3, mu"),
        ("x.json", b'[{"sentence1": "\\ud800"}]', "has sentence1='.ud800', must be te"),
    ],
)
def test_texts_that_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^vocabulary='.*': .*{message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


# Saved models


def texts_for(top, count=40):
    """A file of texts of the words of the corpus."""
    rng = random.Random(0)
    known = sorted({word for text in CORPUS for word in text.split()})
    texts = [" ".join(rng.choices(known, k=5)) for _ in range(count)]
    (top / "texts.txt").write_text("\n".join(texts) + "\n")
    return texts


def run(path, *formats, texts="texts.txt", **others):
    texts = str(path.parent / texts)
    settings = {"vocabulary": texts, "repeats": 1, "batch_size": 1} | others
    return export.export(path, formats, **settings)


PAIRS = {"columns": ("a", "b"), **ROBERTA}
MODELS = {
    "WordPiece": ({}, ("onnx", "stablehlo")),
    "BPE of bytes": (PAIRS, ()),
    "Unigram": (PAIRS, ("onnx",)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A saved model, its texts, and what was found when it was trimmed."""
    top = tmp_path_factory.mktemp("model")
    others, formats = MODELS[request.param]
    path = save(top, KINDS[request.param](), vocab_size=360, **others)
    texts = texts_for(top)
    return path, texts, run(path, *available(*formats))


def test_a_trimmed_model_answers_the_same(model):
    """Bit for bit, of the texts that it was trimmed for and of the validation rows."""
    path, texts, _ = model
    pairs = cofi.read_about(path)[2]["data"]["columns"] == ["a", "b"]
    asked = [*zip(texts, texts[::-1], strict=True)] if pairs else texts
    small = trim.folder(path)
    assert small == path.with_name("model-trimmed")
    assert cofi.pipeline(small)(asked) == cofi.pipeline(path)(asked)
    config, spec, about = cofi.read_about(small)
    tokenizer = cofi.load_tokenizer(small)
    assert config.vocab_size == len(tokenizer.get_vocab()) < 360 and spec is None
    assert tokenizer.pad_token_id == config.pad_token_id
    del about["vocabulary"]
    assert about == cofi.read_about(path)[2]


def test_what_a_trimmed_model_says(model):
    path, texts, checks = model
    small = trim.folder(path)
    check = json.loads((small / "check.json").read_text())
    assert check == checks[""]
    found = check["vocabulary"]
    before, after = (cofi.load_tokenizer(each).get_vocab() for each in (path, small))
    assert found["tokens"] == {"before": len(before), "after": len(after)}
    files = [f for part in saved_model.FILES for f in [path / part]]
    files += [f for part in saved_model.FILES for f in (path / part).rglob("*")]
    assert found["bytes_before"] == sum(f.stat().st_size for f in files if f.is_file())
    assert check["bytes"] < found["bytes_before"]
    assert found["texts"] == len({*texts})
    rows = found["validation"]
    assert rows["rows"] == rows["compared"] == 2 and rows["added"] >= 0
    assert rows["max_abs_difference"] == 0
    # Every tenth of the texts, with what the others need.
    tokenizer, held_out = cofi.load_tokenizer(path), texts[9::10]
    others = [text for text in texts if text not in held_out]
    other = trimmed(tokenizer, others)
    changed = [tokens(other, text) != tokens(tokenizer, text) for text in held_out]
    assert found["held_out"]["texts"] == len(held_out)
    assert found["held_out"]["tokenised_otherwise"] == np.mean(changed)
    assert found["held_out"]["unknown"] >= found["held_out"]["unknown_before"]
    card = (small / "README.md").read_text()
    assert f"trimmed to {len(after):,} of {len(before):,} tokens" in card
    assert not (path / "check.json").exists()


def test_formats_of_a_trimmed_model(model):
    """Each is the trimmed one, with its tokenizer."""
    path, texts, checks = model
    small, size = trim.folder(path), len(cofi.load_tokenizer(trim.folder(path)))
    for name in set(checks) - {""}:
        assert checks[name]["max_abs_difference"] <= 1e-5
        content = json.loads((small / name / "tokenizer.json").read_text())
        assert len(content["model"]["vocab"]) <= size
        if name == "onnx":
            fields = json.loads((small / name / "config.json").read_text())
            assert fields["vocab_size"] == size


def test_the_lines_of_a_trimmed_card_run_alone(model):
    """In a process without this package, jax and PyTorch."""
    path, _, checks = model
    if "onnx" not in checks or "stablehlo" not in checks:  # One model suffices.
        pytest.skip("needs onnxruntime")
    small = trim.folder(path)
    blocks = (small / "README.md").read_text().split("```python\n")[1:]
    (lines,) = (b.partition("```")[0] for b in blocks if '/onnx"' in b)
    lines = lines.replace("path/to/this/folder", str(small)).rstrip()
    gone = [f"sys.modules[{n!r}] = None" for n in ("cofi_jax", "jax", "torch", "onnx")]
    *lines, last = lines.splitlines()
    last = last.replace("print(", "print(*np.ravel(", 1) + ")"
    program = "\n".join(["import sys", *gone, "import numpy as np", *lines, last])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = np.array(done.stdout.split(), float)
    asked = re.search(r"model\((\[.*\])\)", blocks[0])[1]
    # The example is none of the texts, so it may have other tokens than before.
    (answer,) = cofi.pipeline(small)(ast.literal_eval(asked))
    scores = np.exp(found) / np.exp(found).sum()
    assert answer["score"] == pytest.approx(scores.max(), abs=1e-5)


@pytest.fixture
def plain(tmp_path):
    """A saved model whose vocabulary is whole, and a file of texts."""
    path = save(tmp_path, wordpiece())
    texts_for(tmp_path)
    return path


def test_it_is_written_anew(plain):
    """With what was exported of it, and no other folder is."""
    run(plain, "stablehlo")
    small = trim.folder(plain)
    more = "the unbreakable tea \u4e16"
    (plain.parent / "more.txt").write_text(more + "\n")
    check = run(plain, texts="more.txt")[""]
    assert not (small / "stablehlo").exists() and "held_out" not in check["vocabulary"]
    assert check["vocabulary"]["texts"] == 1
    both = map(cofi.load_tokenizer, (plain, small))
    assert len({tuple(tokens(each, more)) for each in both}) == 1
    assert not [*plain.parent.glob(".*")]


def test_rows_that_need_more_tokens_get_them(plain):
    (plain.parent / "more.txt").write_text("cup\n")
    rows = "text,label\n" + "breaking tea,x\nteacups,y\n" * 3
    (plain.parent / "validation.csv").write_text(rows)
    check = run(plain, texts="more.txt")[""]
    assert check["vocabulary"]["validation"]["added"] > 0
    assert check["vocabulary"]["validation"]["max_abs_difference"] == 0
    both = map(cofi.load_tokenizer, (plain, trim.folder(plain)))
    assert len({tuple(tokens(each, "breaking teacups")) for each in both}) == 1


def test_questions_lose_the_spaces_before_them(tmp_path):
    """A BPE of bytes cuts them otherwise than with these spaces."""
    sizes = {"problem": "span", "pooler_size": 0, "vocab_size": 360, **ROBERTA}
    params, config = folders.make(tmp_path / "encoder", **sizes)
    write(tmp_path / "encoder", byte_bpe())
    tokenizer = tokenizers.load_tokenizer(tmp_path / "encoder", "model.path")
    answers = {"text": ["tea"], "answer_start": [0]}
    row = {"question": " cup", "context": "tea was warm", "answers": answers}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row))
    data = Data(task="squad", path=str(tmp_path), max_length=20)
    about = {"task": "squad", "labels": [], "data": dataclasses.asdict(data)}
    path = tmp_path / "model"
    saved_model.save_model(path, params, config, tokenizer=tokenizer, about=about)
    (tmp_path / "texts.txt").write_text("tea was warm\n")
    assert run(path)[""]["vocabulary"]["validation"]["added"] > 0
    both = map(cofi.load_tokenizer, (path, trim.folder(path)))
    assert len({tuple(tokens(each, "cup")) for each in both}) == 1


def test_the_dense_model_of_a_certificate_has_the_same_tokens(tmp_path):
    """Of an export in 8-bit integers, in one command."""
    if not available("onnx-int8"):
        pytest.skip("needs onnxruntime")
    rows = "text,label\n" + "the film was great,praise\nthe plot was dull,blame\n" * 9
    (tmp_path / "validation.csv").write_text(rows)
    (tmp_path / "texts.txt").write_text("the film was dull\n")
    data = Data(task="own", path=str(tmp_path), columns=("text",), labels=LABELS)
    data = dataclasses.replace(data, max_length=32)
    path = save_sliced(tmp_path / "pruned", data, LABELS)
    params, dense = save_teacher(path)
    checks = run(path, "onnx-int8", seq_length=16, max_loss=1.0)
    small = trim.folder(path)
    tokenizer, config, spec, about = cofi.load_tokenizer(small), *cofi.read_about(small)
    assert spec == cofi.read_about(path)[1]
    assert about["dense"]["vocab_size"] == config.vocab_size < dense.vocab_size
    found = export._teacher(small, about)
    ids, old = (
        np.array([each("the film was great")["input_ids"]], np.int32)
        for each in (tokenizer, cofi.load_tokenizer(path))
    )
    logits = [
        model.predict({"input_ids": x, "attention_mask": x * 0 + 1} | types)
        for model, x in ((found, ids), (verify.in_jax(params, dense), old))
        for types in [{"token_type_ids": x * 0}]
    ]
    np.testing.assert_array_equal(*logits)
    models = checks["onnx-int8"]["certificate"]["models"]
    rows = models["dense"]["scores"], models["pruned"]["scores"]
    assert all(0 <= scores["accuracy"] <= 1 for scores in rows)
    # One whose tokenizer lacks a token is another model's.
    file = path.with_name("teacher") / "tokenizer" / "tokenizer.json"
    known = json.loads(file.read_text())
    known["model"]["vocab"].pop("film")
    file.write_text(json.dumps(known))
    assert export._teacher(small, about) is None


def tree(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def python_tokenizer(path):
    write(path / "tokenizer", folders.wordpiece_files())
    (path / "tokenizer" / "tokenizer.json").unlink()
    folders.change(path / "tokenizer", "tokenizer_config.json", **folders.JAPANESE)


def other_model(path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer" / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    (path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (
            python_tokenizer,
            "",
            "model='.*': its tokenizer BertJapaneseTokenizer is in Python; it must",
        ),
        (
            other_model,
            "",
            "model='.*': its tokenizer is a WordLevel; it must be a Word",
        ),
        (
            lambda path: shutil.rmtree(path / "tokenizer"),
            "",
            "model='.*': .*has no tokenizer; must hold tokenizer.json or",
        ),
        (
            lambda path: (path.parent / "texts.txt").write_text("\u4e16 \u754c\n"),
            "",
            "vocabulary='.*': must hold texts of which the tokenizer knows a piece",
        ),
        (
            lambda path: (path.parent / "texts.txt").write_text("\n"),
            "",
            "vocabulary='.*': must be a file or .* are blank or missing",
        ),
        (
            lambda path: (path.parent / "texts.txt").unlink(),
            "",
            "vocabulary='.*': must be a file or a folder of texts in .conll",
        ),
        (
            lambda path: trim.folder(path).mkdir(),
            "",
            "model='.*': .*model-trimmed is not a trimmed model; move it away",
        ),
        (
            lambda path: shutil.copytree(path, trim.folder(path)),
            "",
            "model='.*': .*model-trimmed is not a trimmed model; move it away",
        ),
        (lambda path: None, "--seq_length=41", "seq_length=41: must be at most 40"),
        (lambda path: None, "--formats=tflite", "formats='tflite': must be among"),
    ],
)
def test_bad_input(plain, capsys, change, flags, message):
    change(plain)
    there = tree(plain.parent)
    flags = [f"--model={plain}", f"--vocabulary={plain.parent / 'texts.txt'}", flags]
    argv = ["export.py", "--formats=", *filter(None, flags)]
    assert export_lib.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert re.match(f"error: {message}", err), err
    assert tree(plain.parent) == there


def test_command(plain, capsys):
    flags = f"--formats= --vocabulary {plain.parent}/texts.txt --repeats=1"
    assert export_lib.main(["export.py", f"--model={plain}", *flags.split()]) == 0
    small = trim.folder(plain)
    assert capsys.readouterr().out.startswith(f"{small}:\n| part ")
    there = tree(small)
    assert export_lib.main(["export.py", f"--model={small}", *flags.split()]) == 2
    assert "is trimmed already" in capsys.readouterr().err
    assert tree(small) == there


@pytest.mark.parametrize("spoil", ["tokens", "rows"])
def test_what_is_not_the_same_is_not_written(plain, monkeypatch, spoil):
    """A tokenizer that takes other tokens, or a table with other rows."""
    if spoil == "tokens":
        first = vocabulary.seen
        monkeypatch.setattr(vocabulary, "seen", lambda *x: set(sorted(first(*x))[:9]))
        message = "model='.*': its trimmed tokenizer takes other tokens for one of the"
    else:
        take = vocabulary.take
        monkeypatch.setattr(vocabulary, "take", lambda p, rows: take(p, rows[::-1]))
        message = "formats='trimmed': its logits differ from the saved model's by"
    with pytest.raises(UserError, match=message):
        run(plain)
    assert not trim.folder(plain).exists() and not [*plain.parent.glob(".*")]


def test_data_of_another_folder(plain, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "validation.csv").write_text("text,label\n" + "warm tea,x\n" * 5)
    check = run(plain, data_path=str(other))[""]
    assert check["vocabulary"]["validation"]["rows"] == check["rows"] == 5
    data = Data(**cofi.read_about(trim.folder(plain))[2]["data"])
    assert data.path == str(plain.parent)
