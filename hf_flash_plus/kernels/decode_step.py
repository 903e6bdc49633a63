"""The short ways of decoding: calls like one that was served before (:class:`Step`), and calls that differ from it in
nothing but their data (:class:`Ticket`).

In eager decoding every layer of every step asks for the same, and the host's time per call decides the speed. A step
knows everything but the number of keys, which grows from token to token; the first layer of a token takes it. A ticket
knows that too: for the other layers, what is left is to look that nothing has changed, to allocate the output, and to
launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import MAX_ROW_STRIDE, AttentionInputs
from ..masks import AttentionMask
from .decode_launch import Recipe, Workspace, _launch, find_recipe, keys_class, n_splits, stream_workspace
from .launch import _NO_STRIDES, Launch, _strides, addresses, be_careful, hooked, prepare, raw_stream, starter
from .machine_code import MiscompiledError


class Step:
    """Later calls like one that was served already: the same but for their data and number of keys.

    What :func:`~.decode_launch.forward` finds out anew on each call is known here. Made for calls of one row whose
    mask is flags and row intervals, without any other feature but softcap.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        call = prepare(inputs)
        batch, _, nheads, head_dim = inputs.query.shape
        nheads_k, self.v_head_dim = inputs.value.shape[2:]
        self.recipes: dict[int, Recipe] = {}  # by class of keys
        self.structure = call.structure
        self.query_shape = (batch, nheads, 1, head_dim)
        self.key_shape = (batch, nheads_k)
        self.device, self.dtype = inputs.query.device, inputs.query.dtype
        mask = inputs.mask
        self.masked = tuple(part is not None for part in (mask.row_intervals, mask.key_mask, mask.key_holes))
        self.sizes = (nheads_k, nheads // nheads_k, 1)
        # Not the call's own numbers: those are cut to its number of keys.
        self.left = mask.window[0]
        self.right = -1 if mask.causal else mask.window[1]
        self.numbers = (float(inputs.softmax_scale), float(inputs.softcap))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Ticket | None] | None:
        """``out (batch, 1, nheads, v_head_dim)`` and a ticket for calls that differ in their data only, where there is
        one; None where these tensors need the ordinary way."""
        batch, nheads, _, head_dim = self.query_shape
        seqlen_k = key.shape[2]
        q_strides, k_strides, v_strides = query.stride(), key.stride(), value.stride()
        intervals, key_mask, holes = mask.row_intervals, mask.key_mask, mask.key_holes
        if (
            query.shape != self.query_shape
            or key.shape != (*self.key_shape, seqlen_k, head_dim)
            or value.shape != (*self.key_shape, seqlen_k, self.v_head_dim)
            or not q_strides[3] == k_strides[3] == v_strides[3] == 1
            or max(k_strides[2], v_strides[2]) >= MAX_ROW_STRIDE
            or seqlen_k == 0
            or (intervals is not None, key_mask is not None, holes is not None) != self.masked
            or _capturing(self.device)
        ):
            return None
        mask_strides: tuple[int | None, ...] = _NO_STRIDES[:6]
        if intervals is not None:
            if intervals.shape[1:] != (1, 2) or intervals.shape[0] not in (1, batch) or intervals.device != self.device:
                return None
            mask_strides = (*_strides(intervals), None, None, None)
            if key_mask is not None:
                if key_mask.shape != (batch, seqlen_k) or holes is None or holes.shape != (batch,):
                    return None
                mask_strides = (*mask_strides[:3], *_strides(key_mask), *_strides(holes))
        left, right = min(self.left, seqlen_k + 1), min(self.right, seqlen_k + 1)
        device, keys = self.device, keys_class(seqlen_k)
        recipe = self.recipes.get(keys)
        if recipe is None:
            nheads_k, group, _ = self.sizes
            recipe = self.recipes[keys] = find_recipe(self.structure, group, 1, batch * nheads_k, 0, keys)
        programs = batch * self.sizes[0] * recipe.row_tiles
        out = torch.empty((batch, 1, nheads, self.v_head_dim), dtype=self.dtype, device=device)
        splits = n_splits(programs, seqlen_k, recipe.least_keys, recipe.cores)
        space = stream_workspace(device, programs * splits * recipe.floats, programs) if splits > 1 else None
        launch = _launch(
            recipe,
            programs,
            splits,
            (query, key, value, out, None, intervals, key_mask, holes, None, None, None, None, None),
            (
                q_strides[0], q_strides[2], q_strides[1],
                k_strides[0], k_strides[2], k_strides[1],
                v_strides[0], v_strides[2], v_strides[1],
                *mask_strides,
                *_NO_STRIDES[:12],
            ),
            (*self.sizes, seqlen_k, splits, recipe.row_tiles, left, right),
            self.numbers,
            (None,),
            space,
        )  # fmt: skip
        try:
            launch.run()
        except MiscompiledError as fault:
            be_careful(self.structure, fault)
            self.structure = self.structure._replace(careful=True)
            self.recipes.clear()
            return None
        return out, Ticket.of(launch, out, space)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Ticket:
    """A launch of the decoding kernel with everything fixed but the addresses of query, key, value and output.

    Whoever holds it answers for shapes, strides, dtypes and devices being those of the call that it was made from, and
    for the mask's tensors being alive. It looks itself at what is left: the current device and stream (the workspace is
    the stream's), a capture into a CUDA graph (which gets a workspace of its own), somebody who watches Triton's
    launches, and addresses that are no multiples of 16.
    """

    __slots__ = (
        "_capturing",
        "_current_device",
        "_device",
        "_first",
        "_launcher",
        "_like",
        "_rest",
        "_space",
        "_stream",
    )

    def __init__(
        self, launch: Launch, compiled: Any, pointers: tuple[int | None, ...], out: Tensor, space: Workspace | None
    ):
        self._device = launch.key[0]
        self._stream = raw_stream(self._device)
        self._launcher, self._first = starter(compiled, launch.n_programs, self._stream)
        self._rest = (*pointers[4:], *launch.arguments[launch.tensors :], *launch.plan.constexprs)
        self._space = space  # keeps the memory that its addresses are of
        self._like = out
        self._current_device, self._capturing = torch._C._cuda_getDevice, torch._C._cuda_isCurrentStreamCapturing

    @classmethod
    def of(cls, launch: Launch, out: Tensor, space: Workspace | None) -> Ticket | None:
        """The ticket of a launch that took place; None where each such call must be launched anew."""
        if not launch.plan.reusable:
            return None
        pointers, misaligned = addresses(launch.arguments[: launch.tensors])
        if any(misaligned[:3]):
            return None
        compiled = launch.plan.find((*launch.key, misaligned) if misaligned else launch.key)
        return None if compiled is None else cls(launch, compiled, pointers, out, space)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """``out (batch, 1, nheads, v_head_dim)``; None where the call must be launched anew."""
        device, stream = self._device, self._stream
        q, k, v = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if (
            (q | k | v) & 15
            or raw_stream(device) != stream
            or self._current_device() != device
            or (stream and self._capturing())  # the default stream, 0, cannot be captured
            or hooked()
        ):
            return None
        out = torch.empty_like(self._like)
        self._launcher(*self._first, q, k, v, out.data_ptr(), *self._rest)
        return out
