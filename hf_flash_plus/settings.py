"""The environment variables hf_flash_plus obeys: read at call time, validated, documented in one table.

Every variable is read on each call, so it can be changed after import and after a model was built. (Code
compiled with ``torch.compile`` keeps the value it was traced with.) Parsing is cached by the raw text.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

USE_FLAGGEMS = "FLASH_ATTENTION_USE_FLAGGEMS"
PROVIDER = "HF_FLASH_PLUS_PROVIDER"
DETERMINISTIC = "FLASH_ATTENTION_DETERMINISTIC"
KERNELS = "HF_FLASH_PLUS_KERNELS"

TRUE_WORDS = ("TRUE", "1", "ON", "YES")
FALSE_WORDS = ("FALSE", "0", "OFF", "NO")


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, the values it takes, its default and what it does."""

    name: str
    values: str
    default: str
    meaning: str


SETTINGS = (
    Setting(
        USE_FLAGGEMS,
        "TRUE or FALSE (any case; also 1/0, on/off, yes/no)",
        "TRUE",
        "TRUE: the FlagGems/Triton path; FALSE: the CUDA path (flash-attn 4/3/2 if importable, else torch's SDPA)",
    ),
    Setting(
        PROVIDER,
        "a provider's name, or empty",
        "",
        "forces one provider; a call it cannot serve is an error, never another provider",
    ),
    Setting(
        DETERMINISTIC,
        "1 or 0",
        "0",
        "1: only deterministic backward passes (set by Transformers' full determinism)",
    ),
    Setting(
        KERNELS,
        "auto or portable",
        "auto",
        "portable: the provider triton leaves its kernels for one architecture (Hopper) aside",
    ),
)


@lru_cache(maxsize=64)
def _parse_bool(name: str, text: str) -> bool:
    word = text.strip().upper()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(
        f"{name}={text!r} is not a valid setting. Valid values, in any case: "
        f"{', '.join(TRUE_WORDS)} (on) and {', '.join(FALSE_WORDS)} (off)."
    )


def use_flaggems() -> bool:
    """Whether calls take the FlagGems/Triton path (``FLASH_ATTENTION_USE_FLAGGEMS``, default TRUE).

    Raises:
        ValueError: the variable holds none of the valid values (the message lists them).
    """
    text = os.environ.get(USE_FLAGGEMS)
    return True if not text else _parse_bool(USE_FLAGGEMS, text)


def deterministic() -> bool:
    """Whether only deterministic backward passes may serve (``FLASH_ATTENTION_DETERMINISTIC``, default 0)."""
    text = os.environ.get(DETERMINISTIC)
    return False if not text else _parse_bool(DETERMINISTIC, text)


def portable_kernels() -> bool:
    """Whether kernels made for one architecture must not be used (``HF_FLASH_PLUS_KERNELS``, default auto)."""
    text = os.environ.get(KERNELS)
    return bool(text) and _parse_kernels(text)


@lru_cache(maxsize=16)
def _parse_kernels(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("auto", "portable"):
        raise ValueError(f"{KERNELS}={text!r} is not a valid setting. Valid values, in any case: auto, portable.")
    return word == "portable"


# A context variable, so that `use_provider` in one thread or task does not reach another.
_provider_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("hf_flash_plus_provider", default=None)


def forced_provider() -> str | None:
    """The provider forced by :func:`use_provider` or ``HF_FLASH_PLUS_PROVIDER``; None selects automatically.

    The name is checked by ``dispatch``, which knows the providers.
    """
    name = _provider_override.get()
    if name is None:
        text = os.environ.get(PROVIDER)
        name = text.strip().lower() if text else None
    return name or None


def selection() -> tuple[object, ...]:
    """All that the choice of a provider depends on, as it was set: equal where nothing was changed in between.

    Read from the table below ``os.environ``, whose own look-ups encode names and raise an exception inside: a decoding
    step asks in every layer.
    """
    table = getattr(os.environ, "_data", None)
    if table is None:
        return _provider_override.get(), os.environ.get(USE_FLAGGEMS), os.environ.get(PROVIDER)
    return _provider_override.get(), table.get(_USE_FLAGGEMS_KEY), table.get(_PROVIDER_KEY)


_encode = getattr(os.environ, "encodekey", str)
_USE_FLAGGEMS_KEY, _PROVIDER_KEY = _encode(USE_FLAGGEMS), _encode(PROVIDER)


@contextmanager
def provider_override(name: str) -> Iterator[None]:
    """Force a provider for the calls of this thread or task inside the ``with`` block."""
    token = _provider_override.set(name)
    try:
        yield
    finally:
        _provider_override.reset(token)
