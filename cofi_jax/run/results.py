"""The report of a run: the content of `report.json`, and all that is drawn from it."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

import cofi_jax
from cofi_jax import config as config_lib
from cofi_jax import distributed, files
from cofi_jax.data.metrics import main_score
from cofi_jax.evaluation import latency
from cofi_jax.export import certificate, runtimes
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import cost
from cofi_jax.pruning import latency as latency_lib
from cofi_jax.report import pages
from cofi_jax.run import stages
from cofi_jax.run.stages import Run, Stair
from cofi_jax.training.log import read_metrics

_ONE_SIDED = 1.645  # standard errors: 5 % of a normal distribution lie beyond
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Slicing(NamedTuple):
    """What is known of the sliced model before it is fine-tuned."""

    sparsity: float  # the removed share of the encoder's parameters
    score: float  # the metric that decides
    difference: float  # the largest between its logits and those of the masked model
    seconds: Mapping[str, float]  # those of the fit, by its name, if there was one


def collect(
    run: Run,
    stair: Stair,
    models: Mapping[str, tuple[Encoder, dict]],
    reached: Mapping[str, Mapping[str, Any]],
    sliced: Slicing,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `report.json`, for which the models are timed.

    Args:
      run: what the stages shared.
      stair: which of the run's models it is.
      models: the modules and parameters: `dense`, the teacher's, and `pruned`.
      reached: what `Run.reached` says of each of them.
      sliced: the figures from before fine-tuning.
      seconds: the time that each stage, importance and fit took.
    """
    config, found, more = run.config, {}, {}
    if run.task.scored_by_answers:
        more["agreement"] = True
    for name, parts in reached.items():
        found[name] = {"score": main_score(parts["scores"])} | parts
        found[name].pop("settings", None)  # The saved model has them.
    sizes = {name: model.config for name, (model, _) in models.items()}
    # On one device, while the other processes rest.
    runtime = config.benchmark.runtime
    opener = None if runtime == "jax" else runtimes.timed(runtime, "benchmark.runtime")
    measured = distributed.on_process_zero(
        lambda: latency.inference(
            dict(models),
            batch_size=config.benchmark.batch_size,
            seq_length=config.benchmark.seq_length,
            repeats=config.benchmark.repeats,
            opener=opener,
            rest_ms=runtimes.rest_ms(runtime),
        )
    )
    how = measured["benchmark"]
    how |= {"runtime": runtime, "dtype": runtimes.precision(runtime, how["dtype"])}
    target: dict[str, Any] = {"target_sparsity": stair.target}
    if run.table:
        target = {"target_speedup": _asked(run, stair, sizes["pruned"])}
    return {
        "task": config.data.task,
        "metric": run.task.metrics[0],
        **more,
        "seed": config.seed,
        "teacher": found["dense"],
        "pruned": found["pruned"] | {"score_before_finetune": sliced.score},
        "sparsity": sliced.sparsity,
        **target,
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


def _asked(run, stair, sizes):
    """What was asked, predicted and measured, how it was found, and beside what."""
    time = latency_lib.cost(run.table)
    tried = [each._asdict() for each in stages.passes(run, stair)]

    def predicted(sizes):
        return float(time.exact({}, run.dense) / time.exact({}, sizes))

    found = {
        "asked": stair.speedup,
        "predicted": predicted(sizes),
        "chosen": tried[0] if tried else None,
        "passes": tried[1:],
        "table": run.times,
    }
    if widths := stages.for_parameters(run, stair):
        other = dataclasses.replace(sizes, **widths)
        found["for_parameters"] = other.widths() | {
            "encoder": cost.num_params({}, other),
            "predicted": predicted(other),
        }
    return found


def drop(
    metric: str, before: certificate.Result, after: certificate.Result, allowed: float
) -> dict[str, Any]:
    """Whether a model keeps the score of the dense one, by a one-sided test.

    Both answered the same rows, so the error is that of the differences row by row. The
    score counts as kept unless it falls by more than what is allowed at a level of 5 %.

    Args:
      metric: the one that decides.
      before: what the dense model answers.
      after: what the smaller model answers.
      allowed: how far the score may fall.

    Returns:
      `allowed`; `fall`, of the score; `error`, its standard error; `beyond`, by how
      much the fall exceeds what is allowed and the error explains, at most 0 where the
      score is kept; and `kept`.
    """
    fall = before.scores[metric] - after.scores[metric]
    error = certificate.standard_error(metric, before, after)
    beyond = fall - allowed - _ONE_SIDED * error
    found = {"allowed": allowed, "fall": fall, "error": error, "beyond": beyond}
    return found | {"kept": bool(beyond <= 1e-9)}  # Scores are rounded.


def kept(report: Mapping[str, Any]) -> bool:
    """Whether a model keeps the score, as far as its run asked for that."""
    return report.get("drop", {}).get("kept", True)


def of_run(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of a run that made these models: that of the smallest one.

    It is the smallest that keeps the score, where that was asked for and one does. If
    there are several models, `family` has the reports of all, the largest first.
    """
    found = [report for report in reports if kept(report)] or reports[:1]
    return found[-1] | ({"family": list(reports)} if len(reports) > 1 else {})


def write(run: Run, report: dict[str, Any]) -> None:
    """Writes pictures and pages, and last the report, which says that all is there."""
    metrics = read_metrics(run.workdir / "metrics.jsonl")
    pages.write_run(run.workdir, report, metrics, config_lib.to_json(run.config))
    files.write_json(run.workdir / "report.json", report)
