"""The part of a vocabulary that some texts need, and the tokenizer that is left.

    seen(tokenizer, texts) -> kept(tokenizer, seen) -> trim(tokenizer, kept)

The trimmed tokenizer cuts all of these texts into the same tokens, with other ids. What
is kept beside the tokens themselves makes sure of it, for each kind of model:

    WordPiece  takes the longest token that a word begins with, then the longest one
               that its rest begins with, and so on. Each token that was taken is there,
               and no longer one is. A word that is unknown in the end may have begun
               with tokens, too; without them, shorter ones might fit, so they stay.
    BPE        applies again and again the first merge of its list that fits. All merges
               that make a kept token stay, in their order, and so do their parts and
               the merges that make these. So in each step the merge that was applied is
               there, and none that was not comes before it.
    Unigram    takes the tokens with the largest sum of scores. With fewer tokens there
               are fewer ways to cut a text, and the best one is still among them. An
               unknown character counts 10 less than the lowest score of the vocabulary,
               so the token with that score stays.

The tokens of single characters stay as well, or of single bytes: without one of them,
more would be unknown, and a Unigram would have new ways to cut. So do the special and
the added tokens.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cofi_jax import files
from cofi_jax.checkpoints import tokenizers
from cofi_jax.errors import reject
from cofi_jax.models.config import EncoderConfig

_KINDS = ("WordPiece", "BPE", "Unigram")


def check(tokenizer: Any, *, field: str, path: str) -> None:
    """Raises UserError, which calls its folder `path`, for what cannot be trimmed."""
    kind = type(tokenizer).__name__
    legal = f"must be a {', '.join(_KINDS[:-1])} or {_KINDS[-1]} of the library "
    legal += "tokenizers, in a tokenizer.json, for its vocabulary to be trimmed"
    if not tokenizer.is_fast:
        raise reject(field, path, f"its tokenizer {kind} is in Python; it {legal}")
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind not in _KINDS:
        raise reject(field, path, f"its tokenizer is a {kind}; it {legal}")


def encode(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields each text with its encoding, which has no special tokens and is not cut.

    `tokenizer` is a fast one of transformers.
    """
    for first in range(0, len(texts), 1000):  # Encodings of all texts would be large.
        some = list(texts[first : first + 1000])
        options = {"add_special_tokens": False, "return_attention_mask": False}
        with tokenizers.quiet():  # A long text is no matter here.
            found = tokenizer(some, **options, verbose=False).encodings
        yield from zip(some, found, strict=True)


def seen(tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """The ids of the tokens that are taken while the texts are tokenised.

    Those that a word of WordPiece began with are among them, although the word is
    unknown.
    """
    found, unknown, unk = set(), set(), tokenizer.unk_token_id
    for text, encoding in encode(tokenizer, texts):
        found.update(encoding.ids)
        if unk in encoding.ids:
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            unknown |= {text[slice(*place)] for row, place in pairs if row == unk}
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ == "WordPiece":
        for word in unknown:
            found |= _beginning(backend, word, unk)
    return found


def _beginning(backend, text, unk):
    """The ids of the tokens that are taken of a word before its rest is unknown.

    They are those of its longest beginning that is known: in a longer one, the same
    tokens lead to the same place, at which nothing fits.
    """
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    found = set()
    for word in words:
        for end in range(len(word), 0, -1):
            taken = {token.id for token in backend.model.tokenize(word[:end])}
            if unk not in taken:
                found |= taken
                break
    return found


def kept(tokenizer: Any, seen: Collection[int], config: EncoderConfig) -> np.ndarray:
    """(K,) the ids of the tokens that stay, in rising order.

    Args:
      tokenizer: one that passes `check`.
      seen: the ids that must be among them.
      config: the sizes of the model. The ids up to that of its padding token stay, so
        that this one does not change.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ids = tokenizer.get_vocab()
    least = {*seen, *range(config.pad_token_id + 1)}
    tokens = {token for token, row in ids.items() if row in least}
    tokens |= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    tokens |= {token for token in _tokens(model) if tokenizers.is_single(token, model)}
    if model["type"] == "Unigram":
        tokens.add(min(model["vocab"], key=lambda pair: pair[1])[0])
        if model["unk_id"] is not None:
            tokens.add(model["vocab"][model["unk_id"]][0])
    elif model["type"] == "BPE":
        tokens |= _ancestors(model, tokens)
    # A model may name an unknown token that its vocabulary lacks.
    tokens |= {model.get("unk_token")} & ids.keys()
    return np.array(sorted(ids[token] for token in tokens))


def _tokens(model):
    """The tokens of a model in the order of their ids."""
    if model["type"] == "Unigram":
        return [token for token, _ in model["vocab"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__)


def _ancestors(model, tokens):
    """The parts of all merges that make one of the tokens, or one of these parts."""
    parts: dict[str, set[str]] = {}
    for pair, piece in tokenizers.merges(model):
        parts.setdefault(piece, set()).update(pair)
    found, new = set(), set(tokens)
    while new:
        new = set().union(*(parts.get(token, ()) for token in new)) - found
        found |= new
    return found


def trim(
    tokenizer: Any, kept: np.ndarray, config: EncoderConfig, *, field: str, path: str
) -> Any:
    """A tokenizer with some of the tokens alone, numbered from 0 in the same order.

    Args:
      tokenizer: one that passes `check`.
      kept: (K,) the ids of its tokens that stay, as the function `kept` gives them.
      config: the sizes of the model that the tokenizer is of.
      field: what messages call the tokenizer's folder.
      path: its path, for them.

    Raises:
      UserError: where the ids are others once the tokenizer is written and read.
    """
    names = {row: token for token, row in tokenizer.get_vocab().items()}
    ids = {names[row]: new for new, row in enumerate(kept.tolist())}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tokenizers.write(tokenizer, scratch, config, field=field, path=path)
        # Of all that is written, this file alone has ids.
        content = json.loads((scratch / "tokenizer.json").read_text())
        _renumber(content, ids)
        files.write_json(scratch / "tokenizer.json", content)
        found = tokenizers.load_tokenizer(scratch, field, path)
    if found.get_vocab() != ids:
        legal = "its tokenizer gives other ids to its tokens once it is trimmed"
        raise reject(field, path, legal)
    return found


def _renumber(content, ids):
    """Leaves the tokens of a tokenizer.json that have new ids, and gives them these."""
    model = content["model"]
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            model["unk_id"] = ids[model["vocab"][model["unk_id"]][0]]
        model["vocab"] = [pair for pair in model["vocab"] if pair[0] in ids]
    else:
        model["vocab"] = {token: ids[token] for token in _tokens(model) if token in ids}
    if model["type"] == "BPE":
        model["merges"] = [x for x, made in tokenizers.merges(model) if made in ids]
    for token in content["added_tokens"]:
        token["id"] = ids[token["content"]]
    processor = content["post_processor"] or {}
    for each in processor.get("processors", [processor]):
        for name in {"cls", "sep"} & each.keys():
            each[name][1] = ids[each[name][0]]
        for token in each.get("special_tokens", {}).values():
            token["ids"] = [ids[each] for each in token["tokens"]]


def rows(before: Any, after: Any) -> np.ndarray:
    """(K,) the ids in one tokenizer of the K tokens of another one, in their order.

    Raises:
      KeyError: where it lacks a token.
    """
    ids, tokens = before.get_vocab(), after.get_vocab()
    return np.array([ids[token] for token in sorted(tokens, key=tokens.__getitem__)])


def take(params: dict, rows: np.ndarray) -> dict:
    """The parameters with these rows (K,) of the table of words alone."""
    embeddings = params["embeddings"]
    words = jnp.take(embeddings["word"], rows, axis=0)
    return params | {"embeddings": embeddings | {"word": words}}
