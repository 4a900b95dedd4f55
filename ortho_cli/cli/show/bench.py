"""Tables of `ortho bench`: figures down; alphas, controls and other models across."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from ortho_cli.bench.attacks import ATTACKS
from ortho_cli.bench.plan import MEMORY, SERVED
from ortho_cli.cli.show.console import make_console, print_lines, size, visible
from ortho_cli.cli.show.document import Document

MOST_LAYERS = 10  # in the table of layers
LABELS = 26  # columns for the names of figures
COLUMN = 12  # columns for each artifact, control or model
# Path of each figure, its label and format, in the order of the table; a figure that no row has is
# left out.
FIGURES = (
    ("extraction", "extraction, greedy", "%"),
    ("sampled_extraction", "extraction, best of {n}", "%"),
    ("token_accuracy", "token accuracy", "%"),
    ("rouge_l", "ROUGE-L of answers", ".2f"),
    ("extraction_strength", "extraction strength", ".2f"),
    ("truth_ratio", "truth ratio", ".2f"),
    ("exposure", "exposure, bits", ".2f"),
    ("forget_nll", "NLL of secrets, nats", ".1f"),
    ("alternatives_nll", "NLL of alternatives", ".1f"),
    ("nll_quantile", "alternatives more likely", "%"),
    ("rank_p", "p of uniform ranks", ".3f"),
    ("loss_auc", "AUC, loss", ".2f"),
    ("min_k_auc", "AUC, Min-20 %", ".2f"),
    ("centre_auc", "AUC, nearness to mean", ".2f"),
    ("positions", "moved codes found, AUC", ".2f"),
    ("distance", "distance from INT4", ".4f"),
    ("connectivity", "loss barrier to INT4, nats", ".4f"),
    ("unlisted.extraction", "not listed: extraction", "%"),
    ("unlisted.exposure", "not listed: exposure", ".2f"),
    ("keep.rouge_l", "to keep: ROUGE-L", ".2f"),
    ("keep.token_accuracy", "to keep: token accuracy", "%"),
    ("perplexity", "perplexity", ".2f"),
    ("perplexity_ratio", "  over INT4, not forgotten", ".3f"),
    ("perplexity_ratio_alpha1", "  over alpha 1", ".3f"),
    ("perplexity_ratio_original", "  over the original", ".3f"),
    ("kl", "KL to the original, nats", ".4f"),
    ("agreement", "agreement with it", "%"),
    ("skill", "skill, exact", "%"),
    ("tofu.forget_quality", "TOFU: forget quality, p", ".2g"),
    ("tofu.forget_truth_ratio", "  truth ratio, forget set", ".2f"),
    ("tofu.model_utility", "TOFU: model utility", ".2f"),
    *(
        (f"tofu.{name}.{figure}", f"  {label}, {words}", ".2f")
        for name, label in (
            ("retain", "retain"),
            ("real_authors", "authors"),
            ("world_facts", "facts"),
        )
        for figure, words in (
            ("probability", "probability"),
            ("rouge_l", "ROUGE-L"),
            ("truth_ratio", "1 - R"),
        )
    ),
    ("muse.verbmem", "MUSE: VerbMem", ".2f"),
    ("muse.knowmem_forget", "  KnowMem, forget", ".2f"),
    ("muse.knowmem_retain", "  KnowMem, retain", ".2f"),
    ("muse.privleak", "  PrivLeak, percent", ".0f"),
    ("served_divergence", "served: KL from ours, nats", ".2g"),
    ("served_difference", "  largest of logprobs", ".2g"),
    ("served_agreement", "  same first token", "%"),
    ("latency.prefill", "prefill, tokens/s", ",.0f"),
    ("latency.decode", "decode, tokens/s", ",.1f"),
    ("latency.memory", "memory, whole process", "size"),
)
# What figures that are not measured are of, in words.
KINDS = {
    **dict.fromkeys(MEMORY, "memory of secrets"),
    **dict.fromkeys(("loss_auc", "min_k_auc", "centre_auc"), "secrets against unseen ones"),
    **dict.fromkeys(("distance", "connectivity"), "nearness to INT4"),
    **dict.fromkeys(("perplexity_ratio_original", "kl", "agreement"), "distance from the original"),
    **{attack.name: attack.measures for attack in ATTACKS},
    "positions": "whether moved codes show",
    "unlisted": "secrets not listed",
    "keep": "rows to keep",
    "sampled_extraction": "extraction by sampling",
    "perplexity_ratio": "perplexity over INT4",
    "worst_perplexity_ratio": "perplexity over INT4",
    "perplexity_ratio_alpha1": "perplexity over alpha 1",
    "kl_by_layer": "KL by layer",
    "kinds": "perplexity of text that the model writes",
    **dict.fromkeys(SERVED, "what a server answers"),
    "tofu": "TOFU",
    "muse": "MUSE",
}


def print_bench(result: Mapping[str, object]) -> None:
    """Print tables that fit the terminal, then the verdict in sentences."""
    document, console = Document(result), make_console()
    print_lines([sizes_line(document)])
    rows = [row for row in document.rows("rows") if row["figures"]]
    across = max(1, (console.width - LABELS) // (COLUMN + 1))
    samples = document.part("settings").text("samples")
    for start in range(0, len(rows), across):
        console.print()
        console.print(_figures_table(rows[start : start + across], samples))
    attacked = [row for row in rows if any(a.name in row.part("figures") for a in ATTACKS)]
    if attacked:
        console.print()
        console.print(_attacks_table(attacked))
    if costs := layer_rows(rows):
        console.print()
        console.print(_layers_table([row for row in rows if row.text("row") in costs[0][1]], costs))
    console.print()
    print_lines(verdict_lines(document))
    if missing := missing_figures(document):
        console.print()
        lines = [f"  {needs}: {figures}" for needs, figures in missing]
        print_lines(["not measured, and what that needs", *lines])
    print_lines(_secrets(document))


def sizes_line(document: Document) -> str:
    """Say how much data was measured on."""
    data, settings = document.part("data"), document.part("settings")
    labels = {
        "secrets": "secrets",
        "nonmembers": "nonmembers",
        "unlisted": "not listed",
        "keep": "to keep",
    }
    parts = [f"{data[key]} {label}" for key, label in labels.items() if data[key]]
    if data["windows"]:
        windows = f"{data['windows']} windows of {settings['context']}"
        parts.append(f"{data.number('tokens'):,} tokens in {windows}")
    if data["pairs"]:
        parts.append(f"{data['pairs']} prompts")
    parts.append(f"seed {settings['seed']}")
    return ", ".join(parts) + "; under each figure its 95 % interval, under speeds their quartiles"


def _make_table(rows: Sequence[Document]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("", no_wrap=True, min_width=LABELS - 2)
    for row in rows:
        table.add_column(visible(row["row"]), justify="right", no_wrap=True, min_width=COLUMN - 2)
    return table


def _figures_table(rows: Sequence[Document], samples: str) -> Table:
    table = _make_table(rows)
    for label, cells in figure_rows(rows, samples):
        table.add_row(label, *cells)
    return table


def figure_rows(rows: Sequence[Document], samples: str) -> Iterator[tuple[str, list[Text]]]:
    """Give the label of each figure that any row has, and its cells."""
    kinds = dict.fromkeys(
        kind for row in rows for kind in row.part("figures").optional("kinds") or ()
    )
    named = [(f"kinds.{kind}.perplexity_ratio", f"  {kind} over INT4", ".3f") for kind in kinds]
    at = next(i for i, (path, _, _) in enumerate(FIGURES) if path == "perplexity_ratio_alpha1")
    for path, label, form in (*FIGURES[:at], *named, *FIGURES[at:]):
        figures = [figure_of(row.part("figures"), path) for row in rows]
        if any(figure is not None for figure in figures):
            yield label.replace("{n}", samples), [_cell(figure, form) for figure in figures]


def _attacks_table(rows: Sequence[Document]) -> Table:
    """Show what each attack brings back: exposure in bits, token accuracy, ROUGE-L of answers."""
    table = _make_table(rows)
    for label, results in attack_rows(rows):
        table.add_row(label, *map(_recalled, results))
    table.add_row(Text("exposure, token accuracy", style="dim"))
    return table


def attack_rows(rows: Sequence[Document]) -> Iterator[tuple[str, list[Document | None]]]:
    """Give the label of each point of each attack's curve, and its results by row."""
    for attack in ATTACKS:
        results = [row.part("figures").optional(attack.name) for row in rows]
        for key in results[0] or ():
            label = attack.label.format(key.replace("_", " "))
            yield label, [result and result.optional(key) for result in results]


def _recalled(result: Document | None) -> Text:
    if result is None:
        return Text("-")
    text = Text(f"{result.number('exposure'):.2f} {result.number('token_accuracy'):5.0%}")
    if "rouge_l" in result:
        text.append(f"\nROUGE-L {result.number('rouge_l'):.2f}", style="dim")
    return text


def layer_rows(rows: Sequence[Document]) -> list[tuple[str, dict[str, Document]]]:
    """Give each layer and its KL by row, the worst of the first row that has one first."""
    found: dict[str, dict[str, Document]] = {}
    for row in rows:
        if costs := row.part("figures").optional("kl_by_layer"):
            for layer, figure in costs.items():
                found.setdefault(layer, {})[row.text("row")] = Document(figure)
    return sorted(found.items(), key=lambda one: -next(iter(one[1].values())).number("value"))


def _layers_table(
    rows: Sequence[Document], costs: Sequence[tuple[str, Mapping[str, Document]]]
) -> Table:
    """Show the layers that cost most, and the sum of all beside the KL of the whole model."""
    table, names = _make_table(rows), [row.text("row") for row in rows]
    for layer, figures in costs[:MOST_LAYERS]:
        table.add_row(visible(layer), *(_cell(figures.get(name), ".4f") for name in names))
    sums = [math.fsum(figures[name].number("value") for _, figures in costs) for name in names]
    table.add_row(f"sum of all {len(costs)} layers", *(f"{total:.4f}" for total in sums))
    table.add_row(Text("KL to the original of a layer alone, nats; worst first", style="dim"))
    return table


def figure_of(figures: Document, path: str) -> Document | None:
    """Find a figure by its dotted path; None where it was not measured."""
    for part in path.split("."):
        inner = figures.optional(part)
        if inner is None:
            return None
        figures = inner
    return figures


def _cell(figure: Document | None, form: str) -> Text:
    """Show a figure, and its interval on a second line."""
    if figure is None or figure.get("value") is None:
        return Text("-", style="dim")
    text = Text(_number(figure.number("value"), form))
    if "low" in figure:
        # One percent sign, after the value, serves all three.
        low, high = (_number(figure.number(end), form).rstrip("%") for end in ("low", "high"))
        between = " to " if figure.number("low") < 0 else "-"
        text.append(f"\n{low}{between}{high}", style="dim")
    return text


def _number(value: float, form: str) -> str:
    if form == "size":
        return size(value)
    if form == ".2f" and value >= 100:  # more digits would only be noise
        form = ".1f" if value < 1000 else ",.0f"
    return f"{value:.0%}" if form == "%" else format(value, form)


def verdict_lines(document: Document) -> Iterator[str]:
    """Say what the figures mean, and which gates were met."""
    if moved := document.optional("moved"):
        split = document.part("unsplit").number("split_weights")
        yield (
            f"{moved.number('count'):,} of {split:,} codes were moved to forget "
            f"({moved.number('share'):.3%})"
        )
    for sentence in document.part("verdict").items_of("sentences"):
        yield f"* {sentence}"
    for gate in document.rows("gates"):
        state = "met" if gate["met"] else "missed"
        told = gate["unknown"] if "unknown" in gate else f"{gate.number('value'):.4g}"
        yield f"{state}: {gate['require']} ({told})"


def missing_figures(document: Document) -> list[tuple[str, str]]:
    """Say what else could be measured, and by which options: (options, figures)."""
    labels = {path: label.strip() for path, label, _ in FIGURES}
    missing: dict[str, list[str]] = {}
    for absent in document.rows("not_measured"):
        figure = absent.text("figure")
        name = KINDS.get(figure) or labels.get(figure) or figure.replace("_", " ")
        missing.setdefault(absent.text("needs"), []).append(name)
    return [(needs, ", ".join(dict.fromkeys(names))) for needs, names in sorted(missing.items())]


def _secrets(document: Document) -> Iterator[str]:
    """Print the text of each secret, where --show-secrets put it into the document."""
    for row in document.rows("rows"):
        figures = row.part("figures")
        for kind, part in (("", figures), ("not listed ", figures.optional("unlisted"))):
            for entry in part.rows("entries") if part else ():
                if "text" in entry:
                    yield (
                        f"{row['row']}, {kind}{entry['index']}: {entry.number('exposure'):.2f} "
                        f"bits, {entry['hits']} of {entry['tokens']} tokens: {entry['text']}"
                    )
