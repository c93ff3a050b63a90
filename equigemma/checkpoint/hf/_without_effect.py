"""Keys of a `config.json` that change no number, and those of which one value changes none.

**Source:** transformers `configuration_utils.py`, of releases 4.38 to 5.24, and
`generation/configuration_utils.py` for the options of sampling that once stood beside them.
"""

from typing import Any


# Notes on how a model was made, limits it was trained for, how it is spread, trained and run.
_NOTES = """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
    _flash_attn_2_enabled _name_or_path architectures attn_implementation bos_token_id
    cache_implementation chunk_size_feed_forward decoder_start_token_id dtype eos_token_id
    experts_implementation finetuning_task gradient_checkpointing id2label initializer_factor
    initializer_range is_decoder label2id max_position_embeddings max_seq_len max_seq_length
    model_max_length model_type name_or_path num_labels output_attentions output_hidden_states
    output_router_logits pad_token_id prefix pretraining_tp problem_type return_dict
    router_aux_loss_coef sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_version
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_SAMPLING = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id guidance_scale length_penalty max_length max_new_tokens
    min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
"""
WITHOUT_EFFECT = frozenset((_NOTES + _SAMPLING).split())
WITHOUT_EFFECT_AROUND_GEMMA3 = WITHOUT_EFFECT | {"image_token_id", "image_token_index"}
# What models of images and sounds have to say, which is not read, and where they meet the text.
WITHOUT_EFFECT_AROUND_NEWER = WITHOUT_EFFECT_AROUND_GEMMA3 | frozenset(
    """
    boi_token_id boi_token_index eoi_token_id eoi_token_index mm_tokens_per_image vision_config
    audio_config audio_soft_tokens_per_image audio_token_id boa_token_id eoa_token_id
    eoa_token_index video_token_id vision_soft_tokens_per_image
    """.split()
)
WITHOUT_EFFECT_IN_VISION = WITHOUT_EFFECT | frozenset(
    ("is_encoder_decoder", "projection_dim", "vision_use_head")
)

FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "auto_map": ({}, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
}
"""Options of which these values alone are supported, written by some release or another."""
