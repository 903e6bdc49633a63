"""Soak: minutes of mixed training and generation with random lengths; nothing may grow, no step may be wrong.

    python examples/soak.py --minutes 10 --result_file soak.json

A LLaMA and a BERT, small and fresh, are trained on random batches (plain, padded, packed) and generate, in random
order. It begins with one batch of every class that kernels are compiled for (:func:`classes`); after that, and a
warm-up, no kernel may be compiled and no memory may grow. Every ``check_every`` steps a step is computed a second time,
by eager attention in fp32. Exit code 1: something grew, came late, or was wrong.
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
#: Lengths that kernels treat apart (multiples of 128; up to 8 and 16 rows, which decoding's kernel serves; up to 64
#: rows; up to 256 keys, where gradients are computed in another way), and some between.
LENGTHS = (2, 8, 9, 16, 17, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 384, 512, 513, 640)
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


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a batch looks like: its sizes, whether some of it is padding, into how many documents a packed row falls."""

    rows: int
    length: int
    padded: bool = False
    documents: int = 1
    new_tokens: int = 4
    #: Compared with eager whatever the step's number: what was generated is then longer than any batch for training.
    checked: bool = False


def classes(args: SoakArguments) -> list[tuple[str, Shape]]:
    """A batch of every class that kernels are compiled for, by task: lengths on both sides of every limit, one row and
    the most, with padding and without. Chance alone meets some of them after minutes: a padded batch without padding is
    one in several hundred."""
    lengths = sorted({min(length, args.max_length) for length in (*LENGTHS, args.max_length)})
    new = min(4, args.max_new_tokens)
    found = []
    for length in lengths:
        for rows in range(1, args.max_batch + 1):
            found += [("generate", Shape(rows, length, padded, new_tokens=new)) for padded in (False, True)]
        for rows in sorted({1, args.max_batch}):
            found.append(("train llama", Shape(rows, length)))
            for task in ("train llama, padded", "train bert"):
                found += [(task, Shape(rows, length, padded)) for padded in (False, True)]
        found += [("train llama, packed", Shape(1, length, documents=n)) for n in sorted({1, 2, min(5, length)})]
    longest = {"length": args.max_length, "new_tokens": args.max_new_tokens, "checked": True}
    for rows in sorted({1, args.max_batch}):
        found += [("generate", Shape(rows, padded=padded, **longest)) for padded in (False, True)]
    return found


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
        self.warm = False
        self.kernels = Kernels()
        self.samples: list[dict[str, float]] = []

    # --- one step ---

    def batch(self, task: str, shape: Shape | None = None) -> dict[str, Tensor]:
        """A random batch for a task, of a shape or of a random one."""
        chance, args = self.chance, self.args
        if shape is None:
            rows, length = chance.randint(1, args.max_batch), chance.randint(2, args.max_length)
        else:
            rows, length = shape.rows, shape.length
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        lengths = torch.randint(1, length + 1, (rows,), generator=generator)
        if shape is not None:
            lengths = torch.full((rows,), length)
            lengths[-1] -= min(length - 1, 1 + length // 3) if shape.padded else 0
        if task == "train llama":
            return self._moved(input_ids=tokens)
        if task == "train llama, packed":
            documents = self._documents(length) if shape is None else _equal_parts(length, shape.documents)
            positions = torch.cat([torch.arange(n) for n in documents])
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

    def step(self, task: str, check: bool, shape: Shape | None = None) -> None:
        """Draw a batch (of a shape, where one is given) and do a task with it."""
        batch = self.batch(task, shape)
        self.tokens += batch["input_ids"].numel()
        if task == "generate":
            new = self.chance.randint(1, self.args.max_new_tokens) if shape is None else shape.new_tokens
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
                "kernels": len(compiled_kernels()),
                "warm": float(self.warm),
            }
        )

    def run(self, save: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
        """The whole soak, as the record; ``save`` gets what there is of it from time to time."""
        begin, args = time.monotonic(), self.args
        with self.kernels:
            return self._run(begin, args, save)

    def _run(self, begin: float, args: SoakArguments, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        first = [(task, None) for task in TASKS * 10] + classes(args)
        hf_flash_plus.dispatch.clear_cache()  # so that the record names the providers of this run
        deadline, sampled, told = begin + 60 * args.minutes, 0.0, begin
        while time.monotonic() < deadline and not 0 < args.max_steps <= sum(self.done.values()):
            step = sum(self.done.values())
            task, shape = first[step] if step < len(first) else (self.chance.choice(TASKS), None)
            checked = shape is not None and shape.checked
            self.step(task, checked or step % args.check_every == args.check_every - 1, shape)
            self.done[task] += 1
            if not self.warm and step >= len(first) and time.monotonic() - begin > 60 * args.minutes * args.warmup:
                self.warm = True
                self.kernels.warm()
            if time.monotonic() - sampled > max(1.0, args.minutes * 60 / 200) or args.max_steps:
                self.sample()
                sampled = time.monotonic()
            if time.monotonic() - told > max(5.0, args.minutes * 60 / 20):
                told = time.monotonic()
                record = self.record(told - begin, finished=False)
                print(summary(record), flush=True)
                save(record)
        if not self.warm and not args.max_steps:
            self.failures.append("the time was over before the warm-up was: nothing is known of what grows")
        self.failures += self.kernels.late()
        self.failures += growth(self.samples)
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
            "warm": self.warm,
            "late_kernels": self.kernels.late(),
            "samples": self.samples,
        }


def _equal_parts(length: int, parts: int) -> list[int]:
    parts = min(parts, length)
    return [length // parts + (n < length % parts) for n in range(parts)]


def compiled_kernels() -> dict[str, str]:
    """What Triton has compiled in this run: the folders of its cache, each with the name of its kernel. (It compiles
    launchers in C, too, which have folders of their own.)"""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    if not os.environ.get("TRITON_CACHE_DIR") or not folder.is_dir():
        return {}
    return {each.name: _name_in(each) for each in folder.iterdir()}


def _name_in(folder: Path) -> str:
    names = sorted(file.stem for file in folder.glob("*.json") if not file.name.startswith("__grp__"))
    others = sorted(file.stem for file in folder.iterdir()) if not names and folder.is_dir() else []
    return (names or others or ["?"])[0]


class Kernels:
    """Which kernels Triton compiles, with the constants and the classes of numbers it compiles them for."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self._warm: tuple[int, frozenset[str]] | None = None
        self._knobs: Any = None
        self._before: Any = None

    def __enter__(self) -> Kernels:
        try:
            from triton import knobs
        except ImportError:  # nothing will be compiled
            return self
        self._knobs, self._before = knobs.compilation, getattr(knobs.compilation, "listener", None)
        knobs.compilation.listener = self._note
        return self

    def __exit__(self, *problem: object) -> None:
        if self._knobs is not None:
            self._knobs.listener = self._before

    def _note(self, *, src: Any, metadata: dict[str, Any], **_: Any) -> None:
        """What Triton tells of each compilation: which kernel, its constants, and of which arguments it knows what."""
        names = list(getattr(getattr(src, "fn", None), "arg_names", ()))

        def named(values: Any) -> str:
            told = {names[path[0]] if path and path[0] < len(names) else str(path): what for path, what in values}
            return ", ".join(f"{name}={what}" for name, what in told.items() if what not in (None, []))

        constants = named(dict(getattr(src, "constants", None) or {}).items())
        classes = named(dict(getattr(src, "attrs", None) or {}).items())
        self.compiled.append(f"{metadata.get('name', '?')} with {constants or 'no constants'}; {classes}")

    def warm(self) -> None:
        """From here on, no kernel may be compiled."""
        self._warm = (len(self.compiled), frozenset(compiled_kernels()))

    def late(self) -> list[str]:
        """What was compiled after the warm-up all the same, in words."""
        if self._warm is None:
            return []
        count, folders = self._warm
        found = [f"compiled after the warm-up: {what}" for what in self.compiled[count:]]
        new = [name for folder, name in sorted(compiled_kernels().items()) if folder not in folders]
        return found or [f"in Triton's cache after the warm-up: {name}" for name in new]


#: How much more the last quarter of the samples may show than the first one after the warm-up.
ALLOWED = {"host_mib": 48.0, "device_mib": 2.0, "kernels": 0.0}


def growth(samples: list[dict[str, float]]) -> list[str]:
    """What grew after the warm-up, in words; medians, because lengths are random."""
    steady = [sample for sample in samples if sample["warm"]]
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
