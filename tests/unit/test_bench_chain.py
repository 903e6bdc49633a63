"""Decoding timed as many layers in a row: how many, that each layer is checked, and what cannot be recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from hf_flash_plus.bench import chain, kernels, report, timing
from hf_flash_plus.bench import config as configuration
from hf_flash_plus.bench.config import Case, ConfigError
from hf_flash_plus.bench.kernels import run_kernels
from hf_flash_plus.bench.peers import PEERS, Peer, Prepared
from hf_flash_plus.bench.problem import Problem

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs" / "bench"
L2 = 50 * 2**20  # an H200's

DECODE: dict[str, Any] = {
    "kind": "kernels",
    "dtype": "fp32",
    "baseline": "sdpa",
    "peers": ["sdpa", "reference"],
    "layers": 3,
    "budget_s": 0.01,
    "rounds": 2,
    "rest_s": 0.0,
    "cases": [{"batch": 2, "seqlen": 24, "seqlen_q": 1, "heads": 4, "head_dim": 16, "gqa": 2}],
}


def ignore(_: Any) -> None:
    pass


def run(change: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a run, by peer, with ratios."""
    rows = run_kernels(configuration.parse({**DECODE, **change}), CPU, ignore, ignore)
    report.add_ratios(rows, "sdpa")
    return {row["peer"]: row for row in rows}


def peer(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Problem, Prepared], Callable[[], Tensor]]
) -> None:
    """A peer like sdpa whose call is changed."""
    right = PEERS["sdpa"].build

    def build(problem: Problem, training: bool) -> Prepared:
        prepared = right(problem, training)
        return Prepared(prepared.inputs, prepared.dout, change(problem, prepared), prepared.dense)

    monkeypatch.setitem(PEERS, name, Peer(name, "", build))


def test_layers_share_the_block_table() -> None:
    """As in a model: one table and one set of row intervals for all layers, whose keys and values are their own."""
    case = Case(2, 64, 4, 2, 16, seqlen_q=1, mask="causal", page_size=16)
    first = Problem(case, "fp32", CPU)
    second = Problem(case, "fp32", CPU, 1, first)
    assert second.pages[2] is first.pages[2] and second.page_intervals is first.page_intervals
    for problem in (first, second):
        k_pages, _, table = problem.pages
        assert torch.equal(k_pages[table.long()].flatten(1, 2), problem.k)
    assert not torch.equal(first.k, second.k)


# --- how many ---


@pytest.mark.parametrize(
    "batch,seqlen,head_dim,want",
    [
        (1, 512, 64, (64, 64)),  # 1 MiB: three times the L2 would be 150 layers
        (1, 2048, 128, (32, 32)),  # 8 MiB: 19 would do
        (1, 1024, 128, (38, 38)),  # 4 MiB
        (64, 4096, 128, (12, 12)),  # 1 GiB: memory holds no more
        (64, 8192, 128, (8, 6)),
        (64, 32768, 128, (8, 1)),
    ],
)
def test_automatic_length(batch: int, seqlen: int, head_dim: int, want: tuple[int, int]) -> None:
    assert chain.length("auto", Case(batch, seqlen, 32, 8, head_dim, seqlen_q=1), 2, L2) == want


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cases_fit_and_are_cold(path: Path) -> None:
    """Of what the shipped files ask for: 8 to 64 layers, caches of three times the L2 together or 64, and memory."""
    config = configuration.load(path)
    for case in config.cases if config.layers != 1 else ():
        if not case.decoding:
            continue
        layers, caches = chain.length(config.layers, case, 2, L2)
        assert 8 <= layers <= 64 and 1 <= caches <= layers
        assert caches * case.kv_bytes(2) >= 3 * L2 or caches == 64
        assert 2 * caches * 2 * case.batch * case.seqlen * case.kv_heads * case.head_dim * 2 <= 32 * 2**30
    if path.stem == "decode":
        assert config.layers == "auto"


def test_padding_is_not_counted_as_read() -> None:
    """Of a padded batch, two keys in three are read: more layers are needed than of a full one."""
    sizes = (4, 256, 32, 8, 128)
    full, padded = (chain.length("auto", Case(*sizes, seqlen_q=1, mask=mask), 2, L2) for mask in ("causal", "padded"))
    assert full.layers < padded.layers


def test_wanted_length(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 512, 32, 8, 128, seqlen_q=1)
    assert chain.length(5, case, 2, L2) == (5, 5) and chain.length(1, case, 2, L2) == (1, 1)
    monkeypatch.setattr(chain, "CACHE_BYTES", 5 * 2**20)
    assert chain.length(5, case, 2, L2) == (5, 2)


@pytest.mark.parametrize("layers", [0, -3, "many", 2.5, True, None, [8]], ids=str)
def test_lengths_that_are_none(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers must be"):
        configuration.parse({**DECODE, "layers": layers})


def test_layers_of_other_kinds() -> None:
    with pytest.raises(ConfigError, match="layers goes with kind kernels"):
        configuration.parse({**DECODE, "kind": "memory"})
    case = {"batch": 2, "seqlen": 24, "heads": 4, "head_dim": 16}
    with pytest.raises(ConfigError, match="no case is a decoding case"):
        configuration.parse({**DECODE, "cases": [case]})
    assert configuration.parse({**DECODE, "layers": "auto", "cases": [case, *DECODE["cases"]]}).layers == "auto"
    assert configuration.parse({key: DECODE[key] for key in ("kind", "peers", "cases")}).layers == 1


# --- timing ---


def test_a_chain_is_timed_by_the_call() -> None:
    """The time of all its calls over their number; the host's time is that of one call."""
    ran: list[str] = []
    queued: list[tuple[str, float]] = []

    class Clock(timing.HostClock):
        def sample(self, call: Any, repeats: int, host_ms: float) -> list[float]:
            queued.append((call(), host_ms))
            return [6.0 if call() == "all" else 0.5] * repeats

    def all_of_them() -> str:
        ran.append("all")
        return "all"

    calls = {"row": timing.Chain(all_of_them, 3, lambda: "one"), "alone": lambda: "one"}
    found = timing.measure(calls, Clock(), rounds=2, budget_s=0.05, rest_s=0.0)
    assert (found["row"].median_ms, found["row"].rounds_ms, found["row"].host_us) == (2.0, [2.0, 2.0], 500.0)
    assert (found["alone"].median_ms, found["alone"].host_us) == (0.5, 500.0) and "all" in ran
    assert found["row"].samples == 4 < found["alone"].samples  # 12 ms of the budget are two chains
    # Without a time: the host's is asked for. The device sleeps while the host queues all of a chain.
    assert {(name, host_ms) for name, host_ms in queued if host_ms} == {("all", 6.0), ("one", 0.5)}


# --- the check of each layer ---


def test_layers_have_caches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's call reads its own tensors, in the order of the layers; with fewer caches in turns."""
    order: list[float] = []

    def watched(problem: Problem, prepared: Prepared) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            order.append(problem.k.sum().item())
            return prepared.forward()

        return forward

    peer(monkeypatch, "watched", watched)
    row = run({"peers": ["sdpa", "watched"]})["watched"]
    assert row["status"] == "ok" and row["layers"] == 3 and "note" not in row
    first = order[0]  # the call alone, then two chains for the check
    assert order[1:4] == order[4:7] and order[1] == first and len(set(order)) == 3
    order.clear()
    monkeypatch.setattr(chain, "CACHE_BYTES", 2 * 2 * 2 * 24 * 2 * 16 * 4)
    assert run({"peers": ["sdpa", "watched"]})["watched"]["layers"] == 3
    assert order[1] == order[3] != order[2] and len(set(order)) == 2


def test_one_wrong_layer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's call is right, alone and in a row."""
    seen: list[Tensor] = []

    def wrong(problem: Problem, prepared: Prepared) -> Callable[[], Tensor]:
        seen.append(problem.q)
        return (lambda: prepared.forward() * 1.01) if len(seen) == 4 else prepared.forward

    peer(monkeypatch, "wrong", wrong)
    row = run({"peers": ["sdpa", "wrong"]})["wrong"]
    assert len(seen) == 4 and row["status"] == "wrong" and row["errors"]["out"] > 5e-3 and "value" not in row


def test_a_call_that_is_not_in_the_graph_is_wrong() -> None:
    """Replays write the same outputs: what a replay does not write must not pass for the recording's result."""
    outputs = [torch.ones(3), torch.ones(3)]

    def replay() -> list[Tensor]:
        outputs[0].fill_(1.0)
        return outputs

    found = chain.errors(replay, [lambda out: (out - 1).abs().max().item()] * 2)
    assert found[0] == 0.0 and found[1] != found[1]
    assert chain.worst([0.0, float("nan"), 1.0]) != chain.worst([0.0, 1.0]) == 1.0


# --- records ---


class _Graph:
    """Stands in for a CUDA graph, which holds no tensor that was there before its capture."""

    def replay(self) -> None:
        pass


def _stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=ignore)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, **_options: nullcontext())


def test_a_recording_holds_what_its_calls_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses only. What a call made for itself (row intervals, a mask) must live as long as replays."""
    _stand_in_for_cuda(monkeypatch)

    def prepare() -> tuple[Callable[[], Tensor], weakref.ref[Tensor]]:
        own = torch.ones(3)
        return lambda: own + 1, weakref.ref(own)

    call, own = prepare()
    replay = chain.record([call], torch.device("cuda", 0))
    del call
    assert own() is not None and torch.equal(replay()[0], torch.full((3,), 2.0))
    del replay
    assert own() is None


def test_calls_run_once_before_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the current stream, after what it has queued, and before what it queues next: what is compiled or
    allocated at the first call is no part of the graph."""
    _stand_in_for_cuda(monkeypatch)
    order: list[str] = []

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        order.append(f"{name} begins")
        yield
        order.append(f"{name} ends")

    def stream(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: order.append(f"{name} waits for {other.name}"))

    here, beside = stream("here"), stream("beside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: here)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device=None: beside)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside(stream.name))
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, **_options: inside("graph"))

    def call() -> Tensor:
        order.append("call")
        return torch.zeros(())

    chain.record([call, call], torch.device("cuda", 0))
    assert order == [
        "beside waits for here", "beside begins", "call", "call", "beside ends", "here waits for beside",
        "graph begins", "call", "call", "graph ends",
    ]  # fmt: skip


def test_a_chain_holds_what_its_peer_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """While all peers are timed, after the others were recorded."""
    _stand_in_for_cuda(monkeypatch)
    record, measured = chain.record, timing.measure
    monkeypatch.setattr(kernels.chain, "record", lambda calls, _device: record(calls, torch.device("cuda", 0)))
    monkeypatch.setattr(kernels.chain, "errors", lambda *_: [0.0])
    made: list[weakref.ref[Tensor]] = []

    def own(_problem: Problem, prepared: Prepared) -> Callable[[], Tensor]:
        tensor = torch.zeros(())
        made.append(weakref.ref(tensor))
        return lambda: prepared.forward() + tensor

    def measure(*arguments: Any, **options: Any) -> Any:
        assert len(made) == 4 and all(tensor() is not None for tensor in made)
        return measured(*arguments, **options)

    monkeypatch.setattr(kernels, "measure", measure)
    peer(monkeypatch, "own", own)
    assert run({"peers": ["own", "sdpa"]})["own"]["layers"] == 3 and len(made) == 4


def test_what_cannot_be_recorded_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    record = chain.record

    def refuse(calls: Any, device: torch.device) -> Any:
        if any(getattr(call, "waits", False) for call in calls):
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(calls, device)

    def waits(_problem: Problem, prepared: Prepared) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            return prepared.forward()

        forward.waits = True  # type: ignore[attr-defined]
        return forward

    monkeypatch.setattr(chain, "record", refuse)
    peer(monkeypatch, "waits", waits)
    rows = run({"peers": ["sdpa", "reference", "waits"]})
    alone = rows["waits"]
    assert alone["status"] == "ok" and alone["layers"] == 1 and alone["value"] > 0
    assert "not as one of 3 layers" in alone["note"] and "capturing" in alone["note"]
    assert "ratio" not in alone  # of different things
    assert all(rows[name]["layers"] == 3 and "ratio" in rows[name] for name in ("sdpa", "reference"))
    console = Console(record=True, width=200)
    found = {"name": "n", "baseline": "sdpa", "peers": list(rows), "rows": list(rows.values()), "summary": []}
    report.print_tables(found, console)
    assert "waits*: timed alone" in console.export_text()


def test_only_decoding_is_timed_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record = chain.record
    monkeypatch.setattr(chain, "record", lambda calls, device: recorded.append(1) or record(calls, device))
    case = {"batch": 2, "seqlen": 24, "heads": 4, "head_dim": 16}
    row = run({"cases": [{**DECODE["cases"][0], "seqlen": 8}, case]})["sdpa"]  # of the last
    assert row["status"] == "ok" and "layers" not in row and "note" not in row
    assert len(recorded) == len(DECODE["peers"])  # of the first alone
    assert run({"layers": 1})["sdpa"]["layers"] == 1
