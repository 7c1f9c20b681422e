"""Loads a saved model and gives score, size, sparsity and latency.

    python eval.py --model runs/sst2_95/pruned
    python eval.py --model runs/sst2_95/pruned --data path/to/sst2 --json out.json

With `--against runs/sst2_95/teacher` both are timed in turn and the speedup stands
beside the latency.
"""

import logging
import pathlib
import sys

import jax
from absl import flags

from cofi_jax import (
    benchmark,
    checkpoint,
    loop,
    report,
    sparsity,
    training,
)
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import UserError, reject
from cofi_jax.metrics import METRICS
from cofi_jax.model import EncoderConfig


def evaluate(
    model_path: str,
    *,
    data_path: str = "",
    against: str = "",
    batch_size: int = 0,
    seq_length: int = 0,
    repeats: int = 30,
) -> dict:
    """What the command prints, as plain data.

    Args:
      model_path: a folder that `save_model` wrote.
      data_path: hub name or folder; empty for the one the model was made with.
      against: a second saved model, timed in turn with the first.
      batch_size: of the timed passes; 0 for 128 on a GPU and 32 on a CPU.
      seq_length: of the timed passes; 0 for 128 on a GPU and 64 on a CPU, or the
        model's longest input where that is shorter.
      repeats: timed passes.

    Raises:
      UserError: for a path, data set or length that does not fit.
    """
    _, spec, about = checkpoint.read_about(model_path)
    wanted = {"task", "metric", "max_length", "buckets"} | (
        {"dense"} if spec else set()
    )
    if missing := sorted(wanted - about.keys()):
        legal = f"saved without {', '.join(missing)} in `about`, needed here"
        raise reject("model", str(model_path), legal)
    if about["task"] not in data_lib.TASKS:
        legal = f"its task must be one of {', '.join(data_lib.TASKS)}"
        raise reject("model", about["task"], legal)
    model, params, spec = checkpoint.load_model(model_path)
    models = {"model": (model, params)}
    if against:
        models = {
            "against": checkpoint.load_model(against, field="against")[:2]
        } | models
    on_cpu = jax.default_backend() == "cpu"
    longest = min(m.config.max_positions for m, _ in models.values())
    seq_length = seq_length or min(64 if on_cpu else 128, longest)
    if seq_length > longest:
        raise reject("seq_length", seq_length, f"must be at most {longest}")

    data = config_lib.Data(
        task=about["task"],
        path=data_path or about.get("data_path", ""),
        max_length=about["max_length"],
        buckets=tuple(about["buckets"]),
    )
    tokenizer = checkpoint.load_tokenizer(model_path)
    examples = data_lib.load_examples(data, "validation", tokenizer)
    logits = loop.predict_all(
        training.make_predict(model),
        params,
        {},
        examples,
        batch_size=64,
        buckets=data_lib.bucket_lengths(data),
    )
    encoder = sparsity.num_params({}, model.config)
    dense = encoder
    if spec is not None:
        dense = sparsity.num_params({}, EncoderConfig.from_json(about["dense"]))
    return {
        "model": str(model_path),
        "task": about["task"],
        "metric": about["metric"],
        "score": METRICS[about["metric"]](logits, examples.labels),
        "examples": len(examples),
        "params": {
            "encoder": encoder,
            "total": sum(x.size for x in jax.tree.leaves(params)),
        },
        "sparsity": 1 - encoder / dense,
        "kept": model.config.widths(),
        **benchmark.inference(
            models,
            batch_size=batch_size or (32 if on_cpu else 128),
            seq_length=seq_length,
            repeats=repeats,
        ),
    }


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "a saved model", flag_values=values)
    flags.DEFINE_string("data", "", "hub name or folder", flag_values=values)
    flags.DEFINE_string("against", "", "a second saved model", flag_values=values)
    flags.DEFINE_string("json", "", "also write the result here", flag_values=values)
    for name, default in (("batch_size", 0), ("seq_length", 0), ("repeats", 30)):
        flags.DEFINE_integer(
            name,
            default,
            "of the timed passes",
            lower_bound=min(default, 1),
            flag_values=values,
        )
    usage = "python eval.py --model path/to/model [--data D] [--against M] [--json F]"
    try:
        try:
            rest = values(argv)[1:]
        except flags.Error as error:
            raise UserError(
                f"{' '.join(str(error).split())}; usage: {usage}"
            ) from error
        if rest:
            raise UserError(f"{rest[0]!r}: unknown argument; usage: {usage}")
        if values.model is None:
            raise reject("--model", None, f"must be a saved model; usage: {usage}")
        if values.json and not pathlib.Path(values.json).absolute().parent.is_dir():
            raise reject("--json", values.json, "must be in a folder that exists")
        result = evaluate(
            values.model,
            data_path=values.data,
            against=values.against,
            batch_size=values.batch_size,
            seq_length=values.seq_length,
            repeats=values.repeats,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.evaluation(result))
    if values.json:
        report.write_json(pathlib.Path(values.json), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
