"""The pipeline classes of published models with tiny random weights; no download needed."""

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def clip_encoder(projection: int = WIDTH) -> CLIPTextModelWithProjection:
    tokenizer = architecture.build_tokenizer()
    return CLIPTextModelWithProjection(
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


BUILDERS = {"sdxl": sdxl, "hunyuan-dit": hunyuan_dit, "pixart-sigma": pixart_sigma, "sd3": sd3}


def build(name: str):
    """Builds a pipeline by preset name, with the same weights every time."""
    torch.manual_seed(0)
    return BUILDERS[name]()
