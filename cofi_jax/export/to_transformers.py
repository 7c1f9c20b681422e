"""A folder that PyTorch's transformers loads at the sliced model's own speed.

Beside weights and config.json it holds the model's code, two files that know nothing
of us: `hub_code/*.py`, which `from_pretrained(..., trust_remote_code=True)` runs.
Tensors have BERT's names; an absent block has none.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from cofi_jax.checkpoints import hf_config, hf_names
from cofi_jax.config import DTYPES
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.models.bert import Batch
from cofi_jax.models.config import EncoderConfig

REQUIRES = ("torch",)


_CODE = Path(__file__).with_name("hub_code")


_CONFIGURATION, _MODELING = "configuration_cofi.py", "modeling_cofi.py"


def write(
    folder: Path,
    params: dict,
    config: EncoderConfig,
    labels: Sequence[str],
    dtype: str = "float32",
) -> None:
    """Writes code, config.json and weights into the existing empty `folder`.

    Args:
      folder: where to.
      params: of `abstract_params(config)`'s structure, NumPy's or JAX's.
      config: their sizes.
      labels: names of the classes in the order of the logits; () for LABEL_0, ...
      dtype: of the stored weights, float32 or bfloat16.

    Raises:
      UserError: for another dtype and another number of labels.
    """
    from safetensors.numpy import save

    if dtype not in DTYPES:
        raise reject("dtype", dtype, f"must be {' or '.join(DTYPES)}")
    try:
        fields = _fields(config, labels) | {"dtype": dtype}
    except hf_config.UnsupportedCheckpoint as error:
        raise reject("labels", tuple(labels), str(error)) from error
    params, bert = hf_names.bert_form(jax.tree.map(np.asarray, params), config)
    tensors = {
        # safetensors writes the memory as it lies.
        name: np.ascontiguousarray(array.astype(dtype))
        for name, array in hf_names.to_torch(params, bert, "bert.").items()
    }
    stored = save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(stored)
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    modeling = (_CODE / _MODELING).read_text()
    (folder / _MODELING).write_text(modeling)
    configuration = (_CODE / _CONFIGURATION).read_text()
    stamp = hashlib.sha256(modeling.encode()).hexdigest()[:16]
    stamped = configuration.replace('\nCODE = ""\n', f'\nCODE = "{stamp}"\n')
    (folder / _CONFIGURATION).write_text(stamped)


def _fields(config, labels):
    """config.json, read by `CofiConfig`; `config` is not in BERT's form."""
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
        # 4.x looks for a tokenizer only where this is.
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


def load(folder: Path) -> Callable[[Batch], np.ndarray]:
    """The folder's model in PyTorch, in float32 on the CPU, with all its threads.

    Returns:
      From a batch, each array (B, T), to logits (B, C), of spans (B, T, 2).

    Raises:
      ValueError: where weights and config.json do not fit.
    """
    import torch
    import transformers

    fields = json.loads((folder / "config.json").read_text())
    name = fields["architectures"][0].replace("CofiFor", "AutoModelFor")
    model = getattr(transformers, name).from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
    )

    def predict(batch):
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {k: torch.tensor(np.asarray(batch[k], np.int64)) for k in names}
        with torch.inference_mode():
            output = model(**inputs)
        if "logits" in output:
            return output.logits.numpy()
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()

    return predict
