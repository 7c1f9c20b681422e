"""The formats that a model can be exported in; a new one is a file here and an entry."""

from cofi_jax.export import to_onnx, to_stablehlo, to_stock_bert, to_transformers
from cofi_jax.export.base import Format

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        to_transformers.FORMAT,
        to_onnx.FORMAT,
        to_stablehlo.FORMAT,
        to_stock_bert.FORMAT,
    )
}

CARDS = {name: form.card for name, form in FORMATS.items()}  # for the model card
