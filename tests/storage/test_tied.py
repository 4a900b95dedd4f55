"""Which output head is the embedding, by config.json or by the model type."""

from __future__ import annotations

from typing import Any

import pytest

from ortho_cli.storage.tied import tied_head


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, "lm_head"),
        ({"model_type": "llama"}, None),
        ({"model_type": "gemma2"}, "lm_head"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, None),
        ({"model_type": "whisper"}, "proj_out"),
        ({"model_type": "albert"}, "predictions.decoder"),
        ({"model_type": "bert", "tie_word_embeddings": True}, "cls.predictions.decoder"),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, "lm_head"),
        ({"model_type": "x", "text_config": {"model_type": "gemma3_text"}}, "lm_head"),
        ({"text_config": "broken", "tie_word_embeddings": "yes"}, None),
    ],
)
def test_tied_head_is_named_by_the_setting_or_the_default_of_the_type(
    config: dict[str, Any], head: str | None
) -> None:
    assert tied_head(config) == head
