"""CoFi structured pruning of Transformer encoders in JAX.

`import cofi_jax as cofi` has what notebooks need: masks and their transforms, the
exact and the expected sparsity, slicing, saved models.
"""

from cofi_jax import hard_concrete
from cofi_jax.checkpoint import load_model, load_tokenizer, read_about, save_model
from cofi_jax.config import KINDS, Config, UserError
from cofi_jax.inference import pipeline
from cofi_jax.masks import (
    chain,
    drop_empty,
    drop_layers,
    evaluation_masks,
    harden,
    init_log_alpha,
    keep_at_least,
    keep_layers,
    mask_shapes,
    only,
    prob_active,
    round_to_device,
    round_to_multiple,
    sample,
    without,
)
from cofi_jax.model import Encoder, EncoderConfig, init_params
from cofi_jax.pretrained import save_hugging_face
from cofi_jax.slicing import PrunedSpec, expand, fold, prune, take
from cofi_jax.sparsity import (
    exact_sparsity,
    expected_sparsity,
    lagrangian,
    max_sparsity,
    meet_target,
    num_params,
    target_at,
    target_masks,
)

__version__ = "0.1.0"

__all__ = [
    "KINDS",
    "Config",
    "Encoder",
    "EncoderConfig",
    "PrunedSpec",
    "UserError",
    "chain",
    "drop_empty",
    "drop_layers",
    "evaluation_masks",
    "expand",
    "expected_sparsity",
    "fold",
    "hard_concrete",
    "harden",
    "init_log_alpha",
    "init_params",
    "keep_at_least",
    "keep_layers",
    "lagrangian",
    "load_model",
    "load_tokenizer",
    "mask_shapes",
    "max_sparsity",
    "meet_target",
    "num_params",
    "only",
    "pipeline",
    "prob_active",
    "prune",
    "read_about",
    "round_to_device",
    "round_to_multiple",
    "sample",
    "save_hugging_face",
    "save_model",
    "exact_sparsity",
    "take",
    "target_at",
    "target_masks",
    "without",
]
