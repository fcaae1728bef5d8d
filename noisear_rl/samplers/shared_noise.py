"""One of a few noises for every prompt: which of them suits a prompt is predicted from prompts that were tried on all.

Kernel ridge regression from what is read of a prompt (words at their places, and pairs of them) to the rewards of the
noises. ``noisear shared-noise`` makes the choice and keeps it in its folder; as a method of ``noisear evaluate``,
``NAME=FOLDER`` is the choice alone, without any policy: the same noise for every seed.

Shapes: ``P`` prompts that were tried, ``Q`` prompts to choose for, ``S`` noises, of which ``K`` are chosen, ``F`` text
features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from noisear_rl.denoisers import Denoiser
from noisear_rl.files import atomic
from noisear_rl.integrity import verify, write_checksums
from noisear_rl.policy.layers import Whitening
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.samplers.base import DrawingSampler, check_seeds

RIDGES = 10.0 ** np.arange(-3, 4.1, 0.5)
FILE, PART = "choice.safetensors", "choice"


@dataclass(frozen=True)
class Choice:
    """A noise for every prompt.

    Attributes:
        ranking: ``(Q, K)`` columns of the chosen noises, for each prompt in order of the expected reward.
        predicted: ``(Q, K)`` expected rewards in this order, relative to the prompt's mean over all noises.
        chosen: ``(K,)`` columns of the chosen noises.
        weights: ``(P, K)`` weights of the prompts that were tried: with their similarities to a prompt, they predict
            its relative reward on the chosen noises.
        ridge: The chosen ridge: large if prompts have much in common.
        average: Mean reward of the tried prompts on all noises.
        expected: Mean reward of every tried prompt on the noise that the other prompts recommend for it. This
            estimates the reward of untried prompts, slightly too high because the ridge was chosen by it.
    """

    ranking: np.ndarray
    predicted: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    ridge: float
    average: float
    expected: float

    @property
    def noise(self) -> np.ndarray:
        """``(Q,)`` column of the most promising noise."""
        return self.ranking[:, 0]

    def __str__(self) -> str:
        return (
            f"{len(np.unique(self.noise))} noises for {len(self.noise)} prompts; mean reward of the tried prompts: "
            f"{self.average:.3f} on all noises, {self.expected:.3f} on the noise that other prompts recommend "
            f"(ridge {self.ridge:.2g})"
        )


def similarity(features: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """Products of pairs of features, such as a word and its place, of prompts ``(Q, F)`` and ``(P, F)``: ``(Q, P)``.

    The constant in it says that a noise may suit all prompts.
    """
    centred = tried - tried.mean(0)
    scale = max(np.square(centred).sum(1).mean(), 1e-12)
    return ((features - tried.mean(0)) @ centred.T / scale + 1) ** 2


def choose_noise(rewards: np.ndarray, tried: np.ndarray, asked: np.ndarray, noises: int) -> Choice:
    """Chooses one of a few noises for every prompt.

    Args:
        rewards: ``(P, S)``, prompts by noises.
        tried: ``(P, F)`` text features of these prompts.
        asked: ``(Q, F)`` text features of the prompts to choose for.
        noises: ``K``, number of distinct noises, chosen greedily.

    Raises:
        ValueError: If the shapes do not match, a number is not finite, or ``noises`` is not between 1 and ``S``.
    """
    if rewards.ndim != 2 or len(tried) != len(rewards) or len(rewards) < 2 or tried.shape[1:] != asked.shape[1:]:
        raise ValueError(
            f"expected rewards (P, S) and features (P, F) and (Q, F) with at least two prompts, got {rewards.shape}, "
            f"{tried.shape} and {asked.shape}"
        )
    if not 1 <= noises <= rewards.shape[1]:
        raise ValueError(f"noises must be between 1 and the {rewards.shape[1]} that were tried, got {noises}")
    if not all(np.isfinite(part).all() for part in (rewards, tried, asked)):
        raise ValueError("rewards and features must be finite")
    relative = rewards - rewards.mean(1, keepdims=True)  # a prompt's difficulty says nothing about noises
    values, vectors = np.linalg.eigh(similarity(tried, tried))
    rotated, rows = vectors.T @ relative, np.arange(len(rewards))
    best: tuple[float, float, np.ndarray, np.ndarray] | None = None
    for ridge in RIDGES:
        shrunk = vectors * (values / (values + ridge))
        smooth = shrunk @ rotated  # (P, S) predicted reward
        own = (shrunk * vectors).sum(1, keepdims=True)  # diagonal of the smoother
        without = (smooth - own * relative) / (1 - own)  # each row predicted from the other prompts
        chosen = _cover(smooth, noises)
        expected = float(rewards[rows, chosen[without[:, chosen].argmax(1)]].mean())
        if best is None or expected > best[0]:
            best = expected, float(ridge), chosen, vectors @ (rotated / (values + ridge)[:, None])
    assert best is not None
    expected, ridge, chosen, weights = best
    predicted = similarity(asked, tried) @ weights[:, chosen]
    order = np.argsort(-predicted, 1, kind="stable")
    ranked = np.take_along_axis(predicted, order, 1)
    return Choice(chosen[order], ranked, chosen, weights[:, chosen], ridge, float(rewards.mean()), expected)


def _cover(predicted: np.ndarray, count: int) -> np.ndarray:
    """Greedily chosen columns: each one raises the mean over rows of the best chosen column most."""
    best, chosen = np.full(len(predicted), -np.inf), []
    for _ in range(count):
        chosen.append(int(np.maximum(predicted, best[:, None]).mean(0).argmax()))
        best = np.maximum(best, predicted[:, chosen[-1]])
    return np.array(chosen)


class TextFeatures:
    """What is read of each prompt, token by token at its place: ``(Q, F)``, with ``F = L · D``.

    Embeddings are whitened, by statistics of the prompts that were tried; token ids become unit vectors.

    Args:
        reader: Reads the prompts.
        tried: Prompts that were tried.
    """

    def __init__(self, reader: PromptReader, tried: Sequence[str]):
        self.reader, self.whiten = reader, None
        if "text_vocabulary" not in reader.sizes:
            text, mask = (part.cpu() for part in reader.read_prompts(tried))
            self.whiten = Whitening(text.shape[-1])
            self.whiten.fit(text[mask.bool()])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Features ``(Q, F)`` of prompts."""
        text, mask = (part.cpu() for part in self.reader.read_prompts(prompts))
        if self.whiten is None:
            features = F.one_hot(text[..., 0].long(), self.reader.sizes["text_vocabulary"]).float()
        else:
            features = self.whiten(text)
        return (features * mask[..., None]).flatten(1).numpy()


@dataclass(frozen=True)
class SharedNoises:
    """The chosen noises and what decides between them, in a file.

    Attributes:
        noises: ``(K, C, h, w)`` float32.
        weights: ``(P, K)``, those of :class:`Choice`.
        tried: The ``P`` prompts that were tried.
        text_encoder: What is read of a prompt.
        denoiser: Name of the denoiser that they were tried with.
    """

    noises: torch.Tensor
    weights: torch.Tensor
    tried: list[str]
    text_encoder: str
    denoiser: str

    def save(self, folder: Path) -> None:
        """Writes ``choice.safetensors``."""
        facts = {"tried": json.dumps(self.tried), "text_encoder": self.text_encoder, "denoiser": self.denoiser}
        with atomic(folder / FILE) as temporary:
            save_file({"noises": self.noises, "weights": self.weights}, temporary, facts)
            write_checksums(folder, {folder / FILE: temporary}, PART)

    @classmethod
    def load(cls, folder: str | Path) -> SharedNoises:
        """Reads a folder that ``noisear shared-noise`` wrote.

        Raises:
            DamagedError: If the file is not what was written.
        """
        verify(Path(folder), [FILE], part=PART, advice="run the same `noisear shared-noise` command again")
        with safe_open(Path(folder) / FILE, "pt") as file:
            facts = file.metadata()
            noises, weights = file.get_tensor("noises"), file.get_tensor("weights")
        return cls(noises, weights, json.loads(facts["tried"]), facts["text_encoder"], facts["denoiser"])


def holds_shared_noises(path: str | Path) -> bool:
    """Whether a folder holds a choice of shared noises."""
    return (Path(path) / FILE).is_file()


class SharedNoiseSampler(DrawingSampler):
    """The shared noise that a prompt's words recommend, the same for every seed.

    Args:
        denoiser: Frozen diffusion model.
        shared: The noises and what decides between them.

    Raises:
        ValueError: If the noises have another shape than the denoiser's.
    """

    def __init__(self, denoiser: Denoiser, shared: SharedNoises):
        if tuple(shared.noises.shape[1:]) != tuple(denoiser.latent_shape):
            raise ValueError(
                f"these shared noises are for {shared.denoiser!r}, of shape {tuple(shared.noises.shape[1:])}; "
                f"{denoiser.name!r} takes {tuple(denoiser.latent_shape)}"
            )
        self.denoiser, self.shared = denoiser, shared
        self.features = TextFeatures(PromptReader(shared.text_encoder, denoiser), shared.tried)
        self.tried = self.features(shared.tried)  # (P, F)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, None]:
        """Noise ``(B, C, h, w)``, without denoising."""
        check_seeds(prompts, seeds)
        predicted = similarity(self.features(prompts), self.tried) @ self.shared.weights.numpy()  # (B, K)
        return self.shared.noises[predicted.argmax(1)], None
