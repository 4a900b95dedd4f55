"""Slow twins: the same mathematics in the most obvious code."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


def absmax_scales(weight: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """max|w| / 7.5 of each group, element by element."""
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group_size, dtype=dtype)
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    for row in range(rows):
        for group in range(columns // group_size):
            members = weight[row, group * group_size : (group + 1) * group_size]
            largest = torch.tensor(max(abs(w) for w in members.tolist()), dtype=torch.float32)
            scales[row, group] = max((largest / 7.5).item(), smallest)
    return scales


def quantize(weight: Tensor, scales: Tensor) -> Tensor:
    """Clamp(round(w / scale)), element by element; Python rounds halves to even, as torch does."""
    rows, columns = weight.shape
    group_size = columns // scales.shape[1]
    codes = torch.empty(rows, columns, dtype=torch.int8)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row, column // group_size].float()
            ratio = (weight[row, column].float() / scale).item()
            codes[row, column] = max(-8, min(7, round(ratio)))
    return codes


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Code times scale in the scale's dtype, as compressed-tensors does it."""
    group_size = codes.shape[1] // scales.shape[1]
    return (codes.to(scales.dtype) * scales.repeat_interleave(group_size, dim=1)).float()


def pack_int4(codes: Tensor) -> Tensor:
    """Column 8w+i in bits 4i..4i+3 of word w, as q + 8."""
    rows, columns = codes.shape
    packed = torch.empty(rows, columns // 8, dtype=torch.int32)
    for row in range(rows):
        for word in range(columns // 8):
            value = sum((int(codes[row, 8 * word + i]) + 8) << (4 * i) for i in range(8))
            packed[row, word] = value - (1 << 32) if value >= 1 << 31 else value
    return packed


def top_k_indices(saliency: Tensor, k: int) -> list[int]:
    """Flat indices of the k largest, ties to the lower index, ascending: a full sort."""
    values = saliency.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def csr(indices: list[int], shape: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Row pointers and columns of ascending flat indices, by counting."""
    crow = [sum(i < row * shape[1] for i in indices) for row in range(shape[0] + 1)]
    return crow, [i % shape[1] for i in indices]


def decibels(weight: Tensor, approximation: Tensor) -> float:
    """10 log10(|w|^2 / |w - a|^2) in float64."""
    noise = (weight.double() - approximation.double()).square().sum().item()
    return 10 * math.log10(weight.double().square().sum().item() / noise)


def naive_split(weight: Tensor, group_size: int, density: float) -> dict[str, Tensor]:
    """Split a whole tensor at once with eager torch: what most people would write first."""
    rows, columns = weight.shape
    wide = weight.float()
    groups = wide.view(rows, -1, group_size)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).to(weight.dtype)
    codes = torch.clamp(torch.round(groups / scales.float()), -8, 7).to(torch.int32)
    residual = wide - (codes.to(weight.dtype) * scales).view(rows, columns).float()
    saliency = residual.square().flatten()
    k = round(density * saliency.numel())
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[saliency.topk(k).indices] = True
    sparse = (weight * kept.view(rows, columns)).to_sparse_coo().coalesce()
    nibbles = (codes.view(rows, columns // 8, 8) + 8) << (4 * torch.arange(8, dtype=torch.int32))
    counts = torch.bincount(sparse.indices()[0], minlength=rows)
    return {
        "weight_packed": nibbles.sum(-1, dtype=torch.int32),
        "weight_scale": scales.squeeze(-1),
        "weight_shape": torch.tensor([rows, columns]),
        "crow_indices": torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int(),
        "col_indices": sparse.indices()[1].to(torch.uint16),
        "values": sparse.values(),
    }


def naive_decompose(
    source: Path, out: Path, *, group_size: int, density: float, split: set[str]
) -> None:
    """Decompose a checkpoint with `naive_split`, the whole model in memory, and save it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    base: dict[str, Tensor] = {}
    ortho: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if name not in split:
                    base[name] = tensor
                    continue
                module = name.removesuffix(".weight")
                for part, value in naive_split(tensor, group_size, density).items():
                    stream = base if part.startswith("weight") else ortho
                    stream[f"{module}.{part}"] = value.contiguous()
    out.mkdir()
    save_file(base, out / "base.safetensors")
    save_file(ortho, out / "ortho.safetensors")


def dual_weight(
    packed: Tensor, scales: Tensor, kept: dict[tuple[int, int], float], alpha: float
) -> Tensor:
    """W(alpha) in float64, entry by entry: base, moved towards the source where one is kept."""
    rows, words = packed.shape
    codes = torch.empty(rows, words * 8, dtype=torch.int8)
    for row in range(rows):
        for column in range(words * 8):
            word = int(packed[row, column // 8]) & 0xFFFFFFFF
            codes[row, column] = (word >> (4 * (column % 8)) & 15) - 8
    weight = dequantize(codes, scales).double()
    for (row, column), source in kept.items():
        weight[row, column] += alpha * (source - weight[row, column])
    return weight


def dual_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    kept: dict[tuple[int, int], float],
    bias: Tensor | None,
    alphas: list[float],
) -> Tensor:
    """x W(alpha)^T + bias in float64, one batch row at a time, each with its own alpha."""
    found = [
        row.double() @ dual_weight(packed, scales, kept, alpha).T
        for row, alpha in zip(x, alphas, strict=True)
    ]
    y = torch.stack(found) if found else torch.empty(*x.shape[:-1], packed.shape[0])
    return y.double() if bias is None else y.double() + bias.double()
