"""How long a start takes: from the process to the end of the first pruning step.

`train.py` itself runs, in fresh processes in turn: cold, with an empty compilation
cache, then warm, with the one that the cold start left. A stopwatch sees what it calls;
every instant goes to the innermost of the spans around it, so that they sum up to
the whole.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from cofi_jax.config import UserError, reject

_TRAIN = pathlib.Path(__file__).parents[1] / "train.py"

# Functions that train.py calls, and what their time is called.
_PHASES = (
    ("rows", "load", "rows"),
    ("data", "tokenise", "tokenise"),
    ("inputs", "load_teacher", "load model"),
    ("stages", "Run.scores", "score teacher"),
    ("checkpoint", "save_model", "save teacher"),
    ("training", "create_state", "state"),
)
_EVENTS = {  # as jax reports them, when they are over
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "read cache",
}
Span = tuple[str, float, float]  # name, start, end


def measure(arguments: list[str], *, repeats: int) -> dict[str, Any]:
    """Starts `train.py` cold and warm in turn.

    Args:
      arguments: of its command line, without `--workdir`; there must be a teacher.
      repeats: starts of each kind.

    Returns:
      `starts`, and of each `kind`, `seconds` and its `parts` by name, in seconds.

    Raises:
      UserError: where there is no `train.py`, or it ends before the first step.
    """
    if not _TRAIN.is_file():
        raise reject("startup", str(_TRAIN), "needs a checkout with its train.py")
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            cache = pathlib.Path(folder, f"cache-{turn}")
            for kind in ("cold", "warm"):
                workdir = pathlib.Path(folder, f"{kind}-{turn}")
                seconds, parts = _start([*arguments, f"--workdir={workdir}"], cache)
                starts.append({"kind": kind, "seconds": seconds, "parts": parts})
    return {"starts": starts}


def _start(arguments, cache):
    command = "from cofi_jax import startup; startup.first_step()"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(_TRAIN.parent), os.environ.get("PYTHONPATH")))
        ),
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    line = done.stdout.rpartition("\n")[2]
    if done.returncode or not line.startswith("{"):
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise UserError(f"startup: train.py said {said[-1]!r}")
    spans = [
        (name, max(start, began), end) for name, start, end in json.loads(line)["spans"]
    ]
    end = max(end for *_, end in spans)
    return end - began, partition([("other", began, end), *spans])


def partition(spans: list[Span]) -> dict[str, float]:
    """Seconds by name: every instant belongs to the span that started last."""
    edges = sorted({edge for _, *both in spans for edge in both})
    found = dict.fromkeys((name for name, *_ in spans), 0.0)
    for left, right in zip(edges, edges[1:], strict=False):
        around = [s for s in spans if s[1] <= left and right <= s[2]]
        if around:
            innermost = max(enumerate(around), key=lambda it: (it[1][1], it[0]))[1]
            found[innermost[0]] += right - left
    return found


def first_step() -> None:
    """What the started process does: `train.py`, up to its first step."""
    import importlib
    import runpy

    import jax

    spans: list[Span] = []

    def timed(call, name):
        def wrapped(*args, **kwargs):
            start = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                spans.append((name, start, time.monotonic()))

        return wrapped

    def ended(event, seconds, **_):
        if event in _EVENTS:
            now = time.monotonic()
            spans.append((_EVENTS[event], now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(ended)
    for module, path, name in _PHASES:
        holder = importlib.import_module(f"cofi_jax.{module}")
        *outer, function = path.split(".")
        for attribute in outer:
            holder = getattr(holder, attribute)
        setattr(holder, function, timed(getattr(holder, function), name))
    training = importlib.import_module("cofi_jax.training")
    make_step = training.make_step

    def make_first(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def first(*args, **kwargs):
            timed(lambda: jax.block_until_ready(step(*args, **kwargs)), "step")()
            print("\n" + json.dumps({"spans": spans}), end="", flush=True)
            os._exit(0)  # nothing of what follows is wanted

        return first

    training.make_step = make_first
    config = importlib.import_module("cofi_jax.config")
    validate = config.validate

    def begin(*args):  # the first that train.py does
        spans.append(("imports", 0.0, time.monotonic()))
        return validate(*args)

    config.validate = begin
    sys.argv = [str(_TRAIN), *sys.argv[1:]]
    runpy.run_path(str(_TRAIN), run_name="__main__")
