"""Trains the embedded denoiser and its judges from scratch: ``python -m noisear_rl.denoisers.shapes.train``.

Stages, in order: ``vae`` (8× autoencoder), ``clip`` (contrastive, with hard negatives; its text tower is the
first text encoder), ``unet`` (denoiser and second text encoder, ε-prediction on SDXL's schedule), ``judges``
(two detectors), ``export`` (a diffusers pipeline and the judges). Every stage saves a checkpoint every
``--save-every`` steps and resumes from it when started again; step ``i`` draws the same data in every run.

Shapes: ``B`` batch, ``L`` text tokens, ``D`` text width, latent ``(4, 8, 8)``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPModel

from noisear_rl.command import program, run_script
from noisear_rl.denoisers.shapes import architecture
from noisear_rl.denoisers.shapes.captions import (
    CATEGORIES,
    Caption,
    CaptionTensors,
    balanced_captions,
    captions_of,
    hard_negative,
)
from noisear_rl.denoisers.shapes.detectors import CenterDetector, CoreDetector, Detector
from noisear_rl.denoisers.shapes.export import export
from noisear_rl.denoisers.shapes.world import matches, random_scenes, render, sample_scenes
from noisear_rl.files import atomic

STEPS = {"vae": 2400, "clip": 1600, "unet": 3000, "turbo": 2000, "train_detector": 1200, "held_out_detector": 800}
UNET_IMAGES = 65536  # training images of the UNet
# How often each category of captions is drawn for the UNet: more often where more attributes must be bound.
SHARES = {"single_object": 1, "colors": 1, "two_object": 2, "counting": 3, "position": 4, "color_attr": 4}

Step = Callable[[int, np.random.Generator], torch.Tensor]
Model = TypeVar("Model", bound=nn.Module)


class FitOptions(TypedDict):
    """Arguments of :func:`fit` that all stages share."""

    folder: Path
    seed: int
    save_every: int


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` that leaves either the old file or the complete new one."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def fit(
    name: str,
    model: Model,
    step: Step,
    *,
    folder: Path,
    learning_rate: float,
    seed: int,
    save_every: int,
    ema_decay: float = 0.999,
    horizon: int | None = None,
) -> Model:
    """Runs one stage and returns the model with averaged weights.

    Args:
        name: Key of :data:`STEPS`; also the checkpoint's file name.
        model: Model to train.
        step: ``(i, rng) → loss`` of step ``i``.
        folder: Folder of the checkpoint and the log.
        learning_rate: Peak of AdamW's one-cycle schedule.
        seed: Training seed; step ``i`` draws only from ``(seed, name, i)``.
        save_every: Steps between checkpoints.
        ema_decay: Limit of the weight average's decay.
        horizon: Length of the learning-rate schedule in steps, if training stops before its end.
    """
    steps, path, log = STEPS[name], folder / f"{name}.pt", folder / f"{name}.jsonl"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    total = (horizon or steps) + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.1)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    start, seconds, recent = 0, 0.0, []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        ema.load_state_dict(saved["ema"])
        start, seconds = saved["step"], saved["seconds"]
    began = time.time() - seconds
    model.train()
    for i in (bar := tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)):
        rng = np.random.default_rng([seed, *name.encode(), i])
        loss = step(i, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        recent.append(loss.item())
        if (i + 1) % 50 == 0:
            record = {"step": i + 1, "loss": round(float(np.mean(recent)), 5), "seconds": round(time.time() - began)}
            bar.set_postfix(loss=record["loss"])
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            recent.clear()
        if (i + 1) % save_every == 0 or i + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "ema": ema.state_dict(),
                "step": i + 1,
                "seconds": time.time() - began,
            }
            save_tensors(state, path)
    ema.copy_to(model.parameters())
    return model.eval().requires_grad_(False)


def autocast() -> torch.autocast:
    """Bfloat16 where it helps; the weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16)


def train_vae(**options: Unpack[FitOptions]) -> AutoencoderKL:
    """Trains the autoencoder: squared and absolute error of the image plus a small KL to the unit Gaussian."""
    vae = architecture.build_vae()

    def step(i: int, rng: np.random.Generator) -> torch.Tensor:
        images = render(sample_scenes(balanced_captions("train", 32, seed=i), rng), rng) * 2 - 1
        with autocast():
            posterior = vae.encode(images).latent_dist
            noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape)).float()
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-4 * posterior.kl().mean() / noise[0].numel()

    fit("vae", vae, step, learning_rate=2e-3, **options)
    # Statistics for the pipeline, so that diffusion sees unit variance in every channel.
    rng = np.random.default_rng(options["seed"])
    images = render(sample_scenes(balanced_captions("train", 2048), rng), rng) * 2 - 1
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(128)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3)).tolist(), latents_std=latents.std((0, 2, 3)).tolist(), scaling_factor=1.0
    )
    return vae


def train_clip(**options: Unpack[FitOptions]) -> CLIPModel:
    """Trains CLIP contrastively; every caption comes with a hard negative, and true pairs are never negatives."""
    clip, tokenize = architecture.build_clip(), architecture.Tokenizer()

    def step(i: int, rng: np.random.Generator) -> torch.Tensor:
        captions = balanced_captions("train", 64, seed=i)
        scenes = sample_scenes(captions, rng)
        choose = random.Random(i)
        texts = captions + [hard_negative(c, choose) for c in captions]
        true = matches(scenes, CaptionTensors.from_captions(texts))  # (B, 2B)
        with autocast():
            images = clip.get_image_features((render(scenes, rng) - 0.5) / 0.5).pooler_output
            words = clip.get_text_features(tokenize([c.text for c in texts])).pooler_output
        images, words = F.normalize(images.float(), dim=-1), F.normalize(words.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * images @ words.T
        positive = logits.masked_fill(~true, -torch.inf)
        by_image = (logits.logsumexp(1) - positive.logsumexp(1)).mean()
        by_text = (logits.logsumexp(0) - positive.logsumexp(0))[: len(captions)].mean()
        return (by_image + by_text) / 2

    return fit("clip", clip, step, learning_rate=1e-3, **options)


@cache
def _pool(category: str, plain: bool) -> tuple[Caption, ...]:
    captions = captions_of("train", category)
    return tuple(c for c in captions if not c.objects[0].color) if plain else captions


def draw_captions(rng: np.random.Generator, count: int) -> list[Caption]:
    """Draws training captions by :data:`SHARES`; half of a category's are plain ones, if it has any."""
    weights = np.array([SHARES[category] for category in CATEGORIES], dtype=float)
    chosen = []
    for category in rng.choice(len(CATEGORIES), size=count, p=weights / weights.sum()):
        pool, plain = (_pool(CATEGORIES[category], plain) for plain in (False, True))
        pool = plain if plain and rng.random() < 0.5 else pool
        chosen.append(pool[rng.integers(len(pool))])
    return chosen


def latent_shards(vae: AutoencoderKL, folder: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes ``UNET_IMAGES`` images once: normalised latents ``(UNET_IMAGES, 4, 8, 8)`` and caption indices."""
    path = folder / "latents.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["latents"].float(), saved["captions"]
    captions = captions_of("train")
    index = {caption.text: i for i, caption in enumerate(captions)}
    mean, std = (torch.tensor(getattr(vae.config, key)).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    rng, latents, indices = np.random.default_rng([seed, 1]), [], []
    for _ in tqdm(range(UNET_IMAGES // 256), desc="latents", mininterval=5):
        chosen = draw_captions(rng, 256)
        images = render(sample_scenes(chosen, rng), rng) * 2 - 1
        with torch.inference_mode(), autocast():
            latents.append(((vae.encode(images).latent_dist.mean.float() - mean) / std).half())
        indices += [index[c.text] for c in chosen]
    saved = {"latents": torch.cat(latents), "captions": torch.tensor(indices)}
    save_tensors(saved, path)
    return saved["latents"].float(), saved["captions"]


def train_unet(vae: AutoencoderKL, clip: CLIPModel, **options: Unpack[FitOptions]) -> nn.ModuleDict:
    """Trains denoiser and second text encoder on ε-prediction; a tenth of the captions become zeros, as in SDXL.

    The squared error is weighted by ``min(sqrt(1 + 1/SNR), 5)``, because layout is decided at high noise levels.
    """
    tokenize = architecture.Tokenizer()
    latents, indices = latent_shards(vae, options["folder"], options["seed"])
    tokens = tokenize([c.text for c in captions_of("train")])
    frozen, trained = architecture.build_text_encoders(clip)
    with torch.inference_mode():
        first = frozen(tokens, output_hidden_states=True).hidden_states[-2].clone()  # (captions, L, D)
    model = nn.ModuleDict({"unet": architecture.build_unet(), "text_encoder_2": trained})
    scheduler = DDIMScheduler(**architecture.SCHEDULE)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def step(i: int, rng: np.random.Generator, batch: int = 128) -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(latents), size=batch))
        clean, caption = latents[rows], indices[rows]
        noise = torch.from_numpy(rng.standard_normal(clean.shape)).float()
        timesteps = torch.from_numpy((1000 * (1 - rng.random(batch) ** 1.3)).astype(np.int64)).clamp(0, 999)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        keep = torch.from_numpy(rng.random(batch) >= 0.1).float()
        with autocast():
            output = trained(tokens[caption], output_hidden_states=True)
            text = torch.cat([first[caption], output.hidden_states[-2]], -1) * keep[:, None, None]
            added = {"text_embeds": output.text_embeds * keep[:, None], "time_ids": time_ids.expand(batch, -1)}
            predicted = model["unet"](noisy, timesteps, text, added_cond_kwargs=added).sample
        weight = (1 + 1 / compute_snr(scheduler, timesteps)).sqrt().clamp(max=5)
        return ((predicted.float() - noise).square().mean((1, 2, 3)) * weight).sum() / weight.sum()

    # Stopped early: the averaged weights are good, and Gaussian noise still leaves room above it.
    return fit("unet", model, step, learning_rate=1.5e-3, horizon=5000, **options)


def train_judge(name: str, detector: Detector, vae: AutoencoderKL, **options: Unpack[FitOptions]) -> Detector:
    """Trains a detector on random scenes; half of the images pass through the autoencoder, all get noise."""

    def step(i: int, rng: np.random.Generator) -> torch.Tensor:
        scenes = random_scenes(64, rng)
        images = render(scenes, rng)
        with torch.inference_mode(), autocast():
            images[::2] = (vae(images[::2] * 2 - 1).sample.float() / 2 + 0.5).clamp(0, 1)
        noise = torch.from_numpy(rng.standard_normal(images.shape)).float()
        images = (images + noise * torch.from_numpy(rng.uniform(0, 0.06, (len(images), 1, 1, 1))).float()).clamp(0, 1)
        with autocast():
            grid = detector(images)
        return detector.loss(grid.float(), scenes)

    return fit(name, detector, step, learning_rate=2e-3, **options)


def stages(arguments: argparse.Namespace) -> Iterator[str]:
    """Runs the requested stages in order, loading the results of earlier ones, and yields their names."""
    options = FitOptions(folder=arguments.output_dir, seed=arguments.seed, save_every=arguments.save_every)
    last = {"vae": 0, "clip": 1, "unet": 2, "judges": 3, "export": 4, "all": 4}[arguments.stage]
    torch.manual_seed(arguments.seed)
    vae = train_vae(**options)
    yield "vae"
    if arguments.stage == "judges" or last > 3:
        torch.manual_seed(arguments.seed + 1)
        judges = [train_judge("train_detector", CenterDetector(), vae, **options)]
        torch.manual_seed(arguments.seed + 2)
        judges.append(train_judge("held_out_detector", CoreDetector(), vae, **options))
        yield "judges"
    if last == 3 or last == 0:
        return
    torch.manual_seed(arguments.seed + 3)
    clip = train_clip(**options)
    yield "clip"
    if last == 1:
        return
    torch.manual_seed(arguments.seed + 4)
    model = train_unet(vae, clip, **options)
    yield "unet"
    if last > 3:
        export(arguments.assets, arguments.output_dir, vae, clip, model["unet"], model["text_encoder_2"], *judges)
        yield "export"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=program(), description=__doc__)
    parser.add_argument("stage", choices=("vae", "clip", "unet", "judges", "export", "all"), help="last stage to run")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/shapes-denoiser"), help="folder for checkpoints and logs"
    )
    parser.add_argument("--assets", type=Path, default=architecture.ASSETS, help="output folder of the export stage")
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    arguments = parser.parse_args(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages(arguments):
        print(f"{stage}: done", flush=True)


if __name__ == "__main__":
    run_script(main)
