"""Help as people read it: usage with the argument first, options in groups, examples.

Words in capitals stand for values, in one style whatever a typer version prints. Below NARROW
columns the text of an option is under its name.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    import typer
    from typer._click.core import Command as ClickCommand
    from typer._click.core import Context, Parameter
    from typer._click.formatting import HelpFormatter

WIDEST = 100  # columns: longer lines are hard to read
NARROW = 60

# Options by the names of their parameters; one that is nowhere here is in the first group.
GROUPS = {
    "Options": (),
    "Recipe": ("recipe", "sets", "stats", "target_bits", "schema"),
    "Data": ("data", "forget", "nonmember", "unlisted", "keep", "suite", "suite_rows", "key"),
    "Other models": ("reference", "model", "reference_model", "public", "expect_source", "served"),
    "Measuring": (
        *("alpha", "gram", "samples", "length", "batch_size", "tokens", "context", "seed"),
        *("controls", "attack", "by_layer", "verify"),
    ),
    "Output": (
        *("out", "to", "force", "dry_run", "copy", "dtype", "shard_size", "accept_damage"),
        *("max_rank", "approximate", "pad"),
        *("require", "csv", "as_csv", "top", "html", "keep_files"),
    ),
    "Continuations": ("prompts", "prompt", "max_new_tokens", "temperature"),
    "Sealing": ("seal_to", "seal_passphrase_file", "identity", "plaintext"),
    "Machine": ("workers", "device", "autocast", "max_memory"),
    "General": (
        *("as_json", "quiet", "verbose", "show_secrets", "version"),
        *("install_completion", "show_completion", "help"),
    ),
    "Dangerous": ("trust_remote_code",),
}
_VALUES = {"<int>": "N", "<int range>": "N", "<float>": "N", "<str>": "TEXT", "<path>": "PATH"}

Row = tuple[str, str]


def fit(formatter: HelpFormatter) -> None:
    """Make help as wide as the terminal."""
    formatter.width = max(30, min(shutil.get_terminal_size().columns, WIDEST) - 2)


def usage(context: typer.Context | Context) -> str:
    """Say in one line how a command is called."""
    return " ".join((context.command_path, *context.command.collect_usage_pieces(context)))


class Command(TyperCommand):
    """One command."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write all of it."""
        fit(formatter)
        super().format_help(ctx, formatter)

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Put the argument first: behind `--data FILE...` it would be one of the files."""
        return [*_arguments(self, ctx), "[OPTIONS]"]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the arguments, then each group of options."""
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(self.epilog, formatter)


class Root(TyperGroup):
    """The command `ortho` itself."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write all of it."""
        fit(formatter)
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the commands in the order of work, then the options."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, one.get_short_help_str()) for name, one in commands if one is not None]
        _write("Commands", rows, formatter)
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(self.epilog, formatter)


def _arguments(command: ClickCommand, context: Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        if parameter.param_type_name == "argument":
            name = _name_of(parameter)
            yield name if parameter.required else f"[{name}]"


def _name_of(parameter: Parameter) -> str:
    """Name an argument by its metavar."""
    return str(parameter.metavar or parameter.name).upper()


def _write_options(command: ClickCommand, context: Context, formatter: HelpFormatter) -> None:
    arguments: list[Row] = []
    groups: dict[str, list[Row]] = {title: [] for title in GROUPS}
    of = {name: title for title, names in GROUPS.items() for name in names}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        name, text = record
        if parameter.param_type_name == "argument":
            arguments.append((_name_of(parameter), text.removesuffix("[required]").rstrip()))
        else:
            name = re.sub(r"<[a-z ]+>", lambda found: _VALUES.get(found[0], "VALUE"), name)
            groups[of.get(str(parameter.name), "Options")].append((name, text))
    _write("Arguments", arguments, formatter)
    for title, rows in groups.items():
        _write(title, rows, formatter)


def _write(title: str, rows: Sequence[Row], formatter: HelpFormatter) -> None:
    if not rows:
        return
    with formatter.section(title):
        if formatter.width >= NARROW:
            formatter.write_dl(rows)
            return
        for name, text in rows:
            formatter.write(f"{'':{formatter.current_indent}}{name}\n")
            with formatter.indentation():
                formatter.write_text(text)


def _write_examples(epilog: str | None, formatter: HelpFormatter) -> None:
    """Write commands as they are typed; a terminal may wrap them, and they can be pasted."""
    if epilog:
        with formatter.section("Examples"):
            for line in inspect.cleandoc(epilog).splitlines():
                formatter.write(f"  {line}".rstrip() + "\n")
