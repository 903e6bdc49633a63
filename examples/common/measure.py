"""What a training costs: FLOPs, peaks, memory, and the log that the loop hands back."""

from __future__ import annotations

import dataclasses
import platform
import resource

import torch
from accelerate import Accelerator

from .arguments import TrainArguments

#: Dense bf16 and fp16 peaks in TFLOP/s, by what the GPU's name contains; the first that fits counts.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


@dataclasses.dataclass
class TrainingLog:
    """What the training loop measured; tokens are real ones (no padding), summed over processes.

    ``mfu`` is the part of the devices' peak that the model's own FLOPs make up; None where the peak is not known.
    """

    losses: list[float]
    seconds: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    peak_memory_bytes: int

    def loss_around(self, end: bool) -> float:
        """The mean loss of the first or the last twentieth of the steps."""
        count = max(1, len(self.losses) // 20)
        return sum(self.losses[-count:] if end else self.losses[:count]) / count


def training_flops(model: torch.nn.Module) -> tuple[int, int]:
    """FLOPs of a training step for each token, and for each pair of a query and a key that it attends to.

    A weight matrix costs 2 FLOPs a weight in the forward pass, 2 for its input's gradient and, where it is trained, 2
    for its own. Embeddings, norms, the heads of classifiers (once a row) and recomputed activations do not count. A
    pair costs each head 4 ``head_dim`` (scores, then values), twice that again in the backward pass.
    """
    per_token = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        once_a_row = "pooler" in name or "classifier" in name
        if isinstance(module, torch.nn.Embedding) or once_a_row or hasattr(module, "base_layer"):  # PEFT: its children
            continue
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            per_token += (6 if weight.requires_grad else 4) * getattr(weight, "ds_numel", weight.numel())
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return per_token, 12 * config.num_hidden_layers * config.num_attention_heads * head_dim


def attended_pairs(batch: dict, causal: bool) -> torch.Tensor:
    """How many pairs of a query and a key the mask of a batch lets through (causal: about half of all)."""
    if causal and "position_ids" in batch:
        return (batch["position_ids"] + 1).sum()  # packed documents: each counts from 0
    lengths = batch["attention_mask"].sum(dim=1)
    return (lengths * (lengths + 1) // 2 if causal else lengths * lengths).sum()


def peak_flops(accelerator: Accelerator, args: TrainArguments) -> float | None:
    """The peak of one device in FLOP/s, from the arguments or by its name; None: not known."""
    if args.peak_tflops:
        return args.peak_tflops * 1e12
    if accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(accelerator.device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def synchronize(accelerator: Accelerator) -> None:
    """Wait for the device, so that clocks are right."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes: the device's peak since the warm-up where there is one, else the process' peak resident set."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
