"""The Triton kernels on a GPU: every feature, dtype and head dimension against float64, and how they behave in torch.

All variants are compiled first, in parallel processes (``HF_FLASH_PLUS_COMPILE_JOBS``, default 8): compiling them one
after the other would take most of the time.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_flash_plus
from hf_flash_plus.masks import AttentionMask, additive
from hf_flash_plus.providers.triton import TritonProvider
from tests.gpu.compiling import Compilation, unless_parallel
from tests.gpu.memory import needs_memory
from tests.kernels.cases import FEATURES, Case, build, check

pytestmark = pytest.mark.gpu

PROVIDER = TritonProvider()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BASE = Case(seqlen_q=257, seqlen_k=391, nheads=4, nheads_k=2, head_dim=64, v_head_dim=64, dtype=BF16)

SINGLE = [replace(BASE, features=features) for features in [(), *((name,) for name in FEATURES)]]
PAIRS = [
    replace(BASE, features=features)
    for features in (
        ("causal", "packed"),
        ("packed", "sinks"),
        ("causal", "holes"),
        ("packed", "bool_bias"),
        ("left_window", "softcap"),
        ("bias", "alibi"),
        ("packed", "dropout"),
        ("causal", "window", "packed", "key_mask", "bias", "positions", "softcap", "row_sinks", "dropout"),
    )
]
DIMS = [
    replace(BASE, features=("causal",), head_dim=dim, v_head_dim=v_dim, dtype=dtype)
    for dim, v_dim in ((8, 8), (40, 40), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512), (33, 33))
    for dtype in ((FP16, BF16) if dim == 128 else (BF16,))
]
WIDE = [
    replace(BASE, features=features, head_dim=dim, v_head_dim=dim, dtype=FP32)
    for features, dim in ((("causal",), 64), (("packed", "softcap"), 64), (("causal",), 128), ((), 256), ((), 512))
]
MASKED_128 = [replace(BASE, features=(name,), head_dim=128, v_head_dim=128) for name in ("packed", "key_mask", "bias")]
LENGTHS = [
    Case(("causal",), batch, seqlen_q, seqlen_k, nheads, nheads_k, 64, 64, BF16)
    for seqlen_q, seqlen_k, batch, nheads, nheads_k in (
        (1, 1, 1, 4, 4),
        (1, 1025, 2, 8, 2),
        (15, 129, 1, 4, 1),
        (63, 63, 3, 6, 3),
        (129, 65, 2, 4, 2),
        (1025, 1025, 2, 40, 40),  # fills the device: the large tiles
        (1023, 1023, 1, 8, 1),  # one key head: dk and dv in parts
    )
]
LARGE = [
    Case(features, 2, 1025, 1100, 34, 17, dim, dim, BF16)
    for features in ((), ("causal",), ("packed",), ("left_padding",), ("causal", "dropout"))
    for dim in (64, 128)
]
CASES = list(dict.fromkeys([*SINGLE, *PAIRS, *DIMS, *WIDE, *MASKED_128, *LENGTHS, *LARGE]))

#: For the names of features that a provider declares, those of the cases.
DECLARED = {
    "window": ("window", "left_window", "right_window"),
    "intervals": ("packed", "documents", "left_padding", "intervals"),
    "key_mask": ("key_mask", "holes"),
    "bool_bias": ("bool_bias",),
    "float_bias": ("bias", "head_bias", "key_bias"),
    "alibi": ("alibi", "batch_alibi"),
    "sinks": ("sinks",),
    "row_sinks": ("row_sinks",),
    "softcap": ("softcap",),
    "dropout": ("dropout",),
}


def _drawn(number: int, seed: int = 20261130) -> list[Case]:
    """Calls drawn from what the provider declares: dtypes, head dimensions up to its largest, heads, features."""
    chance = random.Random(seed)
    dtypes = sorted(PROVIDER.dtypes, key=str)
    cases = []
    for _ in range(number):
        declared = chance.sample(sorted(DECLARED.keys() & PROVIDER.features), chance.randint(0, 3))
        features = tuple(chance.choice(DECLARED[name]) for name in declared)
        features = ("causal", *features) if chance.random() < 0.5 else features
        multiple = PROVIDER.head_dim_multiple
        dims = [multiple * chance.randint(1, chance.choice((64, 128, PROVIDER.max_head_dim)) // multiple) for _ in "qv"]
        heads_k = chance.choice((1, 2, 3))
        group = chance.choice((1, 2, 4)) if "gqa" in PROVIDER.features else 1
        dims[1] = chance.choice(dims) if "v_head_dim" in PROVIDER.features else dims[0]
        seqlen_q, seqlen_k = chance.randint(1, 400), chance.randint(20, 400)
        batch = chance.randint(1, 3)
        cases.append(Case(features, batch, seqlen_q, seqlen_k, heads_k * group, heads_k, *dims, chance.choice(dtypes)))
    return cases


DRAWN = _drawn(28)
#: What every drawn call has, or what another test is for; ``packed`` calls reach these kernels as intervals.
NOT_DRAWN = {"gqa", "v_head_dim", "lse", "grad", "bias_grad", "deterministic", "packed"}


def test_drawing_covers_what_is_declared() -> None:
    assert PROVIDER.features - DECLARED.keys() == NOT_DRAWN
    assert {case.dtype for case in DRAWN} == PROVIDER.dtypes
    assert {one for names in DECLARED.values() for one in names} <= {one for case in DRAWN for one in case.features}


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_calls_of_the_capability_data(case: Case) -> None:
    check(PROVIDER, case, "cuda")


def _compile(case: Case) -> None:
    """Compile a case's kernels into Triton's cache; runs in a worker process and launches nothing."""
    from hf_flash_plus.providers import triton as provider
    from tests.kernels.aot.compiling import launches, warm_up

    built = build(case, "cuda")
    inputs = provider._plain(built.inputs)
    for one in launches(inputs, bias_grad=additive(inputs.mask) is not None, dout=built.dout).values():
        warm_up(one)


def compilations() -> list[Compilation]:
    return [Compilation(case, _compile, (case,)) for case in (*CASES, *DRAWN)]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    unless_parallel(compilations())


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are the tests of the portable kernels; those for Hopper have their own."""
    monkeypatch.setenv("HF_FLASH_PLUS_KERNELS", "portable")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, portable: None) -> None:
    check(PROVIDER, case, "cuda")


CHOICE = [replace(case, dtype=BF16) for case in (*SINGLE, *PAIRS, *LARGE)]


@pytest.mark.parametrize("case", CHOICE, ids=str)
def test_whatever_kernels_are_chosen(case: Case) -> None:
    """The provider as users meet it: the forward of one kind of kernel with the backward of the other, too."""
    check(PROVIDER, case, "cuda")


def _run(inputs: object, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output = PROVIDER.forward(inputs)
    grads = PROVIDER.backward(inputs, output.out, output.softmax_lse, dout, bias_grad=False, sinks_grad=False)
    return (output.out, output.softmax_lse, *grads[:3])


@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("features", [("causal",), ("packed",), ("causal", "dropout")], ids="+".join)
def test_bitwise_repeatable(features: tuple[str, ...], kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_PLUS_KERNELS", kernels)
    built = build(replace(LARGE[0], features=features, nheads=16, nheads_k=4), "cuda")
    inputs = replace(built.inputs, deterministic=True)
    first = _run(inputs, built.dout)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(inputs, built.dout)))


def test_more_heads_than_65535() -> None:
    check(PROVIDER, Case((), 2, 3, 5, 40000, 40000, 16, 16, BF16), "cuda")


@pytest.mark.exclusive
def test_offsets_beyond_32_bits() -> None:
    """The last batch element lies behind 2^31 elements, of inputs and outputs."""
    needs_memory(12)
    q = torch.empty(23, 8192, 48, 256, device="cuda", dtype=BF16)  # 2.3e9 elements, 4.6 GB
    q[-1].normal_()
    with hf_flash_plus.use_provider("triton"):
        mask = AttentionMask(causal=True, window=(64, 0))
        out = hf_flash_plus.attention(q, q, q, mask)[-1:]
        expected = hf_flash_plus.attention(q[-1:], q[-1:], q[-1:], mask)
    assert torch.equal(out, expected)


def _qkv(seqlen: int = 300) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, seqlen, heads, 64, device="cuda", dtype=BF16, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_torch_compile(dropout: float) -> None:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hf_flash_plus.attention(q * 2, k, v, AttentionMask(causal=True), dropout_p=dropout)

    q, k, v = _qkv()
    with hf_flash_plus.use_provider("triton"):
        compiled_step = torch.compile(step, fullgraph=True)
        torch.manual_seed(1)
        got = compiled_step(q, k, v)
        grads = torch.autograd.grad(got.float().square().sum(), (q, k, v))
        assert all(g.isfinite().all() and g.shape == t.shape for g, t in zip(grads, (q, k, v)))
        if not dropout:
            expected = step(q, k, v)
            torch.testing.assert_close(got, expected)
            expected_grads = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
            torch.testing.assert_close(grads, expected_grads, atol=2e-2, rtol=2e-2)


def test_cuda_graph_with_dropout() -> None:
    """Captured once: every replay drops other weights, the same ones in its forward and backward."""
    q, k, v = _qkv()
    mask = AttentionMask(causal=True)

    def step() -> tuple[torch.Tensor, ...]:
        out = hf_flash_plus.attention(q, k, v, mask, dropout_p=0.5)
        return (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))

    with hf_flash_plus.use_provider("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append([t.clone() for t in results])
    assert not torch.equal(replays[0][0], replays[1][0])
    for out, _, _, dv in replays:
        # out = P v and dv = P^T 1 with one P: their sums over v agree, whatever was dropped.
        weighted = (dv.float() * v.float()).sum()
        torch.testing.assert_close(weighted, out.float().sum(), atol=5.0, rtol=2e-2)


def test_checkpoint_with_dropout() -> None:
    q, k, v = _qkv()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hf_flash_plus.attention(q, k, v, AttentionMask(causal=True), dropout_p=0.3)

    def gradients(use_checkpoint: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(7)
        out = checkpoint(attend, q, k, v, use_reentrant=False) if use_checkpoint else attend(q, k, v)
        return (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))

    with hf_flash_plus.use_provider("triton"):
        for a, b in zip(gradients(False), gradients(True)):
            assert torch.equal(a, b)


@pytest.mark.exclusive  # the other processes would each take memory for a context on every device
def test_other_device_than_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, k, v = (t.detach().to("cuda:1") for t in _qkv())
    with hf_flash_plus.use_provider("triton"):
        out = hf_flash_plus.attention(q, k, v, AttentionMask(causal=True))
        torch.cuda.synchronize("cuda:1")
        here = hf_flash_plus.attention(q.to("cuda:0"), k.to("cuda:0"), v.to("cuda:0"), AttentionMask(causal=True))
    assert torch.equal(out.cpu(), here.cpu())
