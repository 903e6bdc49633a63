"""The Hopper forward kernel compiles without a GPU, fits shared memory, keeps its registers, and its matrix products
stay asynchronous. A representative set runs by default; ``HF_FLASH_PLUS_AOT=full`` compiles every variant."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import driver

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.interval_cache import share
from hf_flash_plus.kernels import machine_code
from hf_flash_plus.kernels.hopper import config, forward_launch
from hf_flash_plus.masks import AttentionMask

from .compiling import _BIN, TARGETS, barriers, call, compiling_for

if forward_launch.gluon_reason() is not None:
    pytest.skip(forward_launch.gluon_reason(), allow_module_level=True)

#: Bytes of registers that a thread may spill, all outside the inner loops. Three warpgroups (head dimension 64) leave
#: each thread 160 registers, of which causal and full calls spill some between two tiles, more with softcap and sinks.
SPILLS = {64: 256, 128: 128, 192: 128, 256: 128}
SPILLS_OF_TERMS = 512
#: The same where the last block of keys is masked: paid once a tile.
TAIL_SPILLS = 512


class Variant(NamedTuple):
    dims: tuple[int, int]
    mask: str
    dtype: torch.dtype = torch.bfloat16
    terms: bool = False  # softcap and sinks

    def __str__(self) -> str:
        return f"d{self.dims[0]}v{self.dims[1]}-{self.mask}-{str(self.dtype)[6:]}" + "-terms" * self.terms


FULL = [
    Variant(dims, mask, dtype, terms)
    for dims, mask, dtype, terms in itertools.product(
        ((64, 64), (128, 128), (192, 128), (256, 256)),
        ("full", "whole", "tail", "few whole", "few tail", "causal", "short", "window", "any window", "intervals"),
        (torch.bfloat16, torch.float16),
        (False, True),
    )
]
REPRESENTATIVE = [
    Variant((64, 64), "full"),
    Variant((64, 64), "few tail"),
    Variant((128, 128), "causal"),
    Variant((128, 128), "full"),
    Variant((128, 128), "intervals", torch.float16),
    Variant((64, 64), "window"),
    Variant((64, 64), "any window", terms=True),
    Variant((128, 128), "window"),
    Variant((192, 128), "causal"),
    Variant((256, 256), "intervals"),
    Variant((64, 64), "intervals", terms=True),
]


def inputs_of(variant: Variant) -> AttentionInputs:
    # ("full": so many keys that tiles are cut into parts at D128, see forward_launch.PARTS_FROM.)
    # ("few ...": so few rows that tiles of 192 waste too many at D64.)
    seqlen = {"tail": 3000, "short": 512, "full": 8192, "few whole": 256, "few tail": 200}.get(variant.mask, 4096)
    masks = {
        "causal": AttentionMask(causal=True),
        "short": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=(1023, -1)),
        "any window": AttentionMask(causal=True, window=(999, -1)),
        "intervals": AttentionMask(row_intervals=torch.empty(2, seqlen, 2, dtype=torch.int32, device="meta")),
    }
    terms = {"softcap": 30.0, "sinks": torch.empty(32, device="meta")} if variant.terms else {}
    mask = masks.get(variant.mask, AttentionMask())
    return call(variant.dtype, *variant.dims, seqlen=seqlen, mask=mask, **terms)


def launches(inputs: AttentionInputs) -> tuple[forward_launch.SummaryLaunch | None, forward_launch.Launch]:
    q = inputs.query
    out = torch.empty(*q.shape[:3], inputs.v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    return forward_launch.prepare(inputs, out, lse)


def assemble(kernel: Any) -> str:
    """What ptxas has to say about a kernel: spills, and warnings about its matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(kernel.asm["ptx"])
        command = [_BIN + "ptxas", "-v", "--gpu-name=sm_90a", path, "-o", os.path.join(folder, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def warnings(text: str) -> Counter[str]:
    """The codes of ptxas's warnings, or the words that stand for them where it prints no code."""
    return Counter(re.findall(r"C75\d\d|serialized|insufficient register", text))


def asks_both_rows(ptx: str, v_dim: int) -> None:
    """``primitives.rescale`` asks two numbers of each thread whether there is anything to scale: the factors of the
    thread's two rows, by which it multiplies pairs of numbers in turn. Never more than 32 numbers at once."""
    found = re.findall(r"setp\.neu\.f32 some, (%\w+),.*?setp\.neu\.or\.f32 some, (%\w+),(.*?)SAME:", ptx, re.DOTALL)
    assert found and len(found) % (v_dim // 64) == 0
    for first, second, body in found:
        factors = re.findall(r"mul\.rn\.f32 %\w+, %\w+, (%\w+);", body)
        assert factors == [first, first, second, second] * 8 and first != second


@pytest.mark.parametrize("variant", FULL if os.environ.get("HF_FLASH_PLUS_AOT") == "full" else REPRESENTATIVE, ids=str)
def test_compiles(variant: Variant) -> None:
    with compiling_for("sm90"):
        inputs = inputs_of(variant)
        assert forward_launch.forward_reason(inputs) is None
        summary, launch = launches(inputs)
        assert (summary is not None) == (variant.mask == "intervals")
        if summary is not None:
            summary.warm_up()
        kernel = launch.warm_up()
    assert kernel.metadata.shared <= TARGETS["sm90"].shared_memory
    barriers(kernel.asm["ptx"])
    assert not machine_code.unwritten(kernel.asm["cubin"])
    asks_both_rows(kernel.asm["ptx"], variant.dims[1])
    text = assemble(kernel)
    assert not warnings(text), text
    spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))
    bound = TAIL_SPILLS if variant.mask == "tail" else SPILLS[variant.dims[0]]
    if variant.terms and variant.dims[0] == 64:
        bound = SPILLS_OF_TERMS
    assert spilled <= bound, f"spills {spilled} bytes, allowed are {bound}"


def test_arguments_of_a_direct_launch() -> None:
    """What a compiled kernel is launched with, beside Triton's own look-up, is what Triton itself would pass; and none
    of it is compiled for but what the plan stands for."""
    from hf_flash_plus.kernels.hopper.forward import attention_forward

    with compiling_for("sm90"):
        _, launch = launches(inputs_of(REPRESENTATIVE[1]))
        launch.warm_up()
        *_, binder = attention_forward.device_caches[list(TARGETS).index("sm90")]
        passed = (*launch.arguments, *launch.plan.constexprs)
        bound, *_ = binder(*launch.arguments, **{"debug": False, "instrumentation_mode": "", **launch.plan.options})
        assert [id(value) for value in bound.values()] == [id(value) for value in passed]
        for parameter, value in zip(attention_forward.params, launch.arguments):
            if isinstance(value, int | torch.Tensor):
                assert parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize("name", ["causal", "intervals", "listed intervals", "terms"])
def test_direct_launches(name: str) -> None:
    """A direct launch hands the launcher what an ordinary one does, descriptors and pointers included."""
    from triton.backends.nvidia.driver import wrap_handle_tensordesc

    from hf_flash_plus.kernels.hopper.direct import direct

    handed: list[tuple[Any, ...]] = []

    def runnable(kernel: Any) -> Any:
        """Stands in for a loaded kernel: notes what its launcher, a function from C, would be called with."""
        meta = getattr(kernel.metadata, "tensordesc_meta", None)
        signature = {i: kind for i, kind in enumerate(kernel.src.signature.values())}
        launch = wrap_handle_tensordesc(lambda *args: handed.append(args), signature, meta)
        sizes = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
        run = SimpleNamespace(launch=launch, launch_cooperative_grid=False, launch_pdl=False, **sizes)
        return SimpleNamespace(run=run, metadata=kernel.metadata, function=11, packed_metadata=(4, 1, 0))

    dim = {"listed intervals": 64, "intervals": 256}.get(name, 128)
    q, k, v = torch.zeros(3, 2, 1153, 4, dim, dtype=torch.bfloat16).unbind(0)
    k, v = k[:, :, :2], v[:, :, :2]
    intervals = torch.zeros(2, 1153, 2, dtype=torch.int32)
    mask = AttentionMask(row_intervals=intervals) if "intervals" in name else AttentionMask(causal=True)
    terms = {"softcap": 30.0, "sinks": torch.zeros(4)} if name == "terms" else {}
    inputs = AttentionInputs(q, k, v, 0.1, mask, **terms)
    with compiling_for("sm90"):
        driver.active.utils = SimpleNamespace(fill_tma_descriptor=lambda *args: ("encoded", *args))
        out, (summary, launch) = torch.empty_like(q), launches(inputs)
        kernel = runnable(launch.warm_up())
        summarizing = [] if summary is None else [runnable(each) for each in summary.warm_up() if each is not None]
        assert len(summarizing) == ("intervals" in name) + ("listed" in name)
        main, before = direct(kernel), [direct(compiled) for compiled in summarizing]
        assert main is not None and None not in before
        before += [None] * (2 - len(before))
        known = forward_launch._Known(
            out, None if summary is None else forward_launch._KnownSummary(summary, *before), launch, main
        )
        for fresh in (q.clone(), k.clone()[:, :, :2]):  # other addresses, and the same ones again
            other = replace(inputs, query=fresh) if fresh.shape == q.shape else inputs
            handed.clear()
            out, lse = known.launch(other, 5, 99)
            assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (2, 4, 1153))
            direct_calls, ordinary = list(handed), []
            summary, launch = forward_launch.prepare(other, out, lse)
            expected: list[tuple[Any, ...]] = []
            if summary is not None:
                expected = [
                    (summarizing[0], summary.grid, summary.arguments, summary.options),
                    (summarizing[-1], summary.list_grid, summary.list_arguments, summary.list_options),
                ][: len(summarizing)]
            expected += [(kernel, (launch.n_programs, 1, 1), launch.arguments, launch.plan.constexprs)]
            for loaded, grid, arguments, constexprs in expected:
                handed.clear()
                base = (*grid, 5, 11, False, False, None, None, (4, 1, 0), None, None, None)
                loaded.run.launch(*base, *arguments, *constexprs)
                ordinary.append(handed[0])
            memory = set() if summary is None else _places(summary)
            memory |= {launch.arguments[6].data_ptr()}  # of the counters
            assert len(direct_calls) == len(ordinary) == len(expected)
            for ours, theirs, (*_, constexprs) in zip(direct_calls, ordinary, expected):
                assert len(ours) == len(theirs)
                for a, b in zip(ours[: -len(constexprs)], theirs[: -len(constexprs)]):
                    address = b.data_ptr() if isinstance(b, torch.Tensor) else b
                    assert a == address or address in memory, (a, b)
        if summary is not None:  # what is known of the intervals is not launched again, in either way
            share(intervals)
            handed.clear()
            known.launch(inputs, 5, 99)
            known.launch(inputs, 5, 99)
            assert [len(arguments) for arguments in handed] == [len(ours) for ours in (*direct_calls, direct_calls[-1])]
            anew = forward_launch.prepare(inputs, out, lse)[0]
            assert anew.known and anew.run() is None
            places = [anew.bounds.data_ptr(), (anew.summary if anew.listed is None else anew.listed).data_ptr()]
            assert [given for given in handed[-1] if type(given) is int and given in places] == places


def _places(summary: forward_launch.SummaryLaunch) -> set[int]:
    tensors = (summary.bounds, summary.summary, summary.listed)
    return {tensor.data_ptr() for tensor in tensors if tensor is not None}


def test_configurations_are_sound() -> None:
    """What the kernel takes for granted of its configurations."""
    dims = ((64, 64), (128, 128), (192, 128), (256, 256))
    for dim, mode, short in itertools.product(dims, range(5), (False, True)):
        if short and not any(config.is_short(dim, mode, seqlen, seqlen) for seqlen in (256, 1024)):
            continue
        chosen = config.select(dim, mode, short, False, False)
        # The slowest warp may be this many tiles behind the one that writes cards.
        assert chosen.q_buffers + chosen.k_stages < config.RING
        # The ring of slots must not be lapped while V's warp waits at it.
        assert chosen.v_stages <= chosen.k_stages or chosen.free_k_first
        assert 10 + 2 * chosen.consumers <= config.CARD
        assert config.CARD + 3 <= config.LISTED
        # Who takes turns computes as many blocks as the other: not so with windows in halves.
        assert not (chosen.turns and (chosen.consumers != 2 or mode == config.WINDOW))
        if dim in config.HALVES:
            halved = config.select(dim, config.WINDOW, False, False, False, True)
            assert halved.halves and halved.consumers == config.HALVES[dim] and halved.block_n == 128
            assert halved.q_buffers > 1 and halved.chunks == 1 and not halved.early_free
            assert halved.consumers == 2 or not halved.free_k_first
            assert halved.v_stages <= halved.k_stages or halved.free_k_first
        assert chosen.listed == (mode == config.INTERVALS and dim[0] <= 128)
        assert not chosen.listed or (chosen.q_buffers > 1 and chosen.chunks == 1)
        assert chosen.listed or not chosen.copied
        assert not chosen.parts


def test_tiles_of_fewer_rows() -> None:
    """As measured at D64: three warpgroups take 4 to 12 percent longer at the first lengths, and less at others."""
    two = [seqlen for seqlen in range(1088, 8193, 32) if config.is_short((64, 64), config.CAUSAL, seqlen, seqlen)]
    assert {1280, 1376, 1664, 1792} <= set(two)
    assert not {1536, 2304, 2752, 3008, 3072, 4096, 8192} & set(two)
    with compiling_for("sm90"):
        for seqlen, consumers in ((1375, 2), (1536, 3), (3072, 3)):
            inputs = call(torch.bfloat16, 64, 64, seqlen=seqlen, mask=AttentionMask(causal=True))
            assert launches(inputs)[1].plan.config.consumers == consumers  # type: ignore[attr-defined]
    # A chunk of a prompt: 256 rows are two tiles either way. Many keys more do not change that.
    for mode, seqlen_k in itertools.product((config.FULL, config.TAIL, config.CAUSAL), (2048, 16384)):
        assert config.is_short((64, 64), mode, 256, seqlen_k) and not config.is_short((64, 64), mode, 384, seqlen_k)
    # With keys that all rows see the tiles' ends weigh less: 1280 rows are ten tiles, or seven.
    assert not config.is_short((64, 64), config.CAUSAL, 1280, 2304)
    assert not config.is_short((64, 64), config.FULL, 1280, 1280)
    # Elsewhere only causal calls have anything to choose, by their keys.
    for dims in ((128, 128), (192, 128), (256, 256)):
        assert not config.is_short(dims, config.FULL, 256, 256) and not config.is_short(dims, config.CAUSAL, 1375, 1375)
        assert config.is_short(dims, config.CAUSAL, 512, 512)
    for mode in (config.WINDOW, config.INTERVALS):
        assert not config.is_short((64, 64), mode, 256, 256)


def test_which_calls_have_parts() -> None:
    with compiling_for("sm90"):
        for variant in (Variant((128, 128), "full"), Variant((128, 128), "whole"), Variant((64, 64), "full")):
            _, launch = launches(inputs_of(variant))
            assert launch.plan.config.parts == (variant.dims == (128, 128) and variant.mask == "full"), variant
        _, launch = launches(inputs_of(Variant((128, 128), "full", terms=True)))
        assert not launch.plan.config.parts, "each part would count the sinks"


def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks cover what does not fill a wave once; of each tile one part has the first keys, and those that it adds
    come from chunks with smaller numbers, which are claimed before (the arithmetic of ``_claim_parts``)."""
    assert forward_launch._parts(2048, 64, 132) == (1980, 33)
    assert forward_launch._parts(2048, 32, 132) is None  # 15 blocks would be spared
    monkeypatch.setattr(forward_launch, "PARTS_FROM", 6)
    for n_programs, n_blocks in itertools.product((2, 78, 132), (7, 16, 17, 32, 100)):
        for n_tiles in range(1, 3 * n_programs, 1 + n_programs // 50):
            found = forward_launch._parts(n_tiles, n_blocks, n_programs)
            if found is None:
                continue
            whole, size = found
            assert n_programs <= whole < n_tiles and whole % n_programs == 0
            rest = (n_tiles - whole) * n_blocks
            n_chunks = -(-rest // size)
            assert n_chunks <= n_programs and size < n_blocks
            left: dict[int, tuple[int, int]] = {}
            covered = 0
            for chunk in reversed(range(n_chunks)):
                begin, end = chunk * size, min(chunk * size + size, rest)
                tile, first = divmod(begin, n_blocks)
                blocks = min(end - begin, n_blocks - first)
                parts = [(tile, first, blocks)] + [(tile + 1, 0, end - begin - blocks)] * (end - begin > blocks)
                for tile, first, blocks in parts:
                    covered += blocks
                    if first > 0:
                        left[chunk] = tile, blocks
                        continue
                    for other in range(-(-(n_blocks - blocks) // size)):
                        of, more = left.pop(chunk + 1 + other)
                        assert of == tile
                        blocks += more
                    assert blocks == n_blocks
            assert covered == rest and not left
    assert forward_launch._parts(2048, 32, 132) == (1980, 17)
    assert forward_launch._parts(2048, 4, 132) is None  # short keys
    assert forward_launch._parts(131, 32, 132) is None  # no wave is full
    assert forward_launch._parts(1980, 32, 132) is None  # all are


@pytest.mark.parametrize(
    ("n_heads", "mib", "section"),
    [(512, 0.25, 64), (512, 0.125, 128), (64, 1.5, 8), (64, 2, 8), (16, 8, 2), (7, 3, 4), (3, 1, 3), (5, 100, 1)],
)
def test_sections(n_heads: int, mib: float, section: int) -> None:
    """Sections of 16 MiB of keys and values, about, of which the last is not much smaller than the others."""
    assert forward_launch._section(n_heads, int(mib * 2**20)) == section


def test_lengths_and_strides_do_not_recompile() -> None:
    kernels = set()
    with compiling_for("sm90"):
        for batch, seqlen, nheads in ((1, 4096, 8), (3, 1153, 16), (2, 2049, 24)):
            inputs = call(batch=batch, seqlen=seqlen, nheads=nheads, nheads_k=8)
            kernels.add(launches(inputs)[1].warm_up().hash)
    assert len(kernels) == 1


def test_what_is_declined() -> None:
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    mask = AttentionMask(causal=True)
    plain = call(head_dim=64, mask=mask)
    assert forward_launch.forward_reason(plain) is None
    odd = [torch.empty(2, 64, 4, 68, **meta)[..., :64] for _ in range(3)]
    declined = {
        "head dim 260": call(head_dim=260),
        "head dim 66": call(head_dim=66),
        "head dim 256/264": call(head_dim=256, v_head_dim=264),
        "dtype float32": call(dtype=torch.float32),
        "seqlen_q 16": call(seqlen=16),
        "dropout": call(dropout_p=0.1),
        "softmax_scale": AttentionInputs(plain.query, plain.key, plain.value, -1.0, mask),
        "sinks per row": call(sinks=torch.empty(2, 32, 4096, device="meta")),
        "q: stride": AttentionInputs(*odd, 1.0, mask),
    }
    for words, inputs in declined.items():
        reason = forward_launch.forward_reason(inputs)
        assert reason is not None and reason.startswith(words), (words, reason)


def test_what_outlives_a_call_is_not_made_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose allocations may be meant for CUDA graphs; it is there for the caller's stream, once for each."""
    done: list[Any] = []
    monkeypatch.setattr(forward_launch, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")

    @contextlib.contextmanager
    def stream(which: str) -> Iterator[None]:
        done.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: done.append(threading.get_ident()) or done)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    device = torch.device("cuda", 0)
    assert forward_launch._counter(device) is forward_launch._counter(device)
    on, maker = done
    assert maker != threading.get_ident() and on == "the caller's"
