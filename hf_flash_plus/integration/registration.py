"""Registering ``"flash_plus"`` with Transformers so that it survives every way of loading and switching models.

``AttentionInterface.register`` alone is not enough: because the name contains "flash", Transformers preloads a flash
package of that name when a model is built (``modeling_flash_attention_utils._lazy_imports``), and for some classes
replaces the name by another. Three functions are therefore wrapped; the wrappers look at our name only and hand
everything else on. :func:`unregister` takes all of it back.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import transformers.modeling_flash_attention_utils as flash_utils
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from . import class_dict, continuous
from .attention import NAME, flash_plus_attention
from .mask_interface import flash_plus_mask
from .models import unsupported_reason

logger = logging.getLogger("hf_flash_plus")

#: Continuous batching of Transformers 5.17 renames the implementation so.
PAGED_NAME = f"paged|{NAME}"

_undo: list[Callable[[], None]] = []
_refused: set[str] = set()


def is_registered() -> bool:
    """Whether ``attn_implementation="flash_plus"`` is known to Transformers."""
    return bool(_undo)


def register() -> None:
    """Make ``attn_implementation="flash_plus"`` known to Transformers; done by ``import hf_flash_plus``. Idempotent."""
    if _undo:
        return
    try:
        _register()
    except BaseException:  # half a registration would count as one
        unregister()
        raise


def _register() -> None:
    for name in (NAME, PAGED_NAME):
        _set_entry(AttentionInterface._global_mapping, name, flash_plus_attention)
        _set_entry(AttentionMaskInterface._global_mapping, name, flash_plus_mask)
    _wrap(flash_utils, "_lazy_imports", _lazy_imports)
    # The first serves __init__, from_pretrained and set_attn_implementation of a model, the second its submodels.
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _check)
    _wrap(PreTrainedModel, "get_correct_attn_implementation", _check)
    # Its one use in masking_utils refuses chunked attention (Llama 4) to every name that holds "flash".
    _wrap(masking_utils, "is_flash_attention_requested", _not_ours)


def unregister() -> None:
    """Leave Transformers as it was before :func:`register`; models that use ``flash_plus`` stop working."""
    while _undo:
        _undo[-1]()
        _undo.pop()
    if flash_utils._loaded_implementation in (NAME, PAGED_NAME):
        flash_utils._loaded_implementation = None  # the functions preloaded for us must not serve another name


def _set_entry(mapping: dict[str, Any], name: str, function: Callable[..., Any]) -> None:
    _undo.append(lambda: mapping.pop(name, None))
    mapping[name] = function


def _wrap(owner: Any, attribute: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(owner)[attribute]
    _undo.append(lambda: setattr(owner, attribute, original))
    setattr(owner, attribute, functools.update_wrapper(make(original), original))


def _lazy_imports(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hand out our functions where Transformers would look for a flash package of our name."""

    def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation in (NAME, PAGED_NAME):
            from .. import interface, kvcache

            return (
                interface.flash_attn_func,
                interface.flash_attn_varlen_func,
                kvcache.flash_attn_with_kvcache,
                flash_utils._pad_input,
                flash_utils._unpad_input,
            )
        return original(implementation, *args, **kwargs)

    return _lazy_imports


def _not_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer False for our name: ``flash_plus`` has none of the limits that the question guards against."""

    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if config is not None and config._attn_implementation in (NAME, PAGED_NAME):
            return False
        return bool(original(config, *args, **kwargs))

    return is_flash_attention_requested


def _check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Accept our name for models that it serves; others keep the attention that Transformers would give them."""

    def check(self: Any, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation not in (NAME, PAGED_NAME):
            return original(self, implementation, *args, **kwargs)
        reason = unsupported_reason(self)
        if reason is not None:
            own = original(self, None, *args, **kwargs)
            _warn_refused(type(self).__name__, own, reason)
            return own
        class_dict.prepare(type(self).__module__, _undo)
        continuous.allow_block_tables((NAME, PAGED_NAME), _undo)
        # Loading now is what lets torch.compile(fullgraph=True) pass later.
        flash_utils.lazy_import_flash_attention(implementation)
        return implementation

    return check


def _warn_refused(model: str, own: str, reason: str) -> None:
    """Say once per class that it keeps its own attention and why."""
    if model not in _refused:
        _refused.add(model)
        logger.warning("attn_implementation='flash_plus' is refused for %s, which keeps %r: %s.", model, own, reason)
