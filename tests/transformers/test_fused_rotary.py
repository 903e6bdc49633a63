"""``fuse_rotary``: which models, the same numbers, nobody else's models, and undone without a trace.

The kernel is replaced by torch's operations here (``tests/kernels/interpreter`` and ``tests/gpu`` run it): these tests
are about who is served by it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama import modeling_llama

import hf_flash_plus
from hf_flash_plus import fuse_rotary, rotary
from hf_flash_plus.integration import fused_rotary

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
#: Model type, more of its configuration, and how often its layers rotate in a forward.
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 8},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "cohere": {},
    "glm": {"head_dim": 8},
    "olmo2": {},
    "helium": {"head_dim": 8},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"]},
}


def build(kind: str = "llama", implementation: str = "flash_plus", **more: Any) -> Any:
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind], **more})
    return tf.AutoModel.from_config(config, attn_implementation=implementation)


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[rotary.Form]:
    """As on a GPU: the forms of the calls that our kernel got."""
    calls: list[rotary.Form] = []

    def rotate(q: Any, k: Any, cos: Any, sin: Any, form: rotary.Form) -> Any:
        calls.append(form)
        return rotary.reference(q, cos, sin, form), rotary.reference(k, cos, sin, form)

    monkeypatch.setattr(rotary, "rotate", rotate)
    monkeypatch.setattr(fused_rotary._TRITON, "runs_on", lambda tensor: True)
    monkeypatch.setattr(fused_rotary._TRITON, "unavailable_reason", lambda: None)
    monkeypatch.setattr(fused_rotary, "_memo", None)
    return calls


def step(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    hidden = model(ids()).last_hidden_state
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_is_served_and_nothing_changes(kind: str, served: list[rotary.Form]) -> None:
    model = build(kind)
    want = step(model)
    assert not served
    with fuse_rotary(model) as handle:
        found = step(model)
        assert len(handle.fused) == len(served) == 2 and not handle.left
    assert len(want) == len(found) and all(torch.equal(a, b) for a, b in zip(want, found))
    step(model)
    assert len(served) == 2


def test_other_models_of_the_class_are_left_alone(served: list[rotary.Form]) -> None:
    mine, other = build(), build(implementation="sdpa")
    with fuse_rotary(mine):
        other(ids())
        assert not served
        mine(ids())
        assert len(served) == 2


def test_handles_are_undone_in_any_order(served: list[rotary.Form]) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    one, two = build(), build()
    handles = fuse_rotary(one), fuse_rotary(two)
    assert modeling_llama.apply_rotary_pos_emb is not original
    handles[0].remove()
    handles[0].remove()
    one(ids())
    assert not served
    two(ids())
    assert len(served) == 2
    handles[1].remove()
    assert modeling_llama.apply_rotary_pos_emb is original and not fused_rotary._Replaced._all
    assert not two.rotary_emb._forward_hooks


def test_an_interruption_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = modeling_llama.apply_rotary_pos_emb, build()

    def interrupted(hook: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.rotary_emb, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuse_rotary(model)
    assert modeling_llama.apply_rotary_pos_emb is original and not fused_rotary._Replaced._all


def test_a_function_that_somebody_else_replaced_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = fuse_rotary(build())
    theirs = lambda *args: None  # noqa: E731
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
    handle.remove()
    assert modeling_llama.apply_rotary_pos_emb is theirs
    monkeypatch.undo()
    modeling_llama.apply_rotary_pos_emb = fused_rotary._original(modeling_llama.apply_rotary_pos_emb)


def test_fused_again_after_somebody_elses_replacement(
    served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over theirs, which comes back, whoever is undone first."""
    original = modeling_llama.apply_rotary_pos_emb

    def theirs(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return original(q, k, cos, sin)

    one, two = build(), build()
    first = fuse_rotary(one)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
    with fuse_rotary(two):
        first.remove()
        two(ids())
        assert len(served) == 2
        with fuse_rotary(one):
            one(ids())
            assert len(served) == 4
        two(ids())
        assert len(served) == 6
    assert modeling_llama.apply_rotary_pos_emb is theirs and not fused_rotary._Replaced._all


def test_a_wrapper_of_ours_is_judged_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with fuse_rotary(build()):
        ours = modeling_llama.apply_rotary_pos_emb

        @functools.wraps(ours)
        def theirs(*args: Any) -> Any:
            return tuple(2 * x for x in ours(*args))

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
        with pytest.raises(ValueError, match="computes something that the kernel does not"):
            fuse_rotary(build())
        monkeypatch.undo()


def test_ours_left_behind_is_not_fused_twice(served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody put our function back after it was undone."""
    original, model = modeling_llama.apply_rotary_pos_emb, build()
    with fuse_rotary(model):
        ours = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ours)
    with fuse_rotary(model):
        model(ids())
        assert len(served) == 2
    assert modeling_llama.apply_rotary_pos_emb is original


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_too(copied: Callable[[Any], Any], served: list[rotary.Form]) -> None:
    model = build()
    with fuse_rotary(model):
        other = copied(model)
        other(ids())
        assert len(served) == 2
    other(ids())
    assert len(served) == 2


def test_generation(served: list[rotary.Form]) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="flash_plus").eval()
    options = dict(max_new_tokens=5, do_sample=False)
    want = model.generate(ids(), **options)
    with fuse_rotary(model):
        assert torch.equal(model.generate(ids(), **options), want)
    assert len(served) == 2 * 5


def test_recomputed_layers_are_served(served: list[rotary.Form]) -> None:
    model = build().train()
    model.gradient_checkpointing_enable()
    with fuse_rotary(model):
        step(model)
    assert len(served) == 2 * 2


def test_compiled_code_keeps_the_models_function(served: list[rotary.Form]) -> None:
    model = build().eval()
    with torch.no_grad(), fuse_rotary(model):
        want = model(ids()).last_hidden_state
        assert len(served) == 2
        found = torch.compile(model, fullgraph=True, backend="eager")(ids()).last_hidden_state
        assert len(served) == 2
    torch.testing.assert_close(found, want)


def test_compiled_layers_keep_the_models_function(served: list[rotary.Form]) -> None:
    """Also with the marked tables of a model that is not compiled."""
    model = build().eval()
    with torch.no_grad(), fuse_rotary(model):
        model.layers[0].compile(fullgraph=True, backend="eager")
        model(ids())
    assert len(served) == 1


def test_the_settings_path_decides_at_call_time(served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with fuse_rotary(model):
        monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
        model(ids())
        assert not served
        monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")
        model(ids())
        assert len(served) == 2


def test_transforms_keep_the_models_function(served: list[rotary.Form]) -> None:
    model = build(implementation="eager")
    with fuse_rotary(model):
        embeddings = torch.randn(3, 1, 7, 32)
        torch.func.vmap(lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state)(embeddings)
    assert not served


def _fx(rotated: Callable[..., Any], q: torch.Tensor) -> Any:
    make_fx(rotated)(q)


def _jit(rotated: Callable[..., Any], q: torch.Tensor) -> Any:
    torch.jit.trace(rotated, (q,), check_trace=False)


def _forward_mode(rotated: Callable[..., Any], q: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(rotated(forward_ad.make_dual(q, torch.ones_like(q)))[0]).tangent is not None


def test_without_triton_the_models_function_is_kept(served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rotary._TRITON, "unavailable_reason", lambda: "triton is too old")
    model = build()
    with fuse_rotary(model):
        model(ids())
    assert not served


def test_devices_and_dtypes_that_the_kernel_does_not_take(
    served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build().double()
    with fuse_rotary(model):
        model(ids())
        monkeypatch.setattr(fused_rotary._TRITON, "runs_on", lambda tensor: False)
        model.float()(ids())
    assert not served


def test_a_decorated_forward_is_looked_into() -> None:
    class Attention(torch.nn.Module):
        @torch.no_grad()
        def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
            return apply_rotary_pos_emb(q, k, cos, sin)  # noqa: F821

    namespace = fused_rotary._namespace(build().layers[0].self_attn)
    assert namespace is vars(modeling_llama)
    assert fused_rotary._namespace(Attention()) is None  # these globals have no such function
    forward = inspect.unwrap(Attention.forward)
    forward.__globals__["apply_rotary_pos_emb"] = modeling_llama.apply_rotary_pos_emb
    try:
        assert fused_rotary._namespace(Attention()) is forward.__globals__
    finally:
        del forward.__globals__["apply_rotary_pos_emb"]


def test_ours_looks_like_the_models_function() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    with fuse_rotary(build()):
        ours = modeling_llama.apply_rotary_pos_emb
        assert (ours.__name__, ours.__module__, ours.__doc__) == (
            original.__name__, original.__module__, original.__doc__,
        )  # fmt: skip
        assert inspect.signature(ours) == inspect.signature(original)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("watch", [_fx, _jit, _forward_mode], ids=lambda f: f.__name__)
def test_who_watches_torchs_operations_sees_them(watch: Callable[..., Any], served: list[rotary.Form]) -> None:
    """A launch is no operation of torch: a tracer would record outputs that nobody writes, and tangents would end."""
    model, q, k, cos, sin = build(), *(torch.randn(2, *shape) for shape in ((3, 7, 8), (1, 7, 8), (7, 8), (7, 8)))
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, sin))
        watch(lambda q: modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), q)
        assert not served
        modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        assert len(served) == 1


def test_a_cpu_without_the_interpreter_keeps_the_models_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "rotate", lambda *args: pytest.fail("the kernel was launched"))
    model = build()
    with fuse_rotary(model):
        model(ids())


@pytest.mark.parametrize(("heads", "kernel"), [(1, True), (2, True), (-2, False)])
def test_the_dimension_of_heads(heads: int, kernel: bool, served: list[rotary.Form]) -> None:
    q, k, cos, sin = torch.randn(2, 7, 7, 8), torch.randn(2, 7, 7, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=heads)
    model = build()
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, sin))
        found = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=heads)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert bool(served) is kernel


def test_queries_of_less_dimensions_are_the_models(served: list[rotary.Form]) -> None:
    model, x, cos = build(), torch.randn(7, 8), torch.randn(2, 7, 8)
    want = modeling_llama.apply_rotary_pos_emb(x, x, cos, cos, unsqueeze_dim=2)
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, cos))
        found = modeling_llama.apply_rotary_pos_emb(x, x, cos, cos, unsqueeze_dim=2)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1]) and not served


def test_calls_in_another_form_are_the_models(served: list[rotary.Form]) -> None:
    """One of Transformers' functions rotates queries alone, with the tables by name."""
    model, x, cos, sin = build(), torch.randn(2, 3, 7, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    want = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, sin))
        for found in (
            modeling_llama.apply_rotary_pos_emb(x, x, cos=cos, sin=sin),
            modeling_llama.apply_rotary_pos_emb(q=x, k=x, cos=cos, sin=sin),
            modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, 1),
        ):
            assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert not served


def test_arguments_that_the_function_does_not_take_stay_an_error(served: list[rotary.Form]) -> None:
    model, x, cos = build(), torch.randn(2, 3, 7, 8), torch.randn(2, 7, 8)
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, cos))
        with pytest.raises(TypeError, match="offset"):
            modeling_llama.apply_rotary_pos_emb(x, x, cos, cos, offset=1)


def test_a_function_for_one_layout_does_not_take_another(
    served: list[rotary.Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, x, cos = modeling_llama.apply_rotary_pos_emb, torch.randn(2, 7, 7, 8), torch.randn(2, 7, 8)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: llama(q, k, cos, sin))
    model = build()
    with fuse_rotary(model):
        fused_rotary._mark(model, (), (cos, cos))
        with pytest.raises(TypeError, match="unsqueeze_dim"):
            modeling_llama.apply_rotary_pos_emb(x, x, cos, cos, unsqueeze_dim=2)


@pytest.mark.parametrize(
    "output",
    [
        lambda cos: None,
        lambda cos: {},
        lambda cos: (3.0, 4.0),
        lambda cos: cos,
        lambda cos: [cos, cos],
        lambda cos: (cos, cos, cos),
    ],
)
def test_what_is_no_pair_of_tables_is_not_marked(output: Any, served: list[rotary.Form]) -> None:
    model, x, cos = build(), torch.randn(2, 3, 7, 8), torch.randn(2, 7, 8)
    with fuse_rotary(model):
        fused_rotary._mark(model, (), output(cos))
        modeling_llama.apply_rotary_pos_emb(x, x, cos, cos)
    assert not served


def test_functions_with_other_arguments_are_left() -> None:
    llama = modeling_llama.apply_rotary_pos_emb
    assert fused_rotary._form(llama) == rotary.Form()
    assert fused_rotary._form(lambda q, k, cos, sin, unsqueeze_dim=1: llama(q, k, cos, sin)) == rotary.Form()
    assert fused_rotary._form(lambda q, k, cos, sin, unsqueeze_dim=-3: llama(q, k, cos, sin)) is None
    assert fused_rotary._form(lambda x, y, cos, sin: llama(x, y, cos, sin)) is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tf.AutoModel.from_config(tf.BertConfig(**{**SIZES, "num_hidden_layers": 1})), "no module in it calls"),
        (lambda: torch.nn.Linear(2, 2), "no module in it calls"),
        (
            lambda: tf.AutoModel.from_config(tf.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)),
            "no rotary embedding module|computes something",
        ),
    ],
)
def test_nothing_to_fuse_is_an_error_that_says_why(model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"fuse_rotary found nothing to fuse in \w+: .*({reason})"):
        fuse_rotary(model())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        fuse_rotary("llama")


def test_what_is_left_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    other = build("qwen2")
    both = torch.nn.ModuleDict({"one": model, "two": other})
    namespace = fused_rotary._namespace(other.layers[0].self_attn)
    assert namespace is not None

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return q * 2, k

    monkeypatch.setitem(namespace, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    with fuse_rotary(both) as handle:
        assert handle.fused == ["one.layers.0.self_attn", "one.layers.1.self_attn"]
        assert [name for name, _ in handle.left] == ["two.layers.0.self_attn", "two.layers.1.self_attn"]
        assert str(handle).splitlines()[0] == "fused the rotary embedding of 2 attention modules"
        assert "left two.layers.0.self_attn: " in str(handle)


def test_public() -> None:
    assert {"fuse_rotary", "FusedRotary"} <= set(hf_flash_plus.__all__)
