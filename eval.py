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

`--runtime onnx,onnx-int8` measures each model in onnxruntime, in float32 and in 8-bit
integers, on the CPU; `jax` is the runtime that is used without the flag. Beside the
others it computes in float32, also where a model was saved with bfloat16.

The task `own` is described as for `train.py`, and so are its files:

    python eval.py --model path/to/model --task own --data path/to/folder \
        --config.data.columns=title,body --config.data.labels=no,yes
"""

import pathlib
import sys

from cofi_jax import commands, files
from cofi_jax.errors import reject
from cofi_jax.evaluation.evaluate import JAX, evaluate
from cofi_jax.export import runtimes
from cofi_jax.report import tables
from cofi_jax.run import cli

_USAGE = (
    "python eval.py --model path/to/model [--model M] [--task T] [--labels A,B] "
    "[--data D] [--batch_size 1,32] [--seq_length 32,64] [--repeats N] [--dtype T] "
    "[--runtime jax,onnx,onnx-int8] [--json F] [--config.data.X=Y]"
)

# The fields that have flags of their own, or none.
_FLAGS = {"task": "--task", "path": "--data", "extra_file": ""}


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    for name, default, kind, text in (
        ("task", "", str, "of Hugging Face models"),
        ("labels", (), commands.words, "of Hugging Face models, in their order"),
        ("data", "", str, "a hub name or a folder"),
        ("batch_size", (), commands.positives, "sequences in the timed batches"),
        ("seq_length", (), commands.positives, "tokens in their sequences"),
        ("repeats", 30, commands.positive, "turns of each model"),
        ("dtype", "", str, "float32 or bfloat16"),
        ("runtime", ("jax",), commands.words, "jax, onnx and onnx-int8"),
        ("json", "", str, "also write the result here"),
    ):
        parser.add_argument(f"--{name}", default=default, type=kind, help=text)
    text = "a saved model or a Hugging Face model, several times for several"
    parser.add_argument("--model", action="append", required=True, help=text)
    options, rest = parser.parse_known_args(argv[1:])
    data = dict(_fields_of_data(rest))
    opened_in = runtimes.openers(options.runtime, "--runtime")
    if options.dtype == "bfloat16" and opened_in != JAX:
        raise reject("--dtype", options.dtype, "is for --runtime jax alone")
    target = pathlib.Path(options.json).absolute()
    if options.json:
        try:
            files.check_writable(target)
        except OSError as error:
            legal = "must be a file in a folder that exists and can be written"
            legal = f"{legal} ({error.strerror})"
            raise reject("--json", options.json, legal) from error
    result = evaluate(
        options.model,
        task=options.task,
        labels=options.labels,
        data_path=options.data,
        data=data,
        batch_sizes=options.batch_size,
        seq_lengths=options.seq_length,
        repeats=options.repeats,
        dtype=options.dtype,
        runtimes=opened_in,
    )
    print(tables.evaluation(result))
    if options.json:
        files.write_json(target, result)
    return 0


def _fields_of_data(arguments):
    """The fields of `config.Data` that flags of `train.py` give, and their values."""
    for field, value in cli.overrides(arguments, _USAGE):
        section, _, name = field.rpartition(".")
        if section != "data" or name in _FLAGS:
            flag = _FLAGS.get(name, "") if section == "data" else ""
            legal = f"is {flag} here" if flag else "is not for eval.py"
            raise reject(f"--config.{field}", value, legal)
        yield name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv))
