"""The ``kernels`` benchmark: every case, direction and peer; checked against a float reference, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import chain
from .check import TOLERANCE, Reference
from .config import BenchConfig, Case, as_dict, peer_name
from .peers import Declined, Peer, Prepared, get_peer
from .problem import Problem
from .timing import Chain, CudaClock, HostClock, Measurement, copy_bandwidth, make_clock, measure

Row = dict[str, Any]
Progress = Callable[[str], None]


class DeviceLost(RuntimeError):
    """A peer broke the device (an illegal memory access, say): nothing more can be measured in this process."""


def run_kernels(
    config: BenchConfig, device: torch.device, save: Callable[[list[Row]], None], progress: Progress
) -> list[Row]:
    """Measure all cases of a benchmark; ``save`` is called with all rows so far after each."""
    peers = [get_peer(peer_name(entry)) for entry in config.peers]
    clock = make_clock(device)
    copy_gbs = copy_bandwidth(device) if any(case.decoding for case in config.cases) else None
    rows: list[Row] = []
    for direction in config.directions:
        for case in config.cases:
            if direction == "backward" and case.decoding:
                continue
            label = "decode" if case.decoding else direction
            progress(f"{label} {case.name}")
            try:
                rows += _run_case(config, case, label, peers, device, clock, copy_gbs)
            except torch.OutOfMemoryError as error:
                rows += [_row(case, label, peer, "error", _short(error)) for peer in peers]
            save(rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _run_case(
    config: BenchConfig,
    case: Case,
    direction: str,
    peers: Iterable[Peer],
    device: torch.device,
    clock: CudaClock | HostClock,
    copy_gbs: float | None,
) -> list[Row]:
    problem = Problem(case, config.dtype, device)
    wanted = config.layers if case.decoding else 1
    layers, n_caches = chain.length(wanted, case, problem.q.element_size(), chain.l2_bytes(device))
    # One for each cache of a chain, or just the one.
    problems = [problem, *(Problem(case, config.dtype, device, seed, problem) for seed in range(1, n_caches))]
    references = [Reference(problem, direction == "backward") for problem in problems]
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any] | Chain] = {}
    for peer in peers:
        if not config.allows(peer.name, case):
            rows[peer.name] = _row(case, direction, peer, "skipped", "not measured on this case (limits)")
            continue
        try:
            single, errors = _prepare(problem, references[0], peer, direction)
        except Declined as error:
            rows[peer.name] = _row(case, direction, peer, "declined", str(error))
        except Exception as error:  # a peer's failure is a result
            rows[peer.name] = _row(case, direction, peer, "error", _short(error))
            _check_device(device, peer)
        else:
            rows[peer.name] = _row(case, direction, peer, "ok") | {"errors": errors}
            calls[peer.name] = single
            if layers > 1:
                try:
                    calls[peer.name], found = _in_a_row(problems, references, peer, layers, single)
                    errors["out"] = chain.worst((errors["out"], found))
                except Exception as error:  # the call alone was right
                    rows[peer.name]["note"] = f"timed alone, not as one of {layers} layers: {_short(error)}"
                    _check_device(device, peer)
            limit = TOLERANCE[problem.dtype]
            # Written so that NaN counts as wrong.
            if not all(error <= limit for error in errors.values()):
                rows[peer.name] |= {"status": "wrong", "reason": f"relative error above {limit:g}"}
                del calls[peer.name]
    if calls:
        measured = measure(calls, clock, rounds=config.rounds, budget_s=config.budget_s, rest_s=config.rest_s)
        for name, times in measured.items():
            rows[name] |= _result(case, direction, problem, times, copy_gbs)
            timed = calls[name]
            if case.decoding:
                rows[name]["layers"] = timed.calls if isinstance(timed, Chain) else 1
    return list(rows.values())


def _prepare(
    problem: Problem, reference: Reference, peer: Peer, direction: str
) -> tuple[Callable[[], Any], dict[str, float]]:
    """A peer's call to be timed, and its errors. Backward: the graph is kept and differentiated again and again."""
    training = direction == "backward"
    prepared = peer.build(problem, training)
    if not training:

        def forward() -> Tensor:
            with torch.no_grad():
                return prepared.forward()

        return forward, {"out": reference.error("out", prepared.dense(forward()))}
    out = prepared.forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, prepared.inputs, prepared.dout, retain_graph=True)

    errors = {"out": reference.error("out", prepared.dense(out.detach()))}
    for name, grad in zip(("dq", "dk", "dv"), backward()):
        errors[name] = reference.error(name, prepared.dense(grad))
    return backward, errors


def _in_a_row(
    problems: list[Problem], references: list[Reference], peer: Peer, layers: int, single: Callable[[], Any]
) -> tuple[Chain, float]:
    """The calls of so many layers to be timed together, and the worst of their errors after a replay."""
    built = [peer.build(problem, False) for problem in problems]
    # Layer i has cache i, from the first again where there are fewer.
    turns = [i % len(built) for i in range(layers)]

    def error(i: int) -> Callable[[Tensor], float]:
        return lambda out: references[i].error("out", built[i].dense(out))

    with torch.no_grad():
        replay = chain.record([built[i].forward for i in turns], problems[0].device)
        found = chain.worst(chain.errors(replay, [error(i) for i in turns]))

    def run() -> None:
        with torch.no_grad():
            replay()

    return Chain(run, layers, single), found


def extra_peak_bytes(prepared: Prepared, device: torch.device) -> int:
    """Largest memory in use during forward and backward, above what was in use before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = prepared.forward()
    grads = torch.autograd.grad(out, prepared.inputs, prepared.dout)
    torch.cuda.synchronize(device)
    del out, grads
    return torch.cuda.max_memory_allocated(device) - before


def _check_device(device: torch.device, peer: Peer) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception as error:
        raise DeviceLost(f"{peer.name} broke the device: {_short(error)}") from error


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _row(case: Case, direction: str, peer: Peer, status: str, reason: str = "") -> Row:
    row: Row = {
        "case": as_dict(case),
        "case_name": case.name,
        "group": case.group,
        "direction": direction,
        "peer": peer.name,
        "status": status,
    }
    return row | ({"reason": reason} if reason else {})


def _result(case: Case, direction: str, problem: Problem, measured: Measurement, copy_gbs: float | None) -> Row:
    """Times and rate; for decoding also ``of_floor``, how many times longer than the memory's copy rate takes for the
    keys and values (no launch is in that floor: :func:`~.timing.copy_bandwidth`)."""
    result = measured.as_dict()
    if case.decoding:
        gbs = case.kv_bytes(problem.q.element_size()) / measured.median_ms / 1e6
        floor = {} if copy_gbs is None else {"copy_gbs": copy_gbs, "of_floor": copy_gbs / gbs}
        return result | {"value": gbs, "unit": "GB/s", "gbs": gbs} | floor
    tflops = case.flops(direction) / measured.median_ms / 1e9
    return result | {"value": tflops, "unit": "TFLOP/s", "tflops": tflops}
