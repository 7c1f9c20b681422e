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

import csv
import pathlib
from typing import Any

from cofi_jax.config import Config
from cofi_jax.models.spec import KINDS

# Scores in percent; what is not known is empty.
with pathlib.Path(__file__).with_name("paper.csv").open() as _file:
    _ROWS = list(csv.DictReader(_file))


def figures(config: Config) -> dict[str, Any] | None:
    """The paper's `score` in [0, 1], `speedup` (or None) and their `source`.

    The result is None where the paper has nothing on the task, target, encoder or
    ablation of the config. The rest of the config may differ from the paper's recipe.
    """
    prune = config.prune
    # It is not known which of several models the run ends with.
    ends_early = prune.max_drop and len(prune.targets) > 1
    if prune.target_speedup or ends_early:
        return None
    target = round(config.prune.targets[-1], 4)
    wanted = _variant(config), config.data.task, target
    for row in _ROWS:
        if (row["variant"], row["task"], float(row["target"])) == wanted:
            return {
                "score": round(float(row["score"]) / 100, 4),
                "speedup": float(row["speedup"]) if row["speedup"] else None,
                "source": row["source"],
            }
    return None


def _variant(config):
    distill, prune = config.distill, config.prune
    if prune.epochs == prune.prepruning_epochs:  # No mask is learned.
        return "other"
    if "roberta" in config.model.path.lower() or set(prune.kinds) != set(KINDS):
        return "other"
    if not distill.layers:
        return "logits_only" if distill.logits else "no_distillation"
    usual = distill.logits and distill.match != "fixed" and distill.taught == "even"
    return "full" if usual else "other"
