"""SST-2, 95 % of the encoder removed: the paper's recipe.

    python train.py --config configs/sst2_95.py

Needs the Hugging Face hub for bert-base-uncased and GLUE; without it:

    python train.py --config configs/sst2_95.py \
        --config.model.path=path/to/bert-base-uncased --config.data.path=path/to/sst2

Expected: accuracy about 0.90 (the paper: 90.6 at 95 %, its dense BERT-base 93.1).
Time: 40 epochs of 67,349 sentences, hours on one GPU; not for a CPU, for which
docs/results.md has shorter recipes.
"""

from cofi_jax.config import Config


def get_config() -> Config:
    """Appendix A of the paper; the rest are the defaults."""
    config = Config()
    config.data.task = "sst2"
    config.data.max_length = 128
    config.prune.target_sparsity = 0.95
    config.prune.epochs = 20
    config.prune.prepruning_epochs = 1
    config.prune.warmup_epochs = 2
    config.prune.learning_rate = 2e-5
    config.prune.mask_learning_rate = 0.01
    config.prune.multiplier_learning_rate = 0.01
    config.distill.logits = 0.1
    config.distill.layers = 0.9
    config.distill.temperature = 2.0
    config.finetune.epochs = 20
    config.finetune.learning_rate = 2e-5
    return config
