"""Rotary embeddings in one launch: :func:`fuse_rotary` lets the layers of a model rotate by our kernel."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops, rotary, settings
from ..providers.triton import TritonProvider

logger = logging.getLogger("hf_flash_plus")

#: The function of modeling files that rotates queries and keys.
FUNCTION = "apply_rotary_pos_emb"
#: What the tables (cosines) of a model with fused rotary embeddings carry.
_MARK = "_hf_flash_plus_rotary"


class FusedRotary:
    """What :func:`fuse_rotary` returns: ``remove()``, or the end of a ``with`` block, undoes it.

    Attributes:
        fused: names of the modules with attention that call a function which is served now (some have other ways, too).
        left: ``(name, reason)`` of those that rotate by the model's own function.
    """

    def __init__(
        self, fused: list[str], left: list[tuple[str, str]], hooks: list[Any], replaced: list[_Replaced]
    ) -> None:
        self.fused = fused
        self.left = left
        self._hooks = hooks
        self._replaced = replaced

    def remove(self) -> None:
        """Rotate by the model's own functions again."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._replaced:
            self._replaced.pop().release()

    def __enter__(self) -> FusedRotary:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"fused the rotary embedding of {len(self.fused)} attention modules"] if self.fused else []
        return "\n".join(lines + [f"left {name}: {reason}" for name, reason in self.left])


def fuse_rotary(model: nn.Module) -> FusedRotary:
    """Rotate queries and keys of a model (RoPE) in one launch a layer, forward and backward.

    Models write the rotary embedding with torch operations: ten launches a layer, more than all the rest of attention.
    The result is the same to the bit, so that it goes with any attention implementation. What the kernel does not take
    (CPU tensors, other dtypes, tensors of subclasses) is computed by the model's own function, as is everything in code
    that ``torch.compile`` compiles, which fuses it itself, under tracers and function transforms, and where
    ``FLASH_ATTENTION_USE_FLAGGEMS`` is ``FALSE``. Gradients cannot be differentiated once more (torch's error says so).

    Which functions are served is told by what they compute on small random tensors (:func:`~..rotary.find_form`). Other
    models of the same class are not touched.

    Args:
        model: a model of Transformers whose layers call their modeling file's ``apply_rotary_pos_emb`` with the cosines
            and sines of a rotary embedding module (LLaMA, Mistral, Qwen, Gemma, GPT-NeoX, ...); also wrapped (DDP,
            PEFT).

    Returns:
        A handle; also a context manager.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in the model can be fused (says why).

    Example:
        >>> import transformers, hf_flash_plus
        >>> config = transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
        >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flash_plus")
        >>> print(hf_flash_plus.fuse_rotary(model))
        fused the rotary embedding of 2 attention modules
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    embeddings = [module for module in model.modules() if _is_embedding(module)]
    fused: list[str] = []
    left: list[tuple[str, str]] = []
    namespaces: dict[int, dict[str, Any]] = {}
    for name, module in model.named_modules():
        namespace = _namespace(module)
        if namespace is None:
            continue
        function = _original(namespace[FUNCTION])
        if not embeddings:
            left.append((name, "the model has no rotary embedding module"))
        elif _form(function) is None:
            left.append((name, f"{function.__module__}.{FUNCTION} computes something that the kernel does not"))
        else:
            fused.append(name)
            namespaces[id(namespace)] = namespace
    if not fused:
        reasons = sorted({reason for _, reason in left}) or [f"no module in it calls {FUNCTION} of its modeling file"]
        raise ValueError(f"fuse_rotary found nothing to fuse in {type(model).__name__}: {'; '.join(reasons)}.")
    handle = FusedRotary(fused, left, [], [])
    try:
        for namespace in namespaces.values():
            handle._replaced.append(_Replaced.acquire(namespace))
        for embedding in embeddings:
            handle._hooks.append(embedding.register_forward_hook(_mark))
    except BaseException:  # KeyboardInterrupt, too
        handle.remove()
        raise
    return handle


def _is_embedding(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _namespace(module: nn.Module) -> dict[str, Any] | None:
    """The globals in which a module's forward looks up the function that rotates; None where it does not."""
    forward: Any = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or FUNCTION not in code.co_names or not callable(forward.__globals__.get(FUNCTION)):
        return None
    namespace: dict[str, Any] = forward.__globals__
    return namespace


def _original(function: Any) -> Callable[..., Any]:
    replaced: _Replaced | None = getattr(function, _MARK, None)
    # What wraps ours by functools.wraps has its attributes, too.
    return function if replaced is None or replaced.function is not function else replaced.original


@functools.lru_cache(maxsize=256)
def _form(function: Callable[..., Any]) -> rotary.Form | None:
    """The form of a function whose arguments are named as in Transformers and that takes heads from dimension 1."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    if [*parameters][:4] != ["q", "k", "cos", "sin"]:
        return None
    if "unsqueeze_dim" in parameters and parameters["unsqueeze_dim"].default != 1:
        return None
    return rotary.find_form(function)


def _mark(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Mark the tables that a model's layers are about to use."""
    if torch.compiler.is_compiling() or not isinstance(output, tuple) or len(output) != 2:
        return
    cos = output[0]
    if type(cos) is Tensor:
        setattr(cos, _MARK, True)


class _Replaced:
    """A namespace whose function is replaced by one that looks at the mark of its tables; counts its users."""

    _all: ClassVar[dict[int, _Replaced]] = {}

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.original: Callable[..., Any] = _original(namespace[FUNCTION])
        self.users = 0
        form = _form(self.original)
        assert form is not None
        self.function = _dispatcher(self.original, form)
        setattr(self.function, _MARK, self)

    @classmethod
    def acquire(cls, namespace: dict[str, Any]) -> _Replaced:
        found = cls._all.get(id(namespace))
        if found is None or namespace[FUNCTION] is not found.function:  # somebody may have replaced ours by theirs
            found = cls._all[id(namespace)] = cls(namespace)
            namespace[FUNCTION] = found.function
        found.users += 1
        return found

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            if self._all.get(id(self.namespace)) is self:
                del self._all[id(self.namespace)]
            if self.namespace.get(FUNCTION) is self.function:
                self.namespace[FUNCTION] = self.original


class _Memo(NamedTuple):
    """Whether our kernels serve, as long as the settings are what they were."""

    selection: tuple[object, ...]
    answer: bool


_memo: _Memo | None = None


def _enabled() -> bool:
    """Whether the FlagGems/Triton path is selected and Triton can be used; asked in every layer."""
    global _memo
    selection = settings.selection()
    memo = _memo
    if memo is None or memo.selection != selection:
        memo = _memo = _Memo(selection, settings.use_flaggems() and _TRITON.unavailable_reason() is None)
    return memo.answer


_TRITON = TritonProvider()


def _dispatcher(original: Callable[..., Any], form: rotary.Form) -> Callable[..., Any]:
    """A function for a namespace: ours for marked tables, the original for all else."""
    takes_heads = "unsqueeze_dim" in inspect.signature(original).parameters

    @functools.wraps(original)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        # Some functions take less (no keys, tables by name): the model knows what it does.
        if torch.compiler.is_compiling() or len(args) != 4 or not hasattr(args[2], _MARK):
            return original(*args, **kwargs)
        heads: Any = kwargs.get("unsqueeze_dim", 1)
        if kwargs and (not takes_heads or kwargs.keys() != {"unsqueeze_dim"} or heads not in (1, 2)):
            return original(*args, **kwargs)
        q, k, cos, sin = args
        if heads == 2:  # (batch, seqlen, heads, head_dim)
            rotated = (
                _rotated(q.transpose(1, 2), k.transpose(1, 2), cos, sin, form) if q.dim() == k.dim() == 4 else None
            )
            rotated = None if rotated is None else (rotated[0].transpose(1, 2), rotated[1].transpose(1, 2))
        else:
            rotated = _rotated(q, k, cos, sin, form)
        return original(*args, **kwargs) if rotated is None else rotated

    return apply_rotary_pos_emb


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: rotary.Form) -> tuple[Tensor, Tensor] | None:
    """What the kernel makes of a call; None where it does not serve."""
    if _enabled() and not ops.watched():
        found = rotary.recall(q, k, cos, sin, form)
        if found is None and rotary.serves(q, k, cos, sin, form) and _TRITON.runs_on(q):
            found = rotary.rotate(q, k, cos, sin, form)
        if found is not None:
            logger.debug("rotary embedding: q %s, served by our kernel", q.shape)
            return found
    logger.debug("rotary embedding: served by the model's own function")
    return None
