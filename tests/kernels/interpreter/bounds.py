"""Triton's interpreter with bounds: every address that a kernel reads or writes lies in the memory of its arguments.

The interpreter itself reads whatever is there. On a GPU such an access is an error only where no memory is mapped, so
that a kernel which reads a little too far passes every test until it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


class OutOfBoundsError(AssertionError):
    """A kernel accessed memory that none of its arguments holds."""


class _Bounds:
    """The memory of the arguments of the launch that runs."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def set(self, arguments: Any) -> None:
        self.ranges = sorted(set(_storages(arguments)))

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Look at the addresses that ``mask`` lets through."""
        addresses = np.asarray(pointers.data).astype(np.uint64)
        kept = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        if not kept.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(kept.min()), int(kept.max()) + size
        if any(begin <= low and high <= end for begin, end in self.ranges):
            return
        inside = np.zeros(kept.shape, dtype=bool)
        for begin, end in self.ranges:
            inside |= (kept >= begin) & (kept + np.uint64(size) <= end)
        if not inside.all():
            first = int(kept[~inside][0])
            near = min(self.ranges, key=lambda span: max(span[0] - first, first - span[1]), default=(0, 0))
            raise OutOfBoundsError(
                f"{what} of {int((~inside).sum())} elements outside of all arguments; the first is {first - near[0]} "
                f"bytes from the beginning of one that has {near[1] - near[0]}"
            )


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _storages(one)
    elif isinstance(value, dict):
        yield from _storages(list(value.values()))


@contextmanager
def checked() -> Iterator[None]:
    """Inside, launches in the interpreter raise :class:`OutOfBoundsError` (inside Triton's InterpreterError)."""
    from triton.runtime import interpreter

    bounds = _Bounds()

    def accessing(what: str, place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def access(builder: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
            bounds.check(what, pointers, rest[place])
            return original(builder, pointers, *rest, **options)

        return access

    def preparing(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(executor: Any, *arguments: Any) -> Any:
            prepared = original(executor, *arguments)
            bounds.set(prepared)
            return prepared

        return prepare

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    with ExitStack() as stack:
        for owner, name, make in (
            (builder, "create_masked_load", lambda original: accessing("a load", 0, original)),
            (builder, "create_masked_store", lambda original: accessing("a store", 1, original)),
            (executor, "_init_args_hst", preparing),
        ):
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
        yield
