"""The one check of CSR: every reader of an artifact refuses the same matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.errors import ArtifactError
from ortho_cli.formats import csr
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.verify import verify
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.storage.checkpoint import read_shard

MODULE = "model.layers.0.mlp.up_proj"
SOUND = {
    "crow_indices": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    "col_indices": torch.tensor([1, 7, 0, 3, 4], dtype=torch.uint16),
    "values": torch.tensor([1.0, -2.0, 0.5, 4.0, 8.0], dtype=torch.bfloat16),
}
BROKEN = {
    "first pointer": ("crow_indices", 0, 1, "does not climb from 0 to 5"),
    "last pointer": ("crow_indices", 3, 4, "does not climb from 0 to 5"),
    "falling pointers": ("crow_indices", 1, 3, "does not climb from 0 to 5"),
    "column too far": ("col_indices", 4, 64, "names column 64 of 64"),
    "a column twice": ("col_indices", 3, 0, "does not ascend in row 2"),
    "NaN": ("values", 2, torch.nan, "holds NaN or infinity at entry 2"),
    "infinity": ("values", 4, -torch.inf, "holds NaN or infinity at entry 4"),
}


def check(parts: dict[str, Tensor], width: int = 64) -> None:
    csr.check_tensors(*parts.values(), (3, width), "m.")


def in_pieces(parts: dict[str, Tensor]) -> None:
    """Check as `verify` does, one number in each piece."""
    crow, column, values = (part.view(torch.int16) if part.dtype.is_floating_point else part
                            for part in parts.values())  # fmt: skip
    csr.check_positions(crow.numpy(), (n.numpy() for n in column.split(1)), 5, 64, "m.")
    csr.check_words((n.numpy().data for n in values.split(1)), "BF16", "m.")


@pytest.mark.parametrize("way", [check, in_pieces])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_matrix_is_refused_whole_and_in_pieces(
    name: str, way: Callable[[dict[str, Tensor]], None]
) -> None:
    way(SOUND)
    part, position, value, message = BROKEN[name]
    parts = {name: tensor.clone() for name, tensor in SOUND.items()}
    parts[part][position] = value
    with pytest.raises(ArtifactError, match=rf"^`m\.{part}` {message}"):
        way(parts)


def test_every_reader_refuses_nan_in_values(artifact: Path) -> None:
    """Source weights are finite: a NaN was never written."""
    path = artifact / "ortho.safetensors"
    metadata, tensors = read_shard(path).metadata, load_file(path)
    tensors[f"{MODULE}.values"][1] = torch.nan
    save_file(tensors, path, metadata=metadata)
    (artifact / "report.json").unlink()
    opened = open_artifact(artifact)
    message = rf"`{MODULE}\.values` holds NaN or infinity at entry 1"
    with pytest.raises(ArtifactError, match=message):
        verify(opened)
    with KeptReader(opened) as reader, pytest.raises(ArtifactError, match=message):
        reader.csr(MODULE)
    linear = torch.nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    layer = OrthoLinear.from_linear(linear, group_size=32, density=0.1)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    state["values"][3] = torch.inf
    with pytest.raises(ArtifactError, match="`values` holds NaN or infinity at entry 3"):
        layer.load_state_dict(state)
