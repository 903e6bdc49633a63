"""Decoding on a GPU: tickets over every kind of mask, long caches with several splits inside CUDA graphs, pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from hf_flash_plus.integration import continuous, decoding, mask_interface
from hf_flash_plus.integration.attention import flash_plus_attention
from tests.transformers.modes import MODES, NAMES, assert_equal, run

pytestmark = pytest.mark.gpu

decode_step = pytest.importorskip("hf_flash_plus.kernels.decode_step")


class Layer(torch.nn.Module):
    is_causal = True


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call that had a ticket was served by it."""
    served: list[bool] = []
    call = decode_step.Ticket.__call__

    def watched(self: Any, *tensors: torch.Tensor) -> torch.Tensor | None:
        out: torch.Tensor | None = call(self, *tensors)
        served.append(out is not None)
        return out

    monkeypatch.setattr(decode_step.Ticket, "__call__", watched)
    decoding.forget()
    yield served


def _masks(batch: int, seqlen_k: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Keyword arguments of the mask function."""
    ones = torch.ones(batch, seqlen_k, dtype=torch.bool, device=device)
    left = ones.clone()
    for row in range(batch):
        left[row, : row * seqlen_k // (batch + 1)] = False
    holes = left.clone()
    holes[:, seqlen_k // 2 : seqlen_k // 2 + 3] = False
    row = seqlen_k - 5
    window = masking_utils.sliding_window_causal_mask_function(300)
    return {
        "flags": {},
        "nothing padded": {"attention_mask": ones},
        "left": {"attention_mask": left},
        "holes": {"attention_mask": holes},
        "static": {"q_offset": torch.tensor(row, device=device)},
        "static, left": {
            "q_offset": torch.tensor([row], device=device),
            "attention_mask": left[:, : row + 1].contiguous(),
        },
        "window": {"mask_function": window},
        "window, left": {"mask_function": window, "attention_mask": left},
        "offset": {"attention_mask": torch.cat((left[:, :3], left), 1), "kv_offset": 3, "q_offset": seqlen_k + 2},
    }


@pytest.mark.parametrize("kind", _masks(1, 16, torch.device("cpu")))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tickets_equal_sdpa(kind: str, head_dim: int, tickets: list[bool]) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    for batch in (1, 4, 16):
        for seqlen_k in (20, 513, 2047, 2048, 5000):
            options = {"batch_size": batch, "q_length": 1, "kv_length": seqlen_k, "q_offset": seqlen_k - 1}
            options |= {"device": device, **_masks(batch, seqlen_k, device)[kind]}
            mask = mask_interface.flash_plus_mask(**options)
            dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
            tickets.clear()
            for _layer in range(4):
                query = torch.randn(batch, 32, 1, head_dim, device=device, dtype=torch.bfloat16)
                key, value = (
                    torch.randn(batch, 8, seqlen_k, head_dim, device=device, dtype=torch.bfloat16) for _ in "kv"
                )
                with torch.no_grad():
                    out = flash_plus_attention(Layer(), query, key, value, mask, scaling=head_dim**-0.5)[0]
                    want = torch.nn.functional.scaled_dot_product_attention(
                        query.float(), key.float(), value.float(), attn_mask=dense, enable_gqa=True
                    ).transpose(1, 2)
                seen = dense.any(-1).view(batch, 1, 1, 1)
                # A row that sees few keys has large values, which bf16 rounds to two or three digits.
                out, want = (torch.where(seen, x.float(), 0.0) for x in (out, want))
                torch.testing.assert_close(out, want, atol=5e-3, rtol=1e-2, msg=str((batch, seqlen_k)))
            assert sum(tickets) >= 2, "the first call may understand, the second prepare; the others have a ticket"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size,padded", [(0, False), (16, False), (256, False), (0, True)], ids=str)
def test_keys_asked_for_ahead(page_size: int, padded: bool, head_dim: int) -> None:
    """With and without prefetching, whole and split, from pages and behind NaN of padding, at lengths around tiles."""
    from hf_flash_plus.kernels import tune_decode

    for keys in (1, 63, 64, 65, 300, 1000):
        spec = tune_decode.Spec(3, keys, 32, 8, head_dim, page_size, padded)
        data = tune_decode.make_data(spec)
        exact = tune_decode.reference(spec, data)
        for ahead in (0, 128, 512):
            for splits, two in ((1, False), (3, False), (3, True), (20, True)):
                candidate = tune_decode.Candidate(64, 4, 3, ahead, splits, two)
                out, launches = tune_decode.launches(spec, data, candidate)
                for launch in launches:
                    launch.run()
                assert tune_decode.wrong(out, exact) is None, (spec, candidate)


def _llama(implementation: str) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, max_position_embeddings=8192,
    )  # fmt: skip
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).cuda().eval()


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"cache_implementation": "static"}],
    ids=["dynamic", "static", "compiled"],
)
def test_long_prompts_equal_sdpa(options: dict[str, Any], full_precision: None) -> None:
    """Many keys in few rows: several splits, whose workspace must not be in the way of CUDA graphs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (3, 1500), generator=generator).cuda()
    mask = torch.ones_like(ids)
    mask[1, :700] = mask[2, :33] = 0
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = _llama("sdpa").generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(_llama("flash_plus").generate(ids, attention_mask=mask, **arguments, **options), want)


@pytest.mark.exclusive  # the cache is sized by the memory that is free at that moment, whoever takes it a moment later
def test_continuous_batching_appends_in_one_launch(monkeypatch: pytest.MonkeyPatch, full_precision: None) -> None:
    asked: list[bool] = []
    original = continuous._appends_in_one_launch
    monkeypatch.setattr(continuous, "_appends_in_one_launch", lambda *a: (asked.append(original(*a)), asked[-1])[1])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in (700, 33, 1200, 400)]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model = _llama("sdpa")
    want = [
        model.generate(torch.tensor([prompt]).cuda(), eos_token_id=None, **options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    config = transformers.GenerationConfig(eos_token_id=-1, **options)
    # The cache takes what the GPU has left, unless it is told not to.
    part = transformers.ContinuousBatchingConfig(max_memory_percent=0.02)
    results = _llama("flash_plus").generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=part, progress_bar=False
    )
    keys = sorted(results, key=lambda key: int(key.rsplit("_", 1)[-1]))
    assert [results[key].generated_tokens for key in keys] == want
    assert asked and all(asked)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_rarer_modes_equal_eager(name: str, mode: str, full_precision: None) -> None:
    assert_equal(mode, *run(name, mode, "cuda"))
