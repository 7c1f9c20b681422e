"""Vectors of texts, learned from an embedding model without labels: several models.

    python train.py --config configs/vectors.py \
        --config.teacher.path=path/to/sentence-transformers-folder \
        --config.data.path=path/to/texts
    python train.py --config configs/vectors.py:0.6,0.8,budget=4 \
        --config.teacher.path=path/to/sentence-transformers-folder \
        --config.data.path=path/to/texts --config.data.columns=sentence \
        --config.data.pairs=path/to/stsb --config.data.retrieval=path/to/scifact

The argument is that of fast.py without its task, and so is the recipe. The texts are
files of which each row has a `text`, or .txt files with a text in each line.

Expected: not measured yet as it stands. With learned masks, all-MiniLM-L6-v2, which has
a Spearman correlation of 0.867 on the validation pairs of STS-B, kept 0.837 at 60 %,
0.827 at 80 % and 0.800 at 95 % (docs/results.md). Time: less than three quarters of an
hour with 4,000 sentences on one CPU core.
"""

from cofi_jax.config import Config
from cofi_jax.data.tasks import OWN
from configs import fast


def get_config(argument: str = "0.6,0.8,0.95,budget=4") -> Config:
    """The recipe for `[target...][,budget=epochs]`.

    Raises:
      UserError: for a target or a budget that there is not.
    """
    config = fast.get_config(f"{OWN},{argument}")
    config.model.path = ""  # The student starts from the teacher.
    config.data.columns = ("text",)
    config.data.problem = "vectors"
    config.data.max_length = 64
    config.distill.logits = 1.0
    return config
