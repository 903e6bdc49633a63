"""Soak: minutes of mixed training and generation with random lengths; nothing may grow, no step may be wrong.

    python examples/soak.py --minutes 10 --result_file soak.json

A LLaMA and a BERT, small and fresh, are trained on random batches (plain, padded, packed) and generate, in random
order. After a warm-up neither memory nor the number of compiled kernels may grow, and every ``check_every`` steps a
step is computed a second time, by eager attention in fp32. Exit code 1: something grew, or was wrong.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import hf_flash_plus
from hf_flash_plus.bench.environment import describe
from hf_flash_plus.checks.compare import Difference, excess

VOCABULARY = 512
TASKS = ("train llama", "train llama, padded", "train llama, packed", "train bert", "generate")


@dataclasses.dataclass
class SoakArguments:
    """How long, how large, how often checked."""

    minutes: float = dataclasses.field(default=10.0, metadata={"help": "how long"})
    max_steps: int = dataclasses.field(default=0, metadata={"help": "end after this many steps, too; 0: by time only"})
    max_length: int = dataclasses.field(default=512, metadata={"help": "longest row of a batch"})
    max_batch: int = dataclasses.field(default=6, metadata={"help": "most rows of a batch"})
    max_new_tokens: int = dataclasses.field(default=24, metadata={"help": "most tokens generated at a time"})
    check_every: int = dataclasses.field(default=100, metadata={"help": "steps between checks against eager"})
    warmup: float = dataclasses.field(default=0.2, metadata={"help": "part of the run after which nothing may grow"})
    device: str | None = dataclasses.field(default=None, metadata={"help": "cuda, cpu; default: what is there"})
    dtype: str = dataclasses.field(default="auto", metadata={"help": "bfloat16, float32; auto: bfloat16 on GPUs"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of everything random"})
    result_file: str | None = dataclasses.field(default=None, metadata={"help": "write the record there as JSON"})


def build(name: str, implementation: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The models of the other examples, smaller."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 4096, "pad_token_id": 0,
        "attn_implementation": implementation,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "llama":
        config: Any = LlamaConfig(num_key_value_heads=2, bos_token_id=1, eos_token_id=None, **sizes)
        return LlamaForCausalLM(config).to(device, dtype)
    # No dropout: a step must be computable twice.
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config).to(device, dtype)


class Soak:
    """The models, the chance that decides what comes next, and what was found."""

    def __init__(self, args: SoakArguments) -> None:
        self.args = args
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = args.dtype if args.dtype != "auto" else "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = getattr(torch, name)
        self.chance = random.Random(args.seed)
        self.models = {name: build(name, "flash_plus", self.dtype, self.device) for name in ("llama", "bert")}
        self.optimizers = {name: torch.optim.SGD(m.parameters(), lr=1e-3) for name, m in self.models.items()}
        self.done: Counter[str] = Counter()
        self.checks = self.tokens = 0
        self.worst = 0.0
        self.failures: list[str] = []
        self.samples: list[dict[str, float]] = []

    # --- one step ---

    def batch(self, task: str) -> dict[str, Tensor]:
        """A random batch for a task."""
        chance, args = self.chance, self.args
        rows, length = chance.randint(1, args.max_batch), chance.randint(2, args.max_length)
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        lengths = torch.randint(1, length + 1, (rows,), generator=generator)
        if task == "train llama":
            return self._moved(input_ids=tokens)
        if task == "train llama, packed":
            positions = torch.cat([torch.arange(n) for n in self._documents(length)])
            return self._moved(input_ids=tokens[:1], position_ids=positions[None])
        index = torch.arange(length)
        # Training pads on the right, generation on the left.
        real = index >= length - lengths[:, None] if task == "generate" else index < lengths[:, None]
        return self._moved(input_ids=tokens * real, attention_mask=real.long())

    def _documents(self, length: int) -> list[int]:
        lengths = []
        while length:
            lengths.append(self.chance.randint(1, length))
            length -= lengths[-1]
        return lengths

    def _moved(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def step(self, task: str, check: bool) -> None:
        """Draw a batch and do a task with it."""
        batch = self.batch(task)
        self.tokens += batch["input_ids"].numel()
        if task == "generate":
            new = self.chance.randint(1, self.args.max_new_tokens)
            out = self.models["llama"].eval().generate(**batch, max_new_tokens=new, do_sample=False)
            if out.shape[1] != batch["input_ids"].shape[1] + new:
                self.failures.append(f"generated {tuple(out.shape)} from {tuple(batch['input_ids'].shape)} and {new}")
            if check:
                self._compare("llama", {"input_ids": out, **self._longer(batch, new)})
            return
        name = "bert" if task == "train bert" else "llama"
        if check:
            self._compare(name, batch)
        loss = self._loss(name, self.models[name].train(), batch)
        loss.backward()
        if not loss.isfinite():
            self.failures.append(f"{task}: the loss is {loss.item()}")
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    @staticmethod
    def _longer(batch: dict[str, Tensor], new: int) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        return {"attention_mask": torch.cat((mask, mask.new_ones(mask.shape[0], new)), dim=1)}

    @staticmethod
    def _logits(name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**batch, **({"use_cache": False} if name == "llama" else {})).logits
        real = batch.get("attention_mask")
        return logits if name == "bert" or real is None else logits[real.bool()]

    def _loss(self, name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return torch.logsumexp(self._logits(name, model, batch).float(), -1).mean()

    def _compare(self, name: str, batch: dict[str, Tensor]) -> None:
        """The step once more, by eager attention in fp32 and in the dtype: logits, and the gradients of all weights."""
        model = self.models[name].train()
        found = []
        for twin in (model, *(build(name, "eager", dtype, self.device) for dtype in (torch.float32, self.dtype))):
            if twin is not model:
                twin.load_state_dict(model.state_dict())
            logits = self._logits(name, twin.train(), batch)
            loss = torch.logsumexp(logits.float(), -1).mean()
            grads = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
            found.append((logits.detach(), grads))
        (got, got_grads), (exact, exact_grads), (eager, eager_grads) = found
        self.checks += 1
        try:
            self.worst = max(self.worst, excess("logits", got, exact.double(), eager, 3))
            for (key, _), a, b, c in zip(model.named_parameters(), got_grads, exact_grads, eager_grads):
                if a is not None:
                    self.worst = max(self.worst, excess(f"the gradient of {key}", a, b.double(), c, 4))
        except Difference as error:
            self.failures.append(f"step {sum(self.done.values())}, {name}, {tuple(batch['input_ids'].shape)}: {error}")

    # --- what must not grow ---

    def sample(self) -> None:
        """Memory and compiled kernels, now."""
        gc.collect()
        # Resident pages, in Linux's own words; elsewhere 0.
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        mib = 2.0**20
        self.samples.append(
            {
                "step": sum(self.done.values()),
                "host_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / mib, 1) if pages else 0.0,
                "device_mib": round(torch.cuda.memory_allocated() / mib, 1) if self.device.type == "cuda" else 0.0,
                "kernels": compiled_kernels(),
            }
        )

    def run(self, save: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
        """The whole soak, as the record; ``save`` gets what there is of it from time to time."""
        begin, args = time.monotonic(), self.args
        hf_flash_plus.dispatch.clear_cache()  # so that the record names the providers of this run
        deadline, sampled, told = begin + 60 * args.minutes, 0.0, begin
        while time.monotonic() < deadline and not 0 < args.max_steps <= sum(self.done.values()):
            # In turn at first, so that the warm-up meets everything.
            step = sum(self.done.values())
            task = TASKS[step % len(TASKS)] if step < 10 * len(TASKS) else self.chance.choice(TASKS)
            self.step(task, check=step % args.check_every == args.check_every - 1)
            self.done[task] += 1
            if time.monotonic() - sampled > max(1.0, args.minutes * 60 / 200) or args.max_steps:
                self.sample()
                sampled = time.monotonic()
            if time.monotonic() - told > max(5.0, args.minutes * 60 / 20):
                told = time.monotonic()
                record = self.record(told - begin, finished=False)
                print(summary(record), flush=True)
                save(record)
        self.failures += growth(self.samples, args.warmup)
        return self.record(time.monotonic() - begin, finished=True)

    def record(self, seconds: float, finished: bool) -> dict[str, Any]:
        """What was done and found so far; a soak that did not finish has not passed."""
        return {
            "passed": finished and not self.failures and self.checks > 0,
            "finished": finished,
            "seconds": round(seconds, 1),
            "steps": dict(self.done),
            "tokens": self.tokens,
            "checks": self.checks,
            "worst_error": round(self.worst, 3),
            "worst_error_is": "a part of what is allowed: a multiple of eager's own error in this dtype",
            "failures": self.failures,
            "providers": hf_flash_plus.providers_used(),
            "arguments": dataclasses.asdict(self.args),
            "environment": describe(),
            "samples": self.samples,
        }


def compiled_kernels() -> int:
    """How many kernels Triton has compiled in this run: one folder of its cache each."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    return sum(1 for _ in folder.iterdir()) if os.environ.get("TRITON_CACHE_DIR") and folder.is_dir() else 0


#: How much more the last quarter of the samples may show than the first one after the warm-up.
ALLOWED = {"host_mib": 48.0, "device_mib": 2.0, "kernels": 0.0}


def growth(samples: list[dict[str, float]], warmup: float) -> list[str]:
    """What grew after the warm-up, in words; medians, because lengths are random."""
    steady = samples[int(len(samples) * warmup) :]
    quarter = len(steady) // 4
    if not quarter:
        return []
    found = []
    for name, allowed in ALLOWED.items():
        first, last = (
            sorted(sample[name] for sample in part)[quarter // 2] for part in (steady[:quarter], steady[-quarter:])
        )
        if last - first > allowed:
            found.append(f"{name} grew from {first:.0f} to {last:.0f} after the warm-up")
    return found


def summary(record: dict[str, Any]) -> str:
    """A record in one line."""
    last = record["samples"][-1]
    state = "passed" if record["passed"] else "FAILED" if record["finished"] or record["failures"] else "running"
    return (
        f"{state}: {sum(record['steps'].values())} steps, {record['tokens']} tokens, "
        f"{record['checks']} checked against eager (worst error {record['worst_error']} of what is allowed), "
        f"{last['kernels']:.0f} kernels, host {last['host_mib']:.0f} MiB, device {last['device_mib']:.0f} MiB, "
        f"{record['seconds']:.0f} s, by {', '.join(record['providers'])}"
    )


def dumps(record: dict[str, Any]) -> str:
    """The record as JSON, a sample a line."""
    samples = ",\n    ".join(json.dumps(sample) for sample in record["samples"])
    head = json.dumps({**record, "samples": []}, indent=2)
    return head.removesuffix("[]\n}") + f"[\n    {samples}\n  ]\n}}\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser((SoakArguments,)).parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    transformers_logging.set_verbosity_error()

    def save(record: dict[str, Any]) -> None:
        if args.result_file:
            path = Path(args.result_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dumps(record), encoding="utf-8")

    # A cache of its own, so that what it holds was compiled by this run.
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="hf_flash_plus_soak_") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            record = Soak(args).run(save)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
    save(record)
    for failure in record["failures"]:
        print(f"failed: {failure}")
    print(summary(record))
    return record


if __name__ == "__main__":
    sys.exit(0 if main()["passed"] else 1)
