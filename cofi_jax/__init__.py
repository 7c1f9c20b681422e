"""CoFi structured pruning of Transformer encoders in JAX.

`import cofi_jax as cofi` has what notebooks need: masks and their transforms, the
exact and the expected sparsity, slicing, saved models. A module is imported when one of
its names is first used.
"""

from etils import epy as _epy

__version__ = "0.1.0"

with _epy.lazy_api_imports(globals()):
    from cofi_jax.checkpoints.huggingface import save_hugging_face
    from cofi_jax.checkpoints.saved_model import (
        load_model,
        load_tokenizer,
        read_about,
        save_model,
    )
    from cofi_jax.config import Config
    from cofi_jax.errors import UserError
    from cofi_jax.evaluation.pipeline import pipeline
    from cofi_jax.models.bert import Encoder, init_params
    from cofi_jax.models.config import EncoderConfig
    from cofi_jax.models.spec import KINDS
    from cofi_jax.pruning import hard_concrete
    from cofi_jax.pruning.constraint import (
        expected_sparsity,
        lagrangian,
        max_sparsity,
        meet_target,
        target_at,
        target_masks,
    )
    from cofi_jax.pruning.cost import exact_sparsity, num_params
    from cofi_jax.pruning.importance import ranks, seed_log_alpha
    from cofi_jax.pruning.masks import (
        evaluation_masks,
        init_log_alpha,
        mask_shapes,
        prob_active,
        sample,
    )
    from cofi_jax.pruning.slicing import PrunedSpec, expand, fold, prune, take
    from cofi_jax.pruning.transforms import (
        chain,
        drop_empty,
        drop_layers,
        harden,
        keep_at_least,
        keep_layers,
        keep_most,
        only,
        round_to_device,
        round_to_multiple,
        without,
    )
    from cofi_jax.report.model_card import text as model_card
    from cofi_jax.training.importance import importance
    from cofi_jax.training.reconstruction import reconstruct
    from cofi_jax.training.surgeon import compensated_importance
