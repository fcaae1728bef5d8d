"""The pipeline classes of published models with tiny random weights; no download needed."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from noisear_rl.denoisers.shapes import architecture

WORDS = ("a", "photo", "of", "red", "blue", "circle", "square", "two", "squares", "lighthouse", "at", "dawn")
WIDTH = 32
SDXL_SCHEDULE = {key: architecture.SCHEDULE[key] for key in ("beta_schedule", "beta_start", "beta_end")}
SDXL_SCHEDULE |= {"num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1}


def vae(latent_channels: int = 4, levels: int = 2, **options) -> AutoencoderKL:
    """An autoencoder; with two levels, images have twice the side of the latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=32,
        **options,
    )


def clip_encoder(projection: int = WIDTH, cls=CLIPTextModelWithProjection):
    tokenizer = architecture.build_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=projection,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def byte_tokenizer(**options) -> Qwen2Tokenizer:
    """Qwen's tokenizer without merges: a token per byte, and a chat template as short as possible."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {token: i for i, token in enumerate((*special, *bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=512, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return tokenizer


def qwen3(layers: int, width: int = WIDTH) -> tuple[Qwen3ForCausalLM, Qwen2Tokenizer]:
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3ForCausalLM(config), tokenizer


def bert(length: int = 77) -> tuple[BertModel, BertTokenizer]:
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=WIDTH,
        max_position_embeddings=length,
    )
    return BertModel(config), BertTokenizer(vocab=vocab, model_max_length=length)


def t5(length: int = 256) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config), tokenizer


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = architecture.build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SDXL_SCHEDULE),
        add_watermarker=False,
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    encoder, tokenizer = bert()
    encoder_2, tokenizer_2 = t5()
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        hidden_size=24,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    return HunyuanDiTPipeline(
        vae=vae(levels=4, scaling_factor=0.13025),  # the pipeline assumes a factor of 8
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    encoder, tokenizer = t5(300)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def sd3() -> StableDiffusion3Pipeline:
    tokenizer = architecture.build_tokenizer()
    encoder_3, tokenizer_3 = t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    )
    return StableDiffusion3Pipeline(
        vae=vae(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(WIDTH // 2),
        text_encoder_2=clip_encoder(WIDTH // 2),
        text_encoder_3=encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sdxl_turbo() -> StableDiffusionXLPipeline:
    pipeline = sdxl()
    pipeline.register_modules(
        scheduler=EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE | {"timestep_spacing": "trailing"})
    )
    return pipeline


def sana_sprint() -> SanaSprintPipeline:
    tokenizer = byte_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(encoder),
        vae=decoder,
        transformer=transformer,
        scheduler=SCMScheduler(),
    )


def flux(guidance: bool = True) -> FluxPipeline:
    encoder_2, tokenizer_2 = t5(512)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    schedule = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return FluxPipeline(
        vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(cls=CLIPTextModel),
        tokenizer=architecture.build_tokenizer(),
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
    )


def z_image() -> ZImagePipeline:
    encoder, tokenizer = qwen3(3)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux2_klein(distilled: bool = True) -> Flux2KleinPipeline:
    encoder, tokenizer = qwen3(28, 16)  # hidden states 9, 18 and 27 are read
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )


def qwen_image() -> QwenImagePipeline:
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.1, 1.0, 0.9, 1.2],
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=decoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def wan() -> WanPipeline:
    _, tokenizer = t5(512)
    encoder = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        is_encoder_decoder=False,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    decoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.1, 1.0, 0.9, 1.2],
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder),
        vae=decoder,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )


BUILDERS = {
    "sdxl": sdxl,
    "hunyuan-dit": hunyuan_dit,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
    "sdxl-turbo": sdxl_turbo,
    "sana-sprint": sana_sprint,
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guidance=False),
    "z-image-turbo": z_image,
    "qwen-image": qwen_image,
    "wan": wan,
    "flux2-klein": flux2_klein,
}
# Options that a class needs: sizes where the network does not say its own, no guidance where it was distilled.
SIDE = {"height": 32, "width": 32}
OPTIONS = dict.fromkeys(("flux-dev", "z-image-turbo", "qwen-image"), SIDE)
OPTIONS |= dict.fromkeys(("flux-schnell", "flux2-klein"), SIDE | {"guidance_scale": 1.0})
OPTIONS |= {"wan": {"height": 64, "width": 64, "num_frames": 9}}


def build(name: str):
    """Builds a pipeline by preset name, with the same weights every time."""
    torch.manual_seed(0)
    return BUILDERS[name]()
