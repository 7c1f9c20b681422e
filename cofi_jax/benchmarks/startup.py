"""How long a start takes: from the process to the end of the first pruning step.

`train.py` itself runs, in fresh processes in turn: cold, in a new folder, then warm, in
the folder that the cold start left: the same run, killed after its first step. It has a
teacher and no pre-pruning. A stopwatch sees what it calls; every instant goes to the
innermost of the spans around it, so that they sum up to the whole.
"""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from cofi_jax.checkpoints import saved_model
from cofi_jax.errors import UserError, reject
from cofi_jax.evaluation import timing
from cofi_jax.evaluation.timing import Timing
from cofi_jax.models.config import EncoderConfig
from cofi_jax.task.names import Task

_ROOT = pathlib.Path(__file__).parents[2]


_KINDS = ("cold", "warm")


# Functions that train.py calls, and what their time is called.
_PHASES = (
    ("data.sources", "load", "rows"),
    ("task.names", "Task.tokenise", "tokenise"),
    ("run.setup", "load_teacher", "load the teacher"),
    ("run.stages", "Run.scores", "score the teacher"),
    ("checkpoints.saved_model", "save_model", "save the teacher"),
    ("training.step", "create_state", "make the state"),
)


_EVENTS = {  # as jax reports them, when they are over
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "read the cache",
}


Span = tuple[str, float, float]  # name, start, end


def measure(
    config: EncoderConfig,
    params: dict,
    tokenizer: Any,
    task: Task,
    *,
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    """Starts `train.py` cold and warm in turn.

    Args:
      config: sizes of the teacher.
      params: its parameters.
      tokenizer: its tokenizer.
      task: where the rows come from; the task demo needs no path.
      batch_size: of the first step.
      repeats: starts of each kind.

    Returns:
      `starts`, in their order, with `kind`, `seconds` and `parts` (seconds by name);
      the medians of these, `seconds` and `parts`, by kind; `warm_is_faster`, times, and
      `warm_is_faster_spread`.

    Raises:
      UserError: where there is no `train.py`, or it ends before the first step.
    """
    if not (_ROOT / "train.py").is_file():
        legal = "must be a checkout, with the train.py that is started"
        raise reject("startup", str(_ROOT), legal)
    recipe = "demo.py" if task.name == "demo" else f"paper.py:{task.name},0.95"
    starts = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        about = {"task": task.name, "labels": list(task.labels)}
        saved_model.save_model(
            folder / "teacher",
            params,
            config,
            tokenizer=tokenizer,
            about=about | {"data": {"task": task.name, "path": task.path}},
        )
        arguments = [
            f"--config={_ROOT / 'configs' / recipe}",
            f"--config.teacher.path={folder / 'teacher'}",
            f"--config.data.path={task.path}",
            f"--config.data.max_length={task.max_length}",
            f"--config.model.dtype={config.dtype}",
            f"--config.prune.batch_size={batch_size}",
            "--config.prune.prepruning_epochs=0",
        ]
        for turn in range(repeats):
            for kind in _KINDS:
                workdir = f"--workdir={folder / f'run-{turn}'}"
                seconds, parts = _start([*arguments, workdir])
                starts.append({"kind": kind, "seconds": seconds, "parts": parts})
    return {"repeats": repeats, "starts": starts} | summary(starts)


def summary(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by kind, and how much sooner the warm starts were, turn by turn."""
    found = {"seconds": {}, "parts": {}}
    turns = {}
    for kind in _KINDS:
        mine = [start for start in starts if start["kind"] == kind]
        turns[kind] = Timing(tuple((1e3 * start["seconds"],) for start in mine))
        found["seconds"][kind] = float(np.median([s["seconds"] for s in mine]))
        names = dict.fromkeys(name for start in starts for name in start["parts"])
        found["parts"][kind] = {
            name: float(np.median([start["parts"].get(name, 0.0) for start in mine]))
            for name in names
        }
    ratio, spread = timing.speedup(turns["cold"], turns["warm"])
    return found | {"warm_is_faster": ratio, "warm_is_faster_spread": list(spread)}


def _start(arguments):
    command = "from cofi_jax.benchmarks import startup; startup.first_step()"
    # Programs are kept where train.py keeps them: in the run's folder.
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
    )
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
    training = importlib.import_module("cofi_jax.training.step")
    make_step = training.make_step

    def make_first(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def first(*args, **kwargs):
            timed(lambda: jax.block_until_ready(step(*args, **kwargs)), "step")()
            print("\n" + json.dumps({"spans": spans}), end="", flush=True)
            os._exit(0)  # nothing of what follows is wanted

        return first

    training.make_step = make_first
    validation = importlib.import_module("cofi_jax.run.run").config_lib
    validate = validation.validate

    def begin(*args):  # the first that train.py does
        spans.append(("imports", 0.0, time.monotonic()))
        return validate(*args)

    validation.validate = begin
    sys.argv = [str(_ROOT / "train.py"), *sys.argv[1:]]
    runpy.run_path(str(_ROOT / "train.py"), run_name="__main__")


def table(result: dict[str, Any]) -> str:
    """The result of `measure` for people."""
    lines = [f"{'seconds':20}{'cold':>9}{'warm':>9}"]
    rows = {"whole": result["seconds"]} | {
        name: {kind: result["parts"][kind][name] for kind in _KINDS}
        for name in result["parts"]["cold"]
    }
    for name, row in rows.items():
        lines.append(f"{name:20}{row['cold']:9.2f}{row['warm']:9.2f}")
    low, high = result["warm_is_faster_spread"]
    times = f"{result['warm_is_faster']:.2f} times ({low:.2f} to {high:.2f})"
    return "\n".join([*lines, "", f"the warm start is {times} as fast"])
