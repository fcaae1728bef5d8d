"""Distils ``shapes`` into ``shapes-turbo``: ``python -m noisear_rl.denoisers.shapes.distill``.

With a deterministic sampler, steps and guidance together are a single map from noise and caption to a latent. The
student regresses this map (Luhman & Luhman 2021, arXiv 2101.02388) and needs one network evaluation where its
teacher needs eight, so that experiments on the noise run several times faster. It starts from the teacher's
weights, without the middle block and with the constant time embedding folded into biases.

Training resumes from its latest checkpoint when started again.

Shapes: ``B`` batch, ``L`` text tokens, ``D`` text width, latent ``(4, 8, 8)``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.presets import load_pipeline_denoiser
from noisear_rl.denoisers.shapes import architecture
from noisear_rl.denoisers.shapes.captions import captions_of
from noisear_rl.denoisers.shapes.train import autocast, draw_captions, fit, save_tensors
from noisear_rl.gaussian import standard_noise

SHARD = 4096  # targets per file
TEACHER_GUIDANCE = 3.0
TIMESTEP = 751  # where the teacher's four steps start


def teacher_targets(
    teacher: DiffusionPipelineDenoiser, folder: Path, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's latents ``(count, 4, 8, 8)`` for the noise of seeds 0, 1, …, and caption indices ``(count,)``."""
    index = {caption.text: i for i, caption in enumerate(captions_of("train"))}
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number in tqdm(range(count // SHARD), desc="targets", unit="shard"):
        path = folder / f"{number:03d}.pt"
        if not path.exists():
            chosen = [c.text for c in draw_captions(np.random.default_rng([seed, 7, number]), SHARD)]
            noise = standard_noise(range(number * SHARD, (number + 1) * SHARD), architecture.LATENT_SHAPE)
            latents = []
            for rows in torch.arange(SHARD).split(128):
                conditioning = teacher.encode([chosen[i] for i in rows])
                with torch.inference_mode(), autocast():
                    output = teacher.pipeline(
                        latents=noise[rows],
                        num_inference_steps=teacher.num_inference_steps,
                        guidance_scale=teacher.guidance_scale,
                        output_type="latent",
                        **conditioning.inputs,
                    )
                latents.append(output.images.half())
            shard = {"latents": torch.cat(latents), "captions": torch.tensor([index[text] for text in chosen])}
            save_tensors(shard, path)
        shards.append(torch.load(path, weights_only=True))
    return torch.cat([s["latents"] for s in shards]), torch.cat([s["captions"] for s in shards])


@torch.no_grad()
def inherit(student: UNet2DConditionModel, teacher: UNet2DConditionModel, added: dict[str, torch.Tensor]) -> None:
    """Copies the teacher's weights; its time embedding, averaged over captions, is folded into biases."""
    own, source = student.state_dict(), teacher.state_dict()
    student.load_state_dict({k: source[k] if k in source and source[k].shape == v.shape else v for k, v in own.items()})
    count = len(added["text_embeds"])
    time = teacher.time_embedding(teacher.time_proj(torch.full((count,), TIMESTEP)))
    ids = teacher.add_time_proj(added["time_ids"].flatten()).reshape(count, -1)
    time = time + teacher.add_embedding(torch.cat([added["text_embeds"], ids], -1))
    modules = dict(student.named_modules())
    for name, module in teacher.named_modules():
        if getattr(module, "time_emb_proj", None) is not None and name in modules:
            modules[name].conv1.bias += module.time_emb_proj(F.silu(time)).mean(0)
            modules[name].time_emb_proj.weight.zero_()
            modules[name].time_emb_proj.bias.zero_()


def distil(
    teacher: DiffusionPipelineDenoiser, folder: Path, count: int, *, seed: int, save_every: int
) -> UNet2DConditionModel:
    """Trains the student and returns it with averaged weights; the absolute error favours sharp decisions."""
    latents, captions = teacher_targets(teacher, folder / "turbo-targets", count, seed)
    conditioning = teacher.encode([caption.text for caption in captions_of("train")])
    text = conditioning.inputs["prompt_embeds"]  # (captions, L, D)
    added = {
        "text_embeds": conditioning.inputs["pooled_prompt_embeds"],
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(text), -1),
    }
    torch.manual_seed(seed + 5)
    student = architecture.build_unet(turbo=True)
    inherit(student, teacher.pipeline.unet, added)
    alpha = DDIMScheduler(**architecture.SCHEDULE).alphas_cumprod[TIMESTEP]

    def step(i: int, rng: np.random.Generator, batch: int = 128) -> torch.Tensor:
        rows = rng.integers(len(latents), size=batch)
        noise, caption = standard_noise(rows.tolist(), architecture.LATENT_SHAPE), captions[rows]
        with autocast():
            predicted = student(
                noise, TIMESTEP, text[caption], added_cond_kwargs={k: v[caption] for k, v in added.items()}
            ).sample
        clean = (noise - (1 - alpha).sqrt() * predicted.float()) / alpha.sqrt()
        return F.smooth_l1_loss(clean, latents[rows].float(), beta=0.1)

    # Stopped a third of the way through the learning-rate schedule: the averaged weights are good by then.
    return fit(
        "turbo", student, step, folder=folder, learning_rate=1e-3, seed=seed, save_every=save_every, horizon=6000
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m noisear_rl.denoisers.shapes.distill", description=__doc__)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/shapes-turbo"), help="folder for targets, checkpoints and logs"
    )
    parser.add_argument("--assets", type=Path, default=architecture.ASSETS, help="where to write the student")
    parser.add_argument("--targets", type=int, default=81920, help=f"latents of the teacher, a multiple of {SHARD}")
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    arguments = parser.parse_args(argv)
    teacher = load_pipeline_denoiser("shapes", guidance_scale=TEACHER_GUIDANCE)
    student = distil(
        teacher, arguments.output_dir, arguments.targets, seed=arguments.seed, save_every=arguments.save_every
    )
    folder = arguments.assets / "turbo"
    student.half().save_pretrained(folder / "unet")
    DDIMScheduler(**architecture.TURBO_SCHEDULE).save_pretrained(folder / "scheduler")
    last = json.loads((arguments.output_dir / "turbo.jsonl").read_text().splitlines()[-1])
    print(f"{folder}: {last}")


if __name__ == "__main__":
    run_script(main)
