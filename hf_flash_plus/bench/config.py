"""A benchmark's YAML file as data: :class:`BenchConfig` and its :class:`Case` list, checked while reading."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

KINDS = ("kernels", "e2e", "memory")
DIRECTIONS = ("forward", "backward")
MASKS = ("full", "causal", "window", "padded", "packed")
DTYPES = ("bf16", "fp16", "fp32")
DEFAULT_WINDOW = 1024


class ConfigError(ValueError):
    """The YAML file says something that cannot be done; the message says what, and what is allowed."""


@dataclass(frozen=True)
class Case:
    """One attention call to measure.

    Attributes:
        batch, seqlen, heads, kv_heads, head_dim: the shape; ``seqlen`` counts keys.
        seqlen_q: number of query rows; 0 is ``seqlen``. One row makes a decoding case, counted in GB/s.
        mask: ``full``; ``causal``; ``window`` (causal, ``window`` keys back); ``padded`` (causal, right-padded,
            lengths spread evenly from seqlen/4 to seqlen; a decoding case is left-padded, as in generation); ``packed``
            (causal documents of equal length in one row).
        window: keys to the left that a row of a ``window`` case sees.
        documents: number of documents of a ``packed`` case.
        page_size: keys of a page, where the keys of a decoding case lie in the pages of a cache; 0 where they do not.
    """

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    seqlen_q: int = 0
    mask: str = "causal"
    window: int = DEFAULT_WINDOW
    documents: int = 8
    page_size: int = 0

    def __post_init__(self) -> None:
        for field in ("batch", "seqlen", "heads", "kv_heads", "head_dim", "documents", "window"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ConfigError(f"case: {field} must be a positive integer, got {getattr(self, field)!r}.")
        if self.mask not in MASKS:
            raise ConfigError(f"case: mask must be one of {', '.join(MASKS)}, got {self.mask!r}.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"case: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if self.seqlen_q and self.mask not in ("full", "causal") and (self.mask, self.seqlen_q) != ("padded", 1):
            raise ConfigError(f"case: seqlen_q goes with full and causal masks, 1 with padded; not with {self.mask}.")
        if self.page_size and (not self.decoding or self.mask == "padded" or self.seqlen % self.page_size):
            raise ConfigError(
                "case: page_size goes with seqlen_q 1, no padding, and a seqlen that is a multiple of it."
            )
        if self.mask == "packed" and (self.batch != 1 or self.seqlen % self.documents):
            raise ConfigError("case: packed needs batch 1 and a seqlen that is a multiple of documents.")

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return self.seqlen_q or self.seqlen

    @property
    def decoding(self) -> bool:
        return self.rows == 1

    @property
    def lengths(self) -> list[int]:
        """Real lengths: of each batch element, or of each document of a packed case."""
        if self.mask == "padded":
            low, high, steps = self.seqlen // 4, self.seqlen, max(self.batch - 1, 1)
            return [low + (high - low) * i // steps for i in range(self.batch)] if self.batch > 1 else [high]
        if self.mask == "packed":
            return [self.seqlen // self.documents] * self.documents
        return [self.seqlen] * self.batch

    @property
    def name(self) -> str:
        """``"causal B4 S4096 H16/4 D128"``."""
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        rows = f"Q{self.rows} " if self.seqlen_q else ""
        kind = {"window": f"window{self.window}", "packed": f"packed{self.documents}"}.get(self.mask, self.mask)
        pages = f" pages{self.page_size}" if self.page_size else ""
        return f"{kind} B{self.batch} {rows}S{self.seqlen} {heads} D{self.head_dim}{pages}"

    @property
    def group(self) -> str:
        """What geometric means are taken over."""
        return "decode" if self.decoding else self.mask

    def pairs(self) -> float:
        """Visible (query row, key) pairs of one head, summed over the batch. A causal square counts half."""
        if self.decoding:
            return float(sum(self.lengths))
        if self.mask in ("padded", "packed"):
            return sum(n * n / 2 for n in self.lengths)
        if self.mask == "window":
            w = min(self.window + 1, self.seqlen)
            return self.batch * (w * (w + 1) / 2 + (self.seqlen - w) * w)
        if self.mask == "causal":
            return self.batch * (self.rows * self.seqlen - self.rows * self.rows / 2)
        return self.batch * self.rows * self.seqlen

    def flops(self, direction: str) -> float:
        """Operations of the unmasked part: two products forward, five (2.5 times as many) backward."""
        return 4.0 * self.pairs() * self.heads * self.head_dim * (2.5 if direction == "backward" else 1.0)

    def kv_bytes(self, itemsize: int) -> float:
        """Bytes of the keys and values that are no padding: what decoding must read."""
        return 2.0 * sum(self.lengths) * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class BenchConfig:
    """A benchmark: what to run (see configs/bench/*.yaml for examples).

    Attributes:
        kind: ``kernels``, ``e2e`` or ``memory``.
        name: names the result files.
        baseline: the peer (or implementation) that ratios are taken against.
        peers: peers in the order of their columns (for ``e2e``: implementations).
        cases: the attention calls of ``kernels`` and ``memory``.
        directions: which of forward and backward ``kernels`` measures.
        limits: per peer, the values of case fields it is measured on: ``{flex: {seqlen: [4096]}}``.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        budget_s: seconds of measuring per case and direction, shared by the peers.
        layers: how decoding cases are timed by ``kernels``. 1: each call alone, the cache flushed before. More: the
            calls of so many layers in a row, each with its own cache, from one CUDA graph (``chain.py``); ``auto``
            chooses the number for each case.
        rounds, rest_s: the peers take turns this often, with rests between (the chip throttles).
        model, works, repeats, warmup: of ``e2e``: its type and its configuration's fields; what to do; how often
            (a work's own ``warmup`` and ``repeats`` come first).
        raw: the file as read, for the result.
    """

    kind: str
    name: str
    peers: tuple[Any, ...]
    baseline: str = ""
    cases: tuple[Case, ...] = ()
    directions: tuple[str, ...] = ("forward",)
    limits: dict[str, dict[str, list[Any]]] | None = None
    dtype: str = "bf16"
    layers: int | str = 1
    budget_s: float = 1.0
    rounds: int = 5
    rest_s: float = 0.02
    model: dict[str, Any] | None = None
    works: tuple[dict[str, Any], ...] = ()
    repeats: int = 5
    warmup: int = 2
    raw: dict[str, Any] | None = None

    def allows(self, peer: str, case: Case) -> bool:
        """Whether a peer's limits let it be measured on a case."""
        limits = (self.limits or {}).get(peer, {})
        return all(getattr(case, field) in values for field, values in limits.items())


def load(path: str | Path) -> BenchConfig:
    """Read a benchmark's YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or says something that cannot be done.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with kind, peers, ...; got {type(raw).__name__}.")
    return parse(raw, default_name=Path(path).stem)


def parse(raw: dict[str, Any], default_name: str = "bench") -> BenchConfig:
    """A benchmark from its YAML mapping; see :func:`load`."""
    known = {field.name for field in fields(BenchConfig)} - {"raw"}
    unknown = set(raw) - known
    if unknown:
        raise ConfigError(f"unknown keys {sorted(unknown)}; the keys are {', '.join(sorted(known))}.")
    for key in ("kind", "peers"):
        if not raw.get(key):
            raise ConfigError(f"{key} is missing.")
    values = dict(raw)
    values["cases"] = tuple(case for entry in raw.get("cases") or () for case in _expand(entry))
    for key in ("peers", "directions", "works"):
        if key in values:
            values[key] = tuple(values[key] or ())
    config = BenchConfig(**{"name": default_name, **values}, raw=raw)
    _check(config)
    if not config.baseline:
        config = replace(config, baseline=peer_name(config.peers[0]))
    return config


def peer_name(entry: Any) -> str:
    """The name of an entry of ``peers``: a string, or a mapping with a ``name``."""
    return entry if isinstance(entry, str) else str(entry["name"])


def _check(config: BenchConfig) -> None:
    if config.kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {config.kind!r}.")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}.")
    wrong = set(config.directions) - set(DIRECTIONS)
    if wrong:
        raise ConfigError(f"directions may be {', '.join(DIRECTIONS)}, got {sorted(wrong)}.")
    if config.layers != "auto" and (type(config.layers) is not int or config.layers < 1):
        raise ConfigError(f"layers must be a positive integer or auto, got {config.layers!r}.")
    if config.layers != 1 and config.kind != "kernels":
        raise ConfigError(f"layers goes with kind kernels, not {config.kind}.")
    if config.layers != 1 and not any(case.decoding for case in config.cases):
        raise ConfigError(f"layers is {config.layers!r}, but no case is a decoding case (seqlen_q: 1).")
    if config.kind == "e2e" and not (config.model and config.works):
        raise ConfigError("an e2e benchmark needs model and works.")
    if config.kind != "e2e" and not config.cases:
        raise ConfigError(f"a {config.kind} benchmark needs cases.")
    for entry in config.peers:
        if not isinstance(entry, str) and not (isinstance(entry, dict) and "name" in entry):
            raise ConfigError(f"peers are names, or mappings with a name; got {entry!r}.")
    for peer, limits in (config.limits or {}).items():
        wrong = set(limits) - set(Case.__dataclass_fields__)
        if wrong:
            raise ConfigError(f"limits of {peer}: {sorted(wrong)} are no fields of a case.")


def _expand(entry: Any) -> Iterator[Case]:
    """The cases of one entry: every field may be a list, and the entry stands for all combinations.

    ``tokens`` instead of ``batch`` gives ``batch = tokens / seqlen``; ``width`` instead of ``heads`` gives
    ``heads = width / head_dim``; ``gqa`` instead of ``kv_heads`` gives ``kv_heads = heads / gqa``.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"a case is a mapping, got {entry!r}.")
    allowed = set(Case.__dataclass_fields__) | {"tokens", "width", "gqa"}
    if set(entry) - allowed:
        raise ConfigError(f"case: unknown {sorted(set(entry) - allowed)}; allowed are {', '.join(sorted(allowed))}.")
    lists = [value if isinstance(value, list) else [value] for value in entry.values()]
    for combination in itertools.product(*lists):
        values = dict(zip(entry, combination))
        try:
            if "tokens" in values:
                values["batch"] = max(1, values.pop("tokens") // values["seqlen"])
            if "width" in values:
                values["heads"] = max(1, values.pop("width") // values["head_dim"])
            gqa = values.pop("gqa", 1)
            values.setdefault("kv_heads", values["heads"] // gqa)
            yield Case(**values)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"case {entry}: {type(error).__name__}: {error}.") from error


def as_dict(case: Case) -> dict[str, Any]:
    """A case for a result file."""
    return asdict(case)
