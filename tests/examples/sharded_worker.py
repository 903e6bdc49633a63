"""Run by torchrun from test_distributed.py: four steps of a LLaMA that is sharded over CPU processes, losses as JSON.

    torchrun --nproc_per_node 2 sharded_worker.py <engine> <saved model> <output.json>

Engines: fsdp2 (torch's ``fully_shard``, which Accelerate's FSDP2 calls), tp and fsdp2_tp (Transformers' own, with the
arguments that ``common.tensor_parallel`` gives). Accelerate itself has neither for CPU processes. The sharded data
parallel processes each take their part of the batch; every engine must give the losses of one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import common

import hf_flash_plus  # noqa: F401 (registers flash_plus)


def batches(rows: int = 4, length: int = 48, steps: int = 4) -> list[dict]:
    """Packed rows: two documents each, cut in the middle."""
    generator = torch.Generator().manual_seed(0)
    position_ids = torch.cat([torch.arange(length // 2)] * 2).expand(rows, -1)
    tokens = torch.randint(1, 90, (steps, rows, length), generator=generator)
    return [{"input_ids": t, "labels": t, "position_ids": position_ids, "use_cache": False} for t in tokens]


def train(engine: str, path: str) -> list[float]:
    """The losses over the whole batch, step by step."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    shards = {"one": 1, "tp": 1, "fsdp2": world, "fsdp2_tp": world // 2}[engine]
    sizes = SimpleNamespace(tp_enabled=engine.endswith("tp"), tp_size=world // shards, dp_shard_size=shards)
    accelerator = SimpleNamespace(  # what the functions of common use of one
        parallelism_config=sizes, clip_grad_norm_=torch.nn.utils.clip_grad_norm_, unscale_gradients=lambda: None
    )
    parallel = common.tensor_parallel(accelerator)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flash_plus", **parallel)
    if engine == "fsdp2":
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    optimizer = common.make_optimizer(model, common.TrainArguments(learning_rate=0.2))
    for group in optimizer.param_groups:
        group["eps"] = 0.1  # so that the size of the gradients matters, and with it how they are clipped
    part = (dist.get_rank() if world > 1 else 0) // (world // shards)
    losses = []
    for batch in batches():
        batch = {k: v.chunk(shards)[part] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        common.clip_gradients(accelerator, model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = train(*sys.argv[1:3])
    if dist.get_rank() == 0:
        Path(sys.argv[3]).write_text(json.dumps(result))
    dist.barrier()  # no process leaves while another still talks to it
    dist.destroy_process_group()
