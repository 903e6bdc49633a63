"""``COVERAGE.md``: a record as a page that people can read."""

from __future__ import annotations

from collections import Counter

from .cells import CHECKS, DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from .judge import LOW_PRECISION_FACTOR, LOW_PRECISION_FLOOR
from .record import Record, Summary, summarize
from .worker import Row

SYMBOLS = {EXACT: "✓", REFUSED: "R", NOT_RUNNABLE: "-", DIFFERENT: "✗"}
#: Groups in the order of the page, and their headings.
KINDS = {
    "text decoder": "Text decoders",
    "text encoder": "Text encoders",
    "encoder-decoder": "Encoder-decoders",
    "multimodal": "Multimodal models",
    "vision": "Vision models",
    "audio": "Audio models",
    "other": "Other models",
}


def render(record: Record, others: dict[str, Record] | None = None) -> str:
    """The whole page of a record, with a section on others (by the names of their files)."""
    notes = Notes()
    groups = [_group(kind, title, record, notes) for kind, title in KINDS.items()]
    parts = [
        _head(record),
        _summary(record, summarize(record.rows)),
        _others(record, others or {}),
        _LEGEND,
        *[group for group in groups if group],
        notes.render(),
        _not_run(record),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


class Notes:
    """Footnotes, numbered in the order in which they are first used; equal texts share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a note."""
        return self._numbers.setdefault(text, len(self._numbers) + 1)

    def render(self) -> str:
        """All notes."""
        if not self._numbers:
            return ""
        lines = [f'{number}. <a id="n{number}"></a>{_escape(text)}' for text, number in self._numbers.items()]
        return "## Notes\n\n" + "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _head(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.header["versions"].items())
    return (
        f"""# Coverage: every model type of Transformers, `flash_plus` against eager

<!-- Written by `hf-flash-plus coverage`; do not edit. -->

Every model type with an auto class is built with a tiny configuration and random weights, large enough that attention
decides the output, and run with `attn_implementation="flash_plus"` and with `"eager"` on the same inputs. A cell is
{_exact(record)}, **refused** when `flash_plus` says that it does not serve the model and the model
keeps its own attention, and **not runnable** where eager itself does not run. Nothing may differ silently: a model
type with a `{SYMBOLS[DIFFERENT]}` is a bug.

{record.header["date"]}; {versions}; {record.header["device"]}, {record.header["dtype"]}. Data:
[`tests/transformers/coverage.json`](tests/transformers/coverage.json). Made by `hf-flash-plus coverage`.
[What is checked](#legend) · """
        + " · ".join(f"[{title}](#{_anchor(title)})" for title in KINDS.values())
        + (" · [Notes](#notes) · [Not run](#not-run)")
    )


def _exact(record: Record) -> str:
    """What counts as exact."""
    if record.header["dtype"] == "float32":
        return (
            f"**exact** when the largest difference is at most {record.header['tolerance']:g} of the largest value\n"
            "(more only where the note shows that it is rounding)"
        )
    return (
        f"**exact** when `flash_plus` in {record.header['dtype']} is at most twice as far from eager in fp32 as eager\n"
        f"in {record.header['dtype']} is (or as one rounding of the largest value)"
    )


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _summary(record: Record, summary: Summary) -> str:
    lines = [
        "## Summary",
        "",
        "| model types | count |",
        "|---|---|",
        f"| with an auto class | {summary.total} |",
        f"| run in eager mode from a tiny configuration | {summary.run} |",
        f"| of these: switch to `flash_plus` | {summary.switched} |",
        f"| ... every check exact | {summary.exact} ({_percent(summary.exact, summary.switched)}) |",
        f"| ... some check refused with a message, the others exact | {summary.partly} |",
        f"| refused as a whole: the model keeps its own attention, with a warning that says why | {summary.refused} |",
        f"| never call attention (convolutional, recurrent, ...) | {summary.idle} |",
        f"| **differ** | **{summary.different}** |",
        f"| do not run in eager mode here ([why](#not-run)) | {summary.total - summary.run} |",
        "",
        "| check | " + " | ".join(SYMBOLS[word] + " " + word for word in SYMBOLS) + " |",
        "|---|" + "---|" * len(SYMBOLS),
    ]
    for name, counts in summary.cells.items():
        if name in record.header["checks"]:
            lines.append(f"| {name} | " + " | ".join(str(counts[word]) for word in SYMBOLS) + " |")
    return "\n".join(lines)


def _others(record: Record, others: dict[str, Record]) -> str:
    """Other versions, devices and precisions: their counts, and where their cells have other outcomes."""
    if not others:
        return ""
    lines = [
        "## Other versions, devices and precisions",
        "",
        "The same sweep elsewhere. A cell is counted as other than above only where both records have it.",
        "",
        "| data | Transformers | torch | device | dtype | date | types | run | switch | exact | partly refused "
        "| refused | never call | differ | cells other than above |",
        "|---|---|---|---|---|---|" + "--:|" * 9,
    ]
    for name, other in others.items():
        header, counts = other.header, summarize(other.rows)
        versions = header["versions"]
        numbers = (counts.total, counts.run, counts.switched, counts.exact, counts.partly, counts.refused, counts.idle)
        lines.append(
            f"| [`{name}`](tests/transformers/{name}) | {versions['transformers']} | {versions['torch']} | "
            f"{header['device']} | {header['dtype']} | {header['date']} | "
            + " | ".join(map(str, numbers))
            + f" | **{counts.different}** | {len(_changes(record, other))} |"
        )
    for name, other in others.items():
        lines += _low_precision(name, other)
        changes = _changes(record, other)
        if changes:
            lines += ["", f"<details><summary>{name}: cells other than above</summary>", "", *changes, "", "</details>"]
    return "\n".join(lines)


def _low_precision(name: str, other: Record) -> list[str]:
    """What exact means in half precision, and who served on a GPU."""
    dtype = other.header["dtype"]
    lines = []
    if dtype in ("bfloat16", "float16"):
        lines = [
            "",
            f"{name}: a cell is exact when `flash_plus` in {dtype} is at most {LOW_PRECISION_FACTOR:g} times as far "
            f"from eager in fp32 as eager in {dtype}, by the largest or by the root mean square difference, or at most "
            f"{LOW_PRECISION_FLOOR:.1e} of the largest value (one rounding to bf16). Generation is compared by the "
            "logits of all steps, with the same tokens put in.",
        ]
    served = Counter(provider for row in other.rows for provider in row.providers)
    if served:
        words = ", ".join(f"`{provider}` in {count}" for provider, count in served.most_common())
        lines += ["", f"{name}: providers that served, by model types: {words}."]
    return lines


def _changes(record: Record, other: Record) -> list[str]:
    """Where a cell that both records have has another outcome, one line a model type."""
    known = record.by_type()
    lines = []
    for row in other.rows:
        base = known.get(row.model_type)
        cells = [
            f"{name} {cell.outcome}" + (f" ({_escape(cell.note)})" if cell.note else "")
            for name, cell in row.cells.items()
            if base is not None and name in base.cells and base.cells[name].outcome != cell.outcome
        ]
        if cells:
            lines.append(f"- `{row.model_type}`: {'; '.join(cells)}")
    return lines


_LEGEND = "\n".join(
    [
        "## Legend",
        "",
        f"`{SYMBOLS[EXACT]}` exact · `{SYMBOLS[REFUSED]}` refused, with the message in the note · "
        f"`{SYMBOLS[NOT_RUNNABLE]}` eager itself does not run · `{SYMBOLS[DIFFERENT]}` different · "
        "an empty cell: the check does not apply. *calls*: attention calls that `flash_plus` served in all checks "
        "together. Numbers in brackets lead to the notes.",
        "",
        "| column | what is compared |",
        "|---|---|",
        *[f"| {name} | {text} |" for name, text in CHECKS.items()],
    ]
)


def _group(kind: str, title: str, record: Record, notes: Notes) -> str:
    rows = sorted((row for row in record.rows if row.runs and row.kind == kind), key=lambda row: row.model_type)
    if not rows:
        return ""
    names = [name for name in CHECKS if name in record.header["checks"] and any(name in row.cells for row in rows)]
    lines = [
        f"## {title}",
        "",
        "| model type | class | " + " | ".join(names) + " | calls | notes |",
        "|---|---|" + ":-:|" * len(names) + "--:|---|",
    ]
    lines += [_line(row, names, notes) for row in rows]
    return "\n".join(lines)


def _line(row: Row, names: list[str], notes: Notes) -> str:
    cells = [_symbol(row.cells.get(name), notes) for name in names]
    texts = []
    if row.refused:
        texts += sorted({f"keeps its own attention: {reason}" for reason in row.keeps.values()})
        cells = [SYMBOLS[REFUSED] if name in row.cells or name == names[0] else "" for name in names]
    elif row.keeps:
        texts += [f"inside it, {cls} keeps its own attention: {reason}" for cls, reason in row.keeps.items()]
    elif not row.calls and row.outcome() != DIFFERENT:
        texts.append("it never calls attention through Transformers' interface: nothing changes")
    if not row.enlarged:
        texts.append("with fresh weights: larger ones overflow")
    marks = " ".join(_mark(notes.number(text)) for text in texts)
    return f"| `{row.model_type}` | {row.cls} | " + " | ".join(cells) + f" | {row.calls} | {marks} |"


def _mark(number: int) -> str:
    return f"[[{number}](#n{number})]"


def _symbol(cell: Cell | None, notes: Notes) -> str:
    if cell is None:
        return ""
    symbol = SYMBOLS[cell.outcome]
    return f"{symbol} {_mark(notes.number(cell.note))}" if cell.note else symbol


def _not_run(record: Record) -> str:
    rows = [row for row in record.rows if not row.runs]
    if not rows:
        return ""
    lines = ["## Not run", "", "Under every configuration tried, eager itself fails.", ""]
    lines += ["| model type | why |", "|---|---|"]
    lines += [f"| `{row.model_type}` | {_escape(row.reason)} |" for row in rows]
    return "\n".join(lines)
