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
from collections.abc import Sequence
from typing import Any

import numpy as np

from cofi_jax.errors import UserError, reject
from cofi_jax.evaluation import timing

_ROOT = pathlib.Path(__file__).parents[2]
_DEMO = (  # Its teacher learns for one step only.
    f"--config={_ROOT}/configs/demo.py",
    "--config.teacher.train_rows=64",
    "--config.teacher.epochs=1",
)
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
    flags: Sequence[str], repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Starts `train.py` cold and warm in turn.

    Args:
      flags: those of `train.py` but for the workdir; () for the demo. The pruning has
        no epochs beforehand, and every step is logged.
      repeats: the starts of each kind.

    Returns:
      How many times as fast the warm start is, turn by turn, and the seconds of the
      `whole` start and of each part that jax.monitoring reports.

    Raises:
      UserError: where there is no `train.py`, or it ends before the first step.
    """
    if not (_ROOT / "train.py").is_file():
        legal = "must be a checkout, with the train.py that is started"
        raise reject("startup", str(_ROOT), legal)
    flags = flags or _DEMO
    colds, warms = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for found in (colds, warms):
                found.append(_start(flags, pathlib.Path(folder, f"run-{turn}")))
    ratios = [c["whole"] / w["whole"] for c, w in zip(colds, warms, strict=True)]
    return {"warm_is_faster": _spread(ratios)}, [
        {
            "seconds": part,
            "cold": _spread([each[part] for each in colds]),
            "warm": _spread([each[part] for each in warms]),
        }
        for part in colds[0]
    ]


def _spread(values):
    return np.percentile(values, timing.SPREAD).tolist()


def _start(flags, workdir):
    """Starts `train.py`; returns the seconds to its first step, whole and by part."""
    log, spans = workdir / "metrics.jsonl", workdir.with_suffix(".spans")
    log.unlink(missing_ok=True)  # The start before has logged such a step already.
    # Compiled programs are kept where train.py keeps them, in the run's folder.
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", _PROGRAM, str(spans), str(_ROOT / "train.py")]
    command += [*flags, f"--workdir={workdir}", "--config.log_every=1"]
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, "--config.prune.prepruning_epochs=0"],
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
