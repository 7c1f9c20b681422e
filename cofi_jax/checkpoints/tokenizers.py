"""Tokenizers of Hugging Face folders: read, checked, and written for other programs.

transformers makes a tokenizer of nearly any folder. Where its class does not find the
files that it reads, the tokenizer is made up and knows no word, and nothing is said. So
each one is checked when it is loaded, against the weights, and on the texts at hand.
"""

import contextlib
import json
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import foreign
from cofi_jax.checkpoints.foreign import UnsupportedCheckpoint
from cofi_jax.data.batches import Examples
from cofi_jax.data.tasks import Task
from cofi_jax.errors import reject, warn
from cofi_jax.models.config import EncoderConfig

# Each of these makes a tokenizer.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json and merges.txt",
    "sentencepiece.bpe.model",
)
_JSON = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TEXT = ("vocab.txt", "merges.txt")
# The types of fields that transformers reads without a word on which field was wrong.
_SETTINGS = {
    "added_tokens_decoder": (dict,),
    "do_lower_case": (bool,),
    "max_len": (int, float),
    "model_input_names": (list,),
    "model_max_length": (int, float),
    "split_special_tokens": (bool,),
    "strip_accents": (bool,),
    "tokenize_chinese_chars": (bool,),
    "tokenizer_class": (str,),
}

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how a piece of a single byte is called

_MOST_UNKNOWN, _FEW_UNKNOWN = 0.5, 0.02  # shares that are refused and warned of
_HARD = ("A text, it's one.", "caf\u00e9 \u4e16\u754c  two  spaces", "long " * 600, "")


def load_tokenizer(folder: Path, field: str, path: str = "") -> Any:
    """The folder's tokenizer, which has read its vocabulary and takes texts and pairs.

    Args:
      folder: with the tokenizer's files.
      field: the config field that named it, for messages.
      path: what messages call the folder; "" for its own name.

    Raises:
      UserError: where there is none, or one that says nothing of texts.
    """
    try:
        _check_files(folder)
        tokenizer = _open(folder)
        _check_class(tokenizer, folder)
        _check_vocabulary(tokenizer, folder)
        _types_of_pairs(tokenizer)
    except UnsupportedCheckpoint as error:
        raise reject(field, path or str(folder), str(error)) from error
    return tokenizer


def _check_files(folder):
    """Refuses files that transformers would read wrongly, or fail at in its own way."""
    for name in _JSON:
        if foreign.is_there(folder / name):
            content = foreign.read_json(folder / name)
            for token, row in _ids(name, content):
                foreign.number(f"{name}: the id of {ascii(token)}", row, least=0)
    for name in _TEXT:
        if foreign.is_there(folder / name):
            foreign.read_text(folder / name)
    settings = _read(folder / "tokenizer_config.json")
    for name, kinds in _SETTINGS.items():
        value = settings.get(name)
        if value is not None and type(value) not in kinds:
            legal = f"must be of type {' or '.join(kind.__name__ for kind in kinds)}"
            said = f"{name} is {reprlib.repr(value)}, {legal}"
            raise UnsupportedCheckpoint(f"tokenizer_config.json: {said}")
    sets = [names.split(" and ") for names in _VOCABULARIES]
    there = [all([foreign.is_there(folder / name) for name in names]) for names in sets]
    if not any(there):
        legal = f"must hold {' or '.join(_VOCABULARIES)}"
        raise UnsupportedCheckpoint(f"has no tokenizer; {legal}")


def _ids(name, content):
    """Pairs of a token and the id that a JSON file gives it."""
    if name in ("added_tokens.json", "vocab.json"):
        yield from content.items()
    if name == "tokenizer.json":
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from vocabulary.items()
        for token in content.get("added_tokens") or ():
            if isinstance(token, dict):
                yield token.get("content"), token.get("id")
    if name == "tokenizer_config.json":
        table = content.get("added_tokens_decoder")
        for row, token in table.items() if isinstance(table, dict) else ():
            # Python makes no integer of thousands of digits.
            yield token, int(row) if row.isdecimal() and len(row) < 20 else row


def _open(folder):
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    options, model = {}, _read(folder / "config.json")
    said = model | _read(folder / "tokenizer_config.json")
    if model and not {"model_type", "tokenizer_class"} & set(said):
        options["tokenizer_type"] = "bert"  # as Google's own folders are
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, **options
            )
    except Exception as error:  # the tokenizers library raises plain Exception
        said = foreign.reason(error).replace(str(folder), "the folder")
        raise UnsupportedCheckpoint(f"its tokenizer cannot be read ({said})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        legal = f"its tokenizer_class {type(tokenizer).__name__} is no tokenizer"
        raise UnsupportedCheckpoint(legal)
    return tokenizer


def _read(path):
    return foreign.read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers logs nothing: an error says what was wrong."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_class(tokenizer, folder):
    """Refuses a class that reads none of the vocabulary's files in the folder."""
    kind = type(tokenizer)
    settings = ("tokenizer_config_file", "special_tokens_map_file")
    reads = {k: v for k, v in kind.vocab_files_names.items() if k not in settings}
    whole = reads.pop("tokenizer_file", None) if tokenizer.is_fast else None
    if whole and (folder / whole).is_file():
        return
    vocabulary = reads.get("vocab_file")
    if not vocabulary or not (folder / vocabulary).is_file():
        there = [names for names in _VOCABULARIES if (folder / names).is_file()]
        wanted = f"{kind.__name__} reads {' and '.join(reads.values())}"
        legal = f"its tokenizer_class {wanted}; the folder holds {' and '.join(there)}"
        raise UnsupportedCheckpoint(legal)


def _check_vocabulary(tokenizer, folder):
    """Refuses a vocabulary that is made up in part, or that no text leads to."""
    if tokenizer.pad_token_id is None:
        raise UnsupportedCheckpoint("its tokenizer has no padding token")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UnsupportedCheckpoint("its tokenizer knows special tokens alone")
    if not tokenizer.is_fast:
        return
    known = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    known |= _added(folder)
    for kind in ("pad_token", "cls_token", "sep_token", "unk_token"):
        token = getattr(tokenizer, kind)
        if token is not None and token not in known:
            legal = f"lacks {ascii(token)}, its {kind}; such tokens were never trained"
            raise UnsupportedCheckpoint(f"its vocabulary {legal}")
    _check_merges(tokenizer)


def _added(folder):
    """The tokens that files of the folder add to the vocabulary."""
    added = set(_read(folder / "added_tokens.json"))
    tables = (
        _read(folder / "tokenizer.json").get("added_tokens") or (),
        (_read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}),
    )
    for table in tables:
        for token in table.values() if isinstance(table, dict) else table:
            added.add(token.get("content") if isinstance(token, dict) else token)
    return added


def _check_merges(tokenizer):
    """Refuses a vocabulary of pieces most of which no merge makes: those are lost."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ != "BPE":
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("ignore_merges"):
        return
    made = {piece for _, piece in merges(model)}
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    pieces = [x for x in model["vocab"] if not is_single(x, model) and x not in special]
    lost = [piece for piece in pieces if piece not in made]
    if len(lost) > _MOST_UNKNOWN * max(len(pieces), 1):
        legal = f"{len(lost)} of the {len(pieces)} pieces of its vocabulary"
        raise UnsupportedCheckpoint(f"has no merges that make {legal}")


def is_single(piece: str, model: Mapping[str, Any]) -> bool:
    """Whether a piece is a single character, or a byte for want of characters.

    `model` is the one of a `tokenizer.json`.
    """
    piece = piece.removeprefix(model.get("continuing_subword_prefix") or "")
    piece = piece.removesuffix(model.get("end_of_word_suffix") or "")
    byte = model.get("byte_fallback") and _BYTE.fullmatch(piece)
    return len(piece) <= 1 or bool(byte)


def merges(model: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields the two parts of each merge of a BPE, and the piece that it makes.

    `model` is the one of a `tokenizer.json`.
    """
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield (left, right), left + right.removeprefix(prefix)


def _types_of_pairs(tokenizer) -> list[int]:
    """The token types of a pair of texts, which the tokenizer must take, as a text."""
    try:
        for texts in (["a text"], ["a text", "another"]):
            options = {"return_token_type_ids": True, "verbose": False}
            found = tokenizer(*texts, **options)
            rows = found["input_ids"], found["token_type_ids"]
            if not all(type(x) is int for row in rows for x in row):
                raise TypeError("its rows are no lists of numbers")
    except Exception as error:  # Tables, boxes or sounds are asked for in many ways.
        said = f"is not one of texts ({foreign.reason(error)})"
        kind = type(tokenizer).__name__
        raise UnsupportedCheckpoint(f"its tokenizer_class {kind} {said}") from error
    return rows[1]


def check_tokenizer(
    tokenizer: Any, sizes: EncoderConfig, *, field: str, path: str
) -> None:
    """Raises UserError where the tokenizer has ids or types that the model has not."""
    token, row = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if row >= sizes.vocab_size:
        legal = f"its tokenizer gives {ascii(token)} the id {row}, but its weights "
        raise reject(field, path, f"{legal}have {sizes.vocab_size} rows")
    most = max(_types_of_pairs(tokenizer))
    # A model of one type is given none, whatever the tokenizer says.
    if most >= sizes.type_vocab_size > 1:
        legal = f"its tokenizer gives the token type {most}, its weights have "
        raise reject(field, path, f"{legal}{sizes.type_vocab_size}")


def check_texts(
    tokenizer: Any,
    examples: Examples,
    columns: Mapping[str, Sequence[str]],
    task: Task,
    *,
    field: str,
    path: str,
    refuse: bool = True,
) -> None:
    """Refuses a tokenizer that knows little of the rows; warns where it lacks some.

    Counted are the pieces of the rows that are unknown, and the rows without a single
    real piece, which is one that is neither special nor unknown.

    Args:
      tokenizer: the one that made the rows.
      examples: the rows.
      columns: the texts that they were made of.
      task: the task, whose columns these are.
      field: the config field that named the tokenizer's folder.
      path: the folder.
      refuse: whether so many are an error; else they are warned of, and few are not.

    Raises:
      UserError: where one of the shares is above a half.
    """
    ids = np.concatenate(examples.input_ids)
    rows = np.repeat(np.arange(len(examples)), examples.lengths)
    unknown = ids == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)
    real = ~unknown & ~np.isin(ids, tokenizer.all_special_ids)
    empty = np.bincount(rows[real], minlength=len(examples)) == 0
    pieces = max(unknown.sum() + real.sum(), 1)
    for share, some, what in (
        (unknown.sum() / pieces, rows[unknown], "pieces of the texts are unknown to"),
        (empty.mean(), np.flatnonzero(empty), "texts have no piece that is known to"),
    ):
        if share <= (_FEW_UNKNOWN if refuse else _MOST_UNKNOWN):
            continue
        texts, row = columns[task.columns[0]], some[0]
        if examples.uncut:  # A row is a window of one of these texts.
            texts, row = examples.uncut.contexts, examples.uncut.of_row[row]
        example = ascii(texts[row][:60])
        said = f"{share:.1%} of the {what} its tokenizer, as in {example}"
        if share > _MOST_UNKNOWN and refuse:
            legal = f"{said}; are its files those of {type(tokenizer).__name__}?"
            raise reject(field, path, legal)
        warn(f"{path}: {said}")


def check_writable(
    tokenizer: Any, config: EncoderConfig, *, field: str, path: str
) -> None:
    """Raises UserError where no export could hold the tokenizer, before it is used."""
    with tempfile.TemporaryDirectory() as folder:
        write(tokenizer, Path(folder), config, field=field, path=path)


def write(
    tokenizer: Any,
    folder: Path,
    config: EncoderConfig,
    *,
    max_length: int = 0,
    field: str = "tokenizer",
    path: str = "",
) -> None:
    """Writes a tokenizer with all that transformers 4 and 5 would guess differently.

    One that is written in Python is read by its own class, any other one by none.

    Args:
      tokenizer: the tokenizer.
      folder: an existing folder.
      config: the sizes of the model that it is for.
      max_length: the tokens that texts are cut at; 0 for the model's longest input.
      field: what messages call the tokenizer's folder.
      path: its path, for them.

    Raises:
      UserError: where what is written gives other ids, or cannot be read again.
    """
    with tempfile.TemporaryDirectory() as scratch:  # There is no code to trust there.
        scratch = Path(scratch)
        if tokenizer.is_fast:  # What a call has set would be written too.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(scratch)
        settings = scratch / "tokenizer_config.json"
        fields = json.loads(settings.read_text())
        # transformers 4 has this list under its old name alone.
        if isinstance(fields.get("extra_special_tokens"), list):
            extra = fields.pop("extra_special_tokens")
            fields["additional_special_tokens"] = extra
        fields |= {
            "model_input_names": _inputs(config),
            "model_max_length": min(max_length or config.longest, config.longest),
            "padding_side": "right",  # The exported positions count from the left.
        }
        if tokenizer.is_fast:
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        files.write_json(settings, fields)
        found = load_tokenizer(scratch, field, path)
        for pair in ((_HARD,), (_HARD, _HARD[::-1])):
            texts = [list(each) for each in pair]
            ours, theirs = (x(*texts, verbose=False) for x in (found, tokenizer))
            if ours["input_ids"] != theirs["input_ids"]:
                legal = "gives other ids once it is written for other programs"
                raise reject(field, path, f"its {type(tokenizer).__name__} {legal}")
        shutil.copytree(scratch, folder, dirs_exist_ok=True)


def _inputs(config):
    """The inputs that a model of these sizes reads, by transformers' names."""
    types = ["token_type_ids"] * (config.type_vocab_size > 1)
    return ["input_ids", *types, "attention_mask"]
