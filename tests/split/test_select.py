from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.split.select import TopK, crow_indices


@given(
    values=st.lists(
        st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0, 1e-30, 3.0]), min_size=1, max_size=400
    ),
    share=st.floats(0, 1),
    stretch=st.integers(1, 64),
)
def test_top_k_any_stream_equals_full_sort(values: list[float], share: float, stretch: int) -> None:
    saliency = np.array(values, np.float32)
    k = round(share * saliency.size)
    payload = np.arange(saliency.size, dtype=np.int16)
    top = TopK(k, length=saliency.size, stretch=stretch, payloads=[np.int16])
    for start in range(0, saliency.size, stretch):
        stop = start + stretch
        top.push(saliency[start:stop], [payload[start:stop]], start=start)
    indices, kept, (carried,) = top.finish()
    assert indices.tolist() == reference.top_k_indices(torch.from_numpy(saliency), k)
    assert kept.tolist() == saliency[indices].tolist()
    assert carried.tolist() == payload[indices].tolist()


@pytest.mark.parametrize("order", ["rising", "falling", "flat", "random"])
def test_top_k_adversarial_order_stays_exact(order: str) -> None:
    generator = np.random.default_rng(0)
    saliency = np.sort(generator.random(20_000, dtype=np.float32))
    saliency = {
        "rising": saliency,
        "falling": saliency[::-1].copy(),
        "flat": np.full_like(saliency, 0.25),
        "random": generator.permutation(saliency),
    }[order]
    top = TopK(100, length=saliency.size, stretch=256, payloads=[])
    for start in range(0, saliency.size, 256):
        piece = saliency[start : start + 256]
        top.push(piece, [], start=start)
    indices, _, _ = top.finish()
    assert indices.tolist() == reference.top_k_indices(torch.from_numpy(saliency), 100)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    picks=st.sets(st.integers(0, 80), max_size=40),
)
def test_crow_indices_any_positions_equal_counting(
    rows: int, columns: int, picks: set[int]
) -> None:
    indices = sorted(pick for pick in picks if pick < rows * columns)
    crow, _ = reference.csr(indices, (rows, columns))
    assert crow_indices(np.array(indices, np.int64), (rows, columns)).tolist() == crow
