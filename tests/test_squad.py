import itertools
import string
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from cofi_jax import errors
from cofi_jax.data import squad, tasks

WORDS = ["Paris", "the", "naïve", "co-op", "24–10", "U.S.", "x", "日本", "of", "a"]


def wordpiece():
    """As BERT's: lower case, no accents, letters where a word is not known."""
    letters = [*string.ascii_lowercase, *string.digits, *"-–.?日本"]
    words = ["paris", "naive", "the", "##aris", "of", "what", "is"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = [*special, *letters, *("##" + c for c in letters), *words]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )


def byte_pairs(trim_offsets):
    """As RoBERTa's: a space belongs to the token after it; bytes of a letter part."""
    merges = [
        ("P", "a"),
        ("Pa", "ris"),
        ("r", "i"),
        ("ri", "s"),
        ("Ġ", "P"),
        ("Ġ", "x"),
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", *alphabet, *(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets, add_prefix_space=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>"
    )


TOKENIZERS = {
    "wordpiece": wordpiece(),
    "bytes": byte_pairs(trim_offsets=True),
    "untrimmed bytes": byte_pairs(trim_offsets=False),
}


every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def gold(*texts, start):
    return {"text": list(texts), "answer_start": [start] * len(texts)}


def rows_of(context, *golds, question="what is"):
    many = len(golds)
    return {
        "context": [context] * many,
        "question": [question] * many,
        "answers": list(golds),
    }


def windows_of(rows, kind="wordpiece", *, max_length=32, stride=4, training=False):
    return squad.windows(
        rows,
        TOKENIZERS[kind],
        max_length=max_length,
        stride=stride,
        training=training,
    )


def certain(found):
    """Logits of a model that is sure of the labels, padded by 3."""
    logits = np.zeros((len(found.labels), max(map(len, found.input_ids)) + 3, 2))
    for row, label in zip(logits, found.labels, strict=True):
        if label.any():
            row[label[0], 0] = row[label[1], 1] = 1
    return logits


def score(logits, found):
    examples = SimpleNamespace(uncut=found.uncut)
    return tasks.TASKS["squad"].scores(logits, examples)


@st.composite
def a_row(draw):
    """A context of words, an answer of some of its words, and where that stands."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=25))
    gaps = draw(st.lists(st.sampled_from([" ", "  ", "\n"]), min_size=25, max_size=25))
    context, places = "", []
    for word, gap in zip(words, gaps, strict=False):
        places.append((len(context), len(context) + len(word)))
        context += word + gap
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 5, len(words) - 1)))
    start, stop = places[first][0], places[last][1]
    return rows_of(context, gold(context[start:stop], start=start))


# Windows


@pytest.mark.parametrize(
    "stride, contexts",
    [
        (0, ["a b c d", "e f g"]),
        (1, ["a b c d", "d e f g"]),
        (2, ["a b c d", "c d e f", "e f g"]),
        (3, ["a b c d", "c d e f", "e f g"]),  # at most half of the 4
    ],
)
def test_windows_by_hand(stride, contexts):
    # The answer, "d e", is whole in some of them only.
    rows = rows_of("a b c d e f g", gold("d e", start=6), question="  x")
    found = windows_of(rows, max_length=8, stride=stride)
    texts = [TOKENIZERS["wordpiece"].decode(ids) for ids in found.input_ids]
    assert texts == [f"[CLS] x [SEP] {context} [SEP]" for context in contexts]
    for types, context in zip(found.token_type_ids, contexts, strict=True):
        assert types.tolist() == [0, 0, 0] + [1] * (len(context.split()) + 1)
    tokens = [["", "", "", *context.split()] for context in contexts]
    held = [
        (t.index("d"), t.index("e")) if {"d", "e"} <= {*t} else (0, 0) for t in tokens
    ]
    assert [*map(tuple, found.labels.tolist())] == held
    assert found.uncut.of_row.tolist() == [0] * len(contexts)
    offsets = found.uncut.offsets[0]
    assert offsets.tolist() == [[-1, -1]] * 3 + [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [-1, -1],
    ]


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(a_row(), st.integers(5, 40), st.integers(0, 30), st.sampled_from(["", " is x?"]))
def test_windows_cover_the_context(kind, rows, max_length, stride, question):
    found = windows_of(
        rows | {"question": [question]}, kind, max_length=max_length, stride=stride
    )
    plain = {"add_special_tokens": False, "return_offsets_mapping": True}
    context = TOKENIZERS[kind](rows["context"][0], **plain)
    asked = TOKENIZERS[kind](question.lstrip(), **plain)["input_ids"]
    special = 3 if kind == "wordpiece" else 4
    asked = asked[: (max_length - special) // 2]
    room = max_length - special - len(asked)
    seen = []
    for n, ids in enumerate(found.input_ids):
        offsets = found.uncut.offsets[n]
        inside = np.flatnonzero(offsets[:, 0] >= 0)
        assert (np.diff(inside) == 1).all()
        assert (np.delete(offsets, inside, axis=0) == -1).all()
        assert ids[1 : 1 + len(asked)].tolist() == asked
        assert len(ids) == len(offsets) == len(found.token_type_ids[n])
        assert len(ids) == special + len(asked) + len(inside)
        assert len(inside) == room or n == len(found.input_ids) - 1
        tokens = [*zip(ids[inside].tolist(), map(tuple, offsets[inside]), strict=True)]
        shared = min(stride, room // 2) if n else 0
        assert tokens[:shared] == seen[len(seen) - shared :]
        assert len(tokens) > shared
        seen += tokens[shared:]
    assert seen == [*zip(context["input_ids"], context["offset_mapping"], strict=True)]


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(a_row(), st.integers(5, 60), st.integers(0, 30))
def test_labels_are_the_answer_where_it_is_whole(kind, rows, max_length, stride):
    context, text = rows["context"][0], rows["answers"][0]["text"][0]
    start = rows["answers"][0]["answer_start"][0]

    def of_answer(offsets):
        return [b < start + len(text) and e > start for b, e in offsets]

    found = windows_of(rows, kind, max_length=max_length, stride=stride, training=True)
    assert len(found.uncut.contexts) == 1
    whole = TOKENIZERS[kind](
        context, add_special_tokens=False, return_offsets_mapping=True
    )
    tokens = sum(of_answer(whole["offset_mapping"]))
    for offsets, (first, last) in zip(
        found.uncut.offsets, found.labels.tolist(), strict=True
    ):
        here = of_answer(offsets)
        if first == last == 0:
            assert sum(here) < tokens
        else:
            assert context[offsets[first, 0] : offsets[last, 1]].strip() == text
            assert sum(here[first : last + 1]) == sum(here) == tokens
    got = squad.best_answers(certain(found), found.uncut, max_tokens=60)
    assert not found.labels.any() or got[0].strip() == text


@every_tokenizer
def test_an_answer_inside_a_token_gets_that_token(kind):
    rows = rows_of("in Paris.", gold("ari", start=4))
    found = windows_of(rows, kind)
    first, last = found.labels[0]
    offsets = found.uncut.offsets[0]
    assert rows["context"][0][offsets[first, 0] : offsets[last, 1]].strip() == "Paris"


@every_tokenizer
def test_spaces_around_an_answer_do_not_count(kind):
    rows = rows_of("go to Paris x", gold(" Paris ", start=5), gold("Paris", start=6))
    found = windows_of(rows, kind, training=True)
    assert found.labels[0].tolist() == found.labels[1].tolist()


UNANSWERABLE = [
    {"text": [], "answer_start": []},
    {"text": [""], "answer_start": [-1]},
    {"text": ["", " "], "answer_start": [0, 0]},
    gold("", start=1),
    gold(" ", start=1),
    gold("", start=8),  # in the middle of a token
]


MISPLACED = [
    gold("b c", start=3),  # it stands at 2
    gold("b c", start=-5),  # and there, counted from the end
    gold("d", start=99),
    gold("é", start=0),
    {"text": ["b"], "answer_start": []},
    {"text": ["x", "b"], "answer_start": [0, 2]},  # only the first one is tried
    {"text": [" ", "b"], "answer_start": [0, 2]},
]


def among_others(unknown):
    return rows_of(
        "a b c paris", gold("b", start=2), unknown, gold("paris", "e", start=6)
    )


@pytest.mark.parametrize("unknown", UNANSWERABLE + MISPLACED)
def test_without_an_answer_in_its_place(unknown, capsys):
    found = windows_of(among_others(unknown), training=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 1 questions skipped: ")
    assert line.endswith(", as in row 1 (the first is 0) of 3")
    assert ("no answer" in line) == (unknown in UNANSWERABLE)
    assert found.uncut.answers == [["b"], ["paris", "e"]]
    assert found.uncut.contexts == ["a b c paris"] * 2
    assert found.uncut.of_row.tolist() == [0, 1]
    assert (found.labels > 0).all()


@pytest.mark.parametrize("unknown", MISPLACED)
def test_an_answer_that_is_not_found_is_said_of_validation(unknown, capsys):
    found = windows_of(among_others(unknown))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 1 questions: their answer is not in their context")
    assert found.uncut.answers == [["b"], unknown["text"], ["paris", "e"]]
    assert found.uncut.of_row.tolist() == [0, 1, 2]
    assert found.labels[1].tolist() == [0, 0]


@pytest.mark.parametrize("unknown", UNANSWERABLE)
def test_unanswerable_questions_are_not_scored(unknown):
    """SQuAD v2 counts them as right where nothing is answered, which nothing does."""
    rows = among_others(unknown)
    rows = {name: column + column for name, column in rows.items()}
    message = "^answers=.*: 2 of 6 questions have no answer, as in row 1 .*SQuAD v2"
    with pytest.raises(errors.UserError, match=message):
        windows_of(rows)


def test_questions_whose_answer_nobody_knows(capsys):
    """They are those that somebody asks a finished model."""
    found = windows_of(among_others(None) | {"answers": [None] * 3})
    assert found.uncut.answers == [[], [], []] and not found.labels.any()
    assert capsys.readouterr().err == ""


# Offsets

SENTENCE = 'Old "lighthouse" (x b.c) of Ardnor was built by Morag Finlay in 1811.'


ANSWERS = ["Old", '"lighthouse"', "lighthouse", "x", "b.c", "Morag Finlay", "1811"]


def trained(*splits, **options):
    """A byte tokenizer that knows the sentence by heart."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    backend.train_from_iterator(
        [SENTENCE] * 9,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), **options
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>"
    )


PRETOKENIZERS = {
    "bytes": [],
    "words": [pre_tokenizers.Whitespace()],
    "spaces": [pre_tokenizers.WhitespaceSplit()],
    "digits": [pre_tokenizers.Digits(individual_digits=True)],
    "punctuation": [pre_tokenizers.Punctuation()],
}


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", PRETOKENIZERS)
def test_a_perfect_model_is_right_about_every_answer(kind, prefix, trim, capsys):
    """Whatever the tokenizer trims off the offsets of its tokens."""
    splits = [*PRETOKENIZERS[kind], pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    tokenizer = trained(*splits, trim_offsets=trim)
    golds = [gold(text, start=SENTENCE.index(text)) for text in ANSWERS]
    found = squad.windows(
        rows_of(SENTENCE, *golds), tokenizer, max_length=64, training=False
    )
    assert capsys.readouterr().err == ""
    assert score(certain(found), found) == {"f1": 1, "exact_match": 1}
    answers = squad.best_answers(certain(found), found.uncut)
    assert [text.strip() for text in answers] == ANSWERS


@pytest.mark.parametrize(
    "context, places, mended",
    [
        ("ab cd", [(0, 2), (3, 5)], [(0, 2), (3, 5)]),
        ("ab cd", [(1, 2), (4, 5)], [(0, 2), (3, 5)]),  # without the first letter
        ("ab cd", [(0, 1), (3, 4)], [(0, 2), (3, 5)]),  # without the last one
        ("ab cd", [(0, 1), (4, 5)], [(0, 2), (3, 5)]),  # some of both
        ("abcd", [(0, 1), (3, 4)], [(0, 1), (1, 4)]),
        ("a .", [(0, 1), (3, 3)], [(0, 1), (2, 3)]),
        ("ab x cd", [(0, 2), (5, 7)], [(0, 2), (5, 7)]),  # a word of no token
        ("\u200bab", [(1, 3)], [(1, 3)]),  # what nobody sees is not missed
        ("日本", [(0, 1), (0, 1), (1, 2)], [(0, 1), (0, 1), (1, 2)]),  # bytes
        ("ab", [], []),
    ],
)
def test_no_visible_character_is_left_out(context, places, mended):
    places = np.array(places, np.int32).reshape(-1, 2)
    got = squad._mend(places, context)
    assert got.dtype == np.int32 and [*map(tuple, got.tolist())] == mended


class Shifted:
    """A tokenizer whose offsets are wrong, as by a normaliser that counts badly."""

    is_fast, pad_token_id = True, 0

    def __init__(self, shift):
        self.shift, self.inner = shift, TOKENIZERS["wordpiece"]

    def num_special_tokens_to_add(self, **options):
        return self.inner.num_special_tokens_to_add(**options)

    def __call__(self, *texts, **options):
        encodings = [
            SimpleNamespace(
                ids=e.ids,
                type_ids=e.type_ids,
                sequence_ids=e.sequence_ids,
                offsets=[self.shift(*place) for place in e.offsets],
            )
            for e in self.inner(*texts, **options).encodings
        ]
        return SimpleNamespace(encodings=encodings)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shift, said",
    [
        (lambda a, b: (min(a, 4), min(b, 5)), "lacks a part of it"),  # cut off
        (lambda a, b: (a + 2, b + 2), "hold other words"),
        (lambda a, b: (max(a - 3, 0), max(b - 3, 0)), "hold other words"),
    ],
)
def test_offsets_that_cannot_be_mended_are_said(shift, said, training, capsys):
    rows = rows_of("what is paris x", gold("paris", start=8), gold("what", start=0))
    squad.windows(rows, Shifted(shift), max_length=32, training=training)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, start, found",
    [
        (" paris", 4, "paris"),
        ("paris", 4, "paris"),  # the blank before it was removed from the text alone
        (" paris", 5, "paris"),  # from the place alone
        ("paris ", 5, "paris"),
        ("\tparis", 5, "paris"),
    ],
)
def test_blanks_around_an_answer_are_mended(text, start, found, capsys):
    rows = rows_of("a is paris x", gold(text, start=start))
    windows = windows_of(rows, training=True)
    assert squad.best_answers(certain(windows), windows.uncut) == [found]
    assert capsys.readouterr().err == ""


def test_no_row_is_left():
    found = windows_of(rows_of("a b", gold("x", start=0)), training=True)
    assert found.input_ids == []
    assert found.labels.shape == (0, 2) and found.uncut.of_row.shape == (0,)


def test_a_table_of_datasets_is_as_good_as_lists():
    rows = rows_of("a b c d", gold("b", "b c", start=2), gold("d", start=6))
    one, other = windows_of(rows), windows_of(datasets.Dataset.from_dict(rows))
    for name in ("input_ids", "token_type_ids", "labels"):
        np.testing.assert_equal(getattr(one, name), getattr(other, name))
    assert vars(one.uncut).keys() == vars(other.uncut).keys()
    for name, value in vars(one.uncut).items():
        np.testing.assert_equal(value, getattr(other.uncut, name))
    types = {one.labels.dtype, one.uncut.of_row.dtype}
    for arrays in (one.input_ids, one.token_type_ids, one.uncut.offsets):
        types |= {array.dtype for array in arrays}
    assert types == {np.dtype(np.int32)}


def test_many_rows_are_read_in_pieces():
    numbers = [str(i) for i in range(2001)]
    rows = {"context": numbers, "question": numbers}
    rows["answers"] = [gold(number, start=0) for number in numbers]
    found = windows_of(rows, training=True)
    assert found.uncut.contexts == numbers
    assert found.uncut.of_row.tolist() == [*range(2001)]
    assert score(certain(found), found)["exact_match"] == 1


@every_tokenizer
@pytest.mark.parametrize(
    "max_length, kept", [(300, 64), (64, 30), (9, None), (5, None)]
)
def test_a_long_question_is_cut(kind, max_length, kept):
    rows = rows_of("a b c d", gold("c", start=4), question="x " * 200)
    found = windows_of(rows, kind, max_length=max_length)
    assert all(len(ids) <= max_length for ids in found.input_ids)
    assert found.labels.any()
    if kept:
        assert sum(found.uncut.offsets[0][:, 0] < 0) - kept in (3, 4)


def test_an_empty_context_or_question():
    rows = rows_of("", gold("x", start=0)) | {"context": ["", "a x"]}
    rows |= {"question": ["what", " "], "answers": rows["answers"] * 2}
    found = windows_of(rows)
    assert [len(ids) for ids in found.input_ids] == [3 + 1, 3 + 2]
    assert squad.best_answers(np.zeros((2, 9, 2)), found.uncut)[0] == ""


@every_tokenizer
def test_no_room_for_the_context(kind):
    special = 3 if kind == "wordpiece" else 4
    rows = rows_of("a b c", gold("b", start=2))
    found = windows_of(rows, kind, max_length=special + 1)
    assert len(found.input_ids) >= 3
    with pytest.raises(errors.UserError, match=f"max_length={special}: must be above"):
        windows_of(rows, kind, max_length=special)


def test_needs_a_fast_tokenizer():
    class Slow:
        name_or_path, is_fast = "some/model", False

    with pytest.raises(errors.UserError, match="model.path='some/model': .* fast"):
        squad.windows(rows_of("a"), Slow(), max_length=9, training=False)


# Answers

LETTERS = "".join(chr(0x4E00 + i) for i in range(99))  # so each span has its own text


def letters(*windows):
    """Questions over LETTERS, a token a letter; a window is (question, its tokens).

    A token is the number of its letter, or None outside the context.
    """
    of_row = np.array([question for question, _ in windows], np.int32)
    offsets = [
        np.array([(-1, -1) if i is None else (i, i + 1) for i in tokens], np.int32)
        for _, tokens in windows
    ]
    many = of_row.max() + 1
    return squad.Questions([LETTERS] * many, [["x"]] * many, of_row, offsets)


def brute_force(logits, questions, n_best, max_tokens):
    """All pairs of the best starts and ends, one by one; the first best one."""
    best = [(-np.inf, "")] * len(questions.contexts)
    for scores, question, offsets in zip(
        logits, questions.of_row, questions.offsets, strict=True
    ):
        inside = [i for i, (begin, _) in enumerate(offsets) if begin >= 0]
        starts, ends = (
            sorted(inside, key=lambda i: (-scores[i, side], i))[:n_best]  # noqa: B023
            for side in (0, 1)
        )
        for first, last in itertools.product(starts, ends):
            total = scores[first, 0] + scores[last, 1]
            if 0 <= last - first < max_tokens and total > best[question][0]:
                text = LETTERS[offsets[first, 0] : offsets[last, 1]]
                best[question] = total, text
    return [text for _, text in best]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_best_answers_by_brute_force(shapes, n_best, max_tokens, largest, random):
    windows = [
        (question, [None, None, *range(question, question + inside), *[None] * after])
        for question, inside, after in shapes
    ]
    questions = letters(*windows)
    logits = np.array(
        [
            [[random.randint(-largest, largest) for _ in "se"] for _ in range(14)]
            for _ in windows
        ],
        np.float32,
    )
    got = squad.best_answers(logits, questions, n_best=n_best, max_tokens=max_tokens)
    assert got == brute_force(logits, questions, n_best, max_tokens)


def test_best_answers_by_default_take_20_and_30():
    rng = np.random.default_rng(0)
    questions = letters(*((i // 2, [None, *range(90)]) for i in range(60)))
    logits = rng.standard_normal((60, 99, 2)).astype(np.float32)
    got = squad.best_answers(logits, questions)
    assert got == brute_force(logits, questions, 20, 30)
    assert got != brute_force(logits, questions, 20, 90)
    # All starts stand after all ends, but for one that is the 20th or 21st best.
    one = letters((0, [None, *range(90)]))
    for others, answer in ((19, [LETTERS[0]]), (20, [""])):
        logits = np.zeros((1, 99, 2))
        logits[0, 40 : 40 + others, 0] = 2
        logits[0, 1, 0] = logits[0, 1:31, 1] = 1
        assert squad.best_answers(logits, one) == answer


def test_many_windows_are_read_in_pieces():
    questions = letters(*((i // 3, [None, 0, 1, 2]) for i in range(2700)))
    logits = np.random.default_rng(1).standard_normal((2700, 5, 2))
    got = squad.best_answers(logits, questions)
    assert got == brute_force(logits, questions, 20, 30)


def test_the_best_window_wins_and_the_rest_does_not_count():
    questions = letters(
        (0, [None, 0, 1, None]), (1, [None, 5]), (0, [None, 1, 2, None])
    )
    logits = np.full((3, 6, 2), 99.0)  # question, special tokens and padding
    logits[0, 1:3] = [[1, 0], [0, 1]]
    logits[1, 1] = -5
    logits[2, 1:3] = [[0, 0], [2, 1]]
    before = logits.copy()
    assert squad.best_answers(logits, questions) == [LETTERS[2], LETTERS[5]]
    np.testing.assert_array_equal(logits, before)


def test_logits_that_are_no_numbers_give_no_answer():
    logits = np.full((1, 4, 2), np.nan)
    assert squad.best_answers(logits, letters((0, [None, 0, 1]))) == [""]


# The official rule, answers worked out by hand


@pytest.mark.parametrize(
    "prediction, answers, exact, f1",
    [
        ("Paris", ["Paris"], 1, 1),
        ("The  Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("An apple a day", ["apple day"], 1, 1),
        ("the theatre", ["Theatre."], 1, 1),  # an article is a whole word
        ("Denver Broncos team", ["Denver Broncos"], 0, 4 / 5),
        ("Denver", ["the Denver Broncos"], 0, 2 / 3),
        # Punctuation goes before articles do, and leaves no space.
        ("a-cat", ["cat"], 0, 0),
        ("a_cat", ["acat"], 1, 1),
        ("co-op", ["co op"], 0, 0),
        ("twenty-one", ["twentyone"], 1, 1),
        ("U.S.A.", ["usa"], 1, 1),
        ("Levi's, $5", ["levis 5"], 1, 1),
        ("(the) cat", ["cat"], 1, 1),
        # Only ASCII's.
        ("24–10", ["2410"], 0, 0),
        ("24-10", ["2410"], 1, 1),
        ("“Paris”", ["Paris"], 0, 0),
        # Letters and spaces of all of Unicode.
        ("BEYONCÉ", ["beyoncé"], 1, 1),
        ("Beyoncé", ["Beyonce"], 0, 0),
        ("STRASSE", ["straße"], 0, 0),
        ("New\u00a0York\u3000City", ["new york city"], 1, 1),
        ("the日本", ["日本"], 0, 0),
        ("the 日本", ["日本"], 1, 1),
        # Nothing left: equal, but no shared words.
        ("", ["Paris"], 0, 0),
        ("Paris", ["the"], 0, 0),
        ("", ["the"], 1, 0),
        ("A.", ["the", "an"], 1, 0),
        ("", [""], 1, 0),
        # Words count as often as they occur: of 3 and 3, cat and dog are shared.
        ("the cat cat dog", ["cat dog dog"], 0, 2 / 3),
        ("cat cat cat", ["cat"], 0, 1 / 2),
        ("dog cat", ["cat dog"], 0, 1),
        # The best gold text counts, for each rule.
        ("new york", ["Boston", "york city", "New York state"], 0, 4 / 5),
        ("new york", ["new york city", "The New York"], 1, 1),
        ("the", ["a", "Paris"], 1, 0),
        ("Paris", [], 0, 0),
    ],
)
def test_official_rule_by_hand(prediction, answers, exact, f1):
    assert squad.exact_match(prediction, answers) == exact
    assert squad.f1(prediction, answers) == pytest.approx(f1)
    assert type(squad.exact_match(prediction, answers)) is float
    assert type(squad.f1(prediction, answers)) is float


def words_of(text):
    """What the rule leaves of a text: its runs of letters, one at a time."""
    left = [c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
    runs = ("".join(run) for _, run in itertools.groupby(left, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def f1_of_words(prediction, answer):
    rest, shared = list(answer), 0
    for word in prediction:
        if word in rest:
            rest.remove(word)
            shared += 1
    if not shared:
        return 0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 / (1 / precision + 1 / recall)


TEXTS = st.text(st.sampled_from("aAnNthe THE.-'_ é\tß日2"), max_size=20) | st.text()


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
@example("the cat\u2028cat", ["a cat", "cat-cat cat"])
def test_official_rule_by_brute_force(prediction, answers):
    found, golds = words_of(prediction), [*map(words_of, answers)]
    assert squad.exact_match(prediction, answers) == (found in golds)
    best = max(f1_of_words(found, gold) for gold in golds)
    assert squad.f1(prediction, answers) == pytest.approx(best)


def test_score_is_the_mean_over_questions():
    context = "the x of Paris"
    rows = rows_of(
        context,
        gold("x", "the x of", start=4),  # found: F1 1
        gold("Paris", start=9),  # "of Paris": 2 / 3
        gold("of", start=6),  # "x": 0
        gold("the", start=0),  # found, and nothing is left of it: 0, exact
    )
    found = windows_of(rows)
    found.labels[1, 0] -= 1
    found.labels[2] -= 1
    assert squad.best_answers(certain(found), found.uncut) == [
        "x",
        "of Paris",
        "x",
        "the",
    ]
    got = score(certain(found), found)
    assert list(got) == ["f1", "exact_match"]
    assert got == pytest.approx({"f1": (1 + 2 / 3) / 4, "exact_match": 1 / 2})
    assert {type(value) for value in got.values()} == {float}
