"""report.json of an artifact: reading it, and holding it against the artifact's headers.

See README.md for its keys. `decompose.report` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from ortho_cli.formats.artifact import REPORT_FILE, Artifact, damaged
from ortho_cli.formats.columns import holds_columns
from ortho_cli.formats.schema import Figure, Validated, fault


class Figures(Validated):
    """What decompose measured of a weight, or of all; None where it was not measured."""

    sqnr_db_alpha_0: Figure | None = None
    sqnr_db_alpha_1: Figure | None = None
    residual_kept: Figure | None = None
    # The first reports have none of these.
    curvature_error_alpha_0: Figure | None = None
    curvature_error_alpha_1: Figure | None = None
    saliency_kept: Figure | None = None


class Totals(Figures):
    """Figures of the whole artifact; what headers tell, too, may be missing in the first ones."""

    sqnr_db_alpha_0: Figure | None
    sqnr_db_alpha_1: Figure | None
    residual_kept: Figure | None
    bits_per_weight: Figure
    split_bits_per_weight: Figure
    split_bits_per_weight_base: Figure
    nnz: Figure
    tensors: int | None = None
    split_tensors: int | None = None
    weights: int | None = None
    split_weights: int | None = None
    base_bytes: int | None = None
    ortho_bytes: int | None = None
    density: Figure | None = None
    moved: int | None = None  # codes that forgetting moved
    delta_kept: Figure | None = None  # of ortho.split reference


class Row(Figures):
    """One tensor of the source."""

    name: str
    action: str
    dtype: str
    shape: list[int]
    bits: int | None = None  # of a code; the first reports do not tell: it was 4 throughout
    bits_per_weight: Figure | None
    nnz: int | None = None
    columns: int | None = None  # whole ones, of a compact ortho or of structure columns
    source_blake3: str | None = None
    blake3: dict[str, dict[str, str]] | None = None  # file -> tensor in it -> digest


class Versions(Validated):
    """What made the artifact."""

    ortho: str
    torch: str


class Report(Validated):
    """The report, but for its rows, which are validated one at a time."""

    format: str
    plan_sha256: str
    source_digest: str
    base_blake3: str | None = None
    ortho_blake3: str | None = None
    sealed_blake3: str | None = None
    base_sha256: str | None = None  # ortho/1 and ortho/2
    ortho_sha256: str | None = None
    sealed_sha256: str | None = None
    versions: Versions
    recipe: dict[str, object]
    totals: Totals
    tensors: list[object]
    statistics: dict[str, object] | None = None
    side_files: dict[str, str] | None = None

    def digest_of(self, file: str, algorithm: str) -> str | None:
        """Look up the digest of base, ortho or sealed; None where the report has none."""
        found: str | None = getattr(self, f"{file}_{algorithm}")
        return found


def rows_from_headers(artifact: Artifact) -> Iterator[Row]:
    """List the tensors of the source by the artifact's headers: split ones, then the others."""
    base = {tensor.name: tensor for tensor in artifact.base.tensors}
    kept = artifact.kept
    for module, (rows, columns) in artifact.shapes.items():
        names = [f"{module}.weight_{part}" for part in ("packed", "scale", "shape")]
        packed, scale, written = map(base.pop, names)  # what is left in the end is not split
        mine = kept.get(module, {})
        nbytes = sum(part.nbytes for part in (packed, scale, written, *mine.values()))
        row: dict[str, object] = {
            "name": f"{module}.weight",
            "action": "split",
            "dtype": scale.dtype,
            "shape": [rows, columns],
            "bits": artifact.bits[module],
            "bits_per_weight": round(8 * nbytes / (rows * columns), 4),
            "nnz": sum(mine[p].numel for p in mine if p.endswith("values")) if mine else None,
        }
        if whole := mine.get("col_indices" if holds_columns(mine) else "columns"):
            row["columns"] = whole.numel
        yield Row.model_validate(row)
    for tensor in base.values():
        yield Row(
            name=tensor.name,
            action="copy",
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            bits_per_weight=8 * tensor.nbytes / tensor.numel if tensor.numel else 0.0,
        )


def read_report(artifact: Artifact) -> Report | None:
    """Validate report.json, and hold it against the headers; None where there is none.

    Raises:
        ArtifactError: it is no report, or not this artifact's; names the key and both values.
    """
    if artifact.report is None:
        return None
    path = artifact.folder / REPORT_FILE
    report = _validate(artifact, artifact.report, path)
    mine = {row.name: row for row in rows_from_headers(artifact)}
    told = set()
    for row in rows_of(report, path):
        if row.name in told:
            raise damaged(path, f"`{row.name}` is twice in `tensors`")
        told.add(row.name)
        if row.name in mine:
            _check_row(row, mine[row.name], path, has_ortho=artifact.ortho is not None)
    for name in sorted(told ^ mine.keys()):
        raise damaged(path, f"tensor `{name}` is not in both the report and {artifact.base.name}")
    _check_totals(artifact, list(mine.values()), report.totals, path)
    return report


def _validate(artifact: Artifact, document: dict[str, object], path: Path) -> Report:
    """Validate the types of all but the rows, and what each format must tell."""
    try:
        report = Report.model_validate(document)
    except ValidationError as error:
        raise damaged(path, fault(error)) from None
    settings = report.recipe.get("base")
    if not isinstance(settings, dict) or not isinstance(settings.get("rounding"), str):
        raise damaged(path, "`recipe.base.rounding` is missing, or no word")
    for file in ("base", "ortho"):
        if report.digest_of(file, artifact.digest) is None:
            raise damaged(path, f"`{file}_{artifact.digest}` is missing")
    if report.format != artifact.form:
        raise damaged(path, f"it is of format {report.format!r}, not {artifact.form!r}")
    return report


def rows_of(report: Report, path: Path) -> Iterator[Row]:
    """Validate one row of `tensors` after another; all at once would take a kilobyte each.

    Args:
        report: of an artifact.
        path: of its file, for errors.
    Raises:
        ArtifactError: a row has a key of the wrong type.
    """
    for number, entry in enumerate(report.tensors):
        try:
            yield Row.model_validate(entry)
        except ValidationError as error:
            raise damaged(path, fault(error, inside=("tensors", str(number)))) from None


def _check_row(row: Row, mine: Row, path: Path, *, has_ortho: bool) -> None:
    for key in ("action", "dtype", "shape", "bits", *(("nnz", "columns") if has_ortho else ())):
        said = getattr(row, key)
        if key == "bits" and said is None and row.action == "split":
            said = 4
        if said != getattr(mine, key):
            raise damaged(path, f"`{key}` of `{row.name}` is {said!r}, not {getattr(mine, key)!r}")


def _check_totals(artifact: Artifact, rows: list[Row], totals: Totals, path: Path) -> None:
    """Hold the totals that headers tell, too, against them."""
    split = [row for row in rows if row.action == "split"]
    weights, split_weights = (sum(math.prod(row.shape) for row in some) for some in (rows, split))
    mine: dict[str, float] = {
        "tensors": len(rows),
        "split_tensors": len(split),
        "weights": weights,
        "split_weights": split_weights,
        "base_bytes": artifact.base.size,
    }
    if artifact.ortho is not None:
        size = artifact.base.size + artifact.ortho.size
        nnz = sum(row.nnz or 0 for row in split)
        mine |= {
            "ortho_bytes": artifact.ortho.size,
            "nnz": nnz,
            "density": nnz / split_weights,
            "bits_per_weight": round(8 * size / weights, 4),
        }
    for key, value in mine.items():
        said = getattr(totals, key)
        if said is not None and said != value:
            raise damaged(path, f"`totals.{key}` is {said!r}, and the files give {value!r}")
