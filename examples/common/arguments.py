"""The arguments of both fine-tuning scripts, from the command line and YAML."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


@dataclasses.dataclass
class DataArguments:
    """Where the text comes from; without any of these, Python's own standard library."""

    train_file: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "a text file, a .jsonl, .parquet or .csv file (a document per row) or a folder of text files"
        },
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
    resume: bool = dataclasses.field(
        default=False, metadata={"help": "go on from output_dir's checkpoint; with compare: keep what has run"}
    )
    save_model: bool = dataclasses.field(default=False, metadata={"help": "save model and tokenizer at the end"})
    report_to: str | None = dataclasses.field(
        default=None, metadata={"help": "an accelerate tracker: tensorboard, trackio, ..."}
    )


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
