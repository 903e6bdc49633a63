"""``hf-flash-plus check``: right providers pass, every kind of wrong one is caught, crashes and hangs are rows."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hf_flash_plus import dispatch, ops
from hf_flash_plus.checks import compare, isolate, models, oracle, report, run
from hf_flash_plus.checks.compare import CRASH, ERROR, HANG, OK, REFUSED, WRONG, Difference, Row, run_cell
from hf_flash_plus.checks.features import FEATURES
from hf_flash_plus.cli import app
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.providers import PROVIDERS, AttentionOutput, ReferenceProvider

from . import check_runners
from . import oracle as definition

BY_NAME = {feature.name: feature for feature in FEATURES}


@pytest.fixture(autouse=True)
def _fresh_selection() -> Any:
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


# --- the command ---


def test_the_command_passes_here_and_says_what_it_could_not_check(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "check.json"
    result = CliRunner().invoke(app, ["check", "--device", "cpu", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "passed" in result.output and "torch_sdpa, softcap: does not serve softcap" in result.output
    assert "Not checked" in result.output and "flash_attn: needs a CUDA device" in result.output
    data = json.loads(path.read_text())
    assert data["passed"] and data["environment"]["versions"]["torch"] == torch.__version__
    assert {row["provider"] for row in data["rows"]} == {"torch_sdpa", "reference"}
    right = {(row["provider"], row["feature"]) for row in data["rows"] if row["status"] == OK}
    assert {feature for provider, feature in right if provider == "reference"} == set(compare.names())
    assert [row["feature"] for row in data["models"]] == [
        "llama forward", "llama backward", "llama generate", "bert forward", "bert backward",
    ]  # fmt: skip
    assert all(row["note"] == "served by torch_sdpa" for row in data["models"])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--provider", "cudnn"], "--provider 'cudnn' is none; the providers are: triton"),
        (["--device", "tpu"], "--device 'tpu' is none that can be checked"),
        (["--device", "cpu:1"], "--device 'cpu:1' is none that can be checked"),
        (["--device", "cuda:99"], "--device 'cuda:99' is not there"),
    ],
)
def test_bad_arguments_are_exit_code_2(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2 and says in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider can be used here")
def test_a_provider_asked_for_that_cannot_be_used_is_a_failure() -> None:
    result = CliRunner().invoke(app, ["check", "--device", "cpu", "--provider", "flash_attn"])
    assert result.exit_code == 1
    assert "asked for, but cannot be used here: flash_attn" in result.output


# --- the oracle is right: it equals the definition, written row by row ---


@pytest.mark.parametrize("name", ["causal", "padded batch", "ALiBi", "softcap", "sinks, with their gradient"])
def test_the_oracle_is_the_definition(name: str) -> None:
    torch.manual_seed(3)
    call = BY_NAME[name].make().to("cpu", torch.float64)
    rows, keys = 24, 31
    cut = {
        field: None if tensor is None else tensor[..., :rows, :keys]
        for field, tensor in (("seen", call.seen), ("bias", call.bias), ("distance", call.distance))
    }
    call = replace(call, q=call.q[:1, :rows, :2], k=call.k[:1, :keys, :1], v=call.v[:1, :keys, :1], **cut)
    call = replace(
        call,
        sinks=None if call.sinks is None else call.sinks[:2],
        slopes=None if call.slopes is None else call.slopes[:2],
        seen=None if call.seen is None else call.seen[:1],
    )
    got = oracle.attention(call)
    want = definition.attention(
        call.q, call.k, call.v, scale=call.scale, softcap=call.softcap, sinks=call.sinks, alibi=call.slopes,
        sees=lambda _b, _h, i, j: call.seen is None or bool(call.seen[0, 0, i, j]),
        places=lambda _b, i: i,
    )  # fmt: skip
    torch.testing.assert_close(got.out, want.out, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-12, rtol=0)


def test_the_oracle_on_nothing() -> None:
    empty = oracle.Dense(torch.randn(2, 3, 4, 8), torch.randn(2, 0, 2, 8), torch.randn(2, 0, 2, 8))
    got = oracle.attention(empty)
    assert (got.out == 0).all() and (got.lse == -math.inf).all() and got.out.shape == (2, 3, 4, 8)


# --- wrong answers are caught ---


class Lying(ReferenceProvider):
    """The reference, with its answer spoiled."""

    name = "lying"

    def __init__(self, spoil: Callable[[AttentionInputs, AttentionOutput], AttentionOutput]) -> None:
        self.spoil = spoil

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        return self.spoil(inputs, super().forward(inputs))


def spoil_element(out: Tensor) -> Tensor:
    """One number of one row off by a part that no average would show."""
    spoiled = out.clone()
    spoiled[0, 70, 1, 3] = spoiled[0, 70, 1, 3] + 0.05
    return spoiled


SPOILS: dict[str, tuple[str, Callable[[AttentionInputs, AttentionOutput], AttentionOutput], str]] = {
    "one number": ("full", lambda _i, o: o._replace(out=spoil_element(o.out)), "out: error"),
    "NaN": ("causal", lambda _i, o: o._replace(out=o.out.masked_fill(o.out == o.out[0, 0, 0, 0], math.nan)), "NaN"),
    "another dtype": ("full", lambda _i, o: o._replace(out=o.out.half()), "float16 instead of torch.float32"),
    "gradient only": ("full", lambda _i, o: o._replace(out=o.out.detach() + (o.out - o.out.detach()) * 1.01), "error"),
    "log-sum-exp in base 2": (
        "log-sum-exp",
        lambda _i, o: o._replace(softmax_lse=o.softmax_lse * 1.4427),  # type: ignore[operator]
        "softmax_lse: error",
    ),
    "dropout never": (
        "dropout",
        lambda i, o: ReferenceProvider().forward(replace(i, dropout_p=0.0)),
        "kept 1.0000",
    ),
    "dropout unscaled": ("dropout", lambda i, o: o._replace(out=o.out * 0.75), "not scaled"),
}


@pytest.mark.parametrize("what", SPOILS)
def test_a_wrong_answer_is_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature, spoil, says = SPOILS[what]
    monkeypatch.setitem(PROVIDERS, "lying", Lying(spoil))
    row = run_cell("lying", feature, "fp32", "cpu")
    assert row.status == WRONG and says in row.note, row
    dispatch.clear_cache()
    monkeypatch.setitem(PROVIDERS, "lying", Lying(lambda _i, o: o))
    assert run_cell("lying", feature, "fp32", "cpu").status == OK, "and an honest one passes"


@pytest.mark.parametrize(
    "feature, lost",
    [
        ("softcap", {"softcap": 0.0}),
        ("sinks, with their gradient", {"sinks": None}),
        ("ALiBi", {"alibi_slopes": None}),
        ("sliding window", {"mask": "causal"}),
        ("padded batch", {"mask": "full"}),
        ("padding with holes", {"mask": "full"}),
        ("packed, causal", {"mask": "causal"}),
        ("bias, with its gradient", {"mask": "full"}),
        ("boolean mask", {"mask": "full"}),
        ("drafted tokens, KV cache", {"mask": "full"}),
    ],
)
def test_a_feature_that_is_dropped_is_caught(
    feature: str, lost: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a careless provider does: it takes the argument and ignores it."""
    from hf_flash_plus.masks import CAUSAL, FULL

    class Careless(ReferenceProvider):
        name = "careless"

        def forward(self, inputs: AttentionInputs) -> AttentionOutput:
            changes = {k: {"causal": CAUSAL, "full": FULL}.get(v, v) for k, v in lost.items()}
            return super().forward(replace(inputs, **changes))

    monkeypatch.setitem(PROVIDERS, "careless", Careless())
    assert run_cell("careless", feature, "fp32", "cpu").status == WRONG


def test_a_provider_that_raises_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_i: AttentionInputs, _o: AttentionOutput) -> AttentionOutput:
        raise RuntimeError("\n  Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setitem(PROVIDERS, "lying", Lying(fail))
    row = run_cell("lying", "full", "fp32", "cpu")
    assert (row.status, row.note) == (ERROR, "RuntimeError: Failed to find C compiler. Please specify via CC")
    assert "install gcc" in report.advice(row)


def test_a_provider_that_declines_is_no_failure() -> None:
    row = run_cell("torch_sdpa", "softcap", "fp32", "cpu")
    assert (row.status, row.note) == (REFUSED, "does not serve softcap")


@pytest.mark.parametrize("check", models.checks("llama", "fp32") + models.checks("bert", "fp32"))
def test_a_model_with_wrong_attention_is_caught(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.attention

    def wrong(inputs: AttentionInputs, *rest: Any) -> AttentionOutput:
        output = right(inputs, *rest)
        return output._replace(out=output.out * 1.5)

    monkeypatch.setattr(ops, "attention", wrong)
    assert models.run_check(models.AUTOMATIC, check, "fp32", "cpu").status == WRONG


def test_a_model_that_never_calls_us_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "providers_used", list)
    row = models.run_check(models.AUTOMATIC, "bert forward", "fp32", "cpu")
    assert (row.status, row.note) == (WRONG, "flash_plus was never called")


def test_shapes_are_compared() -> None:
    with pytest.raises(Difference, match="shape"):
        compare.excess("out", torch.zeros(2, 3), torch.zeros(3, 2).double(), None, 2)


def test_checking_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run_cell("reference", "dropout", "fp32", "cpu")
    run_cell("reference", "causal", "fp32", "cpu")
    assert torch.equal(torch.get_rng_state(), state)


# --- crashes and hangs ---


def test_crashes_and_hangs_are_rows(capfd: pytest.CaptureFixture[str]) -> None:
    wanted = ["fine", "abort", "fine too", "hang", "exit"]
    cells = [isolate.Cell("p", name, "fp32", "cpu") for name in wanted]
    rows = list(isolate.run_apart(check_runners.misbehave, cells, timeout=2.0))
    assert [row.feature for row in rows] == wanted
    assert [row.status for row in rows] == [OK, CRASH, OK, HANG, CRASH]
    assert "SIGABRT" in rows[1].note and "no answer within 2 s" in rows[3].note and "exit code 3" in rows[4].note
    assert capfd.readouterr().out == ""


def test_risky_providers_run_apart() -> None:
    assert all(run.is_apart(name, "cuda") == (name != "reference") for name in PROVIDERS)
    assert run.is_apart(models.AUTOMATIC, "cuda") and not run.is_apart(models.AUTOMATIC, "cpu")
    assert run.is_apart("triton", "cpu") and not run.is_apart("torch_sdpa", "cpu")


def test_a_provider_that_fails_makes_the_whole_fail_and_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flash_plus.cli.console import make_console

    right = Row("triton", "full", "bf16", OK, 0.2)
    result = run.Result(
        "cuda",
        [run.Usable("triton", None)],
        [right, Row("triton", "causal", "bf16", CRASH, note="SIGSEGV"), Row("triton", "ALiBi", "bf16", HANG)],
        [Row(models.AUTOMATIC, "llama forward", "bf16", OK, 0.1)],
    )
    assert not result.passed and len(result.failures) == 2
    console = make_console()
    with console.capture() as captured:
        report.print_result(result, console)
    text = captured.get()
    assert "CRASH" in text and "HANG" in text and "SIGSEGV" in text and "failed: 2 right, 2 failed" in text
    assert text.count("FLASH_ATTENTION_USE_FLAGGEMS=FALSE") == 1, "advice is given once"
    result.rows = [right]
    assert result.passed
    result.models = []
    assert not result.passed, "a check that checked no model shows nothing"


def test_availability_is_asked_apart_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def apart(runner: Any, cells: list[isolate.Cell], _timeout: float) -> Any:
        asked.append(cells[0].provider)
        status, note = (CRASH, "SIGSEGV") if cells[0].provider == "flash_attn" else (REFUSED, "not installed")
        yield Row(cells[0].provider, cells[0].feature, cells[0].dtype, status, note=note)

    monkeypatch.setattr(run, "run_apart", apart)
    found, lost = run._all_usable("cuda", 1.0)
    assert sorted(asked) == sorted(set(PROVIDERS) - run.HARMLESS)
    assert {one.provider: one.reason for one in found}["triton"] == "not installed"
    assert [row.provider for row in lost] == ["flash_attn"]


def taken(cells: Any) -> Any:
    """The cells of a list, or those that are taken from a deal."""
    if isinstance(cells, list):
        yield from cells
        return
    while (cell := cells.take()) is not None:
        yield cell


@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize("unusable", [(), ("flash_attn", "flaggems")])
def test_on_a_gpu_every_cell_is_asked_once(
    jobs: int, unusable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan for a GPU, without one: what runs apart and what here, dealt to processes, in order again."""
    asked: list[tuple[bool, isolate.Cell]] = []

    def answer(apart: bool) -> Callable[..., Any]:
        def rows(_runner: Any, cells: Any, *_: Any) -> Any:
            for cell in taken(cells):
                asked.append((apart, cell))
                yield Row(*cell[:3], OK, 0.1)

        return rows

    found = [run.Usable(name, "not here" if name in unusable else None) for name in PROVIDERS]
    monkeypatch.setattr(run, "_all_usable", lambda *_: (found, []))
    monkeypatch.setattr(run, "run_apart", answer(True))
    monkeypatch.setattr(run, "run_here", answer(False))
    result = run.check("cuda", jobs=jobs)
    expected = [cell for name in PROVIDERS if name not in unusable for cell in run.matrix(name, "cuda")]
    of_models = run.model_cells(models.AUTOMATIC, "cuda")
    assert [(row.provider, row.feature, row.dtype) for row in result.rows] == [cell[:3] for cell in expected]
    assert [(row.provider, row.feature, row.dtype) for row in result.models] == [cell[:3] for cell in of_models]
    assert sorted(cell for _, cell in asked) == sorted([*expected, *of_models])
    assert {cell.provider for apart, cell in asked if not apart} == {"reference"}
    assert result.passed and {row.dtype for row in result.models} == {"fp32", "bf16"}
    assert [one.provider for one in result.providers if one.reason] == [name for name in PROVIDERS if name in unusable]


def test_an_interruption_leaves_no_cell_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[isolate.Cell] = []

    def apart(_runner: Any, cells: Any, *_: Any) -> Any:
        for cell in taken(cells):
            asked.append(cell)
            yield Row(*cell[:3], OK, 0.1)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_apart", apart)
    monkeypatch.setattr(run, "_all_usable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.check("cuda", jobs=4)
    assert not asked


@pytest.mark.parametrize("methods", [["spawn"], ["fork", "spawn", "forkserver"]], ids=["spawned", "copied"])
def test_processes_see_the_present_environment(methods: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are copies of a process which began before it changed; and they find torch imported."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    for value in ("one", "two"):
        monkeypatch.setenv("SOME_VARIABLE", value)
        (row,) = isolate.run_apart(
            check_runners.surroundings, [isolate.Cell("p", "SOME_VARIABLE", "fp32", "cpu")], 20.0
        )
        assert row.note == f"{value} True"
    monkeypatch.delenv("SOME_VARIABLE")
    (row,) = isolate.run_apart(check_runners.surroundings, [isolate.Cell("p", "SOME_VARIABLE", "fp32", "cpu")], 20.0)
    assert row.note == "None True"


def test_processes_end_by_themselves(tmp_path: Path) -> None:
    """So that what libraries keep in the system (semaphores) goes with them."""
    cell = isolate.Cell("p", str(tmp_path / "tidy"), "fp32", "cpu")
    assert [row.status for row in isolate.run_apart(check_runners.tidies_up, [cell], 20.0)] == [OK]
    assert (tmp_path / "tidy").exists()


def test_processes_take_cells_from_one_deal() -> None:
    cells = [isolate.Cell("p", f"fine {i}", "fp32", "cpu") for i in range(6)]
    deal = isolate.Deal(cells)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(list, isolate.run_apart(check_runners.misbehave, deal, 20.0)) for _ in range(2)]
        assert not any(future.done() for future in futures), "they wait"
        deal.release()
        rows = [row for future in futures for row in future.result()]
    assert sorted(row.feature for row in rows) == [cell.feature for cell in cells]
    assert list(isolate.run_apart(check_runners.misbehave, isolate.Deal(cells).release(wanted=False), 20.0)) == []


@pytest.mark.parametrize(
    "device, cores, gibibytes, jobs",
    [
        ("cpu", 8, 0, 4),
        ("cpu", 1, 0, 1),
        ("cuda", 6, 80, 6),
        ("cuda:1", 64, 80, 16),
        ("cuda", 16, 7, 4),
        ("cuda", 4, 1, 1),
    ],
)
def test_number_of_processes(
    device: str, cores: int, gibibytes: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gibibytes * 2**30, 80 * 2**30))
    assert run._jobs(device) == jobs
