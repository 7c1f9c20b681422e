"""Writes a saved model in other formats, each checked against the masked model.

    python -m cofi_jax.export --model runs/sst2_95/pruned
    python -m cofi_jax.export --model runs/sst2_95/pruned --formats onnx,stock
    python -m cofi_jax.export --model runs/sst2_95/pruned --vocabulary path/to/texts

The formats appear as folders beside the saved parameters, each with a `check.json`:
`transformers` and, only when asked for, `stock`, a plain BERT (both need `pip install
'cofi-jax[torch]'`), `onnx` and, only when asked for, `onnx-int8`, in 8-bit integers
(both need `'cofi-jax[onnx]'`), and `stablehlo`. The model card, `README.md`, says how
each is loaded.

`onnx-int8` comes with a certificate of what it costs and gains, beside the dense model
if that lies in the folder `teacher` next to the saved model. It is not written where
the score falls by more than `--max_loss` and by more than two standard errors of that.

With `--vocabulary`, a model with the tokens alone that these texts and the validation
rows need is saved first, as the folder `pruned-trimmed` beside the saved model, and it
is that one which is written in the formats. The texts are a file or a folder of rows
with the task's columns, or of `.txt` with a text in each line.
"""

import sys

from cofi_jax import commands
from cofi_jax.errors import printable, reject
from cofi_jax.export import export, trim
from cofi_jax.export.formats import CARDS
from cofi_jax.report import model_card

_USAGE = (
    "python -m cofi_jax.export --model path/to/pruned [--formats A,B] "
    "[--vocabulary TEXTS] [--data D] [--rows N] [--dtype T] [--batch_size N] "
    "[--seq_length N] [--repeats N] [--max_loss X]"
)
_DEFAULT = "transformers,onnx,stablehlo"


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    parser.add_argument("--model", required=True, help="a saved model")
    parser.add_argument(
        "--formats", default=_DEFAULT, help=f"{_DEFAULT}, onnx-int8 and stock"
    )
    parser.add_argument(
        "--vocabulary", default="", help="texts whose tokens alone are to stay"
    )
    parser.add_argument("--data", default="", help="hub name or folder")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of weights; bfloat16 is for --formats transformers",
    )
    parser.add_argument(
        "--max_loss",
        type=float,
        help=f"by how much the score of onnx-int8 may fall; {export.MAX_LOSS} if not "
        "given",
    )
    numbers = {
        "rows": (0, 0, "validation rows to compare; 0 for all"),
        "batch_size": (32, 1, "sequences in a batch of the timed passes"),
        "seq_length": (0, 0, "tokens of a sequence there; 0 for 64, or the longest"),
        "repeats": (30, 1, "turns of the timed passes"),
    }
    for name, (default, _, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(argv[1:])
    for name, (_, least, _) in numbers.items():
        if (value := getattr(args, name)) < least:
            raise reject(f"--{name}", value, f"must be {least} or more")
    checks = export.export(
        args.model,
        commands.words(args.formats),
        vocabulary=args.vocabulary,
        data_path=args.data,
        num_rows=args.rows,
        dtype=args.dtype,
        batch_size=args.batch_size,
        seq_length=args.seq_length,
        repeats=args.repeats,
        max_loss=args.max_loss,
    )
    if args.vocabulary:
        print(f"{printable(trim.folder(args.model))}:")
    print(model_card.checked(checks, CARDS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
