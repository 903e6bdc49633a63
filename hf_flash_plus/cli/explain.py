"""``hf-flash-plus explain``: who would serve an attention call, and why the others would not."""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import make_console
from .usage import refuse

if TYPE_CHECKING:
    from ..inputs import AttentionInputs, CallSignature


class Dtype(str, Enum):
    """The dtypes of ``--dtype``."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp64 = "fp64"


class Bias(str, Enum):
    """The kinds of ``--bias``."""

    bool = "bool"
    float = "float"


def explain(
    shape: Annotated[str, typer.Option(help="batch,seqlen,nheads,headdim of the query.")],
    kv_heads: Annotated[int | None, typer.Option(help="Heads of key and value [default: as the query's].")] = None,
    seqlen_k: Annotated[int | None, typer.Option(help="Number of keys [default: as the query's].")] = None,
    v_head_dim: Annotated[int | None, typer.Option(help="Head dim of the values [default: as the query's].")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Data type of q, k and v.")] = Dtype.bf16,
    device: Annotated[str, typer.Option(help="Device type, present here or not.")] = "cuda",
    causal: Annotated[bool, typer.Option("--causal", help="Causal mask.")] = False,
    window: Annotated[str | None, typer.Option(help="left,right: sliding window, -1 unlimited.")] = None,
    softcap: Annotated[float, typer.Option(help="Soft cap of the scores, 0 is off.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = 0.0,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="Attention sinks (s_aux).")] = False,
    intervals: Annotated[bool, typer.Option("--intervals", help="Row intervals (padded batches).")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Packed sequences (varlen).")] = False,
    key_mask: Annotated[bool, typer.Option("--key-mask", help="A mask over the keys, with holes.")] = False,
    bias: Annotated[Bias | None, typer.Option(help="A dense mask: boolean, or added to the scores.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Gradients are needed.")] = False,
    bias_grad: Annotated[bool, typer.Option("--bias-grad", help="Also of the bias.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="softmax_lse is asked for.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Repeatable gradients only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which provider would serve a call, and every reason of the others. Exit code 1: nobody would."""
    from ..dispatch import describe_signature, explain_signature
    from ..providers import PROVIDERS

    try:
        inputs = build_inputs(
            shape=_integers("--shape", shape, 4),
            kv_heads=kv_heads,
            seqlen_k=seqlen_k,
            v_head_dim=v_head_dim,
            dtype=dtype.value,
            causal=causal,
            window=_integers("--window", window, 2) if window else (-1, -1),
            softcap=softcap,
            dropout=dropout,
            alibi=alibi,
            sinks=sinks,
            intervals=intervals,
            packed=packed,
            key_mask=key_mask,
            bias=bias.value if bias else "none",
            training=training,
            bias_grad=bias_grad,
            lse=lse,
            deterministic=deterministic,
        )
        signature = _on(device, inputs)
        verdicts = explain_signature(signature)
    except (ValueError, TypeError) as error:
        refuse(str(error))
    served = any(verdict.chosen for verdict in verdicts)
    kernels = {verdict.provider: PROVIDERS[verdict.provider].kernels(inputs) for verdict in verdicts if verdict.chosen}
    if as_json:
        rows = [
            verdict.__dict__ | {"would_serve": not verdict.reasons, "kernels": kernels.get(verdict.provider, "")}
            for verdict in verdicts
        ]
        typer.echo(json.dumps({"call": describe_signature(signature), "served": served, "providers": rows}, indent=2))
    else:
        _print(describe_signature(signature), verdicts, kernels)
    if not served:
        raise typer.Exit(1)


def _integers(option: str, text: str, count: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{option} takes {count} integers separated by commas, got {text!r}.")
    return numbers


def build_inputs(
    *,
    shape: tuple[int, ...],
    kv_heads: int | None = None,
    seqlen_k: int | None = None,
    v_head_dim: int | None = None,
    dtype: str = "bf16",
    causal: bool = False,
    window: tuple[int, ...] = (-1, -1),
    softcap: float = 0.0,
    dropout: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    intervals: bool = False,
    packed: bool = False,
    key_mask: bool = False,
    bias: str = "none",
    training: bool = False,
    bias_grad: bool = False,
    lse: bool = False,
    deterministic: bool = False,
) -> AttentionInputs:
    """A call described in words: built and validated on meta tensors, which need no device."""
    import math

    import torch

    from .. import settings
    from ..inputs import AttentionInputs, validate
    from ..masks import AttentionMask, PackedSequences

    batch, seqlen_q, nheads, head_dim = shape
    if packed and batch != 1:
        raise ValueError(f"packed sequences form one row: --shape must begin with 1, got {batch}.")
    keys = seqlen_q if seqlen_k is None else seqlen_k
    nheads_k = nheads if kv_heads is None else kv_heads
    sizes = {"--shape": min(shape), "--kv-heads": nheads_k, "--seqlen-k": keys, "--v-head-dim": v_head_dim or 0}
    for option, size in sizes.items():
        if size < 0:
            raise ValueError(f"{option} takes sizes, which are not negative; got {size}.")
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    q_dtype = names[dtype]

    def meta(*size: int, dtype: torch.dtype = q_dtype, grad: bool = False) -> torch.Tensor:
        if math.prod(size) >= 2**60:
            raise ValueError(f"a tensor of {size} is larger than torch can address; give smaller sizes.")
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=grad)

    mask = AttentionMask(
        causal=causal,
        window=(window[0], window[1]),
        row_intervals=meta(1, seqlen_q, 2, dtype=torch.int32) if intervals or packed else None,
        key_mask=meta(batch, keys, dtype=torch.bool) if key_mask else None,
        bias=None
        if bias == "none"
        else meta(1, 1, seqlen_q, keys, dtype=torch.bool)
        if bias == "bool"
        else meta(1, 1, seqlen_q, keys, grad=bias_grad),
        packed=PackedSequences(
            meta(2, dtype=torch.int32), meta(2, dtype=torch.int32), seqlen_q, keys, causal, (window[0], window[1])
        )
        if packed
        else None,
    )
    inputs = AttentionInputs(
        meta(batch, seqlen_q, nheads, head_dim, grad=training),
        meta(batch, keys, nheads_k, head_dim, grad=training),
        meta(batch, keys, nheads_k, head_dim if v_head_dim is None else v_head_dim, grad=training),
        head_dim**-0.5 if head_dim > 0 else 1.0,
        mask,
        softcap,
        meta(nheads, dtype=torch.float32) if alibi else None,
        meta(nheads) if sinks else None,
        dropout,
        deterministic=deterministic or settings.deterministic(),
        needs_lse=lse,
    )
    validate(inputs)
    return inputs


def _on(device: str, inputs: AttentionInputs) -> CallSignature:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device!r} is none that torch knows; give one such as cuda or cpu.") from None
    return inputs.signature()._replace(device_type=kind)


def build_signature(*, device: str = "cuda", **call: Any) -> CallSignature:
    """The signature of a call described in words (see :func:`build_inputs`), as if on that type of device."""
    return _on(device, build_inputs(**call))


def _print(call: str, verdicts: list[Any], kernels: dict[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = make_console()
    console.print(f"call: {escape(call)}", highlight=False)
    table = Table("provider", "verdict", "reasons")
    for verdict in verdicts:
        reasons: tuple[str, ...] = ()
        if verdict.chosen:
            word = "[bold green]chosen[/bold green]"
        elif verdict.reasons:
            word, reasons = "[red]cannot[/red]", verdict.reasons
        else:
            word, reasons = "[green]would serve[/green]", verdict.steps_aside
        notes = [f"- {reason}" for reason in reasons] + [n for n in (kernels.get(verdict.provider),) if n]
        table.add_row(verdict.provider, word, escape("\n".join(notes)))
    console.print(table)
    if not any(verdict.chosen for verdict in verdicts):
        console.print("[red]nobody would serve this call[/red]")
