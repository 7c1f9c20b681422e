"""Small random encoders in folders of every layout that people have."""

import functools
import json
import pathlib
import string
import tempfile

from conftest import random_params

from cofi_jax.checkpoints import huggingface
from cofi_jax.models.config import EncoderConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "tea", "cold", "warm", "cup", *string.ascii_lowercase]
WORDS += [f"##{letter}" for letter in string.ascii_lowercase]
ROBERTA = {"model_type": "roberta", "position_offset": 2, "type_vocab_size": 1}


def make(folder, **sizes):
    """Writes weights and config.json; returns the parameters and their sizes."""
    config = EncoderConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 16,
            "heads": (2, 2),
            "head_size": 8,
            "intermediate": (24, 24),
            "pooler_size": 16,
            "num_labels": 2,
            "max_positions": 40,
        }
        | sizes
    )
    params, files = _written(config)
    folder.mkdir(exist_ok=True)
    write(folder, files)
    return params, config


@functools.cache
def _written(config):
    """Random parameters of these sizes, and the files that hold them."""
    params = random_params(config, seed=0)
    with tempfile.TemporaryDirectory() as top:
        folder = pathlib.Path(top) / "encoder"
        huggingface.save_hugging_face(folder, params, config)
        return params, {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder, name="config.json", **fields):
    """Sets fields of a JSON file; None takes one out."""
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= fields
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def write(folder, files):
    """Writes texts and bytes by name, whatever was there."""
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)


def byte_letters():
    """What GPT's byte-level tokenizers write for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe_files():
    """The two files of a byte-level BPE of RoBERTa's, with merges for a few words."""
    pieces, merges = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_letters()], []
    for word in ("\u0120tea", "\u0120cup"):
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            pieces.append(word[:end])
    ids = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    merges = list(dict.fromkeys(merges))
    return {
        "vocab.json": json.dumps(ids),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def wordpiece_files():
    return {"vocab.txt": "\n".join(WORDS) + "\n"}


def unigram_files():
    """A tokenizer.json like XLM-R's, of pieces with scores."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces += [
        "\u2581",
        "\u2581warm",
        "\u2581tea",
        "\u2581cup",
        *string.ascii_lowercase,
    ]
    scores = [(piece, -float(row)) for row, piece in enumerate([*pieces, "<mask>"])]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    names |= {"cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    settings = {f"{kind}_token": token for kind, token in names.items()}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings),
    }


def sentencepiece_model():
    """The bytes of a sentencepiece.bpe.model."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    words = ["\u2581", "\u2581warm", "\u2581tea", "\u2581cup", *string.ascii_lowercase]
    for row, piece in enumerate([*kinds, *words]):
        proto.pieces.add(piece=piece, score=-float(row), type=kinds.get(piece, 1))
    proto.trainer_spec.model_type = 1
    proto.trainer_spec.unk_id = 0
    return proto.SerializeToString()


JAPANESE = {
    "tokenizer_class": "BertJapaneseTokenizer",
    "word_tokenizer_type": "basic",
    "subword_tokenizer_type": "character",
}
