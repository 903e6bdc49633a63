"""Rotary embeddings: telling forms of models' functions apart, and which calls the kernel gets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_flash_plus import rotary
from hf_flash_plus.rotary import FORMS, Form


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).reshape(x.shape)


def neox(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (halves(q) * sin), (k * cos) + (halves(k) * sin)


def in_float32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin, dtype = cos.unsqueeze(1), sin.unsqueeze(1), q.dtype
    q, k = q.float(), k.float()
    return ((q * cos) + (pairs(q) * sin)).to(dtype), ((k * cos) + (pairs(k) * sin)).to(dtype)


def partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    n = cos.shape[-1]
    turned = neox(q[..., :n], k[..., :n], cos, sin)
    return torch.cat((turned[0], q[..., n:]), -1), torch.cat((turned[1], k[..., n:]), -1)


def test_functions_are_told_by_what_they_compute() -> None:
    assert rotary.find_form(neox) == Form()
    assert rotary.find_form(partial) == Form(partial=True)
    assert rotary.find_form(in_float32) == Form(interleaved=True, upcast=True, cast=True, one_gradient=True)


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return neox(q * (1 + 2**-12), k, cos, sin)


def keys_left(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return neox(q, k, cos, sin)[0], k


def other_sign(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return neox(q, k, cos, -sin)


def no_gradient(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return neox(q + (q.detach() - q), k, cos, sin)


def fails(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no")


@pytest.mark.parametrize("function", [scaled, keys_left, other_sign, no_gradient, fails], ids=lambda f: f.__name__)
def test_what_computes_something_else_has_no_form(function: Any) -> None:
    assert rotary.find_form(function) is None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "".join(str(int(x)) for x in form))
def test_every_form_is_told_from_the_others(form: Form) -> None:
    assert rotary.find_form(rotary._by(form)) == form


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_forms_are_found_without_gradients_too(mode: Any) -> None:
    want = rotary.find_form(in_float32)
    with mode():
        assert rotary.find_form(in_float32) == want


def call(**changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = dict(
        q=torch.zeros(2, 3, 5, 8), k=torch.zeros(2, 1, 5, 8), cos=torch.zeros(2, 5, 8), sin=torch.zeros(2, 5, 8)
    )
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    return tuple(tensors.values())


PARTIAL, CAST, UPCAST = Form(partial=True), Form(cast=True), Form(upcast=True, cast=True)
half, bf16 = Tensor.half, Tensor.bfloat16


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        (Form(), {}),
        (Form(), dict.fromkeys(("q", "k", "cos", "sin"), half)),
        (Form(), dict.fromkeys(("cos", "sin"), lambda x: x[:1])),
        (PARTIAL, dict.fromkeys(("cos", "sin"), lambda x: x[..., :6])),
        (CAST, dict.fromkeys(("q", "k"), bf16)),
        (Form(), dict.fromkeys(("q", "k"), half)),
        (CAST, dict.fromkeys(("q", "k"), bf16) | dict.fromkeys(("cos", "sin"), half)),
        (UPCAST, dict.fromkeys(("cos", "sin"), bf16)),
        (Form(), {"q": lambda x: x.requires_grad_()}),
        (Form(), {"q": lambda x: torch.zeros(2, 5, 3, 8).transpose(1, 2)}),
    ],
)
def test_served(form: Form, changes: dict[str, Any]) -> None:
    assert rotary.serves(*call(**changes), form)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        (Form(), dict.fromkeys(("cos", "sin"), lambda x: x[..., :6])),
        (Form(), {"k": half}),
        (Form(), {"sin": half}),
        (UPCAST, dict.fromkeys(("q", "k"), Tensor.double)),
        (UPCAST, dict.fromkeys(("cos", "sin"), Tensor.double)),
        (Form(), dict.fromkeys(("q", "k", "cos", "sin"), Tensor.double)),
        (PARTIAL, dict.fromkeys(("cos", "sin"), lambda x: torch.zeros(2, 5, 10))),
        (PARTIAL, dict.fromkeys(("cos", "sin"), lambda x: x[..., :5])),
        (PARTIAL, dict.fromkeys(("cos", "sin"), lambda x: x[..., :0])),
        (Form(), {"cos": lambda x: x.requires_grad_()}),
        (Form(), {"cos": lambda x: x[:, :4]}),
        (Form(), dict.fromkeys(("cos", "sin"), lambda x: x[:, :1])),
        (Form(), dict.fromkeys(("cos", "sin"), lambda x: torch.zeros(3, 5, 8))),
        (Form(), dict.fromkeys(("cos", "sin"), lambda x: x[0])),
        (Form(), {"k": lambda x: x[:, :, :4]}),
        (Form(), {"k": lambda x: torch.zeros(2, 1, 5, 4)}),
        (Form(), {"k": lambda x: x[:, :0]}),
        (Form(), {"q": lambda x: torch.zeros(2, 3, 8, 5).transpose(2, 3)}),
        (Form(), {"q": torch.nn.Parameter}),
        (Form(), {"q": lambda x: x.to("meta")}),
        (Form(), {"k": lambda x: torch.zeros(1, 1, 5, 8)}),
        (Form(), {"k": lambda x: torch.zeros(2, 1, 8, 5).transpose(2, 3)}),
        (Form(), {"k": lambda x: torch.zeros(2, 5, 8)}),
        (Form(), {"k": torch.nn.Parameter}),
        (Form(), {"k": lambda x: x.to("meta")}),
        (Form(), {"cos": lambda x: torch.zeros(2, 8, 5).transpose(1, 2)}),
        (Form(), {"cos": lambda x: torch.nn.Parameter(x, requires_grad=False)}),
        (Form(), {"sin": lambda x: torch.zeros(2, 8, 5).transpose(1, 2)}),
        (Form(), {"sin": lambda x: torch.nn.Parameter(x, requires_grad=False)}),
        (Form(), {"sin": lambda x: x.requires_grad_()}),
        (Form(), {"sin": lambda x: x[:1]}),
        (Form(), {"sin": lambda x: x.to("meta")}),
    ],
)
def test_left_to_the_model(form: Form, changes: dict[str, Any]) -> None:
    assert not rotary.serves(*call(**changes), form)


def test_launched_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current: autograd's threads change it, and what they recompute is not to differ from forward."""
    kernel = pytest.importorskip("hf_flash_plus.kernels.rotary")
    current = [0]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(kernel.tiles, "device_info", lambda device: None)
    monkeypatch.setattr(kernel, "rotate", lambda *arguments: (current[-1], None, None))
    for index in (1, 0):
        q: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), shape=(2, 3, 5, 8), dtype=half)
        assert rotary._forward(q, q, q, q, Form())[0] == index
        assert current == [0]


class _Launches:
    """Stands in for a compiled kernel's launcher: what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes launches for tensors, on a device that is not there, with results of a dtype; and their arguments."""
    kernel = pytest.importorskip("hf_flash_plus.kernels.rotary")
    launches = _Launches()
    monkeypatch.setattr(kernel, "raw_stream", lambda device: 7)
    monkeypatch.setattr(kernel, "starter", lambda compiled, n_programs, stream: (launches, (n_programs, stream)))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    rotation = kernel.Rotation(kernel.tiles.DeviceInfo("sm90", 132), 8, 8, False, False, True, False)

    def make(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        return kernel.rotary_launch(rotation, *tensors, *(torch.empty_like(x, dtype=dtype) for x in tensors[:2]))

    return make, launches


@pytest.fixture
def ticket(launch: Any) -> Any:
    """A ticket for ``call()``, and its launches."""
    from hf_flash_plus.kernels.rotary import Ticket

    make, launches = launch
    return Ticket(make(*call()), object()), launches


def test_kernels_are_reused_where_all_that_they_are_specialised_by_is_known() -> None:
    kernel = pytest.importorskip("hf_flash_plus.kernels.rotary")
    for arch, reusable in (("sm90", True), ("gfx942", False)):  # on AMD sizes matter, too
        rotation = kernel.Rotation(kernel.tiles.DeviceInfo(arch, 132), 8, 8, False, False, True, False)
        assert kernel._plan(rotation).reusable is (reusable and hasattr(kernel.rotate_query_and_key, "warmup"))


def test_what_is_compiled_depends_on_every_dtype() -> None:
    """Of the same queries, results are float32 by one form and the queries' dtype by another."""
    kernel = pytest.importorskip("hf_flash_plus.kernels.rotary")
    rotation = kernel.Rotation(kernel.tiles.DeviceInfo("sm90", 132), 8, 8, False, False, False, False)

    def key(dtype: torch.dtype, table: torch.dtype, out: torch.dtype) -> Any:
        q, k, cos, sin = call()
        tensors = (q.to(dtype), k.to(dtype), cos.to(table), sin.to(table), q.to(out), k.to(out))
        return kernel.rotary_launch(rotation, *tensors).key

    both = (torch.float16, torch.float32)
    assert len({key(*dtypes) for dtypes in itertools.product(both, both, both)}) == 8


def test_a_ticket_launches_with_the_addresses_of_the_call(ticket: Any) -> None:
    serve, launches = ticket
    tensors = call()
    q_out, k_out = serve(*tensors)
    assert q_out.shape == tensors[0].shape and k_out.shape == tensors[1].shape and q_out.dtype == torch.float32
    (arguments,) = launches.calls
    n_programs, stream, *pointers = arguments[:8]
    assert (n_programs, stream) == (2 * 5 * 2, 7)
    assert pointers == [x.data_ptr() for x in (*tensors, q_out, k_out)]
    assert arguments[8:11] == tensors[0].stride()[:3] and 5 in arguments


@pytest.mark.parametrize(
    "changes",
    [
        {"q": lambda x: torch.zeros(2, 4, 5, 8)},
        {"k": lambda x: torch.zeros(2, 5, 1, 8).transpose(1, 2)},
        {"cos": lambda x: x[:1]},
        {"sin": lambda x: torch.zeros(2, 5, 16)[..., :8]},
        dict.fromkeys(("q", "k"), half),
        dict.fromkeys(("cos", "sin"), half),
        {"q": lambda x: torch.zeros(x.numel() + 1)[1:].view(x.shape)},
    ],
)
def test_a_ticket_declines_what_differs(changes: dict[str, Any], ticket: Any) -> None:
    serve, launches = ticket
    assert serve(*call(**changes)) is None and not launches.calls


@pytest.mark.parametrize("name", ["q", "k", "cos", "sin"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., :6],
        lambda x: torch.zeros(*x.shape[:-1], 16)[..., :8],
        half,
        lambda x: x.to("meta"),
        lambda x: torch.zeros(x.numel() + 1)[1:].view(x.shape),
    ],
    ids=["shape", "strides", "dtype", "device", "alignment"],
)
def test_a_ticket_looks_at_each_tensor(change: Any, name: str, ticket: Any) -> None:
    serve, launches = ticket
    assert serve(*call(**{name: change})) is None and not launches.calls


def test_results_by_ticket_are_those_of_its_launch(launch: Any) -> None:
    """Their dtype, the strides of each, and the constexprs that Triton's launcher takes last."""
    from hf_flash_plus.kernels.rotary import Ticket

    make, launches = launch
    tensors = call(q=half, k=lambda x: torch.zeros(2, 5, 4, 8).half().transpose(1, 2), cos=lambda x: x[:1])
    built = make(*tensors, dtype=torch.float32)
    found = Ticket(built, object())(*tensors)
    assert found is not None
    for one, other in zip(found, built.arguments[4:6]):
        assert (one.dtype, one.shape, one.stride()) == (torch.float32, other.shape, other.stride())
    assert found[1].stride() == (160, 8, 32, 1)
    assert launches.calls[0][8:] == (*built.arguments[6:], *built.plan.constexprs)


def test_tickets_are_of_launches_that_can_be_repeated(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flash_plus.kernels.rotary import Ticket

    make, _ = launch
    built = make(*call())
    monkeypatch.setattr(built.plan, "reusable", True)
    monkeypatch.setattr(built.plan, "compiled", {})
    assert Ticket.of(built) is None  # it did not take place
    built.plan.remember(built.key, object())
    assert Ticket.of(built) is not None
    odd = make(*call(sin=lambda x: torch.zeros(x.numel() + 1)[1:].view(x.shape)))
    assert odd.key == built.key and Ticket.of(odd) is None  # its loads are narrower
    monkeypatch.setattr(built.plan, "reusable", False)
    assert Ticket.of(built) is None


@pytest.mark.parametrize(("name", "value"), [("raw_stream", lambda device: 8), ("hooked", lambda: True)])
def test_a_ticket_declines_another_stream_and_watched_launches(
    name: str, value: Any, ticket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, launches = ticket
    monkeypatch.setattr(f"hf_flash_plus.kernels.rotary.{name}", value)
    assert serve(*call()) is None and not launches.calls


def test_a_ticket_declines_on_another_device(ticket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    assert ticket[0](*call()) is None


def test_recalled_without_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_last", {Form(): lambda *tensors: tensors[:2]})
    tensors = call()
    assert rotary.recall(*tensors, Form()) == tensors[:2]
    assert rotary.recall(*tensors, PARTIAL) is None
    assert rotary.recall(*call(q=torch.nn.Parameter), Form()) is None
    for name in ("q", "k", "cos", "sin"):
        watched = call(**{name: lambda x: x.requires_grad_()})
        assert rotary.recall(*watched, Form()) is None
        with torch.no_grad():
            assert rotary.recall(*watched, Form()) is not None


def test_the_last_call_without_gradients_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_last", {})
    tickets: list[Any] = [lambda *tensors: ("first",), lambda *tensors: ("second",), None]
    monkeypatch.setattr(rotary, "_forward", lambda q, k, *_: (q, k, tickets.pop(0)))
    tensors = call()
    for recalled in ("first", "second", "second"):
        rotary.rotate(*tensors, Form())
        assert rotary.recall(*tensors, Form()) == (recalled,) and rotary.recall(*tensors, PARTIAL) is None
