"""CoLA, 95 % of the encoder removed: the paper's recipe for small data sets.

    python train.py --config configs/cola_95.py

Expected: Matthews correlation about 0.36 to 0.39 (the paper 35.6, the authors'
published model 38.9; dense BERT-base 61.2). Time: 120 epochs of 8,551 sentences,
an hour or more on one GPU. Data and model as in sst2_95.py.
"""

from cofi_jax.config import Config
from configs import sst2_95


def get_config() -> Config:
    """`sst2_95` with the small data sets' longer schedule, ordered matching."""
    config = sst2_95.get_config()
    config.data.task = "cola"
    config.prune.epochs = 100
    config.prune.prepruning_epochs = 4
    config.prune.warmup_epochs = 20
    config.distill.match = "ordered"
    config.eval_every = 50
    return config
