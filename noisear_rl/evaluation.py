"""Is this noise better than Gaussian noise, and by how much? Paired samples, intervals, tables.

Every method gets the same prompts, the same seed for each (prompt, sample), and the same number of network
evaluations. Scores are cut by category where prompts have one (``shapes``); the overall number is the mean
over categories, as in GenEval (arXiv 2310.11513).

Shapes: ``M`` methods, ``P`` prompts, ``S`` samples a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.denoisers import Conditioning, Denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.rewards import WeightedReward

GAUSSIAN = "Gaussian"
RESAMPLE = ("prompts", "noise")


@dataclass
class MethodScores:
    """What one method got.

    Attributes:
        scores: ``(P, S)`` by scorer.
        kl_to_gaussian: Mean KL of the noise to N(0, I) in nats.
        noise_mean: Mean over all noise elements.
        noise_std: Standard deviation over all noise elements.
        nfe: Network evaluations an image.
        seconds_per_image: Sampling and denoising, without scoring.
        images: ``(P, keep, 3, H, W)`` the first pictures of every prompt.
    """

    scores: dict[str, np.ndarray]
    kl_to_gaussian: float
    noise_mean: float
    noise_std: float
    nfe: int
    seconds_per_image: float
    images: torch.Tensor


def draw_noise(
    policy: NoiseARPolicy | None, conditioning: Conditioning, seeds: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """A method's noise ``(B, C, h, w)`` for ``B`` prompts and seeds; ``None`` is Gaussian noise."""
    if policy is None:
        return standard_noise(seeds, shape)
    text = conditioning.policy_embeds
    return policy.to(text.device).noise(policy.sample(text, conditioning.policy_mask, seeds=seeds))


@torch.no_grad()
def evaluate(
    denoiser: Denoiser,
    reward: WeightedReward,
    policies: Mapping[str, NoiseARPolicy | None],
    prompts: Sequence[str],
    samples: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    keep_images: int = 1,
) -> dict[str, MethodScores]:
    """Denoises and scores ``samples`` noises a prompt for every method.

    Args:
        denoiser: Frozen diffusion model.
        reward: Scorers; all components are kept.
        policies: Methods by name; ``None`` is Gaussian noise.
        prompts: ``P`` prompts.
        samples: ``S``.
        seed: Noise ``j`` of prompt ``i`` has seed ``seed + i·S + j`` in every method.
        batch_size: Noises at once; the last batch may be smaller and is not dropped.
        keep_images: Pictures a prompt to keep.

    Returns:
        Scores by method, in the order given.
    """
    p, s = len(prompts), samples
    bar = tqdm(total=len(policies) * p * s, desc="evaluate", unit="image")
    results = {}
    for name, policy in policies.items():
        scores: dict[str, list[np.ndarray]] = {}
        images, total_kl, seconds, moments = [], 0.0, 0.0, np.zeros(2)
        for start in range(0, p * s, batch_size):
            index = range(start, min(start + batch_size, p * s))
            texts, seeds = [prompts[i // s] for i in index], [seed + i for i in index]
            conditioning = denoiser.encode(texts)
            began = time.perf_counter()
            noise = draw_noise(policy, conditioning, seeds, denoiser.latent_shape)
            pictures = denoiser.denoise(noise, conditioning, seeds)
            seconds += time.perf_counter() - began
            if policy is not None:
                patches = patchify(noise, policy.config.patch_size)
                text, mask = conditioning.policy_embeds, conditioning.policy_mask
                total_kl += policy.kl_divergence(patches, text, mask).sum().item()
            moments += [noise.double().sum().item(), noise.double().square().sum().item()]
            for key, values in reward.components(pictures, texts).items():
                scores.setdefault(key, []).append(values.cpu().numpy())
            images += [picture for i, picture in zip(index, pictures.cpu(), strict=True) if i % s < keep_images]
            bar.update(len(index))
        elements = p * s * int(np.prod(denoiser.latent_shape))
        mean = moments[0] / elements
        results[name] = MethodScores(
            {key: np.concatenate(values).reshape(p, s) for key, values in scores.items()},
            total_kl / (p * s),
            mean,
            float(np.sqrt(moments[1] / elements - mean**2)),
            denoiser.nfe,
            seconds / (p * s),
            torch.stack(images).unflatten(0, (p, -1)) if images else torch.zeros(0),
        )
    bar.close()
    return results


def best_of(scores: Mapping[str, np.ndarray], count: int, choose_by: str) -> dict[str, np.ndarray]:
    """Scores of the best of every ``count`` samples: what search without learning gets at ``count`` times the cost.

    Args:
        scores: ``(P, S)`` by scorer; ``S`` must be a multiple of ``count``.
        count: Samples to choose from.
        choose_by: The scorer that chooses; it should not be the one that judges.

    Returns:
        ``(P, S / count)`` by scorer.
    """
    index = scores[choose_by].reshape(len(scores[choose_by]), -1, count).argmax(-1)[..., None]
    return {
        name: np.take_along_axis(values.reshape(len(values), -1, count), index, -1)[..., 0]
        for name, values in scores.items()
    }


def diversity(images: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Mean pairwise cosine distance of the pictures of each prompt.

    Args:
        images: ``(P, K, 3, H, W)`` in [0, 1], ``K`` at least 2.
        embed: Pictures → unit vectors, such as ``ShapesClip.image_features``.

    Returns:
        ``(P,)``; 0 where all pictures look the same to ``embed``.
    """
    k = images.shape[1]
    with torch.no_grad():
        features = torch.stack([embed(part) for part in images])  # (P, K, D)
    cosine = (features @ features.mT).sum((1, 2)) - k  # without the diagonal
    return (1 - cosine / (k * (k - 1))).cpu().numpy()


@dataclass
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(
    scores: np.ndarray, categories: Sequence[str], *, resample: str = "prompts", draws: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over categories of ``(P, S)`` scores with a 95 % percentile bootstrap interval.

    Args:
        scores: ``(P, S)``; a difference of two methods' scores gives the paired interval.
        categories: ``P`` names; every category counts the same.
        resample: ``prompts``: to prompts like these (resamples whole prompts within each category).
            ``noise``: to fresh noise on these very prompts (resamples within each prompt).
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: If ``resample`` is unknown.
    """
    if resample not in RESAMPLE:
        raise ValueError(f"unknown resample {resample!r}; expected one of {RESAMPLE}")
    rng = np.random.default_rng(seed)
    names = np.array(categories)
    means, sampled = [], np.zeros(draws)
    for name in dict.fromkeys(categories):
        part = scores[names == name]  # (p, S)
        means.append(part.mean())
        if resample == "noise" or len(part) == 1:  # one prompt alone can only be resampled by its noise
            columns = rng.integers(part.shape[1], size=(draws, *part.shape))
            drawn, n = np.take_along_axis(part[None], columns, 2).mean((1, 2)), part.shape[1]
        else:
            drawn, n = part.mean(1)[rng.integers(len(part), size=(draws, len(part)))].mean(1), len(part)
        # Resampling n items understates their variance by (n - 1) / n.
        sampled += part.mean() + (drawn - part.mean()) * np.sqrt(n / max(n - 1, 1))
    sampled /= len(means)
    return Estimate(float(np.mean(means)), *(float(q) for q in np.quantile(sampled, [0.025, 0.975])))


def table(
    results: Mapping[str, MethodScores],
    categories: Sequence[str],
    *,
    scorer: str = "shapes-exact",
    resample: str = "prompts",
    scale: float = 100.0,
) -> str:
    """A Markdown table: one row a method, one column a category, the mean over them, and the paired gain.

    Args:
        results: What :func:`evaluate` returned; the first method is the baseline.
        categories: ``P`` names.
        scorer: Which score to show.
        resample: See :func:`bootstrap`.
        scale: Factor on the scores; 100 for percent.
    """
    order = list(dict.fromkeys(categories))
    names = np.array(categories)
    columns = ["method", *order, "overall", "gain", "KL", "NFE"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    baseline = next(iter(results.values())).scores[scorer]
    for method, result in results.items():
        scores = result.scores[scorer] * scale
        cells = [f"{scores[names == name].mean():.1f}" for name in order]
        cells.append(str(bootstrap(scores, categories, resample=resample)))
        gain = bootstrap(scores - baseline * scale, categories, resample=resample)
        cells.append("" if result.scores[scorer] is baseline else ("+" if gain.mean >= 0 else "") + str(gain))
        lines.append("| " + " | ".join([method, *cells, f"{result.kl_to_gaussian:.1f}", str(result.nfe)]) + " |")
    return "\n".join(lines)
