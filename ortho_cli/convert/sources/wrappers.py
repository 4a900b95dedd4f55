"""Strips prefixes of training wrappers from names: `module.` of DDP, `_orig_mod.` and others.

A reader that looks for `model.layers.0.mlp.up_proj.weight` does not find it under `module.`.
Prefixes that only wrappers use are stripped anywhere in a name. `model.` may be Lightning's or the
model's own: it is stripped only where, by transformers, the architecture of config.json has the
names without it and not those with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from ortho_cli.convert.sources.architectures import parameter_names
from ortho_cli.convert.sources.base import Source
from ortho_cli.errors import CheckpointError

# Parts that torch's and Lightning's wrappers add anywhere in a name.
INSIDE = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP of fairscale and of torch before 1.13
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning's strategies
    "_ddp_module",
)
LEADING = "module"  # DistributedDataParallel, DataParallel, DeepSpeed
PEFT = "base_model.model."  # of a merged adapter; others have lora_ in their names
FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")  # FSDP's own shard of many parameters
# First parts of the names of a whole model: a wrapper's prefix comes before one of these.
TOPS = frozenset({"model", "transformer", "lm_head", "shared", "embed_out", "backbone"})
# First parts in transformers' own models; any other before most names may be a wrapper's.
COMMON = TOPS | {"encoder", "decoder", "language_model", "embeddings", "layers", "h", "gpt_neox"}
MOST_PREFIX = 3  # parts of a prefix: enough for a Lightning module within a trainer's own

Rename = Callable[[str], str]


def strip_wrappers(source: Source) -> Source:
    """Give tensors their names without wrappers, and note which prefixes were stripped.

    Args:
        source: any checkpoint; the architecture of its config decides on prefixes that may be the
            model's own.
    Raises:
        CheckpointError: two names become one, there are two models side by side, or the tensors
            are FSDP's flat shards.
    """
    names = [tensor.name for tensor in source.tensors]
    flat = next((name for name in names if FLAT.search(name)), None)
    if flat is not None:
        raise CheckpointError(
            f"tensor `{flat}` of `{source.path}` is a flat shard of FSDP, not a parameter",
            hint="save a full state dict: `fsdp.state_dict_type: FULL_STATE_DICT`, or "
            "`accelerate merge-weights FOLDER OUT`",
        )
    steps: list[Rename] = []
    notes: list[str] = []
    left = names
    for prefix, step in _sure_prefixes(names):
        found = [step(name) for name in left]
        count = sum(new != old for new, old in zip(found, left, strict=True))
        if count:
            notes.append(f"`{prefix}` of a wrapper is stripped from {count} of {len(left)} names")
            steps.append(step)
            left = found
    step, said = _strip_by_architecture(left, source.config)
    steps.append(step)

    def rename(name: str) -> str:
        for step in steps:
            name = step(name)
        return name

    renamed = {name: rename(name) for name in names}
    _check_distinct(renamed, source)
    return replace(
        source,
        tensors=tuple(replace(tensor, name=renamed[tensor.name]) for tensor in source.tensors),
        aliases={rename(copy): renamed[kept] for copy, kept in source.aliases.items()},
        notes=(*source.notes, *notes, *said),
    )


def _check_distinct(renamed: Mapping[str, str], source: Source) -> None:
    seen: dict[str, str] = {}
    for old, new in renamed.items():
        if (other := seen.setdefault(new, old)) != old:
            raise CheckpointError(
                f"tensors `{other}` and `{old}` of `{source.path}` are both `{new}` without the "
                "prefixes of wrappers",
                hint="save one of the two: the state_dict() of the model that is wrapped",
            )


def _sure_prefixes(names: list[str]) -> Iterator[tuple[str, Rename]]:
    """List prefixes that no architecture has, each with a function that strips it."""
    for part in INSIDE:
        # Two may follow one another, so that the dot before a part stays for the next.
        yield f"{part}.", partial(re.compile(rf"(?:(?<=\.)|^){part}\.").sub, "")
    yield f"{LEADING}.", partial(re.compile(rf"^({LEADING}\.)+").sub, "")
    if not any("lora_" in name for name in names):
        yield PEFT, partial(re.compile(rf"^{re.escape(PEFT)}").sub, "")


def _strip_by_architecture(
    names: list[str], config: Mapping[str, object] | None
) -> tuple[Rename, list[str]]:
    """Strip a prefix that may be the model's own only where the architecture lacks it."""
    inner = [name for name in names if ".module." in name]
    prefix = _leading_prefix(names, config)
    if not inner and not prefix:
        return _same, []
    known = parameter_names(config, tensors=len(names))
    if known is None:
        return _same, list(_note_kept(names, inner, prefix))
    candidates = [partial(re.compile(r"\.module\.").sub, ".")] if inner else []
    ends = (place + 1 for place, letter in enumerate(prefix) if letter == ".")
    candidates += [partial(re.compile(f"^{re.escape(prefix[:n])}").sub, "") for n in ends]
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
    strange = f"no name is one of the architecture's: `{names[0]}` and others are kept"
    return _same, [] if known.intersection(names) else [strange]


def _refuse_second_model(names: list[str], step: Rename) -> None:
    """Refuse two sets of weights side by side, as of a model and its average: the user chooses."""
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
    """Yield a name without its first part, then without its first two, and so on."""
    for _ in range(MOST_PREFIX):
        _, dot, name = name.partition(".")
        if dot:
            yield name


def _same(name: str) -> str:
    return name


def _leading_prefix(names: list[str], config: Mapping[str, object] | None) -> str:
    """Find the prefix of most names, if it may be a wrapper's; empty if models usually have it."""
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
        parts = parts[: inner_tops[-1] + 1]
    elif parts and parts[0] in COMMON | tops:
        parts = []
    return "".join(f"{part}." for part in parts)


def _note_kept(names: list[str], inner: list[str], prefix: str) -> Iterator[str]:
    """Note prefixes that look like a wrapper's and are kept, since no architecture is known."""
    if inner:
        yield f"`.module.` in `{inner[0]}` and others may be a wrapper's, and is kept"
    tops = [part for part in prefix.split(".")[1:] if part in TOPS]
    if tops and all(name.startswith(prefix.partition(".")[0] + ".") for name in names):
        yield (
            f"names begin with `{prefix}`, which may be a wrapper's, and is kept: no config.json "
            "names an architecture that transformers knows"
        )
