"""Run by torchrun from test_distributed.py: a LLaMA whose sequences DeepSpeed's Ulysses splits over two CPU processes.

    torchrun --nproc_per_node 2 ulysses_worker.py

Packed rows: what each process computes of its half, and the gradients of both together, are those of whole sequences.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_flash_plus  # noqa: F401 (registers flash_plus)

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

LENGTH, NAME = 48, "flash_plus"


def make_model():
    """The same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


def main() -> None:
    """Whole sequences first, then halves."""
    tokens = torch.randint(1, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).expand(2, -1)
    model = make_model()
    expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]

    # Its shared-memory operator would be compiled here, for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")
    model = make_model()
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model, core_attn_implementation=NAME, sequence_parallel_size=2, micro_batch_size=2
    )
    part = slice(LENGTH // 2 * dist.get_rank(), LENGTH // 2 * (dist.get_rank() + 1))
    mine = {"input_ids": tokens[:, part].contiguous(), "position_ids": positions[:, part].contiguous()}
    logits = model(**mine, use_cache=False).logits
    torch.testing.assert_close(logits, expected[:, part], rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-3)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
