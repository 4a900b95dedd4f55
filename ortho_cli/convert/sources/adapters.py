"""Refuses adapters (LoRA, IA3 and their kin, as peft and others save them) in place of models.

An adapter holds changes to a model that is somewhere else. Split as if it were the model, it gives
an artifact that nothing can load. Headers and JSON only; standard library only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ortho_cli.errors import CheckpointError
from ortho_cli.formats.card import CARD_FILE
from ortho_cli.storage import hints, strict_json
from ortho_cli.storage.untrusted import read_regular

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
MODEL_NAMES = ("model", "pytorch_model", "consolidated")
OURS = "# An adapter made by ortho: private"  # in the card of `ortho convert --to lora`
PREFIX = "base_model.model."  # peft's, before every name of the model that it wraps
# Parts of a dotted name that only an adapter has: LoRA and its kin, IA3, LoHa, LoKr, OFT, prompts.
PARTS = frozenset({
    "lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up", "lora_embedding_A",
    "lora_embedding_B", "lora_magnitude_vector", "ia3_l", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a", "oft_R", "oft_r", "boft_R",
    "boft_s", "vera_lambda_b", "vera_lambda_d", "prompt_embeddings", "base_layer",
})  # fmt: skip
# peft's class for each kind of task that adapter_config.json may name.
CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
OWN_ADAPTERS = ("vision_lora", "speech_lora")  # keys of config.json
UNMERGED = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"})


def is_ours(folder: Path) -> bool:
    """Tell by its card whether `ortho convert` wrote a folder as an adapter, sealed or not."""
    card = folder / CARD_FILE
    return card.is_file() and OURS.encode() in read_regular(card)


def refuse_adapter(path: Path) -> None:
    """Refuse a folder or file that is an adapter, or a model with an adapter on top of it.

    Raises:
        CheckpointError: names the file that shows it, and says how to merge.
    """
    folder = path if path.is_dir() else path.parent
    weights = [name for name in WEIGHTS if (folder / name).is_file()]
    if path.is_dir() and (folder / CONFIG).is_file():
        models = [file for file in folder.iterdir() if file.name.startswith(MODEL_NAMES)]
        whole = any(file.suffix in (".safetensors", ".bin") for file in models)
        raise _refusal(path, _read(folder / CONFIG), whole=whole)
    if path.is_dir() and weights and not (folder / "config.json").is_file():
        raise _refusal(path, {}, by=weights[0])
    if path.is_file() and path.name in WEIGHTS:
        config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        raise _refusal(folder if config else path, config, by=path.name)


def refuse_adapter_names(
    path: Path, names: Collection[str], config: Mapping[str, object] | None, *, strips: bool
) -> None:
    """Refuse tensors that are named as an adapter's, alone or among those of a model.

    Args:
        path: of the checkpoint.
        names: of all tensors.
        config: config.json; some models were published with adapters among their weights.
        strips: the caller strips peft's prefix, which every name of a merged model has.
    Raises:
        CheckpointError: names the first such tensor.
    """
    wrapped = [name for name in names if name.startswith(PREFIX)]
    merged = len(wrapped) == len(names)
    said = config or {}
    # Phi-4-multimodal as it was first published: its code contains peft's wrappers.
    own = said.get("model_type") == "phi4mm" or any(said.get(key) for key in OWN_ADAPTERS)
    own = own and any("base_layer" in name.split(".") for name in names)
    for name in names:
        parts = not PARTS.isdisjoint(name.split("."))
        if parts and own:
            raise CheckpointError(
                f"tensor `{name}` of `{path}` is an adapter's: the model was published with "
                "adapters of its own among its weights",
                hint="start from the revision of the model that was converted to transformers' "
                "own format, which keeps the adapters in folders apart",
            )
        if parts or (name.startswith(PREFIX) and not merged):
            raise CheckpointError(
                f"tensor `{name}` of `{path}` is an adapter's, not a weight that a model has by "
                "itself",
                hint="merge it first: `model.merge_and_unload().save_pretrained(DIR)` with peft, "
                "where it was trained",
            )
    if wrapped and not strips:
        raise CheckpointError(
            f"every tensor of `{path}` begins with `{PREFIX}`, as peft saves a merged model, and "
            "no reader looks for such names",
            hint=hints.convert(path),
        )


def _read(path: Path) -> dict[str, object]:
    try:
        return strict_json.read(path, constants=True)
    except CheckpointError:  # a file of that name is an adapter's, readable or not
        return {}


def _refusal(
    path: Path, config: dict[str, object], *, whole: bool = False, by: str = CONFIG
) -> CheckpointError:
    kind = str(config.get("peft_type") or "an")
    base = config.get("base_model_name_or_path")
    of = f" of `{base}`" if base else ""
    named = kind if kind == "an" else f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"
    said = f"`{path}` is {named} adapter{of}, not a model (by `{by}`)"
    model = path.absolute() if str(path) in (".", "..") else path
    which = CLASSES.get(str(config.get("task_type")), "AutoPeftModelForCausalLM")
    code = (
        f"import sys; from peft import {which} as M; "
        "M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])"
    )
    hint = f"merge it first: {hints.python(code, model, Path(f'{model}-merged'))}"
    if whole:
        said = f"`{path}` holds a model and, in `{CONFIG}`, {named} adapter on top of it"
        hint += f"; or move `{CONFIG}` away, to have the model without it"
    if is_ours(path if path.is_dir() else path.parent):
        hint = "give the artifact that it was made from, which holds the whole model"
    if kind in UNMERGED:
        hint = "such an adapter cannot be merged; give the model that it belongs to"
    return CheckpointError(said, hint=hint)
