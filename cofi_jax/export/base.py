"""The parts that a format of export is made of, in one object."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.export import verify
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of every model, in order


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a model: how it is written, loaded, checked and described.

    Attributes:
      name: its name on the command line, and that of its folder.
      write: `write(folder, params, config, labels)` writes a model, dense or sliced,
        into an existing, empty folder. `labels` are the names of the classes in the
        order of the logits; with () they are called LABEL_0, LABEL_1, ...
      load: opens a written folder in the runtime that it is for. The result maps a
        batch, of arrays (B, T), to float32 logits, (B, C) or (B, T, C).
      card: what the model card says of the folder.
      packages: the modules that both import beyond the package's own dependencies.
      extra: the extra of the distribution that installs these.
      dtypes: the dtypes that the weights can be stored in. For another one than
        float32, `write` is called with the option `dtype`.
      facts: `facts(config)` returns what else `check.json` says.
      check: `check(form, folder, subject)` looks at the folder that was written. It
        returns the content of `check.json` and raises UserError for a model that is not
        to be shipped. Of a `lossy` format it may write the model once more.
      lossy: whether the model computes in a lower precision than the saved one. How
        much it may lose is then the caller's choice.
    """

    name: str
    write: Callable[..., None]
    load: Callable[[Path], Callable[[Batch], Any]]
    card: Part
    packages: tuple[str, ...] = ()
    extra: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    facts: Callable[[EncoderConfig], dict[str, Any]] = lambda config: {}
    check: Callable[["Format", Path, verify.Subject], dict[str, Any]] = verify.check
    lossy: bool = False

    def check_packages(self, field: str) -> None:
        """Raises UserError, about `field`, where one of the packages is missing."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            legal = f"needs {', '.join(missing)}: pip install 'cofi-jax[{self.extra}]'"
            raise reject(field, self.name, legal)
