"""How many of ortho's weights each block of rows has, whatever the layout."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Ortho

from ortho_cli.errors import ArtifactError
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.row_blocks import count_row_blocks
from ortho_cli.storage.checkpoint import read_shard


@pytest.mark.parametrize("layout", ["csr", "compact"])
@pytest.mark.parametrize("blocks", [16, 7, 1000])
def test_shares_of_blocks_are_those_of_the_positions(
    pico: Path, ortho: Ortho, layout: str, blocks: int
) -> None:
    sets = ("--set", f"ortho.layout={layout}", "--set", "ortho.density=0.05")
    assert ortho("decompose", pico, "-q", *sets).code == 0
    artifact = open_artifact(pico.parent / "pico-ortho")
    found = count_row_blocks(artifact, blocks=blocks)
    assert list(found) == list(artifact.split)
    with KeptReader(artifact) as reader:
        for module, shares in found.items():
            rows, width = artifact.shapes[module]
            kept = reader.csr(module)["crow_indices"].long().diff()
            count = min(blocks, rows)
            edges = [int(i * rows / count) for i in range(count + 1)]
            expected = [float(kept[a:b].sum()) / ((b - a) * width) for a, b in pairwise(edges)]
            assert shares == pytest.approx(expected)


def test_without_ortho_there_is_none(artifact: Path) -> None:
    (artifact / "ortho.safetensors").unlink()
    assert count_row_blocks(open_artifact(artifact)) == {}


def test_row_pointers_that_fall_are_refused_by_name(artifact: Path) -> None:
    path = artifact / "ortho.safetensors"
    module = "model.layers.1.mlp.up_proj"
    info = next(t for t in read_shard(path).tensors if t.name == f"{module}.crow_indices")
    raw = bytearray(path.read_bytes())
    raw[info.offset + 4 : info.offset + 8] = struct.pack("<i", 9999)
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"`{module}.crow_indices`"):
        count_row_blocks(open_artifact(artifact))
