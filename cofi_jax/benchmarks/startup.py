"""The time from the start of `train.py` to the end of its first pruning step.

Every start is a process of its own, which is killed once it has logged that step. A
cold start begins in a new folder. The warm start after it is the same command again: it
finds the teacher that the cold one has saved and the programs that it has compiled.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from cofi_jax.benchmarks import text
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.checkpoints import saved_model
from cofi_jax.data.tasks import Task
from cofi_jax.errors import UserError, reject
from cofi_jax.evaluation import timing

_ROOT = pathlib.Path(__file__).parents[2]
_EVENTS = {  # of jax.monitoring
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile or read the cache",
    "/jax/compilation_cache/cache_retrieval_time_sec": "read the cache",
}
# Runs a script as the shell would, and writes down what jax.monitoring reports.
_PROGRAM = """
import runpy, sys, time, jax
spans = open(sys.argv[1], "w", buffering=1)
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: print(event, time.monotonic(), seconds, file=spans)
)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure(
    subject: Subject, task: Task, *, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Starts `train.py` cold and warm in turn.

    Args:
      subject: the dense model is the teacher; its tokenizer is needed, too.
      task: where the rows come from; the task demo needs no path.
      batch_size: the rows of the first step.
      repeats: the starts of each kind.

    Returns:
      `starts`: by kind (cold, warm), the seconds of each start by name: those of the
      `whole` and of what jax.monitoring reports. To that, what `summary` makes of it.

    Raises:
      UserError: where there is no `train.py`, or it ends before the first step.
    """
    if not (_ROOT / "train.py").is_file():
        legal = "must be a checkout, with the train.py that is started"
        raise reject("startup", str(_ROOT), legal)
    recipe = "demo.py" if task.name == "demo" else f"paper.py:{task.name},0.95"
    about = {"task": task.name, "labels": list(task.labels)}
    about["data"] = {"task": task.name, "path": task.path}
    starts = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        teacher = pathlib.Path(name, "teacher")
        model = subject.dense_params, subject.dense
        saved_model.save_model(
            teacher, *model, tokenizer=subject.tokenizer, about=about
        )
        arguments = [
            f"--config={_ROOT / 'configs' / recipe}",
            f"--config.teacher.path={teacher}",
            f"--config.data.path={task.path}",
            f"--config.data.max_length={task.max_length}",
            f"--config.model.dtype={subject.dense.dtype}",
            f"--config.prune.batch_size={batch_size}",
            "--config.prune.prepruning_epochs=0",
            "--config.log_every=1",
        ]
        for turn in range(repeats):
            for found in starts.values():
                found.append(_start(arguments, pathlib.Path(name, f"run-{turn}")))
    return {"starts": starts} | summary(starts)


def _start(arguments, workdir):
    """Starts `train.py`; returns the seconds to its first step, whole and by part."""
    log, spans = workdir / "metrics.jsonl", workdir.with_suffix(".spans")
    log.unlink(missing_ok=True)  # The start before has logged such a step already.
    # Compiled programs are kept where train.py keeps them, in the run's folder.
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", _PROGRAM, str(spans), str(_ROOT / "train.py")]
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, *arguments, f"--workdir={workdir}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            while not (log.exists() and '"stage": "prune"' in log.read_text()):
                if process.poll() is not None:
                    output.seek(0)
                    lines = output.read().strip().splitlines() or ["nothing"]
                    raise UserError(f"startup: train.py said {lines[-1]!r}")
                time.sleep(0.01)
            ended = time.monotonic()
        finally:
            process.kill()
            process.wait()
    found = {name: [] for name in _EVENTS.values()}
    for line in spans.read_text().splitlines():
        event, end, seconds = line.split()
        if event in _EVENTS and float(end) <= ended:
            found[_EVENTS[event]].append((float(end) - float(seconds), float(end)))
    return {"whole": ended - began} | {k: outermost(v) for k, v in found.items()}


def outermost(spans: list[tuple[float, float]]) -> float:
    """Sums up (start, end) spans, without those within another, to seconds."""
    seconds, reached = 0.0, 0.0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= reached:
            seconds, reached = seconds + end - start, end
    return seconds


def summary(starts: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Compares cold starts with warm ones, each the seconds by name.

    Returns:
      `seconds`: the medians by kind and name; and `warm_is_faster`, how many times as
      fast the whole warm start is, turn by turn, with `warm_is_faster_spread`.
    """
    whole = {k: tuple((1e3 * s["whole"],) for s in v) for k, v in starts.items()}
    ratio, spread = timing.speedup(*(timing.Timing(turns) for turns in whole.values()))
    seconds = {
        kind: {name: float(np.median([s[name] for s in each])) for name in each[0]}
        for kind, each in starts.items()
    }
    return {
        "seconds": seconds,
        "warm_is_faster": ratio,
        "warm_is_faster_spread": list(spread),
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as text for people."""
    cold, warm = result["seconds"].values()
    rows = [(name, f"{cold[name]:.2f}", f"{warm[name]:.2f}") for name in cold]
    ratio = text.times(result["warm_is_faster"], result["warm_is_faster_spread"])
    table = text.aligned([("seconds", "cold", "warm"), *rows])
    return f"{table}\n\nthe warm start is {ratio} as fast"
