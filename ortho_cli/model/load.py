"""Load transformers models and tokenizers from a folder, and find their Linears by tensor name."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from ortho_cli.errors import (
    CalibrationError,
    CheckpointError,
    OrthoError,
    RecipeError,
    UsageError,
    way_out,
)
from ortho_cli.formats.artifact import module_of
from ortho_cli.model.experts import separate
from ortho_cli.model.linears import is_plain_linear
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage import folders, hints, hub, sniff, strict_json
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.untrusted import is_trusted


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """Import transformers, and switch its log and progress bars off for the block."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "transformers is not installed", hint="pip install 'ortho-cli[hf]'"
        ) from None
    log: ModuleType = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# Keys of config.json that count modules which transformers builds one by one in Python, before it
# looks for weights. Other keys with these endings are indices, periods and switches. Experts that
# are fused in one tensor are not built one by one.
_PARTS = re.compile(r"(layers?|blocks?|experts|depths?)$")
_NO_PARTS = re.compile(r"^(max|min|accept|skip|use|share|scale)_|_(every_n|per|topk)_")
MOST_LAYERS = 1024  # eight times as many as any model has that is known to transformers
MOST_PARTS = 4096  # experts of a layer
MOST_BUILT = 1 << 17  # experts of all layers; minutes of Python
AMPERE = (8, 0)  # the first compute capability whose tensor cores take bfloat16
# Instructions for products of bfloat16, as `torch.cpu.get_capabilities` names them: x86, Arm.
BFLOAT16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@contextlib.contextmanager
def explained(
    folder: Path,
    what: str,
    *,
    hint: str,
    kind: type[OrthoError] = CheckpointError,
    files: Iterable[str] = (),
) -> Iterator[None]:
    """Turn every exception of transformers on a folder into an error of one sentence.

    Args:
        folder: the folder that it reads.
        what: the sentence; the first line of the exception is added to it.
        hint: what to do.
        kind: class of the error.
        files: names of files that it reads there; any may be none of the model's: a Git LFS
            pointer, a web page, an error message.
    """
    try:
        yield
    except Exception as error:
        if not is_trusted() and "trust_remote_code" in str(error):
            raise kind(
                f"`{folder}` needs Python code of its own, which is not run without being asked to",
                hint="read its .py files; --trust-remote-code runs them, with all of your rights",
            ) from error
        for path in (folder / name for name in files):
            found = sniff.kind_of_file(path) if path.is_file() else None
            if found is not None and sniff.is_stand_in(found):
                hint = sniff.remedy(found, path)
                raise CheckpointError(f"`{path}` is {found}", hint=hint) from None
        if "too many open files" in str(error).lower():
            hint = way_out(OSError(errno.EMFILE, ""), hint)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise kind(f"{what}: {first}", hint=hint) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no transformers model, or would keep transformers busy for ever.

    Raises:
        CheckpointError: a file, a folder without config.json, or one with a FIFO or device in it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(
                f"`{path}` is not a regular file", hint="remove it from the model's folder"
            )
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise CheckpointError(
            f"`{folder}` {'is a file' if folder.is_file() else what}, so it is no transformers "
            "model",
            hint=_hint_without_config(folder),
        )


def _hint_without_config(path: Path) -> str:
    """Say how to get a transformers folder: some formats can be converted to one."""
    usual = "give the model's folder, with its config and tokenizer"
    if not path.exists():
        return hub.advice(path) or usual
    held = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    foreign = [p for p in held if sniff.kind_of_file(p) in (sniff.GGUF, *sniff.TORCHES)]
    if foreign and not folders.is_part(foreign[0]):
        return hints.convert(foreign[0])
    return usual


def check_claims(folder: Path) -> None:
    """Refuse a config.json of more layers than there are tensors: transformers builds them first.

    Raises:
        CheckpointError: names the key; or the weights are damaged.
    """
    config = strict_json.read(folder / "config.json", constants=True)
    here = any(folder.glob("*.safetensors"))
    tensors = open_checkpoint(folder).tensors if here else ()
    sizes = {size for tensor in tensors for size in tensor.shape}
    check_parts(config, layers=len(tensors), told=folder / "config.json", sizes=sizes)


def check_parts(
    config: Mapping[str, object], *, layers: int, told: Path, sizes: Collection[int] = ()
) -> None:
    """Refuse a config of more layers or experts than any model can have.

    Args:
        config: config.json, or the same keys from another file.
        layers: tensors of the checkpoint; there can be a layer for each.
        told: the file, for the error.
        sizes: of the tensors' dimensions; experts that are fused in one are not built.
    Raises:
        CheckpointError: names the key.
    """
    for part in _levels(config):
        most = {"layers": 1, "experts": 1}
        for key, value in part.items():
            kind = _kind_of_part(key)
            listed = value if isinstance(value, list) else [value]
            numbers = [n for n in listed if isinstance(n, int | float) and not isinstance(n, bool)]
            count = max(numbers, default=0)
            if kind is None or (kind == "experts" and count in sizes):
                continue
            bound = MOST_PARTS if kind == "experts" else max(layers, MOST_LAYERS)
            if not count <= bound:
                raise _too_many(told, f"`{key}` is {count!s:.24}", bound)
            most[kind] = max(most[kind], int(count))
        built = most["layers"] * most["experts"]
        if built > max(MOST_BUILT, layers):
            what = f"there are {most['layers']} layers of {most['experts']} experts each"
            raise _too_many(told, what, max(MOST_BUILT, layers))


def _levels(config: Mapping[str, object], depth: int = 0) -> Iterator[Mapping[str, object]]:
    """Yield a config and the configs inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and depth < 8:
            yield from _levels(value, depth + 1)


def _kind_of_part(key: str) -> str | None:
    named = None if _NO_PARTS.search(key) else _PARTS.search(key)
    return None if named is None else "experts" if named[0] == "experts" else "layers"


def _too_many(source: Path, what: str, most: int) -> CheckpointError:
    return CheckpointError(
        f"`{source}` says {what}, and there can be {most} at most",
        hint="restore the file that came with the model",
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a model's tokenizer.

    Raises:
        CheckpointError: the folder has none, or transformers cannot read it.
    """
    check_folder(folder)
    what = f"`{folder}` has no tokenizer that transformers can read"
    hint = "copy tokenizer.json and tokenizer_config.json from the original model"
    with (
        quiet_transformers() as transformers,
        explained(folder, what, hint=hint, files=TOKENIZER_FILES),
    ):
        found: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=is_trusted()
        )
        found("a", verbose=False)  # some settings are read only here
    # Of some models transformers makes a tokenizer without words where the folder has none.
    if len(found) <= len(set(found.all_special_ids)):
        raise CheckpointError(what, hint=hint)
    return found


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Load a causal language model for measuring: in eval mode, no parameter needs a gradient.

    Args:
        folder: a transformers folder.
        dtype: of the weights; None keeps the checkpoint's.
        device: where it goes.
    Raises:
        CheckpointError: no config.json, or a tensor that the model needs is missing.
    """
    check_folder(folder)
    check_claims(folder)
    what = f"transformers cannot load `{folder}`"
    hint = "it must be a causal language model that transformers knows"
    with quiet_transformers() as transformers, explained(folder, what, hint=hint):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=is_trusted(),
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"tensor `{missing[0]}` is not in `{folder}`, and the model needs it"
            + (f"; nor are {len(missing) - 1} others" if len(missing) > 1 else ""),
            hint="transformers would make it up at random; restore the checkpoint",
        )
    loaded: nn.Module = model.to(device).train(False).requires_grad_(False)
    return loaded


def find_linears(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Find the Linear that each weight of the checkpoint became.

    Args:
        model: as transformers built it; experts that it fused are taken apart, for good.
        names: tensors `<p>.weight`.
    Raises:
        CalibrationError: a weight is no Linear of the model: fused, renamed or unused.
    """
    names = list(names)
    found: dict[str, nn.Module] = {}
    experts = separate(model, names)
    modules = dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", ""))
    for name in names:
        if name in experts:
            found[name] = experts[name]
            continue
        module = module_of(name)
        candidates = (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}."))
        here = next((modules[c] for c in candidates if c in modules), None)
        if here is None or not is_plain_linear(here):
            became = "no module" if here is None else f"a {type(here).__name__}"
            raise CalibrationError(
                f"tensor `{name}` is {became} in the model that transformers builds, not a Linear",
                hint="add it to `ignore`: its curvature cannot be measured this way",
            )
        found[name] = here
    return found


def check_fits(
    model: nn.Module, *, length: int, largest_token: int, asked: str = "calibrate.length"
) -> None:
    """Refuse sequences that the model cannot read.

    Raises:
        RecipeError: longer than the model's positions.
        CalibrationError: a token that the model has no embedding for.
    """
    positions = _positions(model.config)
    if positions is not None and length > positions:
        raise RecipeError(
            f"{asked} is {length} and the model has {positions} positions",
            hint=f"--set {asked}={positions}" if "." in asked else "shorten it",
        )
    known = input_embedding(model).shape[0]
    if largest_token >= known:
        raise CalibrationError(
            f"the tokenizer gives token {largest_token} and the model knows {known}",
            hint="the tokenizer belongs to another model",
        )


def positions_of(folder: Path) -> int | None:
    """Give the most tokens that a folder's model reads at once; None where its config has no bound.

    Raises:
        CheckpointError: no config.json, or one that transformers does not know.
    """
    check_folder(folder)
    check_claims(folder)
    what = f"transformers cannot read the config of `{folder}`"
    hint = "it must be a causal language model that transformers knows"
    with quiet_transformers() as transformers, explained(folder, what, hint=hint):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=is_trusted()
        )
    return _positions(config)


def _positions(config: object) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def embedding_of(model: nn.Module) -> nn.Module:
    """Give the module that embeds the tokens of a transformers model."""
    find: Callable[[], nn.Module] = getattr(model, "get_input_embeddings")  # noqa: B009 - untyped
    return find()


def input_embedding(model: nn.Module) -> Tensor:
    """Give the weight of a transformers model's input embedding, (vocabulary, hidden)."""
    return embedding_of(model).get_parameter("weight")


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is there.

    Raises:
        UsageError: unknown, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
            return device
    raise UsageError(
        f"--device {name} is not there; torch sees {count} CUDA devices",
        hint="auto, cpu, cuda or cuda:N",
    )


def uses_bfloat16(autocast: bool | Literal["auto"], device: torch.device) -> bool:
    """Decide whether to compute in bfloat16; `auto` does where the device has instructions for it.

    Without them it is slow: on an x86 CPU with AVX2 alone a product of two matrices took 8 times as
    long as in float32.
    """
    if autocast != "auto":
        return autocast
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BFLOAT16_OF_CPUS)
