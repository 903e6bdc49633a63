"""Launches of a call once more, for a call like it: what differs between the two are addresses.

In training every layer and every step makes the same call of other tensors. To work out its launches anew costs the
host several times as long as to make them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launching import Launch, described_anew

#: Where each buffer of the workspace begins, in bytes: enough for the hardware's copies.
_ALIGNMENT = 256


class _Address(NamedTuple):
    """Stands in for the tensor of a descriptor, of which launchers ask nothing but this."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Step(NamedTuple):
    """One launch: its arguments, where pointers and descriptors go among them, and to which tensors these belong."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, int]]
    descriptors: list[tuple[int, int]]


class Replay:
    """The launches of one call, without its tensors.

    Attributes:
        results: shape and dtype of the tensors that the launches fill for the caller.
    """

    def __init__(
        self, steps: list[_Step], results: list[tuple[torch.Size, torch.dtype]], offsets: list[int], size: int
    ):
        self._steps = steps
        self.results = results
        self._offsets = offsets
        self._size = size

    def __call__(self, given: tuple[Tensor | None, ...]) -> list[Tensor] | None:
        """Launch, with ``given`` in the order in which they were recorded; the results, or None where one of the
        tensors lies at an address that the kernels were not compiled for."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        if any(address & 15 for address in addresses):
            return None
        query = given[0]
        assert query is not None
        results = [query.new_empty(shape, dtype=dtype) for shape, dtype in self.results]
        addresses += [tensor.data_ptr() for tensor in results]
        workspace = query.new_empty(self._size, dtype=torch.uint8)
        begin = workspace.data_ptr()
        addresses += [begin + offset for offset in self._offsets]
        for compiled, grid, arguments, pointers, descriptors in self._steps:
            arguments = arguments.copy()
            for position, which in pointers:
                arguments[position] = addresses[which]
            for position, which in descriptors:
                arguments[position] = described_anew(arguments[position], _Address(addresses[which]))
            compiled[grid](*arguments)
        return results


def record(
    launches: list[Launch],
    given: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    buffers: tuple[Tensor, ...],
    kept: tuple[Tensor, ...] = (),
) -> Replay | None:
    """The :class:`Replay` of launches that have run; None where it is not clear which tensor an argument belongs to.

    Args:
        given: the call's own tensors, the same objects that the launches got, the query first.
        results, buffers: what was allocated for the call; launches may have got views that begin where these do.
        kept: the same of an earlier call; they are to be given after ``given``.
    """
    known = {id(tensor): number for number, tensor in enumerate(given) if tensor is not None}
    if len(known) != sum(tensor is not None for tensor in given):
        return None  # one tensor in two roles: of another call's two tensors it would be unclear which
    made = {tensor.data_ptr(): len(given) + number for number, tensor in enumerate((*kept, *results, *buffers))}

    def owner(tensor: Tensor) -> int | None:
        return known.get(id(tensor), made.get(tensor.data_ptr()))

    steps = []
    for launch in launches:
        arguments: list[Any] = [*launch.arguments, *launch.plan.constexprs]
        pointers: list[tuple[int, int]] = []
        descriptors: list[tuple[int, int]] = []
        for position, argument in enumerate(launch.arguments):
            base = getattr(argument, "base", None)
            if isinstance(argument, Tensor):
                which, places = owner(argument), pointers
                arguments[position] = None
            elif isinstance(base, Tensor):
                which, places = owner(base), descriptors
                arguments[position] = described_anew(argument, None)
            else:
                continue
            if which is None:
                return None
            places.append((position, which))
        compiled = launch.plan.compiled[launch.key]
        steps.append(_Step(compiled, (launch.n_programs, 1, 1), arguments, pointers, descriptors))
    offsets, size = [], 0
    for buffer in buffers:
        offsets.append(size)
        size += math.ceil(buffer.numel() * buffer.itemsize / _ALIGNMENT) * _ALIGNMENT
    return Replay(steps, [(tensor.shape, tensor.dtype) for tensor in results], offsets, size)
