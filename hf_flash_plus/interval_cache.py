"""What kernels work out from a mask's row intervals alone, kept for all layers and passes that see the same mask.

A model makes its mask once a forward, and each of its layers would summarise the same row intervals again, forward and
backward: a launch or two each time. Only tensors that this package made itself, outside of compiled code and of CUDA
graphs, are known here (:func:`share`): of others nobody can say whether something writes to them that torch does not
count (a replayed graph, a kernel).

Beside ``masks``: those who make masks and the kernels both know it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_hf_flash_plus_shared"


class _Kept:
    """What is kept with a tensor object, and dies with it.

    Attributes:
        version: counts the tensor's in-place changes, as of when it was made known.
        by_stream: what was computed, by the raw stream on which that happened: on another it may not be there yet.
    """

    __slots__ = ("by_stream", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.by_stream: dict[int, dict[Hashable, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept(-1)  # a copy of the tensor begins anew, and is not known

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (-1,)


def capturing(tensor: Tensor) -> bool:
    """Whether a call with this tensor is captured into a CUDA graph: what is remembered from before is not in it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def share(intervals: Tensor) -> Tensor:
    """Make row intervals known, which nobody will write to in a way that torch does not count; returns them.

    Does nothing in compiled code, while a CUDA graph is captured (its replays write the tensor anew), and in
    ``torch.inference_mode`` (where torch counts nothing).
    """
    if torch.compiler.is_compiling() or type(intervals) is not Tensor:
        return intervals
    if not intervals.is_inference() and not capturing(intervals):
        setattr(intervals, _ATTRIBUTE, _Kept(intervals._version))
    return intervals


def shared(intervals: Tensor) -> dict[Hashable, Any] | None:
    """Where to keep what was computed from these row intervals on the current stream, and to find it again.

    What is kept must depend on nothing but the intervals' values and the key it is kept by. None: nothing may be kept,
    since the tensor is not known (:func:`share`), was changed in place, or a CUDA graph is being captured, into which
    what was computed before does not go.
    """
    kept: _Kept | None = getattr(intervals, _ATTRIBUTE, None)
    if kept is None or intervals._version != kept.version or capturing(intervals):
        return None
    stream = torch._C._cuda_getCurrentRawStream(intervals.device.index) if intervals.is_cuda else 0
    found = kept.by_stream.get(stream)
    return kept.by_stream.setdefault(stream, {}) if found is None else found
