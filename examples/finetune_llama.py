"""Next-token training of a LLaMA, or of any causal language model, on packed documents.

    accelerate launch examples/finetune_llama.py configs/train/llama_demo.yaml
    python examples/finetune_llama.py --model_name_or_path <model> --train_file corpus.jsonl --mixed_precision bf16
    python examples/finetune_llama.py configs/train/llama_demo.yaml --compare flash_plus,sdpa

``--packing`` says what a batch is; attention stays within a document in each:
    packed        full rows: documents follow each other, each with ``position_ids`` from 0
    padding_free  one row of whole documents (DataCollatorWithFlattening), their bounds in ``cu_seq_lens``
    padded        a document per row, padded on the right, with an ``attention_mask``
Evaluation is on held-out documents, packed, in bits per byte (comparable between tokenizers).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from common import (
    DataArguments,
    Document,
    TrainArguments,
    finish,
    hold_out,
    launch,
    load_documents,
    make_optimizer,
    make_tokenizer,
    parse_arguments,
    tensor_parallel,
    train,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, LlamaConfig

import hf_flash_plus


@dataclasses.dataclass
class LlamaArguments:
    """The fresh model's sizes (unused with ``model_name_or_path``), the rows, and the sample at the end."""

    hidden_size: int = dataclasses.field(default=256, metadata={"help": "width"})
    intermediate_size: int = dataclasses.field(default=688, metadata={"help": "width of the MLP"})
    num_layers: int = dataclasses.field(default=4, metadata={"help": "layers"})
    num_heads: int = dataclasses.field(default=8, metadata={"help": "attention heads"})
    num_kv_heads: int = dataclasses.field(default=4, metadata={"help": "heads of keys and values"})
    dropout: float = dataclasses.field(default=0.0, metadata={"help": "of attention weights"})
    seq_length: int = dataclasses.field(default=512, metadata={"help": "tokens per row, and per document"})
    packing: Literal["packed", "padding_free", "padded"] = dataclasses.field(
        default="packed", metadata={"help": "what a batch is (see above)"}
    )
    fuse_rotary: bool = dataclasses.field(
        default=False, metadata={"help": "rotary embeddings by one launch a layer (hf_flash_plus.fuse_rotary)"}
    )
    max_eval_rows: int = dataclasses.field(default=64, metadata={"help": "rows evaluated; 0: all held-out text"})
    lora_rank: int = dataclasses.field(default=0, metadata={"help": "train LoRA adapters of this rank (needs peft)"})
    prompt: str = dataclasses.field(default="def __init__(self", metadata={"help": "what the sample starts with"})
    max_new_tokens: int = dataclasses.field(default=64, metadata={"help": "length of the sample; 0: none"})
    temperature: float = dataclasses.field(default=0.7, metadata={"help": "of the sample; 0: greedy"})


@functools.lru_cache(maxsize=4)  # --compare trains several models on the same rows
def rows_once(
    make: Callable[..., list[dict]], documents: tuple[Document, ...], tokenizer, seq_length: int
) -> list[dict]:
    """``make(documents, tokenizer, seq_length)``, kept for the next call."""
    return make(list(documents), tokenizer, seq_length)


def pack(documents: list[Document], tokenizer, seq_length: int) -> list[dict]:
    """Full rows of ``seq_length`` tokens: documents one after another, ``<bos> text <eos>`` each.

    ``position_ids`` restart at every document: this is what tells attention where one ends. A document that a row's end
    cuts goes on in the next row as a document of its own. No token is predicted from another document's (label -100 at
    each start). ``num_bytes`` is the text behind a row's labels. The tokens of the last, incomplete row are left out.
    """
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    rows: list[dict] = []
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    num_bytes = 0.0
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    for document, tokens in zip(documents, encoded):
        tokens = [*tokens, eos]
        bytes_per_token = len(document.text.encode()) / len(tokens)
        while tokens:
            piece, tokens = tokens[: seq_length - len(ids) - 1], tokens[seq_length - len(ids) - 1 :]
            ids += [bos, *piece]
            positions += range(len(piece) + 1)
            labels += [-100, *piece]
            num_bytes += bytes_per_token * len(piece)
            if len(ids) >= seq_length - 1:  # a single free place cannot hold a document: an <eos> fills it
                fill = seq_length - len(ids)
                row = (ids + [eos] * fill, positions + [0] * fill, labels + [-100] * fill)
                rows.append(dict(zip(("input_ids", "position_ids", "labels"), row), num_bytes=num_bytes))
                ids, positions, labels, num_bytes = [], [], [], 0.0
    return rows


def cut(documents: list[Document], tokenizer, seq_length: int) -> list[dict]:
    """Rows of at most ``seq_length`` tokens, a document or a piece of one each, for the modes that do not pack."""
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    rows = []
    for tokens in tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]:
        tokens = [*tokens, eos]
        for start in range(0, len(tokens), seq_length - 1):
            rows.append({"input_ids": [bos, *tokens[start : start + seq_length - 1]]})
    return rows


def collate_padded(rows: list[dict], pad: int) -> dict:
    """A document per row, padded on the right to a multiple of 8; neither padding nor a first token is predicted."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, fill = row["input_ids"], width - len(row["input_ids"])
        batch["input_ids"].append(ids + [pad] * fill)
        batch["attention_mask"].append([1] * len(ids) + [0] * fill)
        batch["labels"].append([-100, *ids[1:]] + [-100] * fill)
    return {key: torch.tensor(value) for key, value in batch.items()}


def collate_padding_free(rows: list[dict]) -> dict:
    """All documents in one row without padding, as flash-attn's varlen functions take them."""
    return {**DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows), "use_cache": False}


def collate(rows: list[dict], extra: tuple[str, ...] = ()) -> dict:
    """Stack rows; ``use_cache=False`` because Transformers looks for packed documents only without a cache."""
    keys = ("input_ids", "position_ids", "labels", *extra)
    return {**{key: torch.tensor([row[key] for row in rows]) for key in keys}, "use_cache": False}


@torch.no_grad()
def bits_per_byte(accelerator, model, loader) -> float:
    """Cross-entropy of the held-out text in bits, divided by its bytes."""
    model.eval()
    nats = num_bytes = 0.0
    for batch in tqdm(loader, disable=not accelerator.is_main_process, desc="eval", leave=False):
        row_bytes = batch.pop("num_bytes")
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        row_nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
        row_nats, row_bytes = accelerator.gather_for_metrics((row_nats, row_bytes))
        nats += row_nats.double().sum().item()
        num_bytes += row_bytes.double().sum().item()
    model.train()
    return nats / math.log(2) / num_bytes


def make_model(accelerator, args: TrainArguments, sizes: LlamaArguments, tokenizer):
    """The pretrained model, or a fresh LLaMA, with the attention implementation of the arguments."""
    path, parallel = args.model_name_or_path, tensor_parallel(accelerator)
    if not path:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            attention_dropout=sizes.dropout,
            max_position_embeddings=sizes.seq_length,
            tie_word_embeddings=True,
            initializer_range=sizes.hidden_size**-0.5,  # the default, 0.02, is for models many times wider
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with accelerator.device:  # a GPU draws weights much faster
            model = AutoModelForCausalLM.from_config(config, attn_implementation=args.attn_implementation)
        if parallel:  # only a saved model can be loaded in parts
            path = str(Path(args.output_dir) / "fresh")
            if accelerator.is_main_process:
                model.save_pretrained(path)
            accelerator.wait_for_everyone()
    if path:
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=args.attn_implementation, dtype=torch.float32, **parallel
        )
    if sizes.fuse_rotary:
        hf_flash_plus.fuse_rotary(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if sizes.lora_rank:
        from peft import LoraConfig, get_peft_model

        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        lora = LoraConfig(r=sizes.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return torch.compile(model, backend=args.compile_backend) if args.compile else model


def generate_sample(accelerator, model, tokenizer, sizes: LlamaArguments) -> str:
    """The prompt and its continuation; all processes take part (sharded models need them)."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False).eval()
    prompt = tokenizer(sizes.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if tokenizer.bos_token_id is not None:
        prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), prompt], dim=1)
    prompt = prompt.to(accelerator.device)
    with accelerator.autocast():
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sizes.max_new_tokens,
            do_sample=sizes.temperature > 0,
            temperature=sizes.temperature or None,
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def run(accelerator, arguments: tuple) -> dict:
    """Train, evaluate before and after, generate; returns what ``result.json`` holds."""
    data, args, sizes = arguments
    train_documents, eval_documents = hold_out(load_documents(data, args.seed), data.eval_fraction)
    tokenizer = make_tokenizer(args, [document.text for document in train_documents])
    rows_of, train_collate = {
        "packed": (pack, collate),
        "padding_free": (cut, collate_padding_free),
        "padded": (cut, lambda rows: collate_padded(rows, tokenizer.pad_token_id)),
    }[sizes.packing]
    train_rows = rows_once(rows_of, tuple(train_documents), tokenizer, sizes.seq_length)
    eval_rows = rows_once(pack, tuple(eval_documents), tokenizer, sizes.seq_length)[: sizes.max_eval_rows or None]
    if not train_rows or not eval_rows:
        raise SystemExit(f"too little text for rows of {sizes.seq_length} tokens: use a smaller --seq_length")
    model = make_model(accelerator, args, sizes, tokenizer)
    train_loader = DataLoader(train_rows, batch_size=args.batch_size, shuffle=True, collate_fn=train_collate)
    eval_loader = DataLoader(
        eval_rows, batch_size=args.batch_size, collate_fn=lambda rows: collate(rows, extra=("num_bytes",))
    )
    accelerator.print(f"{len(train_rows)} training rows, {len(eval_rows)} held-out rows of {sizes.seq_length} tokens")
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model, make_optimizer(model, args), train_loader, eval_loader
    )
    extra = {"bits_per_byte_start": bits_per_byte(accelerator, model, eval_loader)}
    log = train(accelerator, model, optimizer, train_loader, args, causal=True)
    extra["bits_per_byte_end"] = bits_per_byte(accelerator, model, eval_loader)
    accelerator.print(f"bits/byte    {extra['bits_per_byte_start']:.3f} -> {extra['bits_per_byte_end']:.3f} (held out)")
    if sizes.max_new_tokens:
        extra["sample"] = generate_sample(accelerator, model, tokenizer, sizes)
        accelerator.print("sample       " + extra["sample"].replace("\n", "\n             "))
    return finish(accelerator, model, tokenizer, log, arguments, extra)


def main(argv: list[str] | None = None) -> dict:
    """Run with the arguments of the command line."""
    return launch(run, parse_arguments(DataArguments, TrainArguments, LlamaArguments, argv=argv))


if __name__ == "__main__":
    main()
