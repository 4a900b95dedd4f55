"""Tied output heads, which are the embedding: by config.json, or by the model type."""

from __future__ import annotations

from collections.abc import Mapping

# Model types whose output head is the embedding unless config.json says otherwise, by the module
# of the head: transformers 5.23's own defaults, which save_pretrained leaves out of the file.
_TYPES = {
    "lm_head": "bart bigbird_pegasus blenderbot blenderbot-small bloom cohere cohere2 cohere2_moe "
    "cohere2_vision ctrl ernie4_5 ernie4_5_moe ernie4_5_vl_moe falcon falcon_mamba florence2 "
    "funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text got_ocr2 "
    "gpt-sw3 gpt2 gpt_bigcode gpt_neo granite_speech granite_swa internvl janus jetmoe led lfm2 "
    "lfm2_moe lfm2_vl longt5 m2m_100 mamba marian mbart minicpm3 mistral3 mpt mt5 mvp nllb-moe "
    "openai-gpt opt paddleocr_vl paligemma pegasus pegasus_x plbart prophetnet recurrent_gemma "
    "smollm3 speech_to_text starcoder2 switch_transformers t5 udop umt5 vaultgemma xglm youtu "
    "zamba zamba2",
    "predictions.decoder": "albert",
    "cls.predictions.decoder": "bert big_bird deberta deberta-v2 ernie fnet layoutlm lxmert "
    "megatron-bert mobilebert mra nystromformer roc_bert roformer squeezebert tapas visual_bert "
    "yoso",
    "lm_head.decoder": "bert-generation camembert data2vec-text ibert longformer mpnet roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    "lm_head.out_proj": "t5gemma t5gemma2",
    "proj_out": "moonshine whisper",
    "language_model.lm_head": "blip-2 instructblip instructblipvideo",
    "text_model.lm_head": "kosmos-2 kosmos-2.5",
    "output_projection": "biogpt trocr",
    "generator_lm_head": "convbert electra",
    "decoder": "modernbert modernbert-decoder",
    "pred_layer.proj": "flaubert xlm",
    "embed_out": "gpt_neox_japanese",
    "lm_loss": "xlnet",
    "vocab_projector": "distilbert",
}
HEADS = {kind: head for head, kinds in _TYPES.items() for kind in kinds.split()}


def tied_head(config: Mapping[str, object] | None) -> str | None:
    """Name the module of the output head where it is the embedding; None where it is not.

    Vision-language models nest the setting, and most files leave out what is the default of the
    model type.
    """
    config = config or {}
    nested = config.get("text_config")
    levels = [config, nested if isinstance(nested, dict) else {}]
    types = [str(level.get("model_type")) for level in levels]
    head = next((HEADS[kind] for kind in types if kind in HEADS), None)
    ties = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
    if any(setting is True for setting in ties):
        return head or "lm_head"
    return head if not ties else None
