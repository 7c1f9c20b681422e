"""CoLA on two CPU cores: a small encoder, all of the data, 60 % removed.

    python train.py --config configs/cola_short.py \
        --config.model.path=path/to/encoder --config.data.path=path/to/cola

For a BERT of 6 layers and hidden size 384 (all-MiniLM-L6-v2, say). Expected: Matthews
correlation about 0.23 where the dense model has 0.32, twice as fast (docs/results.md).
Time: about 40 minutes on two CPU cores.
"""

from cofi_jax.config import Config
from configs import sst2_short


def get_config() -> Config:
    """`sst2_short` on the whole of CoLA."""
    config = sst2_short.get_config()
    config.data.task = "cola"
    config.teacher.train_rows = 0
    config.teacher.epochs = 5
    config.prune.train_rows = 0
    config.prune.target_sparsity = 0.60
    config.finetune.train_rows = 0
    return config
