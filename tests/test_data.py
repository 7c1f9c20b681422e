"""Rows become token ids, an epoch a plan, a plan padded batches."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofi_jax import config, errors
from cofi_jax.data import batches, tasks, toy

SENTENCES = ["the film was good", "the plot was never really dull", "unheard of"]


@pytest.fixture(scope="module")
def tokenizer():
    """Word by word; padding is not 0."""
    tokenizer = toy.demo_tokenizer()
    tokenizer.pad_token = "[UNK]"
    assert tokenizer.pad_token_id == 1
    return tokenizer


def examples_of(lengths, pad_id=0, labels=None):
    ids = [np.arange(1, n + 1, dtype=np.int32) + 10 * i for i, n in enumerate(lengths)]
    types = [np.full(n, i % 2, np.int32) for i, n in enumerate(lengths)]
    if labels is None:
        labels = np.arange(len(lengths), dtype=np.int32) % 2
    return batches.Examples(ids, types, labels, pad_id)


def own(*columns, **fields):
    return tasks.find(config.Data(task="own", columns=columns, **fields))


# Token ids


def test_one_column(tokenizer):
    columns = {"sentence": SENTENCES, "label": np.array([1, 0, 1], np.int32)}
    examples = tasks.find(config.Data("sst2", max_length=20)).tokenise(
        columns, tokenizer
    )
    assert len(examples) == 3 and examples.pad_id == 1
    assert examples.uncut is None
    assert examples.lengths.tolist() == [2 + len(s.split()) for s in SENTENCES]
    words = tokenizer.get_vocab()
    for text, ids, types in zip(
        SENTENCES, examples.input_ids, examples.token_type_ids, strict=True
    ):
        inside = [words.get(word, words["[UNK]"]) for word in text.split()]
        assert ids.tolist() == [words["[CLS]"], *inside, words["[SEP]"]]
        assert types.tolist() == [0] * len(ids)
        assert ids.dtype == types.dtype == np.int32
    assert examples.labels.dtype == np.int32
    assert examples.labels.tolist() == [1, 0, 1]


def test_two_columns_in_the_order_of_the_task(tokenizer):
    columns = {
        "first": ["the film"],
        "second": ["was good"],
        "answer": np.array([1], np.int32),
    }
    for names in (("first", "second"), ("second", "first")):
        task = own(*names, label_column="answer")
        examples = task.tokenise(columns, tokenizer)
        expected = tokenizer(*(columns[name][0] for name in names))
        assert examples.input_ids[0].tolist() == expected["input_ids"]
        assert examples.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert examples.labels.tolist() == [1]


def test_values_stay_values(tokenizer):
    labels = np.array([0.5, -2, 3.25], np.float32)
    columns = {"text": SENTENCES, "label": labels}
    task = own("text", problem="regression")
    examples = task.tokenise(columns, tokenizer)
    assert examples.labels.dtype == np.float32
    assert examples.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("training", [False, True])
def test_rows_are_cut(tokenizer, training):
    one = {"a": SENTENCES, "b": SENTENCES[::-1], "label": np.zeros(3, np.int32)}
    for columns in (("a",), ("a", "b")):
        task = own(*columns, max_length=5)
        examples = task.tokenise(one, tokenizer, training=training)
        assert len(examples) == 3
        assert examples.lengths.max() == 5
        assert all(ids[-1] == tokenizer.sep_token_id for ids in examples.input_ids)
        whole = own(*columns, max_length=50).tokenise(one, tokenizer)
        assert whole.lengths.max() > 5


@pytest.mark.parametrize(
    ("columns", "special", "what"),
    [(("a",), 2, "a text"), (("a", "b"), 3, "a pair of texts")],
)
def test_lengths_without_room_for_a_text(tokenizer, columns, special, what):
    """Tokenizers do not cut then, or leave nothing of a row but special tokens."""
    one = {"a": SENTENCES, "b": SENTENCES[::-1], "label": np.zeros(3, np.int32)}
    said = f"^data.max_length={special}: must be above {special}, .* tokens of {what}$"
    with pytest.raises(errors.UserError, match=said):
        own(*columns, max_length=special).tokenise(one, tokenizer)
    found = own(*columns, max_length=special + 1).tokenise(one, tokenizer)
    assert set(found.lengths) == {special + 1}


# Questions

CONTEXT = "the film was good but the plot was never really dull"


ANSWERS = [
    {"text": ["good"], "answer_start": [13]},
    {"text": ["bad"], "answer_start": [13]},  # not in its place
    {"text": ["never really dull", "dull"], "answer_start": [35, 48]},
]


ASKED = {
    "question": ["the film", "the film", "the plot"],
    "context": [CONTEXT] * 3,
    "answers": ANSWERS,
}


def windows(tokenizer, *, max_length, training=False):
    task = tasks.find(config.Data("squad", max_length=max_length))
    return task.tokenise(ASKED, tokenizer, training=training)


def test_questions_by_hand(tokenizer, capsys):
    """[CLS] the film [SEP] the film was good ... [SEP]: 4 tokens, 11 words, 1 token."""
    examples = windows(tokenizer, max_length=40)
    assert examples.lengths.tolist() == [4 + 11 + 1] * 3
    assert examples.labels.tolist() == [[4 + 3, 4 + 3], [0, 0], [4 + 8, 4 + 10]]
    assert examples.labels.dtype == np.int32
    assert examples.pad_id == 1 and len(examples) == 3
    for ids, types, asked in zip(
        examples.input_ids, examples.token_type_ids, ASKED["question"], strict=True
    ):
        assert ids.tolist() == tokenizer(asked, CONTEXT)["input_ids"]
        assert types.tolist() == [0] * 4 + [1] * 12
    found = examples.uncut
    assert found.contexts == [CONTEXT] * 3
    assert found.answers == [["good"], ["bad"], ["never really dull", "dull"]]
    assert found.of_row.tolist() == [0, 1, 2]
    # A model that is right about the labels answers 2 of 3.
    logits = np.zeros((3, 16, 2))
    for row, label in zip(logits, examples.labels, strict=True):
        row[label, [0, 1]] = 1
    scores = tasks.TASKS["squad"].scores(logits, examples)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    said = "warning: 1 questions: their answer is not in their context at the place"
    assert capsys.readouterr().err.startswith(said)


def test_questions_without_an_answer_are_left_out_of_training(tokenizer, capsys):
    examples = windows(tokenizer, max_length=40, training=True)
    assert examples.labels.tolist() == [[7, 7], [12, 14]]
    assert examples.uncut.of_row.tolist() == [0, 1]
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("warning: 1 questions skipped")


@pytest.mark.parametrize("training", [False, True])
def test_contexts_that_are_too_long_become_windows(tokenizer, training):
    examples = windows(tokenizer, max_length=12, training=training)
    assert len(examples) == len(examples.labels) > len(examples.uncut.contexts)
    assert examples.lengths.max() == 12


# Choosing and planning


def test_too_many_rows_asked_for():
    with pytest.raises(errors.UserError, match="prune.train_rows=4.*at most 3"):
        batches.first_rows(examples_of([1, 2, 3]), 4, field="prune.train_rows")


def test_first_rows():
    examples = examples_of(range(1, 21))
    assert batches.first_rows(examples, 0, field="x") is examples
    few = batches.first_rows(examples, 5, field="x")
    more = batches.first_rows(examples, 9, field="x")
    assert few.lengths.tolist() == more.lengths[:5].tolist()
    chosen = np.random.default_rng(0).permutation(20)[:9]
    assert more.lengths.tolist() == (chosen + 1).tolist()
    whole = batches.first_rows(examples, 20, field="x")
    assert sorted(whole.lengths) == list(range(1, 21))


def test_take_keeps_fields_together():
    taken = examples_of([3, 1, 2], pad_id=7).take(np.array([2, 0]))
    assert taken.lengths.tolist() == [2, 3]
    assert taken.input_ids[0].tolist() == [21, 22]
    assert taken.token_type_ids[0].tolist() == [0, 0]
    assert taken.labels.tolist() == [0, 0] and taken.pad_id == 7
    spans = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    taken = examples_of([3, 1, 2], labels=spans).take(np.array([2, 0]))
    assert taken.labels.tolist() == [[5, 6], [1, 2]]


@pytest.mark.parametrize(
    "buckets, max_length, expected",
    [
        ((16, 32, 64, 128), 64, (16, 32, 64)),
        ((16, 32, 64, 128), 50, (16, 32, 50)),
        ((16, 32, 512), 600, (16, 32, 512, 600)),
        ((16, 32), 8, (8,)),
    ],
)
def test_bucket_lengths(buckets, max_length, expected):
    setting = config.Data(buckets=buckets, max_length=max_length)
    assert batches.bucket_lengths(tasks.find(setting), np.array([3])) == expected


@pytest.mark.parametrize(
    "task, expected",
    [
        ("sst2", (16, 32, 128)),
        ("own", (16, 32, 128)),
        ("squad", (16, 32, 384)),
    ],
)
def test_bucket_lengths_end_in_the_task_s_own(task, expected):
    columns = ("text",) if task == "own" else ()
    setting = config.Data(task=task, columns=columns)
    assert (
        batches.bucket_lengths(tasks.find(setting), np.array([9, 13] * 50 + [32] * 50))
        == expected
    )


def padded(buckets, lengths):
    return np.asarray(buckets)[np.searchsorted(buckets, lengths)].sum()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.sampled_from((70, 99)))
def test_chosen_buckets_are_the_best_of_their_number(lengths, longest):
    """By trying all sets of multiples of 8; one more would not save 5 %."""
    chosen = batches.choose_buckets(np.array(lengths), longest)
    widest = min(-(-max(lengths) // 8) * 8, longest)
    assert chosen == tuple(sorted(set(chosen))) and chosen[-1] == widest

    def best(count):
        rest = itertools.combinations(range(8, widest, 8), count - 1)
        return min((padded((*r, widest), lengths) for r in rest), default=np.inf)

    found = padded(chosen, lengths)
    assert found == best(len(chosen))
    for fewer in range(1, len(chosen)):
        assert best(fewer + 1) < 0.95 * best(fewer)
    assert not best(len(chosen) + 1) < 0.95 * found


@pytest.mark.parametrize(
    "epochs, expected",
    [(0, (48,)), (3.9, (48,)), (3.91, (16, 48)), (31.2, (16, 48)), (31.3, (8, 16, 48))],
)
def test_chosen_buckets_pay_for_their_programs(epochs, expected):
    """A second length saves 12,800 tokens of an epoch, and a third one 1,600."""
    lengths = np.repeat([5, 16, 48], [200, 200, 10])
    assert batches.choose_buckets(lengths, 64, epochs) == expected


def test_chosen_buckets_of_nothing():
    setting = config.Data(max_length=30)
    assert batches.bucket_lengths(tasks.find(setting), np.array([], int)) == (30,)


@pytest.mark.parametrize("n, batch_size", [(1, 4), (4, 4), (999, 32), (70, 64)])
def test_plan_laws(n, batch_size):
    buckets = (8, 16, 32, 64)
    lengths = np.random.default_rng(n).integers(1, 33, n)
    plan = batches.epoch_plan(
        lengths, batch_size=batch_size, buckets=buckets, stage="", seed=5, epoch=2
    )
    assert (
        len(plan) == math.ceil(n / batch_size) == batches.steps_per_epoch(n, batch_size)
    )
    assert sorted(np.concatenate([rows for _, rows in plan])) == list(range(n))
    for length, rows in plan:
        assert length in buckets[:3] and lengths[rows].max() <= length
    sizes = sorted(len(rows) for _, rows in plan)
    assert all(size == batch_size for size in sizes[1:])


def test_plan_by_hand():
    # Bucket 4: 5 rows = 2 + 2 + 1 left; bucket 8: that 1 + 3 = 2 + 2; 16 is not needed.
    lengths = np.array([1, 5, 4, 4, 8, 2, 3, 6])
    plan = batches.epoch_plan(
        lengths, batch_size=2, buckets=(4, 8, 16), stage="", seed=0, epoch=0
    )
    assert sorted(length for length, _ in plan) == [4, 4, 8, 8]
    short = [row for length, rows in plan if length == 8 for row in rows]
    assert sum(lengths[short] <= 4) == 1


def test_plan_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 17, 100)

    def plan(seed, epoch):
        rows = batches.epoch_plan(
            lengths, batch_size=8, buckets=(8, 16), stage="", seed=seed, epoch=epoch
        )
        return [(length, row.tolist()) for length, row in rows]

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)
    lengths_in_turn = [length for length, _ in plan(1, 0)]
    assert lengths_in_turn != sorted(lengths_in_turn)


def test_plan_refuses_rows_longer_than_the_last_bucket():
    with pytest.raises(IndexError):
        batches.epoch_plan(
            np.array([9]), batch_size=1, buckets=(8,), stage="", seed=0, epoch=0
        )


# Batches


def test_batch_by_hand():
    examples = examples_of([2, 3, 1], pad_id=9)
    batch = batches.make_batch(examples, np.array([1, 2]), length=4, batch_size=3)
    assert {key: (x.tolist(), x.dtype) for key, x in batch.items()} == {
        "input_ids": ([[11, 12, 13, 9], [21, 9, 9, 9], [11, 12, 13, 9]], np.int32),
        "attention_mask": ([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], np.int32),
        "token_type_ids": ([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], np.int32),
        "labels": ([1, 0, 1], np.int32),
        "weight": ([1, 1, 0], np.float32),
    }


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0.5, -1, 2.25], np.float32),
        np.array([[1, 2], [0, 0], [3, 5]], np.int32),
    ],
)
def test_labels_of_a_batch(labels):
    examples = examples_of([2, 3, 1], labels=labels)
    batch = batches.make_batch(examples, np.array([2, 1]), length=4, batch_size=4)
    expected = labels[[2, 1, 2, 2]]
    np.testing.assert_array_equal(batch["labels"], expected, strict=True)
    assert batch["weight"].tolist() == [1, 1, 0, 0]
    seen = np.empty_like(labels)
    for rows, batch in batches.eval_batches(examples, batch_size=2, buckets=(2, 4)):
        seen[rows] = batch["labels"][: len(rows)]
    np.testing.assert_array_equal(seen, labels)


def test_eval_batches_cover_every_row_once():
    lengths = np.random.default_rng(3).integers(1, 17, 50)
    examples = examples_of(lengths)
    scattered = np.full(50, -1)
    padded = []
    for rows, batch in batches.eval_batches(examples, batch_size=8, buckets=(4, 8, 16)):
        assert batch["input_ids"].shape[0] == 8
        assert batch["weight"].sum() == len(rows)
        padded.append(batch["input_ids"].shape[1])
        assert (scattered[rows] == -1).all()
        scattered[rows] = batch["attention_mask"].sum(1)[: len(rows)]
    assert scattered.tolist() == lengths.tolist()
    assert padded == sorted(padded) and len(padded) == 7
