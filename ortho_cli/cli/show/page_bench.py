"""The page of `ortho bench --html FILE`: the verdict, the dial, secrets by number, attacks.

Secrets are numbers there, also with `--show-secrets`: a page is made to be passed on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from ortho_cli.bench.attacks import ATTACKS
from ortho_cli.cli.show import page, plots
from ortho_cli.cli.show.bench import (
    attack_rows,
    figure_of,
    figure_rows,
    layer_rows,
    missing_figures,
    sizes_line,
    verdict_lines,
)
from ortho_cli.cli.show.console import number
from ortho_cli.cli.show.document import Document
from ortho_cli.cli.show.page import Html
from ortho_cli.formats.layers import natural, short_layers

# Path, title, form, and the smallest value of the axis.
DIAL: tuple[tuple[str, str, str, float | None], ...] = (
    ("exposure", "Exposure of secrets, bits", ".3g", 0.0),
    ("extraction", "Secrets extracted", ".0%", 0.0),
    ("token_accuracy", "Tokens of secrets told", ".0%", 0.0),
    ("perplexity", "Perplexity", ".4g", None),
    ("kl", "KL to the original, nats", ".3g", 0.0),
    ("skill", "Skill, exact answers", ".0%", 0.0),
)
LEVELS = ("original", "int4")  # rows that are levels on the dial
COLOURS = {"alpha 0": 0, "alpha 1": 1, "original": 1, "int4": 2, "reference": 3}
OTHERS = (4, 5, 2, 3)  # colours of further rows
MOST_SECRETS = 300  # that are drawn one by one
GOOD = {"forgotten": "good", "kept": "good", "served as made": "good"}


def make_page(bench: Mapping[str, object], *, name: str, more: Sequence[Html] = ()) -> bytes:
    """Make the page of a bench.

    Args:
        bench: the document that `ortho bench --json` prints.
        name: of what was measured, for the title.
        more: parts on the artifact itself, before the table of all figures.
    """
    document = Document(bench)
    rows = [row for row in document.rows("rows") if row["figures"]]
    lines = [_capital(line.removeprefix("* ")) for line in verdict_lines(document)]
    missing = [f"{_capital(words)} ({needs})" for needs, words in missing_figures(document)]
    absent = page.section("Not measured, and what that needs", page.sentences(missing))
    lead = f"What each alpha of it gives, by ortho bench {document.text('ortho')}"
    parts = [
        page.section(
            "Verdict",
            page.tiles(_tiles(document, rows), kind="tiles four"),
            page.sentences(lines),
        ),
        *_served(document),
        *_dial(rows),
        *_layers(rows),
        *_secrets(document, rows),
        *_curves(rows),
        *_variants(rows),
        *_controls(document, rows),
        *more,
        _all_figures(document, rows),
        *([absent] if missing else []),
    ]
    return page.whole_page(name, lead, *parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _named(rows: Sequence[Document], name: str) -> Document | None:
    """Find the figures of a row."""
    return next((row.part("figures") for row in rows if row["row"] == name), None)


def _value(figures: Document | None, path: str) -> float | None:
    figure = None if figures is None else figure_of(figures, path)
    value = None if figure is None else figure.get("value")
    return float(value) if isinstance(value, int | float) else None


def _tiles(document: Document, rows: Sequence[Document]) -> Iterator[tuple[str, str, str, str]]:
    verdict, base = document.part("verdict"), _named(rows, "alpha 0")
    for key, label, meaning in (
        ("memory", "Secrets", "at alpha 0"),
        ("utility", "Everything else", "at alpha 0, beside INT4"),
        ("full", "The full model", "at alpha 1, beside INT4"),
        ("served", "The server", "its answers, beside our arithmetic"),
    ):
        if (word := verdict.get(key)) is not None:
            yield label, str(word), meaning, GOOD.get(str(word), "bad")
    yield from _better(verdict)
    if (exposure := _value(base, "exposure")) is not None:
        chance = figure_of(base, "exposure") if base is not None else None
        beside = number(chance and chance.get("chance"))
        yield "Exposure", f"{exposure:.2f} bits", f"at alpha 0; chance is {beside}", ""
    if (extraction := _value(base, "extraction")) is not None:
        yield "Extracted", f"{extraction:.0%}", "of secrets at alpha 0, greedily", ""
    for path, label, form, unit in (
        ("kl", "KL to the original", ".4f", " nats"),
        ("perplexity_ratio", "Perplexity over INT4", ".3f", ""),
    ):
        if (value := _value(base, path)) is not None:
            yield label, f"{format(value, form)}{unit}", "at alpha 0", ""


def _served(document: Document) -> Iterator[Html]:
    """Say how a server was asked, and list the requests that strayed, by their number.

    Its address and the names of its models are in no page: a page is made to be passed on.
    """
    served = document.optional("served")
    if served is None:
        return
    about = (
        f"{served['requests']} requests at alpha {', '.join(served.part('models'))}: "
        f"{served['prefixes']} prefixes of {served['shortest']} to {served['longest']} tokens, "
        f"alone and {served['together']} at once. Divergences bound KL from below, in nats."
    )
    table = [
        (
            str(one["request"]),
            one.text("phase"),
            str(one["prefix"]),
            f"{one.number('asked'):g}",
            "none" if one["got"] is None else f"{one.number('got'):g}",
            f"{one.number('divergence'):.3g}",
            f"{one.number('divergence_nearest'):.3g} (alpha {one.number('nearest'):g})",
        )
        for one in served.rows("strays")
    ]
    columns = ("request", "phase", "prefix", "asked", "got", "divergence", "from the nearest")
    listed = page.fold(f"{len(table)} requests that strayed", page.table(columns, table))
    sure = f"{served['sure']} answers are of one alpha and clearly of no other."
    yield page.section(
        "What the server answers",
        page.sentences([sure]),
        *([listed] if table else []),
        about=about,
    )


def _better(verdict: Document) -> Iterator[tuple[str, str, str, str]]:
    if (better := verdict.get("better_than_controls")) is not None:
        words = ("no", "bad") if not better else ("yes", "good")
        yield "Better than controls", words[0], "than edits that know no secret", words[1]


def _point(figures: Document, path: str, x: float) -> tuple[float, float, float, float] | None:
    figure = figure_of(figures, path)
    if figure is None or figure.get("value") is None:
        return None
    ends = (figure.get("low"), figure.get("high"))
    low, high = (float(end) if isinstance(end, int | float) else math.nan for end in ends)
    return x, figure.number("value"), low, high


def _dial(rows: Sequence[Document]) -> Iterator[Html]:
    """Draw figures against alpha, beside the original and INT4."""
    alphas = [
        (row.number("alpha"), row.part("figures")) for row in rows if row.get("alpha") is not None
    ]
    panels = []
    for path, title, form, floor in DIAL:
        points = [
            _point(figures, path, alpha) for alpha, figures in sorted(alphas, key=lambda a: a[0])
        ]
        known = [point for point in points if point is not None]
        if len(known) < 2:
            continue
        levels = [
            (name, level)
            for name in LEVELS
            if (level := _value(_named(rows, name), path)) is not None
        ]
        panels.append(
            plots.Panel(
                title=title,
                lines=[plots.Line(name=title, points=known)],
                levels=levels,
                form=form,
                x_label="alpha",
                floor=floor,
            )
        )
    if panels:
        about = (
            "Alpha is the share of ortho that is added: 0 is base alone, 1 the full model. Bands "
            "are 95 % intervals; dashed lines are other models."
        )
        yield page.section("The dial", page.plot(plots.draw_panels(panels)), about=about)


def _layers(rows: Sequence[Document]) -> Iterator[Html]:
    """Draw what each layer costs by itself, a plot for each alpha."""
    costs = layer_rows(rows)
    if not costs:
        return
    names, layers = list(costs[0][1]), sorted(dict(costs), key=natural)
    short, figures = short_layers(layers), dict(costs)
    plotted = [
        plots.Bars(
            title=f"KL to the original at {name}, nats",
            values={short[layer]: figures[layer][name].number("value") for layer in layers},
            series=COLOURS.get(name, OTHERS[0]),
        )
        for name in names
    ]
    table = [
        (layer, *(f"{found[name].number('value'):.5f}" for name in names)) for layer, found in costs
    ]
    about = (
        "The original with the weights of one layer alone taken from the artifact: what that layer "
        f"costs. Layers are compared on the same {costs[0][1][names[0]].number('n'):,} tokens."
    )
    yield page.section(
        "What each layer costs",
        page.plot(plots.draw_bars(plotted)),
        page.fold("Layers in figures, the worst first", page.table(["layer", *names], table)),
        about=about,
    )


def _exposures(figures: Document | None) -> dict[int, float]:
    entries = figures.rows("entries") if figures is not None else []
    return {int(entry.number("index")): entry.number("exposure") for entry in entries}


def _secrets(document: Document, rows: Sequence[Document]) -> Iterator[Html]:
    """Draw the exposure of each secret, by its number, before and after."""
    base = _named(rows, "alpha 0")
    after = _exposures(base)
    if base is None or not after:
        return
    name = next((n for n in ("alpha 1", *LEVELS) if _exposures(_named(rows, n))), "")
    before = _exposures(_named(rows, name))
    about = "Exposure says how far a secret stands out among alternatives of its form."
    shown = after
    if len(after) > MOST_SECRETS:
        most = sorted(after, key=lambda index: -after[index])[:MOST_SECRETS]
        shown = {index: after[index] for index in most}
        about += f" Shown are the {MOST_SECRETS} of {len(after)} that are most exposed at alpha 0."
    exposure = figure_of(base, "exposure") or Document({})
    levels = [
        (word, float(level))
        for word, level in (("chance", exposure.get("chance")), ("most", exposure.get("maximum")))
        if isinstance(level, int | float)
    ]
    threshold = document.part("verdict").part("thresholds").get("exposure")
    legend = [*([(f"before: {name}", 1)] if name else []), ("after: alpha 0", 0)]
    if isinstance(threshold, int | float):
        about += f" The verdict allows a mean of {threshold:g} bits."
    columns = ["secret", *([f"bits, {name}"] if name else []), "bits, alpha 0"]
    table = [
        [
            str(index),
            *([number(before.get(index))] if name else []),
            number(after[index]),
        ]
        for index in sorted(shown)
    ]
    yield page.section(
        "Each secret, by number",
        page.legend(legend),
        page.plot(plots.draw_pairs(before, shown, levels)),
        page.fold(f"{len(shown)} secrets in figures", page.table(columns, table)),
        about=about,
    )


def _colours(names: Sequence[str]) -> dict[str, int]:
    free = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    return {name: COLOURS[name] if name in COLOURS else next(free) for name in names}


def _curves(rows: Sequence[Document]) -> Iterator[Html]:
    """Draw attacks whose results are by steps of training: exposure of the other half."""
    panels, used = [], dict[str, None]()
    colours = _colours([row.text("row") for row in rows])
    for attack in ATTACKS:
        lines = []
        for row in rows:
            curve = row.part("figures").optional(attack.name)
            steps = [key for key in curve or () if key.isdecimal()]
            if curve is None or len(steps) < 2 or len(steps) < len(curve):
                continue
            points = [
                (float(step), curve.part(step).number("exposure"), math.nan, math.nan)
                for step in steps
            ]
            name = row.text("row")
            used[name] = None
            lines.append(plots.Line(name=name, points=points, series=colours[name]))
        if lines:
            panels.append(
                plots.Panel(
                    title=_capital(attack.measures),
                    lines=lines,
                    x_label="steps",
                    floor=0.0,
                    by_place=True,
                )
            )
    if panels:
        about = (
            "An attacker trains the model, and the secrets that were not in the training are "
            "measured: exposure in bits after so many steps. A model that never saw them is the "
            "floor."
        )
        legend = page.legend((name, colours[name]) for name in used)
        yield page.section("Relearning", legend, page.plot(plots.draw_panels(panels)), about=about)


def _variants(rows: Sequence[Document]) -> Iterator[Html]:
    """Draw every attack's result at alpha 0."""
    attacked = [row for row in rows if any(a.name in row.part("figures") for a in ATTACKS)]
    if not attacked:
        return
    exposure = figure_of(attacked[0].part("figures"), "exposure")
    chance = exposure and exposure.get("chance")
    results = {label: found[0] for label, found in attack_rows(attacked) if found[0] is not None}
    columns = [
        plots.Dots(
            title="Exposure, bits",
            values={k: (r.number("exposure"), math.nan, math.nan) for k, r in results.items()},
            floor=0.0,
            threshold=("chance", float(chance)) if isinstance(chance, int | float) else None,
        ),
        plots.Dots(
            title="Tokens of secrets told",
            values={
                k: (r.number("token_accuracy"), math.nan, math.nan) for k, r in results.items()
            },
            form=".0%",
            floor=0.0,
        ),
    ]
    table = page.table(
        ["attack", *(row.text("row") for row in attacked)],
        [
            (label, *(_recall_words(result) for result in found))
            for label, found in attack_rows(attacked)
        ],
    )
    yield page.section(
        "Attacks",
        page.plot(plots.draw_dots(list(results), columns)),
        page.fold("Beside other models", table),
        about=f"What each attack brings back at {attacked[0]['row']}.",
    )


def _recall_words(result: Document | None) -> str:
    if result is None:
        return "-"
    return f"{result.number('exposure'):.2f} bits, {result.number('token_accuracy'):.0%}"


def _controls(document: Document, rows: Sequence[Document]) -> Iterator[Html]:
    """Draw alphas, controls and other models side by side: memory, and its price."""
    thresholds = document.part("verdict").part("thresholds")
    columns = []
    for path, title, form, floor, ceiling in (
        ("exposure", "Exposure, bits", ".2f", 0.0, None),
        ("perplexity_ratio", "Perplexity over INT4", ".3f", None, 1.15),
        ("kl", "KL to the original, nats", ".4f", 0.0, None),
    ):
        points = {row.text("row"): _point(row.part("figures"), path, 0.0) for row in rows}
        values = {name: point[1:] for name, point in points.items() if point is not None}
        at = thresholds.get(path)
        if values:
            threshold = ("allowed", float(at)) if isinstance(at, int | float) else None
            columns.append(
                plots.Dots(
                    title=title,
                    values=values,
                    form=form,
                    floor=floor,
                    ceiling=ceiling,
                    threshold=threshold,
                )
            )
    if columns and len(rows) > 1:
        names = [row.text("row") for row in rows]
        yield page.section(
            "Beside controls and other models",
            page.plot(plots.draw_dots(names, columns, strong=["alpha 0"])),
            about="Dashed lines are the most that the verdict allows: of exposure, for secrets to "
            "be forgotten; of perplexity, for the rest to be kept. Bars are 95 % intervals; an "
            "arrow is a value beyond the axis.",
        )


def _all_figures(document: Document, rows: Sequence[Document]) -> Html:
    samples = document.part("settings").text("samples")
    table = [
        (label, *(_stacked(cell.plain) for cell in cells))
        for label, cells in figure_rows(rows, samples)
    ]
    columns = ["figure", *(row.text("row") for row in rows)]
    return page.section("All figures", page.table(columns, table), about=sizes_line(document))


def _stacked(cell: str) -> object:
    """Put the interval of a figure below it."""
    value, _, interval = cell.partition("\n")
    return (
        page.join([page.element("span", value), page.element("small", interval)])
        if interval
        else value
    )
