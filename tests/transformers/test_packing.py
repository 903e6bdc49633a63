"""Packed documents: each is computed as if it were alone, whatever else comes with them, and nothing stale serves."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers as tf
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_flash_plus import AttentionMask, attention
from hf_flash_plus.integration import mask_interface, packing
from hf_flash_plus.integration.attention import flash_plus_attention

from .tiny import _llama4, build, build_from, ids

TRANSFORMERS = tuple(map(int, tf.__version__.split(".")[:2]))
X = ids(1, 12)
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]


def lengths(first: int = 5) -> dict[str, Any]:
    cu = torch.tensor([0, first, 12], dtype=torch.int32)
    return dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=12, max_length_k=12)


def alone(name: str, first: int = 5, **config: Any) -> torch.Tensor:
    eager = build(name, "eager", **config)
    return torch.cat([eager(X[:, :first]).logits, eager(X[:, first:]).logits], dim=1)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_decoders(name: str, told_by: str, ones: bool, use_cache: bool) -> None:
    said: dict[str, Any] = dict(position_ids=POSITIONS) | (lengths() if told_by == "cu_seq_lens" else {})
    if ones:
        said["attention_mask"] = torch.ones_like(X)
    assert_close(build(name, "flash_plus")(X, use_cache=use_cache, **said).logits, alone(name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders(name: str) -> None:
    assert_close(build(name, "flash_plus")(X, position_ids=POSITIONS, **lengths()).logits, alone(name))


@torch.no_grad()
@pytest.mark.skipif(
    not hasattr(tf.masking_utils, "remap_positions_for_packed_sequence"),
    reason="this Transformers counts chunks from the beginning of the row",
)
def test_chunks_are_counted_within_each_document() -> None:
    """Llama 4, documents longer than a chunk, told by lengths alone."""
    for use_cache in (False, True):
        got = build("llama4", "flash_plus")(X, position_ids=POSITIONS, use_cache=use_cache, **lengths()).logits
        assert_close(got, alone("llama4"))
    assert build("llama4", "eager").config.attention_chunk_size < 12


@torch.no_grad()
def test_lengths_beside_a_dense_mask() -> None:
    """A user's own: the keys of other documents are taken away from it."""
    dense = torch.tril(torch.ones(12, 12, dtype=torch.bool))[None, None]
    assert_close(
        build("llama", "flash_plus")(X, position_ids=POSITIONS, attention_mask=dense, **lengths()).logits,
        alone("llama"),
    )
    additive = torch.zeros(1, 1, 12, 12).masked_fill(~dense, float("-inf"))
    got = build("llama", "flash_plus")(X, position_ids=POSITIONS, attention_mask=additive, **lengths()).logits
    assert_close(got, alone("llama"))


@pytest.mark.parametrize(
    "cu,why",
    [
        (torch.tensor([5, 12]), "must begin with 0 and never fall"),
        (torch.tensor([0, 7, 5, 12]), "must begin with 0 and never fall"),
        (torch.tensor([0, 13]), "ends at 13, but the row has 12 tokens"),
        (torch.tensor([0.0, 12.0]), "must be integers of shape"),
        (torch.tensor([[0, 12]]), "must be integers of shape"),
        ([0, 12], "must be a tensor, got list"),
    ],
    ids=str,
)
def test_lengths_that_do_not_describe_the_row(cu: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        build("llama", "flash_plus")(X, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=12, max_length_k=12)


@torch.inference_mode()
def test_buffers_that_are_filled_anew() -> None:
    """In inference mode torch counts no changes."""
    model, want = build("llama", "flash_plus"), alone("llama")
    positions = torch.arange(12)[None].clone()
    model(X, position_ids=positions)
    positions.copy_(POSITIONS)
    assert_close(model(X, position_ids=positions).logits, want)
    said = lengths(7)
    model(X, position_ids=positions, **said)
    said["cu_seq_lens_q"][1] = 5
    assert_close(model(X, position_ids=positions, **said).logits, want)


def test_other_lengths_of_the_keys() -> None:
    module = torch.nn.Module()
    module.is_causal = True
    key, query = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 2, 8)
    cu_q = torch.tensor([0, 1, 2], dtype=torch.int32)

    def call(cu_k: torch.Tensor, cu_q: torch.Tensor) -> torch.Tensor:
        cut = key[:, :, : int(cu_k[-1])]
        return flash_plus_attention(module, query, cut, cut, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)[0]

    call(torch.tensor([0, 3, 6], dtype=torch.int32), cu_q)
    other = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert torch.equal(call(other, cu_q), call(other, cu_q.clone()))


def _layer(attention_mask: torch.Tensor | None, **said: Any) -> torch.Tensor:
    """One attention call of twelve rows, always of the same numbers."""
    module = torch.nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    return flash_plus_attention(module, query, key, value, attention_mask, **said)[0]


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_that_are_filled_anew_between_calls(inference: bool) -> None:
    """With one mask for both calls, and with none."""
    with torch.inference_mode(inference):
        carried = mask_interface.flash_plus_mask(1, 12, 12)
        first, other = lengths(7)["cu_seq_lens_q"].clone(), lengths(5)["cu_seq_lens_q"]
        masks = [None] if inference else [None, carried]  # a model makes its mask anew for each forward
        for mask in masks:
            cu = first.clone()
            before = _layer(mask, cu_seq_lens_q=cu)
            cu.copy_(other)
            after = _layer(mask, cu_seq_lens_q=cu)
            assert not torch.equal(before, after)
            assert torch.equal(after, _layer(mask, cu_seq_lens_q=other.clone()))
        if not inference:
            positions = torch.arange(12)[None].clone()
            before = _layer(carried, position_ids=positions)
            positions.copy_(POSITIONS)
            assert torch.equal(_layer(carried, position_ids=positions), _layer(carried, position_ids=POSITIONS.clone()))
            assert not torch.equal(_layer(carried, position_ids=positions), before)


@torch.no_grad()
def test_positions_that_jump_begin_a_document() -> None:
    """As Transformers takes them without a cache."""
    jump = torch.cat([torch.arange(5), torch.arange(50, 57)])[None]
    want = build("llama", "eager")(X, position_ids=jump, use_cache=False).logits
    for use_cache in (False, True):
        assert_close(build("llama", "flash_plus")(X, position_ids=jump, use_cache=use_cache).logits, want)


@pytest.mark.parametrize("shape", [(1, 11), (3, 1, 12), (2, 12)], ids=str)
def test_positions_of_other_rows_say_nothing(shape: tuple[int, ...]) -> None:
    positions = torch.zeros(shape, dtype=torch.long)
    carried = mask_interface.flash_plus_mask(1, 12, 12)
    for mask in (None, carried):
        assert torch.equal(_layer(mask, position_ids=positions), _layer(mask))


def test_lengths_beside_a_mask_of_one_row() -> None:
    module = torch.nn.Module()
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 12, 8)
    said = dict(cu_seq_lens_q=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="beside an attention mask for 1 queries and 12 keys"):
        flash_plus_attention(module, query, key, key, torch.ones(1, 1, 1, 12, dtype=torch.bool), **said)


@pytest.mark.parametrize("part", ["row_intervals", "key_mask"])
@pytest.mark.parametrize("inference", [False, True])
def test_masks_changed_in_place(part: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        q, k, v = torch.randn(3, 1, 4, 2, 8).unbind(0)
        if part == "row_intervals":
            tensor = torch.tensor([[[0, 2]] * 4], dtype=torch.int32)
            mask = AttentionMask(row_intervals=tensor)
        else:
            tensor = torch.tensor([[True, True, False, False]])
            mask = AttentionMask(causal=True, key_mask=tensor)
        attention(q, k, v, mask)
        tensor[..., 1 if part == "row_intervals" else 2] = 4
        again = AttentionMask(mask.causal, mask.window, mask.row_intervals, mask.key_mask)
        assert torch.equal(attention(q, k, v, mask), attention(q, k, v, again))


@torch.no_grad()
def test_nothing_stays_with_the_batch() -> None:
    """The same tensors in every step: nothing is kept with them, so that they can be saved and loaded."""
    model, said = build("llama", "flash_plus"), dict(position_ids=POSITIONS.clone(), **lengths())
    sizes = []
    for _ in range(3):
        model(X, **said)
        model(X, position_ids=said["position_ids"])
        buffer = io.BytesIO()
        torch.save([said["position_ids"], said["cu_seq_lens_q"]], buffer)
        sizes.append(buffer.tell())
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    assert len(set(sizes)) == 1
    assert not vars(said["position_ids"]) and not vars(said["cu_seq_lens_q"])


@torch.no_grad()
def test_a_dry_run_leaves_nothing_behind() -> None:
    """FakeTensorMode: what it makes must not serve a real model, nor the reverse."""
    config = build("llama", "flash_plus").config

    def chunks(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        cache = model(tokens[:, :7], attention_mask=torch.ones(2, 7, dtype=torch.long)).past_key_values
        model(tokens[:, 7:11], past_key_values=cache)
        return model(tokens[:, 11:], past_key_values=cache).logits  # one token: the mask that is made once

    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = tf.LlamaForCausalLM._from_config(config, attn_implementation="flash_plus")
            chunks(fake, torch.zeros(2, 12, dtype=torch.long))
        assert type(chunks(build("llama", "flash_plus"), ids(2, 12))) is torch.Tensor


def test_the_mask_of_one_token_is_made_anew_in_a_dry_run() -> None:
    """Elsewhere it is made once."""
    assert mask_interface.flash_plus_mask(1, 1, 12, q_offset=11) is mask_interface.flash_plus_mask(
        1, 1, 13, q_offset=12
    )
    with FakeTensorMode():
        fake = mask_interface.flash_plus_mask(1, 1, 12, q_offset=11)
    assert isinstance(fake, FakeTensor)
    assert type(mask_interface.flash_plus_mask(1, 1, 12, q_offset=11)) is torch.Tensor


@torch.no_grad()
@pytest.mark.parametrize("mask", [False, True])
def test_on_meta(mask: bool) -> None:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM._from_config(build("llama", "flash_plus").config, attn_implementation="flash_plus")
        tokens = torch.zeros(2, 6, dtype=torch.long)
        said = dict(attention_mask=torch.ones(2, 6, dtype=torch.long)) if mask else {}
    assert model(tokens, **said).logits.is_meta


@torch.no_grad()
@pytest.mark.parametrize(
    "name,config", [("llama", {"is_causal": False}), ("llama", {})], ids=["bidirectional", "causal"]
)
def test_compiled(name: str, config: dict[str, Any]) -> None:
    """Compiled code does not see what a carrier carries: a bidirectional row is no packed one."""
    if "is_causal" in config and not hasattr(tf.LlamaConfig(is_causal=False), "is_causal"):
        pytest.skip("this Transformers has no bidirectional LLaMA")
    torch._dynamo.reset()
    said: dict[str, Any] = dict(input_ids=X, position_ids=POSITIONS, use_cache=False)
    compiled = torch.compile(build(name, "flash_plus", **config), backend="eager")
    assert_close(compiled(**said).logits, build(name, "eager", **config)(**said).logits)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("beside", ["nothing", "ones"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_compiled_documents(name: str, use_cache: bool, beside: str, told_by: str) -> None:
    """Masks of windows are dense inside of graphs, and masks beside padding have a key mask."""
    said: dict[str, Any] = dict(position_ids=POSITIONS) | (lengths() if told_by == "cu_seq_lens" else {})
    if beside == "ones":
        said["attention_mask"] = torch.ones_like(X)
    torch._dynamo.reset()
    compiled = torch.compile(build(name, "flash_plus"), backend="eager")
    assert_close(compiled(X, use_cache=use_cache, **said).logits, alone(name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_padding_is_no_document(name: str) -> None:
    """Positions restart behind padding on the left, too."""
    tokens, real = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    real[0, :4] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    torch._dynamo.reset()
    compiled = torch.compile(build(name, "flash_plus"), backend="eager")
    out, want = (
        model(tokens, attention_mask=real, position_ids=positions).logits for model in (compiled, build(name, "eager"))
    )
    assert_close(out[real.bool()], want[real.bool()])


def without_what_rides_along(model: Any, way: str) -> Any:
    """The model in a graph, or with layers that get copies of their masks, as on several devices."""
    if way == "compiled":
        torch._dynamo.reset()
        return torch.compile(model, backend="eager")

    def copy(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(copy, with_kwargs=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "copied mask"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
def test_chunks_without_what_rides_along(told_by: str, way: str) -> None:
    """In graphs, and where a mask is moved to another device, nobody tells how it counts positions."""
    config = _llama4(4)
    eager, model = (build_from(tf.Llama4ForCausalLM, config, name) for name in ("eager", "flash_plus"))
    said: dict[str, Any] = dict(position_ids=POSITIONS) | (lengths() if told_by == "cu_seq_lens" else {})
    plain = model(X, use_cache=False, **said).logits
    assert_close(without_what_rides_along(model, way)(X, use_cache=False, **said).logits, plain)
    # (Layers of Transformers 5.17 do not get position_ids.)
    if told_by == "cu_seq_lens" or TRANSFORMERS >= (5, 23):
        assert_close(plain, torch.cat([eager(X[:, :5]).logits, eager(X[:, 5:]).logits], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "copied mask"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_chunks_without_what_rides_along(side: str, way: str) -> None:
    """Positions restart behind padding, and count chunks from the row's beginning as the mask does."""
    real = torch.ones_like(X)
    real[:, :3] = 0
    real = real if side == "left" else real.flip(1)
    said = dict(attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0))
    eager, model = (build_from(tf.Llama4ForCausalLM, _llama4(4), name) for name in ("eager", "flash_plus"))
    got, want = (each(X, use_cache=False, **said).logits for each in (without_what_rides_along(model, way), eager))
    assert_close(got[real.bool()], want[real.bool()])


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "copied mask"])
@pytest.mark.parametrize("padding", [slice(9, None), slice(6, 7)], ids=["behind", "inside"])
@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
def test_documents_beside_padding(name: str, padding: slice, way: str) -> None:
    """Whoever pads says with the mask what is to be seen: positions that restart are not taken for documents, whatever
    became of the mask on its way."""
    real = torch.ones_like(X)
    real[:, padding] = 0
    said = dict(attention_mask=real, position_ids=torch.cat([torch.arange(5), torch.arange(7)])[None])
    if name == "llama4":
        plain, model = (build_from(tf.Llama4ForCausalLM, _llama4(4), "flash_plus") for _ in range(2))
    else:
        plain, model = build(name, "flash_plus"), build(name, "flash_plus")
    got, want = (each(X, use_cache=False, **said).logits for each in (without_what_rides_along(model, way), plain))
    assert_close(got[real.bool()], want[real.bool()])


@pytest.mark.parametrize("kind", ["causal", "window", "both directions", "padded"])
def test_dense_masks_of_graphs(kind: str) -> None:
    """Documents are kept apart where rows see themselves and no later key: else rows are not those of documents."""
    q = torch.empty(1, 1, 12, 4)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    mask = (
        distance >= 0
        if kind in ("causal", "padded")
        else (distance < 7) & (distance >= (0 if kind == "window" else -6))
    )
    if kind == "padded":
        mask = mask & (torch.arange(12) < 9)
    mask = mask[None, None]
    same = torch.arange(12)[:, None].lt(5) == torch.arange(12).lt(5)
    expected = mask & same if kind in ("causal", "window") else mask
    assert torch.equal(packing.dense_documents(mask, q, q, dict(position_ids=POSITIONS)), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_neo", "gptj", "falcon"])
def test_compiled_models_whose_classes_change(name: str) -> None:
    """They narrow masks themselves: those of graphs, too."""
    torch._dynamo.reset()
    model = build(name, "flash_plus")
    said: dict[str, Any] = dict(position_ids=POSITIONS, use_cache=False)
    plain = model(X, **said).logits
    assert_close(torch.compile(model, backend="eager")(X, **said).logits, plain)


def test_bytes_are_no_mask() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8.*4-D boolean"):
        _layer(torch.ones(1, 1, 12, 12, dtype=torch.uint8))
