"""Baselines: other structures than fast.py's, with the training of its models.

    python train.py --config configs/baselines.py:stsb,every,2 \
        --config.teacher.path=runs/fast-stsb/teacher --config.data.path=path/to/stsb

The argument is the task, the name of a baseline and its size:

    first,k         the first k layers (Sajjad et al., 2020)
    every,n         every n-th layer; every,2 is how DistilBERT begins
    tinybert        a third of the layers, and in each of them 0.4 of the width of all
                    parts; of BERT-base, that is TinyBERT's shape of 4 layers of 312
    heads,s         all but the least important heads (Michel et al., 2019)
    ffn,s           all but the feed-forward units of the smallest magnitude
    one_shot,s      all but the least important heads, units and blocks

where s is the fraction of the encoder's parameters to remove. Each is cut from the
teacher at once, and then distilled for as many steps as fast.py takes to 80 %. For the
same scores without distillation add --config.distill.logits=0 --config.distill.layers=0

Expected: not measured yet. Time: minutes to half an hour on two CPU cores with an
encoder of 6 layers.
"""

from cofi_jax.config import Config
from cofi_jax.errors import reject
from cofi_jax.models.spec import KINDS
from configs import fast

# The widths of TinyBERT's 4 layers as fractions of BERT-base's.
_TINYBERT = {"hidden": 312 / 768, "head": 312 / 768, "intermediate": 1200 / 3072}
_ONE_SHOT = {"heads": ("head",), "ffn": ("intermediate",), "one_shot": KINDS[:4]}
NAMES = ("first", "every", "tinybert", *_ONE_SHOT)


def get_config(argument: str = "sst2,every,2") -> Config:
    """The baseline for `task,name[,size]`.

    Raises:
      UserError: for a task, name or size that there is not.
    """
    task, name, size = [*argument.split(",", 2), "", ""][:3]
    if name not in NAMES:
        raise reject("baseline", name, f"must be one of {', '.join(NAMES)}")
    config = fast.get_config(task)
    prune = config.prune
    config.finetune.epochs += prune.recover_epochs
    prune.recover_epochs = prune.reconstruction_batches = 0
    prune.targets = (0.8,)
    prune.seeds = "magnitude" if name == "ffn" else "importance"
    prune.seed_batches = 40
    if name == "first":
        prune.structure.layers = f":{_count(size)}"
    elif name == "every":
        prune.structure.layers = f"::{_count(size)}"
    elif name == "tinybert":
        if size:
            raise reject("size", size, "must be left out, tinybert has one size")
        prune.structure.layers = "2::3"
        vars(prune.structure).update(_TINYBERT)
    else:
        prune.kinds, prune.targets = _ONE_SHOT[name], (_fraction(size),)
    return config


def _count(size):
    if not (size.isdecimal() and int(size) > 0):
        raise reject("size", size, "must be a whole number of layers above 0")
    return int(size)


def _fraction(size):
    legal = "must be the fraction of the encoder's parameters to remove, such as 0.3"
    try:
        return float(size)
    except ValueError as error:
        raise reject("size", size, legal) from error
