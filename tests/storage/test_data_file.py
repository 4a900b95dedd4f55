"""What is written of a tensor: inside of its bytes, and all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.errors import InternalError
from ortho_cli.storage.data_file import DataFile, TensorSpec, TensorStream, plan_layout
from ortho_cli.storage.work_folder import WorkFolder

LAYOUT = plan_layout((TensorSpec(key=key, dtype="U8", shape=(8,)) for key in "ab"), {})


def test_assertions_of_tests_count_whatever_the_interpreter_leaves_out() -> None:
    """Under `python -O`, too: pytest rewrites them, and `make test` relies on that."""
    with pytest.raises(AssertionError):
        assert not LAYOUT.regions


@pytest.mark.parametrize(("start", "nbytes"), [(0, 9), (8, 1), (-1, 1)])
def test_data_file_refuses_bytes_of_another_tensor(tmp_path: Path, start: int, nbytes: int) -> None:
    with WorkFolder(tmp_path / "out", identity={"files": {"x": LAYOUT.size}}, force=False) as work:
        file = DataFile(work, "x", LAYOUT, mode=0o644)
        piece = memoryview(bytearray(nbytes))
        with pytest.raises(InternalError, match="of `a` are asked for, which has 8"):
            file.write("a", piece, start=start)
        with pytest.raises(InternalError, match="of `a` are asked for, which has 8"):
            file.read_into("a", piece, start=start)


def test_tensor_stream_that_ends_early_is_told(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", identity={"files": {"x": LAYOUT.size}}, force=False) as work:
        stream = TensorStream(DataFile(work, "x", LAYOUT, mode=0o644), "b")
        stream.write(memoryview(b"1234"))
        with pytest.raises(InternalError, match="`b` has 4 of its 8 bytes"):
            stream.finish()
        stream.write(memoryview(b"5678"))
        assert len(stream.finish()) == 64
