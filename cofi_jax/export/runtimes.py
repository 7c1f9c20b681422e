"""The runtimes that models are measured in, each by the format of its export."""

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cofi_jax.checkpoints.load import Loaded
from cofi_jax.errors import reject
from cofi_jax.evaluation import evaluate, latency, latency_table
from cofi_jax.evaluation.evaluate import Opener
from cofi_jax.export.formats import FORMATS
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig

NAMES = ("jax", "onnx", "onnx-int8")


def openers(names: Sequence[str], field: str) -> dict[str, Opener | None]:
    """Returns how a model is opened in each of the runtimes, None for JAX.

    Args:
      names: some of `NAMES`.
      field: the flag that named them, for messages.

    Raises:
      UserError: for an unknown name, a missing package, and where JAX runs on another
        device than the CPU, which the other runtimes use.
    """
    found: dict[str, Opener | None] = {}
    for name in names:
        if name not in NAMES:
            raise reject(field, name, f"must be among {', '.join(NAMES)}")
        if name == "jax":
            found[name] = None
            continue
        FORMATS[name].check_packages(field)
        if jax.default_backend() != "cpu":  # The result names JAX's device.
            legal = "runs on the CPU; set JAX_PLATFORMS=cpu for all that is compared"
            raise reject(field, name, legal)
        found[name] = _opener(name)
    if not found:
        raise reject(field, "", f"must be among {', '.join(NAMES)}")
    return found


def _opener(name) -> Opener:
    def opener(loaded: Loaded, folder: pathlib.Path) -> Callable[[Batch], Any]:
        config, labels = loaded.model.config, loaded.task.labels
        return _written(name, folder, loaded.params, config, labels)

    return opener


def _written(name, folder, params, config, labels):
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    FORMATS[name].write(folder, params, config, labels)
    return FORMATS[name].load(folder)


def timed(name: str, field: str) -> latency.Opener:
    """Returns how models are opened in a runtime only to be timed.

    Raises:
      UserError: as `openers` does.
    """
    if openers((name,), field)[name] is None:
        return latency_table.open_in_jax

    def opener(params: dict, config: EncoderConfig) -> Callable[[Batch], Any]:
        with tempfile.TemporaryDirectory() as folder:
            return _written(name, pathlib.Path(folder), params, config, ())

    return opener


def precision(name: str, dtype: str) -> str:
    """Returns the precision that a runtime computes a model of this `dtype` in."""
    return {"onnx": "float32", "onnx-int8": "int8"}.get(name, dtype)


def rest_ms(name: str) -> float:
    """Returns the pause before each turn that timings in a runtime take."""
    return 0.0 if name == "jax" else evaluate.REST_MS
