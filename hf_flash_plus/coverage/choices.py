"""Discrete choices of a model (which experts, which keys), recorded in one run and put into another.

Where two candidates are nearly equal, rounding decides between them, and the results then differ by as much as the
candidates do, whoever computes attention. Two runs can be compared where both make the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class Choices:
    """The calls of ``topk`` and ``argmax`` in one run, in order.

    Not by a mode of torch: flash_plus takes other ways under one than models ever see.
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, tuple[int, ...], Tensor]] = []

    def __len__(self) -> int:
        return len(self._made)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is chosen inside."""
        self._made.clear()

        def keep(name: str, original: Callable[..., Any], source: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(source, *args, **kwargs)
            self._made.append((name, tuple(source.shape), result if name == "argmax" else result.indices))
            return result

        with _replaced(keep):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Choose the same inside, with the values of the run itself.

        Raises:
            LookupError: the run chooses in another order, or from other shapes.
        """
        left = iter(self._made)

        def repeat(name: str, original: Callable[..., Any], source: Tensor, *args: Any, **kwargs: Any) -> Any:
            kind, shape, chosen = next(left, ("", (), None))
            own = original(source, *args, **kwargs)
            mine = own if name == "argmax" else own.indices
            if kind != name or shape != tuple(source.shape) or chosen is None or chosen.shape != mine.shape:
                raise LookupError(f"{name} of {tuple(source.shape)} was not recorded here")
            if name == "argmax":
                return chosen.to(source.device)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            indices = chosen.to(source.device)
            return torch.return_types.topk((source.gather(dim, indices), indices))

        with _replaced(repeat):
            yield
        if next(left, None) is not None:
            raise LookupError("the run makes fewer choices than were recorded")


@contextmanager
def _replaced(instead: Callable[..., Any]) -> Iterator[None]:
    """``instead(name, original, tensor, ...)`` in place of each function, under both of its names."""
    with ExitStack() as stack:
        for owner in (torch, Tensor):
            for name in ("topk", "argmax"):
                stack.enter_context(mock.patch.object(owner, name, _wrapped(name, getattr(owner, name), instead)))
        yield


def _wrapped(name: str, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        source, *rest = args or (kwargs.pop("input"),)
        return instead(name, original, source, *rest, **kwargs)

    return call
