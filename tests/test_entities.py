"""Named entities: what rows may hold, words and tokens, scores and answers."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy.special import log_softmax, rel_entr, softmax
from test_squad import TOKENIZERS, wordpiece

from cofi_jax import config, errors
from cofi_jax.checkpoints import tokenizers as tokenizers_lib
from cofi_jax.data import batches, sources, tasks
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.data.problems import entities as entities_lib
from cofi_jax.data.problems.entities import Sentences
from cofi_jax.export import certificate, verify

pytestmark = pytest.mark.usefixtures("quick_compile")

ENTITIES = PROBLEMS["entities"]

SEQEVAL = pathlib.Path(__file__).parent / "fixtures" / "seqeval.json"

BIO = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def own(path="", **more):
    fields = {"columns": ("tokens",), "label_column": "ner_tags", "max_length": 16}
    fields |= {"problem": "entities"} | more
    return config.Data(task="own", path=str(path), **fields)


def write(folder, labels, split="train", tokens=None):
    """Lists of labels, and of as many words unless others are given."""
    tokens = tokens or [[f"w{i}" for i, _ in enumerate(row)] for row in labels]
    table = pyarrow.table({"tokens": tokens, "ner_tags": labels})
    parquet.write_table(table, folder / f"{split}.parquet")
    return folder


def load(data, *splits):
    task, columns = sources.load(tasks.find(data), splits or ("train",))
    return task, *(columns[split] for split in splits or ("train",))


def labels_of(columns):
    return [row.tolist() for row in columns["ner_tags"]]


def complaint(data, *splits):
    with pytest.raises(errors.UserError) as caught:
        load(data, *splits)
    message = str(caught.value)
    assert message.isprintable()
    return message


# Rows

ROWS = [
    {"tokens": ["Ada", "Lovelace", "lived"], "ner_tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["in", "London"], "ner_tags": ["O", "B-LOC"]},
    {"tokens": [], "ner_tags": []},
]


def test_labels_of_a_type_are_there_together(tmp_path):
    """I-LOC is, though no row has it, since one to be predicted might."""
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    task, train = load(own(tmp_path))
    assert task.labels == BIO and task.num_outputs == 5
    assert task.metrics == ("f1",)
    assert train["tokens"] == [row["tokens"] for row in ROWS]
    assert labels_of(train) == [[3, 4, 0], [0, 1], []]


def test_all_formats_give_the_same(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    task, first = load(own(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    spaced = {"tokens": ["New York"], "ner_tags": ["B-LOC"]}
    for gap in (" ", "\t", "  _ X "):
        rows = [*ROWS[:2], spaced] if gap == "\t" else ROWS[:2]
        lines = ["-DOCSTART- -X- O", ""]
        for row in rows:
            pairs = zip(row["tokens"], row["ner_tags"], strict=True)
            lines += [*(f"{word}{gap}{label}" for word, label in pairs), "", ""]
        (tmp_path / "train.conll").write_text("\r\n".join(lines))
        again, found = load(own(tmp_path))
        assert again.labels == task.labels
        assert found["tokens"] == [row["tokens"] for row in rows]
        assert labels_of(found)[:2] == labels_of(first)[:2]


def test_a_line_of_columns_without_a_label(tmp_path):
    (tmp_path / "train.conll").write_text("Ada B-PER\n\nin O\nLondon\n")
    message = complaint(own(tmp_path))
    assert "train.conll: line 4 (row 1, the first is 0) must have a word" in message


@pytest.mark.parametrize(
    ("tags", "names"),
    [
        (["I-PER", "I-LOC", "O"], ("O", "I-LOC", "I-PER")),
        (["B-x", "O"], ("O", "B-x", "I-x")),
        (["U-x", "B-x", "L-x"], ("O", "B-x", "I-x", "L-x", "U-x")),
        (["S-x", "O"], ("O", "B-x", "I-x", "E-x", "S-x")),
        (["B", "I", "O"], ("O", "B", "I")),
        (["B-a-b", "I-a-b"], ("O", "B-a-b", "I-a-b")),
    ],
)
def test_schemes(tmp_path, tags, names):
    assert load(own(write(tmp_path, [tags])))[0].labels == names


@pytest.mark.parametrize("cells", [["O", "B-PER", "I-PER"], [0, 3, 4], [0.0, 3.0, 4.0]])
def test_labels_in_a_given_order_by_name_or_number(tmp_path, cells):
    data = own(write(tmp_path, [cells]), labels=BIO)
    assert labels_of(load(data)[1]) == [[0, 3, 4]]


def test_an_i_without_its_b_is_read_as_one(tmp_path, capsys):
    """After O, after another type, at the beginning: that is IOB1, too."""
    rows = [
        ["O", "I-PER", "I-PER", "I-LOC", "B-LOC"],
        ["I-PER", "O"],
        ["B-PER", "I-PER"],
    ]
    task, train = load(own(write(tmp_path, rows)))
    mended = [[task.labels[k] for k in row] for row in labels_of(train)]
    assert mended == [
        ["O", "B-PER", "I-PER", "B-LOC", "B-LOC"],
        ["B-PER", "O"],
        ["B-PER", "I-PER"],
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 3 labels that begin with I-")
    assert "row 0 (the first is 0) of 3; they are read as B-" in line
    load(own(write(tmp_path, [["I-PER", "O", "I-PER"]])))  # It is IO, where that is so.
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "more", "said"),
    [
        ([["O"], ["B-x", None]], {}, ["row 1 ", "['B-x', None]", "not 'None'"]),
        ([["B-x"], ["O", "x"]], {}, ["row 1 ", "not 'x'", "must be O, or a letter"]),
        ([["B-x"], ["X-x"]], {}, ["row 1 ", "not 'X-x'", "BILOU"]),
        ([["B-x"], None], {}, ["row 1 ", "ner_tags=None", "a list of labels"]),
        (
            [["O"], ["O", "O"]],
            {},
            ["data.label_column='ner_tags'", "0 types of entities"],
        ),
        ([[0, 1], [2]], {}, ["0 types of entities", "(0, 1, 2)", "data.labels=O,B-"]),
        ([[0, 5]], {"labels": BIO}, ["row 0 ", "not '5'", "3: 'B-PER'"]),
        ([["B-x"]], {"labels": BIO}, ["row 0 ", "not 'B-x'", "among {0: 'O'"]),
        ([["O"]], {"labels": ("O", "PER")}, ["data.labels=('O', 'PER')", "B-PER"]),
        ([["O"]], {"labels": ("B-x", "I-x")}, ["data.labels=", "must have O among"]),
        ([["O"]], {"columns": ("tokens", "b")}, ["data.columns=", "one column, each"]),
        ([["O"]], {"metrics": ("accuracy",)}, ["data.metrics=", "'f1', 'precision'"]),
    ],
)
def test_labels_that_are_none(tmp_path, cells, more, said):
    tokens = [["w"] * len(row or "x") for row in cells]
    message = complaint(own(write(tmp_path, cells, tokens=tokens), **more))
    assert all(part in message for part in said) and len(message) < 500


def test_as_many_labels_as_words(tmp_path):
    tokens = [["a", "b"], ["c", "d"]]
    message = complaint(own(write(tmp_path, [["O", "O"], ["B-x"]], tokens=tokens)))
    assert "train.parquet, row 1 (the first is 0) has ner_tags=['B-x']" in message
    assert "1 labels, must be one for each of the 2 words" in message


@pytest.mark.parametrize("tokens", [["a text", "b"], [[1], ["b"]], [[None], ["b"]]])
def test_words_that_are_none(tmp_path, tokens):
    rows = [{"tokens": words, "ner_tags": ["B-x"]} for words in tokens]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = complaint(own(tmp_path))
    assert "row 0 (the first is 0) has tokens=" in message
    assert message.endswith("must be a list of words")


def test_a_validation_row_has_no_other_type(tmp_path):
    write(tmp_path, [["B-x", "O"]])
    write(tmp_path, [["O"], ["B-y"]], "validation")
    message = complaint(own(tmp_path), "train", "validation")
    assert "validation.parquet, row 1 " in message and "not 'B-y'" in message


def test_words_are_texts_for_a_vocabulary(tmp_path):
    write(tmp_path, [["B-x", "O"]], tokens=[["Ada", "lived"]])
    found = sources.texts(str(tmp_path), tasks.find(own()), field="vocabulary")
    assert found == ["Ada lived"]


# Words and tokens


def examples_of(tokens, labels, *, kind="wordpiece", max_length=16, names=BIO):
    task = tasks.find(own(labels=names, max_length=max_length))
    cells = task.problem.encode(labels, names, numbered=True)
    columns = {"tokens": tokens, "ner_tags": cells}
    return task, task.tokenise(columns, TOKENIZERS[kind])


def certain(examples, classes=5):
    """Logits of a model that is sure of the labels, wherever rows have some."""
    logits = np.zeros((*examples.labels.shape, classes), np.float32)
    row, token = np.nonzero(examples.labels >= 0)
    logits[row, token, examples.labels[row, token]] = 9
    return logits


def test_tokens_by_hand():
    """Of "Paris" and "x2" the first piece alone has a label: p ##aris, x ##2."""
    tokens = [["Paris", "co-op", "x2"], ["of"]]
    task, examples = examples_of(tokens, [["B-LOC", "O", "B-PER"], ["O"]])
    texts = [wordpiece().convert_ids_to_tokens(ids) for ids in examples.input_ids]
    assert texts[0][:2] == ["[CLS]", "paris"] and texts[1] == ["[CLS]", "of", "[SEP]"]
    at = [texts[0].index(piece) for piece in ("paris", "c", "x")]
    expected = np.full((2, 16), -1)
    expected[0, at] = 1, 0, 3
    expected[1, 1] = 0
    np.testing.assert_array_equal(examples.labels, expected)
    assert examples.labels.dtype == np.int16
    assert task.scores(certain(examples), examples) == {"f1": 1.0}


def test_first_tokens_are_those_of_the_tokenizers_word_ids():
    words = ["Paris", "the", "naïve", "co-op", "24–10", "U.S.", "x", "日本", "of", "a"]
    tokenizer = TOKENIZERS["wordpiece"]
    _, examples = examples_of([words], [["O"] * 10], max_length=64)
    encoded = tokenizer(words, is_split_into_words=True)
    assert examples.input_ids[0].tolist() == encoded["input_ids"]
    first = [encoded.word_ids().index(word) for word in range(len(words))]
    assert np.flatnonzero(examples.labels[0] >= 0).tolist() == first


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_length", [5, 9, 64])
def test_each_word_is_read_once_with_most_around_it(kind, max_length):
    rng = np.random.default_rng(0)
    vocabulary = ["Paris", "the", "naïve", "co-op", "24–10", "U.S.", "x", "日本"]
    tokens = [rng.choice(vocabulary, size).tolist() for size in (0, 1, 7, 30)]
    labels = [rng.choice(BIO, len(words)).tolist() for words in tokens]
    task, examples = examples_of(tokens, labels, kind=kind, max_length=max_length)
    assert examples.lengths.max() <= max_length
    uncut = examples.uncut
    assert uncut.contexts == [" ".join(words) for words in tokens]
    assert (examples.labels >= 0).sum() == sum(map(len, tokens))
    whole = {}  # the first token of each word, if the text is not cut
    for text, words in enumerate(tokens):
        offsets = TOKENIZERS[kind](uncut.contexts[text], return_offsets_mapping=True)
        ends = np.cumsum([len(word) + 1 for word in words])
        places = [stop - 1 for _, stop in offsets["offset_mapping"]]
        for word, end in enumerate(ends):
            begin = end - 1 - len(words[word])
            token = next(i for i, x in enumerate(places) if begin <= x < end)
            whole[text, word] = token, offsets["input_ids"][token]
    number = np.arange(len(uncut.text)) - np.searchsorted(uncut.text, uncut.text)
    for text, word, row, token in zip(
        uncut.text, number, uncut.row, uncut.token, strict=True
    ):
        assert uncut.of_row[row] == text
        place, piece = whole[text, word]
        assert examples.input_ids[row][token] == piece
        windows = np.flatnonzero(uncut.of_row == text)
        if len(windows) > 1 and row not in windows[[0, -1]]:  # not at an end
            around = min(token - 1, examples.lengths[row] - 2 - token)
            assert around >= (max_length - 2) // 4 - 1
        assert place >= token
    expected = task.problem.encode(labels, BIO, numbered=True)
    logits = certain(examples)
    classes, _ = entities_lib._read(logits, uncut)
    np.testing.assert_array_equal(classes, np.concatenate(expected))
    assert task.scores(logits, examples) == {"f1": 1.0}


def test_a_word_without_a_token_is_o(capsys):
    tokens = [["Paris", "\u0301", "of"], ["", "the"]]
    labels = [["B-LOC", "I-LOC", "O"], ["B-PER", "I-PER"]]
    task, examples = examples_of(tokens, labels)
    assert "2 words have no token of their own, as in row 0" in capsys.readouterr().err
    assert examples.uncut.row.tolist() == [0, -1, 0, -1, 1]
    (first, second) = task.problem.decode(certain(examples), examples, BIO)
    assert [x["text"] for x in first["entities"]] == ["Paris"]
    assert [x["text"] for x in second["entities"]] == ["the"]


def test_lengths_and_tokenizers_that_do_not_fit():
    with pytest.raises(errors.UserError, match="data.max_length=2: must be above 2"):
        examples_of([["a"]], [["O"]], max_length=2)
    slow = types.SimpleNamespace(is_fast=False, name_or_path="somewhere")
    columns = {"tokens": [["a"]], "ner_tags": ENTITIES.unlabelled(1)}
    with pytest.raises(errors.UserError, match="model.path='somewhere': .* fast tok"):
        tasks.find(own(labels=BIO)).tokenise(columns, slow)


def test_windows_are_whole_for_comparisons():
    _, examples = examples_of([["Paris"] * 30], [["B-LOC"] * 30], max_length=9)
    assert len(verify.chosen(examples, 1)) == len(examples) > 1
    task = tasks.find(own(labels=BIO))
    columns = {"tokens": [["Paris"] * 30]}
    source = {"field": "model", "path": "x"}
    tokenizer = TOKENIZERS["wordpiece"]
    tokenizers_lib.check_texts(tokenizer, examples, columns, task, **source)
    _, unknown = examples_of([["of"], ["§"] * 30], [["O"], ["O"] * 30], max_length=9)
    with pytest.raises(errors.UserError, match=r"unknown to .*'\\xa7 \\xa7"):
        tokenizers_lib.check_texts(tokenizer, unknown, columns, task, **source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mr. O'Neil (U.S.) paid", ["Mr", ".", "O'Neil", "(", "U.S", ".", ")", "paid"]),
        ("$1,000.50, and\tand/or", ["$", "1,000.50", ",", "and", "and/or"]),
        ("Paris,London—1914–18", ["Paris", ",", "London", "—", "1914–18"]),
        ("東京 Tower", ["東", "京", "Tower"]),
        ("हिन्दी e.g.", ["हिन्दी", "e.g", "."]),
        (" \n ", []),
        ("--a-", ["-", "-", "a", "-"]),
    ],
)
def test_a_whole_text_is_cut_into_words(text, words):
    context, places = entities_lib._words(text)
    assert context == text
    assert [text[start:stop] for start, stop in places] == words


# Losses


B, T, C = 3, 6, 5

LABELS = np.array(
    [[-1, 2, -1, 0, 4, -1, -1], [-1, 1, -1, -1, -1, -1, -1], [-1, 3] + [-1] * 5]
)


def batch_of():
    return {
        "labels": LABELS.astype(np.int16),  # as wide as the longest row may be
        "weight": np.array([1, 1, 0], np.float32),
        "attention_mask": (np.arange(T) < [[6], [3], [3]]).astype(np.int32),
    }


COUNTED = [(0, 1, 2), (0, 3, 0), (0, 4, 4), (1, 1, 1)]  # row, token, label


def logits_of(seed):
    return np.random.default_rng(seed).standard_normal((B, T, C)).astype(np.float32)


def test_loss_is_a_mean_over_words():
    """As in transformers, where all tokens of a batch that have labels weigh alike."""
    logits = logits_of(0)
    expected = -np.mean(
        [log_softmax(np.float64(logits[r, t]))[k] for r, t, k in COUNTED]
    )
    loss, gradient = jax.value_and_grad(ENTITIES.loss)(jnp.array(logits), batch_of())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    there = np.zeros((B, T), bool)
    there[tuple(zip(*[(r, t) for r, t, _ in COUNTED], strict=True))] = True
    assert (np.abs(gradient).sum(-1) > 0).tolist() == there.tolist()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_of_the_same_words(temperature):
    student, teacher = logits_of(0), logits_of(1)
    terms = [
        rel_entr(
            *(softmax(np.float64(x[r, t]) / temperature) for x in (teacher, student))
        )
        for r, t, _ in COUNTED
    ]
    expected = temperature**2 * np.sum(terms) / len(COUNTED)
    found = ENTITIES.distill(student, teacher, batch_of(), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_batch_without_words_costs_nothing():
    batch = batch_of() | {"labels": np.full((B, T), -1, np.int16)}
    loss, gradient = jax.value_and_grad(ENTITIES.loss)(jnp.array(logits_of(0)), batch)
    assert loss == 0 and not np.any(gradient)


# Scores and answers


def sure(names, golds, givens):
    """Examples of a word a token, and logits that give the classes."""
    sizes = [*map(len, golds)]
    text = np.repeat(np.arange(len(golds)), sizes)
    token = np.concatenate([np.arange(size) for size in sizes])
    flat = [np.array([k for row in rows for k in row], int) for rows in (golds, givens)]
    places = np.stack([2 * token, 2 * token + 1], -1)
    contexts = [" ".join("x" * size) for size in sizes]
    rows = np.arange(len(golds), dtype=np.int32)
    uncut = Sentences(contexts, rows, names, text, places, flat[0], text, token)
    logits = np.zeros((len(golds), max(sizes), len(names)), np.float32)
    logits[text, token, flat[1]] = 3
    nothing = [np.zeros(size, np.int32) for size in sizes]
    return logits, batches.Examples(nothing, nothing, rows, uncut=uncut)


@pytest.mark.parametrize(
    ("scheme", "spelling"),
    [("BI", {}), ("I", {}), ("BIES", {}), ("BIES", {"E": "L", "S": "U"})],
)
def test_scores_are_those_of_seqeval(scheme, spelling):
    """Of each of 1,000 random pairs and of all of them, as `record_seqeval` found."""
    expected = json.loads(SEQEVAL.read_text())[scheme]
    names = tuple(spelling.get(n[0], n[0]) + n[1:] for n in expected["names"])
    pairs = [
        [[ord(x) - ord("a") for x in side] for side in p[:2]] for p in expected["pairs"]
    ]
    assert len(pairs) == {"BI": 400, "I": 200, "BIES": 400}[scheme]
    metrics = ("precision", "recall", "f1")
    task = tasks.find(own(labels=names, metrics=metrics))
    logits, examples = sure(names, *zip(*pairs, strict=True))
    count, score = task.scorer(logits, examples)
    assert count == len(pairs)
    found = [[*score(np.array([row])).values()] for row in range(count)]
    np.testing.assert_allclose(found, [row[2:] for row in expected["pairs"]], atol=1e-6)
    scores = task.scores(logits, examples)
    np.testing.assert_allclose(
        [scores[m] for m in metrics], expected["all"], rtol=1e-12
    )
    by_type = task.problem.by_class(logits, examples, names)
    assert [*by_type] == [*expected["types"]]
    for kind, row in expected["types"].items():
        np.testing.assert_allclose([*by_type[kind].values()], row, atol=1e-6)


def test_scores_of_drawn_texts_are_those_of_the_texts():
    rng = np.random.default_rng(0)
    golds, givens = ([rng.integers(5, size=n) for n in range(1, 12)] for _ in range(2))
    task = tasks.find(own(labels=BIO))
    count, score = task.scorer(*sure(BIO, golds, givens))
    chosen = rng.integers(count, size=count)
    part = sure(BIO, [golds[i] for i in chosen], [givens[i] for i in chosen])
    assert score(chosen) == task.scores(*part)


def test_answers_have_places_in_the_text():
    task = tasks.find(own(labels=BIO))
    texts = ["Paris, the U.S. of Paris", "of"]
    columns = {"tokens": texts, "ner_tags": task.problem.unlabelled(2)}
    examples = task.tokenise(columns, TOKENIZERS["wordpiece"])
    logits = np.zeros((2, 16, 5))
    at = examples.uncut.token
    # Paris , the U.S . of Paris
    for word, (label, value) in {0: (1, 9), 3: (1, 9), 4: (2, 1), 6: (4, 9)}.items():
        logits[0, at[word], label] = value
    for word in (1, 2, 5, 7):
        logits[int(word == 7), at[word], 0] = 9
    sure_of, less = softmax([9, 0, 0, 0, 0]).max(), softmax([1, 0, 0, 0, 0]).max()
    first, second = task.problem.decode(logits, examples, BIO)
    expected = [
        ("LOC", "Paris", 0, 5, sure_of),
        ("LOC", "U.S.", 11, 15, (sure_of + less) / 2),
        ("PER", "Paris", 19, 24, sure_of),
    ]
    names = ("type", "text", "start", "end", "score")
    assert first == {
        "entities": [
            dict(zip(names, (*x, pytest.approx(score)), strict=True))
            for *x, score in expected
        ]
    }
    assert second == {"entities": []} and json.loads(json.dumps(first)) == first
    assert task.problem.decision(first) == [
        (kind, start, end) for kind, _, start, end, _ in expected
    ]


def test_texts_without_a_word_have_no_entity():
    task = tasks.find(own(labels=BIO))
    columns = {"tokens": ["", " \n"], "ner_tags": task.problem.unlabelled(2)}
    examples = task.tokenise(columns, TOKENIZERS["wordpiece"])
    assert examples.lengths.tolist() == [2, 2] and not (examples.labels >= 0).any()
    logits = np.ones((2, 16, 5))
    assert task.problem.decode(logits, examples, BIO) == [{"entities": []}] * 2
    assert task.scores(logits, examples) == {"f1": 0}


def test_what_changes_between_two_models():
    """The second one loses one of two places, and gives another text a person."""
    golds = [[1, 2, 0, 1], [0, 3], [0, 0]]
    others = [[1, 2, 0, 0], [0, 3], [0, 3]]
    task = tasks.find(own(labels=BIO))
    before, examples = sure(BIO, golds, golds)
    after, _ = sure(BIO, golds, others)
    results = [certificate.result(task, examples, x) for x in (before, after)]
    found = certificate.compare(task, examples, *results)
    assert found["flips"] == 2
    assert found["worst_recall"] == {"class": "LOC", "change": pytest.approx(-1 / 2)}
    assert found["differences"] == {"f1": pytest.approx(4 / 6 - 1)}
    assert found["standard_errors"]["f1"] > 0
