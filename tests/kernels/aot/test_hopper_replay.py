"""A backward call like one that was computed before makes the same launches, of its own tensors. Nothing runs here."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("prepares launches: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this Triton has no Gluon for Hopper")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.interval_cache import share
from hf_flash_plus.kernels.hopper import backward_launch, launching
from hf_flash_plus.masks import CAUSAL, FULL, AttentionMask

if reason := backward_launch.gluon_reason():
    pytest.skip(reason, allow_module_level=True)


class Compiled:
    """Writes down what it is launched with; tensors as addresses."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, list[Any]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launched.append((grid, [self._plain(each) for each in arguments]))

    @staticmethod
    def _plain(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return ("pointer", argument.data_ptr())
        if hasattr(argument, "base"):
            fields = {name: value for name, value in vars(argument).items() if name != "base"}
            return ("pointer", argument.base.data_ptr(), fields)
        return argument


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    kernel = Compiled()

    def run(launch: launching.Launch) -> None:
        launch.plan.compiled[launch.key] = kernel
        kernel[launch.n_programs, 1, 1](*launch.arguments, *launch.plan.constexprs)

    monkeypatch.setattr(launching.Launch, "run", run)
    monkeypatch.setattr(backward_launch, "_plan", backward_launch._plan.__wrapped__)
    monkeypatch.setattr(backward_launch, "_replays", {})
    known = backward_launch._likeness

    def as_on_a_gpu(inputs: AttentionInputs, given: tuple[Tensor | None, ...], mode: str) -> Any:
        assert known(inputs, given, mode) is None  # a CPU's calls are not kept
        return (tuple(None if t is None else (t.shape, t.stride()) for t in given), mode)

    monkeypatch.setattr(backward_launch, "_likeness", as_on_a_gpu)
    return kernel


def call(mask: AttentionMask, seed: int, nheads_k: int = 2) -> tuple[Any, ...]:
    """Inputs, out, lse and dout, of memory of their own."""
    batch, seqlen, nheads, dim = 2, 256, 2 if nheads_k == 2 else 4, 64
    torch.manual_seed(seed)

    def new(heads: int) -> Tensor:
        return torch.randn(batch, seqlen, heads, dim).to(torch.bfloat16)

    inputs = AttentionInputs(new(nheads), new(nheads_k), new(nheads_k), 0.125, mask)
    return inputs, new(nheads), torch.randn(batch, nheads, seqlen), new(nheads)


def intervals() -> AttentionMask:
    rows = torch.zeros(2, 256, 2, dtype=torch.int32)
    rows[..., 1] = 100
    return AttentionMask(row_intervals=rows)


@pytest.mark.parametrize("make", [lambda: FULL, lambda: CAUSAL, intervals], ids=["full", "causal", "intervals"])
def test_the_same_launches_of_other_tensors(make: Any, compiled: Compiled) -> None:
    first, second = call(make(), 0), call(make(), 1)
    mine = backward_launch.backward(*first, mode="unordered")
    ordinary, compiled.launched = compiled.launched, []
    assert len(backward_launch._replays) == 1 and len(ordinary) == (4 if make is intervals else 3)
    replayed = backward_launch.backward(*second, mode="unordered")
    assert len(compiled.launched) == len(ordinary)

    def owners(inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, grads: Any) -> dict[int, str]:
        named = {"q": inputs.query, "k": inputs.key, "v": inputs.value, "out": out, "lse": lse, "dout": dout}
        named |= {"intervals": inputs.mask.row_intervals, **grads._asdict()}
        return {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}

    names = owners(*first, mine), owners(*second, replayed)
    others: dict[int, int] = {}  # buffers, which have no name here: one of the first call is one of the second
    for (grid, arguments), (other_grid, other_arguments) in zip(ordinary, compiled.launched, strict=True):
        assert grid == other_grid
        for one, two in zip(arguments, other_arguments, strict=True):
            if not (isinstance(one, tuple) and one[:1] == ("pointer",)):
                assert one == two or one is two
                continue
            address = two if isinstance(two, int) else two[1]
            name = names[0].get(one[1])
            if name is not None:
                assert names[1].get(address) == name
            else:
                assert names[1].get(address) is None and address % 64 == 0  # as memory itself is, on a CPU
                assert others.setdefault(one[1], address) == address
            assert one[2:] == (() if isinstance(two, int) else two[2:])
    assert len(set(others.values())) == len(others) == (7 if make is intervals else 3)
    for a, b in zip(mine, replayed):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def test_lists_are_kept_with_the_mask(compiled: Compiled) -> None:
    """What follows from row intervals alone is worked out once for each mask that is known, launched anew or again."""

    def backward(mask: AttentionMask, seed: int, mode: str = "unordered") -> tuple[list[Any], list[Any]]:
        """Addresses of the lists in the main launch, and how many lists ``row_numbers`` and ``lists`` make."""
        compiled.launched = []
        backward_launch.backward(*call(mask, seed), mode=mode)
        rows, *lists, main, _ = compiled.launched
        names = backward_launch._plan("main", (), ()).kernel.arg_names
        where = [names.index(name) for name in ("bounds_desc", "entries_ptr", "counts_ptr", "summary_ptr")]
        found = [main[1][position] for position in where]
        addresses = [each if isinstance(each, int) else each[1] for each in found]
        row_names = backward_launch._plan("rows", (), ()).kernel.arg_names
        return addresses, [rows[1][row_names.index("n_lists")], len(lists)]

    first, second = intervals(), intervals()
    for mask in (first, second):
        assert mask.row_intervals is not None
        share(mask.row_intervals)
    kept = []
    for turn, mask in enumerate((first, second)):  # anew, and then as was recorded with the first mask
        addresses, made = backward(mask, turn)
        assert made == [2, 1]
        kept.append(addresses)
        for seed in range(3):
            assert backward(mask, seed) == (addresses, [0, 0])
    assert len(backward_launch._replays) == 2
    assert not set(kept[0]) & set(kept[1])
    assert backward(first, 9) == (kept[0], [0, 0])
    first.row_intervals[:, 0] = 0
    assert backward(first, 10)[1] == [2, 1], "of a mask that was changed nothing is known"
    assert backward(intervals(), 11)[1] == [2, 1]


def test_lists_serve_only_calls_that_would_make_the_same() -> None:
    """All that they depend on beside the row intervals is in the key by which they are kept."""

    def key(
        rows: int = 256, keys: int = 256, dim: int = 64, v_dim: int = 64, mode: str = "unordered", **flags: Any
    ) -> tuple[Any, ...]:
        q, k, v = torch.empty(2, rows, 4, dim), torch.empty(2, keys, 2, dim), torch.empty(2, keys, 2, v_dim)
        inputs = AttentionInputs(q, k, v, 0.125, AttentionMask(row_intervals=rows_of_all[:, :rows], **flags))
        return backward_launch._lists_key(inputs, mode)

    rows_of_all = torch.zeros(2, 256, 2, dtype=torch.int32)
    others: list[dict[str, Any]] = [
        {"rows": 128}, {"keys": 300}, {"dim": 128}, {"v_dim": 128}, {"mode": "split"}, {"causal": True},
        {"window": (5, -1)}, {"window": (-1, 0)},
    ]  # fmt: skip
    assert key() == key() and len({key(), *(key(**other) for other in others)}) == 1 + len(others)


def test_what_is_not_replayed(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors off the addresses that were compiled for, one tensor in two roles, sums over splits."""
    inputs, out, lse, dout = call(FULL, 0)
    backward_launch.backward(inputs, out, lse, dout, mode="unordered")
    (kept,) = backward_launch._replays.values()
    given = [inputs.query, inputs.key, inputs.value, out, dout, lse, None]
    assert kept(tuple(given)) is not None
    given[5] = torch.zeros(lse.numel() + 1)[1:].view(lse.shape)
    launched = len(compiled.launched)
    assert kept(tuple(given)) is None and len(compiled.launched) == launched

    backward_launch._replays.clear()
    inputs, out, lse, dout = call(FULL, 2)
    same = AttentionInputs(inputs.query, inputs.key, inputs.key, 0.125, FULL)
    backward_launch.backward(same, out, lse, dout, mode="unordered")
    assert not backward_launch._replays
    monkeypatch.setattr(backward_launch.tiles, "device_info", lambda device: SimpleNamespace(n_cores=132))
    backward_launch.backward(*call(FULL, 3, nheads_k=1), mode="unordered")  # few heads: a group is dealt to programs
    assert not backward_launch._replays
    backward_launch.backward(*call(FULL, 4), mode="unordered", section=1)
    assert not backward_launch._replays
