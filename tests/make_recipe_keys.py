"""Write the keys of a recipe into recipes/README.md: default, values and meaning, from the schema.

python tests/make_recipe_keys.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ortho_cli.decompose.settings import Recipe

FILE = Path(__file__).parent.parent / "recipes" / "README.md"
BEGIN, END = "<!-- keys: python tests/make_recipe_keys.py -->\n", "<!-- end of keys -->\n"
MOST = 1e6  # bounds from here on only keep absurd values out, and are not told
SECTIONS = ("base", "ortho", "saliency", "calibrate", "tune", "forget")


def values(schema: dict[str, Any]) -> str:
    """Say what a key may be: its choices, or its type with its bounds."""
    if "anyOf" in schema:
        return ", ".join(values(one) for one in schema["anyOf"] if one.get("type") != "null")
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        return ", ".join(f"`{one}`" for one in choices)
    if schema.get("type") == "array":
        return "list of patterns"
    kind = {"boolean": "`true`, `false`", "number": "number", "integer": "integer"}
    low, high = schema.get("minimum"), schema.get("maximum")
    said = kind.get(schema.get("type", ""), "text")
    if low is not None and high is not None and high < MOST:
        return f"{said} from {low:g} to {high:g}"
    if "exclusiveMinimum" in schema:
        return f"{said} above {schema['exclusiveMinimum']:g}"
    return said if low is None else f"{said} from {low:g}"


def default(schema: dict[str, Any]) -> str:
    """Write the default as it stands in YAML."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    shown = str(value).lower() if isinstance(value, bool) else value
    return "" if value is None or value == [] else f"`{shown}`"


def keys() -> str:
    """Give one table for each section of a recipe."""
    schema = Recipe.model_json_schema()
    parts = []
    for title in ("", *SECTIONS):
        name = title.capitalize() or None
        found = (schema["$defs"][name] if name else schema)["properties"]
        rows = [
            f"| `{key}` | {default(one)} | {values(one)} | {one['description']} |"
            for key, one in found.items()
            if "description" in one
        ]
        head = f"### `{title}`" if title else "### Which tensors"
        table = ["| key | default | values | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([head, "", *table]))
    return BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END


def with_keys(text: str) -> str:
    """Put the tables between their marks in the text."""
    before, _, rest = text.partition(BEGIN)
    return before + keys() + rest.partition(END)[2]


if __name__ == "__main__":
    FILE.write_text(with_keys(FILE.read_text()))
