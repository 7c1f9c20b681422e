"""One file that runs with jax alone: a StableHLO program with its weights inside.

    run = jax.export.deserialize(open("model.stablehlo", "rb").read()).call
    logits = run(input_ids, attention_mask, token_type_ids)

Each input is (B, T) int32, for any B and any T up to the model's longest input. The
program runs on CPUs and on CUDA GPUs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from cofi_jax.export.base import INPUTS, Format
from cofi_jax.files import write_json
from cofi_jax.models.bert import Batch, Encoder
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

_FILE = "model.stablehlo"


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of traced programs."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes `model.stablehlo` and `labels.json`: see `Format.write`."""
    params = jax.tree.map(jnp.asarray, params)

    def logits(*inputs):
        batch = dict(zip(INPUTS, inputs, strict=True))
        return Encoder(config).apply({"params": params}, batch).logits

    limit = f"length <= {config.longest}"
    shape = export.symbolic_shape("batch, length", constraints=[limit])
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(INPUTS)
    with _without_source_locations():
        exported = export.export(jax.jit(logits), platforms=("cpu", "cuda"))(*inputs)
        (folder / _FILE).write_bytes(exported.serialize())
    write_json(folder / "labels.json", {"labels": list(labels)})


def load(folder: Path) -> Callable[[Batch], np.ndarray]:
    """Opens the program in jax: see `Format.load`."""
    run = jax.jit(export.deserialize((folder / _FILE).read_bytes()).call)
    return lambda batch: np.asarray(run(*(batch[name] for name in INPUTS)))


_CARD = Part(
    "jax alone",
    "a StableHLO program for CPUs and CUDA GPUs",
    """\
from jax import export
from transformers import AutoTokenizer
folder = "path/to/this/folder/stablehlo"
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(f"{{folder}}/model.stablehlo", "rb") as file:
    model = export.deserialize(file.read()).call
options = {{"return_tensors": "np", "return_token_type_ids": True}}
inputs = tokenizer({texts}, truncation=True, **options)
names = ("input_ids", "attention_mask", "token_type_ids")
print(model(*(inputs[name].astype("int32") for name in names)))""",
)

FORMAT = Format("stablehlo", write, load, _CARD)
