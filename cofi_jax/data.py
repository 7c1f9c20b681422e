"""From a task's name to padded batches: table, rows, token ids, epoch plan, batch.

    load_rows -> load_examples -> epoch_plan(seed, epoch) -> make_batch

An epoch is a pure function of (seed, epoch), so resuming is recomputing. Batches are
padded to one of a few bucket lengths, so that a step is compiled a few times only. A
new task is one more row of `TASKS`.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cofi_jax import config, grammar

if TYPE_CHECKING:  # slow to import: a wrong flag should fail before that
    import datasets
    import pyarrow

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl")


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the task table."""

    columns: tuple[str, ...]  # of text: one sentence, or a pair
    labels: tuple[str, ...]  # the name of label 0, 1, ...
    metric: str  # a key of metrics.METRICS
    label_column: str = "label"


TASKS = {
    "demo": Task(("sentence",), ("blame", "praise"), "accuracy"),
    "sst2": Task(("sentence",), ("negative", "positive"), "accuracy"),
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), "matthews"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised rows, not yet padded."""

    input_ids: list[np.ndarray]  # N int32 arrays
    token_type_ids: list[np.ndarray]  # of the same lengths
    labels: np.ndarray  # (N,) int32
    pad_id: int = 0

    def __len__(self) -> int:  # noqa: D105
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row."""
        return np.array([len(ids) for ids in self.input_ids], np.int32)

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at `rows`, in that order."""
        return dataclasses.replace(
            self,
            input_ids=[self.input_ids[row] for row in rows],
            token_type_ids=[self.token_type_ids[row] for row in rows],
            labels=self.labels[rows],
        )


def load_rows(data: config.Data, split: str) -> "datasets.Dataset":
    """Reads the split "train" or "validation" of the task and checks every row.

    The demo task is generated. A folder is searched, and its subfolder of the task's
    name, for `{split}.parquet`, `.csv`, `.tsv` (not quoted, as GLUE's own), `.json` (a
    list, or one object a line) or `.jsonl`. Any other path is a name on the hub.
    Raises a UserError for all that can be wrong with these.
    """
    if data.task not in TASKS:
        raise config.reject("data.task", data.task, f"must be one of {[*TASKS]}")
    import datasets

    source = split
    if data.task == "demo":
        rows = datasets.Dataset.from_dict(grammar.demo_rows(split))
    elif pathlib.Path(data.path or "?").expanduser().is_dir():
        source = _find_file(data, split)
        rows = datasets.Dataset(_read_file(data, source))
    else:
        rows = _load_from_hub(data, split)
    _check_rows(data, rows, source)
    return rows


def _find_file(data: config.Data, split: str) -> pathlib.Path:
    top = pathlib.Path(data.path).expanduser()
    folders = [folder for folder in (top, top / data.task) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    names = [f"{split}.{suffix}" for suffix in FORMATS]
    found = [file for file in files if file.name in names]
    if len(found) == 1:
        return found[0]
    here = ", ".join(str(file.relative_to(top)) for file in (found or files)[:20])
    legal = f"must hold one of {names}, itself or in its folder {data.task}"
    raise _bad_path(data, f"{legal}; {len(found)} found, among: {here or 'no files'}")


def _read_file(data: config.Data, file: pathlib.Path) -> "pyarrow.Table":
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if file.suffix == ".parquet":
            return parquet.read_table(file, partitioning=None)  # a=b/ adds no column
        if file.suffix in (".csv", ".tsv"):
            parse = csv.ParseOptions(newlines_in_values=True)
            if file.suffix == ".tsv":
                parse = csv.ParseOptions(delimiter="\t", quote_char=False)
            # An empty cell is missing; the word NA, or a number, is text.
            convert = csv.ConvertOptions(
                column_types=dict.fromkeys(TASKS[data.task].columns, pyarrow.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            )
            return csv.read_csv(file, parse_options=parse, convert_options=convert)
        # Not pyarrow's reader, which turns texts that look like dates into dates.
        text = file.read_text(encoding="utf-8-sig").strip()
        if not text.startswith("["):  # one object a line
            text = "[" + ",".join(filter(str.strip, text.split("\n"))) + "]"
        return pyarrow.Table.from_pylist(json.loads(text))
    except Exception as error:  # each parser has its own ways to refuse a file
        problem = f"cannot read {file} ({type(error).__name__}: {error})"
        raise _bad_path(data, problem) from error


def _load_from_hub(data: config.Data, split: str) -> "datasets.Dataset":
    import datasets

    instead = "give a local folder with train.parquet and validation.parquet: "
    instead += "--config.data.path=path/to/folder (train.py), --data (eval.py)"
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data.path)
    if not hub_name or pathlib.Path(data.path).exists():
        raise _bad_path(data, f"is neither a folder nor a hub name; {instead}")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(data.path, data.task, split=split)
    except Exception as error:  # no network, no such name, no such split, a bad cache
        problem = f"no such folder, and the hub gave no {split} rows of {data.task}"
        problem += f" ({type(error).__name__}: {error}); {instead}"
        raise _bad_path(data, problem) from error


def _check_rows(data: config.Data, rows: "datasets.Dataset", source: Any) -> None:
    task = TASKS[data.task]
    if not len(rows):
        raise _bad_path(data, f"{source} has no rows; at least 1 is needed")
    for column in (*task.columns, task.label_column):
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise _bad_path(data, f"{source} needs a column {column!r}; it has {there}")
    for column in task.columns:
        texts = rows.data.column(column)
        if texts.null_count:
            where = f"{source}, row {np.argmax(texts.is_null())} (the first is 0)"
            raise _bad_path(data, f"{where} has no text in {column!r}")
        if str(texts.type) not in ("string", "large_string"):
            raise _bad_path(data, f"{source}: {column!r} is {texts.type}, must be text")
    labels = rows.data.column(task.label_column)
    values, legal = labels.to_numpy(), np.arange(len(task.labels))
    numeric = values.dtype.kind in "iuf"  # missing ones are nan
    if not numeric:  # wrong as a whole; show the row that made the column text
        values, legal = values.astype(str), legal.astype(str)
    wrong = ~np.isin(values, legal)
    if wrong.any() or not numeric:
        row = int(np.argmax(wrong))
        problem = f"{source}, row {row} (the first is 0) has {task.label_column}="
        problem += f"{labels[row].as_py()!r}; must be an integer among "
        problem += f"{dict(enumerate(task.labels))} (hub test splits hold only -1)"
        raise _bad_path(data, problem)


def _bad_path(data: config.Data, problem: str) -> config.UserError:
    one_line = " ".join(problem.split())  # other people's errors may have several
    return config.reject("data.path", data.path, one_line)


def load_examples(data: config.Data, split: str, tokenizer: Any) -> Examples:
    """Loads a split and tokenises it, cutting rows at `data.max_length` tokens.

    `tokenizer` is one of Hugging Face's transformers. Raises as `load_rows` does.
    """
    rows = load_rows(data, split)
    task = TASKS[data.task]
    encoded = tokenizer(
        *(rows[column][:] for column in task.columns),
        truncation=True,
        max_length=data.max_length,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    return Examples(
        [np.array(ids, np.int32) for ids in encoded["input_ids"]],
        [np.array(ids, np.int32) for ids in encoded["token_type_ids"]],
        np.array(rows[task.label_column][:], np.int32),
        tokenizer.pad_token_id,
    )


def first_rows(examples: Examples, rows: int, *, field: str) -> Examples:
    """A fixed random choice of `rows` examples; all, in their order, when 0.

    Smaller choices are the beginnings of larger ones. `field` is where `rows` comes
    from, for the UserError when there are fewer.
    """
    if rows == 0:
        return examples
    if rows > len(examples):
        raise config.reject(field, rows, f"must be at most {len(examples)}, or 0: all")
    return examples.take(np.random.default_rng(0).permutation(len(examples))[:rows])


def bucket_lengths(data: config.Data) -> tuple[int, ...]:
    """The padded lengths in use: `data.buckets`, ending in `data.max_length`."""
    return (*(b for b in data.buckets if b < data.max_length), data.max_length)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """The length of every `epoch_plan`: batches, the short one included."""
    return -(-rows // batch_size)


def epoch_plan(
    lengths: np.ndarray,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    epoch: int,
) -> list[tuple[int, np.ndarray]]:
    """Decides which rows make up which batch; a pure function of its arguments.

    Each row goes to the smallest bucket that holds it, each bucket is cut into full
    batches, and what is left of it moves up to the next. So each row comes once, and
    only one batch may be short. No length may be above the last bucket.

    Returns:
      `steps_per_epoch(N, batch_size)` pairs (padded length, rows), in random order.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    bucket_of = np.searchsorted(buckets, lengths)[order]
    plan, rest = [], order[:0]
    for bucket in range(bucket_of.max() + 1):  # longer than all rows: never used
        rows = np.concatenate([rest, order[bucket_of == bucket]])
        full = len(rows) - len(rows) % batch_size
        plan += [(buckets[bucket], r) for r in rows[:full].reshape(-1, batch_size)]
        rest = rows[full:]
    if len(rest):
        plan.append((buckets[bucket], rest))
    return [plan[i] for i in rng.permutation(len(plan))]


def make_batch(
    examples: Examples, rows: np.ndarray, *, length: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Pads the examples at `rows` to one (B, T) batch.

    Fewer than B rows are filled up with copies of the first at weight 0 (not with
    blank rows: a softmax over nothing is nan). T is at least the longest row's length.

    Returns:
      `input_ids`, `attention_mask`, `token_type_ids` (B, T) int32, `labels` (B,)
      int32 and `weight` (B,) float32.
    """
    filled = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])
    ids = np.full((batch_size, length), examples.pad_id, np.int32)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for i, row in enumerate(filled):
        tokens = len(examples.input_ids[row])
        ids[i, :tokens] = examples.input_ids[row]
        mask[i, :tokens] = 1
        types[i, :tokens] = examples.token_type_ids[row]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "labels": examples.labels[filled],
        "weight": (np.arange(batch_size) < len(rows)).astype(np.float32),
    }


def eval_batches(
    examples: Examples, *, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (rows, batch) over all examples once, by rising length.

    `scores[rows] = logits[: len(rows)]` puts a batch's logits where they belong.
    """
    lengths = examples.lengths
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = buckets[np.searchsorted(buckets, lengths[rows[-1]])]
        yield rows, make_batch(examples, rows, length=length, batch_size=batch_size)
