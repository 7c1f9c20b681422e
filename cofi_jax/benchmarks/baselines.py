"""The same work done by others: PyTorch's transformers, and onnxruntime.

They get our parameters, our batches and as many threads as we may use. PyTorch's step
is what its users write: BertForSequenceClassification as teacher and student, a fused
AdamW, and clipped gradients.

Shapes: B batch, T tokens, D hidden, C classes.
"""

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cofi_jax.checkpoints.hf_config import is_dense
from cofi_jax.checkpoints.hf_names import bert_form, to_hugging_face
from cofi_jax.config import Distill
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.evaluation import timing
from cofi_jax.export import to_onnx, to_transformers
from cofi_jax.export.base import INPUTS
from cofi_jax.models.config import EncoderConfig
from cofi_jax.training import losses

_MAX_GRADIENT_NORM = 1.0


def missing(*packages: str) -> str:
    """Returns which of these packages are not installed, with commas between; or ""."""
    return ", ".join(p for p in packages if importlib.util.find_spec(p) is None)


def no_pytorch() -> str:
    """Returns why PyTorch cannot run on jax's device; "" where it can."""
    if gone := missing("torch", "transformers"):
        return f"{gone} not installed"
    import torch

    on_cpu = jax.default_backend() == "cpu"
    return "" if on_cpu or torch.cuda.is_available() else "its torch has no CUDA"


def unfit(config: EncoderConfig) -> str:
    """Returns why `pytorch_step` cannot train such a model; "" where it can."""
    single = PROBLEMS[config.problem].problem_type == "single_label_classification"
    return no_pytorch() or ("" if single else "is for classification only")


def _set_up() -> str:
    """Gives PyTorch our threads and, on a GPU, our precision; returns its device."""
    import torch

    torch.set_num_threads(timing.cores())
    if jax.default_backend() == "cpu":
        return "cpu"
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    torch.set_float32_matmul_precision("highest" if exact else "high")
    return "cuda"


def pytorch_step(
    student: dict,
    teacher: dict,
    projection: np.ndarray,
    config: EncoderConfig,
    distill: Distill,
    *,
    compiled: bool = False,
) -> Callable[[dict], tuple[Any, Any]]:
    """Makes a distillation step in PyTorch, with its own copy of the parameters.

    Args:
      student: the parameters of a dense classifier, whose embeddings are frozen.
      teacher: those of its teacher, of the same sizes.
      projection: (D, D), from the student's hidden states to the teacher's.
      config: the sizes of both, the dropout of the student, and the dtype of the matrix
        products: bfloat16 for automatic mixed precision.
      distill: what is imitated; layers are matched to the closest, evenly spaced ones.
      compiled: whether student and teacher go through torch.compile.

    Returns:
      A function from a batch of `tensors` to the loss and the norm of its gradient.
    """
    import torch
    from torch.nn import functional as F  # noqa: N812

    device = _set_up()
    teacher_model = _bert(teacher, config).to(device).eval()
    student_model = _bert(student, config).to(device).train()
    student_model.bert.embeddings.requires_grad_(False)
    projection = torch.nn.Parameter(torch.tensor(np.asarray(projection)).to(device))
    trained = [p for p in student_model.parameters() if p.requires_grad]
    trained.append(projection)
    # AdamW without decay is Adam.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    if compiled:
        teacher_model, student_model = map(
            torch.compile, (teacher_model, student_model)
        )
    taught = losses.taught_layers(len(config.heads), distill.num_layers)
    mixed = torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16")

    def distance(t, s, mask):  # (B, T, D), (B, T, D), (B, T)
        return ((t - s).square().mean(-1) * mask).sum() / mask.sum()

    def layer_loss(output, target, mask):
        states = [state.float() for state in output.hidden_states[1:]]
        teacher_cache = [target.hidden_states[k + 1].float() for k in taught]
        with torch.no_grad():
            projected = [state @ projection for state in states]
            costs = [distance(t, s, mask) for t in teacher_cache for s in projected]
            costs = torch.stack(costs).reshape(len(teacher_cache), -1)
            matched = costs.argmin(1).tolist()
        return sum(
            distance(teacher_outputs, states[layer] @ projection, mask)
            for teacher_outputs, layer in zip(teacher_cache, matched, strict=True)
        )

    def step(batch):
        batch = {name: batch[name].to(device, non_blocking=True) for name in INPUTS}
        with torch.no_grad(), mixed:
            target = teacher_model(**batch, output_hidden_states=True)
        with mixed:
            output = student_model(**batch, output_hidden_states=True)
        cool = distill.temperature
        logit_loss = cool**2 * F.kl_div(
            F.log_softmax(output.logits.float() / cool, -1),
            F.log_softmax(target.logits.float() / cool, -1),
            reduction="batchmean",
            log_target=True,
        )
        mask = batch["attention_mask"].float()
        loss = distill.logits * logit_loss
        loss = loss + distill.layers * layer_loss(output, target, mask)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
        optimizer.step()
        return loss.detach(), norm

    return step


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a batch of ours for PyTorch, still in the host's memory."""
    import torch

    found = {name: torch.tensor(np.asarray(batch[name], np.int64)) for name in INPUTS}
    if jax.default_backend() != "cpu":
        found = {name: tensor.pin_memory() for name, tensor in found.items()}
    return found


def to_numpy(logits: Any) -> np.ndarray:
    """Returns the logits of any runtime in float32."""
    if hasattr(logits, "detach"):  # a tensor of PyTorch
        logits = logits.detach().float().cpu().numpy()
    return np.asarray(logits, np.float32)


def wait() -> None:
    """Waits until PyTorch has done all that it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bert(params, config):
    """Returns transformers' own classifier with our parameters, of a dense model."""
    import torch
    import transformers

    params, config = bert_form(jax.tree.map(np.asarray, params), config)
    arrays, fields = to_hugging_face(params, config)
    sizes = transformers.BertConfig(**fields)
    model = transformers.BertForSequenceClassification(sizes)
    model.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
    return model


def pytorch_pass(
    params: dict, config: EncoderConfig, *, compiled: bool = False
) -> Callable[[dict], Any]:
    """Makes a forward pass in PyTorch: of our export where the model is a sliced one.

    Returns:
      A function from a batch of `tensors` to logits (B, C), in `config.dtype`.
    """
    import torch
    import transformers

    device = _set_up()
    if is_dense(config):
        model = _bert(params, config).to(getattr(torch, config.dtype))
    else:
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            to_transformers.write(pathlib.Path(folder), params, config, ())
            model = to_transformers.load_torch(pathlib.Path(folder), config.dtype)
    model = model.to(device).eval()
    if compiled:
        model = torch.compile(model)

    def predict(batch):
        with torch.inference_mode():
            batch = {name: batch[name].to(device, non_blocking=True) for name in batch}
            logits = model(**batch).logits
        wait()
        return logits

    return predict


def onnx_pass(params: dict, config: EncoderConfig) -> Callable[[dict], np.ndarray]:
    """Makes a forward pass of our export in onnxruntime, on the CPU in float32."""
    with tempfile.TemporaryDirectory() as folder:
        to_onnx.write(pathlib.Path(folder), params, config, ())
        return to_onnx.load(pathlib.Path(folder), threads=timing.cores())
