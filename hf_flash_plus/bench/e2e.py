"""The ``e2e`` benchmark: training steps and generation of a random model under several attention implementations."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from .config import BenchConfig, ConfigError, peer_name
from .continuous import close, continuous
from .kernels import Progress, Row, _short
from .problem import TORCH_DTYPES

LAYOUTS = ("plain", "padded", "packed")
KINDS_OF_WORK = ("train", "generate", "continuous")
#: Configuration and class of the models, by the ``type`` of a benchmark's ``model``; the first where there is none.
MODELS = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "bert": ("BertConfig", "BertForSequenceClassification")}

#: Functions of the package that an entry of ``peers`` may ask to be applied to its model.
EXTRAS = ("skip_padding", "fuse_rotary")
#: Keys of such an entry: what it is called, its attention implementation, a module to import before, its provider.
PEER_KEYS = ("name", "implementation", "preimport", "provider", *EXTRAS)


class Peer(NamedTuple):
    """One implementation and its model; every model has the same weights."""

    name: str
    model: Any
    provider: str | None


def run_e2e(
    config: BenchConfig, device: torch.device, save: Callable[[list[Row]], None], progress: Progress
) -> list[Row]:
    """Do every work with every implementation, in turns; failures become rows with status error.

    All models stand side by side and take turns step by step: a host whose speed drifts (and in eager generation the
    host decides) is then as kind to one as to the other.
    """
    for work in config.works:
        work_name(work)  # checks all before the first minute is spent
        if _type(config) == "bert" and (work["kind"] != "train" or work.get("layout") == "packed"):
            raise ConfigError(f"work {work!r}: bert neither generates nor takes packed rows.")
    for entry in config.peers:
        unknown = set(entry) - set(PEER_KEYS) if isinstance(entry, dict) else set()
        if unknown:
            raise ConfigError(
                f"peer {entry['name']}: unknown keys {sorted(unknown)}; the keys are {', '.join(PEER_KEYS)}."
            )
    rows: list[Row] = []
    peers = []
    for entry in config.peers:
        name = peer_name(entry)
        options = entry if isinstance(entry, dict) else {"name": entry}
        progress(f"{name}: building the model")
        try:
            model = _build(config, options.get("implementation", name), options.get("preimport"), device)
            for extra in EXTRAS:
                if options.get(extra):
                    getattr(importlib.import_module("hf_flash_plus"), extra)(model)
        except Exception as error:  # an implementation's failure is a result
            rows += [_row(work, name, "error", _short(error)) for work in config.works if _wants(work, name)]
            save(rows)
            continue
        peers.append(Peer(name, model, options.get("provider")))
    for work in config.works:
        progress(f"{work_name(work)}: {', '.join(peer.name for peer in peers if _wants(work, peer.name))}")
        rows += _measure(config, peers, work, device)
        save(rows)
        torch._dynamo.reset()
        _free(device)
    return rows


def _wants(work: dict[str, Any], name: str) -> bool:
    """Whether a work is measured with an implementation."""
    return name in work.get("peers", (name,))


def work_name(work: dict[str, Any]) -> str:
    """``"train padded 8x2048"``, ``"generate static 16x2048+64"``."""
    kind, layout = work.get("kind"), work.get("layout", "plain")
    if kind not in KINDS_OF_WORK or layout not in LAYOUTS or not {"batch", "seqlen"} <= set(work):
        raise ConfigError(
            f"work {work!r}: needs kind (of {', '.join(KINDS_OF_WORK)}), batch, seqlen, "
            f"and a layout of {', '.join(LAYOUTS)}."
        )
    unknown = set(work) - {
        "kind", "layout", "batch", "seqlen", "new_tokens", "cache", "documents", "peers", "warmup", "repeats",
    }  # fmt: skip
    if unknown:
        raise ConfigError(f"work {work!r}: unknown {sorted(unknown)}.")
    for key, least in (("warmup", 0), ("repeats", 1)):
        if not isinstance(work.get(key, least), int) or work.get(key, least) < least:
            raise ConfigError(
                f"work {work!r}: {key} is {work[key]!r}; it has to be a whole number of at least {least}."
            )
    words = [kind, *([] if layout == "plain" else [layout]), *([work["cache"]] if work.get("cache") else [])]
    if kind == "continuous" and (layout != "plain" or work.get("cache")):
        raise ConfigError(f"work {work!r}: continuous batching has neither layouts nor a choice of caches.")
    tail = "" if kind == "train" else f"+{work.get('new_tokens', 64)}"
    return f"{' '.join(words)} {work['batch']}x{work['seqlen']}{tail}"


@contextmanager
def _provider(name: str | None) -> Iterator[None]:
    from ..dispatch import use_provider

    with use_provider(name) if name else nullcontext():
        yield


def _type(config: BenchConfig) -> str:
    found = (config.model or {}).get("type", next(iter(MODELS)))
    if found not in MODELS:
        raise ConfigError(f"model: type {found!r} is none of {', '.join(MODELS)}.")
    return str(found)


def _build(config: BenchConfig, implementation: str, preimport: str | None, device: torch.device) -> Any:
    import transformers

    if preimport:
        importlib.import_module(preimport)
    torch.manual_seed(0)
    config_name, class_name = MODELS[_type(config)]
    settings = {key: value for key, value in (config.model or {}).items() if key != "type"}
    settings = getattr(transformers, config_name)(**settings)
    settings._attn_implementation = implementation
    with torch.device(device):
        return getattr(transformers, class_name)(settings).to(TORCH_DTYPES[config.dtype])


def _row(work: dict[str, Any], name: str, status: str, reason: str = "") -> Row:
    row: Row = {
        "case": dict(work),
        "case_name": work_name(work),
        "group": work["kind"],
        "direction": work["kind"],
        "peer": name,
        "status": status,
    }
    return row | ({"reason": reason} if reason else {})


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(config: BenchConfig, peers: list[Peer], work: dict[str, Any], device: torch.device) -> list[Row]:
    """One work with every peer (or those that it names), in interleaved rounds."""
    peers = [peer for peer in peers if _wants(work, peer.name)]
    make = {"train": _train, "generate": _generate, "continuous": continuous}[work["kind"]]
    steps: dict[str, Callable[[], None]] = {}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    tokens = 0

    def turn(peer: Peer) -> float | None:
        _free_gradients(peers, device)
        before = _allocated(device)
        try:
            with _provider(peer.provider):
                elapsed = _time(steps[peer.name], device)
        except Exception as error:  # out of memory, a crash in an implementation: results too
            failed[peer.name] = _short(error)
            return None
        if device.type == "cuda":
            own = sum(p.numel() * p.element_size() for p in peer.model.parameters())
            peak = (torch.cuda.max_memory_allocated(device) - before + own) / 2**30
            peaks[peer.name] = max(peak, peaks.get(peer.name, 0.0))
        return elapsed

    for peer in peers:
        try:
            steps[peer.name], tokens = make(peer.model, work, device)
        except Exception as error:  # a Transformers without this kind of work
            failed[peer.name] = _short(error)
            continue
        for _ in range(work.get("warmup", config.warmup)):
            if peer.name not in failed:
                turn(peer)
        peaks.pop(peer.name, None)  # compiling needs memory of its own
    for number in range(work.get("repeats", config.repeats)):
        first = number % max(len(peers), 1)
        for peer in (*peers[first:], *peers[:first]):
            if peer.name not in failed:
                elapsed = turn(peer)
                if elapsed is not None:
                    seconds.setdefault(peer.name, []).append(elapsed)
    _free_gradients(peers, device)
    for peer in peers:
        close(peer.model)
    rows = []
    for peer in peers:
        if peer.name in failed or not seconds.get(peer.name):
            rows.append(_row(work, peer.name, "error", failed.get(peer.name, "no round was finished")))
            continue
        median = statistics.median(seconds[peer.name])
        rows.append(
            _row(work, peer.name, "ok")
            | {
                "value": tokens / median,
                "unit": "tokens/s",
                "tokens": tokens,
                "seconds": seconds[peer.name],
                "median_ms": median * 1e3,
                "peak_gib": peaks.get(peer.name),
            }
        )
    return rows


def _free_gradients(peers: list[Peer], device: torch.device) -> None:
    """Nobody's gradients take part in another's peak memory."""
    for peer in peers:
        peer.model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _time(step: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - begin


def _lengths(work: dict[str, Any]) -> torch.Tensor:
    seqlen, batch = work["seqlen"], work["batch"]
    return torch.linspace(seqlen // 4, seqlen, batch).long() if batch > 1 else torch.tensor([seqlen])


def _ids(model: Any, work: dict[str, Any], device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (work["batch"], work["seqlen"])
    return torch.randint(5, model.config.vocab_size, shape, generator=generator).to(device)


def _train(model: Any, work: dict[str, Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """Forward, loss and backward of one batch; tokens are the real ones."""
    model.train()
    seqlen, batch, layout = work["seqlen"], work["batch"], work.get("layout", "plain")
    ids = _ids(model, work, device)
    mask = positions = None
    labels, tokens = ids, batch * seqlen
    if layout == "padded":
        lengths = _lengths(work)
        mask = (torch.arange(seqlen)[None] < lengths[:, None]).long().to(device)
        labels, tokens = ids.masked_fill(mask == 0, -100), int(lengths.sum())
    elif layout == "packed":
        documents = work.get("documents", 8)
        positions = torch.arange(seqlen // documents, device=device).repeat(batch, documents)

    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "bert":
        inputs["labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    else:
        inputs |= {"labels": labels, "position_ids": positions, "use_cache": False}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()

    return step, tokens


def _generate(model: Any, work: dict[str, Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """Greedy generation of a fixed number of tokens; prompts are padded on the left."""
    model.eval()
    seqlen, batch, new_tokens = work["seqlen"], work["batch"], work.get("new_tokens", 64)
    ids = _ids(model, work, device)
    mask = torch.ones_like(ids)
    if work.get("layout") == "padded":
        lengths = _lengths(work)
        mask = (torch.arange(seqlen)[None] >= (seqlen - lengths)[:, None]).long().to(device)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if work.get("cache"):
        options["cache_implementation"] = work["cache"]

    def step() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, **options)

    return step, batch * new_tokens
