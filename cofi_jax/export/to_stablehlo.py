"""One file that runs with jax alone: a StableHLO program with its weights inside.

    run = jax.export.deserialize(open("model.stablehlo", "rb").read()).call
    logits = run(input_ids, attention_mask, token_type_ids)

each (B, T) int32, for any B and any T up to the longest, on CPUs and CUDA GPUs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from cofi_jax.files import write_json
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig

REQUIRES = ()


_FILE = "model.stablehlo"


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes `model.stablehlo`, and `labels.json`, into the folder."""
    params = jax.tree.map(jnp.asarray, params)

    def logits(*inputs):
        batch = dict(zip(_INPUTS, inputs, strict=True))
        return Encoder(config).apply({"params": params}, batch).logits

    shape = export.symbolic_shape(
        "batch, length", constraints=[f"length <= {config.longest}"]
    )
    like = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(_INPUTS)
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no paths in the file
    try:
        exported = export.export(jax.jit(logits), platforms=("cpu", "cuda"))(*like)
        (folder / _FILE).write_bytes(exported.serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    write_json(folder / "labels.json", {"labels": list(labels)})


def load(folder: Path) -> Callable[[Batch], np.ndarray]:
    """The program as a function from a batch to its logits, float32."""
    run = jax.jit(export.deserialize((folder / _FILE).read_bytes()).call)
    return lambda batch: np.asarray(run(*(batch[name] for name in _INPUTS)))
