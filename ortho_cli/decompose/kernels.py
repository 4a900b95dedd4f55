"""Which kernel splits a plan's weights: compiled loops where they can, torch for all else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

from ortho_cli.decompose.plan import Plan
from ortho_cli.events import EventSink, Noted
from ortho_cli.split.task import TileKernel

log = logging.getLogger(__name__)

T = TypeVar("T")


class Kernels:
    """Makes kernels for workers, of which each has its own; threads may share this."""

    def __init__(
        self, plan: Plan, *, compiled: bool = True, device: str = "cpu", on_event: EventSink
    ) -> None:
        """Choose by what the plan asks for.

        Args:
            plan: says what is done to weights, and how large tiles are.
            compiled: use numba's loops where they do that.
            device: where to split instead, if one pass is all.
            on_event: told where less is used than was asked for.
        """
        self._sizes, self._on_event = plan.sizes, on_event
        if device != "cpu" and not is_plain(plan):
            on_event(Noted(message=f"split on the CPU: on {device} one pass has to be all"))
            device = "cpu"
        self.device = device
        why = None if compiled else "no compiled loops are wanted"
        why = why or _not_compiled(plan)
        self.compiled = device == "cpu" and why is None
        kernel = f"cuda on {device}" if device != "cpu" else f"torch: {why}" if why else "numba"
        log.info("kernel %s", kernel)
        self._lock, self._asked = threading.Lock(), False
        self._loops: ModuleType | None = None

    def load(self) -> ModuleType | None:
        """Load the compiled loops; None, and once a note, where numba is there and of no use."""
        with self._lock:
            if self.compiled and not self._asked:
                self._asked = True
                try:
                    from ortho_cli.split import numba_kernel

                    self._loops = numba_kernel
                except ImportError as error:  # numba and numpy, or numba and Python do not fit
                    log.warning("kernel torch: numba cannot be loaded (%s)", error)
                    self._on_event(Noted(message=f"split without numba, which is slower: {error}"))
        return self._loops

    def make(self) -> TileKernel:
        """Make a kernel."""
        if self.device != "cpu":
            from ortho_cli.split.cuda_kernel import CudaKernel

            return CudaKernel(self.device, self._sizes)
        if loops := self.load():
            found: TileKernel = loops.NumbaKernel(self._sizes)
            return found
        from ortho_cli.split.torch_kernel import TorchKernel

        return TorchKernel(self._sizes)


def is_plain(plan: Plan) -> bool:
    """Tell whether one pass is all: rounding to nearest, absmax scales, nothing forgotten."""
    if plan.recipe.keeps_columns:  # they are known after a pass over all rows
        return False
    return _rounds_alone(plan) and all(tensor.scale == "absmax" for tensor in plan.split)


def _not_compiled(plan: Plan) -> str | None:
    """Say why numba's loops cannot split a plan; None where they can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    if not _rounds_alone(plan):
        return "codes are not the nearest ones"
    if plan.statistics is not None and plan.recipe.saliency.kind != "curvature":
        return "curvature is read and does not select"
    if plan.group_size % 8:
        return f"groups of {plan.group_size} weights"
    if any(tensor.bits != 4 for tensor in plan.split):
        return "codes are not all of 4 bits"
    return None


def _rounds_alone(plan: Plan) -> bool:
    """Tell whether each weight goes to its nearest code."""
    return not (plan.reference or plan.recipe.forgets or plan.recipe.compensates)


@contextmanager
def set_to(value: T, get: Callable[[], T], put: Callable[[T], object]) -> Iterator[None]:
    """Give a setting of the process another value, and then its own again."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def one_thread_of_torch() -> AbstractContextManager[None]:
    """Let torch compute with one thread: work is parallel over tensors, not inside an operation."""
    import torch

    return set_to(1, torch.get_num_threads, torch.set_num_threads)
