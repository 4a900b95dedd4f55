"""Names that training wrappers prefix: `module.` of DDP, `_orig_mod.` of torch.compile and others.

What a wrapper adds is no part of an architecture, and a reader that looks for
`model.layers.0.mlp.up_proj.weight` does not find `module.model.layers.0...`. Prefixes of wrappers
are stripped wherever they stand. `model.` may be Lightning's or the model's own: it goes only where
transformers says that the architecture of config.json has the names without it and not those with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ortho_cli.convert.sources.architectures import parameter_names
from ortho_cli.convert.sources.base import Source
from ortho_cli.errors import CheckpointError

# Parts of a name that torch's and Lightning's wrappers add, wherever they stand.
INSIDE = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP of fairscale and of torch before 1.13
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning's strategies
    "_ddp_module",
)
LEADING = "module"  # DistributedDataParallel, DataParallel, DeepSpeed
PEFT = "base_model.model."  # of a merged adapter; one that is not merged has lora_ in its names
FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")  # FSDP's own shard of many parameters
# What a whole model's names begin with: below a wrapper's prefix these come again.
TOPS = frozenset({"model", "transformer", "lm_head", "shared", "embed_out", "backbone"})
# First parts that transformers' own models have; anything else before every name is looked into.
COMMON = TOPS | {"encoder", "decoder", "language_model", "embeddings", "layers", "h", "gpt_neox"}
MOST_PREFIX = 3  # parts: a Lightning module within a trainer's own

Rename = Callable[[str], str]


def strip_wrappers(source: Source) -> Source:
    """Give tensors the names that they have without wrappers, and note what was stripped.

    Args:
        source: what is converted.
    Returns:
        The source itself where no name has a prefix.
    Raises:
        CheckpointError: two names become one, two models lie side by side, or the tensors are
            FSDP's flat shards.
    """
    names = [tensor.name for tensor in source.tensors]
    flat = next((name for name in names if FLAT.search(name)), None)
    if flat is not None:
        raise CheckpointError(
            f"tensor `{flat}` of `{source.path}` is a flat shard of FSDP, not a parameter",
            hint="save a full state dict: `fsdp.state_dict_type: FULL_STATE_DICT`, or "
            "`accelerate merge-weights FOLDER OUT`",
        )
    rename, notes = find_rename(names, source.config)
    renamed = {name: rename(name) for name in names}
    if all(old == new for old, new in renamed.items()):
        return replace(source, notes=(*source.notes, *notes)) if notes else source
    _check_distinct(renamed, source)
    return replace(
        source,
        tensors=tuple(replace(tensor, name=renamed[tensor.name]) for tensor in source.tensors),
        aliases={rename(copy): renamed[kept] for copy, kept in source.aliases.items()},
        notes=(*source.notes, *notes),
    )


def _check_distinct(renamed: Mapping[str, str], source: Source) -> None:
    seen: dict[str, str] = {}
    for old, new in renamed.items():
        other = seen.setdefault(new, old)
        if other != old:
            raise CheckpointError(
                f"tensors `{other}` and `{old}` of `{source.path}` are both `{new}` without the "
                "prefixes of wrappers",
                hint="save one of the two: the state_dict() of the model that is wrapped",
            )


def find_rename(names: Iterable[str], config: Mapping[str, Any] | None) -> tuple[Rename, list[str]]:
    """Find what takes wrappers' prefixes from the names of a checkpoint, and say what went.

    Args:
        names: as they are in the checkpoint.
        config: config.json, which may tell prefixes of wrappers from the model's own.
    Raises:
        CheckpointError: two models lie side by side, each with a prefix of its own.
    """
    steps: list[Rename] = []
    notes: list[str] = []
    left = list(names)
    for prefix, step in _certain(left):
        found = [step(name) for name in left]
        count = sum(new != old for new, old in zip(found, left, strict=True))
        if count:
            notes.append(f"`{prefix}` of a wrapper is stripped from {count} of {len(left)} names")
            steps.append(step)
            left = found
    step, said = _uncertain(left, config)
    steps.append(step)

    def rename(name: str) -> str:
        for step in steps:
            name = step(name)
        return name

    return rename, notes + said


def _certain(names: list[str]) -> Iterator[tuple[str, Rename]]:
    """List what is no part of any architecture, with what strips it."""
    for part in INSIDE:
        # Two of them may follow one another, so what is before stays for the next.
        yield f"{part}.", partial(re.compile(rf"(?:(?<=\.)|^){part}\.").sub, "")
    yield f"{LEADING}.", partial(re.compile(rf"^({LEADING}\.)+").sub, "")
    if not any("lora_" in name for name in names):
        yield PEFT, partial(re.compile(rf"^{re.escape(PEFT)}").sub, "")


def _uncertain(names: list[str], config: Mapping[str, Any] | None) -> tuple[Rename, list[str]]:
    """Strip what may be the model's own only where transformers says that it is not."""
    inner = [name for name in names if ".module." in name]
    prefix = _leading(names, config)
    if not inner and not prefix:
        return _same, []
    known = parameter_names(config, tensors=len(names))
    if known is None:
        return _same, list(_unknown(names, inner, prefix))
    candidates = [partial(re.compile(r"\.module\.").sub, ".")] if inner else []
    parts = prefix.split(".")[:-1]
    candidates += [
        partial(re.compile(rf"^{re.escape('.'.join(parts[:n]))}\.").sub, "")
        for n in range(1, len(parts) + 1)
    ]
    for step in candidates:
        changed = [name for name in names if step(name) != name]
        fits = sum(step(name) in known for name in changed)
        # Half: some architectures fuse tensors while they load, so that names differ in any case.
        if changed and not known.intersection(changed) and 2 * fits >= len(changed):
            _refuse_second_model(names, step)
            return step, [
                f"{len(changed)} of {len(names)} names have a wrapper's prefix, which the "
                f"architecture does not have: `{changed[0]}` becomes `{step(changed[0])}`"
            ]
    if known.intersection(names):
        return _same, []
    return _same, [f"no name is one of the architecture's: `{names[0]}` and others are kept"]


def _refuse_second_model(names: list[str], step: Rename) -> None:
    """Refuse two sets of weights side by side, as of an average and its model: which is meant?"""
    made = {step(name): name for name in names if step(name) != name}
    left = [name for name in names if step(name) == name]
    twins = [(name, rest) for name in left for rest in _cut(name) if rest in made]
    if not twins or 2 * len({name for name, _ in twins}) < len(left):
        return
    name, rest = twins[0]
    first, second = made[rest].removesuffix(rest), name.removesuffix(rest)
    raise CheckpointError(
        f"names begin with `{first}` and with `{second}`, as `{made[rest]}` and `{name}`: "
        f"these are two models, and both have a `{rest}`",
        hint="save one of the two: the state_dict() of the model that is wanted",
    )


def _cut(name: str) -> Iterator[str]:
    """Give a name without its first part, its first two and so on."""
    for _ in range(MOST_PREFIX):
        _, dot, name = name.partition(".")
        if dot:
            yield name


def _same(name: str) -> str:
    return name


def _leading(names: list[str], config: Mapping[str, Any] | None) -> str:
    """Give what most names begin with, where it may be a wrapper's; empty where it is usual."""
    parts: list[str] = []
    here = names
    while len(parts) < MOST_PREFIX:
        first, count = Counter(name.partition(".")[0] for name in here).most_common(1)[0]
        inner = [name.partition(".")[2] for name in here if name.startswith(f"{first}.")]
        if 2 * count < len(here) or not inner or first.isdigit():
            break
        parts.append(first)
        here = inner
    tops = TOPS | {str((config or {}).get("model_type"))}
    inner_tops = [place for place, part in enumerate(parts) if place and part in tops]
    if inner_tops:
        return "".join(f"{part}." for part in parts[: inner_tops[-1] + 1])
    unusual = parts and parts[0] not in COMMON | tops
    return "".join(f"{part}." for part in parts) if unusual else ""


def _unknown(names: list[str], inner: list[str], prefix: str) -> Iterator[str]:
    """Note what looks like a wrapper's and is kept, since nothing says that it is."""
    if inner:
        yield f"`.module.` in `{inner[0]}` and others may be a wrapper's, and is kept"
    tops = [part for part in prefix.split(".")[1:] if part in TOPS]
    if tops and all(name.startswith(prefix.partition(".")[0] + ".") for name in names):
        yield (
            f"names begin with `{prefix}`, which may be a wrapper's, and is kept: no config.json "
            "names an architecture that transformers knows"
        )
