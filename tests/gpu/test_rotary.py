"""The rotary kernel on a GPU: the bits of torch's operations, in models, in CUDA graphs, in large tensors."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers as tf

from hf_flash_plus import fuse_rotary, rotary
from hf_flash_plus.integration import fused_rotary
from hf_flash_plus.rotary import FORMS, Form
from tests.kernels.rotary_cases import check, names

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize(
    "dtypes",
    [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16)],
    ids=names,
)
@pytest.mark.parametrize("form", FORMS, ids=names)
def test_forms(form: Form, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, table = dtypes
    torch.manual_seed(0)
    for heads, seqlen, head_dim, width in ((32, 129, 128, 128), (5, 33, 96, 24)):
        if width < head_dim and not form.partial:
            continue
        q, k = (random(2, seqlen, n, head_dim, dtype=dtype).transpose(1, 2) for n in (heads, 8))
        check(q, k, *(random(2, seqlen, width, dtype=table) for _ in range(2)), form)


@pytest.mark.parametrize("offset", [0, 1])
def test_unaligned_views_of_one_projection(offset: int) -> None:
    torch.manual_seed(0)
    room = random(2, 65, 12 * 80 + offset, dtype=BF16)[..., offset:]
    q, k = (room[..., a * 80 : b * 80].unflatten(-1, (-1, 80)).transpose(1, 2) for a, b in ((0, 8), (8, 10)))
    check(q, k, *(random(1, 65, 80, dtype=BF16) for _ in range(2)), Form())


def test_elements_beyond_two_to_the_31() -> None:
    torch.manual_seed(0)
    q = torch.empty(1, 2**31 // 4096 + 3, 32, 128, dtype=BF16, device="cuda").normal_().transpose(1, 2)
    k = q[:, :1]
    cos, sin = (random(1, q.shape[2], 128, dtype=BF16) for _ in range(2))
    found = rotary.rotate(q, k, cos, sin, Form())
    for tail in (slice(-9, None), slice(0, 9)):
        want = rotary.reference(q[:, :, tail], cos[:, tail], sin[:, tail], Form())
        assert torch.equal(found[0][:, :, tail], want)
        assert torch.equal(found[1][:, :, tail], want[:, :1])


def test_replays_with_changed_inputs() -> None:
    torch.manual_seed(0)
    q, k = (random(2, 9, n, 64, dtype=BF16).transpose(1, 2) for n in (8, 2))
    cos, sin = (random(2, 9, 64, dtype=BF16) for _ in range(2))
    rotary.rotate(q, k, cos, sin, Form())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rotary.rotate(q, k, cos, sin, Form())
    for tensor in (q, k, cos, sin):
        tensor.normal_()
    graph.replay()
    assert torch.equal(found[0], rotary.reference(q, cos, sin, Form()))
    assert torch.equal(found[1], rotary.reference(k, cos, sin, Form()))


def test_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls like the last one but for their data are launched at once; others anew, and all are right."""
    from hf_flash_plus.kernels.rotary import Ticket

    served = []
    launch = Ticket.__call__

    def watched(self: Any, *tensors: torch.Tensor) -> Any:
        found = launch(self, *tensors)
        served.append(found is not None)
        return found

    monkeypatch.setattr(Ticket, "__call__", watched)
    monkeypatch.setattr(rotary, "_last", {})
    torch.manual_seed(0)

    def ask(*shape: int, dtype: torch.dtype = BF16, offset: int = 0) -> None:
        room = random(shape[0], shape[1], (shape[2] + 2) * 64 + offset, dtype=dtype)[..., offset:]
        q = room[..., : shape[2] * 64].unflatten(-1, (-1, 64)).transpose(1, 2)
        k = room[..., shape[2] * 64 :].unflatten(-1, (-1, 64)).transpose(1, 2)
        cos, sin = (random(shape[0], shape[1], 64, dtype=dtype) for _ in range(2))
        found = rotary.recall(q, k, cos, sin, Form()) or rotary.rotate(q, k, cos, sin, Form())
        assert torch.equal(found[0], rotary.reference(q, cos, sin, Form()))
        assert torch.equal(found[1], rotary.reference(k, cos, sin, Form()))

    for _ in range(3):
        ask(3, 1, 8)
    assert served == [True, True]
    ask(3, 5, 8)  # other shapes
    ask(3, 5, 8, dtype=FP16)
    ask(3, 5, 8, dtype=FP16, offset=1)  # addresses that are no multiples of 16, and other strides
    ask(3, 5, 8, dtype=FP16)
    assert served == [True, True, False, False, False, True]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ask(3, 5, 8, dtype=FP16)
        ask(3, 5, 8, dtype=FP16)
    stream.synchronize()
    assert served[6:] == [False, True]


MODELS = {
    "llama": {},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere": {},
    "glm": {"head_dim": 32},
    "olmo2": {},
    "gemma3_text": {"head_dim": 32},
    "qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=names)
def test_models_train_and_generate_the_same(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the model's own function, which is what this class of models calls."""
    served = []
    rotated = fused_rotary._rotated

    def watched(*arguments: Any) -> Any:
        found = rotated(*arguments)
        served.append(found is not None)
        return found

    monkeypatch.setattr(fused_rotary, "_rotated", watched)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = tf.AutoConfig.for_model(kind, **sizes, **MODELS[kind])
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="flash_plus").to("cuda", dtype)
    module = importlib.import_module(type(model).__module__)
    assert fused_rotary._form(module.apply_rotary_pos_emb) is not None
    ids = torch.randint(2, 128, (2, 65), device="cuda")

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    def text() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=8, do_sample=False)

    want_text, want = text(), step()
    with fuse_rotary(model):
        found = step()
        assert served == [True] * 2
        assert torch.equal(text(), want_text)
        assert served == [True] * (2 + 2 * 8)
    assert torch.equal(found[0], want[0])
    for one, other in zip(found, want):  # the gradients of embeddings are summed by atomics, in any order
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == BF16 else 1e-5, atol=1e-5)


def test_another_device_than_the_current_one() -> None:
    """Calls in a row, whose tickets are of that device; the current device stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(0)
    with torch.cuda.device(0):
        for _ in range(3):
            q, k, cos, sin = (
                random(*shape, dtype=BF16).to("cuda:1")
                for shape in ((2, 4, 9, 64), (2, 2, 9, 64), (1, 9, 64), (1, 9, 64))
            )
            assert fused_rotary._TRITON.runs_on(q)
            found = rotary.recall(q, k, cos, sin, Form()) or rotary.rotate(q, k, cos, sin, Form())
            assert torch.cuda.current_device() == 0
            assert torch.equal(found[0], rotary.reference(q, cos, sin, Form()))
            assert torch.equal(found[1], rotary.reference(k, cos, sin, Form()))
        check(q, k, cos, sin, Form())
