"""Writes the trained components as a diffusers pipeline and judges, and the training table of the model card."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModelWithProjection

from noisear_rl.denoisers.quiet import quietly
from noisear_rl.denoisers.shapes import architecture
from noisear_rl.denoisers.shapes.detectors import Detector


def export(
    assets: Path,
    logs: Path,
    vae: AutoencoderKL,
    clip: CLIPModel,
    unet: UNet2DConditionModel,
    text_encoder_2: CLIPTextModelWithProjection,
    train_detector: Detector,
    held_out_detector: Detector,
) -> None:
    """Writes ``assets/pipeline``, ``assets/clip``, both detectors and ``assets/training.md``.

    Weights are float16, except for the text encoders.

    Args:
        assets: Target folder.
        logs: Folder with the training logs ``<stage>.jsonl``, for the model card.
        vae: Trained autoencoder.
        clip: Trained CLIP; its text tower becomes the first text encoder.
        unet: Trained denoiser.
        text_encoder_2: Second text encoder, trained with the denoiser.
        train_detector: Judge for the reward.
        held_out_detector: Judge for evaluation.
    """
    with quietly():
        from diffusers import StableDiffusionXLPipeline

    text_encoder, _ = architecture.build_text_encoders(clip)
    tokenizer = architecture.build_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**architecture.SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    # The text encoders stay float32: transformers loads the stored dtype, diffusers loads float32.
    vae.half(), unet.half()
    pipeline.save_pretrained(assets / "pipeline", safe_serialization=True)
    # The text tower is the first text encoder, saved above; see architecture.load_clip.
    state = {k: v for k, v in clip.half().state_dict().items() if not k.startswith("text_model.")}
    clip.save_pretrained(assets / "clip", state_dict=state)
    train_detector.save(assets / "train_detector")
    held_out_detector.save(assets / "held_out_detector")
    rows = []
    modules = {"vae": vae, "clip": clip, "unet": unet, "train_detector": train_detector}
    modules["held_out_detector"] = held_out_detector
    for stage, module in modules.items():
        last = json.loads((logs / f"{stage}.jsonl").read_text().splitlines()[-1])
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        rows.append(
            f"| {stage} | {type(module).__name__} | {millions:.2f} M | {last['step']} | {last['seconds'] / 60:.0f} "
            f"| {last['loss']} |"
        )
    (assets / "training.md").write_text(
        "| stage | class | parameters | steps | minutes on 2 CPU cores | last loss |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
