"""Discrete choices of a model (which experts, which keys), recorded in one run and put into another.

Where two candidates are nearly equal, rounding decides between them, and the results then differ by as much as the
candidates do, whoever computes attention. Two runs can be compared where both make the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: What experts and keys are chosen by in most models.
SELECTIONS = ("topk", "argmax")
#: What a router with thresholds (phimoe's sparse mixer) also chooses by. Implementations of attention may differ in
#: whether they call these, so that they are a second try.
WITH_THRESHOLDS = (*SELECTIONS, "max", "__gt__")


class Choices:
    """The calls of some functions in one run, in order.

    Not by a mode of torch: flash_plus takes other ways under one than models ever see.

    Args:
        names: of functions of torch and methods of tensors; ``max`` counts with a dimension, ``__gt__`` between
            numbers that are not whole.
    """

    def __init__(self, names: Sequence[str] = SELECTIONS) -> None:
        self.names = tuple(names)
        self._made: list[tuple[str, tuple[int, ...], Tensor]] = []

    def __len__(self) -> int:
        return len(self._made)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is chosen inside."""
        self._made.clear()

        def keep(name: str, original: Callable[..., Any], source: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(source, *args, **kwargs)
            if _chooses(name, source, result):
                self._made.append((name, tuple(source.shape), _chosen(result)))
            return result

        with _replaced(self.names, keep):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Choose the same inside, with the values of the run itself.

        Raises:
            LookupError: the run chooses in another order, or from other shapes.
        """
        left = iter(self._made)

        def repeat(name: str, original: Callable[..., Any], source: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = original(source, *args, **kwargs)
            if not _chooses(name, source, own):
                return own
            kind, shape, chosen = next(left, ("", (), None))
            if kind != name or shape != tuple(source.shape) or chosen is None or chosen.shape != _chosen(own).shape:
                raise LookupError(f"{name} of {tuple(source.shape)} was not recorded here")
            indices = chosen.to(source.device)
            if isinstance(own, Tensor):
                return indices
            place = 0 if name == "max" else 1
            dim = kwargs.get("dim", args[place] if len(args) > place else -1)
            if indices.dim() < source.dim():  # a maximum that did not keep its dimension
                values = source.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
            else:
                values = source.gather(dim, indices)
            return type(own)((values, indices))

        with _replaced(self.names, repeat):
            yield
        if next(left, None) is not None:
            raise LookupError("the run makes fewer choices than were recorded")


def _chooses(name: str, source: Tensor, result: Any) -> bool:
    """Whether rounding can change what a call chooses; all else is left alone."""
    if name == "max":
        return not isinstance(result, Tensor)
    return name != "__gt__" or source.is_floating_point()


def _chosen(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.indices


@contextmanager
def _replaced(names: Sequence[str], instead: Callable[..., Any]) -> Iterator[None]:
    """``instead(name, original, tensor, ...)`` in place of each function, under both of its names."""
    with ExitStack() as stack:
        for owner in (torch, Tensor):
            for name in names:
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, _wrapped(name, getattr(owner, name), instead)))
        yield


def _wrapped(name: str, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        source, *rest = args or (kwargs.pop("input"),)
        return instead(name, original, source, *rest, **kwargs)

    return call
