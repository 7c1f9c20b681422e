"""Rankings of passages for queries: several cross-encoders from one run.

    python train.py --config configs/ranking.py \
        --config.model.path=path/to/encoder --config.data.path=path/to/wikiqa
    python train.py --config configs/ranking.py:0.6,0.8,budget=4 \
        --config.teacher.path=path/to/cross-encoder --config.data.path=path/to/rows \
        --config.data.columns=question,answer --config.data.group_column=question_id

The argument is that of fast.py without its task, and so is the recipe. As they stand,
the columns are `query` and `passage`, and `label` is 1 for a relevant passage and 0 for
another one, or a grade, or the score of another model. The rows of a query have the
same `query_id`; with --config.data.group_column= they have the same text.

Expected: not measured yet as it stands. With learned masks, an encoder of 6 layers and
the questions of WikiQA that have an answer, an NDCG@10 of 0.79 lost nothing up to 80 %
(docs/results.md). Time: less than an hour on one CPU core with 6,000 rows for the
teacher and 3,000 for the student.
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
    config.data.columns = ("query", "passage")
    config.data.group_column = "query_id"
    config.data.problem = "ranking"
    config.data.metrics = ("ndcg_at_10", "mrr_at_10", "recall_at_10")
    config.data.max_length = 128
    return config
