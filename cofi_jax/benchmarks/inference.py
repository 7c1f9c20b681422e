"""The time of a forward pass: dense and sliced, ours and that of the baselines.

All runtimes get the same batch of random tokens without padding, and give the same
logits as far as the dtype goes. Beside their times stands the least time that a device
could take, `roofline.pass_seconds`, at the rates measured in the same run.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, text, workload
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.evaluation import latency, timing
from cofi_jax.evaluation.timing import Timing
from cofi_jax.models.bert import Encoder, init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import transforms

_OURS = "cofi_jax"
_TOLERANCE = 1e-3  # of float32 logits, relative where they exceed 1

Calls = dict[tuple[str, str], Callable[[], Any]]  # by model and runtime


def measure(
    subject: Subject,
    *,
    batch_sizes: Sequence[int],
    seq_lengths: Sequence[int],
    repeats: int,
    torch_compile: bool,
) -> dict[str, Any]:
    """Times passes in turn, at each batch size and length.

    Args:
      subject: the models; the sliced one is also tried with its widths rounded up.
      batch_sizes: the values of B.
      seq_lengths: the values of T.
      repeats: the turns of each, of one pass or as many as 50 ms hold.
      torch_compile: whether PyTorch also runs compiled.

    Returns:
      `models` (their widths), `rates` of the device, `differences` of logits from
      ours, `left_out`, with the reason, and `grid`, for each size, model and runtime
        `batch_size`, `seq_length`, `model`, `runtime`
        `latency_ms`, `latency_spread_ms`  median; 5th and 95th percentile
        `examples_per_second`              at the median
        `speedup`, `speedup_spread`        over the dense model in the same runtime
        `ours_is_faster`, `ours_is_faster_spread`  a ratio, with the same model
        `roofline_ms`, `times_the_roofline`

    Raises:
      UserError: where the memory does not suffice.
      RuntimeError: where a runtime gives other logits.
    """
    models = variants(subject)
    runtimes, left_out = _runtimes(subject.dense, torch_compile)
    passes = {
        (model, runtime): make(params, config)
        for model, (config, params) in models.items()
        for runtime, make in runtimes.items()
    }
    rates = roofline.rates(subject.dense.dtype)
    grid, differences = [], {}
    for batch_size, seq_length in itertools.product(batch_sizes, seq_lengths):
        cell = {"batch_size": batch_size, "seq_length": seq_length}
        batch = latency.random_batch(subject.dense.vocab_size, **cell)
        fed = dict.fromkeys(runtimes, jax.device_get(batch)) | {_OURS: batch}
        for name in runtimes:
            if name.startswith("pytorch"):
                fed[name] = baselines.tensors(fed[name])
        calls = {key: functools.partial(f, fed[key[1]]) for key, f in passes.items()}
        with timing.memory_suffices(**cell):
            differences = differences or _differences(calls, subject.dense.dtype)
            timings = timing.side_by_side(calls, repeats=repeats, warmup=1, rest_ms=100)
        for (model, runtime), each in timings.items():
            least = 1e3 * roofline.pass_seconds(models[model][0], **cell, rates=rates)
            names = {"model": model, "runtime": runtime}
            dense, same = timings["dense", runtime], timings[model, _OURS]
            grid.append(cell | names | described(each, dense, same, batch_size, least))
    return {
        "models": {
            name: workload.described(config, subject.dense)
            for name, (config, _) in models.items()
        },
        "rates": rates,
        "repeats": repeats,
        "differences": differences,
        "grid": grid,
        "left_out": left_out,
    }


def variants(subject: Subject) -> dict[str, tuple[EncoderConfig, dict]]:
    """Returns the sizes and float32 parameters of `dense`, `sliced` and `rounded`.

    `rounded` has the widths of `sliced` raised to the multiples that are fast on a GPU,
    see `transforms.round_to_device`; it is missing where they are multiples already.
    """
    multiple = transforms.WIDTHS["gpu"]["intermediate"]
    config = workload.rounded(subject.sliced, subject.dense, multiple)
    found = {
        "dense": (subject.dense, subject.dense_params),
        "sliced": (subject.sliced, subject.sliced_params),
    }
    if config != subject.sliced:
        found["rounded"] = config, init_params(config, jax.random.key(3))
    return found


def _ours(params, config):
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, config.dtype), params)
    return functools.partial(latency.forward(Encoder(config)), params)


def _runtimes(dense, torch_compile):
    """Returns what makes a pass of (config, params), by name, and who is left out."""
    tokens = "its head reads every token" if dense.reads_every_token else ""
    gone = baselines.missing("onnx", "onnxruntime")
    onnx = f"{gone} not installed" if gone else tokens
    if jax.default_backend() != "cpu" or dense.dtype != "float32":
        onnx = "is run on a CPU in float32 only"
    pytorch = baselines.no_pytorch() or tokens
    compiled = functools.partial(baselines.pytorch_pass, compiled=True)
    offers = {
        _OURS: (_ours, ""),
        "pytorch": (baselines.pytorch_pass, pytorch),
        "pytorch compiled": (compiled, pytorch),
        "onnxruntime": (baselines.onnx_pass, onnx),
    }
    if not torch_compile:
        del offers["pytorch compiled"]
    found = {name: make for name, (make, reason) in offers.items() if not reason}
    return found, {name: reason for name, (_, reason) in offers.items() if reason}


def _differences(calls: Calls, dtype: str) -> dict[str, float]:
    """Returns the largest difference of logits from ours, by `model, runtime`."""
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


def described(
    each: Timing, dense: Timing, ours: Timing, batch_size: int, roofline_ms: float
) -> dict[str, Any]:
    """Returns the figures of one model in one runtime for `measure`.

    Args:
      each: its turns.
      dense: those of the dense model in the same runtime.
      ours: those of the same model in ours.
      batch_size: sequences in a batch (B).
      roofline_ms: the least time of a pass.
    """
    ahead, ahead_spread = timing.speedup(each, ours)
    return latency.figures(each, dense, batch_size) | {
        "latency_spread_ms": [each.percentile_ms(5), each.percentile_ms(95)],
        "ours_is_faster": ahead,
        "ours_is_faster_spread": list(ahead_spread),
        "roofline_ms": roofline_ms,
        "times_the_roofline": each.median_ms / roofline_ms,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result of `measure` as text for people."""
    rates = result["rates"]
    lines = [
        f"matrix rate {rates['flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"bandwidth {rates['bytes_per_second'] / 1e9:.1f} GB/s",
    ]
    for name, sizes in result["models"].items():
        heads, units = (" ".join(map(str, sizes[k])) for k in ("heads", "intermediate"))
        lines.append(
            f"{name}: hidden {sizes['hidden']}, heads {heads}, units {units}; "
            f"sparsity {sizes['sparsity']:.1%}"
        )
    head = ("batch", "model", "runtime", "ms", "5 % to 95 %", "roofline", "times it")
    rows = [(*head, "speedup", "ours")]
    for cell in result["grid"]:
        times = text.times(cell["ours_is_faster"], cell["ours_is_faster_spread"])
        rows.append(
            (
                f"{cell['batch_size']}x{cell['seq_length']}",
                cell["model"],
                cell["runtime"],
                f"{cell['latency_ms']:.2f}",
                "{:.2f} to {:.2f}".format(*cell["latency_spread_ms"]),
                f"{cell['roofline_ms']:.2f}",
                f"{cell['times_the_roofline']:.1f}",
                f"{cell['speedup']:.2f}",
                "" if cell["runtime"] == _OURS else f"{times} as fast",
            )
        )
    return "\n".join([*lines, "", text.aligned(rows)])
