"""The registry of providers: one file and one line here each. Providers never import each other's kernels."""

from __future__ import annotations

from .base import ALL_FEATURES, AttentionGradients, AttentionOutput, Provider
from .flaggems import FlagGemsProvider
from .flash_attn import FlashAttnProvider
from .reference import ReferenceProvider
from .torch_sdpa import TorchSdpaProvider
from .triton import TritonProvider

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        TritonProvider(),
        FlagGemsProvider(),
        FlashAttnProvider(),
        TorchSdpaProvider(),
        ReferenceProvider(),
    )
}

__all__ = ["ALL_FEATURES", "PROVIDERS", "AttentionGradients", "AttentionOutput", "Provider"]
