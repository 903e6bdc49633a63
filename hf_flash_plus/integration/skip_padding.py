"""Encoders without padding: :func:`skip_padding` lays the real tokens of a batch in one row, for all layers."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..masks import AttentionMask
from . import carrier

#: Families (``config.model_type``) whose base model is ``embeddings``, ``encoder``, and perhaps a pooler, with an
#: encoder of layers that take ``(hidden_states, attention_mask)`` and in which nothing but attention mixes tokens.
FAMILIES = frozenset(
    "bert camembert data2vec-text electra ernie roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split()
)
#: Whether the base model's forward that is running was asked for something of each layer.
_records_layers: ContextVar[bool] = ContextVar("records_layers", default=False)
_ATTRIBUTE = "_hf_flash_plus_places"
_RECORDED = ("output_hidden_states", "output_attentions")


class SkippedPadding:
    """What :func:`skip_padding` returns: ``remove()``, or the end of a ``with`` block, undoes it."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Compute padding again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> SkippedPadding:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def skip_padding(model: nn.Module) -> SkippedPadding:
    """Let the encoder of a BERT-like model compute no padding on the right, in any layer.

    ``flash_plus`` by itself leaves padding out of attention; projections, MLPs and norms still compute it. With this,
    the tokens up to each row's last real one are laid one after another, ``(1, n_tokens, hidden_size)``, before the
    first layer, and back after the last. That changes nothing for real tokens but the masks that dropout draws; the
    model's ``last_hidden_state`` is 0 where padding was left out. Nothing is left out of a batch with padding inside a
    row (that on the left is computed as before), with ``output_hidden_states`` or ``output_attentions``, beside a
    cache or cross-attention, and in code that ``torch.compile`` compiles.

    Args:
        model: a model of Transformers with ``attn_implementation="flash_plus"``, of a family in :data:`FAMILIES`, with
            any head; also wrapped (DDP, PEFT). Another implementation's masks are left alone.

    Returns:
        A handle; also a context manager.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in the model is an encoder of these families.

    Example:
        >>> import torch, transformers, hf_flash_plus
        >>> config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = transformers.AutoModel.from_config(config, attn_implementation="flash_plus").eval()
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> with hf_flash_plus.skip_padding(model):
        ...     hidden = model(torch.ones(2, 4, dtype=torch.long), attention_mask=mask).last_hidden_state
        >>> hidden[1].any(dim=-1)
        tensor([ True,  True, False, False])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    bases = [module for module in model.modules() if _is_base(module)]
    if not bases:
        raise ValueError(
            f"skip_padding found no encoder in {type(model).__name__}; it knows the base models of: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    hooks = []
    for base in bases:
        hooks.append(base.register_forward_pre_hook(_note_request, with_kwargs=True))
        hooks.append(base.encoder.register_forward_pre_hook(_before, with_kwargs=True))
        hooks.append(base.encoder.register_forward_hook(_after, with_kwargs=True))
    return SkippedPadding(hooks)


def _is_base(module: nn.Module) -> bool:
    return (
        getattr(getattr(module, "config", None), "model_type", None) in FAMILIES
        and hasattr(module, "embeddings")
        and isinstance(getattr(getattr(module, "encoder", None), "layer", None), nn.ModuleList)
    )


def _note_request(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = [
        kwargs[name] if kwargs.get(name) is not None else getattr(module.config, name, False) for name in _RECORDED
    ]
    _records_layers.set(any(asked))


def _before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the encoder's hidden states and mask by those of the tokens that count."""
    if torch.compiler.is_compiling() or _records_layers.get():
        return None
    given = {**dict(zip(("hidden_states", "attention_mask"), args)), **kwargs}
    hidden, mask = given.get("hidden_states"), given.get("attention_mask")
    others = [*args[2:], given.get("past_key_values"), given.get("encoder_hidden_states")]
    if not isinstance(hidden, Tensor) or not isinstance(mask, Tensor) or any(x is not None for x in others):
        return None
    packed = _packed(hidden, mask)
    if packed is not None and any(packed[0].shape[1] % chunk for chunk in _chunks(module)):
        return None
    return None if packed is None else ((), {**given, "hidden_states": packed[0], "attention_mask": packed[1]})


def _chunks(encoder: Any) -> set[int]:
    """Into how many tokens at a time layers cut their feed-forward part: a length must be a multiple."""
    return {chunk for layer in encoder.layer if (chunk := getattr(layer, "chunk_size_feed_forward", 0))}


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Put the tokens back where they were; the mask that ``_before`` made says where that is."""
    places: _Places | None = getattr(kwargs.get("attention_mask"), _ATTRIBUTE, None)
    tokens = output[0]
    if places is None or tokens.shape[:2] != (1, len(places.index)):  # not packed, or another hook has put them back
        return None
    hidden = tokens.new_zeros(places.batch * places.length, tokens.shape[-1]).index_copy(0, places.index, tokens[0])
    hidden = hidden.view(places.batch, places.length, -1)
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


class _Places(NamedTuple):
    """Where tokens stand in a batch of ``batch`` rows of ``length``: ``index`` ``(n_tokens,)`` counts row by row."""

    index: Tensor
    batch: int
    length: int


def _packed(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tokens ``(1, n_tokens, hidden_size)`` and their mask; None where nothing can be left out."""
    if hidden.dim() != 3 or not carrier.is_carrier(mask):
        return None
    batch, length, _ = hidden.shape
    carried = carrier.attached(mask, length)
    if carried is None or carried.row_ends is None or carried.mask.row_intervals is None:
        return None
    ends = carried.row_ends
    total = carried.n_rows
    if total is None:  # the mask was made without a look at the device (a CPU's)
        if carried.mask.key_holes is not None and bool(carried.mask.key_holes.any()):
            return None
        total = int(ends.sum())
    if ends.shape[0] != batch or not 0 < total < batch * length:
        return None
    rows = torch.repeat_interleave(torch.arange(batch, device=hidden.device), ends, output_size=total)
    firsts = ends.cumsum(0) - ends
    shift = (firsts - torch.arange(batch, device=hidden.device) * length)[rows]  # from places in the batch to the row's
    index = torch.arange(total, device=hidden.device) - shift
    intervals = carried.mask.row_intervals.expand(batch, length, 2).reshape(-1, 2)[index]
    intervals = (intervals + firsts[rows, None]).to(torch.int32)[None]
    tokens = hidden.reshape(batch * length, -1).index_select(0, index)[None]
    packed = carrier.encode(intervals, None, None, carrier.Carried(AttentionMask(row_intervals=intervals)))
    setattr(packed, _ATTRIBUTE, _Places(index, batch, length))
    return tokens, packed
