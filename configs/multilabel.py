"""Texts that have any number of labels each: several models from one run.

    python train.py --config configs/multilabel.py \
        --config.model.path=path/to/encoder --config.data.path=path/to/goemotions
    python train.py --config configs/multilabel.py:0.6,0.8,budget=4 \
        --config.model.path=path/to/encoder --config.data.path=path/to/rows \
        --config.data.columns=comment --config.data.label_column=toxic,threat,insult

The argument is that of fast.py without its task, and so is the recipe. As they stand,
the columns and the budget are those of GoEmotions, which has 43,410 rows of `text`,
each with a list of `labels`.

Expected: not measured yet with all rows. A teacher of 8,000 rows, in 750 steps, learned
nothing but the most frequent label (docs/results.md), so give the teacher all of them.
Time: hours on two CPU cores; less with fewer rows for the student, which
--config.prune.train_rows and --config.finetune.train_rows set.
"""

from cofi_jax.config import Config
from cofi_jax.data.tasks import OWN
from configs import fast


def get_config(argument: str = "0.6,0.8,0.95,budget=2") -> Config:
    """The recipe for `[target...][,budget=epochs]`.

    Raises:
      UserError: for a target or a budget that there is not.
    """
    config = fast.get_config(f"{OWN},{argument}")
    config.data.columns = ("text",)
    config.data.label_column = "labels"
    config.data.problem = "multilabel"
    config.data.metrics = ("micro_f1", "macro_f1")
    config.data.max_length = 64
    return config
