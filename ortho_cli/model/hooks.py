"""Measure curvature with hooks: sums of a forward and a backward pass for each weight.

For y = W x, a position t with input x_t and output gradient g_t = dNLL/dy_t adds g_t x_t^T to the
gradient of W. Weights need no gradient of their own: inputs are caught on the way forward, output
gradients on the way back, and one Linear at a time is turned into sums, tile by tile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError, InternalError, NumericalError, UsageError

# Elements of a tile of sums: a GEMM large enough to run at speed, 16 MB.
SUM_ELEMENTS = 1 << 22

NAN_HINT = "look for NaN weights with `ortho inspect`, or calibrate without autocast"
TOP_SHARE = 0.01  # of a tensor's weights, where full and factored statistics are compared

Part = Literal["curvature", "gradient", "gram"]
AddSum = Callable[[str, Part, int, Tensor], None]
Inputs = Tensor | Mapping[str, Tensor]  # a positional input, or keyword arguments
Batch = Inputs | Sequence[Inputs]  # inputs, or a pair of inputs and labels
Loss = Callable[[Any, Any], Tensor]  # of a model's output, which may be of any type, and labels


def rows_of_tile(columns: int) -> int:
    """Give the rows of a tile of SUM_ELEMENTS: it bounds copies and products in float32."""
    return max(1, SUM_ELEMENTS // columns)


class Capture:
    """Hooks on Linears that add each pass to sums, as a context manager.

    Per weight (o, i), with s over sequences and t over the positions of one:

        gram             sum_t x_ti^2                    one row, the same for every o
        fisher sequence  sum_s (sum_t g_to x_ti)^2       the empirical Fisher's diagonal
        fisher token     sum_t g_to^2 x_ti^2             = (g^2)^T (x^2), one matrix product
        gradient         sum_s sum_t g_to x_ti

    and per Linear, where the full matrix is asked for,

        full gram        sum_t u_t x_t x_t^T             (in, in)

    with u_t = 1 over the positions that count, or u_t = mean_o g_to^2 over all of them, since a
    prompt that is not predicted still feeds what is. Its diagonal is then gram, or the mean over o
    of fisher token.

    Sources: gram is OBQ's and GPTQ's layer Hessian X X^T (Frantar et al. 2022, arXiv:2210.17323,
    eq. 3; without their factor 2), its diagonal alone. fisher is the empirical Fisher as SqueezeLLM
    uses it (Kim et al. 2023, arXiv:2306.07629, eq. 3), with the gradient of each sequence squared,
    never that of a batch; whether labels come from data or from the model is the caller's choice
    (Kunstner et al. 2019, arXiv:1905.12558, section 2). `token` leaves out the products of
    different positions, which is exact where their gradients are uncorrelated. The full matrix is
    GPTQ's Hessian, or with gradients GuidedQuant's (Kim et al. 2025, arXiv:2505.07004, section
    3.2), which averages X^T diag(g_o^2) X over each of several groups of output features: here all
    are one group, NLL is summed and not averaged, and squares stay float32, where theirs are
    stored in bfloat16.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        add: AddSum,
        *,
        kind: Literal["gram", "fisher"],
        unit: Literal["sequence", "token"] = "sequence",
        gradient: bool = False,
        gram: Literal["none", "full"] = "none",
        weighting: Literal["none", "gradient"] = "none",
    ) -> None:
        """Choose the modules to watch and the receiver of sums.

        Args:
            modules: name -> nn.Linear or transformers' Conv1D; statistics are (out, in) for both.
            add: called with name, part, first row and a float32 tile (rows, in) to be added to what
                is there; the curvature of gram has the one row 0.
            kind: gram needs a forward pass only, fisher a backward pass.
            unit: what fisher squares.
            gradient: sum gradients, too.
            gram: full sums the full input Gram matrix, too; in float32 whatever autocast says.
            weighting: of positions in it; gradient needs fisher.
        """
        if weighting != "none" and kind != "fisher":
            raise InternalError(f"positions are weighted by {weighting}, and {kind} has none")
        self.kind, self._modules, self._add = kind, modules, add
        self._unit, self._gradient = unit, gradient
        self._full, self._weighting = gram == "full", weighting
        self._batch = 0
        self._mask: Tensor | None = None
        self._counted: Tensor | None = None
        self._measured: set[str] = set()
        self._hooks = ExitStack()
        self.routed: Counter[str] = Counter()  # tokens that count and were routed to an expert

    def __enter__(self) -> Capture:
        """Put the hooks in place."""
        for name, module in self._modules.items():
            if hasattr(module, "routed"):
                self.routed[name] += 0  # known, if no token is ever routed to it
            hook = module.register_forward_hook(partial(self._forward, name))
            self._hooks.enter_context(hook)
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks away."""
        self._hooks.close()

    def begin(self, batch: int, mask: Tensor | None = None, counted: Tensor | None = None) -> None:
        """Announce a forward pass.

        Args:
            batch: sequences in it: the size of the first dimension.
            mask: (batch, positions) bool, True where gram counts a position, and for fisher where
                there is one; all without it.
            counted: the same, of what the full matrix counts beside fisher; `mask` without it.
        """
        self._batch, self._mask = batch, mask
        self._counted = mask if counted is None else counted
        self._measured.clear()

    def _forward(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        x, routed = inputs[0].detach(), getattr(module, "routed", None)
        if routed is not None:
            self.routed[name] += self._count_routed(cast(Any, module).chosen)
        if self._full and self._weighting == "none":
            self._add_full_gram(name, self._counted_rows(x, routed), None)
        if self.kind == "gram":
            self._add_gram(name, self._counted_rows(x, routed))
            return None
        if name in self._measured:
            raise CalibrationError(
                f"`{name}` is called twice in one pass; its gradients cannot be separated",
                hint="add it to `ignore`, or use calibrate.curvature=gram",
            )
        self._measured.add(name)
        # Weights need no gradient: the graph begins here, at the first Linear that is watched.
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        torch.Tensor.register_hook(output, partial(self._add_backward, name, x, routed))  # type: ignore[no-untyped-call]
        return output

    def _counted_rows(self, x: Tensor, routed: Tensor | None) -> Tensor:
        """Take the rows that count; an expert's are of the tokens `routed` to it."""
        rows, mask = x.reshape(-1, x.shape[-1]), self._counted
        if mask is None or (routed is None and mask.numel() != len(rows)):
            return rows
        counted = mask.reshape(-1)
        return rows[counted if routed is None else counted[routed]]

    def _count_routed(self, chosen: Tensor) -> int:
        """Count the tokens routed to an expert, but those that do not count."""
        if self._counted is None:
            return len(chosen)
        return int(self._counted.reshape(-1)[chosen].sum())

    def _add_gram(self, name: str, rows: Tensor) -> None:
        total = torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device)
        for piece in torch.split(rows, rows_of_tile(rows.shape[1])):
            total += piece.float().square().sum(0)
        self._put(name, "curvature", 0, total.unsqueeze(0))

    def _add_full_gram(self, name: str, x: Tensor, weights: Tensor | None) -> None:
        """Add x^T diag(weights) x, tile by tile; x is (positions, in), weights (positions,)."""
        columns = x.shape[1]
        step = rows_of_tile(columns)
        for row in range(0, columns, step):
            tile = torch.zeros(min(step, columns - row), columns, device=x.device)
            for start in range(0, x.shape[0], step):
                part = slice(start, start + step)
                piece = x[part].float()
                right = piece if weights is None else piece * weights[part].unsqueeze(1)
                # In place: hooks run inside of autocast, which would take x.T @ x in bfloat16.
                tile.addmm_(piece[:, row : row + step].T, right)
            self._put(name, "gram", row, tile)

    def _by_sequence(self, name: str, values: Tensor, routed: Tensor | None) -> list[Tensor]:
        """Part activations by sequence, (positions, features) each."""
        if routed is not None and self._batch > 1 and self._mask is not None:
            of = routed // self._mask.shape[1]
            return [values[of == number] for number in torch.unique(of).tolist()]
        flat = values.dim() == 2 and self._mask is not None and len(values) == self._mask.numel()
        if self._batch == 1 or len(values) == self._batch or flat:
            return list(values.reshape(self._batch, -1, values.shape[-1]))
        raise CalibrationError(
            f"`{name}` sees {list(values.shape)} of a batch of {self._batch}: which sequence a "
            "row belongs to is unknown",
            hint="--batch-size 1",
        )

    def _add_backward(self, name: str, x: Tensor, routed: Tensor | None, grad: Tensor) -> None:
        if self._full and self._weighting == "gradient":
            rows = x.reshape(-1, x.shape[-1])
            self._add_full_gram(name, rows, mean_squares(grad.reshape(-1, grad.shape[-1])))
        xs, grads = self._by_sequence(name, x, routed), self._by_sequence(name, grad, routed)
        # autocast hands Linears float32 inputs and takes bfloat16 out.
        xs = [one if one.dtype == grad.dtype else one.to(grad.dtype) for one in xs]
        step = rows_of_tile(x.shape[-1])
        for row in range(0, grad.shape[-1], step):
            shape = (min(step, grad.shape[-1] - row), x.shape[-1])
            curvature = torch.zeros(shape, dtype=torch.float32, device=x.device)
            gradient = torch.zeros_like(curvature) if self._gradient else None
            for whole, a in zip(grads, xs, strict=True):
                g = whole[:, row : row + step]
                if self._unit == "token":
                    curvature += (g.square().T @ a.square()).float()
                if self._unit == "sequence" or gradient is not None:
                    product = (g.T @ a).float()
                    if gradient is not None:
                        gradient += product
                    if self._unit == "sequence":
                        curvature.addcmul_(product, product)
            self._put(name, "curvature", row, curvature)
            if gradient is not None:
                self._put(name, "gradient", row, gradient)

    def _put(self, name: str, part: Part, row: int, tile: Tensor) -> None:
        if not bool(torch.isfinite(tile.sum())):
            forward = self.kind == "gram" or (part == "gram" and self._weighting == "none")
            what = "an input" if forward else "a gradient"
            raise NumericalError(f"{what} of `{name}` is NaN or infinite", hint=NAN_HINT)
        self._add(name, part, row, tile)


def logit_gradient(
    logits: Tensor, tokens: Tensor, counted: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """Differentiate the summed NLL of one sequence by its logits.

    dNLL/dlogits_t = softmax(logits_t) - onehot(label_t) where t counts, 0 elsewhere.

    Args:
        logits: (positions, vocabulary), any float dtype; position t predicts token t + 1.
        tokens: (positions,) int64.
        counted: (positions,) bool: position t counts; the last never does.
        generator: draws labels from softmax(logits) instead (the true Fisher), on CPU.
    Returns:
        The gradient in the logits' dtype, and the NLL of the data in nats.
    Raises:
        NumericalError: labels are to be drawn from logits that are not finite.
    """
    where = counted[:-1].nonzero().squeeze(-1)
    labels = tokens[where + 1]
    log_probabilities = logits[where].float().log_softmax(-1)
    nll = -float(log_probabilities.gather(1, labels.unsqueeze(1)).sum())
    probabilities = log_probabilities.exp_()
    if generator is not None:
        if not math.isfinite(nll):
            what = "the model's logits are NaN or infinite, and no label can be drawn from them"
            raise NumericalError(what, hint=NAN_HINT)
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)
        labels = drawn.squeeze(1).to(logits.device)
    probabilities[torch.arange(len(where), device=logits.device), labels] -= 1.0
    gradient = torch.zeros_like(logits)
    gradient[where] = probabilities.to(logits.dtype)
    return gradient, nll


def mean_squares(values: Tensor) -> Tensor:
    """Take the mean square of each row in float32, in slices that bound the copies.

    Args:
        values: (rows, columns), any float dtype.
    Returns:
        (rows,) float32.
    """
    pieces = torch.split(values, rows_of_tile(values.shape[1]))
    return torch.cat([piece.float().square().mean(1) for piece in pieces])


def symmetrize(matrix: Tensor, *, block: int = 1024) -> None:
    """Replace a matrix by (A + A^T) / 2 in place: exactly symmetric, without a second matrix.

    x^T diag(u) x is symmetric, but its two halves are summed in different orders.

    Args:
        matrix: (n, n) float32, finite.
        block: rows and columns of the copies that are made.
    """
    size = matrix.shape[0]
    for row in range(0, size, block):
        for column in range(row, size, block):
            upper = matrix[row : row + block, column : column + block]
            lower = matrix[column : column + block, row : row + block]
            mean = (upper + lower.T).mul_(0.5)
            upper.copy_(mean)
            lower.copy_(mean.T)


def factor(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate a matrix by its row and column means.

    F_oi ~ rows_o * columns_i,  rows_o = mean_i F_oi,  columns_i = mean_o F_oi / mean F: the best
    rank-one fit in the sense of the generalised Kullback-Leibler divergence.

    Args:
        curvature: (out, in) float32, >= 0, not all zero.
    Returns:
        rows (out,) and columns (in,), float32.
    Source: Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), section 3, with means for sums.
    """
    rows = curvature.mean(1)
    return rows, curvature.mean(0) / rows.mean()


def top_overlap(curvature: Tensor, other: Tensor, *, share: float = TOP_SHARE) -> float:
    """Give the share of the largest entries of one matrix that are among the largest of another."""
    k = max(1, round(share * curvature.numel()))
    chosen = torch.zeros(curvature.numel(), dtype=torch.bool)
    chosen[curvature.flatten().topk(k).indices] = True
    return float(chosen[other.flatten().topk(k).indices].sum()) / k


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode with no parameter that needs a gradient, and back."""
    training = [(child, child.training) for child in module.modules()]
    needed = [p for p in module.parameters() if p.requires_grad]
    module.train(False).requires_grad_(False)
    try:
        yield
    finally:
        for child, mode in training:
            child.training = mode
        for parameter in needed:
            parameter.requires_grad_(True)


def measure_batch(module: nn.Module, batch: Batch, capture: Capture, loss: Loss | None) -> int:
    """Pass one batch forward and, for fisher, back; return its number of samples."""
    inputs, labels = batch if isinstance(batch, tuple | list) else (batch, None)
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    capture.begin(len(first))
    with torch.set_grad_enabled(capture.kind != "gram"):
        output = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
        if capture.kind == "gram":
            return len(first)
        if labels is None and loss is None:
            raise UsageError(
                "fisher needs labels, and the loader yields inputs alone",
                hint="yield (inputs, labels), give a loss, or use kind='gram'",
            )
        total = cross_entropy(output, labels) if loss is None else loss(output, labels)
        if not total.requires_grad:
            what = "the loss does not depend on any chosen Linear"
            raise CalibrationError(what, hint="choose others with convert()")
        torch.autograd.backward([total])
    return len(first)


def cross_entropy(logits: Any, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label] over all positions; logits (..., classes)."""
    logits = getattr(logits, "logits", logits)
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum"
    )
