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

import logging
import pathlib
import sys

from absl import flags

from cofi_jax import files
from cofi_jax.errors import UserError, reject
from cofi_jax.evaluation.evaluate import evaluate
from cofi_jax.report import tables

_USAGE = (
    "python eval.py --model path/to/model [--model M] [--task T] [--labels A,B] "
    "[--data D] [--batch_size 1,32] [--seq_length 32,64] [--repeats N] [--dtype T] "
    "[--json F]"
)


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
    print(tables.evaluation(result))
    if values.json:
        files.write_json(target, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
