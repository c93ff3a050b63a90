"""Kinds of models of the family that cannot be read, and the nearest thing that can."""

UNSUPPORTED = {
    "t5gemma": "T5Gemma is an encoder with a decoder, and the nearest decoder is Gemma 2; ",
    "t5gemma2": "T5Gemma 2 is an encoder with a decoder, and the nearest decoder is Gemma 3; ",
    "recurrent_gemma": "RecurrentGemma has recurrences in place of most attention, and the nearest "
    "model of attention alone is Gemma 2 2B; ",
    "diffusion_gemma": "DiffusionGemma denoises blocks of tokens, and the nearest model that "
    "predicts the next one is Gemma 4 26B-A4B; ",
    "gemma4_assistant": "a drafter is not supported yet, and the model that it drafts for is of "
    "the kind gemma4; ",
    "gemma4_unified_assistant": "a drafter is not supported yet, and the model that it drafts for "
    "is of the kind gemma4_unified; ",
    "embedding_gemma2": "EmbeddingGemma 2 is not supported yet, and the nearest embedder is "
    "EmbeddingGemma, of the kind gemma3_text; ",
    "paligemma": "PaliGemma is not supported yet, and the nearest model that sees is Gemma 3; ",
    "shieldgemma2": "ShieldGemma 2 is not supported yet, and the model that it is made of is "
    "Gemma 3 4B; ",
}
"""By `model_type`: a clause that ends with a semicolon."""
