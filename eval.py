"""Scores, sizes and speed of models, side by side.

    python eval.py --model runs/sst2_95/pruned
    python eval.py --model runs/sst2_95/teacher --model runs/sst2_95/pruned
    python eval.py --model runs/sst2_95/teacher --model runs/sst2_95/pruned \
        --batch_size 1,32 --seq_length 32,64,128 --data path/to/sst2 --json out.json

Speedups and differences of scores are those to the first model. A model is a saved one,
or a Hugging Face folder or name, dense or already sliced, as the authors of CoFi
published theirs. One of these does not say what it was made for: `--task` does, or a
saved model beside it.

    python eval.py --model princeton-nlp/CoFi-SST2-s95 --task sst2

`--labels contradiction,entailment,neutral` gives its classes in its own order, where
that is not the task's, as with their MNLI models. `--dtype bfloat16` measures what
models do in that precision.
"""

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from cofi_jax import benchmark, measure, report, rows, tasks
from cofi_jax.config import UserError, reject

_USAGE = (
    "python eval.py --model path/to/model [--model M] [--task T] [--labels A,B] "
    "[--data D] [--batch_size 1,32] [--seq_length 32,64] [--repeats N] [--dtype T] "
    "[--json F]"
)


def evaluate(
    paths: Sequence[str],
    *,
    task: str = "",
    labels: Sequence[str] = (),
    data_path: str = "",
    batch_sizes: Sequence[int] = (),
    seq_lengths: Sequence[int] = (),
    repeats: int = 30,
    dtype: str = "",
) -> dict[str, Any]:
    """What the command prints, as plain data.

    Args:
      paths: folders that `save_model` wrote, Hugging Face folders or names. The others
        are compared with the first one.
      task: of the task table, for the Hugging Face models; that of the first saved
        model if not given.
      labels: the classes of the Hugging Face models in their order; () for the task's.
      data_path: hub name or folder; empty for the one that the first saved model was
        made with.
      batch_sizes: of the timed passes; () for the paper's 128 on a GPU, and on a CPU
        32, or 8 for SQuAD.
      seq_lengths: of the timed passes; () for the paper's 128 on a GPU, 64 on a CPU, or
        384 for SQuAD, or the models' longest input where that is shorter.
      repeats: turns of each model, each of 50 ms or one pass.
      dtype: of parameters and matrix work, float32 or bfloat16; as saved if not given.

    Returns:
      `task`, its `metric` that decides, `data` (where the rows came from) and
      `examples` (their number by split; of SQuAD, questions);

      `models`, of each
        `model`, `name`    the path, and its end, short and unique
        `score`            the metric that decides, on the split that decides
        `scores`           {split: {metric: value}}, as the three that follow
        `standard_errors`  of the scores, over the examples, by bootstrap
        `differences`      of the scores to those of the first model (its own: 0)
        `difference_errors` standard errors of these, both on the same examples
        `params`           `encoder` and `total`
        `sparsity`         the fraction of the dense encoder's parameters removed
        `bytes`            of the parameters' files
        `multiply_adds`    of one sequence, by length
        `kept`             `hidden` width, `heads` and `intermediate` widths by layer

      `grid`, for each batch size, length and model
        `batch_size`, `seq_length`, `model` (its name)
        `latency_ms`, `latency_p95_ms`  median and 95th percentile of a pass
        `examples_per_second`           at the median
        `speedup`, `speedup_spread`     over the first model: median over the turns,
                                        5th and 95th percentile

      `benchmark`: `device`, `dtype`, `matmul_precision`, `repeats`.

    Raises:
      UserError: for a path, data set or length that does not fit.
    """
    paths = [str(path) for path in paths]
    loaded = measure.load(paths, task=task, labels=labels, dtype=dtype)
    data = loaded[0].data
    if data_path:
        data = dataclasses.replace(data, path=data_path)
    spans = tasks.find(data).problem == "span"
    shortest = min(loaded, key=lambda one: one.model.config.longest)
    longest = shortest.model.config.longest
    batch_size, seq_length = usual_sizes(spans=spans, longest=longest)
    batch_sizes, seq_lengths = batch_sizes or [batch_size], seq_lengths or [seq_length]
    if max(seq_lengths) > longest:
        legal = f"must be at most {longest}, the positions of {shortest.path}"
        raise reject("seq_length", max(seq_lengths), legal)
    row, columns = rows.load(data, tasks.find(data).validation)

    names = measure.names(paths)
    models = {
        name: (one.model, one.params) for name, one in zip(names, loaded, strict=True)
    }
    scored = [measure.scored(one, row, columns) for one in loaded]
    grid = measure.grid(
        models, batch_sizes=batch_sizes, seq_lengths=seq_lengths, repeats=repeats
    )
    return {
        "task": data.task,
        "metric": row.metrics[0],
        "data": data.path or row.hub or data.task,
        "examples": scored[0].examples,
        "models": [
            {"model": one.path, "name": name}
            | measure.compared(found, scored[0])
            | measure.sizes(one, seq_lengths)
            for one, name, found in zip(loaded, names, scored, strict=True)
        ],
        "grid": grid,
        "benchmark": benchmark.conditions(models) | {"repeats": repeats},
    }


def usual_sizes(*, spans: bool, longest: int) -> tuple[int, int]:
    """Batch size and length: those of the paper on a GPU, smaller ones on a CPU.

    Args:
      spans: whether the task is SQuAD.
      longest: the most tokens that the models take.
    """
    on_cpu = jax.default_backend() == "cpu"
    batch_size, seq_length = (32, 64) if on_cpu else (128, 128)
    if spans:
        batch_size, seq_length = 8 if on_cpu else 128, 384
    return batch_size, min(seq_length, longest)


def _numbers(name, texts):
    for text in texts:
        if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
            legal = "must be whole numbers above 0 with commas between them"
            raise reject(f"--{name}", ",".join(texts), legal)
    return [int(text) for text in texts]


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    values = flags.FlagValues()
    flags.DEFINE_multi_string("model", None, "one of them", flag_values=values)
    for name, text in (
        ("task", "of Hugging Face models"),
        ("data", "hub name or folder"),
        ("dtype", "float32 or bfloat16"),
        ("json", "also write the result here"),
    ):
        flags.DEFINE_string(name, "", text, flag_values=values)
    for name, text in (
        ("labels", "of Hugging Face models, in their order"),
        ("batch_size", "sequences in the timed batches"),
        ("seq_length", "tokens in their sequences"),
    ):
        flags.DEFINE_list(name, [], text, flag_values=values)
    text = "turns of each model"
    flags.DEFINE_integer("repeats", 30, text, lower_bound=1, flag_values=values)
    try:
        try:
            rest = values(argv)[1:]
        except flags.Error as error:
            raise UserError(
                f"{' '.join(str(error).split())}; usage: {_USAGE}"
            ) from error
        if rest:
            raise UserError(f"{rest[0]!r}: unknown argument; usage: {_USAGE}")
        if values.model is None:
            legal = f"must be a saved model, or several; usage: {_USAGE}"
            raise reject("--model", None, legal)
        target = pathlib.Path(values.json).absolute()
        if values.json and (target.is_dir() or not target.parent.is_dir()):
            raise reject(
                "--json", values.json, "must be a file in a folder that exists"
            )
        result = evaluate(
            values.model,
            task=values.task,
            labels=tuple(values.labels),
            data_path=values.data,
            batch_sizes=_numbers("batch_size", values.batch_size),
            seq_lengths=_numbers("seq_length", values.seq_length),
            repeats=values.repeats,
            dtype=values.dtype,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.evaluation(result))
    if values.json:
        report.write_json(target, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
