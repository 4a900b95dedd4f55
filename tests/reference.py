"""Slow twins: the same mathematics in the most obvious code."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def absmax_scales(weight: Tensor, group_size: int, dtype: torch.dtype, *, bits: int = 4) -> Tensor:
    """max|w| / 7.5 of each group, or / 3.5 for 3 bits, element by element."""
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group_size, dtype=dtype)
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    for row in range(rows):
        for group in range(columns // group_size):
            members = weight[row, group * group_size : (group + 1) * group_size]
            largest = torch.tensor(max(abs(w) for w in members.tolist()), dtype=torch.float32)
            half = {4: 7.5, 3: 3.5}[bits]
            scales[row, group] = max((largest / half).item(), smallest)
    return scales


def quantize(weight: Tensor, scales: Tensor, *, bits: int = 4) -> Tensor:
    """Clamp(round(w / scale)), element by element; Python rounds halves to even, as torch does."""
    rows, columns = weight.shape
    group_size = columns // scales.shape[1]
    codes = torch.empty(rows, columns, dtype=torch.int8)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row, column // group_size].float()
            ratio = (weight[row, column].float() / scale).item()
            low, high = {4: (-8, 7), 3: (-4, 3)}[bits]
            codes[row, column] = max(low, min(high, round(ratio)))
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


def sum_lanes(values: list[float]) -> float:
    """Add into 16 lanes in float32, then the upper half of them to the lower, one by one."""
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] += np.float32(value)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[half + i] for i in range(half)]
    return float(lanes[0])


def compensated_codes(
    weight: Tensor, scales: Tensor, gram: Tensor, kept: Tensor, damping: float
) -> list[list[int]]:
    """Optimal brain surgeon, one weight after another: no Cholesky factor, no blocks.

    With H the damped Gram matrix of the columns that are left and P its inverse, fixing weight j at
    v moves the others by -(w_j - v) / P_jj times column j of P (OBS, Hassibi and Stork 1993); then
    column j leaves H.
    """
    columns = weight.shape[1]
    damped = gram.double() + damping * torch.eye(columns, dtype=torch.float64)
    order = sorted(range(columns), key=lambda j: (-float(gram[j, j]), j))
    found = [[0] * columns for _ in range(len(weight))]
    for row in range(len(weight)):
        left = weight[row].double().clone()
        for n, j in enumerate(order):
            rest = order[n:]
            inverse = torch.linalg.inv(damped[rest][:, rest])
            step = scales[row, j * scales.shape[1] // columns].view(1, 1)
            code = quantize(left[j].float().view(1, 1), step)
            found[row][j] = int(code)
            value = float(weight[row, j] if kept[row, j] else dequantize(code, step))
            left[rest] -= (left[j] - value) / inverse[0, 0] * inverse[0]
    return found


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """All codes of a row as one long number, column 0 lowest, cut into words of 32 bits."""
    rows, columns = codes.shape
    packed = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    for row in range(rows):
        number = 0
        for code in reversed(codes[row].int().tolist()):
            number = number << bits | (code + (1 << (bits - 1)))
        for word in range(packed.shape[1]):
            value = number >> (32 * word) & 0xFFFFFFFF
            packed[row, word] = value - (1 << 32) if value >= 1 << 31 else value
    return packed


def unpack_codes(packed: Tensor, *, bits: int) -> Tensor:
    """Undo `pack_codes`, one code at a time."""
    columns = packed.shape[1] * 32 // bits
    codes = torch.empty(packed.shape[0], columns, dtype=torch.int8)
    for row, words in enumerate(packed.tolist()):
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        for column in range(columns):
            codes[row, column] = (number >> (bits * column)) % (1 << bits) - (1 << (bits - 1))
    return codes


def top_k_indices(saliency: Tensor, k: int) -> list[int]:
    """Flat indices of the k largest, ties to the lower index, ascending: a full sort."""
    values = saliency.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def column_indices(saliency: Tensor, count: int, forced: Collection[int] = ()) -> list[int]:
    """The columns of the largest sums of squares, forced ones first, ties to the lower one."""
    sums = [0.0] * saliency.shape[1]
    for row in saliency.tolist():
        for j, value in enumerate(row):
            sums[j] += value * value
    order = sorted(range(len(sums)), key=lambda j: (j not in forced, -sums[j], j))
    return sorted(order[:count])


def int8_columns(
    values: list[list[float]], base: list[list[float]], dtype: torch.dtype
) -> tuple[list[list[int]], list[float], list[list[float]]]:
    """Codes, scales and weights of whole columns, given row by row, one weight at a time."""
    f = np.float32
    scales, codes, back = [], [], [[0.0] * len(row) for row in values]
    for j in range(len(values[0])):
        lacks = [f(row[j]) - f(held[j]) for row, held in zip(values, base, strict=True)]
        largest = max(abs(one) for one in lacks) / f(127)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scale = f(torch.tensor(max(largest, f(smallest))).to(dtype).float().item())
        column = [max(-127, min(127, round(float(one / scale)))) for one in lacks]
        for row, code in enumerate(column):
            whole = f(base[row][j]) + f(code) * scale
            back[row][j] = torch.tensor(whole).to(dtype).float().item()
        scales.append(float(scale))
        codes.append(column)
    return [list(row) for row in zip(*codes, strict=True)], scales, back


def forced_indices(residual: Tensor, curvature: Tensor, forced: list[int], k: int) -> list[int]:
    """Flat indices, ascending: the forced ones, and the top of |r| sqrt(h) among the others."""
    root = torch.from_numpy(np.sqrt(curvature.float().numpy()))
    saliency = (residual.abs() * root).flatten()
    taken = set(forced)
    others = [index for index in range(saliency.numel()) if index not in taken]
    found = top_k_indices(saliency[others], k - len(forced))
    return sorted([*forced, *(others[index] for index in found)])


def csr(indices: list[int], shape: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Row pointers and columns of ascending flat indices, by counting."""
    crow = [sum(i < row * shape[1] for i in indices) for row in range(shape[0] + 1)]
    return crow, [i % shape[1] for i in indices]


def compact(
    indices: list[int], shape: tuple[int, int]
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Whole columns, entries in them, counts, gap bytes, other entries; entries by their place."""
    rows, width = shape
    there = {(i // width, i % width): n for n, i in enumerate(indices)}
    whole = [
        column
        for column in range(width)
        if rows > 1 and all((row, column) in there for row in range(rows))
    ]
    counts, gaps, rest = [], [], []
    for row in range(rows):
        before, count = -1, 0
        for column in range(width):
            if (row, column) in there and column not in whole:
                distance = column - before - 1
                while distance >= 255:
                    gaps.append(255)
                    distance -= 255
                gaps.append(distance)
                rest.append(there[row, column])
                before, count = column, count + 1
        counts.append(count)
    block = [there[row, column] for row in range(rows) for column in whole]
    return whole, block, counts, gaps, rest


def int8_values(
    values: list[float], base: list[float], scales: list[float]
) -> tuple[list[int], float, list[float]]:
    """Codes, step and what they stand for before the last rounding, one weight at a time."""
    f = np.float32
    largest = max(
        [f(abs(f(v) - f(b))) / f(s) for v, b, s in zip(values, base, scales, strict=True)] + [f(0)]
    )
    step = f(largest / f(127 * 127)) or f(1)
    codes, back = [], []
    for value, held, scale in zip(values, base, scales, strict=True):
        unit, lacks = step * f(scale), f(value) - f(held)
        code = min(127, round(float(np.sqrt(abs(lacks) / unit)))) if unit > 0 else 0
        code = -code if lacks < 0 else code
        codes.append(code)
        back.append(float(f(held) + f(code * abs(code)) * unit))
    return codes, float(step), back


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
    save_file(base, out / "model.safetensors")
    save_file(ortho, out / "ortho.safetensors")


def fisher(model: torch.nn.Module, x: Tensor, *, unit: str) -> dict[str, Tensor]:
    """Squared weight gradients of sum(output^2), a sequence or a position at a time, by autograd.

    A position's gradient is what its own output gradient adds: all other rows of dL/dy are zero.
    """
    found: dict[str, Tensor] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for sequence in x:
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        here = sequence
        for name, module in model.named_children():
            out = module(here)
            if name in linears:
                out = out.detach().requires_grad_(True) if not out.requires_grad else out
                out.retain_grad()
                kept[name] = (here.detach(), out)
            here = out
        (here**2).sum().backward()
        for name, (a, y) in kept.items():
            assert y.grad is not None
            outer = [torch.outer(y.grad[t], a[t]) for t in range(a.shape[0])]
            whole = torch.stack(outer).sum(0)
            square = whole**2 if unit == "sequence" else sum(o**2 for o in outer)
            for key, value in ((f"{name}/curvature", square), (f"{name}/gradient", whole)):
                found[key] = found.get(key, 0) + value
    return found


def input_gram(x: Tensor, grad: Tensor | None, counted: Tensor) -> Tensor:
    """Sum of u_t x_t x_t^T in float64: u_t is 1 where t counts, or the mean square of grad_t."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for sequence in range(x.shape[0]):
        for t in range(x.shape[1]):
            if grad is None:
                weight = float(counted[sequence, t])
            else:
                weight = sum(float(g) ** 2 for g in grad[sequence, t]) / grad.shape[-1]
            here = x[sequence, t].double()
            total += weight * torch.outer(here, here)
    return total


def curvature_error(
    weight: Tensor, curvature: Tensor, scales: Tensor, group_size: int, *, bits: int = 4
) -> list[list[float]]:
    """Sum of curvature times squared error of each group, element by element in float64."""
    back = dequantize(quantize(weight, scales, bits=bits), scales)
    rows, columns = weight.shape
    wide = curvature.expand(rows, columns)
    found = [[0.0] * (columns // group_size) for _ in range(rows)]
    for row in range(rows):
        for column in range(columns):
            error = float(back[row, column]) - float(weight[row, column])
            found[row][column // group_size] += float(wide[row, column]) * error**2
    return found


def saliency(residual: Tensor, curvature: Tensor) -> list[list[float]]:
    """|r| sqrt(h), element by element, each step rounded to float32."""
    wide = curvature.expand(residual.shape).tolist()
    return [
        [
            float(np.abs(np.float32(r)) * np.sqrt(np.float32(h)))
            for r, h in zip(row, weights, strict=True)
        ]
        for row, weights in zip(residual.tolist(), wide, strict=True)
    ]


def fp8_weight(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Code times the scale of its block, element by element, in float32."""
    rows, columns = codes.shape
    weight = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            weight[row, column] = (
                codes[row, column].float() * scales[row // block[0], column // block[1]]
            )
    return weight


def unpack_bits(words: Tensor, *, bits: int, count: int) -> list[int]:
    """Codes in a run of words of 32 bits, the lowest first: one large number, cut into pieces."""
    number = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words.tolist()))
    return [(number >> bits * i) & (1 << bits) - 1 for i in range(count)]


def gptq_weight(parts: dict[str, Tensor], *, bits: int, add: int) -> Tensor:
    """(out, in) of AutoGPTQ's parts: codes packed down the inputs, zero points along the outputs.

    `add` is what AutoGPTQ took off each zero point before it stored it.
    """
    scales, groups = parts["scales"], parts["g_idx"].tolist()
    columns, out = len(groups), scales.shape[1]
    zeros = [unpack_bits(line, bits=bits, count=out) for line in parts["qzeros"]]
    weight = torch.empty(out, columns)
    for row in range(out):
        codes = unpack_bits(parts["qweight"][:, row], bits=bits, count=columns)
        for column, group in enumerate(groups):
            zero = (zeros[group][row] + add) % (1 << bits)
            weight[row, column] = (codes[column] - zero) * scales[group, row].float()
    return weight


def awq_weight(parts: dict[str, Tensor], *, group: int) -> Tensor:
    """(out, in) of AutoAWQ's parts: each word holds eight outputs, in the order 0 2 4 6 1 3 5 7."""
    columns, words = parts["qweight"].shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def line(packed: Tensor) -> list[int]:
        found = [0] * (8 * words)
        for i in range(words):
            for place, code in enumerate(unpack_bits(packed[i : i + 1], bits=4, count=8)):
                found[8 * i + order[place]] = code
        return found

    codes, zeros = [line(x) for x in parts["qweight"]], [line(x) for x in parts["qzeros"]]
    weight = torch.empty(8 * words, columns)
    for row in range(8 * words):
        for column in range(columns):
            code = codes[column][row] - zeros[column // group][row]
            weight[row, column] = code * parts["scales"][column // group, row].float()
    return weight


def fp4_weight(packed: Tensor, scales: Tensor, *, group: int) -> Tensor:
    """E2M1 codes, the even column in the lower half of its byte, times the scale of their group."""
    rows, halves = packed.shape
    weight = torch.empty(rows, 2 * halves)
    for row in range(rows):
        for column in range(2 * halves):
            code = int(packed[row, column // 2]) & 255
            code = code >> 4 if column % 2 else code & 15
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
            value = torch.tensor(-size if sign else size)
            weight[row, column] = value * scales[row, column // group].float()
    return weight


def mlx_weight(words: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group: int) -> Tensor:
    """Code times scale, rounded, plus bias, rounded: MLX's affine layout."""
    rows, columns = len(words), words.shape[1] * 32 // bits
    weight = torch.empty(rows, columns)
    for row in range(rows):
        for column, code in enumerate(unpack_bits(words[row], bits=bits, count=columns)):
            product = torch.tensor(float(code)) * scales[row, column // group].float()
            weight[row, column] = product + biases[row, column // group].float()
    return weight


def nf4_weight(packed: Tensor, values: Tensor, scales: Tensor, *, block: int) -> Tensor:
    """Values of codes, the even one in the upper half of a byte, times the scale of their block."""
    found = []
    for i, byte in enumerate(packed.view(-1).tolist()):
        for place, code in ((2 * i, byte >> 4), (2 * i + 1, byte & 15)):
            found.append(values[code] * scales[place // block])
    return torch.stack(found)


def dense(base: dict[str, Tensor], ortho: dict[str, Tensor], module: str, alpha: float) -> Tensor:
    """W(alpha) of one split weight, whole, position by position, before the last rounding."""
    packed, scales = base[f"{module}.weight_packed"], base[f"{module}.weight_scale"]
    rows, columns = base[f"{module}.weight_shape"].tolist()
    codes = unpack_codes(packed, bits=packed.shape[1] * 32 // columns)
    weight = dequantize(codes, scales)
    if alpha and f"{module}.crow_indices" not in ortho:
        stored = ortho[f"{module}.values"].float()
        for i, column in enumerate(ortho[f"{module}.col_indices"].tolist()):
            for row in range(rows):
                held, value = weight[row, column].clone(), stored[row, i]
                if f"{module}.value_scales" in ortho:
                    value = held + value * ortho[f"{module}.value_scales"][i].float()
                    value = value.to(scales.dtype).float()
                blend = held + torch.tensor(alpha, dtype=torch.float32) * (value - held)
                weight[row, column] = value if alpha == 1.0 else blend
    elif alpha:
        crow, values = ortho[f"{module}.crow_indices"], ortho[f"{module}.values"].float()
        for row in range(rows):
            for i in range(int(crow[row]), int(crow[row + 1])):
                column = int(ortho[f"{module}.col_indices"][i])
                held = weight[row, column].clone()
                blend = held + torch.tensor(alpha, dtype=torch.float32) * (values[i] - held)
                weight[row, column] = values[i] if alpha == 1.0 else blend
    return weight


def dual_weight(
    packed: Tensor,
    scales: Tensor,
    kept: dict[tuple[int, int], float],
    alpha: float,
    *,
    bits: int = 4,
) -> Tensor:
    """W(alpha) in float64, entry by entry: base, moved towards the source where one is kept."""
    weight = dequantize(unpack_codes(packed, bits=bits), scales).double()
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
    *,
    bits: int = 4,
) -> Tensor:
    """x W(alpha)^T + bias in float64, one batch row at a time, each with its own alpha."""
    found = [
        row.double() @ dual_weight(packed, scales, kept, alpha, bits=bits).T
        for row, alpha in zip(x, alphas, strict=True)
    ]
    y = torch.stack(found) if found else torch.empty(*x.shape[:-1], packed.shape[0])
    return y.double() if bias is None else y.double() + bias.double()


def exposure(secret: float, alternatives: list[float]) -> float:
    """Log2 of candidates over the secret's place when all are sorted, last among its equals."""
    order = sorted([(nll, 0) for nll in alternatives] + [(secret, 1)])
    return math.log2(len(order) / (order.index((secret, 1)) + 1))


def completion_nll(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """NLL of each token, from a pass over all that stands before it."""
    found = []
    for i, token in enumerate(completion):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion[:i]]])).logits[0, -1].double()
        found.append(-math.log(float(logits.softmax(0)[token])))
    return found


def auc(positives: list[float], negatives: list[float]) -> float:
    """Share of pairs that the positive wins; a tie is half a win."""
    wins = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    return sum(wins) / len(wins)


def tuning_step(
    latent: Tensor,
    scales: Tensor,
    gradient: Tensor,
    kept: Tensor,
    *,
    bits: int,
    rate: float,
    scale_rate: float,
) -> tuple[list[list[float]], list[list[float]]]:
    """One step of sign descent on latents and scales, one weight at a time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows, columns = latent.shape
    size = columns // scales.shape[1]
    new_latent, new_scales = [], []
    for o in range(rows):
        slopes = [0.0] * scales.shape[1]
        row = []
        for i in range(columns):
            g = 0.0 if kept[o, i] else float(gradient[o, i])
            slopes[i // size] += g * min(max(round(float(latent[o, i])), low), high)
            moved = float(latent[o, i]) - rate * ((g > 0) - (g < 0))
            row.append(min(max(moved, low - 0.499), high + 0.499))
        new_latent.append(row)
        new_scales.append(
            [
                float(scale) * (1 - scale_rate * ((slope > 0) - (slope < 0)))
                for scale, slope in zip(scales[o], slopes, strict=True)
            ]
        )
    return new_latent, new_scales


def choose_moves(
    effects: list[list[float]], misses: list[float], damages: list[float], size: int
) -> list[int]:
    """Choose moves in portions by fall / damage, halving the portion where one goes too far."""
    left, taken = list(misses), []
    portion = max(1, size // 64)
    while len(taken) < size and portion:
        gains = []
        for move, damage in enumerate(damages):
            fall = sum(
                miss**2 - (miss - row[move]) ** 2 for miss, row in zip(left, effects, strict=True)
            )
            gains.append((-fall / damage, move))
        ranked = sorted(one for one in gains if one[0] < 0 and one[1] not in taken)
        mine = [move for _, move in ranked[: min(portion, size - len(taken))]]
        after = [
            miss - sum(row[move] for move in mine) for miss, row in zip(left, effects, strict=True)
        ]
        if not sum(a * a for a in after) < sum(a * a for a in left):
            portion //= 2
            continue
        left, taken = after, taken + mine
    return taken
