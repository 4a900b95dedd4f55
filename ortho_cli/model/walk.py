"""Take a causal language model block by block, reading each from disk; it is never held whole.

    h_0 = embed(tokens);  h_k = block_k(h_(k-1), arguments_k);  logits = head(h_n)

Arguments of a block, such as masks and positions, are those that the model's own forward passes to
it: it runs once per batch with blocks that compute nothing and pass on what they get. That also
shows whether the blocks simply follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError
from ortho_cli.model import load as models
from ortho_cli.model.blocks import Options, Output, Stop, hidden_of, largest_list, split_arguments
from ortho_cli.model.on_disk import IN_MEMORY, Weights, build
from ortho_cli.storage.checkpoint import Checkpoint

# What a forward raises where a block's stand-in returns something else than the block would.
_MISLED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
SHARED = 8  # arguments of a shape that are remembered, to share them: a few kinds of masks
Forward = Callable[[int, Tensor, Options], Output]


class Walk:
    """The blocks of a model on disk, in the order in which the model calls them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Iterable[str],
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        way_out: str = IN_MEMORY,
    ) -> None:
        """Build the model without weights, and find its blocks; no weight is read.

        Args:
            checkpoint: a transformers folder.
            names: weights that the caller asks for by block; `left` are those that are in none.
            dtype: of the weights; None keeps the checkpoint's.
            device: where a block goes.
            way_out: what to do about a model that cannot be walked.
        Raises:
            CheckpointError: transformers cannot build the model, or tensors do not fit it.
            CalibrationError: it has no blocks.
        """
        self._way_out = way_out
        self.model = build(checkpoint, dtype=dtype, way_out=way_out)
        linears = models.find_linears(self.model, names)
        with self._of_walk():
            self._blocks = largest_list(self.model, linears)
        self.linears: list[dict[str, nn.Module]] = []
        for block in self._blocks:
            inside = set(map(id, block.modules()))
            self.linears.append({name: one for name, one in linears.items() if id(one) in inside})
        self.left = sorted(set(linears).difference(*self.linears))
        self._weights = Weights(self.model, checkpoint, device, way_out=way_out)
        self._device = device
        self._of_block = [[id(one) for one in block.parameters()] for block in self._blocks]
        of_blocks = {one for part in self._of_block for one in part}
        self._outside = [id(p) for p in self.model.parameters() if id(p) not in of_blocks]
        self._embedding = models.embedding_of(self.model)
        self._blank_table = list(self._embedding.parameters())
        self._embedded: tuple[torch.Size, torch.dtype] | None = None  # of one token
        self._rows: Tensor | None = None  # of the embedding, that are read
        self._is_past = False  # what is before the blocks is not needed any more
        self._as_tuple: bool | None = None  # how a block returns hidden states; None: not known
        self._known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}  # arguments
        for module in self.model.modules():
            own = [id(one) for one in module.parameters(recurse=False) if id(one) in self._outside]
            if own:
                module.register_forward_pre_hook(partial(self._ensure, own))

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(map(self._weights.nbytes, self._of_block))

    @property
    def entry_bytes(self) -> int:
        """Bytes of the rows of the embedding that `read_only` asked for."""
        width = models.input_embedding(self.model).shape[1]
        return 0 if self._rows is None else 4 * len(self._rows) * width

    @property
    def tail_bytes(self) -> int:
        """Bytes of all that is outside of blocks, but an embedding that is no head, too."""
        table = [id(one) for one in self._blank_table]
        alone = [one for one in table if not self._weights.is_shared(one)]
        return self._weights.nbytes(set(self._outside).difference(alone))

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has an embedding for."""
        return models.input_embedding(self.model).shape[0]

    def read_only(self, tokens: Tensor) -> None:
        """Say which tokens `enter` will be given: of the embedding, only their rows are read."""
        if isinstance(self._embedding, nn.Embedding):
            self._rows = torch.unique(tokens)

    @torch.no_grad()
    def enter(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Options]]:
        """Give the hidden states that reach the first block, and the arguments of each block.

        Args:
            tokens: (batch, length) int64.
            mask: (batch, length) int64, 0 where a token is padding; None where none is.
        Raises:
            CalibrationError: blocks do not simply follow one another.
        """
        kinds = (False, True) if self._as_tuple is None else (self._as_tuple,)
        why: Exception | None = None
        for as_tuple in kinds:
            try:
                found = self._enter(tokens, mask, as_tuple)
            except _MISLED as error:
                why = error
            else:
                self._as_tuple = as_tuple
                return found
        raise self._unlike("do not simply follow one another") from why

    def _enter(
        self, tokens: Tensor, mask: Tensor | None, as_tuple: bool
    ) -> tuple[Tensor, list[Options]]:
        found: list[Options] = []
        first: list[Tensor] = []
        passed: list[Tensor] = []

        def stand_in(number: int, hidden: Tensor, options: Options) -> Output:
            if number != len(found) or (passed and hidden is not passed[-1]):
                raise RuntimeError("something is between two blocks")
            found.append({key: self._shared(key, value) for key, value in options.items()})
            first[:] = first or [hidden]
            if len(found) == len(self):
                raise Stop
            passed.append(hidden.view_as(hidden))  # another object, of the same values
            return (passed[-1],) if as_tuple else passed[-1]

        def embedded(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._embedded = output.shape[2:], output.dtype

        options = {} if mask is None else {"attention_mask": mask}
        watched = self._embedding.register_forward_hook(embedded)
        with self._replaced(stand_in), watched, suppress(Stop):
            self.model(input_ids=tokens, use_cache=False, **options)
        if len(found) < len(self):
            raise RuntimeError("blocks are left out")
        return first[0], found

    def call(self, number: int, hidden: Tensor, options: Options) -> Tensor:
        """Pass (batch, length, hidden) through a block that is held.

        Raises:
            CalibrationError: what comes out is of another shape or dtype.
        """
        output: Output = self._blocks[number](hidden, **options)
        self._as_tuple, found = isinstance(output, tuple), hidden_of(output)
        if (found.shape, found.dtype) != (hidden.shape, hidden.dtype):
            raise self._unlike(f"turn hidden states of {hidden.dtype} into {found.dtype}")
        return found

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Hold a block in memory, and nothing outside of blocks."""
        self.release()
        self._weights.fill(self._of_block[number])
        try:
            yield
        finally:
            self._weights.release(self._of_block[number], reuse=True)

    def release(self) -> None:
        """Give back what is held outside of blocks."""
        self._weights.release(self._outside)

    def logits(self, hidden: Tensor) -> Tensor:
        """Pass (n, length, hidden) outputs of the last block through what follows it.

        It keeps the graph where gradients are enabled and `hidden` needs one.
        """
        if not self._is_past:  # a head that is tied to the embedding needs all of its rows
            self.release()
            self._weights.drop_spares()
        tail, dtype = self._embedded or (hidden.shape[2:], hidden.dtype)

        def stand_in(number: int, given: Tensor, options: Options) -> Output:
            told = hidden if number == len(self) - 1 else given
            return (told,) if self._as_tuple else told

        def embed(tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, *tail, dtype=dtype, device=hidden.device)

        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        self._is_past = True  # of an embedding that is no head, nothing is read again
        with self._replaced(stand_in), _forward_of(self._embedding, embed):
            found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return found

    def close(self) -> None:
        """Let go of all weights and files."""
        self.release()
        self._weights.drop_spares()
        self._weights.close()

    def _ensure(self, own: list[int], module: nn.Module, args: object) -> None:
        """Fill what a module outside of blocks holds itself, before it is called."""
        table = module is self._embedding
        if table and self._is_past:
            return
        missing = [one for one in own if self._weights.is_blank(one)]
        if table and self._rows is not None and len(missing) == 1:
            self._weights.fill_rows(missing[0], self._rows)
        else:
            self._weights.fill(missing)

    def _shared(self, key: str, value: Any) -> Any:
        """Check an argument of a block, and share tensors that are equal to another batch's."""
        if isinstance(value, Tensor):
            known = self._known.setdefault((value.shape, value.dtype), [])
            equal = (one for one in known if one is value or torch.equal(one, value))
            found = next(equal, value)
            if found is value:
                known[:] = [*[one for one in known if one is not value][-SHARED:], value]
            return found
        if isinstance(value, tuple | list):
            return type(value)(self._shared(key, one) for one in value)
        if not isinstance(value, _PLAIN):
            raise self._unlike(f"share a {type(value).__name__}, `{key}`")
        return value

    def _unlike(self, what: str) -> CalibrationError:
        name = type(self.model).__name__
        return CalibrationError(f"the blocks of {name} {what}", hint=self._way_out)

    @contextmanager
    def _of_walk(self) -> Iterator[None]:
        """Give errors about blocks our way out."""
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(error.message, hint=self._way_out) from error

    @contextmanager
    def _replaced(self, stand_in: Forward) -> Iterator[None]:
        """Let something else compute what blocks return."""

        def forward(number: int, *args: Tensor, **options: Any) -> Output:
            with self._of_walk():
                hidden, rest = split_arguments(args, options)
            return stand_in(number, hidden, rest)

        with ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(_forward_of(block, partial(forward, number)))
            yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Output]) -> Iterator[None]:
    """Give a module another forward for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
