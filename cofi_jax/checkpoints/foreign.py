"""What a folder of somebody else may hold, checked in one place.

Its JSON is an object that is not nested deeper than any that a library writes, and its
numbers lie in a stated range. What is wrong is an UnsupportedCheckpoint of one line.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from cofi_jax import files

LARGEST = 2**31 - 1  # Sizes and ids are int32 in every format that a model takes.
_DEEPEST = 100  # levels; tokenizer.json, the deepest of all that we read, has 8


class UnsupportedCheckpoint(ValueError):
    """What is wrong with a folder, in one line."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    lines = [*filter(None, map(str.strip, said.splitlines()))]
    return lines[0].removesuffix(":")[:300] if lines else type(error).__name__


def is_there(path: Path) -> bool:
    """Whether there is a file, which must then hold something.

    Raises:
      UnsupportedCheckpoint: for an empty file, and for a link that leads nowhere.
    """
    if path.is_symlink() and not path.exists():
        raise UnsupportedCheckpoint(f"{path.name} is a link to a file that is gone")
    if path.is_file() and not path.stat().st_size:
        raise UnsupportedCheckpoint(f"{path.name} is empty")
    return path.is_file()


def check_kind(path: Path, own: bytes = b"") -> None:
    """Raises UnsupportedCheckpoint for a file that is something else, by `disguise`."""
    if said := files.disguise(path, own):
        raise UnsupportedCheckpoint(f"{path.name} {said}")


def read_text(path: Path) -> str:
    """The text of a file of UTF-8.

    Raises:
      UnsupportedCheckpoint: where there is no such file, it holds something else, or it
        begins with a byte order mark, which programs take as a letter of the text.
    """
    try:
        check_kind(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        legal = f"{path.name} cannot be read ({reason(error)})"
        raise UnsupportedCheckpoint(legal) from error
    if text.startswith("\ufeff"):
        legal = "begins with a byte order mark; must be UTF-8 without one"
        raise UnsupportedCheckpoint(f"{path.name} {legal}")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, where no object names a key twice.

    Raises:
      UnsupportedCheckpoint: where there is no such file, or it holds something else.
    """
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=files.unique)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        legal = f"{path.name} cannot be read ({reason(error)})"
        raise UnsupportedCheckpoint(legal) from error
    if not isinstance(found, dict):
        legal = f"{path.name} holds a {type(found).__name__}, must be an object"
        raise UnsupportedCheckpoint(legal)
    level = [found]
    for _ in range(_DEEPEST):
        level = [child for each in level for child in _children(each)]
    if level:
        raise _too_deep(path)
    return found


def _too_deep(path):
    return UnsupportedCheckpoint(f"{path.name} is nested deeper than {_DEEPEST} levels")


def _children(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def number(
    name: str,
    value: Any,
    *,
    least: float = 1,
    most: float = LARGEST,
    kind: type = int,
) -> Any:
    """The value, which is a number of that very type and in that range.

    Args:
      name: what the message calls it, with its file.
      value: anything that JSON can hold.
      least: the smallest legal value.
      most: the largest one.
      kind: int or float.

    Raises:
      UnsupportedCheckpoint: for anything else.
    """
    if type(value) is not kind or not least <= value <= most:
        legal = f"must be {'' if kind is int else 'a float, '}{least} to {most}"
        raise UnsupportedCheckpoint(f"{name} is {reprlib.repr(value)}, {legal}")
    return value
