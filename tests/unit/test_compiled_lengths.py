"""Every entry point, traced once with symbolic lengths, computes calls of other lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, settings, use_provider
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.providers import AttentionOutput

from .toy import ToyProvider, registered


class PagedToy(ToyProvider):
    """Reads pages, as the Triton kernels do."""

    name = "paged_toy"
    from_pages = 0

    def forward_paged(
        self, inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor
    ) -> AttentionOutput | None:
        from hf_flash_plus.ops import _gathered

        assert not isinstance(k_cache, torch._subclasses.FakeTensor), "not while a graph is traced"
        self.from_pages += 1
        return self.forward(_gathered(inputs, k_cache, v_cache, block_table))


@pytest.fixture(autouse=True)
def paged_toy() -> Iterator[PagedToy]:
    torch._dynamo.reset()
    provider = PagedToy()
    with registered(ToyProvider(), provider):
        yield provider
    torch._dynamo.reset()


_generator = torch.Generator().manual_seed(9)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


def queries_and_keys(length: int) -> tuple[Tensor, Tensor]:
    return random(2, length, 4, 16), random(2, length + 3, 2, 16)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _intervals(q: Tensor, k: Tensor, intervals: Tensor) -> Any:
    return hfp.attention(q, k, k, AttentionMask(row_intervals=intervals))


def _key_mask(q: Tensor, k: Tensor, key_mask: Tensor) -> Any:
    return hfp.attention(q, k, k, AttentionMask(causal=True, key_mask=key_mask))


def _bias(q: Tensor, k: Tensor, bias: Tensor) -> Any:
    return hfp.attention(q, k, k, AttentionMask(causal=True, bias=bias))


def _dense(q: Tensor, k: Tensor) -> Any:
    return hfp.flash_attn_func(q, k, k, causal=True, window_size=(6, -1))


def _varlen(q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Any:
    return hfp.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)


def _cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, used: int | Tensor) -> Any:
    return hfp.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), q, q, cache_seqlens=used, causal=True)


def _pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, used: int | Tensor, table: Tensor) -> Any:
    return hfp.flash_attn_with_kvcache(
        q, k_cache.clone(), v_cache.clone(), q, q, cache_seqlens=used, block_table=table, causal=True
    )


def _paged_arguments(blocks: int, used: int | Tensor) -> tuple[Any, ...]:
    table = torch.randperm(11, generator=_generator)[: 2 * blocks].view(2, blocks).int()
    return random(2, 1, 2, 16), random(11, 4, 2, 16), random(11, 4, 2, 16), used, table


CASES: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "flash_attn_func": (_dense, [queries_and_keys(n) for n in (9, 12, 21)]),
    "intervals": (
        _intervals,
        [(*queries_and_keys(n), lengths(0, 5).expand(2, n, 2).contiguous()) for n in (9, 12, 21)],
    ),
    "key mask": (_key_mask, [(*queries_and_keys(n), random(2, n + 3) > -1) for n in (9, 12, 21)]),
    "bias": (_bias, [(*queries_and_keys(n), random(2, 1, n, n + 3)) for n in (9, 12, 21)]),
    "flash_attn_varlen_func": (
        _varlen,
        [(random(9, 2, 16), lengths(0, 4, 9), 5), (random(20, 2, 16), lengths(0, 14, 18, 20), 14)],
    ),
    "cache, lengths in a tensor": (
        _cache,
        [(random(2, 1, 2, 16), random(2, n, 2, 16), random(2, n, 2, 16), lengths(3, 5)) for n in (9, 12, 21)],
    ),
    "cache, one length": (
        _cache,
        [(random(2, 1, 2, 16), random(2, 21, 2, 16), random(2, 21, 2, 16), n) for n in (9, 12, 14)],
    ),
    "pages, lengths in a tensor": (_pages, [_paged_arguments(n, lengths(3, 5)) for n in (2, 3, 5)]),
    "pages, one length": (_pages, [_paged_arguments(5, n) for n in (9, 12, 14)]),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("provider", ["toy", "paged_toy", "torch_sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_compiled(
    case: str, provider: str, dynamic: bool | None, paged_toy: PagedToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider == "paged_toy" and not case.startswith("pages"):
        pytest.skip("reads pages like any other")
    monkeypatch.setenv(settings.PROVIDER, provider)
    function, calls = CASES[case]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), atol=1e-5, rtol=1e-5)
    if provider == "paged_toy":
        assert paged_toy.from_pages == 2 * len(calls), "compiled code reads pages, too"


@pytest.mark.parametrize("provider", ["toy", "torch_sdpa"])
@pytest.mark.parametrize("case", ["flash_attn_func", "intervals", "bias"])
def test_traced_by_make_fx(case: str, provider: str) -> None:
    function, calls = CASES[case]
    with use_provider(provider):
        graph = make_fx(function, tracing_mode="symbolic")(*calls[0])
        for arguments in calls:
            torch.testing.assert_close(graph(*arguments), function(*arguments), atol=1e-5, rtol=1e-5)


def test_the_paged_op(paged_toy: PagedToy) -> None:
    """Schema, fake implementation and real one agree; where a provider reads no pages they are gathered."""
    q, k_cache, v_cache, _, table = _paged_arguments(2, 0)
    keys = k_cache.new_empty(()).expand(2, 8, 2, 16)
    for name in ("toy", "paged_toy"):
        arguments = [k_cache, v_cache, table, q, keys, keys, *[None] * 10, 0, 0, False, -1, -1, 0.25, True, -1, -1]
        arguments += [0.0, 0.0, False, name]
        torch.library.opcheck(torch.ops.hf_flash_plus.paged_attention_forward.default, tuple(arguments))
    assert paged_toy.from_pages > 0


@pytest.mark.parametrize("name", ("alibi_slopes", "s_aux"))
def test_buffers_of_one_shape_beside_symbolic_lengths(name: str) -> None:
    given = torch.rand(4)

    def call(q: torch.Tensor) -> torch.Tensor:
        return hfp.flash_attn_func(q, q, q, causal=True, **{name: given})

    compiled = torch.compile(call, backend="eager", dynamic=True, fullgraph=True)
    for length in (6, 9):
        q = torch.randn(2, length, 4, 16)
        torch.testing.assert_close(compiled(q), call(q))
