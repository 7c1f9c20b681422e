"""How long a forward pass takes: dense and sliced, ours and others', beside the floor.

All contestants get the same batch of random tokens without padding, and give the same
logits as far as the dtype goes. The least time that the device could take is that of
`floor.pass_seconds`, at the rates measured in the same run.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cofi_jax.benchmarks import baselines, roofline, workload
from cofi_jax.benchmarks.workload import Subject
from cofi_jax.evaluation import latency, timing
from cofi_jax.evaluation.timing import Timing
from cofi_jax.models.bert import Encoder, init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import transforms

_OURS = "cofi_jax"


_TOLERANCE = 1e-3  # of float32 logits, relative where they are above 1


_CALLS = dict[str, Callable[[], Any]]


def measure(
    subject: Subject,
    *,
    batch_sizes: Sequence[int],
    seq_lengths: Sequence[int],
    repeats: int,
    torch_compile: bool,
) -> dict[str, Any]:
    """Times passes in turn, cell by cell of a grid.

    Args:
      subject: the models; the sliced one is also tried with its widths rounded up.
      batch_sizes: B.
      seq_lengths: T.
      repeats: turns of each contestant, of one pass or as many as 50 ms hold.
      torch_compile: whether PyTorch also runs compiled.

    Returns:
      `models` (their widths), `rates` of the device, `differences` of logits from
      ours, `left_out`, with the reason, and `grid`, for each cell, model and runtime
        `batch_size`, `seq_length`, `model`, `runtime`
        `latency_ms`, `latency_spread_ms`  median; 5th and 95th percentile
        `examples_per_second`              at the median
        `speedup`, `speedup_spread`        over the dense model in the same runtime
        `ours_is_faster`, `ours_is_faster_spread`  times, with the same model
        `floor_ms`, `times_the_floor`

    Raises:
      UserError: where the memory does not suffice.
      RuntimeError: where a runtime gives other logits.
    """
    models = variants(subject)
    runtimes, left_out = _runtimes(subject.dense, torch_compile)
    passes = {
        (model, runtime): make(*models[model])
        for model, (runtime, make) in itertools.product(models, runtimes.items())
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
    """Sizes and float32 parameters of `dense`, `sliced` and `rounded`.

    `rounded` has the widths of `sliced` raised to the multiples that a GPU likes, see
    `masks.round_to_device`; it is missing where they are so already.
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


def _ours(config, params):
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, config.dtype), params)
    return functools.partial(latency.forward(Encoder(config)), params)


def _runtimes(dense, torch_compile):
    """What makes a pass of (config, params), by name; and who is left out, and why."""
    found, left_out = {_OURS: _ours}, {}
    tokens = "its head reads every token" if dense.reads_every_token else ""

    def offer(name, make, reason):
        if reason:
            left_out[name] = reason
        else:
            found[name] = lambda config, params: make(params, config)

    gone = baselines.missing("torch", "transformers")
    reason = f"{gone} not installed" if gone else tokens or baselines.without_device()
    offer("pytorch", baselines.pytorch_pass, reason)
    if torch_compile:
        compiled = functools.partial(baselines.pytorch_pass, compiled=True)
        offer("pytorch compiled", compiled, reason)
    gone = baselines.missing("onnx", "onnxruntime")
    reason = f"{gone} not installed" if gone else tokens
    if jax.default_backend() != "cpu" or dense.dtype != "float32":
        reason = "is run on a CPU in float32 only"
    offer("onnxruntime", baselines.onnx_pass, reason)
    return found, left_out


def _differences(calls: _CALLS, dtype: str) -> dict[str, float]:
    """The largest difference of logits from ours, by `model, runtime`."""
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
    each: Timing, dense: Timing, ours: Timing, batch_size: int, floor_ms: float
) -> dict[str, Any]:
    """A contestant's figures in one cell.

    Args:
      each: its turns.
      dense: those of the dense model in the same runtime.
      ours: those of the same model in ours.
      batch_size: B.
      floor_ms: the least time of a pass.
    """
    speedup, spread = timing.speedup(dense, each)
    ahead, ahead_spread = timing.speedup(each, ours)
    return {
        "latency_ms": each.median_ms,
        "latency_spread_ms": [each.percentile_ms(5), each.percentile_ms(95)],
        "examples_per_second": 1e3 * batch_size / each.median_ms,
        "speedup": speedup,
        "speedup_spread": list(spread),
        "ours_is_faster": ahead,
        "ours_is_faster_spread": list(ahead_spread),
        "floor_ms": floor_ms,
        "times_the_floor": each.median_ms / floor_ms,
    }


def table(result: dict[str, Any]) -> str:
    """The result of `measure` for people."""
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
    lines += [
        "",
        f"{'batch':>7}{'model':>9}  {'runtime':18}{'ms':>10}{'5 % to 95 %':>20}"
        f"{'floor':>9}{'times it':>9}{'speedup':>9}  ours is",
    ]
    for cell in result["grid"]:
        size = f"{cell['batch_size']}x{cell['seq_length']}"
        between = "{:.2f} to {:.2f}".format(*cell["latency_spread_ms"])
        low, high = cell["ours_is_faster_spread"]
        times = f"  {cell['ours_is_faster']:.2f}x as fast ({low:.2f} to {high:.2f})"
        lines.append(
            f"{size:>7}{cell['model']:>9}  {cell['runtime']:18}"
            f"{cell['latency_ms']:10.2f}{between:>20}{cell['floor_ms']:9.2f}"
            f"{cell['times_the_floor']:9.1f}{cell['speedup']:9.2f}"
            f"{'' if cell['runtime'] == _OURS else times}"
        )
    lines += [f"left out: {n}: {why}" for n, why in result["left_out"].items()]
    return "\n".join(lines)
