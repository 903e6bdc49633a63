"""The Hopper forward kernel on its GPU: every feature against float64, and its behaviour among streams and graphs.

A wrong barrier makes such a kernel wait for ever. So a first call runs in a process of its own, and every call here is
watched: one that does not end ends the test run instead of holding the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.interval_cache import share
from hf_flash_plus.kernels.hopper import config, forward_launch
from hf_flash_plus.masks import AttentionMask
from tests.gpu.compiling import Compilation, kind_of_mask, unless_parallel
from tests.gpu.memory import needs_memory
from tests.kernels.cases import REFERENCE, Built, Case, assert_within, build, eager, poisoned_allocations

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(seqlen_q=385, seqlen_k=513, nheads=4, nheads_k=2, head_dim=128, v_head_dim=128, dtype=BF16)
MASKS = [
    (), ("causal",), ("window",), ("left_window",), ("right_window",), ("packed",), ("documents",), ("left_padding",),
    ("intervals",), ("one_interval",), ("nothing",), ("causal", "packed"), ("left_window", "packed"),
]  # fmt: skip


def _sized(case: Case, head_dim: int, v_head_dim: int | None = None) -> Case:
    return replace(case, head_dim=head_dim, v_head_dim=v_head_dim or head_dim)


CASES = [_sized(replace(BASE, features=features), dim) for dim in (128, 64) for features in MASKS]
CASES += [  # softcap and sinks, alone and together, with each way to find a row's keys
    _sized(replace(BASE, features=(*mask, *terms)), dim)
    for mask, terms, dim in (
        ((), ("softcap",), 128),
        (("causal",), ("softcap",), 64),
        ((), ("sinks",), 64),
        (("causal",), ("sinks",), 128),
        (("nothing",), ("sinks",), 128),
        (("left_window",), ("sinks",), 64),
        (("intervals",), ("softcap", "sinks"), 64),
        (("packed",), ("softcap", "sinks"), 128),
    )
]
CASES += [
    _sized(replace(BASE, features=features, dtype=FP16), dim)
    for dim in (64, 128)
    for features in (("causal",), ("packed",))
]
CASES += [
    replace(BASE, features=features, head_dim=dim, v_head_dim=v_dim)
    for dim, v_dim in ((256, 256), (192, 128))
    for features in ((), ("causal",), ("left_window",), ("intervals",), ("packed", "softcap", "sinks"))
]
CASES += [  # narrower heads, padded with zeros as they are loaded
    replace(BASE, features=("causal",), head_dim=dim, v_head_dim=v_dim)
    for dim, v_dim in ((32, 32), (40, 40), (80, 80), (96, 96), (72, 128), (128, 64), (160, 96), (192, 192), (136, 256))
]
CASES += [  # lengths
    Case(features, batch, seqlen_q, seqlen_k, nheads, nheads_k, dim, dim, BF16)
    for seqlen_q, seqlen_k, batch, nheads, nheads_k in (
        (17, 1, 2, 4, 4),
        (17, 17, 3, 4, 1),
        (64, 64, 1, 1, 1),
        (128, 128, 2, 2, 2),
        (129, 65, 2, 4, 2),
        (192, 448, 2, 4, 2),  # causal: the diagonal begins at a multiple of 128 or of 64
        (200, 328, 2, 4, 2),
        (300, 1000, 1, 8, 1),
        (1000, 300, 2, 4, 4),
        (1024, 1024, 2, 20, 5),
        (1025, 1025, 3, 20, 20),
        (3000, 3000, 1, 4, 2),
        (4095, 4095, 1, 3, 1),
    )
    for features, dim in (((), 128), (("causal",), 128), (("causal",), 64))
]
CASES += [
    Case(features, 2, seqlen, seqlen, 5, 5, dim, v_dim, BF16)
    for features in ((), ("causal",), ("packed",))
    for seqlen in (2048, 2060)
    for dim, v_dim in ((64, 64), (128, 128), (192, 128), (256, 256))
]
CASES += [  # several tiles to a program, of one block and of more, some of which see nothing
    Case(features, 6, 700, 700, 16, 4, dim, dim, BF16)
    for features in ((), ("causal",), ("left_window",), ("packed",), ("left_padding",), ("intervals",), ("nothing",))
    for dim in (64, 128)
]
CASES += [  # D64: so many rows that two warpgroups are chosen
    Case(features, 2, seqlen_q, seqlen_k, 6, 2, 64, 64, dtype)
    for features, seqlen_q, seqlen_k, dtype in (
        (("causal",), 1375, 1375, BF16),
        (("causal",), 1280, 1280, FP16),
        (("causal",), 256, 2048, BF16),
        (("causal", "softcap"), 1375, 1375, BF16),
        (("causal", "sinks"), 250, 1146, BF16),
        ((), 256, 2048, BF16),
        ((), 250, 1111, FP16),
        (("softcap",), 256, 1024, BF16),
        (("sinks",), 200, 1030, BF16),
    )
]
PARTS_CASES = [  # what does not fill a wave of programs is cut along the keys
    Case(features, batch, seqlen_q, seqlen_k, nheads, nheads_k, dim, dim, dtype)
    for features, batch, seqlen_q, seqlen_k, nheads, nheads_k, dim, dtype in (
        ((), 1, 1536, 5120, 12, 4, 128, BF16),
        ((), 2, 1100, 4608, 8, 8, 128, FP16),
        ((), 1, 2000, 4096, 17, 1, 96, BF16),
        (("softcap",), 1, 1536, 5120, 12, 12, 128, BF16),
    )
]
CASES += PARTS_CASES
CASES = list(dict.fromkeys(CASES))

#: By how much the logits of a key's block are raised (nats), by the place at which the kernel comes to the block: first
#: to the last one. What was summed is scaled only where a row's maximum has grown by 5.5 and more (2^8).
GROWTH: dict[str, Callable[[Tensor], Tensor]] = {
    "jumps": lambda place: 12.0 * place,
    "creeps": lambda place: 1.0 * place,
    "stays": lambda place: 0.3 * place,
    "falls": lambda place: -12.0 * place,
    "swings": lambda place: 12.0 * (place % 3),
    "large": lambda place: 1e4 + 16.0 * place,
}
GROWTH_CASES = [
    Case(features, 2, seqlen, seqlen, 4, 2, dim, v_dim, dtype)
    for features, seqlen, dim, v_dim, dtype in (
        *((features, 1280, dim, dim, BF16) for dim in (64, 128) for features in ((), ("causal",), ("packed",))),
        *((("causal",), 640, dim, dim, BF16) for dim in (64, 128)),
        *((("left_window",), 1280, dim, dim, BF16) for dim in (64, 128)),
        *((features, 1280, 128, 128, FP16) for features in ((), ("causal",), ("left_padding",))),
        (("causal",), 1280, 64, 64, FP16),
        ((), 1280, 256, 256, BF16),
        (("packed",), 1300, 256, 256, BF16),
        (("causal",), 1280, 192, 128, BF16),
        (("sinks",), 1280, 64, 64, BF16),
        (("causal", "sinks"), 1280, 128, 128, BF16),
        (("left_window", "sinks"), 1280, 64, 64, BF16),
        (("packed", "sinks"), 1280, 128, 128, BF16),
    )
]

T = TypeVar("T")


def watched(run: Callable[[], T], seconds: float = 20.0) -> T:
    """The result of ``run`` once the device is done with it; a device that does not finish ends this process."""
    result = run()
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            test = os.environ.get("PYTEST_CURRENT_TEST", "the Hopper kernel")
            print(f"\n{test}: the kernel does not end; giving up", file=sys.__stderr__, flush=True)
            os._exit(3)
        time.sleep(0.0002)
    return result


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    reason = forward_launch.forward_reason(inputs)
    assert reason is None, reason
    return watched(lambda: forward_launch.forward(inputs))


def check(case: Case) -> None:
    """``out`` and ``lse`` of a case against the float64 oracle, within twice the error of eager attention."""
    built = build(case, "cuda")
    with poisoned_allocations():
        out, lse = forward(built.inputs)
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == case.dtype
    exact, exact_lse = _oracle(built)
    half, _ = eager(replace(built, dout=torch.zeros_like(exact, dtype=case.dtype)))
    error = (half.double() - exact).abs().max().item()
    assert_within("out", out, exact, 2 * error + 1e-4 * (1 + exact.abs().max().item()))
    empty = exact_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty), "lse is -inf on other rows than expected"
    assert not out.transpose(1, 2)[empty].any(), "rows that see nothing are not 0"
    exact_lse = exact_lse.masked_fill(empty, 0.0)
    assert_within("lse", lse.masked_fill(empty, 0.0), exact_lse, 1e-5 + 1e-4 * (1 + exact_lse.abs().max().item()))


def _oracle(built: Built) -> tuple[Tensor, Tensor]:
    clean = built.clean
    sinks = None if clean.sinks is None else clean.sinks.double()
    wide = {name: getattr(clean, name).double() for name in ("query", "key", "value")}
    output = REFERENCE.forward(replace(clean, sinks=sinks, **wide))
    return output.out, output.softmax_lse


def compile_case(case: Case) -> str:
    """Compile a case's kernels into Triton's cache; runs in a worker process and launches nothing."""
    built = build(case, "cuda")
    q = built.inputs.query
    out = torch.empty(*q.shape[:3], case.v_head_dim, dtype=q.dtype, device="cuda")
    lse = torch.empty(case.batch, case.nheads, case.seqlen_q, device="cuda")
    summary, launch = forward_launch.prepare(built.inputs, out, lse)
    if summary is not None:
        summary.warm_up()
    launch.warm_up()
    return str(case)


_SMOKE = """
import torch
from tests.gpu.test_hopper import BASE, check
from dataclasses import replace
for features in ((), ("causal",), ("packed",)):
    check(replace(BASE, features=features))
"""


def compilations() -> list[Compilation]:
    """By what kernels differ in: lengths beside a tile's edge compile other ones."""
    work = []
    for case in CASES + GROWTH_CASES:
        tail = case.seqlen_k % 128 == 0, (case.seqlen_k - case.seqlen_q) % 128 == 0, case.seqlen_k <= 1024
        tail += tuple(
            config.is_short((64, 64), mode, case.seqlen_q, case.seqlen_k) for mode in (config.FULL, config.CAUSAL)
        )
        terms = "softcap" in case.features, "sinks" in case.features
        key = (kind_of_mask(case.features), terms, case.head_dim, case.v_head_dim, case.dtype, tail)
        work.append(Compilation(key, compile_case, (case,)))
    return work


def _first_calls() -> str:
    """The first calls, in a process of their own; what went wrong, or nothing."""
    try:
        done = subprocess.run([sys.executable, "-c", _SMOKE], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "they do not end"
    return f"{done.stdout}{done.stderr}"[-4000:] if done.returncode else ""


@pytest.fixture(scope="module", autouse=True)
def compiled(once: Callable[[str, Callable[[], str]], str]) -> None:
    reason = forward_launch.available_reason()
    if reason is not None:
        pytest.skip(reason)
    unless_parallel(compilations())
    wrong = once("first calls of the Hopper forward", _first_calls)
    if wrong:
        pytest.fail(f"the first calls of the Hopper kernel failed: {wrong}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    check(case)


def _growing(case: Case, growth: str, rows: str) -> AttentionInputs:
    """The call of a case, in which the first number of each key raises its logits in the rows whose first number is
    not 0; with "large" in some of these the other way."""
    clean = build(case, "cuda").clean
    query, key = clean.query.clone(), clean.key.clone()
    chosen = torch.ones(case.batch, case.seqlen_q, case.nheads, device="cuda")
    if rows == "few":  # most warps have one or none of them
        chosen = (torch.rand_like(chosen) < 0.04).to(chosen.dtype)
    if growth == "large":
        chosen = chosen.where(torch.rand_like(chosen) < 0.7, -chosen)
    query[..., 0] = chosen / clean.softmax_scale
    place = (case.seqlen_k - 1 - torch.arange(case.seqlen_k, device="cuda")) // 128
    key[..., 0] = GROWTH[growth](place.float())[None, :, None]
    sinks = None
    if clean.sinks is not None:
        sinks = torch.tensor([-float("inf"), -30.0, 5.0, 40.0], device="cuda")
    return replace(clean, query=query, key=key, sinks=sinks)


@pytest.mark.parametrize("rows", ["all", "few"])
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("case", GROWTH_CASES, ids=str)
def test_growing_maxima(case: Case, growth: str, rows: str) -> None:
    """However rows' maxima grow from block to block, beyond what leaves the sums unscaled and below it."""
    inputs = _growing(case, growth, rows)
    wide = {name: getattr(inputs, name).double() for name in ("query", "key", "value")}
    if inputs.sinks is not None:
        wide["sinks"] = inputs.sinks.double()
    exact = REFERENCE.forward(replace(inputs, **wide))
    with poisoned_allocations():
        out, lse = forward(inputs)
    again, again_lse = forward(inputs)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    empty = exact.softmax_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    exact_lse = exact.softmax_lse.masked_fill(empty, 0.0)
    # Logits in float32, of which the tensor cores drop the last bits; then weights and outputs in the dtype.
    logits = 2e-5 * exact_lse.abs().max().item()
    budget = torch.finfo(case.dtype).eps * (1 + exact.out.abs().max().item())
    assert_within("out", out, exact.out, budget + logits)
    assert_within("lse", lse.masked_fill(empty, 0.0), exact_lse, 1e-4 + logits)


def _inputs(
    batch: int, seqlen: int, nheads: int, nheads_k: int, dim: int, mask: AttentionMask, seed: int = 0
) -> AttentionInputs:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, seqlen, n, dim, device="cuda", dtype=BF16) for n in (nheads, nheads_k, nheads_k))
    return AttentionInputs(q, k, v, dim**-0.5, mask)


def _documents(batch: int, seqlen: int) -> AttentionMask:
    rows = torch.arange(seqlen, dtype=torch.int32, device="cuda")
    return AttentionMask(row_intervals=torch.stack((rows // 300 * 300, rows + 1), dim=-1).expand(batch, -1, -1))


def _padded(lengths: list[int], seqlen: int, left: bool = False) -> Tensor:
    """Row intervals of a causal padded batch; rows of padding see nothing."""
    rows = torch.arange(seqlen, dtype=torch.int32, device="cuda")[None]
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")[:, None]
    start = (seqlen - length) if left else torch.zeros_like(length)
    real = (rows >= start) & (rows < start + length)
    return torch.stack((torch.where(real, start, 0), torch.where(real, rows + 1, 0)), dim=-1)


def _unaligned(lengths: list[int], seqlen: int) -> Tensor:
    """Row intervals of packed documents; rows behind them see nothing."""
    rows = torch.arange(seqlen, dtype=torch.int32, device="cuda")
    ends = torch.tensor(lengths, device="cuda").cumsum(0)
    which = torch.searchsorted(ends, rows, right=True)
    first = torch.nn.functional.pad(ends, (1, 0))[which].to(torch.int32)
    return torch.stack((first, torch.where(rows < ends[-1], rows + 1, 0)), dim=-1)[None]


def _holed(batch: int, seqlen: int, empty: int) -> Tensor:
    """Causal row intervals; of every three blocks of 128 rows, one sees nothing: the first, the second or the third."""
    rows = torch.arange(seqlen, dtype=torch.int32, device="cuda")
    ends = torch.where(rows // 128 % 3 == empty, 0, rows + 1)
    return torch.stack((torch.zeros_like(rows), ends), dim=-1).expand(batch, -1, -1).contiguous()


def _apart(seqlen: int, first: int, width: int) -> Tensor:
    """Causal documents. Padding is what is before ``first``, ``width`` rows and keys behind the first tile of rows
    (where the tile's last block of keys reaches), and 20 from 290 on."""
    rows = torch.arange(seqlen, dtype=torch.int32, device="cuda")
    starts = torch.where(rows < 128, first, torch.where(rows < 290, 128 + width, 310))
    seen = (rows >= starts) & ~((rows >= 290) & (rows < 310))
    return torch.stack((torch.where(seen, starts, 0), torch.where(seen, rows + 1, 0)), dim=-1)[None].to(torch.int32)


#: Masks that leave tiles which see nothing, and another one of the same shape: (batch, heads, key heads, masks).
LISTS: dict[str, tuple[int, int, int, Callable[[], tuple[Tensor, Tensor]]]] = {
    "padded": (6, 4, 2, lambda: (_padded([700, 130, 0, 64, 699, 1], 700), _padded([0, 0, 700, 5, 256, 512], 700))),
    "left padded": (
        4, 4, 2, lambda: (_padded([700, 130, 0, 699], 700, left=True), _padded([1, 0, 256, 129], 700, left=True)),
    ),
    "documents": (1, 4, 1, lambda: (_unaligned([300, 77, 1, 450, 128], 956), _unaligned([100, 500], 956))),
    "shared by all": (5, 6, 6, lambda: (_unaligned([300, 40], 640), _padded([513], 640, left=True))),
    "nothing": (4, 4, 2, lambda: (_padded([0] * 4, 300), _padded([0, 0, 0, 300], 300))),
    "fewer tiles than programs": (3, 2, 1, lambda: (_padded([0, 120, 7], 1024), _padded([1024, 0, 0], 1024))),
    "many short ones": (
        64, 16, 4, lambda: (_padded([i * 37 % 101 for i in range(64)], 100), _padded([0, 50] * 32, 100)),
    ),
    "holes": (2, 4, 2, lambda: (_holed(2, 900, 1), torch.cat((_holed(1, 900, 0), _holed(1, 900, 2))))),
    "padding between documents": (1, 4, 2, lambda: (_apart(700, 5, 12), _apart(700, 60, 100))),
    # More key heads than are in flight together at head dimensions 128 and 256.
    "sections of heads": (2, 40, 20, lambda: (_padded([1800, 700], 1800), _padded([0, 1500], 1800, left=True))),
    "most of it empty": (
        48, 2, 1, lambda: (_padded([9 * i * (i % 7 == 0) for i in range(48)], 500), _padded([0] * 47 + [500], 500)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", LISTS)
def test_tiles_that_see_nothing(name: str, sinks: bool, dim: int) -> None:
    """Rows of zeros, whoever writes them; from call to call with another mask in the same memory, and with one whose
    summary is kept with it. (At head dimension 64 only the other tiles are claimed.)"""
    batch, nheads, nheads_k, masks = LISTS[name]
    memory, other = masks()
    seqlen = memory.shape[1]
    plain = _inputs(batch, seqlen, nheads, nheads_k, dim, AttentionMask())
    if sinks:
        values = torch.tensor([0.5, -1.0, 3.0, -float("inf")], device="cuda").repeat(10)[:nheads].contiguous()
        plain = replace(plain, sinks=values)
    expected, poisoned = [], []
    for intervals in (memory.clone(), other):
        key = torch.arange(seqlen, device="cuda")
        hidden = ~((key >= intervals[..., :1]) & (key < intervals[..., 1:])).any(1).expand(batch, -1)[..., None, None]
        clean = replace(
            plain, key=plain.key.masked_fill(hidden, 0.0), value=plain.value.masked_fill(hidden, 0.0),
            mask=AttentionMask(row_intervals=intervals),
        )  # fmt: skip
        wide = {field: getattr(clean, field).double() for field in ("query", "key", "value")}
        wide["sinks"] = values.double() if sinks else None
        expected.append(REFERENCE.forward(replace(clean, **wide)))
        nan = {
            "key": plain.key.masked_fill(hidden, float("nan")),
            "value": plain.value.masked_fill(hidden, float("nan")),
        }
        poisoned.append(replace(plain, **nan, mask=AttentionMask(row_intervals=memory)))

    def same(which: int, intervals: Tensor) -> None:
        call = replace(poisoned[which], mask=AttentionMask(row_intervals=intervals))
        with poisoned_allocations():
            found = watched(lambda: forward_launch.recall(call))
            out, lse = forward(call) if found is None else found
        exact, exact_lse = expected[which].out, expected[which].softmax_lse
        empty = exact_lse == float("-inf")
        assert torch.equal(lse == float("-inf"), empty) and not out.transpose(1, 2)[empty].any()
        assert_within("out", out, exact, 8e-3 * (1 + exact.abs().max().item()))
        assert_within("lse", lse.masked_fill(empty, 0.0), exact_lse.masked_fill(empty, 0.0), 2e-4)

    forward_launch._known.clear()
    first = memory.clone()
    for _ in range(2):
        same(0, memory)
        memory.copy_(other)
        same(1, memory)
        memory.copy_(first)
    for _ in range(2):  # directly, then the ordinary way
        kept = share(first.clone())
        for _ in range(2):
            same(0, kept)
        kept.copy_(other)  # which is noticed
        same(1, kept)
        forward_launch._known.clear()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "documents"])
def test_bitwise_repeatable(dim: int, mask: str) -> None:
    masks = {"full": AttentionMask(), "causal": AttentionMask(causal=True), "documents": _documents(3, 1500)}
    inputs = _inputs(3, 1500, 16, 4, dim, masks[mask])
    out, lse = forward(inputs)
    for _ in range(50):
        again, again_lse = forward(inputs)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.parametrize("case", PARTS_CASES, ids=str)
def test_parts(case: Case) -> None:
    """Tiles cut along the keys: the same bits from call to call, on two streams at once and from a CUDA graph; flags by
    which programs wait for one another are left at zero."""
    inputs = build(case, "cuda").inputs
    out, lse = forward(inputs)
    _, launch = forward_launch.prepare(inputs, torch.empty_like(out), torch.empty_like(lse))
    assert launch.plan.config.parts
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_lse = forward_launch.forward(inputs)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(forward_launch.forward(inputs))
        captured.fill_(float("nan"))
        graph.replay()
        watched(lambda: None)
        assert torch.equal(captured, out) and torch.equal(captured_lse, lse)
    watched(torch.cuda.synchronize)
    assert all(torch.equal(out, again) and torch.equal(lse, again_lse) for again, again_lse in found)
    assert not any(counter.any() for counter in forward_launch._counters.values())


@pytest.mark.parametrize("layout", ["projection", "heads_first", "sliced", "one_row_batch"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_views(layout: str, dim: int) -> None:
    """Views are read where they lie, with the result of copies."""
    torch.manual_seed(0)
    batch, seqlen, nheads = 2, 333, 4
    if layout == "projection":
        qkv = torch.randn(batch, seqlen, 3, nheads, dim, device="cuda", dtype=BF16)
        q, k, v = qkv.unbind(2)
    elif layout == "heads_first":
        q, k, v = (torch.randn(batch, nheads, seqlen, dim, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(3))
    elif layout == "sliced":
        q, k, v = (torch.randn(batch, seqlen + 9, nheads + 2, dim + 24, device="cuda", dtype=BF16) for _ in range(3))
        q, k, v = (t[:, 5 : seqlen + 5, 1:-1, 8 : dim + 8] for t in (q, k, v))
    else:
        flat = torch.randn(3, seqlen, nheads * dim, device="cuda", dtype=BF16)
        q, k, v = (t.as_strided((1, seqlen, nheads, dim), (7, nheads * dim, dim, 1)) for t in flat)
    inputs = AttentionInputs(q, k, v, dim**-0.5, AttentionMask(causal=True))
    copies = replace(inputs, query=q.contiguous(), key=k.contiguous(), value=v.contiguous())
    for a, b in zip(forward(inputs), forward(copies)):
        assert torch.equal(a, b)


def test_what_is_declined() -> None:
    inputs = _inputs(2, 64, 4, 2, 64, AttentionMask())
    assert forward_launch.forward_reason(inputs) is None
    wide = torch.randn(2, 64, 4, 66, device="cuda", dtype=BF16)
    declined = {
        "dropout": replace(inputs, dropout_p=0.1),
        "bias": replace(inputs, mask=AttentionMask(bias=torch.zeros(1, 1, 64, 64, device="cuda"))),
        "key_mask": replace(inputs, mask=AttentionMask(key_mask=torch.ones(2, 64, dtype=torch.bool, device="cuda"))),
        "ALiBi": replace(inputs, alibi_slopes=torch.ones(4, device="cuda")),
        "float32": replace(inputs, query=inputs.query.float(), key=inputs.key.float(), value=inputs.value.float()),
        "seqlen_q 16": replace(inputs, query=inputs.query[:, :16]),
        "q: not aligned": replace(inputs, query=wide[..., 1:65]),
        "q: stride": replace(inputs, query=wide[..., :64]),
        "k: stride 0": replace(inputs, key=inputs.key[:, :, :1].expand(-1, -1, 2, -1)),
    }
    for words, call in declined.items():
        reason = forward_launch.forward_reason(call)
        assert reason is not None and words in reason, (words, reason)


@pytest.mark.parametrize("name", ["causal", "documents", "sinks"])
def test_calls_seen_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call like an earlier one is launched directly, on whatever memory it comes with, with the same result."""
    mask = _documents(2, 300) if name == "documents" else AttentionMask(causal=True)
    first, second = (_inputs(2, 300, 4, 2, 128, mask, seed=seed) for seed in (0, 1))
    if name == "sinks":
        first, second = (replace(call, sinks=torch.randn(4, device="cuda"), softcap=20.0) for call in (first, second))
    forward_launch._known.clear()
    assert forward_launch.recall(first) is None
    expected = [forward(call) for call in (first, second)]
    assert len(forward_launch._known) == 1
    for _ in range(3):
        for call, wanted in zip((first, second), expected):
            found = watched(lambda call=call: forward_launch.recall(call))
            assert found is not None and all(torch.equal(a, b) for a, b in zip(found, wanted))
    longer = _inputs(2, 301, 4, 2, 128, AttentionMask(causal=True))
    assert forward_launch.recall(longer) is None
    monkeypatch.setattr(forward_launch, "_counters", {})  # as on a stream that has none yet
    assert forward_launch.recall(first) is None


def test_streams_side_by_side() -> None:
    """Launches on two streams at once do not take each other's tiles."""
    calls = [
        _inputs(1, 700, 6, 6, 128, AttentionMask(causal=True)),
        _inputs(2, 900, 4, 2, 64, AttentionMask(causal=True), seed=1),
        _inputs(1, 800, 4, 4, 128, _documents(1, 800), seed=2),
    ]
    alone = [forward(inputs) for inputs in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in calls]

    def run() -> None:
        for _ in range(30):
            for stream, inputs, found in zip(streams, calls, results):
                with torch.cuda.stream(stream):
                    found.append(forward_launch.forward(inputs))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    torch.cuda.synchronize()
    watched(run)
    for expected, found in zip(alone, results):
        for out, lse in found:
            assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_cuda_graph(mask: str) -> None:
    """Captured, replayed with other data, and beside launches outside the graph."""
    chosen = AttentionMask(causal=True) if mask == "causal" else _documents(2, 600)
    inputs = _inputs(2, 600, 4, 2, 128, chosen)
    other = _inputs(2, 600, 4, 2, 128, chosen, seed=1)
    forward(inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_launch.forward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = forward_launch.forward(inputs)
        second = forward_launch.forward(inputs)
    inputs.query.copy_(other.query)
    inputs.key.copy_(other.key)
    inputs.value.copy_(other.value)
    torch.cuda.synchronize()

    def run() -> None:
        for _ in range(5):
            with torch.cuda.stream(stream):
                forward_launch.forward(other)
            graph.replay()
            forward_launch.forward(other)
        torch.cuda.current_stream().wait_stream(stream)

    watched(run)
    out, lse = forward(other)
    for found in (first, second):
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)


@pytest.mark.exclusive
def test_offsets_beyond_32_bits() -> None:
    """The last batch element lies behind 2^31 elements."""
    needs_memory(12)
    q = torch.empty(23, 8192, 48, 256, device="cuda", dtype=BF16)  # 2.3e9 elements, 4.6 GB
    q[-1].normal_()
    whole = AttentionInputs(q, q, q, 0.1, AttentionMask(window=(64, 0)))
    last = replace(whole, query=q[-1:], key=q[-1:], value=q[-1:])
    assert torch.equal(forward(whole)[0][-1:], forward(last)[0])
