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
from configs import paper


def get_config() -> Config:
    """The same as `paper.py:sst2,0.95`."""
    return paper.get_config("sst2,0.95")
