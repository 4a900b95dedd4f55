"""The record of one finished tensor: a line of the journal, and what the report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ortho_cli.decompose.plan import SplitTensor, TensorPlan
from ortho_cli.formats.artifact import BASE_FILE, ORTHO_FILE
from ortho_cli.split.task import Figures

Digests = Mapping[str, str]  # key of a tensor of the artifact -> BLAKE3 of its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """What was read and written of one source tensor."""

    name: str
    source_blake3: str
    base: Digests
    ortho: Digests = field(default_factory=dict)  # empty where it was not split
    figures: Figures | None = None  # of a weight that was split
    tuned: tuple[str, int] | None = None  # first name and size of the block it was tuned in
    columns: int | None = None  # that a compact ortho holds whole

    def to_json(self) -> dict[str, Any]:
        """Give the journal's line."""
        figures = asdict(self.figures) if self.figures else {}
        return {
            "name": self.name,
            "source_blake3": self.source_blake3,
            **{key: value for key, value in figures.items() if value is not None},
            "blake3": self.digests,
            **({"tuned": list(self.tuned)} if self.tuned else {}),
        }

    @property
    def digests(self) -> dict[str, Digests]:
        """Digests by file."""
        ortho = {ORTHO_FILE: self.ortho} if self.ortho else {}
        return {BASE_FILE: self.base, **ortho}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> TensorRecord | None:
        """Read the journal's line; None where we could not have written it."""
        digests, told = line.get("blake3"), line.get("tuned")
        if not isinstance(digests, dict) or not {BASE_FILE} <= set(digests) <= {
            BASE_FILE,
            ORTHO_FILE,
        }:
            return None
        parts = [digests[BASE_FILE], digests.get(ORTHO_FILE, {})]
        if not all(isinstance(part, dict) for part in parts):
            return None
        texts = [line.get("source_blake3"), *(text for part in parts for text in part.values())]
        if not all(isinstance(text, str) and len(text) == 64 for text in texts):
            return None
        numbers = {one.name: line[one.name] for one in fields(Figures) if one.name in line}
        if not all(isinstance(n, float) and math.isfinite(n) for n in numbers.values()):
            return None
        if numbers and not {"signal", "noise", "noise_kept"} <= set(numbers):
            return None
        if told is not None and not (
            isinstance(told, list) and list(map(type, told)) == [str, int]
        ):
            return None
        return cls(
            name=line["name"],
            source_blake3=line["source_blake3"],
            base=parts[0],
            ortho=parts[1],
            figures=Figures(**numbers) if numbers else None,
            tuned=None if told is None else (told[0], told[1]),
        )

    def fits(self, tensor: TensorPlan, *, curvature: bool) -> bool:
        """Tell whether it is the record of this tensor, all of whose parts it names."""
        figures = self.figures
        if (figures is None) == isinstance(tensor, SplitTensor):
            return False
        if (
            figures is not None
            and curvature
            and None
            in (
                figures.curvature_noise,
                figures.curvature_noise_kept,
            )
        ):
            return False
        return set(self.base) == {spec.key for spec in tensor.base} and set(self.ortho) == {
            spec.key for spec in tensor.ortho
        }
