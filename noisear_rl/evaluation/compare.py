"""Is this noise better than Gaussian noise, and by how much? Paired samples, intervals, tables.

All methods share the prompts and the seed of each (prompt, sample). Scores are split by category if the prompts have
categories (``shapes``); the overall number is the mean over categories, as in GenEval (arXiv 2310.11513).

Shapes: ``P`` prompts, ``S`` samples per prompt, ``B`` batch, images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.denoisers import Denoiser
from noisear_rl.evaluation.intervals import Resample, bootstrap, category_means
from noisear_rl.evaluation.results import MethodResult, Results
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.provenance import provenance
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers import Sampler, as_sampler


@dataclass
class MethodScores:
    """Results of one method.

    Attributes:
        scores: ``(P, S)`` by scorer.
        kl_to_gaussian: Mean KL of the noise to N(0, I) in nats; NaN for a method without a density.
        noise_mean: Mean over all noise elements.
        noise_std: Standard deviation over all noise elements.
        nfe: Network evaluations per image.
        seconds_per_image: Time for sampling and denoising, without scoring.
        images: ``(P, keep_images, 3, H, W)``, the first images of each prompt; empty if none are kept.
        prompts: ``P`` prompts; rows of the same prompt are samples of one prompt.
    """

    scores: dict[str, np.ndarray]
    kl_to_gaussian: float
    noise_mean: float
    noise_std: float
    nfe: float
    seconds_per_image: float
    images: torch.Tensor
    prompts: list[str]


def evaluate(
    denoiser: Denoiser,
    reward: WeightedReward,
    methods: Mapping[str, NoiseARPolicy | Sampler | None],
    prompts: Sequence[str],
    samples: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    keep_images: int = 1,
) -> dict[str, MethodScores]:
    """Denoises and scores ``samples`` noises per prompt for every method, in memory.

    ``noisear evaluate`` does the same on disk: it resumes, runs in several processes and keeps the images.

    Args:
        denoiser: Frozen diffusion model.
        reward: Scorers; the scores of each one are kept.
        methods: Policies and samplers by name; ``None`` stands for Gaussian noise.
        prompts: ``P`` prompts.
        samples: ``S`` noises per prompt.
        seed: Noise ``j`` of prompt ``i`` has the seed ``seed + i·S + j`` in every method.
        batch_size: Noises per batch; a smaller last batch is not dropped.
        keep_images: Images to keep per prompt.

    Returns:
        Results by method, in the order of ``methods``.

    Raises:
        ValueError: If a scorer returns NaN or infinity.
    """
    p, s = len(prompts), samples
    bar = tqdm(total=len(methods) * p * s, desc="evaluate", unit="image")
    results = {}
    for name, method in methods.items():
        sampler = as_sampler(denoiser, method)
        scores: dict[str, list[np.ndarray]] = {}
        images, total_kl, seconds, nfe, moments = [], 0.0, 0.0, 0.0, np.zeros(2)
        for start in range(0, p * s, batch_size):
            index = range(start, min(start + batch_size, p * s))
            texts, seeds = [prompts[i // s] for i in index], [seed + i for i in index]
            began = time.perf_counter()
            drawn = sampler(texts, seeds)
            seconds += time.perf_counter() - began
            nfe += drawn.nfe * len(index)
            total_kl += float("nan") if drawn.kl_to_gaussian is None else drawn.kl_to_gaussian.sum().item()
            moments += [drawn.noise.double().sum().item(), drawn.noise.double().square().sum().item()]
            for key, values in finite_components(reward, drawn.images, texts, name).items():
                scores.setdefault(key, []).append(values.cpu().numpy())
            images += [image for i, image in zip(index, drawn.images.cpu(), strict=True) if i % s < keep_images]
            bar.update(len(index))
        elements = p * s * int(np.prod(denoiser.latent_shape))
        mean = moments[0] / elements
        results[name] = MethodScores(
            {key: np.concatenate(values).reshape(p, s) for key, values in scores.items()},
            total_kl / (p * s),
            mean,
            float(np.sqrt(moments[1] / elements - mean**2)),
            nfe / (p * s),
            seconds / (p * s),
            torch.stack(images).unflatten(0, (p, -1)) if images else torch.zeros(0),
            list(prompts),
        )
    bar.close()
    return results


def finite_components(
    reward: WeightedReward, images: torch.Tensor, prompts: Sequence[str], method: str
) -> dict[str, torch.Tensor]:
    """Returns the scores ``(B,)`` of every scorer and checks that none is missing.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    with torch.no_grad():
        components = reward.components(images, prompts)
    for name, values in components.items():
        if not values.isfinite().all():
            raise ValueError(f"scorer {name!r} returned NaN or infinity for {method!r}: a comparison needs all scores")
    return components


def best_of(scores: Mapping[str, np.ndarray], count: int, choose_by: str) -> dict[str, np.ndarray]:
    """Scores of the best of every ``count`` samples: selection without learning, at ``count`` times the cost.

    Args:
        scores: ``(P, S)`` by scorer; ``S`` must be a multiple of ``count``.
        count: Samples to choose from.
        choose_by: The scorer that selects; it should not be the judge.

    Returns:
        ``(P, S / count)`` by scorer.
    """
    index = scores[choose_by].reshape(len(scores[choose_by]), -1, count).argmax(-1)[..., None]
    return {
        name: np.take_along_axis(values.reshape(len(values), -1, count), index, -1)[..., 0]
        for name, values in scores.items()
    }


def table(
    results: Mapping[str, MethodScores],
    categories: Sequence[str],
    *,
    scorer: str = "shapes-exact",
    resample: Resample = "prompts",
    scale: float = 100.0,
) -> str:
    """Formats a Markdown table: one row per method, one column per category, their mean, and the paired gain.

    Args:
        results: Output of :func:`evaluate`; the first method is the baseline.
        categories: ``P`` category names.
        scorer: The score to show.
        resample: See :func:`bootstrap`.
        scale: Factor on the scores; 100 for percent.
    """
    order = list(dict.fromkeys(categories))
    columns = ["method", *order, "overall", "gain", "KL", "NFE"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    baseline = next(iter(results.values())).scores[scorer]
    for method, result in results.items():
        scores, prompts = result.scores[scorer] * scale, result.prompts
        cells = [f"{mean:.1f}" for mean in category_means(scores, categories, prompts).values()]
        cells.append(str(bootstrap(scores, categories, prompts=prompts, resample=resample)))
        gain = bootstrap(scores - baseline * scale, categories, prompts=prompts, resample=resample)
        cells.append("" if result.scores[scorer] is baseline else ("+" if gain.mean >= 0 else "") + str(gain))
        lines.append("| " + " | ".join([method, *cells, f"{result.kl_to_gaussian:.1f}", f"{result.nfe:g}"]) + " |")
    return "\n".join(lines)


def summary(results: Mapping[str, MethodScores], prompts: Sequence[str]) -> dict[str, Any]:
    """Returns everything but the images as plain values for JSON."""
    methods = {}
    for name, result in results.items():
        methods[name] = {
            "scores": {scorer: values.round(4).tolist() for scorer, values in result.scores.items()},
            "kl_to_gaussian": result.kl_to_gaussian,
            "noise_mean": result.noise_mean,
            "noise_std": result.noise_std,
            "nfe": result.nfe,
            "seconds_per_image": result.seconds_per_image,
        }
    return {"prompts": list(prompts), "methods": methods}


def as_results(
    evaluated: Mapping[str, MethodScores],
    categories: Sequence[str],
    *,
    denoiser: str,
    prompt_set: str,
    judge: str = "shapes-exact",
    groups: Mapping[str, Sequence[str]] | None = None,
    diversity: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Results:
    """Puts the output of :func:`evaluate` into the form of an evaluation on disk, for its tables and as data.

    Args:
        evaluated: Output of :func:`evaluate`; the first method is the baseline.
        categories: ``P`` category names.
        denoiser: Name of the denoiser.
        prompt_set: Name of the prompts.
        judge: The held-out scorer.
        groups: Methods that are training seeds of one method, by its name; other methods have a group of their own.
        diversity: ``(P,)`` distances by method and by the features that measure them.
        facts: Plain values that a table also shows.
    """
    group_of = {name: group for group, names in (groups or {}).items() for name in names}
    methods = {
        name: MethodResult(
            group=group_of.get(name, name),
            slug=name,
            scores=result.scores,
            nfe=result.nfe,
            kl_to_gaussian=None if math.isnan(result.kl_to_gaussian) else result.kl_to_gaussian,
            noise_mean=result.noise_mean,
            noise_std=result.noise_std,
            radial_spectrum=np.zeros(0),
            noise_map=np.zeros(0),
            diversity=dict((diversity or {}).get(name, {})),
            trained=name in group_of,
        )
        for name, result in evaluated.items()
    }
    first = next(iter(evaluated.values()))
    return Results(
        folder=Path(),
        prompts=first.prompts,
        categories=list(categories),
        samples=first.scores[judge].shape[1],
        judge=judge,
        methods=methods,
        denoiser=denoiser,
        prompt_set=prompt_set,
        config={},
        provenance=dict(provenance()),
        timing={name: result.seconds_per_image for name, result in evaluated.items()},
        facts=dict(facts or {}),
    )
