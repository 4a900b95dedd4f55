"""Seconds of a calibration: in proportion to sequences, tokens and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Ortho

from ortho_cli.calibrate.estimate import Text, of_own_text, of_texts
from ortho_cli.decompose.settings import Calibrate
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.speeds import open_speeds


def parts(
    model: Path,
    *,
    sequences: int = 8,
    length: int = 256,
    by_block: bool = False,
    **settings: object,
) -> dict[str, float]:
    checkpoint = open_checkpoint(model)
    split = [one for one in checkpoint.tensors if "proj" in one.name]
    wanted = Calibrate.model_validate({"batch": 4} | settings)
    texts = {"retain": Text(sequences, sequences * length)}
    found = of_texts(wanted, split, texts, checkpoint, open_speeds(), by_block=by_block)
    return {part.name: part.seconds for part in found}


def test_twice_the_sequences_or_batches_take_twice_the_time(pico: Path) -> None:
    once = parts(pico)
    assert list(once) == ["load", "measure", "write"]
    twice = parts(pico, sequences=16)
    assert twice["measure"] == pytest.approx(2 * once["measure"])
    assert twice["load"] == once["load"]
    assert twice["write"] == once["write"]
    assert parts(pico, length=2048)["measure"] > 3 * once["measure"]
    assert parts(pico, gram="full")["measure"] > once["measure"]
    assert parts(pico, curvature="gram")["measure"] < once["measure"]
    assert parts(pico, curvature="true-fisher")["measure"] > once["measure"]
    blocks = parts(pico, by_block=True)  # they are passed once more, and read again
    assert blocks["load"] > once["load"]
    alone = parts(pico, length=2048, by_block=True)["measure"]
    assert alone > parts(pico, length=2048)["measure"]


def test_text_that_the_model_writes_takes_time_by_its_tokens(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)

    def written(**settings: object) -> dict[str, float]:
        wanted = Calibrate.model_validate({"samples": 62, "length": 33} | settings)
        split = [one for one in checkpoint.tensors if "proj" in one.name]
        found = of_own_text(wanted, split, checkpoint, open_speeds())
        return {part.name: part.seconds for part in found}

    once = written()
    assert written(length=65)["write text"] > 1.9 * once["write text"]
    assert written(samples=620)["write text"] == pytest.approx(10 * once["write text"])
    # Inputs alone are measured meanwhile.
    assert written(curvature="gram")["measure"] < once["measure"]


def test_dry_run_has_the_figure_and_the_words(ortho: Ortho, pico: Path) -> None:
    ran = ortho("calibrate", pico, "-o", pico.parent / "s", "--dry-run", "--json", *FEW)
    assert ran.code == 0, ran.err
    told = ran.json["estimate"]
    assert list(told["parts"]) == ["start", "load", "measure", "write"]
    assert told["seconds"] == told["at_most_seconds"] > 0
    said = ortho("calibrate", pico, "-o", pico.parent / "s", "--dry-run", *FEW).out
    assert "about a second on this machine: " in said


FEW = ("--samples", "4", "--length", "16")
