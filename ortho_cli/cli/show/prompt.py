"""Continuations of `ortho bench --prompt`, side by side, while they are said and after."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ortho_cli.bench.prompt import Answer, Continuation
from ortho_cli.cli.show.console import make_console, visible

NARROW = 80  # columns of a terminal below which continuations stand one below the other
COLUMN = 30  # columns that a continuation needs beside others
MARK = "bold reverse"


def show_answer(growing: Iterator[Answer]) -> Answer:
    """Print a prompt's continuations, on a terminal token by token; give the whole answer.

    Args:
        growing: as `bench.prompt.continue_prompt` yields them, at least one.
    """
    console = make_console(stderr=False)
    if console.is_terminal:
        # Cleared at the end: what is longer than the terminal is printed whole only then.
        with Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            answer = next(growing)
            live.update(_render(answer, console), refresh=True)
            for answer in growing:
                live.update(_render(answer, console), refresh=True)
    else:
        *_, answer = growing
    console.print(_render(answer, console))
    return answer


def _render(answer: Answer, console: Console) -> RenderableType:
    styled = console.is_terminal and not console.no_color
    parts: list[RenderableType] = [Text(_shown(answer.prompt), "bold")]
    said = [(f"alpha {one.alpha:g}", _said(one, answer, styled)) for one in answer.continuations]
    beside = max(NARROW, COLUMN * len(said))
    if console.width >= beside:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for name, _ in said:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(text for _, text in said))
        parts.append(table)
    else:
        for name, text in said:
            parts += [Text(name, "dim"), text]
    parts += _parting(answer, styled)
    return Group(*parts, Text(""))


def _said(one: Continuation, answer: Answer, styled: bool) -> Text:
    """Write a continuation, with the token marked at which it parts from the others."""
    parted, text = answer.first_difference, Text()
    for number, token in enumerate(one.tokens):
        if parted is not None and number == parted.token:
            text.append_text(_marked(token.text, styled))
        else:
            text.append(_shown(token.text))
    if parted is not None and one.ended and len(one.tokens) == parted.token:
        text.append_text(_marked("(end)", styled))
    return text


def _marked(words: str, styled: bool) -> Text:
    blank = words[: len(words) - len(words.lstrip(" "))]
    word = _shown(words[len(blank) :])
    return Text.assemble(blank, (word, MARK) if styled else f"[{word}]")


def _parting(answer: Answer, styled: bool) -> Iterator[RenderableType]:
    """Show the probability of each token that was chosen where they part."""
    if answer.first_difference is None:
        if len(answer.continuations) > 1:
            yield Text("the same at every alpha", "dim")
        return
    number = answer.first_difference.token + 1
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(f"they part at token {number}; its probability", overflow="fold")
    for one in answer.continuations:
        table.add_column(f"alpha {one.alpha:g}", justify="right", no_wrap=True)
    for choice in answer.first_difference.choices:
        shares = (f"{probability:.1%}" for probability in choice.probabilities)
        table.add_row(_marked(choice.text.strip(" ") or choice.text, styled), *shares)
    yield table


def _shown(text: str) -> str:
    """Escape control characters of what a tokenizer or a user wrote, but line breaks."""
    return "\n".join(visible(line) for line in text.split("\n"))
