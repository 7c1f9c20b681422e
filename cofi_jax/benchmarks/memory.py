"""The memory that a training step takes: masked, plain and PyTorch's.

XLA states what a compiled step needs, so ours need not run. PyTorch's step runs a few
times: on a GPU its allocator knows the most bytes that it gave out, on a CPU the
resident set of the process is sampled meanwhile.
"""

import concurrent.futures
import ctypes
import gc
import time
from typing import Any

import jax
import numpy as np
import psutil

from cofi_jax.benchmarks import baselines, step, workload
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.config import Distill
from cofi_jax.data.batches import make_batch
from cofi_jax.evaluation import timing
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.training import teacher as teacher_lib


def measure(
    model: str, dtype: str, batch_size: int, seq_length: int, repeats: int, **sizes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Finds out what steps take that train the dense model, which is the teacher too.

    Args:
      model: see `workload.load`.
      dtype: of the matrix products.
      batch_size: sequences in a batch (B).
      seq_length: tokens in a sequence (T).
      repeats: how often PyTorch's step runs; the first one makes the optimizer's state.
      **sizes: of a random model.

    Returns:
      The conditions, and a row for each step, in MiB: `before` are the models, a batch
      and, but for PyTorch, the optimizer's state; `highest` is the most that a step
      takes, with these.
    """
    subject = workload.load(model, dtype=dtype, longest=seq_length, **sizes)
    rows = workload.random_rows(batch_size, seq_length, subject.dense.vocab_size)
    chosen = np.arange(batch_size)
    batch = make_batch(rows, chosen, length=seq_length, batch_size=batch_size)
    conditions = {"dense": workload.described(subject.dense, subject.dense)}
    with timing.memory_suffices(batch_size, seq_length):
        found = {kind: stated(subject, kind, batch) for kind in ("masked", "plain")}
        if reason := baselines.unfit(subject.dense):
            conditions["left_out"] = {"pytorch": reason}
        else:
            found["pytorch"] = _of_pytorch(subject, batch, repeats)
    return conditions, [
        {
            "step": kind,
            "before": before / 2**20,
            "highest": highest / 2**20,
            "a_step_adds": (highest - before) / 2**20,
        }
        for kind, (before, highest) in found.items()
    ]


def stated(subject: Subject, kind: str, batch: Batch) -> tuple[int, int]:
    """Returns the bytes before one of our steps and the most in it, as XLA states."""
    train_step, state, context = step.prepared(subject, kind)
    teach = teacher_lib.make_teacher_forward(Encoder(subject.dense), Distill())
    outputs = jax.eval_shape(teach, subject.dense_params, batch)
    batch = dict(batch, teacher_outputs=outputs)
    sizes = train_step.lower(state, context, batch).compile().memory_analysis()
    teacher = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.dense_params))
    before = teacher + sizes.argument_size_in_bytes
    fresh_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return before, before + fresh_outputs + sizes.temp_size_in_bytes


def _of_pytorch(subject, batch, repeats):
    import torch
    import transformers

    def resident():
        return psutil.Process().memory_info().rss

    def in_use():
        gc.collect()
        if on_gpu:
            return torch.cuda.memory_allocated()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # The C library gives back what was freed.
        return resident()

    def train():
        for _ in range(repeats):
            train_step(tensors)
        baselines.wait()

    _ = transformers.BertForSequenceClassification  # Imports do not count.
    on_gpu = jax.default_backend() != "cpu"
    nothing = in_use()
    train_step, tensors = step.of_pytorch(subject), baselines.tensors(batch)
    before = highest = in_use()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        training = thread.submit(train)
        while not training.done():
            time.sleep(0.002)
            highest = max(highest, resident())
        training.result()
    if on_gpu:
        highest = torch.cuda.max_memory_allocated()
    return before - nothing, highest - nothing
