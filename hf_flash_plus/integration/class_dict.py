"""GPT-J, GPT-Neo, Bark and Falcon: models that pick an attention class when a layer is built.

They do not use the attention interface. Each gets a subclass whose attention goes through ``flash_plus_attention``; a
layer built (or patched) for ``flash_plus`` has its attention module's class set to it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import carrier
from .attention import NAME, flash_plus_attention
from .models import CLASS_DICT_MODULES, class_dict_family


@dataclass(frozen=True)
class Family:
    """Where a family keeps its attention.

    Attributes:
        holder: class of the module that builds the attention.
        attribute: the holder's attribute that holds it.
        base: the attention class to subclass.
        scale: the factor on the scores, from the attention module.
        dropout: the dropout probability on the weights, from the attention module.
    """

    holder: str
    attribute: str
    base: str
    scale: Callable[[Any], float] | None = None
    dropout: Callable[[Any], float] | None = None

    @property
    def name(self) -> str:
        """Name of our subclass: ``GPTNeoSelfAttention`` becomes ``GPTNeoFlashPlusAttention``."""
        return (
            self.base.removesuffix("2")
            .replace("Self", "")
            .replace("Flash", "")
            .replace("Attention", "FlashPlusAttention")
        )


FAMILIES = {
    "gptj": Family(
        "GPTJBlock",
        "attn",
        "GPTJAttention",
        lambda module: 1.0 / float(module.scale_attn),
        lambda module: module.attn_dropout.p,
    ),
    "gpt_neo": Family(
        "GPTNeoAttention", "attention", "GPTNeoSelfAttention", lambda module: 1.0, lambda module: module.attn_dropout.p
    ),
    "bark": Family(
        "BarkBlock",
        "attn",
        "BarkSelfAttention",
        lambda module: module.head_dim**-0.5,
        lambda module: module.attn_dropout.p,
    ),
    "falcon": Family("FalconDecoderLayer", "self_attention", "FalconFlashAttention2"),
}


def _local_window(module: Any) -> int | None:
    """GPT-Neo's local layers see the last ``window_size`` keys."""
    return module.config.window_size if getattr(module, "attention_type", None) == "local" else None


def _restrict(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """A dense mask joined with the causal and local pattern that the eager class keeps in its ``bias`` buffer."""
    if mask is None or not (causal or window):
        return mask
    mask = mask[..., : key.shape[2]]
    if mask.dtype == carrier.IN_GRAPH:
        mask = mask.bool()
    rows = torch.arange(query.shape[2], device=key.device)[:, None] + (key.shape[2] - query.shape[2])
    keys = torch.arange(key.shape[2], device=key.device)
    if causal:
        # In a static cache slots that nobody wrote follow a row's own key, which is the last that the mask shows.
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        rows = torch.minimum(rows, torch.where(shown, keys, -1).amax(-1, keepdim=True))
    seen = keys <= rows if causal else torch.ones_like(keys <= rows)
    if window:
        seen = seen & (keys > rows - window)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, float("-inf"))


def _attend(
    module: Any, family: Family, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, wants_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """One call for the classes whose ``_attn`` we replace: ``(batch, nheads, seqlen, head_dim)`` in and out."""
    assert family.scale is not None and family.dropout is not None
    causal, window = bool(module.is_causal), _local_window(module)
    if mask is not None and carrier.is_carrier(mask):
        carried = carrier.decode(mask, query.shape[2], key.shape[2])
        mask = carrier.restricted(carried, mask, query.shape[2], key.shape[2], causal, window)
    else:
        mask = _restrict(mask, query, key, causal, window)
    # Buffers of these models are fp32, so queries and keys may be fp32 beside half-precision values.
    out, weights = flash_plus_attention(
        module,
        query,
        key,
        value,
        mask,
        dropout=family.dropout(module) if module.training else 0.0,
        scaling=family.scale(module),
        sliding_window=window,
        is_causal=causal,
        output_attentions=wants_weights,
    )
    return out.transpose(1, 2), weights


class _WantsWeights:
    """An attention module for one call of its ``forward`` with ``output_attentions``.

    These models' ``forward`` does not hand the flag to ``_attn``. A mark on the module would be seen by other threads.
    """

    def __init__(self, module: Any, attn: Callable[..., Any]) -> None:
        self.__dict__.update(_module=module, _attn=functools.partial(attn, module, wants_weights=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)  # GPT-J moves a buffer


def _make_class(family_name: str, modeling: types.ModuleType) -> type:
    family = FAMILIES[family_name]
    base = getattr(modeling, family.base)
    name = family.name
    if family.scale is None:
        # Falcon has no inner method to replace: its flash class's forward, with our function under the global name.
        original = base.forward

        def calling(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
            scope = {**original.__globals__, "_flash_attention_forward": function}
            forward = types.FunctionType(
                original.__code__, scope, original.__name__, original.__defaults__, original.__closure__
            )
            forward.__kwdefaults__ = original.__kwdefaults__
            return forward

        plain = calling(flash_attention_forward)

        @torch.compiler.disable  # torch.compile cannot break the graph in a function made anew for each call
        def with_weights(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            weights: list[Tensor | None] = []

            def keeping(*args: Any, **kwargs: Any) -> Tensor:
                out, found = _flash_attention(*args, output_attentions=True, **kwargs)
                weights.append(found)
                return out

            # What it returns beside its output is the output before the projection.
            return calling(keeping)(*args, **kwargs)[0], weights[0]

        @functools.wraps(original)
        def falcon_forward(
            self: Any, *args: Any, output_attentions: bool = False, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            return (with_weights if output_attentions else plain)(self, *args, **kwargs)

        return type(
            name, (base,), {"forward": falcon_forward, "__module__": __name__, "_flash_attn_uses_top_left_mask": False}
        )

    def _attn(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        wants_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return _attend(self, family, query, key, value, attention_mask, wants_weights)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        return base.forward(_WantsWeights(self, _attn) if output_attentions else self, *args, **kwargs)

    return type(name, (base,), {"_attn": _attn, "forward": forward, "__module__": __name__})


_classes: dict[str, type] = {}


def attention_class(family_name: str) -> type:
    """The ``flash_plus`` attention class of a family in :data:`~.models.CLASS_DICT_MODULES`."""
    if family_name not in _classes:
        modeling = importlib.import_module(f"transformers.models.{family_name}.modeling_{family_name}")
        _classes[family_name] = _make_class(family_name, modeling)
    return _classes[family_name]


def __getattr__(name: str) -> type:
    """Our attention classes by name, made when they are asked for: unpickling a model needs them so."""
    for family_name, family in FAMILIES.items():
        if family.name == name:
            return attention_class(family_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def flash_attention_forward(*args: Any, **kwargs: Any) -> Tensor:
    """Transformers' ``_flash_attention_forward`` for its direct callers, on ``(batch, seqlen, nheads, head_dim)``."""
    return _flash_attention(*args, **kwargs)[0]


def _flash_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    is_causal: bool = True,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return flash_plus_attention(
        _NO_MODULE,
        query_states.transpose(1, 2),
        key_states.transpose(1, 2),
        value_states.transpose(1, 2),
        attention_mask,
        dropout=dropout,
        scaling=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        is_causal=is_causal,
        position_ids=position_ids,
        output_attentions=output_attentions,
    )


_NO_MODULE = torch.nn.Module()


def prepare(module_name: str, undo: list[Callable[[], None]]) -> None:
    """Teach a family's modeling module our name, once; ``undo`` collects what takes it back."""
    family_name = class_dict_family(module_name)
    if family_name is None:
        return
    modeling = sys.modules[module_name]
    classes = getattr(modeling, CLASS_DICT_MODULES[family_name])
    if NAME in classes:
        return
    family, ours = FAMILIES[family_name], attention_class(family_name)
    classes[NAME] = ours
    holder = getattr(modeling, family.holder)
    original = holder.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attention = getattr(self, family.attribute)
        # Newer Transformers build the flash_attention_2 class for any name that holds "flash".
        if attention.config._attn_implementation == NAME:
            attention.__class__ = ours

    holder.__init__ = __init__

    def take_back() -> None:
        holder.__init__ = original
        classes.pop(NAME, None)

    undo.append(take_back)
