"""The counts of a survey, kept beside half-done work so that a run that goes on takes them again.

`budget` surveys a checkpoint, which reads every weight once, before anything is written. What it
counted lies in the work folder as JSON, and the journal's first line holds the BLAKE3 of that file:
a file of other work, or one that was changed, does not fit the line and is read as if it were not
there. Whoever uses counts sees that they are of the same weights (`Survey.of`, `Survey.digests`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.storage.untrusted import read_regular
from ortho_cli.storage.work_folder import identity_left, work_folder, write_private

SURVEY_FILE = "survey.json"  # in private/ of the work folder
KEY = "survey"  # of the identity of work
BINS = 1 << 15  # of saliencies, by the upper half of their float32

Counts = npt.NDArray[np.int64]  # (BINS,) weights of a tensor by saliency


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """How many weights of each tensor have which saliency, and of what that was counted."""

    of: str  # SHA-256 of everything that the counts depend on, as far as headers tell it
    counts: Mapping[str, Counts]
    digests: Mapping[str, str]  # BLAKE3 of each tensor as it was read


def digest_of(surveys: Sequence[Survey]) -> str:
    """Give the BLAKE3 of the file that keeps these surveys."""
    return blake3(_encode(surveys)).hexdigest()


def save_surveys(folder: Path, surveys: Sequence[Survey]) -> None:
    """Write surveys into the private folder of work, whole or not at all.

    None leave no file. They are not sealed where ortho is: they tell no weight and no position.
    """
    if surveys:
        data = _encode(surveys)
        write_private(folder / SURVEY_FILE, lambda file: file.write(data))


def load_surveys(out: Path) -> tuple[Survey, ...]:
    """Read the surveys that unfinished work on OUT left; none where they do not fit its journal."""
    told = (identity_left(out) or {}).get(KEY)
    path = work_folder(out) / "private" / SURVEY_FILE
    try:
        raw = read_regular(path)
        return _decode(raw) if blake3(raw).hexdigest() == told else ()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()


def _encode(surveys: Sequence[Survey]) -> bytes:
    found = [
        {
            "of": survey.of,
            "tensors": {name: _told(survey, name) for name in sorted(survey.counts)},
        }
        for survey in surveys
    ]
    return json.dumps(found, separators=(",", ":")).encode()


def _told(survey: Survey, name: str) -> dict[str, object]:
    counts = survey.counts[name]
    bins = np.flatnonzero(counts)  # a few hundred of them
    return {
        "blake3": survey.digests[name],
        "bins": bins.tolist(),
        "counts": counts[bins].tolist(),
    }


def _decode(raw: bytes) -> tuple[Survey, ...]:
    found = []
    for told in json.loads(raw):
        counts = {name: np.zeros(BINS, np.int64) for name in told["tensors"]}
        for name, tensor in told["tensors"].items():
            counts[name][tensor["bins"]] = tensor["counts"]
        digests = {name: tensor["blake3"] for name, tensor in told["tensors"].items()}
        found.append(Survey(of=told["of"], counts=counts, digests=digests))
    return tuple(found)
