"""Records what PyTorch computes, for tests that run without it.

    python tests/record_parity.py                              the tiny model
    python tests/record_parity.py --encoder path/to/encoder    a real one, too

writes fixtures/tiny_bert/ (weights, inputs and every output), and for a real
encoder fixtures/minilm_expected.safetensors (inputs and a sample of every state).
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


def tiny_bert(seed=0):
    """A BERT in which every parameter matters: no zero biases, no unit scales."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        num_labels=3,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if "LayerNorm.weight" in name:
                parameter.add_(1)
    return model


def padded_batch(lengths, padded_length, vocab_size, seed):
    """Random ids and token types, rows of `lengths` padded with 0."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), padded_length)
    real = np.arange(padded_length) < np.array(lengths)[:, None]
    return {
        "input_ids": np.where(real, rng.integers(1, vocab_size, shape), 0),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.where(real, rng.integers(0, 2, shape), 0),
    }


def torch_outputs(model, batch):
    """PyTorch's `hidden_states` (L + 1, B, T, D), and `logits` of a classifier."""
    import torch

    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    outputs = {"hidden_states": np.stack([h.numpy() for h in output.hidden_states])}
    if "logits" in output:
        outputs["logits"] = output.logits.numpy()
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
    folder = FIXTURES / "tiny_bert"
    model = tiny_bert()
    model.save_pretrained(folder)
    record = {}
    for name, lengths, padded_length in (("a", (1, 7, 16), 16), ("b", (3, 5), 12)):
        batch = padded_batch(lengths, padded_length, 101, seed=len(lengths))
        outputs = torch_outputs(model, batch)
        record |= {f"{name}.{k}": v for k, v in (batch | outputs).items()}
    save_file(record, folder / "expected.safetensors")
    if encoder:
        batch = sentence_batch(encoder)
        states = torch_outputs(real_encoder(encoder), batch)["hidden_states"]
        batch["sample"] = sample(states, batch["attention_mask"])
        save_file(batch, FIXTURES / "minilm_expected.safetensors")


if __name__ == "__main__":
    main()
