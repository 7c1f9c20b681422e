"""Files that are replaced whole: a reader sees the old one or the new one."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Replaces the file at `path`, or leaves it as it was."""
    path = pathlib.Path(path)
    # Beside its destination, because a rename is atomic only in one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The ends of the paths, with as many parts as tell different paths apart."""
    parts = [pathlib.PurePath(path).parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
