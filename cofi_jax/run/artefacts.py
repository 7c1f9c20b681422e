"""What a run leaves in its folder, made anew wherever it came from something else.

`made_from.json` names for each artefact what it was made from, its own bytes, and the
seconds that it took to make:

    {"masks.npz": {"made_from": 1234, "bytes": 5678, "seconds": 0.5}, "teacher": ...}

So neither what is left of a stage that was learned anew, nor a file that was damaged or
exchanged, decides what a run ends with. Checkpoints name their own start.
"""

import json
import pathlib
import time
import zlib
from collections.abc import Callable

from cofi_jax import distributed, files
from cofi_jax.checkpoints import saved_model

_NAME = "made_from.json"


def settle(path: pathlib.Path, made_from: int, make: Callable[[], None]) -> float:
    """Makes the artefact at `path`, unless it is there whole and made from the same.

    All processes call this at the same time.

    Args:
      path: the file, or the folder of a saved model; an old one is removed.
      made_from: a digest of all that `make` depends on.
      make: writes the artefact, all at once; called in all processes.

    Returns:
      The seconds that `make` took, now or when the artefact was made; 0 if they are not
      known.
    """

    def entry():
        return {"made_from": made_from, "bytes": _bytes(path)}

    def known_seconds():
        """Those of the artefact that is there; None where there is no such one."""
        known = _read(path.parent).get(path.name, {})
        if path.exists() and known == known | entry():
            return known.get("seconds", 0.0)
        return None

    def record(seconds):
        new = {path.name: entry() | {"seconds": seconds}}
        files.write_json(path.parent / _NAME, _read(path.parent) | new)

    if (taken := distributed.on_process_zero(known_seconds)) is None:
        distributed.on_process_zero(lambda: files.remove(path))
        start = time.monotonic()
        make()
        taken = time.monotonic() - start
        distributed.on_process_zero(lambda: record(taken))
    return taken


def _read(workdir):
    try:
        known = json.loads((workdir / _NAME).read_text())
        return {name: dict(entry) for name, entry in known.items()}
    except (AttributeError, OSError, TypeError, ValueError):  # All is made anew.
        return {}


def _bytes(path):
    """The CRC-32 of a file, or of all that `save_model` wrote but for the card."""
    # What was exported later may stand beside it.
    parts = [path / name for name in saved_model.FILES] if path.is_dir() else [path]
    found = 0
    for file in (f for part in parts for f in (part, *sorted(part.rglob("*")))):
        if file.is_file():
            found = zlib.crc32(str(file.relative_to(path)).encode(), found)
            found = zlib.crc32(file.read_bytes(), found)
    return found
