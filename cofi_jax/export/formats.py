"""The parts that a format of export is made of, in one object."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cofi_jax.export import verify
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of every model, in order


def _as_they_are(params: dict, **options: Any) -> dict:
    return params


def _no_facts(config: EncoderConfig) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a model: how it is written, loaded and checked.

    Attributes:
      name: its name on the command line, and that of its folder.
      write: `write(folder, params, config, labels, **options)` writes a model, dense or
        sliced, into an existing, empty folder. `labels` are the names of the classes in
        the order of the logits; with () they are called LABEL_0, LABEL_1, ...
      load: opens a written folder in the runtime that it is for. The result maps a
        batch, of arrays (B, T), to float32 logits, (B, C) or (B, T, C).
      packages: the modules that both import beyond the package's own dependencies.
      extra: the extra of the distribution that installs these.
      options: the names of the options of `write`. Others are refused.
      stored: `stored(params, **options)` returns the float32 parameters as `write`
        stores them; the masked model that the format is compared with has the same.
      facts: `facts(config)` returns what else `check.json` says.
      check: `check(name, model, validation)` compares the loaded model with the masked
        one. It returns the content of `check.json` and raises UserError for a model
        that is not to be shipped.
    """

    name: str
    write: Callable[..., None]
    load: Callable[[Path], Callable[[Batch], Any]]
    packages: tuple[str, ...] = ()
    extra: str = ""
    options: tuple[str, ...] = ()
    stored: Callable[..., dict] = _as_they_are
    facts: Callable[[EncoderConfig], dict[str, Any]] = _no_facts
    check: Callable[..., dict[str, Any]] = verify.compare
