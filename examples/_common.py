"""What the two fine-tuning scripts share: arguments, documents, the tokenizer, the training loop, the report."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import platform
import random
import resource
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

import hf_flash_plus


@dataclasses.dataclass
class DataArguments:
    """Where the text comes from; without any of these, Python's own standard library."""

    train_file: str | None = dataclasses.field(
        default=None,
        metadata={"help": "a text file, a .jsonl or .parquet file (a document per row) or a folder of text files"},
    )
    dataset: str | None = dataclasses.field(default=None, metadata={"help": "a name or path for `datasets`"})
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "the dataset's configuration"})
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "the split that is read, then divided"})
    text_column: str = dataclasses.field(default="text", metadata={"help": "column of the text (rows)"})
    label_column: str = dataclasses.field(default="label", metadata={"help": "column of the label (rows)"})
    eval_fraction: float = dataclasses.field(default=0.1, metadata={"help": "part of the documents held out"})
    max_documents: int = dataclasses.field(default=0, metadata={"help": "use this many documents at most; 0: all"})


@dataclasses.dataclass
class TrainArguments:
    """How to train."""

    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "a pretrained model; without it a small fresh one"}
    )
    attn_implementation: str = dataclasses.field(
        default="flash_plus", metadata={"help": "flash_plus, sdpa, eager, flash_attention_2, ...: the A/B switch"}
    )
    compare: str | None = dataclasses.field(
        default=None, metadata={"help": "two or more of these, as flash_plus,sdpa: the same training with each"}
    )
    max_steps: int = dataclasses.field(default=200, metadata={"help": "optimizer steps"})
    batch_size: int = dataclasses.field(default=8, metadata={"help": "rows per process and forward pass"})
    gradient_accumulation_steps: int = dataclasses.field(default=1, metadata={"help": "forward passes per step"})
    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    warmup_steps: int = dataclasses.field(default=10, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = dataclasses.field(default=0.01, metadata={"help": "AdamW's weight decay"})
    max_grad_norm: float = dataclasses.field(default=1.0, metadata={"help": "gradient clipping"})
    mixed_precision: str | None = dataclasses.field(
        default=None, metadata={"help": "no, bf16 or fp16; default: what accelerate is configured to"}
    )
    gradient_checkpointing: bool = dataclasses.field(default=False, metadata={"help": "recompute activations"})
    compile: bool = dataclasses.field(default=False, metadata={"help": "torch.compile the model"})
    compile_backend: str = dataclasses.field(default="inductor", metadata={"help": "of torch.compile"})
    deterministic: bool = dataclasses.field(default=False, metadata={"help": "deterministic algorithms only"})
    peak_tflops: float | None = dataclasses.field(
        default=None, metadata={"help": "of the device at this precision, for MFU; default: known by the GPU's name"}
    )
    vocab_size: int = dataclasses.field(default=1024, metadata={"help": "of a fresh model's tokenizer; 261: bytes"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of everything random"})
    output_dir: str = dataclasses.field(default="outputs/run", metadata={"help": "result.json, checkpoints, model"})
    checkpoint_every: int = dataclasses.field(default=0, metadata={"help": "steps between checkpoints; 0: none"})
    resume: bool = dataclasses.field(default=False, metadata={"help": "go on from output_dir's checkpoint"})
    save_model: bool = dataclasses.field(default=False, metadata={"help": "save model and tokenizer at the end"})
    report_to: str | None = dataclasses.field(default=None, metadata={"help": "an accelerate tracker: tensorboard"})


class Document(NamedTuple):
    """One text, the unit of the split into training and evaluation."""

    text: str
    label: str


def parse_arguments(*types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Dataclasses from the command line, optionally after a YAML file whose values become the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(types)
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(argv[0]).read_text()) or {}
        unknown = set(values) - {field.name for kind in types for field in dataclasses.fields(kind)}
        if unknown:
            parser.error(f"{argv[0]} sets what this script does not have: {', '.join(sorted(unknown))}")
        parser.set_defaults(**values)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(argv)


# --- documents ---

#: Standard library packages left out: tests, generated tables, and what newer Pythons no longer have.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
SKIPPED |= {"distutils", "__phello__", "config", "turtledemo"}


@functools.cache
def _read_folder(root: Path, suffixes: tuple[str, ...]) -> list[Document]:
    """Every text file below a folder; its label is the folder's first-level subfolder ('' for files at the top)."""
    documents = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix in suffixes and path.is_file() and not SKIPPED.intersection(parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                documents.append(Document(text, parts[0] if len(parts) > 1 else ""))
    return documents


def _read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def load_documents(args: DataArguments, seed: int) -> list[Document]:
    """The documents that the arguments name, in an order that depends on the seed only."""
    if args.dataset and args.train_file:
        raise SystemExit("give --dataset or --train_file, not both")
    if args.dataset:
        from datasets import load_dataset

        rows = load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)
        documents = [Document(row[args.text_column], str(row.get(args.label_column, ""))) for row in rows]
    elif args.train_file is None:
        documents = _read_folder(Path(sysconfig.get_paths()["stdlib"]), (".py",))
    elif Path(args.train_file).is_dir():
        documents = _read_folder(Path(args.train_file), (".txt", ".md", ".rst", ".py"))
    elif args.train_file.endswith((".jsonl", ".parquet")):
        rows = _read_rows(Path(args.train_file))
        documents = [Document(row[args.text_column], str(row.get(args.label_column, ""))) for row in rows]
    else:
        documents = [Document(Path(args.train_file).read_text(encoding="utf-8"), "")]
    documents = list(documents)  # the folder's are kept for the next run of --compare
    random.Random(seed).shuffle(documents)
    documents = documents[: args.max_documents or None]
    if not documents:
        raise SystemExit("no documents found")
    return documents


def hold_out(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into training and evaluation by whole documents, the same part of each label.

    A single document is split in two: its tail is held out.
    """
    if len(documents) == 1:
        text, label = documents[0]
        cut = int(len(text) * (1 - fraction))
        return [Document(text[:cut], label)], [Document(text[cut:], label)]
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.label].append(document)
    train: list[Document] = []
    held_out: list[Document] = []
    for group in groups.values():
        count = max(1, round(len(group) * fraction)) if len(group) > 1 else 0
        held_out += group[:count]
        train += group[count:]
    return train, held_out


def make_tokenizer(args: TrainArguments, texts: list[str]) -> PreTrainedTokenizerFast:
    """The pretrained model's tokenizer, or a byte-level BPE trained on the texts (every string is encodable)."""
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    special = ["<pad>", "<bos>", "<eos>", "<cls>", "<sep>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=args.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    ids = [(token, core.token_to_id(token)) for token in ("<cls>", "<sep>")]
    core.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ids)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "cls_token", "sep_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


# --- training ---

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


def make_accelerator(args: TrainArguments) -> Accelerator:
    """The accelerator the arguments describe; only its main process logs above warnings."""
    if args.compare and (args.resume or args.checkpoint_every or args.save_model):
        raise SystemExit("--compare trains several models: no --resume, --checkpoint_every or --save_model")
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
    """AdamW; vectors (norms, biases) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": group, "weight_decay": decay}
        for decay, chosen in (
            (args.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
        for group in _by_mesh(chosen)
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))


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


def _synchronize(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(accelerator: Accelerator) -> int:
    """Bytes: the device's peak since the warm-up where there is one, else the process' peak resident set."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    if args.resume:
        accelerator.load_state(str(checkpoint))
        step = scheduler.last_epoch
    steps_per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    epoch, done_in_epoch = divmod(step, steps_per_epoch)
    warm = step + min(3, (args.max_steps - step) // 2)  # the clock starts after compilation and first allocations
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
                _synchronize(accelerator)
                if accelerator.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
            if args.checkpoint_every and step % args.checkpoint_every == 0:
                accelerator.save_state(str(checkpoint))
            if step == args.max_steps:
                break
        epoch, done_in_epoch = epoch + 1, 0
    _synchronize(accelerator)
    seconds = time.perf_counter() - started
    bar.close()
    mean = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
    tokens, pairs = accelerator.reduce(work, "sum").tolist()
    sizes = accelerator.parallelism_config
    copies = sizes.tp_size if sizes is not None else 1  # the processes of a tensor parallel group see the same tokens
    per_token, per_pair = training_flops(accelerator.unwrap_model(model, keep_torch_compile=False))
    flops = (tokens * per_token + pairs * per_pair) / copies / seconds / accelerator.num_processes
    peak = peak_flops(accelerator, args)
    memory = accelerator.gather(torch.tensor([_peak_memory(accelerator)], device=accelerator.device)).max().item()
    return TrainingLog(mean, seconds, tokens / copies / seconds, flops / 1e12, peak and flops / peak, memory)


# --- results ---


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


def launch(run: Callable[[Accelerator, tuple[Any, ...]], dict], arguments: tuple[Any, ...]) -> dict:
    """Call a script's ``run`` with each attention implementation; write ``result.json`` and ``loss.png``."""
    args = next(a for a in arguments if isinstance(a, TrainArguments))
    accelerator = make_accelerator(args)
    names = args.compare.split(",") if args.compare else [args.attn_implementation]
    runs = {}
    for name in names:
        args.attn_implementation = name
        set_seed(args.seed, deterministic=args.deterministic)
        runs[name] = run(accelerator, arguments)
        accelerator.free_memory()
    result = runs[names[0]]
    curves = {name: run["losses"] for name, run in runs.items()}
    if args.compare:
        gap = max(max(losses) - min(losses) for losses in zip(*curves.values()))
        result = {"compare": names, "largest_loss_gap": gap, "runs": runs}
        accelerator.print(f"losses       differ by at most {gap:.2e} ({', '.join(names)})")
    if accelerator.is_main_process:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        plot_losses(output / "loss.png", curves)
        print(f"result       {output / 'result.json'}")
    accelerator.end_training()
    return result
