"""A folder that PyTorch's transformers loads at the sliced model's own speed.

Beside the weights and config.json it holds the code of the model, two files that depend
on torch and transformers alone: `hub_code/*.py`, which
`from_pretrained(..., trust_remote_code=True)` runs. The tensors have BERT's names; an
absent block has none.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cofi_jax.checkpoints import hf_config, hf_names, huggingface
from cofi_jax.config import DTYPES
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.export.formats import INPUTS, Format
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig

_CODE = Path(__file__).with_name("hub_code")
_CONFIGURATION, _MODELING = "configuration_cofi.py", "modeling_cofi.py"


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
    try:
        fields = _fields(config, labels) | {"dtype": dtype}
    except hf_config.UnsupportedCheckpoint as error:
        raise reject("labels", tuple(labels), str(error)) from error
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    tensors = hf_names.to_torch(*hf_names.bert_form(params, config), "bert.")
    huggingface.write_tensors(folder, tensors, fields)
    modeling = (_CODE / _MODELING).read_text()
    (folder / _MODELING).write_text(modeling)
    configuration = (_CODE / _CONFIGURATION).read_text()
    stamp = hashlib.sha256(modeling.encode()).hexdigest()[:16]
    stamped = configuration.replace('\nCODE = ""\n', f'\nCODE = "{stamp}"\n')
    (folder / _CONFIGURATION).write_text(stamped)


def _fields(config, labels):
    """Returns config.json as `CofiConfig` reads it."""
    problem = PROBLEMS[config.problem]
    head = problem.auto_model
    module = _MODELING.removesuffix(".py")
    return {
        "architectures": [f"CofiFor{head}"],
        "model_type": "cofi_encoder",
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION.removesuffix('.py')}.CofiConfig",
            "AutoModel": f"{module}.CofiModel",
            f"AutoModelFor{head}": f"{module}.CofiFor{head}",
        },
        # transformers 4 looks for a tokenizer only where this field is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "attention_heads": config.heads,
        "intermediate_sizes": config.intermediate,
        "head_dim": config.head_size,
        "pooler_size": config.pooler_size,
        "num_hidden_layers": len(config.heads),
        "num_attention_heads": max(config.heads),
        "intermediate_size": max(config.intermediate),
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.longest,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "problem_type": problem.problem_type,
        **hf_config.class_fields(config, labels),
    }


def stored(params: dict, dtype: str) -> dict:
    """Returns float32 parameters, rounded as `write` rounds them."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype), params)


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
    head = fields["architectures"][0].partition("For")[2]
    return getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        folder,
        trust_remote_code=True,
        local_files_only=True,
        dtype=getattr(torch, dtype),
    )


def load(folder: Path) -> Callable[[Batch], np.ndarray]:
    """Opens a folder in PyTorch, in float32 on the CPU: see `Format.load`."""
    import torch

    model = load_torch(folder)

    def predict(batch):
        inputs = {k: torch.tensor(np.asarray(batch[k], np.int64)) for k in INPUTS}
        with torch.inference_mode():
            output = model(**inputs)
        if "logits" in output:
            return output.logits.numpy()
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()

    return predict


FORMAT = Format(
    "transformers",
    write,
    load,
    packages=("torch",),
    extra="torch",
    options=("dtype",),
    stored=stored,
)
