"""Encoders that compute no padding: the same numbers for real tokens, fewer tokens in every layer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import hf_flash_plus
from hf_flash_plus.integration import mask_interface
from hf_flash_plus.integration.skip_padding import FAMILIES

LENGTHS = {"right": [8, 5, 1], "left": [0, 3, 7], "both": [2, 0, 3], "none": [8, 8, 8], "empty": [8, 0, 3]}


def padding(side: str) -> torch.Tensor:
    mask = torch.ones(3, 8, dtype=torch.long)
    for row, n in zip(mask, LENGTHS[side]):
        if side == "left":
            row[:n] = 0
        elif side == "both":
            row[:n] = 0
            row[6 - n :] = 0
        else:
            row[n:] = 0
    return mask


def build(family: str, head: str = "AutoModel", **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = tf.AutoConfig.for_model(family, **sizes, pad_token_id=1, max_position_embeddings=32, type_vocab_size=1)
    return getattr(tf, head).from_config(config, **more).eval()


def ids() -> torch.Tensor:
    return torch.randint(2, 60, (3, 8), generator=torch.Generator().manual_seed(0))


def widths(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The shapes that come into the second layer, from now on."""
    seen: list[tuple[int, ...]] = []
    base = next(module for module in model.modules() if hasattr(module, "encoder"))
    base.encoder.layer[1].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@pytest.mark.parametrize("looks", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("side", LENGTHS)
def test_real_tokens_are_what_eager_gives(side: str, looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_interface, "LOOK_AT_PADDING", frozenset({"cpu"} if looks else ()))
    mask = padding(side)
    ends = (mask * torch.arange(1, 9)).amax(dim=1)
    kept = torch.arange(8) < ends[:, None]
    found = []
    for name in ("eager", "flash_plus"):
        model = build("bert", attn_implementation=name)
        if name == "flash_plus":
            hf_flash_plus.skip_padding(model)
            seen = widths(model)
        hidden = model(ids(), attention_mask=mask).last_hidden_state
        (hidden[mask.bool()] * torch.linspace(-1, 1, 32)).sum().backward()
        found.append([hidden[kept if side != "empty" else mask.bool()].detach(), *(
            p.grad for p in model.parameters() if p.grad is not None)])  # fmt: skip
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert seen == [(3, 8) if kept.all() else (1, int(ends.sum()))]
    assert not hidden[~kept].any()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str) -> None:
    """With a head, in training mode without dropout, with gradient checkpointing and without."""
    mask = padding("right")
    losses, grads = [], []
    for name, checkpoints in (("eager", False), ("flash_plus", False), ("flash_plus", True)):
        model = build(family, "AutoModelForSequenceClassification", attn_implementation=name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "flash_plus":
            hf_flash_plus.skip_padding(model)
            seen = widths(model)
        if checkpoints:
            model.gradient_checkpointing_enable()
        loss = model(ids(), attention_mask=mask, labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert set(seen) == {(1, 14)}
    for loss, gradients in zip(losses[1:], grads[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(gradients, grads[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_nothing_is_left_out_where_it_would_show() -> None:
    model = build("bert", attn_implementation="flash_plus")
    seen = widths(model)
    hf_flash_plus.skip_padding(model)
    mask = padding("right")
    hidden = model(ids(), attention_mask=mask, output_hidden_states=True).hidden_states
    assert all(state.shape == (3, 8, 32) for state in hidden)
    holes = mask.clone()
    holes[0, 3] = 0
    model(ids(), attention_mask=holes)
    model.set_attn_implementation("sdpa")
    model(ids(), attention_mask=mask)
    assert seen == [(3, 8)] * 3
    model.set_attn_implementation("flash_plus")
    assert model(ids(), attention_mask=mask, return_dict=False)[0].shape == (3, 8, 32)
    assert seen[3:] == [(1, 14)]


def test_it_can_be_undone_and_copied() -> None:
    model = build("bert", attn_implementation="flash_plus")
    seen = widths(model)
    with hf_flash_plus.skip_padding(model):
        copied = copy.deepcopy(model)
        model(ids(), attention_mask=padding("right"))
    model(ids(), attention_mask=padding("right"))
    assert seen == [(1, 14), (3, 8)]
    copied(ids(), attention_mask=padding("right"))
    assert seen[2:] == [(1, 14)]


def test_models_without_such_an_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found no encoder in Linear.*bert"):
        hf_flash_plus.skip_padding(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        hf_flash_plus.skip_padding(None)


@torch.no_grad()
def test_twice_on_one_model() -> None:
    mask = padding("right")
    model = build("bert", attn_implementation="flash_plus")
    hf_flash_plus.skip_padding(model)
    once = model(ids(), attention_mask=mask).last_hidden_state
    with hf_flash_plus.skip_padding(model):
        assert torch.equal(model(ids(), attention_mask=mask).last_hidden_state, once)
    assert torch.equal(model(ids(), attention_mask=mask).last_hidden_state, once)


@torch.no_grad()
@pytest.mark.parametrize("chunk", (2, 4, 7))
def test_layers_that_cut_their_feed_forward_part(chunk: int) -> None:
    """They want lengths of a multiple: 14 tokens of 24 are taken together where they are one."""
    mask = padding("right")
    assert int(mask.sum()) == 14
    model = build("bert", attn_implementation="flash_plus")
    plain = model(ids(), attention_mask=mask).last_hidden_state
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = chunk
    hf_flash_plus.skip_padding(model)
    got = model(ids(), attention_mask=mask).last_hidden_state if 8 % chunk == 0 or 14 % chunk == 0 else plain
    torch.testing.assert_close(got[mask.bool()], plain[mask.bool()])
