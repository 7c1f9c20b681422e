"""Tables of times, measured in models: what `pruning.latency` predicts with.

A block is timed where it works. With T(structure) the time of a model, which always
ends with an attention block of one head, and c_n that of a block of n units,

    c_n = (T(four blocks of n units) - T(none)) / 4,    T_0 = T(none) - c_1 of attention

A block that is absent takes no time by construction. The models take turns, and each
time is the median ratio to T(none) turn by turn, so a machine that slows down for a
while slows down both. The attention block stands at the end because some runtimes
compute what comes behind the last one for the first token alone.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

import cofi_jax
from cofi_jax import files
from cofi_jax.errors import reject, warn
from cofi_jax.evaluation import latency, timing
from cofi_jax.evaluation.latency import Opener
from cofi_jax.models.bert import Batch, Encoder, abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import BERT, blocks
from cofi_jax.pruning.latency import FEW, Table, cost, rising

REPEATS = 20
_VERSION = 1
_BLOCKS = 4  # of a kind in a model
_NOISY = 0.05  # A spread above this is measured anew, and then said.
_RETRIES = 2
_BASE, _DENSE = "base", "dense"

# The knots of a wide block, and the distance of further ones.
_KNOTS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
_KNOTS_APART = 256


def knots(width: int) -> list[int]:
    """Returns the numbers of units at which a block of so many is measured."""
    if width <= FEW:
        return [*range(1, width + 1)]
    wide = range(_KNOTS[-1] + _KNOTS_APART, width, _KNOTS_APART)
    return [*(n for n in (*_KNOTS, *wide) if n < width), width]


def key_of(
    config: EncoderConfig, *, runtime: str, batch_size: int, seq_length: int
) -> dict[str, Any]:
    """Returns all that the times of a table depend on, by name.

    Args:
      config: the sizes of the dense model. Its depth and its classes do not matter.
      runtime: the name of the runtime.
      batch_size: the sequences in a batch.
      seq_length: the tokens in a sequence.
    """
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    wings = ["models"]
    if runtime != "jax":
        import onnxruntime  # of which it is known that it is installed

        versions["onnxruntime"] = onnxruntime.__version__
        wings.append("export")
    package, code = pathlib.Path(cofi_jax.__file__).parent, hashlib.sha256()
    for wing in wings:
        for path in sorted((package / wing).glob("*.py")):
            code.update(path.read_bytes())
    return {
        "device": timing.describe(jax.devices()[0]),
        "platform": platform.platform(),
        **versions,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "runtime": runtime,
        "dtype": config.dtype,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "batch_size": batch_size,
        "seq_length": seq_length,
        "hidden_size": config.hidden_size,
        "head_size": config.head_size,
        "heads": max(config.heads),
        "intermediate": max(config.intermediate),
        "activation": config.activation,
        "head": config.pooling or ("every" if config.reads_every_token else "first"),
        "vocab_size": config.vocab_size,
        "code": code.hexdigest()[:16],
    }


def measure(
    config: EncoderConfig,
    opener: Opener,
    key: Mapping[str, Any],
    *,
    repeats: int = REPEATS,
    rest_ms: float = 0.0,
) -> dict[str, Any]:
    """Measures a table.

    Args:
      config: the sizes of the dense model.
      opener: opens models in the runtime.
      key: see `key_of`.
      repeats: the turns of each model.
      rest_ms: as in `timing.side_by_side`.

    Returns:
      The content of a file:
        `schema_version`, `key`
        `overhead_ms`     of what cannot be pruned
        `blocks`          by name `counts`, `ms` as measured, and `spread`, which is the
                          distance of the quartiles as a fraction of the median
        `dense_ms`        the dense model
        `additivity`      what it takes over what the table says that it takes
        `repeats`, `seconds`

    Raises:
      UserError: where the memory does not suffice.
    """
    started = time.perf_counter()
    found = _timed(_structures(config), config, opener, key, repeats, rest_ms)
    base, parts = found[_BASE][0], {}
    for block in blocks(config):
        counts = knots(max(block.sizes(config)))
        pairs = [found[f"{block.name} {count}"] for count in counts]
        parts[block.name] = {
            "counts": counts,
            "ms": [(ms - base) / _BLOCKS for ms, _ in pairs],
            "spread": [spread for _, spread in pairs],
        }
    one_head = parts[blocks(config)[0].name]["ms"][0]
    content = {
        "schema_version": _VERSION,
        "key": dict(key),
        "overhead_ms": max(base - one_head, 1e-3 * base),
        "blocks": parts,
        "dense_ms": found[_DENSE][0],
    }
    predicted = float(cost(table(content)).exact({}, config))
    content["additivity"] = content["dense_ms"] / predicted
    seconds = time.perf_counter() - started
    return content | {"repeats": repeats, "seconds": seconds}


def table(content: Mapping[str, Any]) -> Table:
    """Returns the table that a constraint can follow, see `pruning.latency.rising`."""
    curves = {
        name: rising(np.asarray(curve["counts"]), np.asarray(curve["ms"]))
        for name, curve in content["blocks"].items()
    }
    return Table(np.float64(content["overhead_ms"]), curves)


def read(path: pathlib.Path, field: str) -> dict[str, Any]:
    """Reads the content of a table's file.

    Raises:
      UserError: about `field`, for a file that is not there, or is not a table.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
        for name in (block.name for block in BERT.blocks):
            columns = (
                content["blocks"][name][key] for key in ("counts", "ms", "spread")
            )
            counts, *times = (np.asarray(column, float) for column in columns)
            if not (counts.size and (np.diff(counts, prepend=0) > 0).all()):
                raise ValueError("its knots do not rise")
            if any(counts.shape != each.shape for each in times):
                raise ValueError("it has not one time for each knot")
            if not np.isfinite(times).all():
                raise ValueError("a time is not finite")
        if not dict(content["key"]):
            raise ValueError("it has no key")
        for name in ("overhead_ms", "dense_ms", "additivity", "seconds"):
            if not 0 < content[name] < math.inf:
                raise ValueError(f"{name} must be a number above 0")
    except OSError as error:
        legal = f"must be a table of times that can be read ({error.strerror})"
        raise reject(field, str(path), legal) from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        legal = f"is not a table of times ({type(error).__name__}: {error})"
        raise reject(field, str(path), legal) from error
    return content


def check_key(
    content: Mapping[str, Any], key: Mapping[str, Any], field: str, path: pathlib.Path
) -> None:
    """Raises UserError, naming the first field in which a table is of another key."""
    of = content["key"]
    for name in dict.fromkeys([*key, *of]):
        if of.get(name) != key.get(name):
            legal = f"is of {name}={of.get(name)!r}, not {key.get(name)!r}; "
            legal += "without it, the times are measured anew"
            raise reject(field, str(path), legal)


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a table's file, and says which knots are noisy."""
    files.write_json(path, content)
    for name, block in content["blocks"].items():
        pairs = zip(block["counts"], block["spread"], strict=True)
        noisy = [f"{n} ({100 * part:.0f} %)" for n, part in pairs if part > _NOISY]
        if noisy:
            warn(
                f"{path.name}: the times of {name} blocks spread by more than "
                f"{100 * _NOISY:g} % at {', '.join(noisy)} units; they are smoothed"
            )


def residuals(
    content: Mapping[str, Any],
    config: EncoderConfig,
    opener: Opener,
    *,
    structures: int,
    repeats: int = REPEATS,
    rest_ms: float = 0.0,
) -> list[dict[str, Any]]:
    """Times random structures, and compares each with what the table says.

    Returns:
      For each structure `heads` and `intermediate`, layer by layer, `predicted_ms`,
      `measured_ms` and `ratio`, which is measured over predicted.
    """
    some = {str(n): each for n, each in enumerate(random(config, structures))}
    found = _timed(some, config, opener, content["key"], repeats, rest_ms)
    predict, rows = cost(table(content)).exact, []
    for name, structure in some.items():
        widths = {
            block.widths: "-".join(map(str, block.sizes(structure)))
            for block in blocks(config)
        }
        predicted, (ms, _) = float(predict({}, structure)), found[name]
        times = {"predicted_ms": predicted, "measured_ms": ms, "ratio": ms / predicted}
        rows.append(widths | times)
    return rows


def random(config: EncoderConfig, count: int, seed: int = 0) -> list[EncoderConfig]:
    """Draws structures of the dense model: which blocks there are, and their widths."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        share, widths = rng.uniform(0.2, 0.9), {}
        for block in blocks(config):
            sizes = np.asarray(block.sizes(config))
            drawn = np.ceil(sizes * rng.uniform(0.05, 1, sizes.shape)).astype(int)
            drawn *= rng.random(sizes.shape) < share
            widths[block.widths] = tuple(drawn.tolist())
        found.append(dataclasses.replace(config, **widths))
    return found


def _structures(config) -> dict[str, EncoderConfig]:
    """Returns the sizes of the models that a table is measured with, by name."""

    def model(of=None, count=0):
        widths = {block.widths: [0] * (_BLOCKS + 1) for block in blocks(config)}
        widths[blocks(config)[0].widths][-1] = 1
        if of:
            widths[of.widths][:-1] = [count] * _BLOCKS
        return dataclasses.replace(config, **{k: tuple(v) for k, v in widths.items()})

    found = {_BASE: model()}
    for block in blocks(config):
        for count in knots(max(block.sizes(config))):
            found[f"{block.name} {count}"] = model(block, count)
    return found | {_DENSE: config}


def _timed(
    structures: Mapping[str, EncoderConfig], config, opener, key, repeats, rest_ms
) -> dict[str, tuple[float, float]]:
    """Returns the milliseconds and the spread of each model, by name."""
    sizes = {name: key[name] for name in ("batch_size", "seq_length")}
    structures = {_BASE: _structures(config)[_BASE], **structures}
    shared: dict[str, Any] = {}
    with timing.memory_suffices(*sizes.values()):
        calls = {
            name: opener(random_params(each, shared), each)
            for name, each in structures.items()
        }
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    base: list[float] = []
    some: Sequence[str] = [*calls]
    for _ in range(1 + _RETRIES):
        timings = latency.passes(
            {name: calls[name] for name in some},
            config.vocab_size,
            **sizes,
            repeats=repeats,
            rest_ms=rest_ms,
        )
        base += timings[_BASE].by_turn.tolist()
        for name in some:
            each = timings[name].by_turn / timings[_BASE].by_turn
            ratios[name] += each.tolist()
        noisy = [name for name, values in ratios.items() if _spread(values) > _NOISY]
        if not noisy:
            break
        some = [_BASE, *noisy]
    scale = float(np.median(base))
    return {n: (scale * float(np.median(r)), _spread(r)) for n, r in ratios.items()}


def _spread(values):
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float((high - low) / middle)


def random_params(
    config: EncoderConfig, shared: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns random parameters; the time does not depend on what they are.

    Args:
      config: the sizes.
      shared: the parameters outside the layers of another model, which are not made
        again; those that are made are added.
    """
    shared = {} if shared is None else shared
    rng, found = np.random.default_rng(0), {}
    for name, part in abstract_params(config).items():
        found[name] = shared.get(name) or jax.tree.map(
            lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), part
        )
        if not name.startswith("layer_"):
            shared[name] = jax.device_put(found[name])
    return found


def open_in_jax(params: dict, config: EncoderConfig) -> Callable[[Batch], Any]:
    """The `Opener` of JAX."""
    return latency.call(Encoder(config), params)
