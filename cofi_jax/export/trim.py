"""A saved model without the tokens that nobody uses, which is a saved model itself.

    pruned/ and texts -> pruned-trimmed/, whose logits of these texts are the same

Most bytes of a small encoder are in its table of words. The tokens that the texts need
stay, and those that the validation rows need, so that the check can be exact: all of
them must be tokenised as before, and the logits of the rows must be the same.

How other texts fare cannot be told from texts whose tokens stay. So a tenth of them is
also tokenised with what the others alone need.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import saved_model, tokenizers, vocabulary
from cofi_jax.data import sources
from cofi_jax.errors import reject
from cofi_jax.export import verify
from cofi_jax.report import model_card

_HELD_OUT = 10  # One of so many texts is held out.


def folder(path: str | Path) -> Path:
    """The folder of the trimmed model, beside that of the saved model at `path`."""
    path = Path(path).expanduser().absolute()
    return path.with_name(f"{path.name}-trimmed")


def trim(
    path: Path, texts_path: str, *, data_path: str = "", num_rows: int = 0
) -> Path:
    """Saves the model at `path` with the tokens alone that texts and its rows need.

    A trimmed model that is there already is written anew, and what was exported of it
    is gone. What was found stands in the description of the trimmed model, as
    `about["vocabulary"]`:

      `tokens`        their number `before` and `after`
      `bytes_before`  the size of the saved model at `path`
      `texts`         the number of different texts
      `validation`    the number of `rows` of all splits, and of the tokens `added` for
                      them; the number of rows `compared`, and the `max_abs_difference`
                      of their logits
      `held_out`      the number of `texts`, the share `tokenised_otherwise`, and of
                      their pieces the shares `unknown` and `unknown_before`; it is left
                      out where there are fewer than ten texts

    Args:
      path: a folder that `save_model` wrote.
      texts_path: the file or the folder of the texts, see `sources.texts`.
      data_path: a name on the hub or a folder; "" for the one the model was made with.
      num_rows: how many rows of the first validation split are `compared`, as in
        `verify.validation`.

    Returns:
      The folder of the trimmed model, see `folder`.

    Raises:
      UserError: for a model or texts that do not fit, where something else has the name
        of the folder, and where the trimmed model computes something else.
    """
    config, spec, about = saved_model.read_about(path)
    target, source = _target(path, about), {"field": "model", "path": str(path)}
    task = saved_model.saved_task(str(path))
    if data_path:
        task = task.at(data_path)
    tokenizer = saved_model.load_tokenizer(path)
    tokenizers.check_tokenizer(tokenizer, config, **source)
    vocabulary.check(tokenizer, **source)
    texts = sources.texts(texts_path, task, field="vocabulary")
    task, splits = sources.load(task, task.validation)

    def trimmed(seen):
        ids = vocabulary.kept(tokenizer, seen, config)
        return ids, vocabulary.trim(tokenizer, ids, config, **source)

    held_out = texts[_HELD_OUT - 1 :: _HELD_OUT]
    others = [text for i, text in enumerate(texts, 1) if i % _HELD_OUT]
    first = vocabulary.seen(tokenizer, others)
    seen = first | vocabulary.seen(tokenizer, held_out)
    if seen <= set(tokenizer.all_special_ids):
        legal = "must hold texts of which the tokenizer knows a piece"
        raise reject("vocabulary", texts_path, legal)
    params = verify.params_on_cpu(path)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = verify.in_jax(params, config)
        splits = {
            name: verify.answered(model, task, columns, tokenizer)
            for name, columns in splits.items()
        }
    cells = [t for each in splits.values() for name in task.columns for t in each[name]]
    rows = [" ".join(task.problem.texts(cell)) for cell in cells]
    before = {k: task.tokenise(columns, tokenizer) for k, columns in splits.items()}
    # Rows may be cut otherwise than their texts: a question without spaces before it.
    taken = [each for split in before.values() for each in split.input_ids]
    needed = vocabulary.seen(tokenizer, rows).union(*map(np.ndarray.tolist, taken))
    ids, small = trimmed(seen | needed)
    if any(changed for *_, changed in _encodings(tokenizer, small, texts)):
        raise _otherwise("one of the texts", source)
    found = {
        "tokens": {"before": len(tokenizer.get_vocab()), "after": len(ids)},
        "bytes_before": verify.files(path, saved_model.FILES)["bytes"],
        "texts": len(texts),
        "validation": {
            "rows": sum(len(each[task.label_column]) for each in splits.values()),
            "added": len(ids) - len(vocabulary.kept(tokenizer, seen, config)),
        },
    }
    sizes = dataclasses.replace(config, vocab_size=len(ids))
    models = [(params, config), (vocabulary.take(params, ids), sizes)]
    after = {k: task.tokenise(columns, small) for k, columns in splits.items()}
    _check_rows(before, after, _renumbered(tokenizer, small), config, source)
    split = task.validation[0]
    examples = before[split], after[split]
    found["validation"] |= _compare(task, models, examples, num_rows)
    if held_out:
        found["held_out"] = _fare(tokenizer, trimmed(first)[1], held_out)
    about = about | {"vocabulary": found}
    if spec:
        about["dense"] = about["dense"] | {"vocab_size": len(ids)}
    with files.new_folder(target, replace=True) as partial:
        partial.rmdir()  # It is `save_model` that makes it.
        card = model_card.text(sizes, about, {})
        options = {"tokenizer": small, "about": about, "readme": card}
        saved_model.save_model(partial, *models[1], spec, **options)
    return target


def _target(path, about):
    """The folder to write, unless something else is there."""
    if "vocabulary" in about:
        legal = "is trimmed already; trim the model that it was made of"
        raise reject("model", str(path), legal)
    target = folder(path)
    if target.exists():
        ours = saved_model.is_model(target)
        if not ours or "vocabulary" not in saved_model.read_about(target)[2]:
            legal = f"{target} is not a trimmed model; move it away"
            raise reject("model", str(path), legal)
    return target


def _renumbered(before, after):
    """(V,) the new id of each old one, -1 for a token that is gone."""
    rows = vocabulary.rows(before, after)
    found = np.full(1 + max(before.get_vocab().values()), -1, np.int32)
    found[rows] = np.arange(len(rows))
    return found


def _encodings(before, after, texts):
    """Yields (old ids, new ids, whether they are other tokens) of each text."""
    ids = _renumbered(before, after)
    pairs = (vocabulary.encode(each, texts) for each in (before, after))
    for (_, old), (_, new) in zip(*pairs, strict=True):
        yield old.ids, new.ids, ids[old.ids].tolist() != new.ids


def _otherwise(what, source):
    legal = f"its trimmed tokenizer takes other tokens for {what}; not written"
    return reject(source["field"], source["path"], legal)


def _check_rows(before, after, ids, config, source):
    """Raises UserError where a row of a split is other tokens, by their new `ids`."""
    for split, old in before.items():
        new = after[split]
        rows = [(map(ids.__getitem__, old.input_ids), new.input_ids)]
        if config.type_vocab_size > 1:
            rows.append((old.token_type_ids, new.token_type_ids))
        if not all(
            np.array_equal(*x) for both in rows for x in zip(*both, strict=True)
        ):
            raise _otherwise(f"a row of {split}", source)


def _compare(task, models, examples, num_rows):
    """Compares the logits of two models, each of its own ids of the same rows."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        old, new = (verify.in_jax(*each) for each in models)
        rows, same = (verify.chosen(each, num_rows) for each in examples)
        logits = verify.logits_of(old.predict, task, rows)
        split, name = task.validation[0], "the saved model"
        rows = verify.Validation(task, same, split, name, logits)
        found = verify.compare("trimmed", new, rows)
    worst = found["max_abs_difference"]
    return {"compared": found["rows"], "max_abs_difference": worst}


def _fare(before, after, texts):
    """How texts fare whose tokens were not counted: see `trim`."""
    changes, unknown, pieces = 0, np.zeros(2, int), np.zeros(2, int)
    unk = before.unk_token_id, after.unk_token_id
    for *ids, changed in _encodings(before, after, texts):
        changes += changed
        unknown += [each.count(row) for each, row in zip(ids, unk, strict=True)]
        pieces += [len(each) for each in ids]
    shares = unknown / np.maximum(pieces, 1)
    return {
        "texts": len(texts),
        "tokenised_otherwise": changes / len(texts),
        "unknown": float(shares[1]),
        "unknown_before": float(shares[0]),
    }
