"""The Hopper backward kernels on a GPU: features against float64, repeatability, hidden memory, CUDA graphs.

A wrong barrier makes such a kernel hang, not fail. So a first call of every mode is made in a process of its own, with
a time limit; if it does not come back, the other tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_flash_plus.kernels.hopper import backward_config, backward_launch
from hf_flash_plus.providers.base import AttentionGradients
from hf_flash_plus.providers.triton import TritonProvider, _sinks_gradient
from tests.gpu.compiling import Compilation, kind_of_mask, unless_parallel
from tests.kernels.cases import Case, build, check

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
MODES = ("split", "unordered")
BASE = Case((), 2, 257, 391, 4, 2, 64, 64, BF16)
WIDE = replace(BASE, head_dim=128, v_head_dim=128)
FEATURES = [
    (),
    ("causal",),
    ("window",),
    ("left_window",),
    ("right_window",),
    ("packed",),
    ("documents",),
    ("left_padding",),
    ("intervals",),
    ("one_interval",),
    ("nothing",),
    ("right_padding",),
    ("ends",),
    ("softcap",),
    ("sinks",),
    ("causal", "packed"),
    ("packed", "sinks"),
    ("left_window", "softcap"),
    ("packed", "softcap"),
    ("causal", "row_sinks", "softcap"),
]
CASES = [replace(base, features=features) for base in (BASE, WIDE) for features in FEATURES]
CASES += [replace(WIDE, features=features, dtype=FP16) for features in ((), ("causal",), ("packed",))]
CASES += [
    replace(WIDE, features=("causal",), head_dim=dim, v_head_dim=v_dim)
    for dim, v_dim in ((96, 96), (80, 80), (40, 40), (16, 16), (64, 128), (128, 64))
]
CASES += [
    Case(("causal",), batch, seqlen_q, seqlen_k, nheads, nheads_k, 128, 128, BF16)
    for seqlen_q, seqlen_k, batch, nheads, nheads_k in (
        (1, 1, 1, 4, 4),
        (1, 1025, 2, 8, 2),
        (129, 65, 2, 4, 2),
        (512, 512, 2, 4, 4),
        (1000, 1000, 2, 40, 40),
        (1023, 1023, 1, 8, 1),
        (640, 640, 8, 32, 8),
    )
]
#: Several query heads to a program: those of all heads that mask come first. Diagonals through corners and elsewhere.
CASES += [
    Case(("causal",), 8, 640, seqlen_k, 32, 8, dim, dim, BF16)
    for seqlen_k, dim in ((640, 64), (768, 64), (700, 64), (700, 128))
]
CASES += [
    Case(features, 2, 1025, 1100, 34, 17, dim, dim, BF16)
    for features in ((), ("packed",), ("left_padding",))
    for dim in (64, 128)
]

#: Heads beyond 128 columns (``backward_wide``): always by additions to the sums of dq.
FAR = replace(BASE, head_dim=256, v_head_dim=256)
MLA = replace(BASE, head_dim=192, v_head_dim=128)
WIDE_CASES = [replace(base, features=features) for base in (FAR, MLA) for features in FEATURES]
WIDE_CASES += [
    replace(base, features=features, dtype=FP16) for base in (FAR, MLA) for features in ((), ("causal",), ("packed",))
]
WIDE_CASES += [
    replace(BASE, features=features, head_dim=dim, v_head_dim=v_dim)
    for features in (("causal",), ("packed",))
    for dim, v_dim in ((160, 96), (136, 128), (192, 64), (200, 144), (144, 200), (64, 136), (192, 192))
]
WIDE_CASES += [
    Case(("causal",), batch, seqlen_q, seqlen_k, nheads, nheads_k, *dims, BF16)
    for seqlen_q, seqlen_k, batch, nheads, nheads_k in (
        (1, 1, 1, 4, 4),
        (64, 64, 1, 4, 4),
        (391, 257, 2, 4, 2),
        (512, 512, 2, 4, 4),
        (1023, 1023, 1, 8, 1),
        (640, 640, 4, 32, 8),
        (640, 700, 4, 32, 8),
    )
    for dims in ((256, 256), (192, 128))
]

#: So many keys that masked calls, too, have a kernel for dv alone at 256 columns (``backward_parts``).
WIDE_CASES += [
    Case(features, batch, seqlen_q, seqlen_k, nheads, nheads_k, *dims, dtype)
    for features, batch, seqlen_q, seqlen_k, nheads, nheads_k, dims, dtype in (
        (("causal",), 2, 1100, 1100, 4, 2, (256, 256), BF16),
        (("causal",), 1, 1152, 1152, 4, 4, (256, 256), FP16),
        (("causal",), 4, 1024, 1024, 32, 8, (256, 256), BF16),  # several query heads to a program
        (("causal",), 4, 900, 1060, 32, 8, (256, 256), BF16),
        (("causal",), 1, 300, 1200, 8, 1, (256, 256), BF16),
        (("causal", "softcap"), 2, 1024, 1024, 4, 4, (256, 256), BF16),
        (("causal",), 2, 1030, 1030, 4, 2, (200, 144), FP16),
        (("left_window",), 2, 1100, 1100, 4, 2, (256, 256), BF16),
        (("left_window", "softcap"), 1, 1024, 1280, 8, 2, (256, 256), FP16),
        (("window",), 2, 1100, 1100, 4, 4, (256, 256), BF16),
        ((), 4, 640, 1024, 32, 8, (256, 256), BF16),
    )
]

FIRST_CALL = """
import torch
from hf_flash_plus.kernels import launch
from hf_flash_plus.kernels.hopper import backward_launch
from tests.kernels.cases import Case, build
mode = {mode!r}
for features in ((), ("causal",), ("packed",), ("left_window", "softcap")):
    for dim in (64, 128) if mode == "split" else (64, 128, 192, 256):
        v_dim = 128 if dim == 192 else dim
        built = build(Case(features, 2, 700, 700, 4, 2, dim, v_dim, torch.bfloat16), "cuda")
        out, lse = launch.forward(built.inputs)
        backward_launch.backward(built.inputs, out, lse, built.dout, mode=mode)
        torch.cuda.synchronize()
"""


class Hopper(TritonProvider):
    """The portable kernels with this backward."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def backward(self, inputs, out, softmax_lse, dout, *, bias_grad, sinks_grad):  # type: ignore[no-untyped-def]
        assert backward_launch.backward_reason(inputs) is None
        dq, dk, dv, delta = backward_launch.backward(inputs, out, softmax_lse, dout, mode=self.mode)
        dsinks = _sinks_gradient(inputs.sinks, softmax_lse, delta) if sinks_grad else None
        return AttentionGradients(dq, dk, dv, None, dsinks)


def _compile(case: Case, mode: str) -> None:
    """Compile a case's kernels into Triton's cache; runs in a worker process and launches nothing."""
    from hf_flash_plus.kernels import launch
    from tests.kernels.aot.compiling import launches, warm_up
    from tests.kernels.aot.test_hopper_backward import hopper_launches

    built = build(case, "cuda")
    for one in hopper_launches(built.inputs, mode, built.dout).values():
        one.warm_up()
    portable = launches(built.inputs, dout=built.dout)
    assert isinstance(portable["forward"], launch.Launch)
    warm_up(portable["forward"])


def compilations() -> list[Compilation]:
    """By what main kernels differ in."""
    work = []
    for case in WIDE_CASES:
        dim = backward_config.widths(case.head_dim, case.v_head_dim)[0]
        structure = (
            kind_of_mask(case.features),
            "softcap" in case.features,
            case.dtype,
            case.head_dim,
            case.v_head_dim,
        )
        work.append(Compilation((True, dim, *structure), _compile, (case, "unordered")))
    for case in CASES:
        dim = backward_config.widths(case.head_dim, case.v_head_dim)[0]
        for mode in MODES:
            structure = (kind_of_mask(case.features), "softcap" in case.features, case.dtype)
            work.append(Compilation((mode == "unordered", dim, *structure), _compile, (case, mode)))
    return work


def _first_calls(mode: str) -> str:
    """The first calls of a mode, in a process of their own; what went wrong, or nothing."""
    run = [sys.executable, "-c", FIRST_CALL.format(mode=mode)]
    try:
        done = subprocess.run(run, timeout=300, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return "they hang"
    return done.stderr[-2000:] if done.returncode else ""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    reason = backward_launch._device_reason(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        pytest.skip(reason)
    unless_parallel(compilations())


@pytest.fixture(autouse=True)
def started(request: pytest.FixtureRequest, once: Callable[[str, Callable[[], str]], str]) -> None:
    """The first calls of a test's mode have ended; of every mode, for a test of all."""
    spec = getattr(request.node, "callspec", None)
    for mode in (spec.params["mode"],) if spec is not None and "mode" in spec.params else MODES:
        wrong = once(f"first calls of the Hopper backward {mode.replace('/', ' ')}", partial(_first_calls, mode))
        if wrong:
            pytest.fail(f"the first calls of mode {mode!r} failed: {wrong}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, mode: str) -> None:
    check(Hopper(mode), case, "cuda")


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_wide_heads_against_float64(case: Case) -> None:
    check(Hopper("unordered"), case, "cuda")


def _run(case: Case, mode: str) -> list[tuple[torch.Tensor, ...]]:
    built = build(case, "cuda")
    output = TritonProvider().forward(built.inputs)
    return [
        backward_launch.backward(built.inputs, output.out, output.softmax_lse, built.dout, mode=mode)[:3]
        for _ in range(20)
    ]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("features", [(), ("causal",), ("left_window",), ("packed",)], ids="+".join)
def test_bitwise_repeatable(features: tuple[str, ...], dim: int) -> None:
    first, *others = _run(Case(features, 2, 1025, 1100, 34, 17, dim, dim, BF16), "split")
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_mode_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows: dq from a kernel of its own; long ones: by additions, unless they have to be repeatable."""
    long, short = (build(Case(("causal",), 1, n, n, 2, 1, 64, 64, BF16), "cuda").inputs for n in (2048, 256))
    assert backward_launch.mode_for(long) == "unordered"
    assert backward_launch.mode_for(short) == "split"
    window = build(Case(("window",), 1, 2048, 2048, 2, 1, 64, 64, BF16), "cuda").inputs
    assert backward_launch.mode_for(window) == "split"
    assert backward_launch.mode_for(replace(long, deterministic=True)) == "split"
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    assert backward_launch.mode_for(long) == "split"


@pytest.mark.parametrize("mode", MODES)
def test_views_of_one_projection(mode: str) -> None:
    """q, k and v as parts of one tensor, and a gradient that is broadcast."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 1000, 3, 8, 128, device="cuda", dtype=BF16)
    inputs = build(replace(WIDE, features=("causal",)), "cuda").inputs
    views = replace(inputs, query=qkv[:, :, 0], key=qkv[:, :, 1], value=qkv[:, :, 2])
    copies = replace(inputs, query=qkv[:, :, 0].clone(), key=qkv[:, :, 1].clone(), value=qkv[:, :, 2].clone())
    output = TritonProvider().forward(views)
    dout = torch.randn(1, 1, 1, 128, device="cuda", dtype=BF16).expand(2, 1000, 8, 128)
    both = [backward_launch.backward(x, output.out, output.softmax_lse, dout, mode=mode) for x in (views, copies)]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("features", [("causal",), ("packed",)], ids="+".join)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(mode: str, features: tuple[str, ...]) -> None:
    built = build(replace(WIDE, features=features), "cuda")
    output = TritonProvider().forward(built.inputs)

    def run() -> tuple[torch.Tensor, ...]:
        return backward_launch.backward(built.inputs, output.out, output.softmax_lse, built.dout, mode=mode)[:3]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, expected):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


def test_reasons() -> None:
    inputs = build(BASE, "cuda").inputs
    assert backward_launch.backward_reason(inputs) is None
    assert "dropout" in backward_launch.backward_reason(replace(inputs, dropout_p=0.1))
    assert "float32" in backward_launch.backward_reason(build(replace(BASE, dtype=torch.float32), "cuda").inputs)
    wide = build(replace(BASE, head_dim=256, v_head_dim=256), "cuda").inputs
    assert backward_launch.backward_reason(wide) is None
    assert "repeatable" in backward_launch.backward_reason(replace(wide, deterministic=True))
    odd = build(replace(BASE, head_dim=33, v_head_dim=33), "cuda").inputs
    assert "33" in backward_launch.backward_reason(odd)
    unaligned = replace(inputs, query=torch.empty(2, 257, 4, 65, device="cuda", dtype=BF16)[..., 1:])
    assert "q: not aligned" in backward_launch.backward_reason(unaligned)
