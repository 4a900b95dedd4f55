"""One peer's whole command on a checkpoint folder: read, round every Linear to 4 bits, save.

    PEERS/bin/python tests/peers_speed.py PEER MODEL OUT

Needs the packages of tests/peers.txt and nothing of `ortho`; `tests/bench_speed.py --peers` runs
it. No peer here looks at data, and each keeps embeddings and head as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUP = 128
WORKERS = 2


def load(model: Path) -> Any:
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return loaded


def torchao(model: Path, out: Path) -> None:
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    loaded = load(model)
    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    quantize_(loaded, config, filter_fn=lambda _, name: name.endswith("_proj"))
    torch.save(loaded.state_dict(), out / "model.pt")


def hqq(model: Path, out: Path) -> None:
    """Round with its optimisation left out, which takes most of its time."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    loaded = load(model)
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    config["weight_quant_params"]["optimize"] = False
    kept = dict(loaded.state_dict())
    for name, module in list(loaded.named_modules()):
        if name.endswith("_proj"):
            made = HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu")
            kept[f"{name}.weight"] = made.state_dict()
    torch.save(kept, out / "model.pt")


def llmcompressor(model: Path, out: Path) -> None:
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=str(model),
        save_directory=str(out),
        scheme="W4A16",
        ignore=["lm_head", "re:.*embed_tokens", "re:.*norm"],
        max_workers=WORKERS,
        device="cpu",
    )


def autoround(model: Path, out: Path) -> None:
    from auto_round import AutoRound

    rounder = AutoRound(model=str(model), scheme="W4A16", model_free=True, device_map="cpu")
    rounder.quantize_and_save(str(out), format="auto_round")


def quanto(model: Path, out: Path) -> None:
    import torch
    from optimum.quanto import freeze, qint4, quantize

    loaded = load(model)
    quantize(loaded, weights=qint4, include="*_proj")
    freeze(loaded)
    torch.save(loaded.state_dict(), out / "model.pt")


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "torchao": torchao,
    "hqq": hqq,
    "llmcompressor": llmcompressor,
    "autoround": autoround,
    "quanto": quanto,
}


if __name__ == "__main__":
    peer, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    target.mkdir(parents=True, exist_ok=True)
    PEERS[peer](source, target)
