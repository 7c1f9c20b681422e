"""CoFi structured pruning of Transformer encoders in JAX.

`import cofi_jax as cofi` has what notebooks need: masks and their transforms, the
exact and the expected sparsity, slicing, saved models. A name's module is imported
when the name is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "checkpoint": ("load_model", "load_tokenizer", "read_about", "save_model"),
    "config": ("KINDS", "Config", "UserError"),
    "hard_concrete": (),
    "inference": ("pipeline",),
    "masks": (
        "chain",
        "drop_empty",
        "drop_layers",
        "evaluation_masks",
        "harden",
        "init_log_alpha",
        "keep_at_least",
        "keep_layers",
        "mask_shapes",
        "only",
        "prob_active",
        "round_to_device",
        "round_to_multiple",
        "sample",
        "without",
    ),
    "model": ("Encoder", "EncoderConfig", "init_params"),
    "pretrained": ("save_hugging_face",),
    "slicing": ("PrunedSpec", "expand", "fold", "prune", "take"),
    "sparsity": (
        "exact_sparsity",
        "expected_sparsity",
        "lagrangian",
        "max_sparsity",
        "meet_target",
        "num_params",
        "target_at",
        "target_masks",
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_MODULES, "hard_concrete"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        try:
            return importlib.import_module(f"cofi_jax.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"cofi_jax.{name}":
                raise
            text = f"module 'cofi_jax' has no attribute {name!r}"
            raise AttributeError(text) from None
    module = importlib.import_module(f"cofi_jax.{_MODULES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
