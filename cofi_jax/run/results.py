"""The report of a run: the content of `report.json`, and all that is drawn from it."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

import cofi_jax
from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.data.metrics import main_score
from cofi_jax.evaluation import latency
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import cost
from cofi_jax.report import pages
from cofi_jax.run.stages import Run
from cofi_jax.training.log import read_metrics

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Slicing(NamedTuple):
    """What is known of the sliced model before it is fine-tuned."""

    sparsity: float  # the removed share of the encoder's parameters
    score: float  # the metric that decides
    difference: float  # the largest between its logits and those of the masked model


def collect(
    run: Run,
    models: Mapping[str, tuple[Encoder, dict]],
    teacher_scores: Mapping[str, Mapping[str, float]],
    sliced: Slicing,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `report.json`, for which the models are scored and timed.

    Args:
      run: what the stages shared.
      models: the modules and parameters: `dense`, the teacher's, and `pruned`.
      teacher_scores: the teacher's metrics, by validation split.
      sliced: the figures from before fine-tuning.
      seconds: the time that each stage took.
    """
    config, scores = run.config, run.scores(*models["pruned"])
    sizes = {name: model.config for name, (model, _) in models.items()}
    # On one device, while the other processes rest.
    measured = distributed.on_process_zero(
        lambda: latency.inference(
            dict(models),
            batch_size=config.benchmark.batch_size,
            seq_length=config.benchmark.seq_length,
            repeats=config.benchmark.repeats,
        )
    )
    return {
        "task": config.data.task,
        "metric": run.task.metrics[0],
        "seed": config.seed,
        "teacher": {"score": main_score(teacher_scores), "scores": teacher_scores},
        "pruned": {
            "score": main_score(scores),
            "score_before_finetune": sliced.score,
            "scores": scores,
        },
        "sparsity": sliced.sparsity,
        "target_sparsity": config.prune.target_sparsity,
        "params": {
            "encoder": {k: cost.num_params({}, size) for k, size in sizes.items()},
            "total": {
                name: sum(x.size for x in jax.tree.leaves(params))
                for name, (_, params) in models.items()
            },
        },
        "dense": sizes["dense"].widths(),
        "kept": sizes["pruned"].widths(),
        "masked_vs_sliced_max_abs_diff": sliced.difference,
        **measured,
        "seconds": dict(seconds),
        "versions": {
            "cofi-jax": cofi_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


def write(run: Run, report: dict[str, Any]) -> None:
    """Writes pictures and pages, and last the report, which says that all is there."""
    metrics = read_metrics(run.workdir / "metrics.jsonl")
    pages.write_run(run.workdir, report, metrics, config_lib.to_json(run.config))
    files.write_json(run.workdir / "report.json", report)
