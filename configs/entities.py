"""Names in texts, such as persons and places: several models from one run.

    python train.py --config configs/entities.py \
        --config.model.path=path/to/encoder --config.data.path=path/to/wikigold
    python train.py --config configs/entities.py:0.6,0.8,budget=4 \
        --config.model.path=path/to/encoder --config.data.path=path/to/conll

The argument is that of fast.py without its task, and so is the recipe. As they stand,
the columns are `tokens`, lists of words, and `ner_tags`, as long lists of labels such
as B-PER. Columns in files called train.conll and validation.conll have these names,
too. Labels that are integers need --config.data.labels=O,B-PER,I-PER,...

Expected: not measured yet. Time: not measured yet; wikigold has 1,122 training rows.
"""

from cofi_jax.config import Config
from cofi_jax.data.tasks import OWN
from configs import fast


def get_config(argument: str = "0.6,0.8,0.95,budget=20") -> Config:
    """The recipe for `[target...][,budget=epochs]`.

    Raises:
      UserError: for a target or a budget that there is not.
    """
    config = fast.get_config(f"{OWN},{argument}")
    config.data.columns = ("tokens",)
    config.data.label_column = "ner_tags"
    config.data.problem = "entities"
    config.data.metrics = ("f1", "precision", "recall")
    config.data.max_length = 128
    return config
