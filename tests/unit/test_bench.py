"""The benchmark library: configuration, problems, the check of results, timing, and whole runs on the CPU."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_flash_plus.bench import config as configuration
from hf_flash_plus.bench import report, timing
from hf_flash_plus.bench.check import Reference
from hf_flash_plus.bench.config import Case, ConfigError
from hf_flash_plus.bench.kernels import DeviceLost, run_kernels
from hf_flash_plus.bench.peers import PEERS, Declined, Peer, Prepared, get_peer
from hf_flash_plus.bench.plot import NoMatplotlib, plot
from hf_flash_plus.bench.problem import Problem
from hf_flash_plus.bench.run import run, select
from hf_flash_plus.cli import app
from hf_flash_plus.masks import visible

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs" / "bench"

KERNELS: dict[str, Any] = {
    "kind": "kernels",
    "directions": ["forward", "backward"],
    "dtype": "fp32",
    "baseline": "sdpa",
    "peers": ["torch_sdpa", "sdpa"],
    "budget_s": 0.01,
    "rounds": 2,
    "rest_s": 0.0,
    "cases": [{"batch": 2, "seqlen": 24, "heads": 4, "head_dim": 16, "gqa": 2, "mask": ["causal", "padded"]}],
}
MASKS = [
    Case(2, 24, 4, 2, 16, mask="full"),
    Case(2, 24, 4, 2, 16, mask="causal"),
    Case(2, 24, 4, 2, 16, mask="window", window=5),
    Case(3, 24, 4, 2, 16, mask="padded"),
    Case(1, 24, 4, 2, 16, mask="packed", documents=3),
    Case(2, 24, 4, 2, 16, seqlen_q=1),
    Case(2, 24, 4, 2, 16, seqlen_q=7),
    Case(3, 24, 4, 2, 16, seqlen_q=1, mask="padded"),
]


def ignore(_: Any) -> None:
    pass


# --- configuration ---


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    config = select(configuration.load(path))
    assert config.name == path.stem
    peers = [configuration.peer_name(entry) for entry in config.peers]
    assert config.baseline in peers and len(set(peers)) == len(peers)
    assert set(config.limits or {}) <= set(peers)


def test_forward_covers_the_acceptance_grid() -> None:
    cases = configuration.load(CONFIGS / "forward.yaml").cases
    got = {(c.seqlen, c.head_dim, c.mask, c.heads // c.kv_heads) for c in cases}
    want = {
        (s, d, m, g) for s in (512, 2048, 4096, 16384) for d in (64, 128) for m in ("causal", "full") for g in (1, 4)
    }
    assert got == want and len(cases) == len(want)
    assert all(case.batch * case.seqlen == 16384 and case.heads * case.head_dim == 2048 for case in cases)
    assert configuration.load(CONFIGS / "backward.yaml").cases == cases


@pytest.mark.parametrize(
    "change,word",
    [
        ({"kind": "train"}, "kind must be one of"),
        ({"kind": None}, "kind is missing"),
        ({"peers": []}, "peers is missing"),
        ({"peers": [3]}, "peers are names"),
        ({"speed": 9}, "unknown keys"),
        ({"dtype": "fp8"}, "dtype must be"),
        ({"directions": ["sideways"]}, "directions may be"),
        ({"cases": []}, "needs cases"),
        ({"cases": [3]}, "a case is a mapping"),
        ({"cases": [{"batch": 1, "seqlen": 8, "heads": 4, "head_dim": 16, "color": 1}]}, "color"),
        ({"cases": [{"batch": 1, "seqlen": 8}]}, "heads"),
        ({"cases": [{"batch": 0, "seqlen": 8, "heads": 4, "head_dim": 16}]}, "positive"),
        ({"cases": [{"batch": 1, "seqlen": 8, "heads": 4, "kv_heads": 3, "head_dim": 16}]}, "multiple"),
        ({"cases": [{"batch": 2, "seqlen": 8, "heads": 4, "head_dim": 16, "mask": "packed"}]}, "packed needs"),
        ({"cases": [{"batch": 2, "seqlen": 8, "heads": 4, "head_dim": 16, "mask": "round"}]}, "mask must be"),
        ({"cases": [{"batch": 1, "seqlen": 8, "heads": 4, "head_dim": 16, "page_size": 4}]}, "page_size goes"),
        ({"cases": [{"batch": 1, "seqlen": 8, "seqlen_q": 2, "heads": 4, "head_dim": 16, "mask": "padded"}]}, "1 with"),
        ({"limits": {"sdpa": {"length": [3]}}}, "limits of sdpa"),
        ({"kind": "e2e"}, "needs model and works"),
    ],
    ids=str,
)
def test_configuration_errors(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        configuration.parse({**KERNELS, **change})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        configuration.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        configuration.load(tmp_path / "list.yaml")


def test_select() -> None:
    config = configuration.parse(KERNELS)
    narrowed = select(config, ["reference"], ["padded"])
    assert narrowed.baseline == "reference" and [case.mask for case in narrowed.cases] == ["padded"]
    with pytest.raises(ConfigError, match="no case"):
        select(config, cases=["nothing"])
    with pytest.raises(ConfigError, match="unknown peer"):
        select(config, ["nobody"])


def test_lengths_and_operations() -> None:
    padded = Case(4, 64, 2, 2, 16, mask="padded")
    assert padded.lengths == [16, 32, 48, 64]
    assert padded.pairs() == sum(n * n / 2 for n in padded.lengths)
    full, causal = Case(2, 64, 2, 2, 16, mask="full"), Case(2, 64, 2, 2, 16, mask="causal")
    assert full.flops("forward") == 4 * 2 * 2 * 64 * 64 * 16
    assert causal.flops("forward") == full.flops("forward") / 2
    assert causal.flops("backward") == 2.5 * causal.flops("forward")
    assert Case(1, 64, 2, 2, 16, mask="packed", documents=4).pairs() == 4 * 16 * 16 / 2


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_operations_count_what_is_visible(case: Case) -> None:
    problem = Problem(case, "fp32", CPU)
    start, end = problem.intervals.expand(case.batch, -1, -1).unbind(-1)
    count = (end - start).clamp(min=0).sum().item()
    exact = case.pairs() + (sum(case.lengths) / 2 if case.mask in ("causal", "padded", "packed") else 0)
    if case.rows != case.seqlen:
        exact = case.pairs() + (0 if case.decoding else case.batch * case.rows / 2)
    assert count == exact


# --- problems and the check ---


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_masks_agree(case: Case) -> None:
    """Every form of a problem's mask says the same, on the rows that are no padding."""
    problem = Problem(case, "fp32", CPU)
    keys = torch.arange(case.seqlen)
    start, end = problem.intervals[..., :1], problem.intervals[..., 1:]
    want = ((keys >= start) & (keys < end)).expand(case.batch, -1, -1)
    ours = visible(problem.mask, case.rows, case.seqlen, CPU)
    ours = torch.ones_like(want) if ours is None else ours[:, 0].expand_as(want)
    assert torch.equal(ours, want)
    if problem.dense_mask is not None:
        real = problem.real[:, :, None]
        assert torch.equal(problem.dense_mask[:, 0].expand_as(want) & real, want & real)


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
@pytest.mark.parametrize("peer", ["flash_plus", "torch_sdpa", "reference", "sdpa"])
def test_peers_are_right(case: Case, peer: str) -> None:
    problem = Problem(case, "fp32", CPU)
    reference = Reference(problem, backward=True)
    prepared = get_peer(peer).build(problem, True)
    out = prepared.forward()
    grads = torch.autograd.grad(out, prepared.inputs, prepared.dout)
    for name, tensor in zip(("out", "dq", "dk", "dv"), (out, *grads)):
        assert reference.error(name, prepared.dense(tensor)) < 1e-5


@pytest.mark.parametrize("mask", ["causal", "padded"])
@pytest.mark.parametrize("peer", ["layer", "layer_sdpa"])
def test_layers_are_right(peer: str, mask: str) -> None:
    """Decoding as a layer of a model asks for it."""
    problem = Problem(Case(3, 24, 4, 2, 16, seqlen_q=1, mask=mask), "fp32", CPU)
    prepared = get_peer(peer).build(problem, False)
    with torch.no_grad():
        assert Reference(problem, False).error("out", prepared.dense(prepared.forward())) < 1e-5
    with pytest.raises(Declined, match="decoding"):
        get_peer(peer).build(Problem(MASKS[1], "fp32", CPU), False)


def test_pages_are_right() -> None:
    problem = Problem(Case(2, 24, 4, 2, 16, seqlen_q=1, page_size=8), "fp32", CPU)
    k_pages, _, table = problem.pages
    assert torch.equal(k_pages[table.long()].flatten(1, 2), problem.k) and table.tolist() != [[0, 1, 2], [3, 4, 5]]
    prepared = get_peer("flash_plus").build(problem, False)
    assert Reference(problem, False).error("out", prepared.dense(prepared.forward())) < 1e-5
    with pytest.raises(Declined, match="pages"):
        get_peer("sdpa").build(problem, False)
    assert problem.case.kv_bytes(2) == 2 * 2 * 24 * 2 * 16 * 2


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(MASKS[2], "fp32", CPU)
    whole = Reference(problem, True).values
    monkeypatch.setattr("hf_flash_plus.bench.check._ROWS", 7)
    for name, value in Reference(problem, True).values.items():
        torch.testing.assert_close(value, whole[name])


def test_unpadded_layout() -> None:
    """What varlen peers get, and the way back."""
    from hf_flash_plus import flash_attn_varlen_func
    from hf_flash_plus.bench.peers import _unpadded

    problem = Problem(MASKS[3], "fp32", CPU)
    prepared = _unpadded(problem, flash_attn_varlen_func)
    assert prepared.inputs[0].shape[0] == sum(problem.case.lengths)
    assert Reference(problem, False).error("out", prepared.dense(prepared.forward())) < 1e-5


def test_absent_peers_decline() -> None:
    problem = Problem(MASKS[1], "fp32", CPU)
    for name in ("fa4", "fa3", "fa2", "flex"):
        with pytest.raises(Declined):
            get_peer(name).build(problem, False)


# --- timing ---


def test_measure_takes_turns() -> None:
    calls: list[str] = []
    found = timing.measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        timing.HostClock(),
        rounds=3,
        budget_s=0.001,
        rest_s=0.0,
    )
    assert set(found) == {"a", "b"} and set(calls) == {"a", "b"}
    for measured in found.values():
        assert len(measured.rounds_ms) == 3 and measured.samples >= 6
        assert 0 <= measured.p10_ms <= measured.median_ms <= measured.p90_ms


def test_measure_changes_the_order_of_turns() -> None:
    """What a call leaves behind (heat, a lowered clock) should not always be the same other call's to bear."""

    class Clock(timing.HostClock):
        def __init__(self) -> None:
            self.turns: list[str] = []

        def sample(self, call: Any, repeats: int, host_ms: float) -> list[float]:
            self.turns.append(call())
            return [1.0] * repeats

    clock = Clock()
    names = "abcd"
    timing.measure({name: lambda name=name: name for name in names}, clock, rounds=6, budget_s=0.01, rest_s=0.0)
    turns = clock.turns[-6 * 4 :]
    assert all(sorted(turns[i : i + 4]) == list(names) for i in range(0, 24, 4))
    before = {(a, b) for i in range(0, 24, 4) for a, b in itertools.pairwise(turns[i : i + 4])}
    assert all(len({a for a, b in before if b == name}) > 1 for name in names)


# --- runs ---


def test_kernels_run(tmp_path: Path) -> None:
    saves: list[int] = []
    config = configuration.parse(KERNELS)
    rows = run_kernels(config, CPU, lambda rows: saves.append(len(rows)), ignore)
    assert saves == [2, 4, 6, 8]
    assert all(row["status"] == "ok" and row["value"] > 0 and row["unit"] == "TFLOP/s" for row in rows)
    assert {(row["direction"], row["group"]) for row in rows} == {
        (direction, group) for direction in ("forward", "backward") for group in ("causal", "padded")
    }
    assert set(rows[-1]["errors"]) == {"out", "dq", "dk", "dv"}


def test_wrong_failing_and_absent_peers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS["sdpa"].build

    def wrong(problem: Problem, training: bool) -> Prepared:
        prepared = right(problem, training)
        return Prepared(prepared.inputs, prepared.dout, lambda: prepared.forward() * 1.01, prepared.dense)

    def nan(problem: Problem, training: bool) -> Prepared:
        prepared = right(problem, training)
        return Prepared(prepared.inputs, prepared.dout, lambda: prepared.forward() * float("nan"), prepared.dense)

    def failing(problem: Problem, training: bool) -> Prepared:
        raise RuntimeError("first line\nsecond line")

    def absent(problem: Problem, training: bool) -> Prepared:
        raise Declined("not here")

    for name, build in {"wrong": wrong, "nan": nan, "failing": failing, "absent": absent}.items():
        monkeypatch.setitem(PEERS, name, Peer(name, "", build))
    peers = ["sdpa", "wrong", "nan", "failing", "absent", "reference"]
    config = configuration.parse({**KERNELS, "peers": peers, "limits": {"reference": {"seqlen": [1]}}})
    rows = run_kernels(config, CPU, ignore, ignore)
    first = {row["peer"]: row for row in rows[: len(peers)]}
    assert {name: row["status"] for name, row in first.items()} == {
        "sdpa": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "failing": "error",
        "absent": "declined",
        "reference": "skipped",
    }
    assert first["failing"]["reason"] == "RuntimeError: first line" and first["absent"]["reason"] == "not here"
    assert all("value" not in row for name, row in first.items() if name != "sdpa")


def test_ratios_and_means() -> None:
    def row(peer: str, case: str, value: float, unit: str = "TFLOP/s", status: str = "ok") -> dict[str, Any]:
        return {
            "peer": peer, "case_name": case, "value": value, "unit": unit, "status": status, "direction": "forward",
            "group": "causal",
        }  # fmt: skip

    rows = [row("a", "1", 10.0), row("b", "1", 20.0), row("a", "2", 10.0), row("b", "2", 80.0), row("b", "3", 1.0)]
    report.add_ratios(rows, "a")
    assert [found.get("ratio") for found in rows] == [1.0, 2.0, 1.0, 8.0, None]
    summary = {(entry["group"], entry["peer"]): entry for entry in report.summarize(rows)}
    assert summary["all", "b"]["geomean"] == pytest.approx(4.0)
    assert summary["causal", "b"]["least"] == 2.0 and summary["all", "b"]["cases"] == 2
    memory = [row("a", "1", 10.0, "MiB"), row("b", "1", 5.0, "MiB")]
    report.add_ratios(memory, "a")
    assert memory[1]["ratio"] == 2.0  # less is better


def test_smoke_configuration_makes_table_json_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["bench", str(CONFIGS / "smoke.yaml"), "--out", str(tmp_path), "--device", "cpu", "--budget", "0.005"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "geomean" in outcome.output and "smoke: forward" in outcome.output and "smoke: decode" in outcome.output
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert found["baseline"] == "sdpa" and found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["date"] and found["config"]["name"] == "smoke"
    measured = [row for row in found["rows"] if row["status"] == "ok"]
    assert {row["peer"] for row in measured} >= {"flash_plus", "torch_sdpa", "reference", "sdpa"}
    assert not [row for row in found["rows"] if row["status"] in ("wrong", "error")]
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "smoke.png").unlink()
    again = CliRunner().invoke(app, ["bench", "--show", str(tmp_path / "smoke.json")])
    assert again.exit_code == 0 and "smoke: forward" in again.output and (tmp_path / "smoke.png").exists()


def test_pictures_of_many_cases_have_several_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    shown: list[Any] = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    rows = [
        {"case_name": f"case {i}", "peer": peer, "direction": "forward", "unit": "TFLOP/s", "value": 1.0 + i}
        for i in range(25)
        for peer in ("ours", "theirs")
    ]
    found = {
        "rows": rows, "peers": ["ours", "absent", "theirs"], "name": "many",
        "environment": {"gpu": None, "versions": {"torch": "2"}, "date": "today"},
    }  # fmt: skip
    plot(found, tmp_path / "many.png")
    axes = shown[0].axes
    labels = [label.get_text() for axis in axes for label in axis.get_xticklabels()]
    assert labels == [f"case {i}" for i in range(25)] and [len(axis.patches) for axis in axes] == [18, 18, 14]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ours", "theirs"]
    assert [bar.get_height() for bar in axes[2].patches][:7] == [19.0 + i for i in range(7)]


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoMatplotlib, match=r"hf_flash_plus\[bench\]"):
        plot({"rows": [], "peers": []}, tmp_path / "none.png")


def test_command_line_errors(tmp_path: Path) -> None:
    def fails(*arguments: str, code: int = 2) -> str:
        outcome = CliRunner().invoke(app, ["bench", *arguments])
        assert outcome.exit_code == code, outcome.output
        return outcome.output

    assert "which benchmark" in fails()
    assert "cannot read" in fails(str(tmp_path / "none.yaml"))
    smoke = str(CONFIGS / "smoke.yaml")
    assert "unknown peer" in fails(smoke, "--peers", "nobody")
    assert "no case" in fails(smoke, "--cases", "nothing")
    assert "cannot show" in fails("--show", str(tmp_path / "none.json"))
    for text in ("{", "[]", '{"curves": {}}'):
        (tmp_path / "other.json").write_text(text)
        assert "other.json: " in fails("--show", str(tmp_path / "other.json"))
    assert "needs a CUDA device" in fails(str(CONFIGS / "memory.yaml"), "--device", "cpu", "--out", str(tmp_path))
    outcome = CliRunner().invoke(app, ["bench", "--list-peers"])
    assert outcome.exit_code == 0 and all(name in outcome.output for name in PEERS)


def test_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost(*_: Any) -> None:
        raise DeviceLost("flaggems broke the device: illegal memory access")

    monkeypatch.setattr("hf_flash_plus.bench.kernels._check_device", lost)
    monkeypatch.setitem(PEERS, "failing", Peer("failing", "", lambda *_: 1 / 0))
    smoke = str(CONFIGS / "smoke.yaml")
    outcome = CliRunner().invoke(app, ["bench", smoke, "--peers", "failing", "--device", "cpu", "--out", str(tmp_path)])
    assert outcome.exit_code == 2 and "illegal memory access" in outcome.output


# --- end to end ---

E2E: dict[str, Any] = {
    "kind": "e2e",
    "name": "tiny",
    "dtype": "fp32",
    "baseline": "sdpa",
    "peers": ["sdpa", {"name": "ours", "implementation": "flash_plus", "provider": "reference"}, "nonsense"],
    "warmup": 0,
    "repeats": 1,
    "model": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    },
    "works": [
        {"kind": "train", "batch": 2, "seqlen": 16},
        {"kind": "train", "layout": "padded", "batch": 2, "seqlen": 16},
        {"kind": "train", "layout": "packed", "batch": 1, "seqlen": 16, "documents": 2},
        {"kind": "generate", "layout": "padded", "batch": 2, "seqlen": 8, "new_tokens": 2},
        {"kind": "continuous", "batch": 3, "seqlen": 8, "new_tokens": 3, "peers": ["sdpa", "ours"]},
    ],
}


def test_e2e_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run(configuration.parse(E2E), CPU, tmp_path, ignore)
    rows = {(row["peer"], row["case_name"]): row for row in found["rows"]}
    assert len(rows) == 14 and ("nonsense", "continuous 3x8+3") not in rows
    for (peer, _), row in rows.items():
        assert row["status"] == ("error" if peer == "nonsense" else "ok"), row
    padded = rows["ours", "train padded 2x16"]
    assert padded["tokens"] == 4 + 16 and padded["unit"] == "tokens/s" and padded["ratio"] > 0
    assert rows["ours", "generate padded 2x8+2"]["tokens"] == 4
    assert rows["ours", "continuous 3x8+3"]["tokens"] == 9
    assert json.loads((tmp_path / "tiny.json").read_text())["rows"] == found["rows"]


def test_e2e_peers_get_what_their_entries_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import hf_flash_plus

    handles = []
    fuse_rotary = hf_flash_plus.fuse_rotary
    monkeypatch.setattr(hf_flash_plus, "fuse_rotary", lambda model: handles.append(fuse_rotary(model)))
    peers = ["sdpa", {"name": "fused", "implementation": "flash_plus", "fuse_rotary": True}]
    works = [{"kind": "generate", "batch": 1, "seqlen": 4, "new_tokens": 2}]
    found = run(configuration.parse({**E2E, "peers": peers, "works": works}), CPU, tmp_path, ignore)
    assert [(row["peer"], row["status"]) for row in found["rows"]] == [("sdpa", "ok"), ("fused", "ok")]
    assert len(handles) == 1 and handles[0].fused
    handles[0].remove()


def test_e2e_peers_whose_entries_ask_for_what_is_not_known(tmp_path: Path) -> None:
    """It would be measured without."""
    config = configuration.parse({**E2E, "peers": ["sdpa", {"name": "fused", "fuse_rotery": True}]})
    with pytest.raises(
        ConfigError, match=r"peer fused: unknown keys \['fuse_rotery'\]; the keys are name, .*fuse_rotary"
    ):
        run(config, CPU, tmp_path, ignore)


def test_e2e_run_of_an_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    skipping = {"name": "skipping", "implementation": "flash_plus", "skip_padding": True}
    peers = ["sdpa", "flash_plus", skipping]
    settings = {**E2E, "peers": peers, "model": {"type": "bert", "vocab_size": 64, **sizes}}
    works = [{"kind": "train", "layout": layout, "batch": 2, "seqlen": 16} for layout in ("plain", "padded")]
    found = run(configuration.parse({**settings, "works": works}), CPU, tmp_path, ignore)
    assert [(row["peer"], row["status"], row["tokens"]) for row in found["rows"]] == [
        (peer, "ok", tokens) for tokens in (32, 20) for peer in ("sdpa", "flash_plus", "skipping")
    ]
    for change in ({"works": E2E["works"]}, {"model": {"type": "rnn"}, "works": works}):
        with pytest.raises(ConfigError, match=r"bert neither|type 'rnn'"):
            run(configuration.parse({**settings, **change}), CPU, tmp_path, ignore)


@pytest.mark.parametrize(
    "work",
    [
        {"kind": "sleep", "batch": 1, "seqlen": 8},
        {"kind": "train", "batch": 1},
        {"kind": "train", "size": 3},
        {"kind": "continuous", "batch": 1, "seqlen": 8, "layout": "padded"},
    ],
    ids=str,
)
def test_e2e_works_are_checked(work: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(configuration.parse({**E2E, "works": [work]}), CPU, tmp_path, ignore)


@pytest.mark.parametrize("work_own", [{}, {"warmup": 0, "repeats": 3}])
def test_rounds_of_a_work(work_own: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A work's own warm-up and rounds come before the benchmark's."""
    from types import SimpleNamespace

    from hf_flash_plus.bench import e2e

    steps: list[str] = []
    monkeypatch.setattr(e2e, "_train", lambda *_: (lambda: steps.append("step"), 8))
    settings: Any = SimpleNamespace(warmup=1, repeats=2)
    work = {"kind": "train", "batch": 1, "seqlen": 8, **work_own}
    (row,) = e2e._measure(settings, [e2e.Peer("flash_plus", torch.nn.Linear(1, 1), None)], work, torch.device("cpu"))
    assert len(steps) == 3 and len(row["seconds"]) == (3 if work_own else 2)


def test_a_work_that_cannot_be_made_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from hf_flash_plus.bench import e2e

    def missing(*_: Any) -> Any:
        raise ImportError("no such work here")

    monkeypatch.setattr(e2e, "continuous", missing)
    work = {"kind": "continuous", "batch": 1, "seqlen": 8}
    peers = [e2e.Peer("flash_plus", torch.nn.Linear(1, 1), None)]
    settings: Any = SimpleNamespace(warmup=1, repeats=2)
    (row,) = e2e._measure(settings, peers, work, torch.device("cpu"))
    assert row["status"] == "error" and "no such work here" in row["reason"]


def test_spread_of_rounds() -> None:
    from hf_flash_plus.bench.report import spread

    assert spread({"seconds": [0.9, 1.0, 1.3]}) == pytest.approx(20.0)
    assert spread({"rounds_ms": [2.0, 2.0]}) == 0.0
    assert spread({"seconds": [1.0]}) is None and spread({}) is None


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}, {"repeats": "3"}])
def test_rounds_that_are_none(wrong: dict[str, Any]) -> None:
    from hf_flash_plus.bench.e2e import work_name

    with pytest.raises(ConfigError, match=next(iter(wrong))):
        work_name({"kind": "train", "batch": 1, "seqlen": 8, **wrong})
