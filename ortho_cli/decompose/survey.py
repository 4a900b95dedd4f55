"""The file survey.json: the counts of a survey, which a resumed run reads instead of all weights.

`budget` surveys a checkpoint before anything is written: it reads every weight once, and counts
weights by saliency. The work folder keeps the counts as JSON, and the journal's first line holds
the BLAKE3 of that file. A file that does not fit the line is ignored: it is of another run, or was
changed. `Survey.of` and `Survey.digests` tell which weights were counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.split.select import BINS
from ortho_cli.storage.checkpoint import Shard
from ortho_cli.storage.job import resolve_output
from ortho_cli.storage.untrusted import read_regular
from ortho_cli.storage.work_folder import identity_left, work_folder, write_private

SURVEY_FILE = "survey.json"  # in private/ of the work folder
KEY = "survey"  # of the identity of work

Counts = npt.NDArray[np.int64]  # (BINS,) weights of a tensor by saliency
Columns = npt.NDArray[np.int64]  # (k,) columns of a tensor, ascending
Sums = npt.NDArray[np.float64]  # (in,) sum of the squared saliency of each column


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Numbers of weights of each tensor by saliency, and which weights were counted."""

    of: str  # SHA-256 of everything in headers that the counts depend on
    counts: Mapping[str, Counts]
    digests: Mapping[str, str]  # BLAKE3 of each tensor that was read
    # Of siblings that are to share columns: sums over all of them, by the name of the first.
    sums: Mapping[str, Sums] = field(default_factory=dict)


def digest_of(surveys: Sequence[Survey]) -> str:
    """Return the BLAKE3 of survey.json with these surveys."""
    return blake3(_encode(surveys)).hexdigest()


def stamps(shards: Iterable[Shard]) -> list[list[str | int]]:
    """List name, size and time of files: a file of other stamps is another file."""
    return [[shard.name, shard.size, shard.mtime_ns] for shard in shards]


def save_surveys(folder: Path, surveys: Sequence[Survey]) -> None:
    """Write survey.json into the private folder of work, whole or not at all; no file without any.

    It is not sealed where ortho is: it reveals no weight and no position.
    """
    if surveys:
        data = _encode(surveys)
        write_private(folder / SURVEY_FILE, lambda file: file.write(data))


def load_surveys(out: Path) -> tuple[Survey, ...]:
    """Read the surveys of unfinished work on OUT; none where they do not fit its journal."""
    out = resolve_output(out)
    told = (identity_left(out) or {}).get(KEY)
    path = work_folder(out) / "private" / SURVEY_FILE
    try:
        raw = read_regular(path)
        return _decode(raw) if blake3(raw).hexdigest() == told else ()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()


def _encode(surveys: Sequence[Survey]) -> bytes:
    found = []
    for survey in surveys:
        tensors = {}
        for name, counts in sorted(survey.counts.items()):
            bins = np.flatnonzero(counts)  # a few hundred of them
            told = {"bins": bins.tolist(), "counts": counts[bins].tolist()}
            tensors[name] = {"blake3": survey.digests[name], **told}
        sums = {name: one.tolist() for name, one in sorted(survey.sums.items())}
        found.append({"of": survey.of, "tensors": tensors, **({"sums": sums} if sums else {})})
    return json.dumps(found, separators=(",", ":")).encode()


def _decode(raw: bytes) -> tuple[Survey, ...]:
    found = []
    for told in json.loads(raw):
        counts = {name: np.zeros(BINS, np.int64) for name in told["tensors"]}
        for name, tensor in told["tensors"].items():
            counts[name][tensor["bins"]] = tensor["counts"]
        digests = {name: tensor["blake3"] for name, tensor in told["tensors"].items()}
        sums = {name: np.array(one, np.float64) for name, one in told.get("sums", {}).items()}
        found.append(Survey(of=told["of"], counts=counts, digests=digests, sums=sums))
    return tuple(found)
