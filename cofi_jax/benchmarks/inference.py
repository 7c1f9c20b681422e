"""The time of a forward pass: dense and sliced, ours and that of the baselines.

All runtimes get the same batch of random tokens without padding, and give the same
logits as far as the dtype goes. Beside their times stands the least time that a device
could take, `roofline.pass_seconds`, at the rates measured in the same run.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, workload
from cofi_jax.evaluation import latency, timing
from cofi_jax.models.bert import Encoder, init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import transforms

_OURS = "cofi_jax"
_TOLERANCE = 1e-3  # of float32 logits, relative where they exceed 1

Calls = dict[tuple[str, str], Callable[[], Any]]  # by model and runtime


def measure(
    model: str,
    dtype: str,
    batch_size: Sequence[int],
    seq_length: Sequence[int],
    repeats: int,
    torch_compile: bool,
    **sizes: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times passes in turn, at each batch size and length.

    Args:
      model: see `workload.load`; its sliced model is also tried as `rounded`.
      dtype: of parameters and matrix products.
      batch_size: the values of B.
      seq_length: the values of T.
      repeats: the turns of each, of one pass or as many as 50 ms hold.
      torch_compile: whether PyTorch also runs compiled.
      **sizes: of a random model.

    Returns:
      The conditions, with the `differences` of logits from ours, and for each size,
      model and runtime a row with
        `latency_ms`
        `roofline_ms`, `times_the_roofline`
        `speedup`         over the dense model in the same runtime
        `ours_is_faster`  than this runtime with the same model, as a ratio

    Raises:
      UserError: where the memory does not suffice.
      RuntimeError: where a runtime gives other logits.
    """
    subject = workload.load(model, dtype=dtype, longest=max(seq_length), **sizes)
    models = {
        "dense": (subject.dense_params, subject.dense),
        "sliced": (subject.sliced_params, subject.sliced),
    }
    rounded = round_widths(subject.sliced, subject.dense)
    if rounded != subject.sliced:
        models["rounded"] = init_params(rounded, jax.random.key(3)), rounded
    runtimes, left_out = _runtimes(subject.dense, torch_compile)
    passes = {
        (name, runtime): make(*each)
        for name, each in models.items()
        for runtime, (make, _) in runtimes.items()
    }
    rates = roofline.rates(dtype)
    rows, differences = [], {}
    for cell in itertools.product(batch_size, seq_length):
        of_size = dict(zip(("batch_size", "seq_length"), cell, strict=True))
        batch = latency.random_batch(subject.dense.vocab_size, **of_size)
        fed = {runtime: feed(batch) for runtime, (_, feed) in runtimes.items()}
        calls = {key: functools.partial(f, fed[key[1]]) for key, f in passes.items()}
        with timing.memory_suffices(*cell):
            differences = differences or compare(calls, dtype)
            timings = timing.side_by_side(calls, repeats=repeats, warmup=1, rest_ms=100)
        for (name, runtime), each in timings.items():
            config = models[name][1]
            least = 1e3 * roofline.pass_seconds(config, **of_size, rates=rates)
            figures = {
                "latency_ms": each.spread_ms,
                "roofline_ms": least,
                "times_the_roofline": each.median_ms / least,
                "speedup": timing.speedup(timings["dense", runtime], each),
                "ours_is_faster": timing.speedup(each, timings[name, _OURS]),
            }
            rows.append(of_size | {"model": name, "runtime": runtime} | figures)
    described = {
        name: workload.described(config, subject.dense)
        for name, (_, config) in models.items()
    }
    others = {"rates": rates, "differences": differences, "left_out": left_out}
    return described | others, rows


def round_widths(sliced: EncoderConfig, dense: EncoderConfig) -> EncoderConfig:
    """Returns `sliced` with feed-forward widths raised to multiples.

    They are those that are fast on a GPU, see `transforms.round_to_device`, and at most
    those of `dense`. An absent block stays absent.
    """
    multiple = transforms.WIDTHS["gpu"]["intermediate"]
    pairs = zip(sliced.intermediate, dense.intermediate, strict=True)
    raised = tuple(min(-(-w // multiple) * multiple, full) for w, full in pairs)
    return dataclasses.replace(sliced, intermediate=raised)


def _ours(params, config):
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, config.dtype), params)
    return functools.partial(latency.forward(Encoder(config)), params)


def _runtimes(dense, torch_compile):
    """Returns by name what makes a pass and what prepares its batch; who is left out.

    Those that are left out have a reason.
    """
    tokens = "its head reads every token" if dense.reads_every_token else ""
    gone = baselines.missing("onnx", "onnxruntime")
    onnx = f"{gone} not installed" if gone else tokens
    if jax.default_backend() != "cpu" or dense.dtype != "float32":
        onnx = "is run on a CPU in float32 only"
    pytorch = baselines.no_pytorch() or tokens
    compiled = functools.partial(baselines.pytorch_pass, compiled=True)
    offers = {
        _OURS: (_ours, lambda batch: batch, ""),
        "pytorch": (baselines.pytorch_pass, baselines.tensors, pytorch),
        "pytorch compiled": (compiled, baselines.tensors, pytorch),
        "onnxruntime": (baselines.onnx_pass, jax.device_get, onnx),
    }
    if not torch_compile:
        del offers["pytorch compiled"]
    reasons = {name: reason for name, (*_, reason) in offers.items() if reason}
    return {n: each[:2] for n, each in offers.items() if n not in reasons}, reasons


def compare(calls: Calls, dtype: str) -> dict[str, float]:
    """Returns the largest difference of logits from ours, by `model, runtime`.

    Raises:
      RuntimeError: where it is too large, in float32.
    """
    logits = {key: baselines.to_numpy(call()) for key, call in calls.items()}
    found = {}
    for (model, runtime), values in logits.items():
        ours = logits[model, _OURS]
        worst = float(np.abs(values - ours).max())
        allowed = _TOLERANCE * max(1.0, float(np.abs(ours).max()))
        if dtype == "float32" and not worst <= allowed:
            raise RuntimeError(f"{runtime} differs from ours by {worst} ({model})")
        if runtime != _OURS:
            found[f"{model}, {runtime}"] = worst
    return found
