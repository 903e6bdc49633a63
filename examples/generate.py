"""Generate from prompts: batched, with a dynamic or a static cache, streamed, or by continuous batching.

    echo "def main():" | python examples/generate.py --model_name_or_path outputs/llama_demo
    python examples/generate.py --prompts prompts.txt --mode continuous --max_new_tokens 64

Without a model a small fresh one is made (its text is noise; the point is speed and that everything runs).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TextStreamer,
    set_seed,
)

import hf_flash_plus

MODES = ("batch", "stream", "continuous")


@dataclasses.dataclass
class GenerateArguments:
    """What to generate, with what, and how."""

    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "a model with its tokenizer; without it a small fresh LLaMA over bytes"}
    )
    prompts: str = dataclasses.field(default="-", metadata={"help": "a file with a prompt a line; -: standard input"})
    mode: str = dataclasses.field(
        default="batch",
        metadata={"help": "batch: prompts in padded batches; stream: one after another, printed as they come; "
                          "continuous: continuous batching", "choices": MODES},
    )  # fmt: skip
    cache: str = dataclasses.field(
        default="dynamic", metadata={"help": "dynamic, or static (compiled on GPUs)", "choices": ("dynamic", "static")}
    )
    attn_implementation: str = dataclasses.field(
        default="flash_plus", metadata={"help": "flash_plus, sdpa, eager, flash_attention_2, ...: the A/B switch"}
    )
    fuse_rotary: bool = dataclasses.field(
        default=False, metadata={"help": "rotary embeddings by one launch a layer (hf_flash_plus.fuse_rotary)"}
    )
    batch_size: int = dataclasses.field(default=8, metadata={"help": "prompts per batch (mode batch)"})
    max_new_tokens: int = dataclasses.field(default=64, metadata={"help": "tokens to generate for each prompt"})
    temperature: float = dataclasses.field(default=0.0, metadata={"help": "0: greedy"})
    dtype: str = dataclasses.field(
        default="auto", metadata={"help": "float32, bfloat16, float16; auto: bfloat16 on GPUs, float32 on the CPU"}
    )
    device: str | None = dataclasses.field(default=None, metadata={"help": "cuda, cpu, ...; default: what is there"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of the fresh model and of sampling"})
    result_file: str | None = dataclasses.field(default=None, metadata={"help": "write texts and figures as JSON"})


def read_prompts(source: str) -> list[str]:
    """One prompt a line, empty lines skipped."""
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise SystemExit(f"no prompts in {'standard input' if source == '-' else source}")
    return prompts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, for the fresh model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def load(args: GenerateArguments, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer, padding on the left."""
    name = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, name)
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation, dtype=dtype
        )
    else:
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=args.attn_implementation, dtype=dtype)
    if args.fuse_rotary:
        hf_flash_plus.fuse_rotary(model)
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def generate_batches(
    model: Any, tokenizer: Any, prompts: list[str], config: GenerationConfig, batch_size: int, stream: bool
) -> list[list[int]]:
    """New tokens of each prompt, from ``generate`` on left-padded batches; streamed when the batch is 1."""
    results: list[list[int]] = []
    for first in range(0, len(prompts), batch_size):
        rows = [{"input_ids": encode(tokenizer, prompt)} for prompt in prompts[first : first + batch_size]]
        batch = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            streamer=streamer,
        )
        new = output[:, batch["input_ids"].shape[1] :].tolist()
        results += [[token for token in row if token != config.pad_token_id] for row in new]
    return results


def generate_continuously(model: Any, tokenizer: Any, prompts: list[str], config: GenerationConfig) -> list[list[int]]:
    """New tokens of each prompt, from continuous batching: requests join and leave the batch at every step."""
    outputs = model.generate_batch(
        inputs=[encode(tokenizer, prompt) for prompt in prompts], generation_config=config, progress_bar=False
    )
    order = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))  # requests are numbered as they came
    return [list(outputs[name].generated_tokens) for name in order]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Generate, print the texts and the speed; returns what ``--result_file`` holds."""
    (args,) = HfArgumentParser(GenerateArguments).parse_args_into_dataclasses(argv)
    prompts = read_prompts(args.prompts)
    set_seed(args.seed)
    device = torch.device(args.device or (torch.accelerator.current_accelerator() or "cpu"))
    model, tokenizer = load(args, device)
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cache_implementation="static" if args.cache == "static" and args.mode != "continuous" else None,
    )
    started = time.perf_counter()
    if args.mode == "continuous":
        if args.cache == "static":
            raise SystemExit("continuous batching has a paged cache of its own; leave --cache at dynamic")
        tokens = generate_continuously(model, tokenizer, prompts, config)
    else:
        stream = args.mode == "stream"
        tokens = generate_batches(model, tokenizer, prompts, config, 1 if stream else args.batch_size, stream)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - started
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if args.mode != "stream":
        for prompt, text in zip(prompts, texts):
            print(f"{prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else f"{prompt}{text}")
    total = sum(map(len, tokens))
    providers = hf_flash_plus.providers_used()
    print(
        f"{total} tokens in {seconds:.2f} s ({total / seconds:,.1f} tokens/s) on {device}, attention "
        f"{args.attn_implementation}, served by {', '.join(providers) or 'Transformers'}",
        file=sys.stderr,
    )
    result = {
        "tokens": total,
        "seconds": seconds,
        "tokens_per_second": total / seconds,
        "providers": providers,
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)],
        "arguments": vars(args),
    }
    if args.result_file:
        Path(args.result_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
