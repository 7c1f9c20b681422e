"""The embedded default: no hub, no GPU, nothing to download.

    python train.py --config configs/demo.py

A small language of sentences whose label hangs on word order, negation and
contrast; a small encoder learns it from scratch, is pruned by 90 %, sliced and
fine-tuned. Expected: accuracy above 0.95 before and after, at least 3 times faster.
Time: three to six minutes on two CPU cores.
"""

from cofi_jax.config import Config


def get_config() -> Config:
    """Short schedules, so high rates."""
    config = Config()
    config.model.path = ""
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.hidden_size = 128
    config.model.intermediate_size = 512
    config.data.task = "demo"
    config.data.max_length = 20
    config.data.buckets = (20,)
    config.teacher.epochs = 3
    config.teacher.batch_size = 64
    config.teacher.learning_rate = 7e-4
    config.teacher.warmup_steps = 50
    config.prune.targets = (0.90,)
    config.prune.epochs = 5
    config.prune.prepruning_epochs = 1
    config.prune.warmup_epochs = 2
    config.prune.train_rows = 8000
    config.prune.batch_size = 64
    config.prune.learning_rate = 5e-4
    config.prune.mask_learning_rate = 0.1
    config.prune.multiplier_learning_rate = 0.2
    config.finetune.train_rows = 8000
    config.finetune.epochs = 2
    config.finetune.batch_size = 64
    config.finetune.learning_rate = 5e-4
    config.finetune.schedule = "linear"
    config.benchmark.batch_size = 32
    config.benchmark.seq_length = 20
    config.eval_batch_size = 128
    config.log_every = 10
    config.eval_every = 50
    config.checkpoint_every = 50
    return config
