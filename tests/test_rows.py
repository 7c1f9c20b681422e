"""Rows: all formats and the hub give the same; labels get numbers; what is refused."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cofi_jax import config, errors
from cofi_jax.data import sources, tasks, toy

SENTENCES = ["the film was good", 'a "quoted, word', "2001", "NA", "2020-01-01"]


LABELS = [1, 0, 1, 0, 1]


def settings(path, task="sst2", **more):
    return config.Data(task=task, path=str(path), **more)


def own(path, **more):
    return settings(path, "own", **{"columns": ("sentence",)} | more)


def write(folder, text, name="train.csv"):
    (folder / name).write_text(text)
    return folder


def write_parquet(folder, name="train.parquet", **columns):
    parquet.write_table(pyarrow.table(columns), folder / name)
    return folder


def write_labels(folder, split="train", *labels):
    """As many sentences, in a parquet file."""
    texts = [f"{split} {i}" for i in range(len(labels))]
    return write_parquet(folder, f"{split}.parquet", sentence=texts, label=list(labels))


def load(setting, splits):
    return sources.load(tasks.find(setting), splits)


def labels_of(setting, split="train", column="label"):
    return load(setting, (split,))[1][split][column]


def complaint(setting, *splits):
    with pytest.raises(errors.UserError) as caught:
        load(setting, splits or ("train",))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading


def test_all_formats_give_the_same_columns(tmp_path):
    table = [
        {"idx": i, "sentence": s, "label": label}
        for i, (s, label) in enumerate(zip(SENTENCES, LABELS, strict=True))
    ]
    quoted = ['"' + s.replace('"', '""') + '"' for s in SENTENCES]
    lines = [json.dumps(row) for row in table]
    contents = {
        "csv": "label,sentence\n"
        + "".join(f"{n},{s}\n" for n, s in zip(LABELS, quoted, strict=True)),
        "tsv": "sentence\tlabel\n"
        + "".join(f"{s}\t{n}\n" for s, n in zip(SENTENCES, LABELS, strict=True)),
        "json": json.dumps(table, indent=1),
        "jsonl": "\n".join(lines) + "\n\n",
    }
    folders = [write_parquet(tmp_path, sentence=SENTENCES, label=LABELS)]
    for suffix, text in contents.items():
        folder = tmp_path / suffix / "sst2"  # the subfolder of the task's name
        folder.mkdir(parents=True)
        (folder / f"train.{suffix}").write_text(text)
        folders.append(folder.parent)
    for folder in folders:
        task, found = load(settings(folder), ("train",))
        assert task.labels == ("negative", "positive")
        assert list(found) == ["train"]
        assert set(found["train"]) == {"sentence", "label"}
        assert found["train"]["sentence"] == SENTENCES
        assert found["train"]["label"].dtype == np.int32
        assert found["train"]["label"].tolist() == LABELS


def test_json_of_one_object_a_line(tmp_path):
    text = '{"sentence": "a\\u2028b", "label": 1}\n{"sentence": "c", "label": 0}'
    write(tmp_path, text, "validation.json")
    _, found = load(settings(tmp_path), ("validation",))
    assert found["validation"]["sentence"] == ["a\u2028b", "c"]


def test_demo_is_generated():
    task, found = load(config.Data(task="demo"), ("train", "validation"))
    assert task.labels == ("blame", "praise")
    assert list(found) == ["train", "validation"]
    for split, columns in found.items():
        expected = toy.demo_rows(split)
        assert columns["sentence"] == expected["sentence"]
        assert columns["label"].tolist() == expected["label"]


# Data sets on the hub, and their subsets; one called default needs no name.
SUBSETS = {
    "nyu-mll/glue": ["cola", "sst2", "mnli"],
    "some-one/glue": ["cola", "sst2", "mrpc"],
    "some-one/sst2": ["default"],
    "some-one/versions": ["v1", "v2"],
    "rajpurkar/squad": ["plain_text"],
    "another/squad.v2": ["squad_v2"],
    "a-name": ["default"],
}


@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked for; it has one row of each task."""
    import datasets

    calls = []
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(sentence=datasets.Value("string"), label=names)
    squad = {
        "question": ["who"],
        "context": ["it was me"],
        "answers": [{"text": ["me"], "answer_start": [7]}],
    }

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        path, subset = args
        if subset not in (SUBSETS[path] if len(SUBSETS[path]) > 1 else (None,)):
            raise ValueError(f"Config {subset} not found.\nThere is {SUBSETS[path]}")
        if "squad" in args[0]:
            return datasets.Dataset.from_dict(squad)
        table = {"sentence": ["x", "y", "z"], "label": [0, 0, 1]}
        # As after a filter: the rows are not those of the table underneath.
        return datasets.Dataset.from_dict(table, features).select([2, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", SUBSETS.__getitem__)
    return calls


@pytest.mark.parametrize(
    "data, expected",
    [
        (config.Data(), ("nyu-mll/glue", "sst2")),
        (config.Data(path="some-one/glue"), ("some-one/glue", "sst2")),
        (config.Data(path="nyu-mll/glue"), ("nyu-mll/glue", "sst2")),
        (config.Data(path="some-one/sst2"), ("some-one/sst2", None)),
        (config.Data(task="squad"), ("rajpurkar/squad", None)),
        (
            config.Data(task="squad", path="another/squad.v2"),
            ("another/squad.v2", None),
        ),
        (own("a-name", columns=("sentence",)), ("a-name", None)),
    ],
)
def test_hub_name_is_passed_on(hub, data, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    splits = ("train", "validation")
    _, found = load(data, splits)
    assert hub == [(expected, {"split": split}) for split in splits]
    for split in splits:
        if data.task == "squad":
            assert found[split]["context"] == ["it was me"]
            answer = {"text": ["me"], "answer_start": [7]}
            assert found[split]["answers"] == [answer]
        else:
            assert found[split]["sentence"] == ["z", "y"]
            assert found[split]["label"].tolist() == [1, 0]


def test_a_data_set_without_a_subset_for_the_task(hub):
    """One line says which there are."""
    message = complaint(config.Data(path="some-one/versions"))
    assert message.startswith("data.path='some-one/versions'")
    assert "There is ['v1', 'v2']" in message


def test_a_folder_goes_before_the_hub(hub, tmp_path):
    load(settings(write_labels(tmp_path, "train", 0, 1)), ("train",))
    assert hub == []


def test_both_validation_splits_are_read(tmp_path):
    pair = {"premise": ["p"], "hypothesis": ["h"]}
    write_parquet(tmp_path, **pair, label=[2])
    write_parquet(tmp_path, "validation_matched.parquet", **pair, label=[1])
    data = settings(tmp_path, "mnli")
    splits = ("train", "validation_matched", "validation_mismatched")
    message = complaint(data, *splits)
    assert "validation_mismatched.parquet" in message and "0 found" in message
    write(tmp_path, "hypothesis,premise,label\nh,q,0\n", "validation_mismatched.csv")
    _, found = load(data, splits)
    assert tuple(found) == splits
    assert [found[split]["label"].tolist() for split in splits] == [[2], [1], [0]]
    assert [found[split]["premise"] for split in splits] == [["p"], ["p"], ["q"]]


# Classes by name and by number


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0, 1],
        ["positive", "negative", "positive"],
        ["1", "0", "1"],
        [1.0, 0.0, 1.0],
        np.array([1, 0, 1], np.int8),
    ],
)
def test_a_class_of_the_table_by_name_or_number(tmp_path, labels):
    found = labels_of(settings(write_labels(tmp_path, "train", *labels)))
    assert found.dtype == np.int32 and found.tolist() == [1, 0, 1]


def test_three_classes_by_name(tmp_path):
    names = ["contradiction", "entailment", "neutral"]
    write_parquet(tmp_path, premise=names, hypothesis=names, label=names)
    assert labels_of(settings(tmp_path, "mnli")).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "labels, names, numbers",
    [
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([5, 1, 2, 5], ("1", "2", "5"), [2, 0, 1, 2]),
        ([10, 9, 2], ("2", "9", "10"), [2, 1, 0]),  # as numbers, not as words
        ([-1, 1], ("-1", "1"), [0, 1]),
        (["+1", "-1", "+1"], ("-1", "+1"), [1, 0, 1]),
        ([0, 1, 1], ("0", "1"), [0, 1, 1]),
        ([1, 2], ("1", "2"), [0, 1]),
        ([2.0, 1.0], ("1", "2"), [1, 0]),  # what pandas makes of integers
        (["0", "2"], ("0", "2"), [0, 1]),
        ([True, False], ("False", "True"), [1, 0]),
    ],
)
def test_classes_are_read_off_the_training_rows(tmp_path, labels, names, numbers):
    write_labels(tmp_path, "train", *labels)
    write_labels(tmp_path, "validation", *labels[:1])
    task, found = load(own(tmp_path), ("train", "validation"))
    assert task.labels == names and task.num_outputs == len(names)
    assert found["train"]["label"].tolist() == numbers
    assert found["validation"]["label"].tolist() == numbers[:1]
    assert found["train"]["label"].dtype == np.int32


def test_classes_in_a_given_order(tmp_path):
    write_labels(tmp_path, "train", "dog", "cat", "dog")
    task, found = load(own(tmp_path, labels=("dog", "cat", "eel")), ("train",))
    assert task.labels == ("dog", "cat", "eel")
    assert found["train"]["label"].tolist() == [0, 1, 0]
    write_labels(tmp_path, "train", 2, 0)  # or their numbers
    assert labels_of(own(tmp_path, labels=("dog", "cat", "eel"))).tolist() == [2, 0]
    write_labels(tmp_path, "train", 2, 1)  # names go before numbers
    assert labels_of(own(tmp_path, labels=("2", "1"))).tolist() == [0, 1]


def test_given_classes_need_no_training_rows(tmp_path):
    write_labels(tmp_path, "validation", "b", "a")
    found = labels_of(own(tmp_path, labels=("a", "b")), "validation")
    assert found.tolist() == [1, 0]


def test_another_label_column_and_a_pair(tmp_path):
    write(tmp_path, "first,second,answer\nthe film,was good,yes\na,b,no\n")
    data = own(tmp_path, columns=("second", "first"), label_column="answer")
    task, found = load(data, ("train",))
    assert task.labels == ("no", "yes")
    assert found["train"]["first"] == ["the film", "a"]
    assert found["train"]["second"] == ["was good", "b"]
    assert found["train"]["answer"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "train, validation, row, shown",
    [
        (["dog", "cat"], ["cat", "eel"], 1, "'eel'"),
        ([1, 2, 5], [5, 1, 3], 2, "3"),
        ([1, 2, 5], [5, 0], 1, "0"),
        ([1, 2], [0, 0], 0, "0"),  # no name among them, and yet no number of a class
        ([2, 3], [0, 1], 0, "0"),
        (["2", "3"], ["1", "1"], 0, "'1'"),
        ([1, 2], [1.0, 1.5], 1, "1.5"),
        ([1, 2], [1, None], 1, "None"),
        (["dog", "cat"], ["Cat"], 0, "'Cat'"),
    ],
)
def test_a_class_that_training_has_not(tmp_path, train, validation, row, shown):
    write_labels(tmp_path, "train", *train)
    write_labels(tmp_path, "validation", *validation)
    message = complaint(own(tmp_path), "train", "validation")
    assert f"validation.parquet, row {row} " in message
    assert f"label={shown};" in message
    legal = message.split(";")[1]
    assert all(str(name) in legal for name in train)


def test_a_missing_class(tmp_path):
    write(tmp_path, "sentence,label\na,1\nb,\nc,2\n")
    message = complaint(own(tmp_path))
    assert "train.csv, row 1 " in message and "label=None;" in message
    (tmp_path / "train.csv").unlink()
    write_labels(tmp_path, "train", 1.0, 2.0, None)  # as pandas would
    message = complaint(own(tmp_path))
    assert "train.parquet, row 2 " in message and "label=None;" in message


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_a_missing_number_is_no_class(tmp_path, missing):
    message = complaint(own(write_labels(tmp_path, "train", 1.0, missing, 2.0)))
    assert f"train.parquet, row 1 (the first is 0) has label={missing};" in message
    assert message.endswith("must be among 1, 2")


@pytest.mark.parametrize(
    "labels",
    [
        [0.5, 1.0, 2.0],
        [-1.0, 0.5],
        [1.0, float("inf")],
        range(1001),
        [f"text {i}" for i in range(1001)],
        ["one"] * 3,
        [None, None],
    ],
    ids=["floats", "-1", "inf", "1001 numbers", "1001 texts", "one", "none"],
)
def test_labels_that_are_no_classes(tmp_path, labels):
    message = complaint(own(write_labels(tmp_path, "train", *labels)))
    assert message.startswith("data.label_column='label'")
    assert "data.problem=regression" in message and len(message) < 500


def test_a_thousand_classes(tmp_path):
    task, _ = load(own(write_labels(tmp_path, "train", *range(1000))), ("train",))
    assert task.num_outputs == 1000


def test_f1_is_of_two_classes(tmp_path):
    data = own(tmp_path, metrics=("accuracy", "f1"))
    write_labels(tmp_path, "train", "no", "yes", "both")
    message = complaint(data)
    assert message.startswith("data.metrics=('accuracy', 'f1')")
    write_labels(tmp_path, "train", "no", "yes")
    assert labels_of(data).tolist() == [0, 1]


def test_words_of_csv_that_look_like_booleans(tmp_path):
    write(tmp_path, "sentence,label\na,true\nb,false\n")
    data = own(tmp_path, labels=("true", "false"))
    assert labels_of(data).tolist() == [0, 1]


def test_a_missing_class_is_not_the_class_none(tmp_path):
    write(tmp_path, "sentence,label\na,None\nb,y\nc,\n")
    assert "row 2 (the first is 0) has label=None;" in complaint(own(tmp_path))


def test_classes_are_read_alike_in_every_file(tmp_path):
    write(tmp_path, "sentence,label\na,1.0\nb,x\nc,007\n")
    write(tmp_path, "sentence,label\na,1.0\nb,007\n", "validation.csv")
    task, found = load(own(tmp_path), ("train", "validation"))
    assert task.labels == ("007", "1", "x")
    assert found["validation"]["label"].tolist() == [1, 0]


def test_names_that_were_read_are_not_numbered(tmp_path):
    write_labels(tmp_path, "train", "neg", "pos")
    write_labels(tmp_path, "validation", 0, 1)
    message = complaint(own(tmp_path), "train", "validation")
    assert "validation.parquet, row 0 " in message
    data = own(tmp_path, labels=("pos", "neg"))  # now their order is a choice
    assert labels_of(data, "validation").tolist() == [0, 1]


def test_two_columns_of_a_name(tmp_path):
    write(tmp_path, "sentence,label,sentence\na,1,b\n")
    assert "several columns 'sentence'" in complaint(settings(tmp_path))


def test_lists_are_no_classes(tmp_path):
    assert "label" in complaint(own(write_labels(tmp_path, "train", [1], [2], [1])))


@pytest.mark.parametrize(
    "labels, row, shown",
    [
        (["0", "2"], 1, "'2'"),
        (["0", "1", "-1"], 2, "'-1'"),
        (["1", "0.5"], 1, "'0.5'"),
        (["1", ""], 1, "None"),
        (["1", "good"], 1, "'good'"),
        (["positive", "1"], 1, "'1'"),  # by name or by number, not both
        (["positive", "Negative"], 1, "'Negative'"),
    ],
)
def test_wrong_label_in_csv(tmp_path, labels, row, shown):
    write(tmp_path, "sentence,label\n" + "".join(f"x,{n}\n" for n in labels))
    message = complaint(settings(tmp_path))
    assert message.startswith("data.path=")
    assert f"row {row} " in message and f"label={shown};" in message
    assert "0: 'negative'" in message and "-1" in message


@pytest.mark.parametrize(
    "labels, shown",
    [
        ([True], "True"),
        ([None], "None"),
        ([[1]], "[1]"),
        ([{"a": 1}], "{'a': 1}"),
        ([float("nan")], "nan"),
        ([""], "''"),
    ],
)
def test_label_of_another_type(tmp_path, labels, shown):
    message = complaint(settings(write_labels(tmp_path, "train", *labels)))
    assert f"row 0 (the first is 0) has label={shown};" in message


# Values


@pytest.mark.parametrize(
    "labels", [[1.5, -2.0, 0.1], [3, 0, -1], [3, 1.5, 0], np.float32([0.5, 1, 2])]
)
def test_values(tmp_path, labels):
    write_labels(tmp_path, "train", *labels)
    task, found = load(own(tmp_path, problem="regression"), ("train",))
    assert task.labels == () and task.num_outputs == 1
    assert found["train"]["label"].dtype == np.float32
    assert found["train"]["label"].tolist() == np.float32(labels).tolist()


def test_values_of_a_csv(tmp_path):
    write(tmp_path, "sentence1,sentence2,label\na,b,5.0\nc,d,0\ne,f,2.25\n")
    assert labels_of(settings(tmp_path, "stsb")).tolist() == [5, 0, 2.25]
    write(tmp_path, "sentence1,sentence2,label\na,b,5\nc,d,0\n")
    assert labels_of(settings(tmp_path, "stsb")).dtype == np.float32


@pytest.mark.parametrize(
    "labels, row, shown",
    [
        ([1.0, float("nan")], 1, "nan"),
        ([1.0, 2.0, float("-inf")], 2, "-inf"),
        ([1.0, -1e300], 1, "-1e+300"),  # not a float32
        ([True, False], 0, "True"),
        (["1.5"], 0, "'1.5'"),
        ([1, None], 1, "None"),
        ([[1.0]], 0, "[1.0]"),
    ],
)
def test_values_that_are_no_numbers(tmp_path, labels, row, shown):
    write_labels(tmp_path, "train", *labels)
    message = complaint(own(tmp_path, problem="regression"))
    assert f"row {row} (the first is 0) has label={shown};" in message
    assert "a finite number" in message


def test_an_empty_cell_is_no_value(tmp_path):
    write(tmp_path, "sentence,label\na,1\nb,2\nc,\n")
    message = complaint(own(tmp_path, problem="regression"))
    assert "train.csv, row 2 " in message and "label=None;" in message


# Answers


def write_answers(folder, *answers):
    many = len(answers)
    return write_parquet(
        folder, question=["q"] * many, context=["c"] * many, answers=list(answers)
    )


def test_answers_stay_as_they_are(tmp_path):
    answers = [
        {"text": ["c", "c"], "answer_start": [0, 0]},
        {"text": [], "answer_start": []},
    ]
    data = settings(write_answers(tmp_path, *answers), "squad")
    assert labels_of(data, column="answers").tolist() == answers
    lines = [
        json.dumps({"id": 1, "question": "q", "context": "c", "answers": answer})
        for answer in answers
    ]
    (tmp_path / "train.parquet").unlink()
    write(tmp_path, "\n".join(lines), "train.jsonl")
    assert labels_of(data, column="answers").tolist() == answers


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "c",
        7,
        ["c"],
        {"text": ["c"]},
        {"text": "c", "answer_start": 0},
        {"text": ["c"], "answer_start": None},
        {"text": ["c", "c"], "answer_start": [0]},
        {"text": [], "answer_start": [0]},
        {"text": ["c"], "answer_start": [None]},
        {"text": [None], "answer_start": [0]},
        {"text": ["c"], "answer_start": ["0"]},
    ],
    ids=str,
)
def test_answers_that_are_none(tmp_path, answer):
    message = complaint(settings(write_answers(tmp_path, answer), "squad"))
    assert f"row 0 (the first is 0) has answers={answer!r};" in message
    assert "`text`" in message and "`answer_start`" in message


def test_the_row_of_a_wrong_answer(tmp_path):
    right = {"text": ["c"], "answer_start": [0]}
    write_answers(tmp_path, right, right, {"text": ["c", "d"], "answer_start": [0]})
    assert "row 2 (the first is 0) " in complaint(settings(tmp_path, "squad"))


# More training rows


def test_extra_rows_follow_those_of_training(tmp_path):
    write(tmp_path, "sentence,label\na,1\nb,0\n")
    write(tmp_path, "sentence,label\nv,1\n", "validation.csv")
    write(tmp_path, "label\tsentence\n0\tc\n1\td\n0\te\n", "more.tsv")
    data = settings(tmp_path, extra_file=str(tmp_path / "more.tsv"))
    _, found = load(data, ("train", "validation"))
    assert found["train"]["sentence"] == list("abcde")
    assert found["train"]["label"].tolist() == [1, 0, 0, 1, 0]
    assert found["train"]["label"].dtype == np.int32
    assert found["validation"]["sentence"] == ["v"]
    assert found["validation"]["label"].tolist() == [1]


def test_extra_rows_are_not_read_without_training(tmp_path):
    write_labels(tmp_path, "validation", 1)
    data = settings(tmp_path, extra_file=str(tmp_path / "none.csv"))
    assert labels_of(data, "validation").tolist() == [1]


def test_extra_rows_to_generated_ones(tmp_path):
    write(tmp_path, "sentence,label\nthe film was good,praise\n", "x.csv")
    data = config.Data(task="demo", extra_file=str(tmp_path / "x.csv"))
    train = load(data, ("train",))[1]["train"]
    assert len(train["sentence"]) == len(train["label"]) == 1 + toy.SIZES["train"]
    assert train["sentence"][-1] == "the film was good" and train["label"][-1] == 1


@pytest.mark.parametrize(
    "labels, more, names, numbers",
    [
        (["cat", "eel"], ["dog", "cat"], ("cat", "dog", "eel"), [0, 2, 1, 0]),
        ([5, 1], [2, 5], ("1", "2", "5"), [2, 0, 1, 2]),
        ([1, 2], [2.0, 1.0], ("1", "2"), [0, 1, 1, 0]),
        ([1, 2], ["2", "3"], ("1", "2", "3"), [0, 1, 1, 2]),
        ([1, 2], [0, 0], ("0", "1", "2"), [1, 2, 0, 0]),
    ],
)
def test_extra_rows_have_classes_alike(tmp_path, labels, more, names, numbers):
    write_labels(tmp_path, "train", *labels)
    write_labels(tmp_path, "more", *more)
    data = own(tmp_path, extra_file=str(tmp_path / "more.parquet"))
    task, found = load(data, ("train",))
    assert task.labels == names
    assert found["train"]["label"].tolist() == numbers


def test_extra_rows_of_values_and_of_answers(tmp_path):
    write_labels(tmp_path, "train", 1, 2)
    write_labels(tmp_path, "more", 0.5)
    extra_file = str(tmp_path / "more.parquet")
    data = own(tmp_path, problem="regression", extra_file=extra_file)
    assert labels_of(data).tolist() == [1, 2, 0.5]
    assert labels_of(data).dtype == np.float32

    answer = {"text": ["c"], "answer_start": [0]}
    (tmp_path / "more").mkdir()
    write_answers(tmp_path, answer)
    write_answers(tmp_path / "more", answer, answer)
    data = settings(
        tmp_path, "squad", extra_file=str(tmp_path / "more" / "train.parquet")
    )
    assert labels_of(data, column="answers").tolist() == [answer] * 3


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("none.csv", None, "cannot read"),
        ("more.txt", "sentence,label\nx,1\n", "parquet"),
        ("more", "", "parquet"),
        ("more.csv", "sentence,label\n", "no rows"),
        ("more.csv", "sentence\nx\n", "'label'"),
        ("more.csv", "sentence,label\nx,1\n,0\n", "row 1 (the first is 0) has no text"),
        ("more.json", "[1", "cannot read"),
        (
            "more.csv",
            "sentence,label\nx,1\ny,7\n",
            "row 1 (the first is 0) has label='7';",
        ),
    ],
)
def test_what_is_wrong_with_extra_rows(tmp_path, name, content, said):
    write_labels(tmp_path, "train", 0, 1)
    if content is not None:
        write(tmp_path, content, name)
    message = complaint(settings(tmp_path, extra_file=str(tmp_path / name)))
    assert message.startswith(f"data.extra_file={str(tmp_path / name)!r}: ")
    assert said in message and "data.path" not in message


def test_training_is_blamed_for_its_own_rows(tmp_path):
    write_labels(tmp_path, "train", 0, 7)
    write(tmp_path, "sentence,label\nx,1\n", "more.csv")
    message = complaint(settings(tmp_path, extra_file=str(tmp_path / "more.csv")))
    assert message.startswith("data.path=") and "train.parquet, row 1 " in message


# What a user does wrong


def test_an_unknown_task_is_not_looked_for():
    assert complaint(config.Data(task="sst3")).startswith("data.task='sst3'")


def test_folder_without_the_file(tmp_path):
    write(tmp_path, "", "training.csv")
    message = complaint(settings(tmp_path))
    assert message.startswith("data.path=")
    assert "train.parquet" in message and "training.csv" in message


def test_folder_with_two_files_of_a_split(tmp_path):
    write(tmp_path, "sentence,label\nx,1\n")
    write(tmp_path, "sentence\tlabel\nx\t1\n", "train.tsv")
    message = complaint(settings(tmp_path))
    assert "2 found" in message and "train.csv, train.tsv" in message


@pytest.mark.parametrize("path", ["./x", "/no/such/folder", "~/x", "a/b/c", "x/"])
def test_no_such_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = complaint(settings(path))
    assert message.startswith(f"data.path={path!r}")
    assert "--config.data.path=" in message


def test_own_rows_have_no_hub_of_their_own():
    message = complaint(own(""))
    assert message.startswith("data.path=''") and "--config.data.path=" in message


def test_a_file_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, "sentence,label\nx,1\n"))
    assert "neither a folder" in complaint(settings("train.csv"))


@pytest.mark.parametrize("path", ["", "some-one/glue"])
def test_hub_out_of_reach(monkeypatch, path):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", load_dataset)
    message = complaint(config.Data(path=path))
    assert message.startswith(f"data.path={path!r}")
    assert "Couldn't reach the Hub at all" in message and "sst2" in message
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
    assert f"column '{column}'" in message
    assert message.endswith("it has " + ", ".join(columns))
    # As much is asked of validation, and of the columns that a config names.
    (tmp_path / "train.parquet").rename(tmp_path / "validation.parquet")
    write_labels(tmp_path, "train", 0, 1)
    message = complaint(own(tmp_path), "train", "validation")
    assert "validation.parquet" in message and f"column '{column}'" in message


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_empty_split(tmp_path, name):
    write(tmp_path, "sentence,label\n" if name.endswith("csv") else "", name)
    assert "has no rows" in complaint(settings(tmp_path))


def test_missing_text(tmp_path):
    write_parquet(tmp_path, sentence=["x", "", None], label=[1, 1, 0])
    assert "row 2 (the first is 0) has no text" in complaint(settings(tmp_path))
    (tmp_path / "train.parquet").unlink()
    write(tmp_path, "sentence,label\nx,1\n,0\n")
    assert "row 1 (the first is 0) has no text" in complaint(settings(tmp_path))


def test_text_of_another_type(tmp_path):
    write_parquet(tmp_path, sentence=[["x"]], label=[1])
    assert "must be text" in complaint(settings(tmp_path))
