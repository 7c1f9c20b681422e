"""How much memory a training step takes: masked, plain and PyTorch's.

Each has fresh processes of its own. On a GPU the allocator tells what it gave out at
most. On a CPU it is the resident set, above that of the process that has imported
everything: before the first step, and at its highest during three of them.
"""

import argparse
import ctypes
import gc
import json
import pathlib
import re
import resource
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from cofi_jax.benchmarks import baselines, workload
from cofi_jax.benchmarks import step as step_lib
from cofi_jax.config import Distill
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.training import teacher as teacher_lib

KINDS = ("masked", "plain", "pytorch")


_STEPS = 3  # PyTorch's optimizer makes its state in the first one


def measure(
    settings: dict[str, Any], *, length: int, kinds: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    """Runs steps on batches padded to `length`, each in a process of its own.

    Args:
      settings: the options that `workload.training_work` reads, JSON-able.
      length: tokens of each row.
      kinds: among `KINDS`.
      repeats: processes of each.

    Returns:
      `seq_length`, `repeats` and `contestants`, of each the medians of
        `before_bytes`  in use before the first step: models and, but for PyTorch's,
                        the optimizer's state
        `peak_bytes`    at most, with those
        `peaks`         of all processes, likewise
        `compiled_bytes`  ours alone: what the compiler says of the step, as
                        `arguments`, `outputs`, `shared` by both, and `temporary`

    Raises:
      UserError: where a process fails, for lack of memory say.
    """
    found = {kind: [] for kind in kinds}
    told = settings | {"data": "", "seq_length": length}
    for _ in range(repeats):
        for kind in kinds:
            found[kind].append(_in_a_process(kind, told))
    contestants = {
        kind: {
            name: float(np.median([run[name] for run in runs]))
            for name in ("before_bytes", "peak_bytes")
        }
        | {"peaks": [run["peak_bytes"] for run in runs]}
        | {k: v for k, v in runs[0].items() if k == "compiled_bytes"}
        for kind, runs in found.items()
    }
    return {"seq_length": length, "repeats": repeats, "contestants": contestants}


def _in_a_process(kind, settings):
    command = "from cofi_jax.benchmarks import memory; memory.run()"
    done = subprocess.run(
        [sys.executable, "-c", command, kind, json.dumps(settings)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    line = done.stdout.rpartition("\n")[2]
    if done.returncode or not line.startswith("{"):
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"memory: the process of {kind} said {said[-1]!r}")
    return json.loads(line)


def run() -> None:
    """What the started process does: a few steps of one kind; prints the figures."""
    kind, settings = sys.argv[1:]
    options = argparse.Namespace(**json.loads(settings))
    if kind == "pytorch":
        baselines.prepare()  # before anything is counted
    jax.devices()
    nothing = _in_use(kind)
    subject, examples, plan = workload.training_work(options, batches=1)
    batch = step_lib.batches(examples, plan)[0]
    if kind == "pytorch":
        dtype = options.torch_dtype or options.dtype
        step = step_lib.pytorch(subject, Distill(), dtype, compiled=False)
        batch, result = baselines.tensors(batch), {}
        del subject
        before = _in_use(kind, forget=True)
        for _ in range(_STEPS):
            step(batch)
        baselines.wait()
    else:
        step, state, context = step_lib.prepared(subject, Distill(), kind)
        teach = teacher_lib.make_teacher_forward(Encoder(subject.dense), Distill())
        teacher, batch = jax.device_put((subject.dense_params, batch))
        batch["teacher_outputs"] = teach(teacher, batch)
        del subject
        step = step.lower(state, context, batch).compile()
        result = {"compiled_bytes": _said(step)}
        before = _in_use(kind, forget=True)
        for _ in range(_STEPS):
            batch["teacher_outputs"] = teach(teacher, batch)
            state, metrics = step(state, context, batch)
            jax.block_until_ready((state, metrics))
    result |= {"before_bytes": before - nothing, "peak_bytes": _peak(kind) - nothing}
    print("\n" + json.dumps(result), end="", flush=True)


def _said(compiled):
    """What XLA says of a program."""
    said = compiled.memory_analysis()
    return {
        "arguments": said.argument_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "shared": said.alias_size_in_bytes,
        "temporary": said.temp_size_in_bytes,
    }


def _in_use(kind, *, forget=False):
    """Bytes in use now; with `forget`, the highest so far is this."""
    gc.collect()
    if jax.default_backend() != "cpu":
        if kind != "pytorch":
            return jax.local_devices()[0].memory_stats()["bytes_in_use"]
        return baselines.allocated(forget=forget)
    if sys.platform != "linux":
        return _resident_peak()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what was freed goes back
    if forget:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(kind):
    if jax.default_backend() != "cpu":
        if kind != "pytorch":
            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        return baselines.most_allocated()
    return _status("VmHWM") if sys.platform == "linux" else _resident_peak()


def _status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])


def _resident_peak():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(result: dict[str, Any]) -> str:
    """The result of `measure` for people."""
    lines = [
        f"batches of {result['seq_length']} tokens",
        "",
        f"{'MiB':12}{'before':>10}{'highest':>10}{'steps add':>11}"
        f"{'all processes':>24}{'XLA: arguments':>16}{'temporary':>11}",
    ]
    for kind, each in result["contestants"].items():
        low, high = min(each["peaks"]) / 2**20, max(each["peaks"]) / 2**20
        before, peak = each["before_bytes"] / 2**20, each["peak_bytes"] / 2**20
        line = f"{kind:12}{before:10.0f}{peak:10.0f}{peak - before:11.0f}"
        line += f"{f'{low:.0f} to {high:.0f}':>24}"
        if said := each.get("compiled_bytes"):
            line += f"{said['arguments'] / 2**20:16.0f}"
            line += f"{said['temporary'] / 2**20:11.0f}"
        lines.append(line)
    lines += [f"left out: {n}: {why}" for n, why in result["left_out"].items()]
    return "\n".join(lines)
