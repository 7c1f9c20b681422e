"""A folder that PyTorch's transformers loads at the sliced model's own speed.

Beside the weights and config.json it holds the code of the model, two files that depend
on torch and transformers alone: `hub_code/*.py`, which
`from_pretrained(..., trust_remote_code=True)` runs. The tensors have BERT's names; an
absent block has none. The folder of a model that makes vectors is one of
sentence-transformers.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cofi_jax.checkpoints import (
    hf_config,
    hf_names,
    huggingface,
    sentence_transformers,
    tokenizers,
)
from cofi_jax.config import DTYPES
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.export.base import INPUTS, Format
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

_CODE = Path(__file__).with_name("hub_code")


def write(
    folder: Path,
    params: dict,
    config: EncoderConfig,
    labels: Sequence[str],
    dtype: str = "float32",
) -> None:
    """Writes code, config.json and weights: see `Format.write`.

    Args:
      folder: an existing, empty folder.
      params: the parameters, NumPy's or JAX's.
      config: their sizes.
      labels: the names of the classes.
      dtype: the dtype of the stored weights, float32 or bfloat16.

    Raises:
      UserError: for another dtype and another number of labels.
    """
    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be {' or '.join(DTYPES)}")
    fields = _fields(config, labels) | {"dtype": dtype}
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    tensors = hf_names.to_torch(*hf_names.bert_form(params, config))
    huggingface.write_tensors(folder, tensors, fields)
    if config.pooling:
        sentence_transformers.write(folder, params, config)
    code = {path.name: path.read_text() for path in _CODE.glob("*.py")}
    stamp = hashlib.sha256(code["modeling_cofi.py"].encode()).hexdigest()[:16]
    for name, text in code.items():
        text = text.replace('\nCODE = ""\n', f'\nCODE = "{stamp}"\n')
        (folder / name).write_text(text)


def _fields(config, labels):
    """Returns config.json as `CofiConfig` reads it."""
    problem = PROBLEMS[config.problem]
    return hf_config.shared_fields(config, labels) | {
        "architectures": [problem.class_of("Cofi")],
        "model_type": "cofi_encoder",
        "auto_map": {
            "AutoConfig": "configuration_cofi.CofiConfig",
            "AutoModel": "modeling_cofi.CofiModel",
            problem.auto_class: f"modeling_cofi.{problem.class_of('Cofi')}",
        },
        # transformers 4 looks for a tokenizer only where this field is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "attention_heads": config.heads,
        "intermediate_sizes": config.intermediate,
        "head_dim": config.head_size,
        "pooler_size": config.pooler_size,
        "pooler_activation": config.pooler_activation,
        "num_attention_heads": max(config.heads),
        "intermediate_size": max(config.intermediate),
        "max_position_embeddings": config.longest,
    }


def load_torch(folder: Path, dtype: str = "float32") -> Any:
    """Opens a folder of transformers on the CPU, whichever code it asks for.

    Returns:
      The PyTorch model with the head that config.json names, without dropout.

    Raises:
      ValueError: where weights and config.json do not fit.
    """
    import torch
    import transformers

    fields = json.loads((folder / "config.json").read_text())
    _, with_head, head = fields["architectures"][0].partition("For")
    return getattr(transformers, f"AutoModel{with_head}{head}").from_pretrained(
        folder,
        trust_remote_code=True,
        local_files_only=True,
        dtype=getattr(torch, dtype),
    )


def load(folder: Path) -> Callable[[Batch], np.ndarray]:
    """Opens a folder in PyTorch, in float32 on the CPU: see `Format.load`.

    Raises:
      UserError: where it makes vectors, and sentence-transformers is not installed.
    """
    import torch

    head = _head(folder)
    with tokenizers.quiet():  # A plain BERT has a pooler, which nobody reads.
        model = load_torch(folder)
    # Types are for models of several: a tokenizer of another family may give them.
    types = getattr(model.config, "type_vocab_size", 1)  # DistilBERT has no such field.
    names = INPUTS if types > 1 else INPUTS[:2]

    def predict(batch):
        inputs = {k: torch.tensor(np.asarray(batch[k], np.int64)) for k in names}
        with torch.inference_mode():
            output = model(**inputs)
        if head:
            states = output.last_hidden_state.numpy()
            return head.vectors(states, np.asarray(batch["attention_mask"]))
        if "logits" in output:
            return output.logits.numpy()
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()

    return predict


def _head(folder):
    """What follows the encoder, where a folder is one of sentence-transformers.

    The lines of its model card need that library.
    """
    if not sentence_transformers.is_folder(folder):
        return None
    if importlib.util.find_spec("sentence_transformers") is None:
        legal = "needs sentence_transformers: pip install 'cofi-jax[vectors]'"
        raise reject("formats", folder.name, legal)
    return sentence_transformers.read(folder)


_CARD = Part(
    "transformers 4.57 or later",
    "safetensors and a small PyTorch file of its own, hence `trust_remote_code`",
    """\
from transformers import {auto}, AutoTokenizer
folder = "path/to/this/folder/transformers"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = {auto}.from_pretrained(folder, trust_remote_code=True)
print(model(**tokenizer({texts}, truncation=True, return_tensors="pt")))""",
    lambda check: (
        "`transformers/` stores bfloat16 weights: it was compared in float32 with a "
        "model whose weights are so rounded."
        if check.get("weights") == "bfloat16"
        else ""
    ),
    pooled=(
        "sentence-transformers",
        """\
from sentence_transformers import SentenceTransformer
folder = "path/to/this/folder/transformers"
model = SentenceTransformer(folder, trust_remote_code=True)
print(model.encode([{texts}]))""",
    ),
)

FORMAT = Format(
    "transformers",
    write,
    load,
    _CARD,
    packages=("torch",),
    extra="torch",
    dtypes=DTYPES,
)
