"""hf_flash_plus: a FlagGems/Triton-backed attention for Hugging Face Transformers, and flash-attn's functions.

``import hf_flash_plus`` registers the attention implementation ``"flash_plus"`` with Transformers (where that is
installed); it imports neither triton nor flag_gems, which are loaded by the first call that they serve.
"""

from __future__ import annotations

import importlib.util as _util

from .dispatch import NoProviderError, explain, providers_used, use_provider
from .interface import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache
from .masks import AttentionMask
from .shim import install_as_flash_attn, uninstall_as_flash_attn

__version__ = "0.1.0"

__all__ = [
    "AttentionMask",
    "NoProviderError",
    "attention",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "providers_used",
    "uninstall_as_flash_attn",
    "use_provider",
]

if _util.find_spec("transformers") is not None:
    from .integration.fused_rotary import FusedRotary, fuse_rotary
    from .integration.patch import PatchReport, patch_model, patched, unpatch_model
    from .integration.registration import is_registered, register, unregister
    from .integration.skip_padding import SkippedPadding, skip_padding

    __all__ += [
        "FusedRotary",
        "PatchReport",
        "SkippedPadding",
        "fuse_rotary",
        "is_registered",
        "patch_model",
        "patched",
        "register",
        "skip_padding",
        "unpatch_model",
        "unregister",
    ]
    register()
