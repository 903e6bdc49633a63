"""What the rules for tiny configurations cannot know, by model type. One row a model type."""

from __future__ import annotations

from typing import Any

_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_LAST_STAGE = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_THREE_STAGES = {"backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_SERIES = {
    "__init__": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 1}
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EFFICIENTNET = {
    "image_size": 64,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "num_block_repeats": [1] * 7,
}
_TINY_BERT = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=300,
    model_type="bert")  # fmt: skip
_TINY_VIT = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64,
    patch_size=16, model_type="vit")  # fmt: skip
_TINY_WAV2VEC2 = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    conv_dim=(32, 32), conv_stride=(5, 4), conv_kernel=(10, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
    model_type="wav2vec2")  # fmt: skip
_DECODER_BERT = {**_TINY_BERT, "is_decoder": True, "add_cross_attention": True}

_SAM_VISION = {
    "image_size": 64,
    "output_channels": 64,
    "window_size": 2,
    "num_pos_feats": 32,
    "global_attn_indexes": [1],
}
_SAM_PROMPT = {"image_size": 64, "image_embedding_size": 4}
_HIERA = {
    "hidden_size": 16,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 1, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 4],
    "global_attention_blocks": [2],
    "window_positional_embedding_background_size": [2, 2],
}
_DEPTH = {
    "reassemble_hidden_size": 64,
    "neck_hidden_sizes": [16, 16, 16, 16],
    "fusion_hidden_size": 16,
    "head_hidden_size": 16,
    "backbone_config": {
        "model_type": "dinov2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
    },
}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_SWIN = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 2, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 2,
    "hidden_size": 128,
}

#: Fields by ``model_type`` of the (sub-)configuration. ``__init__``: always passed to its constructor;
#: ``__lite__``: only in the attempts with default widths.
CONFIG: dict[str, dict[str, Any]] = {
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "fun_asr_nano_encoder": {"num_timestamp_prediction_layers": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "input_size": 64},
    "lilt": {"hidden_size": 96},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "ple_embed_dim": 64, "hc_lowrank": 16,
        "split_ngram_parts": 4},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0,
        "feed_forward_size": 96},
    "rwkv": {"attention_hidden_size": 64},
    "sam2_hiera_det_model": _HIERA,
    "sam2_prompt_encoder": {"image_size": 64},
    "sam2_vision_model": {"backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 64,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_vision_model": {"fpn_hidden_size": 64, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_vit_model": {"image_size": 56, "window_size": 2, "pretrain_image_size": 28, "global_attn_indexes": [1]},
    "sam_hq_mask_decoder": {"vit_dim": 64},
    "sam_hq_prompt_encoder": _SAM_PROMPT,
    "sam_hq_vision_model": _SAM_VISION,
    "sam_prompt_encoder": _SAM_PROMPT,
    "sam_vision_model": _SAM_VISION,
    "step3p5": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2},
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"), _SWIN),
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "gemma3": {"mm_tokens_per_image": 4},
    "glmasr_encoder": {"intermediate_size": 256},
    "llama4_vision_model": {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64,
        "vision_output_dim": 64},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "timesfm": {"context_length": 128},
    "timesfm2_5": {"context_length": 128},
    "dia_decoder": {"cross_hidden_size": 64, "cross_num_attention_heads": 4, "cross_head_dim": 16,
        "cross_num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16,
        "mamba_chunk_size": 8},
    "glm5_next_text": {"linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 4},
    "instructblip": {"image_token_index": 250, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 250, "num_query_tokens": 4},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "mimi_decoder": {"upsample_groups": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64},
    "videoprism_vision_model": {"image_size": 72, "num_frames": 4},
    "pp_formulanet_vision": {"image_size": 128},
    "voxtral_encoder": {"intermediate_size": 256},
    "textnet": {"image_size": [64, 64]},
    "aya_vision": {"downsample_factor": 3},
    "embedding_gemma2": {"__init__": {"vision_config": _GEMMA4_VISION}},
    "gemma4": {"__init__": {"vision_config": _GEMMA4_VISION}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 291, "vision_end_token_id": 292},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 291, "vision_end_token_id": 292},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "blip_2_qformer": {"encoder_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "voxtral": {"audio_token_id": 250},
    "llava_next": {"image_grid_pinpoints": [[56, 56]]},
    "llava_next_video": {"image_grid_pinpoints": [[56, 56]]},
    "llava_onevision": {"image_grid_pinpoints": [[56, 56]]},
    "align_vision_model": _EFFICIENTNET,
    "autoformer": _SERIES,
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "layer_group_size": 2, "linear_num_heads": 4,
        "linear_head_dim": 16},
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "blip-2": {"image_token_index": 250, "num_query_tokens": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": {"vocabulary_map": {"<image>": 250, **{f"IMGIMG{c}Z": 251 + i for i, c in enumerate("ABCDEFGH")}}},
    "chameleon_vqgan": {"resolution": 32, "base_channels": 32, "num_embeddings": 8, "embed_dim": 32,
        "latent_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "chmv2": {"reassemble_factors": [4, 2, 1, 0.5], "post_process_channels": [16, 16, 16, 16],
        "fusion_hidden_size": 16, "head_hidden_size": 16, "number_output_channels": 16,
        "backbone_config": dict(model_type="dinov3_vit", hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=96, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4], reshape_hidden_states=True,
            apply_layernorm=True, return_class_token=True)},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "conditional_detr": _LAST_STAGE,
    "csm": {"num_codebooks": 4, "text_vocab_size": 300},
    "csm_depth_decoder_model": {"num_codebooks": 4, "backbone_hidden_size": 64},
    "dab-detr": {**_LAST_STAGE, "hidden_size": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deformable_detr": {**_THREE_STAGES, "num_feature_levels": 3},
    "depth_anything": _DEPTH,
    "prompt_depth_anything": _DEPTH,
    "detr": _LAST_STAGE,
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": _EFFICIENTNET,
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 249,
        **{f"<|visual token {i:06d}|>": 251 + i for i in range(16)}}},
    "emu3_vqgan": {"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        "hidden_size": 32, "temporal_downsample_factor": 1, "attn_resolutions": [1]},
    "encoder-decoder": {"__init__": {"encoder": _TINY_BERT, "decoder": _DECODER_BERT}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32],
        "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 8},
    "mimi": {"upsample_groups": 64, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32},
    "ministral": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4, "vocab_size": 262},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "num_key_value_heads": 1},
    "speech-encoder-decoder": {"__init__": {"encoder": _TINY_WAV2VEC2, "decoder": _DECODER_BERT}},
    "table-transformer": _LAST_STAGE,
    "time_series_transformer": _SERIES,
    "vision-encoder-decoder": {"__init__": {"encoder": _TINY_VIT, "decoder": _DECODER_BERT}},
    "vision-text-dual-encoder": {"__init__": {"vision_config": _TINY_VIT, "text_config": _TINY_BERT}},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "kv_channels": 32,
        "adapter_rank": 8, "mamba_d_state": 16, "num_query_groups": 4, "num_key_value_heads": 4, "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}  # fmt: skip

#: Why a model type is not attempted at all.
SKIP: dict[str, str] = {
    "sam3_video": "its forward takes an inference session, not tensors",
}

#: Classes to try instead of those of the auto mappings.
CLASSES: dict[str, tuple[str, ...]] = {
    "bark": ("BarkSemanticModel",),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerForConditionalGeneration",),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerForConditionalGeneration",),
    "musicgen": ("MusicgenForConditionalGeneration",),
    "musicgen_melody": ("MusicgenMelodyForConditionalGeneration",),
}
