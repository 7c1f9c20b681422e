"""The memory that a training step takes: masked, plain and PyTorch's.

XLA states what a compiled step needs, so ours need not run. PyTorch's step runs a few
times: on a GPU its allocator knows the most bytes that it gave out, on a CPU the
resident set of the process is sampled meanwhile.
"""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import psutil

from cofi_jax.benchmarks import baselines, text, workload
from cofi_jax.benchmarks import step as step_lib
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.config import Distill
from cofi_jax.models.bert import Encoder
from cofi_jax.training import teacher as teacher_lib

Batch = dict[str, np.ndarray]


def measure(
    subject: Subject, *, batch_size: int, seq_length: int, steps: int, torch_dtype: str
) -> dict[str, Any]:
    """Finds out what steps take that train the dense model, which is the teacher too.

    Args:
      subject: the models.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T).
      steps: how often PyTorch's step runs; the first one makes the optimizer's state.
      torch_dtype: the dtype of PyTorch's matrix products.

    Returns:
      `seq_length`, `left_out`, with the reason, and `steps`, which holds by kind
        `before_bytes`  the models, a batch and, but for PyTorch, the optimizer's state
        `peak_bytes`    the most that a step takes, with these
    """
    rows = workload.random_rows(batch_size, seq_length, subject.dense.vocab_size)
    (batch,) = step_lib.batches(rows, [(seq_length, np.arange(batch_size))])
    found = {kind: ours(subject, kind, batch) for kind in ("masked", "plain")}
    left_out = {}
    if reason := baselines.unfit(subject.dense):
        left_out["pytorch"] = reason
    else:
        found["pytorch"] = _of_pytorch(subject, batch, steps, torch_dtype)
    return {"seq_length": seq_length, "steps": found, "left_out": left_out}


def ours(subject: Subject, kind: str, batch: Batch) -> dict[str, int]:
    """Returns what XLA states of one of our steps, in bytes."""
    step, state, context = step_lib.prepared(subject, Distill(), kind)
    teach = teacher_lib.make_teacher_forward(Encoder(subject.dense), Distill())
    outputs = jax.eval_shape(teach, subject.dense_params, batch)
    batch = batch | {"teacher_outputs": outputs}
    sizes = step.lower(state, context, batch).compile().memory_analysis()
    teacher = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params))
    before = teacher + sizes.argument_size_in_bytes
    fresh_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = before + fresh_outputs + sizes.temp_size_in_bytes
    return {"before_bytes": before, "peak_bytes": peak}


def _of_pytorch(subject, batch, steps, dtype):
    baselines.prepare()  # Imports do not count.
    nothing, _ = _in_use()
    step = step_lib.pytorch(subject, Distill(), dtype, compiled=False)
    tensors = baselines.tensors(batch)
    before, _ = _in_use()
    with _resident_samples() as samples:
        for _ in range(steps):
            step(tensors)
        baselines.wait()
    peak = max(samples) if jax.default_backend() == "cpu" else _in_use()[1]
    return {"before_bytes": before - nothing, "peak_bytes": peak - nothing}


def _in_use():
    """Returns the bytes in use now and, on a GPU, the most that PyTorch had."""
    gc.collect()
    if jax.default_backend() != "cpu":
        return baselines.allocated()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # The C library gives back what was freed.
    return psutil.Process().memory_info().rss, 0


@contextlib.contextmanager
def _resident_samples() -> Iterator[list[int]]:
    """Fills a list with the bytes of this process's resident set, every 2 ms."""
    process, done = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample():
        while not done.wait(0.002):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def table(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as text for people."""
    rows = [("MiB", "before", "highest", "a step adds")]
    for kind, each in result["steps"].items():
        before, peak = each["before_bytes"] / 2**20, each["peak_bytes"] / 2**20
        rows.append((kind, f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}"))
    return f"batches of {result['seq_length']} tokens\n\n{text.aligned(rows)}"
