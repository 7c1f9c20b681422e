"""SST-2 on two CPU cores: a small encoder, a part of the data, 95 % removed.

    python train.py --config configs/sst2_short.py \
        --config.model.path=path/to/encoder --config.data.path=path/to/sst2

For a BERT of 6 layers and hidden size 384 (all-MiniLM-L6-v2, say). Expected: accuracy
about 0.81 where the dense model has 0.88, 13 times as fast (docs/results.md). Time:
under an hour on two CPU cores.
"""

from cofi_jax.config import Config
from configs import sst2_95


def get_config() -> Config:
    """`sst2_95` with fewer rows and epochs, and rates raised to match."""
    config = sst2_95.get_config()
    config.data.max_length = 64
    config.teacher.train_rows = 16_000
    config.teacher.epochs = 3
    config.teacher.learning_rate = 5e-5
    config.prune.train_rows = 8_000
    config.prune.epochs = 8
    config.prune.learning_rate = 5e-5
    config.prune.mask_learning_rate = 0.05
    config.prune.multiplier_learning_rate = 0.05
    config.finetune.train_rows = 8_000
    config.finetune.epochs = 4
    config.finetune.learning_rate = 5e-5
    config.benchmark.batch_size = 32
    config.benchmark.seq_length = 64
    config.eval_every = 250
    config.checkpoint_every = 250
    return config
