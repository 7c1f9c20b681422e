"""Files and folders that appear whole: a reader sees the old one or the new one."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from cofi_jax.errors import warn


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


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError where `write_atomically` could not write the file at `path`."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # Permissions alone do not tell: a file system may be full or read-only.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """A block that no two processes are in at once, for the same folder.

    The second one says so and waits. Nothing is written for that.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warn(f"{folder} is in use; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # This ends the lock, too.


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, *, replace: bool = False
) -> Iterator[pathlib.Path]:
    """A hidden folder to fill, which is renamed to `path` if the block succeeds.

    `path` must not exist, or be an empty folder, unless it is to be replaced. What a
    killed process left of the hidden folder is removed.
    """
    path = pathlib.Path(path)
    partial, old = (path.with_name(f".{path.name}.{x}") for x in ("partial", "old"))
    if old.exists() and not path.exists():  # It was killed between two renames.
        old.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: str | os.PathLike) -> None:
    """Removes a file or a folder with all it holds, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        pathlib.Path(path).unlink(missing_ok=True)


# How files begin, in lower case, that often stand under the name of another kind.
_PAGE = "is a page of HTML, perhaps of a download that failed"
_BEGINNINGS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file: git lfs pull",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"\x1f\x8b\x08": "is compressed by gzip; unpack it",
    b"bzh91ay&sy": "is compressed by bzip2; unpack it",
    b"\xfd7zxz\0": "is compressed by xz; unpack it",
    b"(\xb5/\xfd": "is compressed by zstd; unpack it",
    b"pk\x03\x04": "is a zip archive, as workbooks are, too",
    b"par1\x15": "is a parquet file under another name",
}


def disguise(path: str | os.PathLike, own: bytes = b"") -> str:
    """Says what a file is that begins like one of the kinds listed above.

    The result is "" for all other files, and for a file that begins with `own` (in
    lower case), as it should.
    """
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if own and start.startswith(own):
        return ""
    return next((said for b, said in _BEGINNINGS.items() if start.startswith(b)), "")


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of the names and values of a JSON object.

    It is meant for `object_pairs_hook` of the parser.

    Raises:
      ValueError: where a name is there twice. Parsers differ in which one they take.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {twice!r} twice")
    return found


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The ends of the paths, with as many parts as tell different paths apart."""
    parts = [pathlib.PurePath(path).parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
