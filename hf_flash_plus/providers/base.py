"""What a provider is: who computes attention, declared as data, with every reason it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..inputs import AttentionInputs, CallSignature
from ..masks import AttentionMask


def torch_is_deterministic() -> bool:
    """Whether torch was told to use deterministic algorithms; with ``warn_only`` it uses the others and warns."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


class AttentionOutput(NamedTuple):
    """``out`` ``(batch, seqlen_q, nheads, v_head_dim)`` in the dtype of ``query``; ``softmax_lse`` fp32
    ``(batch, nheads, seqlen_q)`` (natural log, sinks included, -inf on rows that see nothing) or None where it
    was not asked for; ``probabilities`` ``(batch, nheads, seqlen_q, seqlen_k)`` only from providers that form them."""

    out: Tensor
    softmax_lse: Tensor | None = None
    probabilities: Tensor | None = None


class AttentionGradients(NamedTuple):
    """Gradients from :meth:`Provider.backward`; ``dbias`` and ``dsinks`` are None where not asked for.

    ``dbias`` has the shape of ``mask.bias``; ``dsinks`` is fp32 of the shape of ``sinks``.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


class DecodingStep(Protocol):
    """Computes calls that differ from the one it was prepared for in their data and number of keys only.

    Takes ``query (batch, nheads, 1, head_dim)``, ``key`` and ``value (batch, nheads_k, seqlen_k, head_dim)`` as
    Transformers has them, and a mask with the same flags and parts; returns ``out (batch, 1, nheads, v_head_dim)``, or
    None where it cannot take these tensors and the ordinary way must.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor | None: ...


class Provider(ABC):
    """Someone who computes attention calls.

    Capability is data: subclasses set the class attributes, and :meth:`not_supported_reasons` compares a call with
    them. A subclass adds reasons of its own by extending :meth:`extra_reasons`.

    Attributes:
        name: the name in ``HF_FLASH_PLUS_PROVIDER``, logs and tables.
        summary: one line for ``hf-flash-plus info``.
        differentiable: True where :meth:`forward` is made of calls that torch's autograd and ``torch.compile``
            understand; such a provider is called inline and has no :meth:`backward`. False where it launches kernels
            of its own; ``ops`` then wraps it in a library op and calls :meth:`backward`.
        reads_hidden_keys: True where memory of keys that no row sees reaches the arithmetic, so that NaN there would
            show; our kernels never read it.
        backward_provider: name of the provider whose :meth:`backward` serves this one's forward (FlagGems computes
            forwards only); None is itself.
        device_types: device types served.
        dtypes: dtypes of q, k, v served.
        max_head_dim: largest head dimension of q, k and v.
        head_dim_multiple: head dimensions must be a multiple of this.
        features: which of the optional features it honours, by the names in :data:`FEATURES`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    differentiable: ClassVar[bool] = False
    reads_hidden_keys: ClassVar[bool] = False
    backward_provider: ClassVar[str | None] = None
    device_types: ClassVar[frozenset[str] | None] = None
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset()
    max_head_dim: ClassVar[int] = 256
    head_dim_multiple: ClassVar[int] = 1
    features: ClassVar[frozenset[str]] = frozenset()

    def unavailable_reason(self) -> str | None:
        """Why this provider cannot serve any call on this machine now (not installed, no device), or None."""
        return None

    def version(self) -> str | None:
        """Version of the library behind this provider, for ``hf-flash-plus info``."""
        return None

    def not_supported_reasons(self, signature: CallSignature) -> list[str]:
        """All the reasons why this provider cannot serve such a call; empty when it can."""
        unavailable = self.unavailable_reason()
        if unavailable:
            return [unavailable]
        reasons = []
        if self.device_types is not None and signature.device_type not in self.device_types:
            reasons.append(
                f"serves tensors on {', '.join(sorted(self.device_types))}, these are on {signature.device_type}"
            )
        if signature.dtype not in self.dtypes:
            served = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            reasons.append(f"serves {served}, these are {str(signature.dtype).removeprefix('torch.')}")
        largest = max(signature.head_dim, signature.v_head_dim)
        if largest > self.max_head_dim:
            reasons.append(f"serves head dimensions up to {self.max_head_dim}, this is {largest}")
        if signature.head_dim % self.head_dim_multiple or signature.v_head_dim % self.head_dim_multiple:
            reasons.append(
                f"serves head dimensions that are a multiple of {self.head_dim_multiple}, "
                f"these are {signature.head_dim} and {signature.v_head_dim}"
            )
        for feature, (wanted, words) in FEATURES.items():
            if wanted(signature) and feature not in self.features:
                reasons.append(f"does not serve {words}")
        return reasons + self.extra_reasons(signature)

    def extra_reasons(self, signature: CallSignature) -> list[str]:
        """Reasons that the capability data cannot express; called when the provider is available."""
        return []

    def kernels(self, inputs: AttentionInputs) -> str:
        """Which of its kernels would compute a call that it serves, and why not better ones; "" where it has no choice.
        For logs and ``hf-flash-plus explain``."""
        return ""

    def prepare_decoding(self, inputs: AttentionInputs) -> DecodingStep | None:
        """A shorter way to compute later calls like this one, which has one query row per batch element, no gradient
        and a mask of flags, row intervals and padding; None where there is none. See :class:`DecodingStep`."""
        return None

    def auto_reasons(self, signature: CallSignature) -> list[str]:
        """Reasons to let the next provider serve although this one can; asked in automatic selection only, and first,
        so that stepping aside costs nothing (no import of a large library)."""
        return []

    @abstractmethod
    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        """Compute one call that :meth:`not_supported_reasons` allowed."""

    def forward_paged(
        self, inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor
    ) -> AttentionOutput | None:
        """:meth:`forward` with the keys and values read from pages; None when the caller is to gather them.

        Args:
            inputs: the call; its ``key`` and ``value`` only have the right shape, their content is not to be read.
            k_cache, v_cache: ``(num_blocks, page_size, nheads_k, dim)``.
            block_table: int32 ``(batch, max_blocks)``.
        """
        return None

    def backward(
        self,
        inputs: AttentionInputs,
        out: Tensor,
        softmax_lse: Tensor,
        dout: Tensor,
        *,
        bias_grad: bool,
        sinks_grad: bool,
    ) -> AttentionGradients:
        """Gradients of :meth:`forward` at ``dout``; only for providers that are not ``differentiable``."""
        raise TypeError(f"provider {self.name} is differentiable: autograd computes its gradients")


#: Optional features: when a call wants one, and how it is called in a reason.
FEATURES = {
    "window": (lambda s: s.window, "sliding windows"),
    "packed": (lambda s: s.packed, "packed sequences (varlen)"),
    "intervals": (lambda s: s.intervals and not s.packed, "row intervals (padded and packed batches)"),
    "key_mask": (lambda s: s.key_mask, "key masks"),
    "bool_bias": (lambda s: s.bias == "bool", "dense boolean masks"),
    "float_bias": (lambda s: s.bias == "float", "dense additive biases"),
    "bias_grad": (lambda s: s.bias_grad, "gradients of a dense bias"),
    "alibi": (lambda s: s.alibi, "ALiBi slopes"),
    "sinks": (lambda s: s.sinks == "head", "attention sinks (s_aux)"),
    "row_sinks": (lambda s: s.sinks == "row", "attention sinks that differ by row"),
    "softcap": (lambda s: s.softcap, "softcap"),
    "dropout": (lambda s: s.dropout, "dropout"),
    "gqa": (lambda s: s.nheads != s.nheads_k, "fewer key than query heads (GQA, MQA)"),
    "v_head_dim": (lambda s: s.head_dim != s.v_head_dim, "a value head dimension other than the query's"),
    "lse": (lambda s: s.needs_lse, "returning softmax_lse"),
    "grad": (lambda s: s.needs_grad, "gradients"),
    "deterministic": (lambda s: s.deterministic and s.needs_grad, "deterministic gradients"),
}
ALL_FEATURES = frozenset(FEATURES)
