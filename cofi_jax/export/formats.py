"""The formats of an export; a new one is a file here and an entry."""

from cofi_jax.export import (
    to_onnx,
    to_onnx_int8,
    to_stablehlo,
    to_stock_bert,
    to_transformers,
)
from cofi_jax.export.base import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (to_transformers, to_onnx, to_onnx_int8, to_stablehlo, to_stock_bert)
}

CARDS = {name: form.card for name, form in FORMATS.items()}  # for the model card
