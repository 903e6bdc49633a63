"""Who serves a call: one loop over the path's providers, every reason kept, the answer cached by signature."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import settings
from .inputs import AttentionInputs, CallSignature
from .providers import PROVIDERS, Provider
from .providers.base import torch_is_deterministic

logger = logging.getLogger("hf_flash_plus")

#: The order in which providers are asked, by path (the value of FLASH_ATTENTION_USE_FLAGGEMS).
PATHS: dict[bool, tuple[str, ...]] = {
    True: ("flaggems", "triton", "torch_sdpa", "reference"),
    False: ("flash_attn", "torch_sdpa", "reference"),
}

#: Providers that stand in where those a path is named for cannot serve; each such case is reported once.
_OWN: dict[bool, frozenset[str]] = {
    True: frozenset({"flaggems", "triton"}),
    False: frozenset({"flash_attn", "torch_sdpa"}),
}


@dataclass(frozen=True)
class Selection:
    """The provider chosen for a signature and why; ``rejected`` holds those asked before it, with all reasons."""

    provider: Provider
    why: str
    fallback: bool
    rejected: tuple[tuple[str, tuple[str, ...]], ...]


class NoProviderError(NotImplementedError):
    """No provider of the path (or not the forced one) can serve the call; the message lists every reason."""


_cache: dict[tuple[CallSignature, bool, str | None, bool], Selection] = {}
_reported: set[tuple[str, str]] = set()


def path_providers(flaggems_path: bool) -> list[Provider]:
    """The registered providers of a path, in order."""
    return [PROVIDERS[name] for name in PATHS[flaggems_path] if name in PROVIDERS]


def check_provider_name(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in PROVIDERS:
        raise ValueError(
            f"unknown provider {name!r} (from {settings.PROVIDER} or use_provider); "
            f"the providers are: {', '.join(PROVIDERS)}."
        )
    return PROVIDERS[name]


@contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Force one provider inside a ``with`` block, in this thread or task; a call it cannot serve is an error.

    Example:
        >>> import torch, hf_flash_plus
        >>> q = torch.randn(1, 8, 2, 16)
        >>> with hf_flash_plus.use_provider("reference"):
        ...     hf_flash_plus.flash_attn_func(q, q, q).shape
        torch.Size([1, 8, 2, 16])
    """
    check_provider_name(name)
    with settings.provider_override(name):
        yield


def describe_signature(signature: CallSignature) -> str:
    """A call in one line, for errors and logs."""
    features = [
        name
        for name in ("causal", "window", "key_mask", "alibi", "softcap", "dropout", "needs_grad", "deterministic")
        if getattr(signature, name)
    ]
    if signature.intervals:
        features.append("packed" if signature.packed else "row intervals")
    if signature.bias != "none":
        features.append(f"{signature.bias} bias" + (" with gradient" if signature.bias_grad else ""))
    if signature.sinks != "none":
        features.append("sinks")
    if signature.oversized:
        features.append(f"{signature.oversized} " + ("sequences" if signature.packed else "batch elements"))
    dims = str(signature.head_dim) + (f"/{signature.v_head_dim}" if signature.v_head_dim != signature.head_dim else "")
    return (
        f"{signature.device_type} {str(signature.dtype).removeprefix('torch.')} head_dim {dims} "
        f"heads {signature.nheads}/{signature.nheads_k} [{', '.join(features) or 'full'}]"
    )


def select_provider(signature: CallSignature) -> Selection:
    """Choose who serves calls with this signature; after the first time, a dictionary look-up.

    Raises:
        NoProviderError: nobody can (lists the call and every provider's reasons).
        ValueError: an environment variable or :func:`use_provider` names no provider, or is no boolean.
    """
    # What torch was told counts for those that rely on it, see torch_sdpa.
    ordered = signature.deterministic and torch_is_deterministic()
    key = (signature, settings.use_flaggems(), settings.forced_provider(), ordered)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _select(*key[:3])
        if found.fallback:
            _report_fallback(found, signature)
    return found


def _select(signature: CallSignature, flaggems_path: bool, forced: str | None) -> Selection:
    if forced is not None:
        provider = check_provider_name(forced)
        reasons = provider.not_supported_reasons(signature)
        if reasons:
            raise NoProviderError(_refusal(signature, [(forced, tuple(reasons))], f"provider {forced!r} is forced"))
        return Selection(provider, "forced", False, ())
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for provider in path_providers(flaggems_path):
        reasons = provider.auto_reasons(signature) or provider.not_supported_reasons(signature)
        if not reasons:
            fallback = provider.name not in _OWN[flaggems_path]
            path = f"{settings.USE_FLAGGEMS}={str(flaggems_path).upper()}"
            why = f"first of {path} that serves it" if not fallback else f"fallback of {path}"
            return Selection(provider, why, fallback, tuple(rejected))
        rejected.append((provider.name, tuple(reasons)))
    raise NoProviderError(_refusal(signature, rejected, f"{settings.USE_FLAGGEMS}={str(flaggems_path).upper()}"))


def _refusal(signature: CallSignature, rejected: list[tuple[str, tuple[str, ...]]], why: str) -> str:
    lines = [f"no provider can serve this call ({why}): {describe_signature(signature)}"]
    for name, reasons in rejected:
        lines += [f"  {name}: {reason}" for reason in reasons]
    lines.append("  `hf-flash-plus explain` prints this table for any call; `hf-flash-plus info` shows every provider.")
    return "\n".join(lines)


def _report_fallback(selection: Selection, signature: CallSignature) -> None:
    """Say, once per process, provider and device type, that a fallback serves and why."""
    mark = (selection.provider.name, signature.device_type)
    if mark in _reported:
        return
    _reported.add(mark)
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in selection.rejected)
    logger.info("%s serves on %s (%s)", selection.provider.name, signature.device_type, reasons or selection.why)


@dataclass(frozen=True)
class Verdict:
    """One row of :func:`explain`: a provider, whether it is the one chosen, why it cannot serve (``reasons``), and
    why automatic selection passes over it although it could (``steps_aside``)."""

    provider: str
    chosen: bool
    reasons: tuple[str, ...]
    steps_aside: tuple[str, ...] = ()


def explain_signature(signature: CallSignature) -> list[Verdict]:
    """What every registered provider says to a signature, in the order in which the current path asks them."""
    try:
        chosen = select_provider(signature).provider.name
    except NoProviderError:
        chosen = None
    order = [p.name for p in path_providers(settings.use_flaggems())]
    names = order + [name for name in PROVIDERS if name not in order]
    automatic = settings.forced_provider() is None
    return [
        Verdict(
            name,
            name == chosen,
            tuple(PROVIDERS[name].not_supported_reasons(signature)),
            tuple(PROVIDERS[name].auto_reasons(signature)) if automatic else (),
        )
        for name in names
    ]


def explain(inputs: AttentionInputs) -> list[Verdict]:
    """What every registered provider says to one call (see :func:`explain_signature`)."""
    return explain_signature(inputs.signature())


def providers_used() -> list[str]:
    """Names of the providers that were chosen in this process so far, sorted."""
    return sorted({selection.provider.name for selection in _cache.values()})


def clear_cache() -> None:
    """Forget every selection and report; for tests, and after installing or removing a backend in-process."""
    _cache.clear()
    _reported.clear()


def select_name(fields: tuple[object, ...]) -> str:
    """The chosen provider's name, for ``torch.compile``: decided once, while the graph is traced."""
    return select_provider(CallSignature(*fields)).provider.name  # type: ignore[arg-type]


# What torch.compiler.assume_constant_result does; calling that would import torch._dynamo, and with it triton.
select_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
