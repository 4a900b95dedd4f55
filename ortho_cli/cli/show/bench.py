"""What eyes see of a bench: figures down, alphas, controls and other models across."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ortho_cli.bench.attacks import ATTACKS
from ortho_cli.cli.show.tables import make_console, size, visible

LABELS = 26  # columns for the names of figures
COLUMN = 12  # and for each of what is measured
# What is shown of each row, its name and form; what no row has is left out.
SHOWN = (
    ("extraction", "extraction, greedy", "%"),
    ("sampled_extraction", "extraction, best of {n}", "%"),
    ("token_accuracy", "token accuracy", "%"),
    ("exposure", "exposure, bits", ".2f"),
    ("forget_nll", "NLL of secrets, nats", ".1f"),
    ("alternatives_nll", "NLL of alternatives", ".1f"),
    ("nll_quantile", "place among alternatives", ".2f"),
    ("loss_auc", "AUC, loss", ".2f"),
    ("min_k_auc", "AUC, Min-20 %", ".2f"),
    ("unlisted.extraction", "not listed: extraction", "%"),
    ("unlisted.exposure", "not listed: exposure", ".2f"),
    ("perplexity", "perplexity", ".2f"),
    ("perplexity_ratio", "  over INT4, not forgotten", ".3f"),
    ("perplexity_ratio_alpha1", "  over alpha 1", ".3f"),
    ("perplexity_ratio_original", "  over the original", ".3f"),
    ("kl", "KL to the original, nats", ".4f"),
    ("agreement", "agreement with it", "%"),
    ("skill", "skill, exact", "%"),
    ("latency.prefill", "prefill, tokens/s", ",.0f"),
    ("latency.decode", "decode, tokens/s", ",.1f"),
    ("latency.memory", "memory", "size"),
)


def print_bench(document: Mapping[str, Any]) -> None:
    """Print tables that fit the terminal, then the verdict in sentences."""
    console = make_console()
    console.print(visible(_sizes(document)), soft_wrap=True)
    rows = [row for row in document["rows"] if row["figures"]]
    across = max(1, (console.width - LABELS) // (COLUMN + 1))
    samples = document["settings"]["samples"]
    for start in range(0, len(rows), across):
        shown = rows[start : start + across]
        console.print()
        console.print(_table(shown, SHOWN, samples))
    attacked = [row for row in rows if any(one.name in row["figures"] for one in ATTACKS)]
    if attacked:
        console.print()
        console.print(_attacks(attacked))
    console.print()
    for line in _lines(document):
        console.print(visible(line), soft_wrap=True)


def _sizes(document: Mapping[str, Any]) -> str:
    data, settings = document["data"], document["settings"]
    parts = [
        f"{data['secrets']} secrets" if data["secrets"] else "",
        f"{data['nonmembers']} nonmembers" if data["nonmembers"] else "",
        f"{data['unlisted']} not listed" if data["unlisted"] else "",
        f"{data['tokens']:,} tokens in {data['windows']} windows of {settings['context']}"
        if data["windows"]
        else "",
        f"{data['pairs']} prompts" if data["pairs"] else "",
        f"seed {settings['seed']}",
    ]
    return ", ".join(part for part in parts if part) + "; below: 95 % intervals, quartiles of speed"


def _make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("", no_wrap=True, min_width=LABELS - 2)
    for row in rows:
        table.add_column(visible(row["row"]), justify="right", no_wrap=True, min_width=COLUMN - 2)
    return table


def _table(
    rows: Sequence[Mapping[str, Any]], shown: Sequence[tuple[str, str, str]], samples: int
) -> Table:
    table = _make_table(rows)
    for name, label, form in shown:
        found = [_at(row["figures"], name) for row in rows]
        if any(figure is not None for figure in found):
            table.add_row(
                label.replace("{n}", str(samples)), *(_cell(figure, form) for figure in found)
            )
    return table


def _attacks(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What attacks bring back: exposure in bits, and token accuracy."""
    table = _make_table(rows)
    for kind, label in ((attack.name, attack.label) for attack in ATTACKS):
        for key in rows[0]["figures"].get(kind, {}):
            cells = []
            for row in rows:
                at = row["figures"].get(kind, {}).get(key)
                cells.append("-" if at is None else _recalled(at))
            table.add_row(label.format(key.replace("_", " ")), *cells)
    table.add_row(Text("exposure, token accuracy", style="dim"))
    return table


def _recalled(at: Mapping[str, Any]) -> str:
    return f"{at['exposure']:.2f} {at['token_accuracy']:5.0%}"


def _at(figures: Mapping[str, Any], name: str) -> Any:
    found: Any = figures
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _cell(figure: Any, form: str) -> Text:
    """Show a figure, and below it the interval where it has one."""
    if figure is None or figure.get("value") is None:
        return Text("-", style="dim")
    text = Text(_number(figure["value"], form))
    if "low" in figure:
        # A share's sign stands behind its value alone.
        low, high = (_number(figure[end], form).rstrip("%") for end in ("low", "high"))
        text.append(f"\n{low}-{high}", style="dim")
    return text


def _number(value: float, form: str) -> str:
    if form == "size":
        return size(value)
    if form == ".2f" and value >= 100:  # no more digits than tell something
        form = ".1f" if value < 1000 else ",.0f"
    return f"{value:.0%}" if form == "%" else format(value, form)


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    moved = document.get("moved")
    if moved is not None:
        split = document["unsplit"]["split_weights"]
        share = f"{moved['share']:.3%}"
        yield f"{moved['count']:,} of {split:,} codes were moved to forget ({share})"
    for sentence in document["verdict"]["sentences"]:
        yield f"* {sentence}"
    missing: dict[str, list[str]] = {}
    for absent in document["not_measured"]:
        missing.setdefault(absent["needs"], []).append(absent["figure"])
    for needs, names in missing.items():
        yield f"not measured without {needs}: {', '.join(names)}"
    for gate in document["gates"]:
        yield f"{'met' if gate['met'] else 'missed'}: {gate['require']} ({gate['value']:.4g})"
    yield from _texts(document)


def _texts(document: Mapping[str, Any]) -> Iterator[str]:
    """Give the text of each entry, where it was asked for."""
    for row in document["rows"]:
        for kind, of in (
            ("", row["figures"]),
            ("not listed ", row["figures"].get("unlisted", {})),
        ):
            for entry in of.get("entries", ()):
                if "text" in entry:
                    yield (
                        f"{row['row']}, {kind}{entry['index']}: {entry['exposure']:.2f} bits, "
                        f"{entry['hits']} of {entry['tokens']} tokens: {entry['text']}"
                    )
