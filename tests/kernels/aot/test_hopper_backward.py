"""The Hopper backward kernels compile without a GPU, fit shared memory, hardly spill, and keep their products async."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this Triton has no Gluon for Hopper")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import machine_code
from hf_flash_plus.kernels.hopper import backward_config, backward_dq_launch, backward_launch
from hf_flash_plus.kernels.hopper.backward_config import Config
from hf_flash_plus.masks import CAUSAL, FULL, AttentionMask

from .compiling import _BIN, TARGETS, _find, barriers, call, compiling_for

if reason := backward_launch.gluon_reason():
    pytest.skip(reason, allow_module_level=True)

#: ptxas's warnings about matrix products that it makes wait for one another, by number and by word.
SERIALIZED = ("C7510", "C7512", "C7514", "C7515", "C7517", "C7519", "serialized")


def hopper_launches(
    inputs: AttentionInputs, mode: str, dout: torch.Tensor | None = None, config: Config | None = None
) -> dict[str, Any]:
    """All launches of a call's backward pass, by name; nothing runs."""
    q = inputs.query
    batch, seqlen_q, nheads, _ = q.shape
    _, seqlen_k, nheads_k, v_head_dim = inputs.value.shape
    out = torch.empty(batch, seqlen_q, nheads, v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32, device=q.device)
    parts = backward_launch.take_apart(inputs, out, lse, out if dout is None else dout, mode, config)
    buffers = backward_launch.allocate(parts)
    dtype = q.dtype if parts.splits == 1 else torch.float32
    first_key = parts.bounds.first_key
    dk = torch.empty(parts.splits, batch, seqlen_k, nheads_k, q.shape[3], dtype=dtype, device=q.device)
    dv = torch.empty(parts.splits, batch, seqlen_k, nheads_k, v_head_dim, dtype=dtype, device=q.device)
    found = {
        "rows": backward_launch.rows_launch(parts, buffers, lse[:, :, parts.bounds.first_row :]),
        "main": backward_launch.main_launch(parts, buffers, dk[:, :, first_key:], dv[:, :, first_key:]),
    }
    if parts.config.parts:
        found["dv"] = backward_launch.main_launch(
            parts, buffers, dk[:, :, first_key:], dv[:, :, first_key:], with_dk=False
        )
    if parts.intervals is not None:
        found["lists"] = backward_launch.lists_launch(parts, buffers)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)[:, parts.bounds.first_row :]
    if parts.mode:
        found["dq_rows"] = backward_launch.dq_rows_launch(parts, buffers, dq)
    else:
        summary, found["dq"] = backward_dq_launch.prepare(inputs, parts, buffers, dq)
        if summary is not None:
            found["summary"] = summary
    return found


def _inputs(
    mask: str, head_dim: int, nheads_k: int, seqlen: int, softcap: float, dtype: torch.dtype, v_head_dim: int = 0
) -> AttentionInputs:
    masks = {
        "full": FULL,
        "causal": CAUSAL,
        "window": AttentionMask(window=(1024, 0)),
        "intervals": AttentionMask(row_intervals=torch.empty(2, seqlen, 2, dtype=torch.int32, device="meta")),
    }
    return call(
        dtype, head_dim, v_head_dim or head_dim, seqlen=seqlen, nheads=32, nheads_k=nheads_k, mask=masks[mask],
        softcap=softcap,
    )  # fmt: skip


BF16, FP16 = torch.bfloat16, torch.float16
#: Bytes that the kernel for dq may spill: between tiles, none of it in its loops (164 at 64 columns with softcap and a
#: window, else up to 128).
DQ_SPILLS = 168
#: mode, mask, head_dim, nheads_k, seqlen, softcap, dtype, and how many bytes of registers may be spilled.
VARIANTS = [
    ("unordered", "full", 128, 32, 4096, 0.0, BF16, 32),
    ("unordered", "causal", 128, 32, 4096, 0.0, BF16, 32),
    ("unordered", "causal", 128, 8, 512, 0.0, BF16, 32),  # dk and dv in fp32, of several programs
    ("split", "causal", 128, 32, 4096, 0.0, BF16, 32),
    ("split", "full", 64, 32, 4096, 0.0, FP16, 32),
    ("unordered", "full", 64, 32, 4096, 0.0, BF16, 32),
    ("unordered", "causal", 64, 32, 4096, 0.0, BF16, 96),  # two key heads to a program: what spills is not in its loops
    ("unordered", "causal", 64, 8, 4000, 0.0, BF16, 32),
    ("unordered", "intervals", 64, 32, 4096, 0.0, BF16, 32),
    ("unordered", "intervals", 64, 8, 4000, 0.0, BF16, 64),
    ("unordered", "intervals", 64, 32, 4000, 20.0, BF16, 96),
    ("split", "intervals", 128, 8, 4000, 20.0, BF16, 160),
    ("unordered", "window", 64, 32, 4096, 0.0, FP16, 96),
    ("split", "window", 64, 32, 4096, 0.0, BF16, 96),
    ("unordered", "intervals", 128, 8, 4000, 0.0, BF16, 128),
]
if os.environ.get("HF_FLASH_PLUS_AOT") == "full":
    VARIANTS += [
        (mode, mask, dim, nheads_k, seqlen, softcap, BF16, 1024)
        for mode in backward_launch.MODES
        for mask in ("full", "causal", "window", "intervals")
        for dim in (64, 128)
        for nheads_k in (32, 8)
        for seqlen in (4096, 4000)
        for softcap in (0.0, 20.0)
    ]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v[:-1])).replace("torch.", ""))
def test_compiles(variant: tuple[str, str, int, int, int, float, torch.dtype, int]) -> None:
    mode, *rest, bound = variant
    mask, head_dim, _, _, softcap, _ = rest
    # C7519 alone is a fence more: nothing waits for it.
    fenced = mask == "intervals" and head_dim == 64 and softcap > 0.0
    _compile(mode, _inputs(*rest), bound, serialized=tuple(c for c in SERIALIZED if not (fenced and c == "C7519")))


def _compile(
    mode: str,
    inputs: AttentionInputs,
    bound: int,
    config: Config | None = None,
    serialized: tuple[str, ...] = SERIALIZED,
) -> None:
    with compiling_for("sm90"):
        for name, launch in hopper_launches(inputs, mode, config=config).items():
            kernel = launch.warm_up()
            if name == "summary":
                continue
            limit = TARGETS["sm90"].shared_memory
            assert kernel.metadata.shared <= limit, f"{name} takes {kernel.metadata.shared} bytes, there are {limit}"
            if name in ("main", "dv", "dq"):
                barriers(kernel.asm["ptx"])
                assert not machine_code.unwritten(kernel.asm["cubin"])
                with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
                    ptx.write(kernel.asm["ptx"])
                    ptx.flush()
                    command = [_BIN + "ptxas", "-v", "--gpu-name=sm_90a", ptx.name, "-o", os.devnull]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                assert not any(word in said for word in serialized), said
                spilled = _find(r"(\d+) bytes spill stores", said)
                allowed = {"main": bound, "dv": 0, "dq": DQ_SPILLS}[name]
                assert spilled <= allowed, f"{name} spills {spilled} bytes, allowed are {allowed}"


@pytest.mark.parametrize(
    ("mask", "head_dim", "v_head_dim", "nheads_k", "seqlen", "softcap", "dtype", "bound"),
    [
        ("full", 192, 128, 32, 4096, 0.0, BF16, 0),
        ("causal", 192, 128, 32, 4096, 0.0, BF16, 64),
        ("causal", 192, 128, 8, 4000, 0.0, BF16, 64),
        ("intervals", 192, 128, 32, 4000, 0.0, BF16, 128),
        ("window", 160, 96, 32, 4096, 0.0, FP16, 128),
        ("full", 256, 256, 32, 4096, 0.0, BF16, 0),
        ("causal", 256, 256, 32, 4096, 0.0, BF16, 48),  # not in its loops
        ("causal", 256, 256, 8, 4000, 0.0, BF16, 48),
        ("causal", 256, 256, 8, 512, 0.0, BF16, 32),  # dk and dv in fp32, of several programs
        ("intervals", 256, 256, 8, 4000, 0.0, BF16, 96),
        ("causal", 256, 256, 16, 4096, 20.0, BF16, 32),
        ("window", 200, 144, 32, 4096, 0.0, FP16, 32),
    ],
)
def test_wide_heads_compile(
    mask: str,
    head_dim: int,
    v_head_dim: int,
    nheads_k: int,
    seqlen: int,
    softcap: float,
    dtype: torch.dtype,
    bound: int,
) -> None:
    inputs = _inputs(mask, head_dim, nheads_k, seqlen, softcap, dtype, v_head_dim)
    # C7519 alone is a fence more, where a product starts at numbers of rows: nothing waits for it.
    _compile("unordered", inputs, bound, serialized=tuple(code for code in SERIALIZED if code != "C7519"))


@pytest.mark.parametrize("option", [{"dv_late": True}, {"dp_early": 0}, {"dp_early": 2, "dv_late": True}], ids=str)
def test_options_of_wide_heads(option: dict[str, int]) -> None:
    inputs = _inputs("causal", 256, 32, 4096, 0.0, BF16)
    serialized = tuple(code for code in SERIALIZED if code != "C7519")
    _compile("unordered", inputs, 32, backward_config.WIDE[256]._replace(**option), serialized)


def test_short_calls_have_one_kernel() -> None:
    """At 256 columns, where the diagonal or a window leaves programs few steps."""
    for mask, seqlen, apart in (
        ("causal", 1023, False),
        ("causal", 1024, True),
        ("window", 512, False),
        ("full", 64, True),
    ):
        with compiling_for("sm90"):
            found = hopper_launches(_inputs(mask, 256, 8, seqlen, 0.0, BF16), "unordered")
        assert ("dv" in found) == apart, (mask, seqlen)


@pytest.mark.parametrize("option", [{}, {"dv_stages": (2, 3)}], ids=str)
def test_options_of_parts(option: dict[str, Any]) -> None:
    """dv in a kernel of its own, with room for what is in flight; without row intervals."""
    serialized = tuple(code for code in SERIALIZED if code != "C7519")
    inputs = _inputs("full", 256, 32, 4096, 0.0, BF16)
    _compile("unordered", inputs, 0, backward_config.PARTS._replace(**option), serialized)
    for mask in ("full", "window", "intervals"):
        with compiling_for("sm90"):
            found = hopper_launches(_inputs(mask, 256, 8, 4000, 0.0, BF16), "unordered")
        assert ("dv" in found) == (mask != "intervals")
        assert found["main"].plan.kernel.fn.__name__ == (
            "attention_backward_wide" if mask == "intervals" else "attention_backward_part"
        )


@pytest.mark.parametrize("mask", ["full", "causal", "window", "intervals"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_loop_and_numbers(mask: str, head_dim: int) -> None:
    """The loop in halves is for 64 columns without windows; numbers of rows are made for the loop that reads them, as
    the kernel for dq knows; lists of tiles begin with those that mask for that loop only."""
    halves = head_dim == 64 and mask != "window"
    inputs = _inputs(mask, head_dim, 8, 4000, 0.0, BF16)
    with compiling_for("sm90"):
        for mode in backward_launch.MODES:
            found = hopper_launches(inputs, mode)
            assert found["main"].plan.options["HALVES"] == halves
            if mask == "intervals":
                assert found["lists"].plan.options["MASKED_FIRST"] == halves
            factor = found["rows"].arguments[-1]
            assert factor == (-backward_launch.LOG2E if halves else -1.0 / inputs.softmax_scale)
            if mode == "split":
                assert found["dq"].plan.options["C"].base2 == halves


def test_lengths_do_not_recompile() -> None:
    """Only whether the last tile of keys is full, how rows lie, and whether a program computes one, two or four key
    heads makes another kernel."""
    with compiling_for("sm90"):
        hashes: dict[int, set[str]] = {}
        for seqlen, batch in ((1024, 3), (4096, 1), (6144, 1), (8192, 1), (3072, 3), (8192, 2), (4096, 9)):
            inputs = call(BF16, 64, batch=batch, seqlen=seqlen, nheads=32, nheads_k=32)
            main = hopper_launches(inputs, "split")["main"]
            hashes.setdefault(main.plan.options["UNITS"], set()).add(main.warm_up().hash)
    assert {units: len(found) for units, found in hashes.items()} == {1: 1, 2: 1, 4: 1}


@pytest.mark.parametrize(
    ("mask", "nheads_k", "seqlen", "batch", "section"),
    [
        ("causal", 8, 4096, 4, 4),  # 128 programs on 132 cores; the cache would hold 2 heads
        ("causal", 8, 3000, 4, 8),  # 5 would leave 2 for the end
        ("causal", 32, 4096, 4, 8),
        ("full", 8, 4096, 4, 2),  # programs of one length
        ("causal", 8, 256, 1, 8),  # all there are
    ],
)
def test_sections(mask: str, nheads_k: int, seqlen: int, batch: int, section: int) -> None:
    """How many key heads are in flight together: what fits the cache, and under a diagonal a program for each core."""
    inputs = call(
        BF16, 128, batch=batch, seqlen=seqlen, nheads=32, nheads_k=nheads_k, mask={"causal": CAUSAL, "full": FULL}[mask]
    )
    with compiling_for("sm90"):
        q = inputs.query
        lse = torch.empty(batch, 32, seqlen, dtype=torch.float32, device=q.device)
        parts = backward_launch.take_apart(inputs, q, lse, q, "unordered")
        if parts.splits == 1:
            assert backward_launch._section(parts) == section
        else:
            assert backward_launch._section(parts) == section * parts.splits


@pytest.mark.parametrize(
    ("mask", "nheads_k", "seqlen", "batch", "units"),
    [
        ("full", 32, 4096, 4, 4),
        ("causal", 32, 4096, 4, 4),
        ("causal", 8, 4096, 4, 1),  # 8 programs to a core: with two heads each, the last would run alone for long
        ("causal", 32, 1408, 8, 2),
        ("intervals", 32, 4096, 2, 1),
        ("intervals", 32, 4096, 4, 2),
        ("intervals", 32, 4096, 8, 2),
        ("window", 32, 4096, 4, 1),
    ],
)
def test_key_heads_of_a_program(mask: str, nheads_k: int, seqlen: int, batch: int, units: int) -> None:
    masks = {"full": FULL, "causal": CAUSAL, "window": AttentionMask(window=(1024, 0))}
    rows = torch.empty(batch, seqlen, 2, dtype=torch.int32, device="meta")
    masks["intervals"] = AttentionMask(row_intervals=rows)
    inputs = call(BF16, 64, batch=batch, seqlen=seqlen, nheads=32, nheads_k=nheads_k, mask=masks[mask])
    with compiling_for("sm90"):
        main = hopper_launches(inputs, "unordered")["main"]
    assert main.plan.options["UNITS"] == units
    assert main.n_programs * units == batch * nheads_k * (seqlen // 128)
    n_heads, section = (
        main.arguments[list(main.plan.kernel.arg_names).index(name)] for name in ("n_heads_total", "section")
    )
    assert n_heads * units == batch * nheads_k and section >= 1


@pytest.mark.parametrize(("lists", "section"), [(16, 8), (1, 64)])
def test_sections_under_row_intervals(lists: int, section: int) -> None:
    """Two waves of programs, or eight where all heads share one list, and no small section at the end."""
    rows = torch.empty(lists, 4096, 2, dtype=torch.int32, device="meta")
    inputs = call(BF16, 128, batch=16, seqlen=4096, nheads=32, nheads_k=8, mask=AttentionMask(row_intervals=rows))
    with compiling_for("sm90"):
        q = inputs.query
        lse = torch.empty(16, 32, 4096, dtype=torch.float32, device=q.device)
        parts = backward_launch.take_apart(inputs, q, lse, q, "unordered")
        assert parts.splits == 1 and backward_launch._section(parts) == section


@pytest.mark.parametrize(("mode", "mask"), [("split", "causal"), ("unordered", "intervals")])
def test_arguments_of_a_direct_launch(mode: str, mask: str) -> None:
    """What a compiled kernel is launched with, beside Triton's own look-up, is what Triton itself would pass; and its
    key says all of it that is compiled for."""
    with compiling_for("sm90"):
        for name, launch in hopper_launches(_inputs(mask, 128, 32, 4096, 0.0, BF16), mode).items():
            if name == "summary":
                continue
            kernel = launch.plan.kernel
            launch.warm_up()
            *_, binder = kernel.device_caches[list(TARGETS).index("sm90")]
            options = {"debug": False, "instrumentation_mode": "", **launch.plan.options}
            bound, *_ = binder(*launch.arguments, **options)
            passed = (*launch.arguments, *launch.plan.constexprs)
            assert [id(value) for value in bound.values()] == [id(value) for value in passed]
            for parameter, value in zip(kernel.params, launch.arguments):
                if isinstance(value, int):
                    classed = parameter.name.startswith(("out_stride", "dout_stride", "dq_stride"))
                    assert parameter.do_not_specialize or classed, f"{name}: {parameter.name}"
