import json
import math

import numpy as np
import pytest

from cofi_jax import config, data, grammar, metrics

SENTENCES = ["the film was good", 'a "quoted, word', "2001", "NA", "2020-01-01"]
LABELS = [1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def tokenizer():
    return grammar.demo_tokenizer()


def examples_of(lengths, pad_id=0):
    ids = [np.arange(1, n + 1, dtype=np.int32) + 10 * i for i, n in enumerate(lengths)]
    types = [np.full(n, i % 2, np.int32) for i, n in enumerate(lengths)]
    labels = np.arange(len(lengths), dtype=np.int32) % 2
    return data.Examples(ids, types, labels, pad_id)


def settings(path, task="sst2", **more):
    return config.Data(task=task, path=str(path), **more)


def write_csv(folder, text, name="train.csv"):
    (folder / name).write_text(text)
    return folder


def write_parquet(folder, name="train.parquet", **columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / name)
    return folder


def complaint(setting, split="train"):
    with pytest.raises(config.UserError) as caught:
        data.load_rows(setting, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The task table


def test_every_task_has_a_metric():
    for task in data.TASKS.values():
        assert task.metric in metrics.METRICS
        assert len(task.columns) in (1, 2) and len(task.labels) >= 2


# Reading


def test_all_formats_give_the_same_examples(tmp_path, tokenizer):
    rows = [
        {"idx": i, "sentence": s, "label": label}
        for i, (s, label) in enumerate(zip(SENTENCES, LABELS, strict=True))
    ]
    quoted = ['"' + s.replace('"', '""') + '"' for s in SENTENCES]
    lines = [json.dumps(row) for row in rows]
    contents = {
        "csv": "label,sentence\n"
        + "".join(f"{n},{s}\n" for n, s in zip(LABELS, quoted, strict=True)),
        "tsv": "sentence\tlabel\n"
        + "".join(f"{s}\t{n}\n" for s, n in zip(SENTENCES, LABELS, strict=True)),
        "json": json.dumps(rows, indent=1),
        "jsonl": "\n".join(lines) + "\n\n",
    }
    folders = [write_parquet(tmp_path, sentence=SENTENCES, label=LABELS)]
    for suffix, text in contents.items():
        folder = tmp_path / suffix / "sst2"  # the subfolder of the task's name
        folder.mkdir(parents=True)
        (folder / f"train.{suffix}").write_text(text)
        folders.append(folder.parent)
    for folder in folders:
        rows = data.load_rows(settings(folder), "train")
        assert rows["sentence"][:] == SENTENCES
        assert rows["label"][:] == LABELS
        examples = data.load_examples(settings(folder), "train", tokenizer)
        assert examples.labels.dtype == np.int32
        assert examples.labels.tolist() == LABELS
        for text, ids in zip(SENTENCES, examples.input_ids, strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == tokenizer(text)["input_ids"]


def test_json_of_one_object_a_line(tmp_path):
    text = '{"sentence": "a\\u2028b", "label": 1}\n{"sentence": "c", "label": 0}'
    write_csv(tmp_path, text, "validation.json")
    rows = data.load_rows(settings(tmp_path), "validation")
    assert rows["sentence"][:] == ["a\u2028b", "c"]


def test_demo_is_generated(tokenizer):
    setting = config.Data(task="demo", path="")
    examples = data.load_examples(setting, "validation", tokenizer)
    assert len(examples) == grammar.SIZES["validation"]
    first = grammar.demo_rows("validation")["sentence"][0]
    assert examples.input_ids[0].tolist() == tokenizer(first)["input_ids"]


def test_max_length_cuts(tokenizer):
    setting = config.Data(task="demo", path="", max_length=7)
    examples = data.load_examples(setting, "validation", tokenizer)
    assert examples.lengths.max() == 7
    assert all(ids[-1] == tokenizer.sep_token_id for ids in examples.input_ids)


def test_two_text_columns(tmp_path, tokenizer, monkeypatch):
    pair = data.Task(("first", "second"), ("no", "yes"), "accuracy", "answer")
    monkeypatch.setitem(data.TASKS, "pair", pair)
    write_csv(tmp_path, "first,second,answer\nthe film,was good,1\n")
    examples = data.load_examples(settings(tmp_path, "pair"), "train", tokenizer)
    expected = tokenizer("the film", "was good")
    assert examples.input_ids[0].tolist() == expected["input_ids"]
    assert examples.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert examples.labels.tolist() == [1]


def test_hub_name_is_passed_on(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"sentence": ["x"], "label": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.load_rows(config.Data(), "validation")
    assert calls == [(("nyu-mll/glue", "sst2"), {"split": "validation"})]


# What a user does wrong


def test_unknown_task():
    message = complaint(config.Data(task="sst3"))
    assert message.startswith("data.task='sst3'") and "cola" in message


def test_folder_without_the_file(tmp_path):
    write_csv(tmp_path, "", "training.csv")
    message = complaint(settings(tmp_path))
    assert message.startswith("data.path=")
    assert "train.parquet" in message and "training.csv" in message


def test_folder_with_two_files_of_a_split(tmp_path):
    write_csv(tmp_path, "sentence,label\nx,1\n")
    write_csv(tmp_path, "sentence\tlabel\nx\t1\n", "train.tsv")
    message = complaint(settings(tmp_path))
    assert "2 found" in message and "train.csv, train.tsv" in message


@pytest.mark.parametrize("path", ["", "./x", "/no/such/folder", "~/x", "a/b/c", "x/"])
def test_no_such_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = complaint(settings(path))
    assert message.startswith(f"data.path={path!r}")
    assert "--config.data.path=" in message


def test_a_file_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_csv(tmp_path, "sentence,label\nx,1\n"))
    assert "neither a folder" in complaint(settings("train.csv"))


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = complaint(config.Data())
    assert message.startswith("data.path='nyu-mll/glue'")
    assert "Couldn't reach the Hub at all" in message
    assert "--config.data.path=" in message and "validation.parquet" in message


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.parquet", b"garbage"),
        ("train.csv", b"sentence,label\nx,1,2,3\n"),
        ("train.csv", b"sentence,label\n\xff\xfe,1\n"),
        ("train.csv", b""),
        ("train.json", b'[{"sentence": "x"'),
        ("train.json", b"[1, 2]"),
        ("train.jsonl", b'{"sentence": "x", "label": 1}\n{"sent'),
    ],
)
def test_unreadable_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = complaint(settings(tmp_path))
    assert message.startswith("data.path=") and f"cannot read {tmp_path}" in message


@pytest.mark.parametrize("column", ["sentence", "label"])
def test_missing_column(tmp_path, column):
    columns = {"sentence": ["x"], "label": [1], "idx": [0]}
    del columns[column]
    message = complaint(settings(write_parquet(tmp_path, **columns)))
    assert f"column '{column}'" in message and "idx" in message


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_empty_split(tmp_path, name):
    write_csv(tmp_path, "sentence,label\n" if name.endswith("csv") else "", name)
    assert "has no rows" in complaint(settings(tmp_path))


@pytest.mark.parametrize(
    "labels, row, shown",
    [
        (["0", "2"], 1, "2"),
        (["0", "1", "-1"], 2, "-1"),
        (["1", "0.5"], 1, "0.5"),
        (["1", ""], 1, "None"),
        (["1", "positive"], 1, "'positive'"),
    ],
)
def test_wrong_label_in_csv(tmp_path, labels, row, shown):
    write_csv(tmp_path, "sentence,label\n" + "".join(f"x,{n}\n" for n in labels))
    message = complaint(settings(tmp_path))
    assert f"row {row} " in message and f"label={shown};" in message
    assert "0: 'negative'" in message and "-1" in message


@pytest.mark.parametrize(
    "labels, shown", [(["1", "0"], "'1'"), ([True], "True"), ([None], "None")]
)
def test_label_of_another_type(tmp_path, labels, shown):
    write_parquet(tmp_path, sentence=["x"] * len(labels), label=labels)
    assert f"row 0 (the first is 0) has label={shown};" in complaint(settings(tmp_path))


def test_missing_text(tmp_path):
    write_parquet(tmp_path, sentence=["x", "", None], label=[1, 1, 0])
    assert "row 2 (the first is 0) has no text" in complaint(settings(tmp_path))
    (tmp_path / "train.parquet").unlink()
    write_csv(tmp_path, "sentence,label\nx,1\n,0\n")
    assert "row 1 (the first is 0) has no text" in complaint(settings(tmp_path))


def test_text_of_another_type(tmp_path):
    write_parquet(tmp_path, sentence=[["x"]], label=[1])
    assert "must be text" in complaint(settings(tmp_path))


def test_too_many_rows_asked_for():
    with pytest.raises(config.UserError, match="prune.train_rows=4.*at most 3"):
        data.first_rows(examples_of([1, 2, 3]), 4, field="prune.train_rows")


# Choosing and planning


def test_first_rows():
    examples = examples_of(range(1, 21))
    assert data.first_rows(examples, 0, field="x") is examples
    few = data.first_rows(examples, 5, field="x")
    more = data.first_rows(examples, 9, field="x")
    assert few.lengths.tolist() == more.lengths[:5].tolist()
    chosen = np.random.default_rng(0).permutation(20)[:9]
    assert more.lengths.tolist() == (chosen + 1).tolist()
    whole = data.first_rows(examples, 20, field="x")
    assert sorted(whole.lengths) == list(range(1, 21))


def test_take_keeps_fields_together():
    taken = examples_of([3, 1, 2], pad_id=7).take(np.array([2, 0]))
    assert taken.lengths.tolist() == [2, 3]
    assert taken.input_ids[0].tolist() == [21, 22]
    assert taken.token_type_ids[0].tolist() == [0, 0]
    assert taken.labels.tolist() == [0, 0] and taken.pad_id == 7


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
    assert data.bucket_lengths(setting) == expected


@pytest.mark.parametrize("n, batch_size", [(1, 4), (4, 4), (999, 32), (70, 64)])
def test_plan_laws(n, batch_size):
    buckets = (8, 16, 32, 64)
    lengths = np.random.default_rng(n).integers(1, 33, n)
    plan = data.epoch_plan(
        lengths, batch_size=batch_size, buckets=buckets, seed=5, epoch=2
    )
    assert len(plan) == math.ceil(n / batch_size) == data.steps_per_epoch(n, batch_size)
    assert sorted(np.concatenate([rows for _, rows in plan])) == list(range(n))
    for length, rows in plan:
        assert length in buckets[:3] and lengths[rows].max() <= length
    sizes = sorted(len(rows) for _, rows in plan)
    assert all(size == batch_size for size in sizes[1:])


def test_plan_by_hand():
    # Bucket 4: 5 rows = 2 + 2 + 1 left; bucket 8: that 1 + 3 = 2 + 2; 16 is not needed.
    lengths = np.array([1, 5, 4, 4, 8, 2, 3, 6])
    plan = data.epoch_plan(lengths, batch_size=2, buckets=(4, 8, 16), seed=0, epoch=0)
    assert sorted(length for length, _ in plan) == [4, 4, 8, 8]
    short = [row for length, rows in plan if length == 8 for row in rows]
    assert sum(lengths[short] <= 4) == 1


def test_plan_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 17, 100)

    def plan(seed, epoch):
        rows = data.epoch_plan(
            lengths, batch_size=8, buckets=(8, 16), seed=seed, epoch=epoch
        )
        return [(length, row.tolist()) for length, row in rows]

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)
    lengths_in_turn = [length for length, _ in plan(1, 0)]
    assert lengths_in_turn != sorted(lengths_in_turn)


def test_plan_refuses_rows_longer_than_the_last_bucket():
    with pytest.raises(IndexError):
        data.epoch_plan(np.array([9]), batch_size=1, buckets=(8,), seed=0, epoch=0)


# Batches


def test_batch_by_hand():
    examples = examples_of([2, 3, 1], pad_id=9)
    batch = data.make_batch(examples, np.array([1, 2]), length=4, batch_size=3)
    assert {key: (x.tolist(), x.dtype) for key, x in batch.items()} == {
        "input_ids": ([[11, 12, 13, 9], [21, 9, 9, 9], [11, 12, 13, 9]], np.int32),
        "attention_mask": ([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], np.int32),
        "token_type_ids": ([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], np.int32),
        "labels": ([1, 0, 1], np.int32),
        "weight": ([1, 1, 0], np.float32),
    }


def test_eval_batches_cover_every_row_once():
    lengths = np.random.default_rng(3).integers(1, 17, 50)
    examples = examples_of(lengths)
    scattered = np.full(50, -1)
    padded = []
    for rows, batch in data.eval_batches(examples, batch_size=8, buckets=(4, 8, 16)):
        assert batch["input_ids"].shape[0] == 8
        assert batch["weight"].sum() == len(rows)
        padded.append(batch["input_ids"].shape[1])
        assert (scattered[rows] == -1).all()
        scattered[rows] = batch["attention_mask"].sum(1)[: len(rows)]
    assert scattered.tolist() == lengths.tolist()
    assert padded == sorted(padded) and len(padded) == 7
