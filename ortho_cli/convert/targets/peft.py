"""`--to lora`: ortho as an adapter of PEFT, which vLLM and SGLang serve, too.

    adapter_config.json        ranks, and that alpha / rank is 1 in each weight
    adapter_model.safetensors  base_model.model.<p>.lora_A.weight (r, in), .lora_B.weight (out, r)
    README.md                  what it is, and that it is private

alpha is the server's dial: the scale of the adapter. PEFT reads `rank_pattern` and `alpha_pattern`;
vLLM and SGLang know one rank and one alpha, whose quotient is 1, too. vLLM takes weights of any
rank up to that one; SGLang wants it of all, which `pad` gives them by rows of zeros.
Source: peft's LoraConfig; vllm/lora/peft_helper.py; sglang's lora/mem_pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ortho_cli.convert.plan import parse_dtype
from ortho_cli.convert.sources import adapters
from ortho_cli.convert.sources.architectures import parameter_names
from ortho_cli.convert.targets.factors import Module, Ortho
from ortho_cli.convert.targets.job import Error, Figures, Part, Put, TargetPlan
from ortho_cli.formats.artifact import pretty_json
from ortho_cli.formats.card import CARD_FILE
from ortho_cli.split.dtypes import BY_CONFIG
from ortho_cli.storage import checkpoint
from ortho_cli.storage.data_file import TensorSpec, plan_layout
from ortho_cli.storage.job import Kind
from ortho_cli.storage.sealing import IDENTITY_FILE, SEALED, Seal
from ortho_cli.version import __version__

MODEL_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
ROLE = "adapter"
# What vLLM takes as --max-lora-rank.
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def is_adapter(folder: Path) -> bool:
    """Tell whether `ortho convert` wrote a folder as an adapter."""
    known = {MODEL_FILE, MODEL_FILE + SEALED, CONFIG_FILE, CARD_FILE, IDENTITY_FILE}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - known:
        return False
    metadata = checkpoint.metadata_of(folder / MODEL_FILE) or {}
    return metadata.get("ortho_role") == ROLE or adapters.is_ours(folder)


KIND = Kind(name="adapter", is_ours=is_adapter)


def plan_lora(
    ortho: Ortho, *, dtype: str | None = None, pad: bool = False, seal: Seal | None = None
) -> TargetPlan:
    """Decide how ortho becomes an adapter of PEFT.

    Args:
        ortho: open; the plan takes it over.
        dtype: bfloat16, float16 or float32, of both factors; None: the model's own.
        pad: give each weight the largest rank, by rows of zeros.
        seal: recipients of the weights, if they are sealed.
    Raises:
        UsageError: another dtype.
        CheckpointError: the header would pass the format's limit.
    """
    kept, rank = parse_dtype(dtype), ortho.rank
    # SGLang stacks q, k and v, and misses one that is not there: padded, every split weight is.
    modules = [replace(one, rank=rank) for one in ortho.split] if pad else ortho.modules
    parts, specs = [], []
    for module in modules:
        kind = BY_CONFIG[kept] if kept else module.dtype
        a, b = (f"{adapters.PREFIX}{module.name}.lora_{letter}.weight" for letter in "AB")
        specs += [
            TensorSpec(key=a, dtype=kind, shape=(module.rank, module.shape[1])),
            TensorSpec(key=b, dtype=kind, shape=(module.shape[0], module.rank)),
        ]
        make = partial(_make, ortho, module, kind, (a, b))
        parts.append(Part(name=module.weight, keys=(a, b), make=make, facts=facts_of(module, kind)))
    metadata = {
        "format": "pt",
        "ortho_role": ROLE,
        "ortho_version": __version__,
        "plan_sha256": ortho.artifact.base.metadata.get("plan_sha256", ""),
    }
    name = checkpoint.model_name(ortho.artifact.folder)
    made = (
        (CONFIG_FILE, pretty_json(_config(modules, rank, name))),
        (CARD_FILE, "\n".join(_card(ortho, modules, rank, seal)).encode()),
    )
    return TargetPlan(
        form="lora",
        kind=KIND,
        source=ortho.source,
        file=MODEL_FILE,
        layout=plan_layout(specs, metadata),
        parts=tuple(parts),
        settings=settings_of(ortho, "lora", pad=pad),
        made_files=made,
        notes=tuple(notes_of(ortho, modules)),
        seal=seal,
    )


def settings_of(ortho: Ortho, to: str, **more: object) -> dict[str, object]:
    """Say what the values of an adapter depend on."""
    return {
        "to": to,
        "ortho": ortho.artifact.ortho.metadata.get("base_blake3") if ortho.artifact.ortho else None,
        "held": {module.name: module.held for module in ortho.modules},
        **more,
    }


def facts_of(module: Module, kind: str) -> dict[str, object]:
    """Say what is known of a weight's adapter before it is made."""
    return {
        "shape": list(module.shape),
        "type": kind,
        "rank": module.rank,
        "columns": module.held,
    }


def notes_of(ortho: Ortho, modules: Sequence[Module]) -> Iterator[str]:
    """Tell what becomes of the weights."""
    left = len(ortho.artifact.split) - len(modules)
    rank = ortho.rank
    served = next((size for size in SERVED if size >= rank), None)
    told = f"--max-lora-rank {served}" if served else f"more than the {SERVED[-1]} that vLLM takes"
    yield f"{len(modules)} weights get an adapter of rank {rank} at most (vLLM: {told})"
    if left:
        yield f"{left} split weights get none: ortho holds nothing of them"
    cut = [module for module in modules if module.held > module.rank]
    if cut:
        columns = sum(module.held - module.rank for module in cut)
        yield f"{columns} columns of {len(cut)} weights are left out by --max-rank"
    if ortho.is_scattered:
        yield "ortho is scattered: the adapter is the nearest of its rank, not ortho itself"
    known = parameter_names(ortho.source.config, tensors=len(ortho.artifact.base.tensors))
    strange = [] if known is None else [m.name for m in modules if m.weight not in known]
    if strange:
        yield (
            f"{len(strange)} weights are of modules that transformers' model does not have (first "
            f"`{strange[0]}`): PEFT passes over them"
        )
    yield "an adapter gives away what ortho does: keep it as private, and never upload it"


def _make(ortho: Ortho, module: Module, kind: str, keys: tuple[str, str], put: Put) -> Figures:
    error = Error()
    for key, factor in zip(keys, ortho.factors(module, kind, error), strict=True):
        put(key, factor)
    return error.figures()


def _config(modules: Sequence[Module], rank: int, name: str) -> dict[str, object]:
    """Write adapter_config.json; of paths only the name of base's folder."""
    others = {module.name: module.rank for module in modules if module.rank != rank}
    return {
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [module.name for module in modules],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _card(ortho: Ortho, modules: Sequence[Module], rank: int, seal: Seal | None) -> Iterator[str]:
    name = checkpoint.model_name(ortho.artifact.folder)
    yield from ("---", "library_name: peft", "tags:", "- ortho", "---", adapters.OURS, "")
    yield (
        f"This is the ortho stream of `{name}` as a LoRA adapter: {len(modules)} weights, rank "
        f"{rank} at most. Base with this adapter is the full model, base alone is alpha 0."
    )
    yield (
        "\nWhoever holds it holds what ortho holds. **Do not upload it**, whatever is published of "
        "base.\n"
    )
    if seal is not None:
        yield f"It is sealed: `age -d -i KEY {MODEL_FILE}{SEALED} > {MODEL_FILE}` opens it.\n"
    yield f"Made by ortho {__version__}.\n"
