"""The library op and the inline path: compilation, autocast, autograd, dropout seeds, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, ops, settings, use_provider

from . import oracle
from .oracle import assert_close
from .toy import ToyProvider, registered


@pytest.fixture
def toy() -> Iterator[ToyProvider]:
    provider = ToyProvider()
    with registered(provider), use_provider("toy"):
        yield provider


def make(
    shape: tuple[int, ...] = (2, 4, 6, 4, 2, 8, 4), dtype: torch.dtype = torch.float64, grad: bool = True
) -> list[Tensor]:
    batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, v_head_dim = shape
    generator = torch.Generator().manual_seed(11)
    sizes = (
        (batch, seqlen_q, nheads, head_dim),
        (batch, seqlen_k, nheads_k, head_dim),
        (batch, seqlen_k, nheads_k, v_head_dim),
    )
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in sizes]


class Spy(TorchDispatchMode):
    """The names of our operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_flash_plus":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["directly", "through the dispatcher"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Calls that nobody watches skip the dispatcher. Both ways must do the same."""
    if request.param == "directly":
        yield
        return
    with Spy() as spy:
        yield
    assert spy.names


# --- which operator runs --------------------------------------------------------------------------------------------


def test_training_goes_through_the_differentiable_op(toy: ToyProvider) -> None:
    tensors = make()
    with Spy() as spy:
        out = hfp.flash_attn_func(*tensors, causal=True)
        torch.autograd.grad(out.sum(), tensors)
    assert spy.names == ["attention", "attention_backward"]
    assert toy.calls == ["forward", "backward"]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing requires a gradient"])
def test_without_gradients_the_forward_op_runs(toy: ToyProvider, mode: str) -> None:
    tensors = make(grad=mode != "nothing requires a gradient")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context(), Spy() as spy:
        out = hfp.flash_attn_func(*tensors, causal=True)
    assert spy.names == ["attention_forward"]
    assert not out.requires_grad
    assert_close(out, oracle.attention(*tensors, causal=True).out, torch.float64)


def test_who_watches(toy: ToyProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwatched calls reach no operator; a functorch transform counts as somebody who watches."""
    used: list[str] = []
    for name in ("attention", "attention_forward", "attention_backward"):
        monkeypatch.setattr(torch.ops.hf_flash_plus, name, lambda *_, name=name: used.append(name))
    tensors = make()
    out = hfp.flash_attn_func(*tensors)
    torch.autograd.grad(out.sum(), tensors)
    with torch.no_grad():
        hfp.flash_attn_func(*tensors)
    assert toy.calls == ["forward", "backward", "forward"] and used == []
    watched: list[bool] = []
    torch.func.vmap(lambda q: watched.append(not ops._nobody_watches(q)) or q)(tensors[0])
    torch.jit.trace(
        lambda q: watched.append(not ops._nobody_watches(q)) or q * 2, tensors[0].detach(), check_trace=False
    )
    with torch.autograd.forward_ad.dual_level():
        watched.append(not ops._nobody_watches(tensors[0]))
        with torch.no_grad():
            assert not ops.undisturbed(*(x.detach() for x in tensors[:3]))
    assert watched == [True] * 3 and ops._nobody_watches(tensors[0])
    with torch.no_grad():
        assert ops.undisturbed(*(x.detach() for x in tensors[:3]))


@pytest.mark.parametrize("provider", ["reference", "torch_sdpa"])
def test_differentiable_providers_run_inline(provider: str) -> None:
    with use_provider(provider), Spy() as spy:
        hfp.flash_attn_func(*make()).sum().backward()
    assert spy.names == []


# --- values and gradients through the op ----------------------------------------------------------------------------

_generator = torch.Generator().manual_seed(3)
_ROWS = torch.tensor([[[0, 3], [1, 6], [2, 2], [0, 99]]] * 2, dtype=torch.int32)
_KEYS = torch.tensor([[True, True, False, True, True, True], [False] * 2 + [True] * 4])
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # keyword arguments of attention(), and of the oracle
    "full": ({"mask": AttentionMask()}, {}),
    "causal": ({"mask": AttentionMask(causal=True)}, {"causal": True}),
    "window": ({"mask": AttentionMask(window=(2, 1))}, {"window": (2, 1)}),
    "row_intervals": (
        {"mask": AttentionMask(row_intervals=_ROWS)},
        {"sees": lambda b, h, i, j: bool(_ROWS[b, i, 0] <= j < _ROWS[b, i, 1])},
    ),
    "key_mask": (
        {"mask": AttentionMask(key_mask=_KEYS, key_holes=torch.ones(2, dtype=torch.int32))},
        {"sees": lambda b, h, i, j: bool(_KEYS[b, j])},
    ),
    "row_positions": (
        {
            "mask": AttentionMask(row_positions=torch.tensor([[3, 1, 0, 5]], dtype=torch.int32)),
            "alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 2.0]),
        },
        {"alibi": torch.tensor([0.5, 0.25, 1.0, 2.0]), "places": lambda b, i: (3, 1, 0, 5)[i]},
    ),
    "softcap_scale": ({"mask": AttentionMask(), "softcap": 1.5, "softmax_scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("case", CASES)
def test_the_op_receives_the_whole_call(toy: ToyProvider, case: str) -> None:
    kwargs, wanted = CASES[case]
    tensors = make()
    out = hfp.attention(*tensors, **kwargs)
    expected = oracle.attention(*tensors, **wanted).out
    assert_close(out, expected, torch.float64)
    weight = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    for gradient, want in zip(gradients, torch.autograd.grad((expected * weight).sum(), tensors)):
        assert_close(gradient, want, torch.float64)
    # Forward and backward were told the same, and all of it.
    for seen in toy.inputs:
        for name in ("causal", "window"):
            assert getattr(seen.mask, name) == getattr(kwargs["mask"], name)
        for name in ("row_intervals", "key_mask", "key_holes", "row_positions"):
            ours, theirs = getattr(seen.mask, name), getattr(kwargs["mask"], name)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
        assert seen.softcap == kwargs.get("softcap", 0.0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (1, 1, 4, 6), (2, 4, 1, 6)], ids=str)
def test_gradient_of_the_bias_through_the_op(toy: ToyProvider, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(*tensors: Tensor) -> Tensor:
        out: Tensor = hfp.attention(*tensors[:3], AttentionMask(causal=True, bias=tensors[3]))
        return out

    assert torch.autograd.gradcheck(function, [*make((2, 4, 6, 4, 2, 2, 2)), bias])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(4,), (2, 4, 4)], ids=str)
def test_gradient_of_the_sinks_through_the_op(toy: ToyProvider, shape: tuple[int, ...]) -> None:
    # The provider returns dsinks in fp32, as documented; the op gives it the dtype of the sinks.
    for dtype, limit in ((torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        sinks = torch.randn(shape, dtype=dtype, requires_grad=True)
        tensors = make()
        out = hfp.attention(*tensors, AttentionMask(), s_aux=sinks)
        (gradient,) = torch.autograd.grad(out.square().sum(), sinks)
        (want,) = torch.autograd.grad(oracle.attention(*tensors, sinks=sinks).out.square().sum(), sinks)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, want, atol=limit, rtol=limit)


@pytest.mark.usefixtures("either_way")
def test_packed_sequences_reach_forward_and_backward(toy: ToyProvider) -> None:
    q, k, v = (t[0] for t in make())
    cu_q, cu_k = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    out = hfp.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True, window_size=(2, -1))
    assert_close(out, oracle.varlen(q, k, v, [0, 1, 4], [0, 4, 6], causal=True, window=(2, -1)).out, torch.float64)
    out.sum().backward()
    assert toy.calls == ["forward", "backward"]
    for seen in toy.inputs:
        packed = seen.mask.packed
        assert packed is not None and packed.causal and tuple(packed.window) == (2, -1)
        assert torch.equal(packed.cu_seqlens_q, cu_q) and torch.equal(packed.cu_seqlens_k, cu_k)
        assert (packed.max_seqlen_q, packed.max_seqlen_k) == (3, 4)


@pytest.mark.usefixtures("either_way")
def test_only_the_gradients_that_are_wanted(toy: ToyProvider) -> None:
    q, k, v = make(grad=False)
    bias, sinks = torch.zeros(1, 1, 4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    out = hfp.attention(q, k, v, AttentionMask(bias=bias), s_aux=sinks)
    (gradient,) = torch.autograd.grad(out.sum(), sinks)
    assert gradient.abs().sum() > 0
    assert q.grad is None and bias.grad is None


@pytest.mark.usefixtures("either_way")
def test_the_log_sum_exp_through_the_op(toy: ToyProvider) -> None:
    tensors = make(dtype=torch.float32)
    out, lse, s_dmask = hfp.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    want = oracle.attention(*tensors, causal=True)
    assert_close(out, want.out, torch.float32)
    assert_close(lse, want.lse, torch.float32)
    assert out.requires_grad and not lse.requires_grad and s_dmask.numel() == 0
    # A loss that uses only the log-sum-exp has nothing to differentiate, and says so.
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


def test_no_provider_gives_the_log_sum_exp_a_gradient() -> None:
    """As in flash-attn: a loss must not train something else because another provider serves it."""
    tensors = make()
    with use_provider("reference"):
        out, lse, _ = hfp.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    assert out.requires_grad and not lse.requires_grad
    gradients = torch.autograd.grad(out.square().sum() + lse.sum(), tensors)
    wanted = torch.autograd.grad(oracle.attention(*tensors, causal=True).out.square().sum(), tensors)
    for gradient, want in zip(gradients, wanted):
        assert_close(gradient, want, torch.float64)


@pytest.mark.usefixtures("either_way")
def test_backward_provider_is_who_does_the_backward() -> None:
    class ForwardOnly(ToyProvider):
        name = "forward_only"
        backward_provider = "toy"

    first, second = ForwardOnly(), ToyProvider()
    with registered(first, second):
        tensors = make()
        with use_provider("forward_only"):
            out = hfp.flash_attn_func(*tensors)
        with use_provider("reference"):  # recorded in forward: what is forced by now does not matter
            gradients = torch.autograd.grad(out.sum(), tensors)
        assert first.calls == ["forward"] and second.calls == ["backward"]
    for gradient, want in zip(gradients, torch.autograd.grad(oracle.attention(*tensors).out.sum(), tensors)):
        assert_close(gradient, want, torch.float64)


@pytest.mark.usefixtures("either_way")
def test_double_backward_is_refused_with_advice(toy: ToyProvider) -> None:
    q, k, v = make()
    out = hfp.flash_attn_func(q, k, v)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative") as caught:
        gradient.sum().backward()
    # torch's SDPA has no second derivative on the CPU either.
    assert 'use_provider("reference")' in str(caught.value) and "sdpa" not in str(caught.value)


@pytest.mark.parametrize("case", ["full", "causal", "row_intervals"])
def test_double_backward_works_with_the_provider_that_the_message_names(case: str) -> None:
    kwargs, wanted_by = CASES[case]
    q, k, v = make()
    with use_provider("reference"):
        (gradient,) = torch.autograd.grad(hfp.attention(q, k, v, **kwargs).square().sum(), q, create_graph=True)
    gradient.sum().backward()
    (wanted,) = torch.autograd.grad(oracle.attention(q, k, v, **wanted_by).out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(wanted.sum(), q)
    assert_close(q.grad, second, torch.float64)


# --- opcheck --------------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> dict[str, Any]:
    """All arguments of the op by name: small tensors, and nothing for what is not mentioned."""
    q, k, v = make((1, 3, 4, 2, 1, 4, 2), torch.float32)
    call = {"query": q, "key": k, "value": v, "softmax_scale": 0.5, "provider": "toy", **changes}
    nothing = {"Optional": None, "int": -1, "SymInt": 0, "float": 0.0, "bool": False}
    schema = torch.ops.hf_flash_plus.attention.default._schema.arguments
    assert call.keys() <= {argument.name for argument in schema}
    return {
        argument.name: call[argument.name]
        if argument.name in call
        else next(value for word, value in nothing.items() if word in str(argument.real_type))
        for argument in schema
    }


OPCHECKS: dict[str, dict[str, Any]] = {
    "plain": {"causal": True, "window_left": 2},
    "everything": {
        "row_intervals": torch.tensor([[[0, 2], [1, 4], [0, 4]]], dtype=torch.int32),
        "key_mask": torch.tensor([[True, True, False, True]]),
        "key_holes": torch.ones(1, dtype=torch.int32),
        "bias": torch.randn(1, 2, 3, 4),
        "row_positions": torch.tensor([[1, 2, 3]], dtype=torch.int32),
        "alibi_slopes": torch.tensor([0.5, 0.25]),
        "sinks": torch.randn(2),
        "dropout_seed": torch.tensor([7]),
        "dropout_p": 0.3,
        "softcap": 2.0,
    },
}


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("name", ["attention", "attention_forward"])
def test_opcheck(toy: ToyProvider, name: str, case: str) -> None:
    call = arguments(**OPCHECKS[case])
    if name == "attention":
        for tensor in (call["bias"], call["sinks"]):
            if tensor is not None:
                tensor.requires_grad_()
    else:
        call = {n: a.detach() if isinstance(a, Tensor) else a for n, a in call.items()}
    torch.library.opcheck(getattr(torch.ops.hf_flash_plus, name).default, tuple(call.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fake_implementation_agrees_with_the_real_one(toy: ToyProvider, dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = make(dtype=dtype)
    bias, sinks = torch.randn(1, 4, 1, 6, dtype=dtype).requires_grad_(), torch.randn(4).requires_grad_()

    def run(*leaves: Tensor) -> list[Tensor]:
        out, lse = hfp.attention(*leaves[:3], AttentionMask(bias=leaves[3]), s_aux=leaves[4], return_lse=True)
        return [out, lse, *torch.autograd.grad(out.float().sum(), leaves)]

    real = run(*tensors, bias, sinks)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(t) for t in (*tensors, bias, sinks)))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


# --- torch.compile --------------------------------------------------------------------------------------------------


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    cu_q, cu_k = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    return hfp.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 3, 4, causal=True)


COMPILED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "causal": lambda q, k, v: hfp.flash_attn_func(q, k, v, causal=True),
    "everything": lambda q, k, v: hfp.flash_attn_func(
        q, k, v, causal=True, window_size=(3, -1), softmax_scale=0.3, softcap=2.0, alibi_slopes=q.new_ones(4).float(),
        s_aux=q[0, 0, :, 0],
    ),
    "lse": lambda q, k, v: hfp.flash_attn_func(q, k, v, return_attn_probs=True)[0],
    "varlen": _varlen,
    "kvpacked": lambda q, k, v: hfp.flash_attn_kvpacked_func(q, torch.stack((k, k), 2), causal=True),
}  # fmt: skip


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("provider", ["automatic", "toy", "torch_sdpa"])
def test_compiled_in_one_graph_forward_and_backward(provider: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == "torch_sdpa" and case in ("everything", "lse"):
        pytest.skip("torch_sdpa declines softcap and the log-sum-exp")
    if provider != "automatic":
        monkeypatch.setenv(settings.PROVIDER, provider)
    function = COMPILED[case]
    with registered(ToyProvider()):
        tensors = make((1, 4, 6, 4, 2, 8, 8), torch.float32)
        want = function(*tensors)
        wanted = torch.autograd.grad(want.square().sum(), tensors, allow_unused=True)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
        gradients = torch.autograd.grad(got.square().sum(), tensors, allow_unused=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_by_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.PROVIDER, "toy")

    def function(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).unbind(2)
        out: Tensor = hfp.flash_attn_func(q, k, v, causal=True).flatten(2)
        return out.relu() + 1

    with registered(ToyProvider()):
        x, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, 48, requires_grad=True)
        want = function(x, weight)
        wanted = torch.autograd.grad(want.square().sum(), (x, weight))
        got = torch.compile(function, fullgraph=True)(x, weight)
        gradients = torch.autograd.grad(got.square().sum(), (x, weight))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("more_keys", [0, 3])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("provider", ["toy", "torch_sdpa"])
def test_compiled_for_all_lengths(
    provider: str, dynamic: bool | None, more_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setenv(settings.PROVIDER, provider)
    counter = CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = hfp.flash_attn_func(q, k, v, causal=True)
        return out

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    with registered(ToyProvider()):
        for length in (5, 9, 20, 33):
            tensors = make((2, length, length + more_keys, 2, 2, 8, 8), torch.float32, grad=False)
            torch.testing.assert_close(compiled(*tensors), function(*tensors), atol=1e-5, rtol=1e-5)
    # By itself torch.compile takes the first length for a constant, and finds at the second that it is none. With
    # dynamic=True sizes that happen to be equal share a symbol, and heads and head dims are constants for us: a length
    # or batch that equals one of them is compiled for once more. Four lengths never take four graphs.
    assert counter.frame_count <= (3 if dynamic else 2)


@pytest.mark.usefixtures("_fresh_compiler")
def test_dropout_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.PROVIDER, "toy")
    toy = ToyProvider()
    with registered(toy):
        tensors = make((1, 8, 8, 2, 2, 8, 8), torch.float32)
        compiled = torch.compile(lambda *t: hfp.flash_attn_func(*t, dropout_p=0.5), fullgraph=True, backend="aot_eager")
        for _ in range(2):
            compiled(*tensors).sum().backward()
    assert toy.calls == ["forward", "backward"] * 2
    assert toy.seeds[0] == toy.seeds[1] and toy.seeds[2] == toy.seeds[3] and toy.seeds[0] != toy.seeds[2]


# --- functorch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["reference", "torch_sdpa"])
def test_functorch_sees_through_inline_providers(provider: str) -> None:
    q, k, v = make(grad=False)

    def loss(q: Tensor) -> Tensor:
        out: Tensor = hfp.flash_attn_func(q, k, v, causal=True)
        return out.square().sum()

    with use_provider(provider):
        gradient = torch.func.grad(loss)(q)
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(oracle.attention(leaf, k, v, causal=True).out.square().sum(), leaf)
    assert_close(gradient, want, torch.float64)


# --- dropout seeds --------------------------------------------------------------------------------------------------


def test_seed_comes_from_torchs_generator_and_is_the_same_in_backward(toy: ToyProvider) -> None:
    tensors = make()

    def step() -> Tensor:
        out: Tensor = hfp.flash_attn_func(*tensors, dropout_p=0.5)
        out.sum().backward()
        return out

    torch.manual_seed(1)
    first, second = step(), step()
    torch.manual_seed(1)
    again = step()
    seeds = toy.seeds
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3], "backward has the seed of its forward"
    assert seeds[0] != seeds[2], "every call draws its own"
    assert seeds[4] == seeds[0] and torch.equal(first, again) and not torch.equal(first, second)
    seed = toy.inputs[0].dropout_seed
    assert seed is not None and seed.dtype == torch.int64 and seed.shape == (1,)


def test_no_dropout_draws_nothing(toy: ToyProvider) -> None:
    before = torch.get_rng_state()
    hfp.flash_attn_func(*make(), causal=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert toy.inputs[-1].dropout_seed is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_seed_is_the_same_under_gradient_checkpointing(toy: ToyProvider, reentrant: bool) -> None:
    tensors = make()
    torch.manual_seed(2)
    plain = torch.autograd.grad(hfp.flash_attn_func(*tensors, dropout_p=0.5).square().sum(), tensors)
    toy.calls.clear()
    toy.seeds.clear()
    torch.manual_seed(2)
    out = checkpoint(lambda *t: hfp.flash_attn_func(*t, dropout_p=0.5), *tensors, use_reentrant=reentrant)
    out.square().sum().backward()
    assert toy.calls == ["forward", "forward", "backward"]
    assert len(set(toy.seeds)) == 1
    for tensor, want in zip(tensors, plain):
        assert torch.equal(tensor.grad, want)


@pytest.mark.parametrize("provider", ["reference", "torch_sdpa"])
def test_inline_dropout_is_the_same_under_gradient_checkpointing(provider: str) -> None:
    tensors = make()
    with use_provider(provider):
        torch.manual_seed(2)
        plain = torch.autograd.grad(hfp.flash_attn_func(*tensors, dropout_p=0.5).square().sum(), tensors)
        torch.manual_seed(2)
        out = checkpoint(lambda *t: hfp.flash_attn_func(*t, dropout_p=0.5), *tensors, use_reentrant=False)
        out.square().sum().backward()
    for tensor, want in zip(tensors, plain):
        assert torch.equal(tensor.grad, want)


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["toy", "reference", "torch_sdpa"])
def test_autocast(provider: str) -> None:
    tensors = make(dtype=torch.float32)
    toy = ToyProvider()
    with registered(toy), use_provider(provider), torch.autocast("cpu", torch.bfloat16):
        out = hfp.flash_attn_func(*tensors, causal=True)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients), "the caller's tensors keep their dtype"
    expected = oracle.attention(*tensors, causal=True).out
    assert_close(out, expected, torch.bfloat16)
    for gradient, want in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors)):
        torch.testing.assert_close(gradient.double(), want.double(), atol=0.1, rtol=0.05)
    assert all(seen.query.dtype == torch.bfloat16 for seen in toy.inputs)


def test_autocast_leaves_float64_and_other_devices_alone() -> None:
    double, single = make(), make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert hfp.flash_attn_func(*double).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert hfp.flash_attn_func(*single).dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else torch.enable_grad():
        assert hfp.flash_attn_func(*single).dtype == torch.float32


@pytest.mark.parametrize("provider", ["toy", "reference", "torch_sdpa"])
def test_autocast_casts_a_bias_and_keeps_its_gradient(provider: str) -> None:
    tensors = make(dtype=torch.float32)
    bias = torch.randn(1, 4, 4, 6, requires_grad=True)
    with registered(ToyProvider()), use_provider(provider), torch.autocast("cpu", torch.bfloat16):
        out = hfp.attention(*tensors, AttentionMask(bias=bias))
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    (want,) = torch.autograd.grad(oracle.attention(*tensors, bias=bias).out.square().sum(), bias)
    torch.testing.assert_close(bias.grad, want, atol=0.05, rtol=0.05)


def test_autocast_joins_dtypes_as_the_error_message_promises() -> None:
    # Rotary embeddings in fp32 leave q and k wider than v; autocast is what brings them together.
    q, k, v = make(dtype=torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"torch\.autocast"):
        hfp.flash_attn_func(q, k, v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = hfp.flash_attn_func(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out, oracle.attention(q, k, v).out, torch.bfloat16)


def test_the_op_namespace_is_registered_once() -> None:
    assert {"attention", "attention_forward", "attention_backward"} <= {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "hf_flash_plus" in name
    }
    assert ops._library.ns == "hf_flash_plus"
