"""Records what PyTorch computes, for tests that run without it.

    python tests/record_parity.py                              the tiny models
    python tests/record_parity.py --encoder path/to/encoder    a real one, too

writes fixtures/tiny_*/ (weights, inputs and every output), and for a real encoder
fixtures/minilm_expected.safetensors (inputs and a sample of every state).
"""

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SENTENCES = (
    "Fine.",
    "The acting is wooden, but the photography saves what it can.",
    "I would not have believed that a film about glue could move me to tears.",
    "Despite its budget of two hundred million dollars, its famous cast and a year of "
    "reshoots, the sequel never finds a single reason to exist beyond the opening "
    "weekend; nobody involved seems to have minded.",
)


# Hugging Face's classes, fixture by fixture, and what is not the default.
TINY = {
    "tiny_bert": ("BertForSequenceClassification", {}),
    "tiny_roberta": (
        "RobertaForSequenceClassification",
        {"hidden_size": 24, "intermediate_size": 40, "type_vocab_size": 1},
    ),
    "tiny_span": (
        "BertForQuestionAnswering",
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "hidden_act": "gelu_new",
            "num_labels": 2,
        },
    ),
}


def tiny_model(architecture, seed=0, **sizes):
    """A model in which every parameter matters: no zero biases, no unit scales."""
    import transformers

    model_class = getattr(transformers, architecture)
    default = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 24,
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    return filled(model_class, model_class.config_class(**default | sizes), seed)


def filled(model_class, config, seed=0):
    """A model of this config, with parameters as `tiny_model` has them."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if name.lower().endswith("norm.weight"):
                parameter.add_(1)
    return model


def padded_batch(lengths, padded_length, config, seed):
    """Random ids and token types, rows of `lengths` padded with the model's own id."""
    rng = np.random.default_rng(seed)
    pad = config.pad_token_id
    shape = (len(lengths), padded_length)
    real = np.arange(padded_length) < np.array(lengths)[:, None]
    return {
        "input_ids": np.where(
            real, rng.integers(pad + 1, config.vocab_size, shape), pad
        ),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.where(
            real, rng.integers(0, getattr(config, "type_vocab_size", 1), shape), 0
        ),
    }


def torch_outputs(model, batch):
    """PyTorch's `hidden_states` (L + 1, B, T, D), and `logits` where it has a head."""
    import torch

    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    outputs = {"hidden_states": np.stack([h.numpy() for h in output.hidden_states])}
    if "logits" in output:
        outputs["logits"] = output.logits.numpy()
    if "start_logits" in output:
        spans = (output.start_logits.numpy(), output.end_logits.numpy())
        outputs["logits"] = np.stack(spans, -1)
    return outputs


def real_encoder(folder):
    """PyTorch's model of `folder`."""
    from transformers import BertModel

    return BertModel.from_pretrained(folder, attn_implementation="eager").eval()


def sentence_batch(folder):
    """The sentences, padded to the longest, with the tokenizer of `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="np"))


def sample(hidden_states, attention_mask):
    """Mean, norm and first 8 dimensions of each real token: (L + 1, tokens, 10)."""
    tokens = hidden_states[:, attention_mask > 0]
    norm = np.linalg.norm(tokens, axis=-1, keepdims=True)
    mean = tokens.mean(-1, keepdims=True)
    # safetensors writes the memory as it lies.
    return np.ascontiguousarray(np.concatenate([mean, norm, tokens[..., :8]], -1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", help="folder of a pretrained BERT")
    encoder = parser.parse_args().encoder
    for fixture, (architecture, sizes) in TINY.items():
        model = tiny_model(architecture, **sizes)
        model.save_pretrained(FIXTURES / fixture)
        record = {}
        for name, lengths, padded_length in (("a", (1, 7, 16), 16), ("b", (3, 5), 12)):
            batch = padded_batch(lengths, padded_length, model.config, len(lengths))
            outputs = torch_outputs(model, batch)
            record |= {f"{name}.{k}": v for k, v in (batch | outputs).items()}
        save_file(record, FIXTURES / fixture / "expected.safetensors")
    if encoder:
        batch = sentence_batch(encoder)
        states = torch_outputs(real_encoder(encoder), batch)["hidden_states"]
        batch["sample"] = sample(states, batch["attention_mask"])
        save_file(batch, FIXTURES / "minilm_expected.safetensors")


if __name__ == "__main__":
    main()
