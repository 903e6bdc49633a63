"""The coverage sweep on a representative subset, against its record; and unit tests of comparing and reporting.

The subset (``coverage_ci.txt``) takes about two minutes of each of two cores. The full sweep is one command,
``hf-flash-plus coverage --output tests/transformers/coverage.json``; records of other versions and devices lie beside
it, and ``make coverage-page`` writes all of them into COVERAGE.md.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from hf_flash_plus.coverage import judge as judging
from hf_flash_plus.coverage.cells import CHECKS, DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from hf_flash_plus.coverage.choices import WITH_THRESHOLDS, Choices
from hf_flash_plus.coverage.compare import collect, error, identical, real_positions
from hf_flash_plus.coverage.exceptions import reference
from hf_flash_plus.coverage.find import find_subject, model_types
from hf_flash_plus.coverage.inputs import padding
from hf_flash_plus.coverage.pool import run_all
from hf_flash_plus.coverage.record import Record, losses, make_header, summarize
from hf_flash_plus.coverage.report import render
from hf_flash_plus.coverage.subject import NAME, Settings, run
from hf_flash_plus.coverage.tiny_configs import tiny_config
from hf_flash_plus.coverage.worker import Row, run_row

HERE = Path(__file__).parent
RECORD = HERE / "coverage.json"
SUBSET = HERE / "coverage_ci.txt"


def _subset() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in SUBSET.read_text().splitlines())
    return [line for line in lines if line]


def _record() -> Record:
    return Record.load(RECORD)


@pytest.mark.slow
def test_subset_loses_nothing() -> None:
    """No model type of the subset differs from eager, stops running, or is exact in fewer checks than recorded."""
    known = model_types()
    rows = run_all([name for name in _subset() if name in known], list(CHECKS), Settings(), processes=2)
    # A version without a record may not have a class or a check; what runs must still not differ.
    record = next(
        (
            record
            for record in map(Record.load, sorted(HERE.glob("coverage*.json")))
            if record.header["versions"]["transformers"] == transformers.__version__
            and record.header["device"] == "cpu"
        ),
        Record({}, []),
    )
    found = losses(record, rows)
    assert not found, "\n".join(found)
    assert sum(row.runs for row in rows) >= 0.95 * len(rows)


def test_record_has_no_difference() -> None:
    record = _record()
    assert record.header["checks"] == list(CHECKS)
    assert record.header["dtype"] == "float32"
    assert set(_subset()) <= {row.model_type for row in record.rows if row.runs}


def test_page_is_the_record() -> None:
    """COVERAGE.md is regenerated whenever coverage.json is."""
    page = (HERE.parents[1] / "COVERAGE.md").read_text()
    others = {path.name: Record.load(path) for path in sorted(HERE.glob("coverage-*.json"))}
    assert page == render(_record(), others)


@pytest.mark.parametrize("path", sorted(HERE.glob("coverage*.json")), ids=lambda path: path.stem)
def test_no_record_has_a_difference(path: Path) -> None:
    record = Record.load(path)
    assert record.header["checks"] == list(CHECKS)
    assert not [row.model_type for row in record.rows if row.outcome() == DIFFERENT]
    assert summarize(record.rows).run >= 480 or record.header["device"] != "cpu"


def test_a_crash_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from hf_flash_plus.coverage import pool

    def run(model_type: str, checks: list[str], settings: Settings) -> Row:
        if model_type == "crashes":
            os._exit(3)
        if model_type == "hangs":
            import time

            time.sleep(60)
        return Row(model_type, runs=True, cells={"forward": Cell(EXACT, 1e-7)})

    monkeypatch.setattr(pool, "run_row", run)
    rows = pool.run_all(["a", "crashes", "hangs", "b"], ["forward"], Settings(), processes=2, timeout=3)
    outcomes = {row.model_type: row.outcome() for row in rows}
    assert outcomes == {"a": EXACT, "crashes": DIFFERENT, "hangs": DIFFERENT, "b": EXACT}
    assert "code 3" in rows[1].cells["forward"].note and "3 seconds" in rows[2].cells["forward"].note


def test_a_stop_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and a budget that is used up."""
    from hf_flash_plus.coverage import pool

    def run(model_type: str, checks: list[str], settings: Settings) -> Row:
        time.sleep(60 if model_type == "slow" else 0)
        return Row(model_type, runs=True)

    def interrupt(row: Row, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "run_row", run)
    begin = time.monotonic()
    rows = pool.run_all(["a", "slow", "b"], ["forward"], Settings(), processes=1, budget=2)
    assert [row.model_type for row in rows] == ["a"]
    rows = pool.run_all(["a", "slow"], ["forward"], Settings(), processes=2, report=interrupt)
    assert [row.model_type for row in rows] == ["a"]
    assert time.monotonic() - begin < 30


def test_a_broken_device_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose device faults is replaced: its next row would fail, too."""
    from hf_flash_plus.coverage import pool

    state = {"broken": False}

    def run(model_type: str, checks: list[str], settings: Settings) -> Row:
        outcome = DIFFERENT if state["broken"] else EXACT
        state["broken"] = state["broken"] or model_type == "faults"
        return Row(model_type, runs=True, cells={"forward": Cell(outcome)})

    monkeypatch.setattr(pool, "run_row", run)
    monkeypatch.setattr(pool, "_usable", lambda device: not state["broken"])
    rows = pool.run_all(["a", "faults", "b"], ["forward"], Settings(), processes=1)
    assert [row.outcome() for row in rows] == [EXACT] * 3


def test_checks_that_a_lost_device_hid_are_done_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loses the device is told by its own cell; the others are those of a process that has one."""
    from hf_flash_plus.coverage import checks, pool, worker

    state = {"lost": False}

    def check(outcome: str, loses: bool = False) -> Any:
        def run(*args: Any) -> Cell:
            found = Cell(DIFFERENT if state["lost"] else outcome)
            state["lost"] = state["lost"] or loses
            return found

        return run

    monkeypatch.setattr(checks, "FUNCTIONS", functions := {})
    monkeypatch.setattr(worker, "FUNCTIONS", functions)
    functions |= {name: check(EXACT) for name in CHECKS}
    functions |= {"right": check(NOT_RUNNABLE, loses=True), "static": check(NOT_RUNNABLE, loses=True)}
    monkeypatch.setattr(worker, "answers", lambda device: not state["lost"])
    monkeypatch.setattr(pool, "_usable", lambda device: not state["lost"])
    rows = pool.run_all(["llama", "gpt2"], list(CHECKS), Settings(), processes=1)
    assert [row.model_type for row in rows] == ["llama", "gpt2"]
    for row in rows:
        assert list(row.cells) == list(CHECKS) and row.cls and not row.unseen
        assert {name for name, cell in row.cells.items() if cell.outcome == NOT_RUNNABLE} == {"right", "static"}
        assert row.outcome() == EXACT

    def crashes(*args: Any) -> Cell:
        import os

        os._exit(5)

    functions["generate"] = crashes
    (row,) = pool.run_all(["llama"], list(CHECKS), Settings(), processes=1)
    assert row.outcome() == DIFFERENT and pool.is_lost(row) and row.cells["forward"].outcome == EXACT
    assert all("code 5" in row.cells[name].note for name in ("inner", "generate", "patch"))


def test_flash_plus_answers_for_a_device_that_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager would fail after it, too, and must not be blamed."""
    subject: Any = SimpleNamespace(
        model_type="llama",
        settings=Settings(dtype=torch.bfloat16),
        model=lambda name, dtype=None: name,
        forget=lambda *args: None,
    )
    lost: list[str] = []

    def observe(model: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if model == NAME:
            lost.append(model)
        if lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return {"x": torch.ones(2)}

    monkeypatch.setattr(judging, "answers", lambda device: not lost)
    cell = judging.judge(subject, "forward", observe)
    assert cell.outcome == DIFFERENT and "loses the device" in cell.note


def test_indices_out_of_range_are_found_on_the_cpu() -> None:
    from hf_flash_plus.coverage import checks

    fits = torch.tensor([3])
    checks._try_indices(_Lookup(), {"index": fits})
    checks._try_indices(_Lookup(), {"other": fits})  # a TypeError: the device's own run shows it
    with pytest.raises(IndexError):
        checks._try_indices(_Lookup(), {"index": torch.tensor([4])})


class _Lookup(torch.nn.Module):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.arange(4)[index]


def test_what_a_model_remembers_is_no_difference_of_patching() -> None:
    """qwen3_omni_moe_thinker returns ``rope_deltas`` after it has seen an image."""
    settings = Settings(dtype=torch.bfloat16)
    row = run_row("qwen3_omni_moe_thinker", ["generate", "images", "patch"], settings)
    assert row.calls and row.cells["patch"].outcome == EXACT


@pytest.mark.parametrize("wrong, outcome", [(False, EXACT), (True, DIFFERENT)])
def test_patching_a_model_that_does_not_repeat_itself(
    wrong: bool, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import AttentionInterface

    from hf_flash_plus.coverage import checks
    from hf_flash_plus.integration import patch
    from hf_flash_plus.integration.attention import flash_plus_attention

    noise, factor = torch.Generator().manual_seed(0), [1.0]

    def restless(*args: Any, **kwargs: Any) -> Any:
        out, weights = flash_plus_attention(*args, **kwargs)
        return out * factor[0] * (1 + 1e-3 * torch.rand(out.shape, generator=noise)), weights

    def patch_model(model: Any) -> Any:
        factor[0] = 1.5 if wrong else 1.0
        return original(model)

    original = patch.patch_model
    monkeypatch.setattr(patch, "patch_model", patch_model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_plus", restless)
    subject = find_subject("llama", Settings())
    assert not isinstance(subject, str)
    cell = checks.patch(subject, "text decoder")
    assert cell is not None and cell.outcome == outcome and ("from run to run" in cell.note) == (outcome == EXACT)


@pytest.mark.slow
def test_processes_start_without_a_fork_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: in low precision, each process from a server that has the libraries and no CUDA state."""
    from hf_flash_plus.coverage import pool

    settings = Settings(dtype=torch.bfloat16)
    context = pool._context("cuda")
    assert context.get_start_method() == "forkserver"
    monkeypatch.setattr(pool, "_context", lambda device: context)
    rows = pool.run_all(["llama", "bert"], ["forward", "left"], settings, processes=2)
    assert [row.outcome() for row in rows] == [EXACT, EXACT] and all(row.calls for row in rows)


def test_low_precision_measures_the_reference_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw of rounding errors may be a lucky one: neighbouring weights say what low precision costs a model."""
    settings = Settings(dtype=torch.bfloat16)
    subject: Any = SimpleNamespace(
        model_type="llama", settings=settings, state={}, model=lambda name, dtype: name, forget=lambda *args: None
    )
    expected = {"x": torch.ones(4)}
    actual = {"x": torch.full((4,), 1.1)}

    inf = float("inf")

    def verdict(*neighbours: tuple[float, float]) -> str:
        monkeypatch.setattr(judging, "_neighbours", lambda *args: list(neighbours))
        return judging._low_precision(subject, lambda *args: expected, expected, actual, None, "eager").outcome

    assert verdict((0.06, 0.02), (0.01, 0.015), (0.01, 0.02)) == EXACT
    assert verdict((0.04, 0.02), (0.01, 0.015), (0.01, 0.02)) == DIFFERENT, "0.1 is more than eager ever has"
    assert verdict((0.06, 0.1), (0.01, 0.03), (0.01, 0.03)) == DIFFERENT, "eager has that rarely, flash_plus always"
    assert verdict((0.06, 0.02), (inf, 0.9), (0.01, 0.02)) == EXACT
    assert verdict((0.06, inf), (0.05, inf)) == verdict((inf, inf)) == DIFFERENT


def test_neighbouring_weights_are_given_to_both() -> None:
    """bf16 errors of eager and of flash_plus, in pairs, of the size that bf16 has."""
    settings = Settings(dtype=torch.bfloat16)
    subject = find_subject("llama", settings)
    assert not isinstance(subject, str)
    draws = judging._neighbours(
        subject, lambda model, dtype: collect(run(model, subject.cast(subject.inputs, dtype))), None, "eager"
    )
    assert len(draws) == judging.NEIGHBOURS and len(set(draws)) > 1
    assert all(1e-4 < error < 0.1 for draw in draws for error in draw)


class _Router:
    """A model whose two experts are nearly equal, so that rounding decides; ``wrong`` is an error in attention."""

    def __init__(self, better: int, wrong: float = 0.0) -> None:
        self.better, self.wrong = better, wrong

    def run(self) -> dict[str, torch.Tensor]:
        scores = torch.zeros(1, 2)
        scores[0, self.better] = 1e-3
        chosen = scores.topk(1).indices
        return {"x": torch.tensor([[1.0, -1.0]]).gather(1, chosen) + self.wrong}


@pytest.mark.parametrize("wrong,outcome", [(0.0, EXACT), (1e-3, EXACT), (0.1, DIFFERENT)])
def test_low_precision_may_choose_otherwise(wrong: float, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another expert is no error; an error is one, whatever is chosen."""
    models = {("eager", torch.float32): _Router(0), ("eager", torch.bfloat16): _Router(0)}
    models["flash_plus", torch.bfloat16] = _Router(1, wrong)
    settings = Settings(dtype=torch.bfloat16)
    subject: Any = SimpleNamespace(
        model_type="llama", settings=settings, model=lambda *key: models[key], forget=lambda *args: None
    )
    monkeypatch.setattr(judging, "_neighbours", lambda *args: [(0.0, 0.0)])
    expected, actual = models["eager", torch.float32].run(), models["flash_plus", torch.bfloat16].run()
    assert (expected["x"] - actual["x"]).abs() > 1
    cell = judging._low_precision(subject, lambda model, dtype: model.run(), expected, actual, None, "eager")
    assert cell.outcome == outcome and ("choices" in cell.note) == (outcome == EXACT)


def test_choices_are_repeated_where_the_runs_are_alike() -> None:
    choices, first, second = Choices(), torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    with choices.recorded():
        torch.topk(first, 2, dim=-1)
        first.argmax(dim=-1)
    assert len(choices) == 2
    with choices.repeated():
        values, indices = torch.topk(input=second, k=2)
        chosen = torch.argmax(second, -1)
    assert indices.tolist() == [[0, 2]] and values.tolist() == [[1.0, 3.0]] and chosen.tolist() == [0]
    assert second.argmax(-1).tolist() == [2], "as before"
    for others in (lambda: second.argmax(-1), lambda: torch.topk(second[:, :2], 2), lambda: torch.topk(second, 2)):
        with pytest.raises(LookupError), choices.repeated():
            others()


def test_thresholds_are_repeated_too_where_a_router_has_them() -> None:
    choices, first, second = Choices(WITH_THRESHOLDS), torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    with choices.recorded():
        first.max(dim=-1, keepdim=True)
        torch.max(first, -1)
        _ = first > 2.0
        _ = torch.tensor([3, 1]) > 2  # whole numbers are nobody's choice, nor is the largest of all
        first.max()
    assert len(choices) == 3
    with choices.repeated():
        kept, (values, indices) = second.max(dim=-1, keepdim=True), second.max(-1)
        above = second > 0.0
        assert (torch.tensor([0, 3]) > 2).tolist() == [False, True] and second.max() == 2.0
    assert kept.values.tolist() == [[1.0]] and kept.indices.tolist() == [[0]]
    assert values.tolist() == [1.0] and indices.tolist() == [0] and above.tolist() == [[True, False]]


def test_a_router_with_thresholds_is_compared_with_the_same_ones() -> None:
    """In bf16 an expert of phimoe's lies at its threshold: fp32 keeps it, or does not, and so do two runs in bf16."""
    row = run_row("phimoe", ["gradients"], Settings(dtype=torch.bfloat16))
    assert row.outcome() == EXACT


def test_what_eager_cannot_do_in_low_precision_is_not_runnable() -> None:
    row = run_row("fnet", ["forward", "gradients", "patch"], Settings(dtype=torch.bfloat16))
    assert {cell.outcome for cell in row.cells.values()} == {NOT_RUNNABLE}
    assert all("eager itself fails" in cell.note for cell in row.cells.values())


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["torch", "cublas", "triton"],
)
def test_a_full_gpu_is_no_difference(problem: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the model is loaded, nor in a check; the row is to be run again."""
    from hf_flash_plus.coverage import checks, worker
    from hf_flash_plus.coverage.pool import is_lost

    def fails(*args: Any) -> Any:
        raise problem

    with monkeypatch.context() as patch:
        patch.setitem(checks.FUNCTIONS, "forward", fails)
        row = run_row("llama", ["forward"], Settings())
    assert row.outcome() == NOT_RUNNABLE and row.short_of_memory() and is_lost(row)
    monkeypatch.setattr(worker, "_kept", fails)
    row = run_row("llama", ["forward"], Settings())
    assert row.outcome() == NOT_RUNNABLE and row.short_of_memory()
    monkeypatch.setattr(worker, "find_subject", lambda *args: judging.brief(problem))
    assert is_lost(run_row("llama", ["forward"], Settings()))


def test_a_row_waits_for_memory_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flash_plus.coverage import pool
    from hf_flash_plus.coverage.memory import MEMORY

    runs: list[str] = []
    free = iter([0.0, 0.0] + [8.0 * 2**30] * 9)

    def run(model_type: str, checks: list[str], settings: Settings) -> Row:
        runs.append(model_type)
        missing = model_type == "large" or len(runs) == 1
        return Row(
            model_type,
            runs=True,
            cls="A",
            cells={"forward": Cell(NOT_RUNNABLE if missing else EXACT, note=MEMORY * missing)},
        )

    monkeypatch.setattr(pool, "run_row", run)
    monkeypatch.setattr(pool, "_free_memory", lambda device: next(free))
    rows = pool.run_all(["a", "large"], ["forward"], Settings(), processes=1)
    assert [row.outcome() for row in rows] == [EXACT, NOT_RUNNABLE], "what is too large by itself is not run again"


def test_resume_runs_what_is_missing(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_flash_plus.cli import app
    from hf_flash_plus.coverage.pool import _lost

    output = tmp_path / "r.json"
    options = ["coverage", "--checks", "forward", "--processes", "1", "--output", str(output)]
    first = CliRunner().invoke(app, [*options, "--models", "llama,bloom", "--limit", "1"])
    assert first.exit_code == 0 and list(Record.load(output).by_type()) == ["bloom"]
    record = Record.load(output)
    record.rows.append(_lost("opt", "no result after 1 seconds"))
    record.save(output)
    second = CliRunner().invoke(app, [*options, "--models", "llama,bloom,opt", "--resume"])
    assert second.exit_code == 0 and "/2 llama: exact" in second.output and "/2 opt: exact" in second.output
    assert sorted(Record.load(output).by_type()) == ["bloom", "llama", "opt"]
    other = CliRunner().invoke(app, [*options, "--models", "llama", "--resume", "--dtype", "bf16"])
    assert other.exit_code == 2 and "differ in dtype" in other.output


def test_page_mentions_other_records() -> None:
    header = make_header(Settings(), list(CHECKS))
    base = Record(header, [Row("a", "vision", "A", True, calls=1, cells={"forward": Cell(EXACT), "left": Cell(EXACT)})])
    other = Record(
        {**header, "device": "cuda (H)"},
        [Row("a", "vision", "A", True, calls=1, cells={"forward": Cell(REFUSED, note="n|o"), "patch": Cell(EXACT)})],
    )
    page = render(base, {"coverage-x.json": other})
    assert "[`coverage-x.json`](tests/transformers/coverage-x.json)" in page and "cuda (H)" in page
    assert "- `a`: forward refused (n\\|o)" in page
    assert "eager in bfloat16" not in page
    half = Record({**other.header, "dtype": "bfloat16"}, [Row("a", "vision", "A", True, providers=["triton"])])
    page = render(base, {"coverage-y.json": half})
    assert "eager in bfloat16" in page and "`triton` in 1" in page
    assert "Other versions" not in render(base)


def test_a_wrong_mask_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: an attention that ignores its mask is DIFFERENT in every check that has one."""
    from transformers.modeling_utils import AttentionInterface

    from hf_flash_plus.integration.attention import flash_plus_attention

    def blind(module, query, key, value, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        return flash_plus_attention(module, query, key, value, None, is_causal=False, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_plus", blind)
    row = run_row("llama", list(CHECKS), Settings())
    wrong = {name for name, cell in row.cells.items() if cell.outcome == DIFFERENT}
    assert wrong == {"forward", "left", "right", "inner", "gradients", "packed", "generate", "static"}


def test_low_precision_is_bounded_by_eager() -> None:
    row = run_row("llama", ["forward", "left", "gradients", "generate"], Settings(dtype=torch.bfloat16))
    assert row.calls and {cell.outcome for cell in row.cells.values()} == {EXACT}
    assert all(cell.eager > 1e-4 for cell in row.cells.values())


@pytest.mark.parametrize("broken", [False, True])
def test_a_wrong_decoding_step_shows_in_low_precision(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is right, and tokens chosen by wrong logits would differ: the same ones are put in."""
    from transformers.modeling_utils import AttentionInterface

    from hf_flash_plus.integration.attention import flash_plus_attention

    def wrong(module, query, *args, **kwargs):  # type: ignore[no-untyped-def]
        out, weights = flash_plus_attention(module, query, *args, **kwargs)
        return (out * 1.5 if query.shape[2] == 1 else out), weights

    if broken:
        monkeypatch.setitem(AttentionInterface._global_mapping, "flash_plus", wrong)
    row = run_row("llama", ["generate", "static"], Settings(dtype=torch.bfloat16))
    expected = DIFFERENT if broken else EXACT
    assert {name: cell.outcome for name, cell in row.cells.items()} == {"generate": expected, "static": expected}


def test_refused_models_keep_their_attention() -> None:
    row = run_row("bloom", list(CHECKS), Settings())
    assert row.refused and row.outcome() == REFUSED
    assert "BloomForCausalLM" in row.cells["forward"].note


@pytest.mark.parametrize("version, refused", [("5.17.0", True), ("5.22.1", True), ("5.23.0", False)])
def test_refusals_end_with_the_version_that_needs_none(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_flash_plus.integration.models import unsupported_reason

    monkeypatch.setattr(transformers, "__version__", version)
    for name in ("pixtral", "kosmos-2", "bridgetower"):
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(tiny_config(name), attn_implementation="eager")
        assert (unsupported_reason(model) is not None) == (refused or name == "bridgetower"), name


@pytest.mark.parametrize("version, before", [("5.17.0", "sdpa"), ("5.23.0", "eager")])
def test_references_depend_on_the_version(version: str, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    assert reference("moshi", "forward")[0] == reference("kosmos-2", "patch")[0] == before
    assert reference("moshi", "left") == reference("llama", "forward") == ("eager", "")
    assert reference("nemotron3_5_asr", "static")[0] == "sdpa"


@pytest.mark.parametrize("wrong", [False, True])
def test_where_eager_gives_nan_sdpa_is_the_reference(wrong: bool) -> None:
    """Rows without a key are NaN in some models' eager attention; the other rows must still be compared."""
    subject: Any = SimpleNamespace(
        model_type="llama", settings=Settings(), state={}, model=lambda name, dtype=torch.float32: name
    )

    def observe(model: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        values = {"eager": [math.nan, 1.0], "sdpa": [0.0, 1.0], "flash_plus": [0.0, 2.0 if wrong else 1.0]}
        return {"x": torch.tensor(values[model])}

    if wrong:
        with pytest.MonkeyPatch.context() as patch:  # no fp64 models behind these names to arbitrate
            patch.setattr(judging, "_explain", lambda *args: Cell(DIFFERENT, args[3]))
            cell = judging.judge(subject, "forward", observe)
        assert cell == Cell(DIFFERENT, 1.0)
    else:
        cell = judging.judge(subject, "forward", observe)
        assert cell.outcome == EXACT and cell.note.startswith("against sdpa: eager gives NaN")


def test_error() -> None:
    one = {"x": torch.tensor([1.0, 2.0])}
    assert error(one, {"x": torch.tensor([1.0, 2.1])}) == pytest.approx(0.05)
    assert error(one, {"x": torch.tensor([1.0])}) == math.inf
    assert error(one, {"x": torch.tensor([1.0, math.nan])}) == math.inf
    assert error({"x": torch.tensor([1.0, math.nan])}, {"x": torch.tensor([1.0, math.nan])}) == 0
    assert error({"x": torch.tensor([1.0, -math.inf])}, {"x": torch.tensor([1.0, math.inf])}) == math.inf
    assert error(one, {"x": torch.tensor([1.0, 9.0])}, keep={"x": torch.tensor([True, False])}) == 0
    assert error(one, {"y": one["x"]}) == math.inf
    small = {"x": torch.tensor([1e-9]), "big": torch.tensor([1.0])}
    assert error(small, {**small, "x": torch.tensor([2e-9])}, floor=1e-2) < 1e-6


def test_collect_and_real_positions() -> None:
    output = {"logits": torch.zeros(2, 12, 3), "hidden_states": (torch.ones(2, 12, 3),), "past_key_values": object(),
        "pooled": torch.zeros(2, 3), "router": torch.zeros(24, 4), "ids": torch.zeros(2, dtype=torch.long)}  # fmt: skip
    found = collect(output)
    assert set(found) == {"logits", "hidden_states.0", "pooled", "router"}
    keep, unclear = real_positions(found, [padding("left")])
    assert unclear == ["pooled"]
    assert found["logits"][keep["logits"]].shape == (20, 3) and found["router"][keep["router"]].shape == (20, 4)
    assert identical(found, found) and not identical(found, {})


def test_tiny_configs() -> None:
    config = tiny_config("gemma3")
    assert config.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert config.text_config.vocab_size == 300 and config.image_token_id < 300
    first, second = (tiny_config("qwen2_vl") for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert sum(first.text_config.rope_parameters["mrope_section"]) == 8


def test_record_round_trip(tmp_path: Path) -> None:
    rows = [
        Row("a", "text decoder", "A", True, how="tiny", calls=3, cells={"forward": Cell(EXACT, 1.23e-7)}),
        Row("b", "vision", "B", True, how="tiny", keeps={"B": "own|way"}, cells={"forward": Cell(REFUSED, note="n")}),
        Row("c", reason="no <library>"),
        Row("d", "audio", "D", True, calls=1, cells={"forward": Cell(NOT_RUNNABLE, note="NaN"), "patch": Cell(EXACT)}),
    ]  # fmt: skip
    record = Record(make_header(Settings(), list(CHECKS)), rows)
    record.save(tmp_path / "r.json")
    loaded = Record.load(tmp_path / "r.json")
    assert [row.as_json() for row in loaded.rows] == [row.as_json() for row in rows]
    loaded.save(tmp_path / "s.json")
    assert (tmp_path / "r.json").read_text() == (tmp_path / "s.json").read_text()
    page = render(record)
    assert "| `a` | A | ✓ |" in page and "own\\|way" in page and "no &lt;library>" in page
    summary = summarize(rows)
    assert (summary.total, summary.run, summary.refused, summary.switched, summary.exact) == (4, 3, 1, 2, 2)


def test_updated_record() -> None:
    header = make_header(Settings(), list(CHECKS))
    old = Record(header, [Row("a", runs=True), Row("b", reason="x")])
    new = old.updated(Record(header, [Row("b", runs=True), Row("c", runs=True)]))
    assert [(row.model_type, row.runs) for row in new.rows] == [("a", True), ("b", True), ("c", True)]
    with pytest.raises(ValueError, match="dtype"):
        old.updated(Record({**header, "dtype": "bfloat16"}, []))


def test_a_sweep_goes_on_with_another_gpu_of_its_kind() -> None:
    header = {**make_header(Settings(), list(CHECKS)), "capability": "9.0"}
    one, two, old_one = ({**header, "device": f"cuda (NVIDIA {name})"} for name in ("H100", "H200", "A100"))
    both = Record(one, [Row("a", runs=True)]).updated(Record(two, [Row("b", runs=True)]))
    assert both.header["device"] == "cuda (NVIDIA H100, NVIDIA H200)" and set(both.by_type()) == {"a", "b"}
    assert both.updated(Record(two, [])).header["device"] == both.header["device"]
    for other in ({**old_one, "capability": "8.0"}, {**header, "device": "cpu"}):
        with pytest.raises(ValueError, match="differ in device"):
            both.updated(Record(other, []))


def test_losses() -> None:
    before = Record({}, [Row("a", runs=True, calls=1, cells={"forward": Cell(EXACT), "left": Cell(NOT_RUNNABLE)})])
    same = before.rows[0]
    assert losses(before, [same]) == []
    assert losses(before, [replace(same, runs=False, reason="gone")]) == ["a: ran before, now: gone"]
    assert "was exact" in losses(before, [replace(same, cells={"forward": Cell(REFUSED)})])[0]
    assert "DIFFERENT" in losses(before, [replace(same, cells={"forward": Cell(DIFFERENT, 0.5)})])[0]
