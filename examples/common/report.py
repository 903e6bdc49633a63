"""From finished trainings to ``result.json``, ``loss.png`` and what is printed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

import hf_flash_plus

from .arguments import TrainArguments
from .measure import TrainingLog
from .training import make_accelerator


def plot_losses(path: Path, curves: dict[str, list[float]]) -> None:
    """Draw loss curves over the steps into one PNG; without matplotlib, say so."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for i, (name, losses) in enumerate(curves.items()):
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=2.5 / (i + 1))
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def finish(accelerator: Accelerator, model: Any, tokenizer: Any, log: TrainingLog, arguments: Any, extra: Any) -> dict:
    """Print the outcome and save the model where asked; returns what ``result.json`` holds of this training."""
    args = next(a for a in arguments if isinstance(a, TrainArguments))
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    result = {
        "attn_implementation": args.attn_implementation,
        "providers": hf_flash_plus.providers_used() if args.attn_implementation == "flash_plus" else [],
        "device": str(accelerator.device),
        "engine": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_start": log.loss_around(end=False),
        "loss_end": log.loss_around(end=True),
        "tokens_per_second": log.tokens_per_second,
        "tflops_per_device": log.tflops_per_device,
        "mfu": log.mfu,
        "peak_memory_bytes": log.peak_memory_bytes,
        "train_seconds": log.seconds,
        **extra,
        "losses": log.losses,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, transformers, accelerate, hf_flash_plus)},
        },
        "arguments": {key: value for group in arguments for key, value in vars(group).items()},
    }
    mfu = "" if log.mfu is None else f", {log.mfu:.1%} MFU"
    served = ", ".join(result["providers"]) or "Transformers"
    accelerator.print(f"attention    {args.attn_implementation}, served by {served}")
    accelerator.print(f"loss         {result['loss_start']:.3f} -> {result['loss_end']:.3f} in {len(log.losses)} steps")
    accelerator.print(
        f"speed        {log.tokens_per_second:,.0f} tokens/s{mfu}, peak memory {log.peak_memory_bytes / 2**20:,.0f} MiB"
    )
    if args.save_model:
        model.save_pretrained(
            args.output_dir,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    return result


def _write(path: Path, result: dict) -> None:
    """Whole or not at all: a training that is stopped leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


#: Arguments that may differ between a training and one that stands in for it.
_IRRELEVANT = ("compare", "resume", "report_to")


def _kept(path: Path, arguments: tuple[Any, ...]) -> dict | None:
    """What an earlier training with the same arguments wrote; None where there is none."""
    if not path.exists():
        return None
    result: dict = json.loads(path.read_text())
    now = {key: value for group in arguments for key, value in vars(group).items()}
    before = result["arguments"]
    return None if any(before.get(key) != now[key] for key in now if key not in _IRRELEVANT) else result


def launch(run: Callable[[Accelerator, tuple[Any, ...]], dict], arguments: tuple[Any, ...]) -> dict:
    """Call a script's ``run`` with each attention implementation; write ``result.json`` and ``loss.png``."""
    args = next(a for a in arguments if isinstance(a, TrainArguments))
    accelerator = make_accelerator(args)
    names = args.compare.split(",") if args.compare else [args.attn_implementation]
    output = Path(args.output_dir)
    runs = {}
    for name in names:
        args.attn_implementation = name
        kept = output / f"{name}.json"  # each training on its own: --resume runs only those that are missing
        if args.compare and args.resume and (found := _kept(kept, arguments)):
            accelerator.print(f"{name}: has run before")
            runs[name] = found
            continue
        set_seed(args.seed, deterministic=args.deterministic)
        runs[name] = run(accelerator, arguments)
        accelerator.free_memory()
        if args.compare and accelerator.is_main_process:
            _write(kept, runs[name])
    result = runs[names[0]]
    curves = {name: run["losses"] for name, run in runs.items()}
    if args.compare:
        gap = max(max(losses) - min(losses) for losses in zip(*curves.values()))
        result = {"compare": names, "largest_loss_gap": gap, "runs": runs}
        accelerator.print(f"losses       differ by at most {gap:.2e} ({', '.join(names)})")
    if accelerator.is_main_process:
        _write(output / "result.json", result)
        plot_losses(output / "loss.png", curves)
        print(f"result       {output / 'result.json'}")
    accelerator.wait_for_everyone()  # gloo aborts where a process leaves while another still talks to it
    accelerator.end_training()
    return result
