"""Figures of the paper (Xia, Zhong, Chen, ACL 2022), to be put beside one's own.

All of them are of BERT-base with the whole recipe, scored on the validation rows;
speedups are the authors', on a V100 in batches of 128. Only figures that could be read
in a source are here, so tables 4 and 11 and parts of table 2 are missing. The sources:

- Table 1: MNLI at 26 of 85 million parameters.
- Table 2: SST-2, QNLI, MNLI and SQuAD, which table 5 repeats; RTE and MRPC, which the
  authors' talk draws as bars; QQP as GRAIN (Yang et al., ACL 2023) quotes it.
- Table 5: the distillation ablation, on slide 35 of the talk.
- Figure 2: read off the picture in the authors' repository, to 0.1 of either axis.
- README: the models that the authors published, named there with score and speedup.
  They are not always those of table 2. Where a score is table 2's and the speedup is
  that of the published model, the source says so.
"""

from typing import Any

from cofi_jax.config import Config
from cofi_jax.models.spec import KINDS

_MODEL = "table 2; speedup: the authors' README"
_FIGURE = "figure 2"

# By task and target: the score in percent, the speedup and the source.
_FULL = {
    "sst2": {
        0.60: (93.0, 2.1, "the authors' README"),
        0.70: (93.0, 2.7, _FIGURE),
        0.75: (92.9, 3.3, _FIGURE),
        0.80: (92.9, 3.7, _FIGURE),
        0.85: (92.6, 4.7, _FIGURE),
        0.90: (91.5, 7.0, _FIGURE),
        0.95: (90.6, 12.2, _MODEL),
    },
    "qnli": {
        0.60: (91.8, 2.1, "the authors' README"),
        0.70: (91.3, 2.7, _FIGURE),
        0.75: (91.3, 3.1, _FIGURE),
        0.80: (90.4, 3.7, _FIGURE),
        0.85: (89.7, 4.9, _FIGURE),
        0.90: (88.9, 6.6, _FIGURE),
        0.95: (86.1, 12.1, _MODEL),
    },
    "mnli": {
        0.60: (85.3, 2.1, "the authors' README"),
        0.70: (84.9, 2.7, "table 1"),
        0.75: (84.8, 3.1, _FIGURE),
        0.80: (84.3, 3.8, _FIGURE),
        0.85: (83.5, 5.0, _FIGURE),
        0.90: (82.6, 6.8, _FIGURE),
        0.95: (80.6, 12.1, "table 1"),
    },
    "squad": {
        0.60: (89.1, 2.0, "the authors' README"),
        0.70: (88.6, 2.6, _FIGURE),
        0.75: (88.0, 3.1, _FIGURE),
        0.80: (87.3, 3.8, _FIGURE),
        0.85: (86.4, 4.7, _FIGURE),
        0.90: (84.1, 6.5, _FIGURE),
        0.95: (82.6, 8.7, "table 2; the model is 92.4 % sparse"),
    },
    "qqp": {0.95: (90.1, None, "table 2")},
    "cola": {0.60: (60.4, 2.0, "the authors' README"), 0.95: (38.9, 12.3, "README")},
    "rte": {0.60: (72.6, 2.0, "the authors' README"), 0.95: (64.7, None, "table 2")},
    "mrpc": {0.60: (86.8, 2.0, "the authors' README"), 0.95: (82.6, 12.2, _MODEL)},
}

# Table 5 at a target of 0.95: scores in percent.
_AT_95 = {
    "no_distillation": {"sst2": 86.6, "qnli": 84.2, "mnli": 78.2, "squad": 75.8},
    "logits_only": {"sst2": 91.1, "qnli": 85.1, "mnli": 79.7, "squad": 82.5},
}


def figures(config: Config) -> dict[str, Any] | None:
    """The paper's `score` in [0, 1], `speedup` (or None) and their `source`.

    The result is None where the paper has nothing on the task, target, encoder or
    ablation of the config. The rest of the config may differ from the paper's recipe.
    """
    task, target = config.data.task, round(config.prune.targets[-1], 4)
    variant = _variant(config)
    if variant == "full" and target in _FULL.get(task, {}):
        score, speedup, source = _FULL[task][target]
    elif task in _AT_95.get(variant, {}) and target == 0.95:
        score, speedup, source = _AT_95[variant][task], None, "table 5"
    else:
        return None
    return {"score": round(score / 100, 4), "speedup": speedup, "source": source}


def _variant(config):
    distill = config.distill
    if "roberta" in config.model.path.lower() or set(config.prune.kinds) != set(KINDS):
        return "other"
    if not distill.layers:
        return "logits_only" if distill.logits else "no_distillation"
    usual = distill.logits and distill.match != "fixed" and distill.taught == "even"
    return "full" if usual else "other"
