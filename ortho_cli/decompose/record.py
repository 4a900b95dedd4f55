"""The record of one finished tensor: a line of the journal, and what the report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from ortho_cli.decompose.plan import SplitTensor, TensorPlan
from ortho_cli.formats.artifact import BASE_FILE, ORTHO_FILE
from ortho_cli.split.task import Figures

KNOWN = {BASE_FILE, ORTHO_FILE}
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

    def to_json(self) -> dict[str, object]:
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
    def from_json(cls, line: Mapping[str, object]) -> TensorRecord | None:
        """Read the journal's line; None where we could not have written it."""
        digests, source, tuned = (line.get(key) for key in ("blake3", "source_blake3", "tuned"))
        if not isinstance(digests, dict) or not {BASE_FILE} <= set(digests) <= KNOWN:
            return None
        base, ortho = _digests(digests[BASE_FILE]), _digests(digests.get(ORTHO_FILE, {}))
        if base is None or ortho is None or not _is_digest(source):
            return None
        told = {one.name: line[one.name] for one in fields(Figures) if one.name in line}
        numbers = {k: n for k, n in told.items() if isinstance(n, float) and math.isfinite(n)}
        if numbers != told or (numbers and not {"signal", "noise", "noise_kept"} <= set(numbers)):
            return None
        block: tuple[str, int] | None = None
        if tuned is not None:
            if not isinstance(tuned, list) or list(map(type, tuned)) != [str, int]:
                return None
            block = (tuned[0], tuned[1])
        return cls(
            name=str(line["name"]),
            source_blake3=str(source),
            base=base,
            ortho=ortho,
            figures=Figures(**numbers) if numbers else None,
            tuned=block,
        )

    def fits(self, tensor: TensorPlan, *, curvature: bool) -> bool:
        """Tell whether it is the record of this tensor, all of whose parts it names."""
        of = self.figures
        if (of is None) == isinstance(tensor, SplitTensor):
            return False
        if of and curvature and None in (of.curvature_noise, of.curvature_noise_kept):
            return False
        parts = ((self.base, tensor.base), (self.ortho, tensor.ortho))
        return all(set(digests) == {spec.key for spec in specs} for digests, specs in parts)


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64


def _digests(part: object) -> Digests | None:
    return part if isinstance(part, dict) and all(map(_is_digest, part.values())) else None
