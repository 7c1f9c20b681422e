"""The paper's grid on two CPU cores: a small encoder, fewer epochs, higher rates.

    python train.py --config configs/short.py:sst2,0.95 \
        --config.model.path=path/to/encoder --config.data.path=path/to/sst2
    python train.py --config configs/short.py:cola,0.60,no_hidden ...

For a BERT of 6 layers and hidden size 384 (all-MiniLM-L6-v2, say). The argument is that
of paper.py; runs that differ in sparsity or ablation alone can share the first one's
teacher: --config.teacher.path=runs/short-sst2-0.95/teacher

Expected: SST-2 accuracy about 0.81 at 95 % and 0.87 at 60 %, where the dense model has
0.88; CoLA Matthews correlation about 0.23 at 60 %, dense 0.32 (docs/results.md). Time:
15 minutes to an hour on two CPU cores.
"""

from cofi_jax.config import Config
from configs import paper

LENGTHS = {"mnli": 128, "qnli": 128, "rte": 96, "wnli": 96, "squad": 384}  # else 64


def get_config(argument: str = "sst2") -> Config:
    """`paper.recipe`, shortened, for `task[,sparsity][,ablation...]`."""
    return paper.build(argument, recipe)


def recipe(task: str) -> Config:
    """Fewer rows and epochs, and rates raised to match."""
    config = paper.recipe(task)
    config.data.max_length = LENGTHS.get(task, 64)
    for stage in (config.teacher, config.prune, config.finetune):
        stage.learning_rate = 5e-5
    config.prune.prepruning_epochs = 1
    config.prune.mask_learning_rate = 0.05
    config.prune.multiplier_learning_rate = 0.05
    config.distill.match = "closest"
    config.benchmark.batch_size = 32
    config.benchmark.seq_length = 64
    config.eval_every = 250
    config.checkpoint_every = 250
    if task in paper.LARGE:
        _rows(config, teacher=16_000, prune=8_000, finetune=8_000)
        _epochs(config, teacher=3, warmup=2, prune=8, finetune=4)
    elif task == "cola":
        _epochs(config, teacher=5, warmup=2, prune=8, finetune=4)
    elif task == "wnli":  # 20 steps an epoch, and masks need some to close
        _epochs(config, teacher=3, warmup=4, prune=16, finetune=4)
    elif task == "squad":  # whose rows are windows of many tokens
        config.data.buckets = (128, 192, 256)
        config.prune.mask_learning_rate = 0.1
        config.prune.multiplier_learning_rate = 0.1
        config.benchmark.batch_size = 8
        config.benchmark.seq_length = 384
        _rows(config, teacher=2_000, prune=2_000, finetune=2_000)
        _epochs(config, teacher=2, warmup=1, prune=4, finetune=1)
    else:
        config.eval_every = 100
        _epochs(config, teacher=3, warmup=1, prune=5, finetune=4)
    if task == "stsb":
        _rows(config, teacher=0, prune=3_000, finetune=3_000)
    if task == "rte":
        config.data.buckets = (32, 64, 96)
    return config


def _rows(config, **rows):
    for stage, value in rows.items():
        getattr(config, stage).train_rows = value


def _epochs(config, *, warmup, **epochs):
    config.prune.warmup_epochs = warmup
    for stage, value in epochs.items():
        getattr(config, stage).epochs = value
