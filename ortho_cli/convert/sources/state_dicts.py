"""Finds the state dict in a training checkpoint, as torch.load returns it.

Scripts put it under `state_dict`, `model`, `module` (DeepSpeed), `params` (BasicSR) and many other
keys, beside an optimizer, an average of the weights (EMA) and loose tensors such as a loss. The
dict with the most elements is taken. Where a second one is about as large, the user has to choose:
timm prefers the average, transformers reads only flat files, and BasicSR has an option.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.storage import hints

# Keys under which scripts keep weights, each a whole model.
WEIGHTS = re.compile(
    r"state_dict|^(model|module|net|network|weights|params|parameters|generator|discriminator"
    r"|student|teacher|shadow|swa|averaged?|best)(_|\d|$)|(^|_)ema(_|\d|$)|^net_?[gd]$|^[gd]$"
)
# Keys of a trainer's own state: as large as the weights or larger, and never weights.
TRAINING = re.compile(
    r"optimizer|(^|_)(opt(im)?(_states?)?(_dicts?)?|grad_scaler|grads?|gradients?|exp_avg\w*"
    r"|momentum_buffer\w*|master_weights?|callbacks?)$"
)
# Keys that a part of a model may have, too: `opt_model`, `sampler`. Their values decide.
PERHAPS_TRAINING = re.compile(
    r"optim|(^|_)(opt|sched\w*|lr_\w+|scaler|grad_scaler|rng\w*|random_\w+|grads?|gradients?"
    r"|exp_avg\w*|momentum_buffer\w*|master_weights?|callbacks?|loops?|samplers?|dataloaders?)(_|$)"
)
# Keys of optimizers for each parameter: Adam and its kin, SGD, RMSprop, Adadelta, bitsandbytes.
MOMENTS = re.compile(
    r"(max_)?exp_(avg|inf)\w*|steps?|momentum\w*|square_avg|grad_avg|acc_delta|state[12]|param_groups"
)
# A second set of weights with at least this share of the elements of the largest is not left out
# unasked: the head of a large model can be two hundredths of it.
RIVAL = 0.02
MOST_NAMES = 1 << 18  # of joined dicts: where one holds itself, names would never end
DEEPEST = 64  # dicts within dicts; no known checkpoint comes near
SHOWN = 8  # names in a note
WHOLE = "."  # the key that stands for the file's top level

Keys = tuple[str, ...]
Node = Mapping[object, object]
Container = Node | list[object] | tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a file, the dotted key that they are under, and notes on the rest."""

    key: str
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def find_weights(found: object, *, file: Path, given: Path, key: str | None = None) -> Weights:
    """Find the weights in a file of torch.save.

    Args:
        found: the result of torch.load.
        file: its path, for errors and notes.
        given: what the user named, the file or its folder.
        key: where the weights are, `a.b` for nested ones, `.` for all; None looks for them.
    Raises:
        UsageError: the file has no such key, or nothing but training state or names there.
        CheckpointError: no weights, or two sets of them that are about as large.
    """
    return _Search(file, given).run(found, key)


class _Search:
    def __init__(self, file: Path, given: Path) -> None:
        self._file, self._given = file, given
        self._sizes: dict[int, int] = {}

    def run(self, found: object, key: str | None) -> Weights:
        if not isinstance(found, Mapping) and key is None:
            raise self._no_dict(found)
        node, path = found, Keys()
        if key not in (None, WHOLE):
            node, path = self._follow(found, str(key))
        if not isinstance(node, Mapping):  # of `--key .`
            raise self._no_dict(found)
        if key != WHOLE:
            node, path = self._descend(node, path, asked=bool(key))
        tensors = self._named(node, whole=key == WHOLE)
        left = list(self._left_out(found, path, tensors))
        if not tensors or (left and all(tensor.numel() == 1 for tensor in tensors.values())):
            raise self._no_tensors(found)  # a loss or an epoch is no model
        notes = []
        weights = f"the weights of `{self._file.name}` are"
        if path:
            notes.append(f"{weights} those under `{_dotted(path)}`")
        if any(name not in node for name in tensors):
            notes.append(f"{weights} dicts within dicts: their names are joined with dots")
        if left:
            notes.append(f"left out of `{self._file.name}`: {hints.some(left, SHOWN)}")
        return Weights(key=_dotted(path), tensors=tensors, notes=tuple(notes))

    def _follow(self, node: object, key: str) -> tuple[Node, Keys]:
        """Go to the node that `--key` names; a key may have dots in it."""
        path: Keys = ()
        rest = key
        while rest:
            items = {str(k): v for k, v in _items(node)}
            fitting = [k for k in items if f"{rest}.".startswith(f"{k}.")]
            if not fitting:
                there = ", ".join(f"`{k}`" for k in sorted(items)[:8]) or "no keys"
                where = f"`{_dotted(path)}` of `{self._file}`" if path else f"`{self._file}`"
                raise UsageError(
                    f"--key {key} is not in {where}, which has {there}", hint="give one of these"
                )
            step = max(fitting, key=len)
            node, path, rest = items[step], (*path, step), rest[len(step) + 1 :]
        if not self._size(node) or not isinstance(node, Mapping):
            raise UsageError(
                f"--key {key} of `{self._file}` is a {type(node).__name__} without named tensors",
                hint="give the key of a state dict",
            )
        return node, path

    def _descend(self, node: Node, path: Keys, *, asked: bool) -> tuple[Node, Keys]:
        """Go down while one part is the largest by far; stop where all tensors are one model."""
        start = path
        while (parts := self._parts(node)) and len(path) < DEEPEST:
            tops = _own(node) if _looks_like_weights(node, parts) else {}
            own = sum(tensor.numel() for tensor in tops.values())
            inside = asked or any(WEIGHTS.search(step.lower()) for step in path)
            if self._is_tree(node, parts, own, inside=inside):
                return node, path
            sizes = {"": own} | {name: self._size(part) for name, part in parts.items()}
            ranked = sorted((name for name in sizes if sizes[name]), key=lambda n: -sizes[n])
            first, *others = ranked
            rivals = [
                name
                for name in others
                if sizes[name] >= RIVAL * sizes[first]
                and not _same_memory(parts.get(first), parts.get(name))
            ]
            if rivals and asked and path == start and not _are_alike([*parts.values()]):
                return node, path
            chosen = parts.get(first)
            if rivals or isinstance(chosen, list | tuple):
                raise self._doubt(path, parts, [first, *rivals], sizes)
            if not first or chosen is None:  # the node's own tensors
                return node, path
            node, path = chosen, (*path, first)
        return node, path

    def _is_tree(
        self, node: Node, parts: Mapping[str, Container], own: int, *, inside: bool
    ) -> bool:
        """Tell whether a node is one model of nested dicts, and no container of several things."""
        dicts = [part for part in parts.values() if isinstance(part, Mapping)]
        if len(dicts) < len(parts) or any(WEIGHTS.search(name.lower()) for name in parts):
            return False
        if len(parts) == 1 and not own:
            return inside and not self._leads_to_flat(dicts[0])
        plain = [v for v in node.values() if not isinstance(v, Mapping | Tensor)]
        loose = not own and any(isinstance(v, Tensor) for v in node.values())
        return inside or not (plain or loose or _are_alike(dicts))

    def _leads_to_flat(self, node: Node) -> bool:
        """Tell whether single keys lead to a flat state dict, and so are no parts of its names."""
        for _ in range(DEEPEST):  # a dict may hold itself
            if _has_dotted_names(node):
                return True
            parts = [*self._parts(node).values()]
            if len(parts) != 1 or not isinstance(parts[0], Mapping):
                return False
            node = parts[0]
        return False

    def _parts(self, node: Node) -> dict[str, Container]:
        """Select the containers of a node that have tensors and may be weights."""
        return {
            str(key): value
            for key, value in node.items()
            if isinstance(value, Mapping | list | tuple)
            and not _is_training(str(key), value)
            and self._size(value)
        }

    def _size(self, node: object, depth: int = 0) -> int:
        """Count the elements of the tensors below; bare tensors in a list have no names."""
        if isinstance(node, Tensor):  # ZeRO-3 leaves tensors without elements: `_load` refuses them
            return max(1, node.numel())
        if not isinstance(node, Mapping | list | tuple) or depth > DEEPEST:
            return 0
        if id(node) not in self._sizes:
            self._sizes[id(node)] = 0  # a container that holds itself counts once
            named = isinstance(node, Mapping)
            self._sizes[id(node)] = sum(
                self._size(value, depth + 1)
                for key, value in _items(node)
                if not (_is_training(str(key), value) if named else isinstance(value, Tensor))
            )
        return self._sizes[id(node)]

    def _named(self, node: Node, *, whole: bool) -> dict[str, Tensor]:
        """Collect the tensors of a tree by name, or of its top if that alone is the state dict."""
        parts = self._parts(node)
        named = any(WEIGHTS.search(name.lower()) for name in parts)
        flat = not whole and named and _looks_like_weights(node, parts)
        hint = "save a flat state_dict()"
        found: dict[str, Tensor] = {}
        for name, tensor in self._leaves(node, "", 0 if flat else DEEPEST):
            if name in found:
                what = f"two tensors of the name `{name}`, once its dicts are joined with dots"
                raise self._refused(f"has {what}", hint)
            if len(found) >= MOST_NAMES and name not in node:
                what = f"more than {MOST_NAMES} tensors in dicts within dicts"
                raise self._refused(f"has {what}", hint)
            found[name] = tensor
        return found

    def _leaves(self, node: Node, prefix: str, deeper: int) -> Iterator[tuple[str, Tensor]]:
        for key, value in node.items():
            if not isinstance(key, str) or _is_training(key, value):
                continue
            if isinstance(value, Tensor):
                yield prefix + key, value
            elif isinstance(value, Mapping) and deeper and self._size(value):
                yield from self._leaves(value, f"{prefix}{key}.", deeper - 1)

    def _left_out(self, found: object, path: Keys, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """List the keys beside the weights, on the path to them and among them."""
        for depth, step in enumerate(path):
            items = [(str(key), value) for key, value in _items(found)]
            yield from (_dotted((*path[:depth], key)) for key, _ in items if key != step)
            found = next(value for key, value in items if key == step)
        prefixes = {name[: i + 1] for name in tensors for i, c in enumerate(name) if c == "."}
        for key, _ in _items(found):
            if key not in tensors and f"{key}." not in prefixes:
                yield _dotted((*path, str(key)))

    def _doubt(
        self, path: Keys, parts: Mapping[str, Container], names: list[str], sizes: Mapping[str, int]
    ) -> CheckpointError:
        told = [
            (key, sizes[name])
            for name in names[:4]
            for key in self._choices(path, name, parts.get(name))
        ]
        some = " and ".join(
            f"{'the top level' if key == WHOLE else f'`{key}`'} ({size} elements)"
            for key, size in told[:SHOWN]
        )
        first = next((key for key, _ in told if key != WHOLE), WHOLE)
        command = f"ortho convert {hints.said(self._given)} --key {shlex.quote(first)}"
        is_list = any(isinstance(parts.get(name), list | tuple) for name in names)
        whole = "" if is_list else f"; `--key {WHOLE}` takes all that the file holds"
        what = "holds several sets of weights" if len(told) > 1 else "keeps its weights in a list"
        return self._refused(f"{what}: {some}", f"choose one, as in `{command}`{whole}")

    def _choices(self, path: Keys, name: str, part: object) -> Iterator[str]:
        if isinstance(part, list | tuple):
            for i, value in enumerate(part):
                if isinstance(value, Mapping) and self._size(value):
                    yield _dotted((*path, name, str(i)))
        else:
            yield _dotted((*path, name) if name else path) or WHOLE

    def _refused(self, what: str, hint: str = "save the model's state_dict()") -> CheckpointError:
        return CheckpointError(f"`{self._file}` {what}", hint=hint)

    def _no_dict(self, found: object) -> CheckpointError:
        kind = type(found).__name__
        if isinstance(found, list | tuple):
            dicts = [i for i, v in enumerate(found) if isinstance(v, Mapping) and self._size(v)]
            if dicts:
                chosen = f"ortho convert {hints.said(self._given)} --key {dicts[0]}"
                return self._refused(
                    f"holds a {kind} of {len(found)} entries, {len(dicts)} of them with tensors, "
                    "not a map of names to tensors",
                    f"choose one by its number, as in `{chosen}`",
                )
            kind += f" of {len(found)} entries"
        return self._refused(f"holds a {kind}, not a map of names to tensors")

    def _no_tensors(self, found: object) -> CheckpointError:
        keys = [str(key) for key, _ in _items(found)]
        some = f": {', '.join(f'`{key:.60}`' for key in keys[:6])}" if keys else ""
        return self._refused(f"holds no tensors of a model among {len(keys)} entries{some}")


def _items(node: object) -> Iterator[tuple[object, object]]:
    if isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def _dotted(path: Keys) -> str:
    return ".".join(path)


def _is_training(key: str, value: object) -> bool:
    """Tell whether an entry is an optimizer's or trainer's state, by its name or its content."""
    if isinstance(value, Tensor):
        return False
    name = key.lower()
    if TRAINING.search(name) or (PERHAPS_TRAINING.search(name) and not _holds_matrices(value)):
        return True
    if not isinstance(value, Mapping):
        return False
    state = value.get("state")
    # Optimizers name parameters by number.
    numbered = any(isinstance(name, int) for name in value)
    return numbered or "param_groups" in value or (isinstance(state, Mapping) and "steps" in value)


def _holds_matrices(value: object) -> bool:
    """Tell whether an entry has named matrices, and no keys that an optimizer has."""
    seen: set[int] = set()
    found = False
    left: list[object] = [value]
    while left:
        node = left.pop()
        if id(node) in seen:  # a dict may hold itself
            continue
        seen.add(id(node))
        is_map = isinstance(node, Mapping)
        for key, inner in _items(node):
            if is_map and (isinstance(key, int) or MOMENTS.fullmatch(str(key).rpartition(".")[2])):
                return False
            if isinstance(inner, Tensor):
                found = found or (is_map and inner.dim() > 1 and inner.is_floating_point())
            else:
                left.append(inner)
    return found


def _own(node: Node) -> dict[str, Tensor]:
    return {k: v for k, v in node.items() if isinstance(v, Tensor) and isinstance(k, str)}


def _looks_like_weights(node: Node, parts: Mapping[str, Container]) -> bool:
    """Tell whether a node's own tensors are weights, and not a loss or an epoch."""
    names = _own(node).keys()
    again = any(names & set(part) for part in parts.values() if isinstance(part, Mapping))
    return again or _has_dotted_names(node) or bool(names & {"weight", "bias"})


def _has_dotted_names(node: Node) -> bool:
    return any("." in name for name in _own(node))


def _are_alike(dicts: Collection[object]) -> bool:
    """Tell whether dicts have the same names and shapes: copies of a model, not its parts."""
    layouts = {
        frozenset((key, getattr(value, "shape", None)) for key, value in _items(part))
        for part in dicts
    }
    return len(dicts) > 1 and len(layouts) == 1


def _same_memory(left: object, right: object) -> bool:
    """Tell whether two containers are one set of weights, saved under two keys."""
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return False
    return left is right or (
        left.keys() == right.keys() and all(_is_same_tensor(left[key], right[key]) for key in left)
    )


def _is_same_tensor(left: object, right: object) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    try:
        return place_of(left) == place_of(right)
    except (RuntimeError, NotImplementedError):  # sparse tensors have no storage
        return False


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Tell which elements of which memory a tensor is; raises for one without storage."""
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *start, tensor.shape, tensor.stride(), tensor.dtype
