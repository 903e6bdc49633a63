"""The accelerator, the optimizer and the training loop."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .arguments import TrainArguments
from .measure import TrainingLog, attended_pairs, peak_flops, peak_memory, synchronize, training_flops


def make_accelerator(args: TrainArguments) -> Accelerator:
    """The accelerator the arguments describe; only its main process logs above warnings."""
    if args.compare and (args.checkpoint_every or args.save_model):
        raise SystemExit("--compare trains several models: no --checkpoint_every or --save_model")
    if args.deterministic:  # before the first kernel
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise SystemExit(
            f"Accelerate has no FSDP for {accelerator.distributed_type}; use configs/accelerate/cpu_ddp.yaml"
        )
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    if accelerator.is_main_process:
        logging.getLogger("hf_flash_plus").setLevel(logging.INFO)  # says which provider stands in, and why
    if args.report_to:
        accelerator.init_trackers(Path(args.output_dir).name, config=vars(args))
    return accelerator


def _by_mesh(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in groups that torch can treat together: tensor parallelism shards only some of them."""
    groups = defaultdict(list)
    for parameter in parameters:
        groups[getattr(parameter, "device_mesh", None)].append(parameter)
    return list(groups.values())


def make_optimizer(model: torch.nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """AdamW in one kernel a group (``fused``); vectors (norms, biases) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": group, "weight_decay": decay}
        for decay, chosen in (
            (args.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
        for group in _by_mesh(chosen)
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> None:
    """Clip by the norm of all gradients together, also where tensor parallelism shards them differently."""
    groups = _by_mesh([p for p in model.parameters() if p.grad is not None])
    if len(groups) < 2:
        accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return
    accelerator.unscale_gradients()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for group in groups:
        for parameter in group:
            parameter.grad.mul_(factor)


def tensor_parallel(accelerator: Accelerator) -> dict:
    """What ``from_pretrained`` needs where Accelerate's configuration asks for tensor parallelism; else nothing.

    Transformers splits the layers (and shards what remains, FSDP2+TP); Accelerate hands out the batches.
    """
    sizes = accelerator.parallelism_config
    if sizes is None or not sizes.tp_enabled:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=sizes.tp_size, fsdp_size=sizes.dp_shard_size)}


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, args: TrainArguments, causal: bool
) -> TrainingLog:
    """Train for ``max_steps`` optimizer steps over as many epochs as that takes; everything is already prepared.

    The losses stay on the device until the end: the loop never waits for it, except where it checkpoints.
    """
    # Not prepared: accelerate would step it once per process. It moves once per optimizer step.
    scheduler = get_cosine_schedule_with_warmup(
        getattr(optimizer, "optimizer", optimizer), args.warmup_steps, args.max_steps
    )
    accelerator.register_for_checkpointing(scheduler)
    checkpoint = Path(args.output_dir) / "checkpoint"
    step = 0
    if args.resume and not args.compare:
        accelerator.load_state(str(checkpoint))
        step = scheduler.last_epoch
    steps_per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    epoch, done_in_epoch = divmod(step, steps_per_epoch)
    # The clock starts after compilation and first allocations; another mask may come, and compile, some steps later.
    warm = step + min(12, (args.max_steps - step) // 2)
    started = time.perf_counter()
    losses, pending, work = [], [], torch.zeros(2, dtype=torch.double, device=accelerator.device)  # tokens, pairs
    bar = tqdm(total=args.max_steps, initial=step, disable=not accelerator.is_main_process, desc="train", mininterval=1)
    curve = f"loss/{args.attn_implementation}" if args.compare else "loss"
    model.train()
    while step < args.max_steps:
        loader.set_epoch(epoch)
        skip = done_in_epoch * args.gradient_accumulation_steps
        for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    clip_gradients(accelerator, model, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            pending.append(loss.detach().float())
            if step >= warm:
                tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
                work[0] += tokens
                work[1] += attended_pairs(batch, causal)
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            step += 1
            losses.append(torch.stack(pending).mean())
            pending.clear()
            bar.update()
            if step % 10 == 0 or step == args.max_steps:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                accelerator.log({curve: losses[-1].item(), "learning_rate": scheduler.get_last_lr()[0]}, step=step)
            if step == warm:
                synchronize(accelerator)
                if accelerator.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
            if args.checkpoint_every and step % args.checkpoint_every == 0:
                accelerator.save_state(str(checkpoint))
            if step == args.max_steps:
                break
        epoch, done_in_epoch = epoch + 1, 0
    synchronize(accelerator)
    seconds = time.perf_counter() - started
    bar.close()
    mean = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
    tokens, pairs = accelerator.reduce(work, "sum").tolist()
    sizes = accelerator.parallelism_config
    copies = sizes.tp_size if sizes is not None else 1  # the processes of a tensor parallel group see the same tokens
    per_token, per_pair = training_flops(accelerator.unwrap_model(model, keep_torch_compile=False))
    flops = (tokens * per_token + pairs * per_pair) / copies / seconds / accelerator.num_processes
    peak = peak_flops(accelerator, args)
    memory = accelerator.gather(torch.tensor([peak_memory(accelerator)], device=accelerator.device)).max().item()
    return TrainingLog(mean, seconds, tokens / copies / seconds, flops / 1e12, peak and flops / peak, memory)
