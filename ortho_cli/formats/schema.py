"""What validates the JSON of reports and statistics: pydantic's strict types, and one error text.

Keys that are not named are left alone: later versions add some, and earlier ones lack others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ortho_cli.errors import shown

# The bound keeps out integers of a thousand digits, which are JSON and no float.
Figure = Annotated[float, Field(ge=-1e300, le=1e300)]
Digest = Annotated[str, Field(min_length=64, max_length=64)]  # BLAKE3 or SHA-256, in hex


class Validated(BaseModel):
    """A JSON object whose values have the types that are declared, without any conversion."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def fault(error: ValidationError, *, inside: Sequence[str] = ()) -> str:
    """Say which key of a JSON document is wrong, what it holds, and what belongs there.

    Args:
        error: of pydantic; its first fault is told.
        inside: keys that lead to what was validated.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, (*inside, *first["loc"])))
    if first["type"] == "missing":
        return f"`{key}` is missing"
    wanted = first["msg"].removeprefix("Input should be ")
    if len(wanted) > 80:  # pydantic spells the bound of 1e300 with all its digits
        wanted = "a number that can be shown"
    return f"`{key}` is {shown(first['input'])}, not {wanted}"
