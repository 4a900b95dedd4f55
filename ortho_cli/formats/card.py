"""README.md of an artifact: a model card for people, with the front matter that the Hub reads.

It is published with base. So it holds what report.json holds, too, and nothing else: no path, no
name of a file that was given, no time, no secret and no position. The front matter of the source's
own card (license, language, tags) is taken over by an allow-list; the card itself is beside this
one as SOURCE_README.md. Names from checkpoints reach the page only where they are plain words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ortho_cli.formats.report import Totals
from ortho_cli.version import __version__

CARD_FILE = "README.md"
PRIVATE = "ortho*"  # glob of the files of an artifact that must not be published: ortho, its key

# Keys of the source's front matter that hold for base, too; values are a text or a list of texts.
INHERITED = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "base_model",
    "tags",
)  # fmt: skip
NEARLY_EXACT = 90.0  # decibels; float32 sums of so small an error have few digits
FRONT_BYTES = 1 << 16  # of a front matter: the longest on the Hub, with evaluations, have 30 kB
LONGEST, MOST = 300, 200  # characters of a value and values of a list: languages of NLLB are 200

# Architectures whose own code fails on any packed checkpoint in transformers 5.23, and those whose
# Linears are transposed (Conv1D), which only Engine splits.
_UNREAD = ("T5", "UMT5", "MT5", "Mamba", "Rwkv", "Falcon", "ModernBert", "Siglip")
_TRANSPOSED = ("GPT2", "OpenAIGPT")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,100}", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# What YAML 1.1 and 1.2 read as the same text without quotes.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[a-z][a-z_./-]*[a-z0-9_./-]*")

Words = str | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a card tells of an artifact."""

    version: str = __version__
    plan_sha256: str
    source_digest: str
    recipe: Mapping[str, object]
    totals: Totals
    bits: Sequence[int]  # of a code, each number once
    group_sizes: Sequence[int]
    measured: bool  # whether the signal-to-noise was; then None is no noise
    ortho: str | None  # the file that holds ortho; None for a base alone
    key: str | None = None  # the file that holds the key to a sealed ortho
    config: Mapping[str, object] | None  # config.json; None where there is none
    source_card: bytes | None = None  # SOURCE_README.md
    repository: str | None = None  # org/name of the source on the Hub, where it is known
    needs_stacks: bool = False  # experts are split one by one, and transformers loads stacks alone


def make_card(facts: Facts) -> bytes:
    """Write the card; the same facts give the same bytes."""
    front, readable = read_front_matter(facts.source_card or b"")
    parts = [
        _front_matter(facts, front),
        _about(facts),
        _measured(facts),
        _loading(facts),
        _publishing(facts),
        _recipe(facts),
        *([_source(readable=readable)] if facts.source_card is not None else []),
    ]
    return ("\n\n".join("\n".join(part) for part in parts) + "\n").encode()


def read_front_matter(card: bytes) -> tuple[dict[str, Words], bool]:
    """Read the keys of a card's YAML front matter that a derived model inherits.

    Args:
        card: README.md of a stranger.
    Returns:
        The values, each printable text or a list of it, and whether there was nothing that could
        not be read; the Hub spells languages as texts, so `no` is Norwegian.
    """
    text = card[:FRONT_BYTES].decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    found = re.match(r"---\n(.*?\n)??---[ \t]*(?:\n|$)", text, re.DOTALL)
    if found is None:
        return {}, not text.startswith("---\n")
    import yaml

    try:
        # Every scalar stays the text that it is, and no tag is obeyed.
        data = yaml.BaseLoader(found[1] or "").get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}, False
    if not isinstance(data, dict):
        return {}, not data
    values = {key: words for key in INHERITED if (words := _words(data.get(key)))}
    return values, True


def _words(value: object) -> Words:
    """Take a text, or the texts of a list; nothing of anything else."""
    if isinstance(value, list):
        return [word for word in value[:MOST] if isinstance(word, str) and _words(word)]
    is_word = isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
    return str(value).strip() if is_word else ""


def _front_matter(facts: Facts, inherited: Mapping[str, Words]) -> Iterator[str]:
    fields: dict[str, Words] = dict(inherited)
    tags = fields.pop("tags", [])
    if facts.repository and _REPOSITORY.fullmatch(facts.repository):
        fields |= {"base_model": facts.repository, "base_model_relation": "quantized"}
    if facts.config is not None:
        fields["library_name"] = "transformers"
    widths = [f"int{bits}" for bits in facts.bits]
    ours = ["ortho", "compressed-tensors", *widths] if facts.config is not None else ["ortho"]
    fields["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours]))
    yield "---"
    for key, words in fields.items():
        if isinstance(words, str):
            yield f"{key}: {_yaml(words)}"
        else:
            yield f"{key}:"
            yield from (f"- {_yaml(word)}" for word in words)
    yield "---"


def _yaml(word: str) -> str:
    return word if _PLAIN.fullmatch(word) else json.dumps(word, ensure_ascii=False)


def _about(facts: Facts) -> Iterator[str]:
    totals, widths = facts.totals, " and ".join(f"INT{bits}" for bits in facts.bits)
    architecture = _architecture(facts.config)
    yield f"# {widths} base of {f'a {architecture}' if architecture else 'a model'}"
    yield ""
    yield (
        f"`model.safetensors` holds one part of a model that `ortho` {facts.version} split in two: "
        "**base**, which has every split weight as a code with a scale for each group. The other "
        "part, **ortho**, is sparse and holds what base lacks:"
    )
    yield ""
    yield "    W(alpha) = base + alpha * ortho"
    yield ""
    yield "alpha = 0 is base alone, alpha = 1 is both files together."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| source | BLAKE3 of all its tensors: `{facts.source_digest}` |"
    yield f"| plan | SHA-256: `{facts.plan_sha256}` |"
    yield (
        f"| split | {totals.split_tensors} of {totals.tensors} tensors, "
        f"{totals.split_weights:,} of {totals.weights:,} weights; base holds the others unchanged |"
    )
    sizes = " and ".join(map(str, facts.group_sizes))
    yield f"| codes | {', '.join((f'{widths}, groups of {sizes}', *_chosen(facts.recipe)))} |"
    if facts.ortho is not None:
        share = totals.nnz / max(1, totals.split_weights or 0)
        told = f"{int(totals.nnz):,} weights ({share:.2%} of those that are split)"
        whole = ", whole input columns: a LoRA" if _keeps_columns(facts.recipe) else ""
        yield f"| ortho | {told}{whole} |"


def _keeps_columns(recipe: Mapping[str, object]) -> bool:
    ortho = recipe.get("ortho")
    return isinstance(ortho, dict) and ortho.get("structure") == "columns"


def _chosen(recipe: Mapping[str, object]) -> Iterator[str]:
    """Say how codes and scales were chosen, as far as the recipe does."""
    base = recipe.get("base")
    for key in ("scale", "rounding"):
        word = base.get(key) if isinstance(base, dict) else None
        if isinstance(word, str) and _IDENTIFIER.fullmatch(word):
            yield f"{key} {word}"


def _measured(facts: Facts) -> Iterator[str]:
    totals, whole = facts.totals, facts.ortho is not None
    rows: list[tuple[str, str, str]] = []
    if totals.base_bytes is not None and totals.weights:
        both = totals.base_bytes + (totals.ortho_bytes or 0)
        rows.append(("bytes", f"{totals.base_bytes:,}", f"{both:,}"))
        alone = f"{8 * totals.base_bytes / totals.weights:.2f}"
        rows.append(("bits per weight of the whole model", alone, f"{totals.bits_per_weight:.2f}"))
    rows.append(
        (
            "bits per split weight",
            f"{totals.split_bits_per_weight_base:.2f}",
            f"{totals.split_bits_per_weight:.2f}",
        )
    )
    if facts.measured:
        at_0, at_1 = map(_decibels, (totals.sqnr_db_alpha_0, totals.sqnr_db_alpha_1))
        rows.append(("signal-to-noise of split weights (SQNR), dB", at_0, at_1))
    yield "## Figures"
    yield ""
    yield "| measured | base alone |" + (" both files |" if whole else "")
    yield "|---|---|" + ("---|" if whole else "")
    for label, alone, with_ortho in rows:
        yield f"| {label} | {alone} |" + (f" {with_ortho} |" if whole else "")
    yield ""
    yield from _forgetting(facts)
    yield (
        "Not measured when the model was split: perplexity, distance from the source, speed. "
        "`ortho bench OUT --alpha 0 1 --data FILE` measures them; "
        '`--prompt "..."` shows what both say.'
    )


def _decibels(value: float | None) -> str:
    if value is None:
        return "exact"
    # The last digits of so small an error depend on the kernel, and the card's bytes must not.
    return f"{value:.1f}" if value < NEARLY_EXACT else f"above {NEARLY_EXACT:.0f}"


def _forgetting(facts: Facts) -> Iterator[str]:
    totals, ortho = facts.totals, facts.recipe.get("ortho")
    split = ortho.get("split") if isinstance(ortho, dict) else None
    if split == "reference":
        yield "Base is the INT4 of a reference: the model before it saw what base must not know."
        if totals.delta_kept is not None:
            yield f"ortho holds {totals.delta_kept:.1%} of the difference between both."
    elif totals.moved:
        share = totals.moved / max(1, totals.split_weights or 0)
        yield f"{totals.moved:,} codes ({share:.4%}) were moved so that base forgets."
    else:
        return
    yield (
        "Whether base has forgotten was not measured when the model was split: "
        "`ortho bench OUT --alpha 0 1 --forget FILE` does. No such measurement is a proof of "
        "privacy, and weights that are not split (embeddings, norms) keep what they held."
    )
    yield ""


def _architecture(config: Mapping[str, object] | None) -> str | None:
    """Name the class in transformers; None where config.json gives no plain word."""
    listed = (config or {}).get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else None
    return first if isinstance(first, str) and _IDENTIFIER.fullmatch(first) else None


def _loading(facts: Facts) -> Iterator[str]:
    name, config = _architecture(facts.config), facts.config
    yield "## Loading"
    yield ""
    if config is None:
        alpha = 0 if facts.ortho is None else 1
        yield (
            "There is no config.json, so neither transformers nor vLLM can build the model. Build "
            f"it in torch; `ortho_cli.Engine(module).load(OUT, alpha={alpha})` fills it."
        )
        return
    causal = name is not None and name.endswith(("ForCausalLM", "LMHeadModel"))
    trust = ", trust_remote_code=True" if "auto_map" in config else ""  # code in the folder itself
    if facts.needs_stacks:
        yield (
            "transformers looks for the experts of this architecture in stacks, and would leave "
            "them random. `ortho_cli.load` loads base, and `ortho convert OUT --alpha 0` makes a "
            "plain checkpoint of it. vLLM looks for each expert, as here: `vllm serve OUT`."
        )
    elif name is None or name.startswith((*_UNREAD, *_TRANSPOSED)):
        yield "transformers 5.23 loads no packed weights of this architecture by itself."
        if name is not None and name.startswith(_UNREAD):
            yield "`ortho convert OUT --alpha 0` makes a plain checkpoint of base."
    else:
        yield from _alone(
            "AutoModelForCausalLM" if causal else "AutoModel" if trust else name, trust
        )
        if set(facts.bits) != {4}:
            yield "vLLM's kernels take codes of 4 and 8 bits, and these have others."
        elif causal:
            yield "vLLM calls the format W4A16 and reads it by itself: `vllm serve OUT`."
    if facts.ortho is not None and causal:
        identity = ", identity=FILE" if facts.ortho.endswith(".age") else ""
        yield ""
        yield f"With `{facts.ortho}` beside base, and `pip install 'ortho-cli[hf]'`, at any alpha:"
        yield ""
        yield "```python"
        yield "import ortho_cli"
        yield ""
        yield f'model = ortho_cli.load("OUT", alpha=1.0{identity}{trust})'
        yield "```"


def _alone(loader: str, trust: str) -> Iterator[str]:
    yield (
        "Base is a checkpoint of compressed-tensors (`pack-quantized`). With `pip install "
        "transformers compressed-tensors`, and ORG/NAME or this folder as OUT:"
    )
    yield ""
    yield "```python"
    yield f"from transformers import {loader}"
    yield ""
    yield f'model = {loader}.from_pretrained("OUT"{trust})  # alpha = 0'
    yield "```"
    yield ""


def _publishing(facts: Facts) -> Iterator[str]:
    files = [f"`{name}`" for name in (facts.ortho, facts.key) if name is not None]
    yield "## Publishing"
    yield ""
    if files:
        yield (
            f"Do not upload {' and '.join(files)}: with ortho, whoever has base has the whole "
            "model. This leaves out all that is private:"
        )
    else:
        yield "ortho, where it is put back beside base, must not be uploaded. This leaves it out:"
    yield ""
    yield f"    hf upload ORG/NAME OUT --exclude '{PRIVATE}'"


def _recipe(facts: Facts) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    yield "```json"
    yield json.dumps(facts.recipe, indent=1, sort_keys=True)  # in ASCII: no line of it ends a block
    yield "```"


def _source(*, readable: bool) -> Iterator[str]:
    yield "## Source"
    yield ""
    yield "[SOURCE_README.md](SOURCE_README.md) is the source's own card."
    if not readable:
        yield "Its front matter is no YAML that can be read, so this card has none of it."
