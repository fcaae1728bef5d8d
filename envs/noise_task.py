"""What the scalar and the batched environment share: spaces, prompts, and the end of an episode.

Shapes: ``B`` episodes, ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from noisear_rl.config import UnknownOptionError
from noisear_rl.denoisers import EMBEDDED, Conditioning, Denoiser, check_denoiser, load_denoiser, policy_sizes, require
from noisear_rl.images import noise_to_uint8
from noisear_rl.patches import own_patch_size, sequence_shape, unpatchify
from noisear_rl.policy.config import DENOISER
from noisear_rl.prompts import resolve_prompts
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import RewardLike, load_reward
from noisear_rl.wording import nearest

ACTION_BOUND = 10.0


@dataclass
class Outcome:
    """The results of ``B`` finished episodes.

    Attributes:
        rewards: ``(B,)`` float32; NaN where a scorer failed.
        scores: Every scorer's own ``(B,)`` score as ``reward/<name>``.
        patches: ``(B, N, A)`` float32, clipped to the bounds of actions, where they were given.
        noise: ``(B, C, *spatial)`` float32, the same in the form of latents.
        images: ``(B, 3, H, W)`` float32 in [0, 1], or ``(B, T, 3, H, W)`` of videos.
    """

    rewards: torch.Tensor
    scores: dict[str, torch.Tensor]
    patches: torch.Tensor
    noise: torch.Tensor
    images: torch.Tensor


FOREIGN = ("minari_autoseed",)  # options of `reset` that other libraries read, but also hand on


def check_reset_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> None:
    """Refuses options of ``reset`` that nothing reads.

    Raises:
        ValueError: If there are any; names one and the nearest known name.
    """
    for key in (options or {}).keys() - {*known, *FOREIGN}:
        raise ValueError(f"unknown option {key!r} of reset{nearest(str(key), known)}; expected some of {list(known)}")


class NoiseTask:
    """A denoiser, a reward and prompts, seen as an episodic task.

    Args:
        denoiser: Name or object.
        reward: Name, weights by name, scorer, or function of images ``(B, 3, H, W)`` and prompts; ``None`` for the
            denoiser's default.
        prompts: Prompts, a prompt file, a published set or a split, as :func:`noisear_rl.prompts.resolve_prompts`
            takes them; ``None`` for the training captions (``shapes``) or a few examples (others).
        patch_size: Patch side, or one per spatial axis; ``None`` for the denoiser's own.
        text_encoder: What observations give of the prompt, as in the policy's configuration
            (:class:`~noisear_rl.policy.NoiseARConfig`).
        reward_device: Device of the scorers, such as ``cuda:1``, for a reward given by name; see
            :func:`noisear_rl.rewards.load_reward`.
        **denoiser_options: See :func:`noisear_rl.denoisers.load_denoiser`; for names only.

    Raises:
        ValueError: If a name is unknown, there is no prompt, or a scorer cannot judge one.
        UnknownOptionError: If an option is unknown, or was given to an object; a ``TypeError`` and a ``ValueError``.
        FileNotFoundError: If weights or the prompt file are missing.
    """

    def __init__(
        self,
        denoiser: str | Denoiser,
        reward: RewardLike | None = None,
        prompts: str | Sequence[str] | None = None,
        patch_size: int | Sequence[int] | None = None,
        text_encoder: str = DENOISER,
        reward_device: str | None = None,
        **denoiser_options: Any,
    ):
        # What is wrong is said before anything is loaded.
        name = check_denoiser(denoiser) if isinstance(denoiser, str) else getattr(denoiser, "name", "")
        if denoiser_options and not isinstance(denoiser, str):
            raise UnknownOptionError(
                f"unexpected keyword argument {min(denoiser_options)!r}: options {sorted(denoiser_options)} belong to "
                "a denoiser given by name"
            )
        self.prompts = resolve_prompts(prompts, name).prompts
        if reward is None:
            if name not in EMBEDDED:
                raise ValueError(f"denoiser {name!r} has no default reward; name one: reward=...")
            reward = "shapes-match"
        if reward_device and not isinstance(reward, str | Mapping):
            raise ValueError("reward_device belongs to a reward given by name")
        self.reward = load_reward(reward, device=reward_device)
        self.reward.check_prompts(self.prompts)
        self._known = frozenset(self.prompts)
        made = load_denoiser(denoiser, **denoiser_options) if isinstance(denoiser, str) else denoiser
        self.denoiser: Denoiser = require(made, Denoiser, "an environment")
        self.patch_size = own_patch_size(patch_size or self.denoiser.patch_size)
        self.n_patches, self.patch_dim = n, a = sequence_shape(self.denoiser.latent_shape, self.patch_size)
        self.reader = PromptReader(text_encoder, self.denoiser)
        self.reader.embed_all(self.prompts)
        length, width = self.reader.shape
        self.action_space = spaces.Box(-ACTION_BOUND, ACTION_BOUND, (a,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "patches": spaces.Box(-ACTION_BOUND, ACTION_BOUND, (n, a), np.float32),
                "step": spaces.Discrete(n + 1),
                "text": spaces.Box(-np.inf, np.inf, (length, width), np.float32),
                "text_mask": spaces.Box(0, 1, (length,), np.int8),  # skrl takes no MultiBinary
            }
        )

    @property
    def policy_sizes(self) -> dict[str, Any]:
        """What a policy must agree on with this task."""
        return policy_sizes(self.denoiser, self.patch_size) | self.reader.sizes

    @property
    def score_names(self) -> list[str]:
        """Keys of the scores in ``info``."""
        return [f"reward/{reward.name}" for reward, _ in self.reward.rewards]

    def __str__(self) -> str:
        return f"denoiser {self.denoiser.name!r}"

    def draw(self, np_random: np.random.Generator, prompt: str | None = None) -> tuple[str, int]:
        """Draws an episode's prompt and denoising seed; both depend only on the generator's state.

        Raises:
            ValueError: If the given prompt is no text, or none that the scorers can judge.
        """
        if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
            given = "an empty prompt" if isinstance(prompt, str) else f"{prompt!r:.80}"
            raise ValueError(f"a prompt must be text, not {given}")
        if prompt is not None and prompt not in self._known:
            self.reward.check_prompts([prompt])
        index, seed = np_random.integers(len(self.prompts)), np_random.integers(2**31)
        return self.prompts[index] if prompt is None else prompt, int(seed)

    def check_action(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clips actions ``(…, A)`` to the bounds; also returns which were clipped.

        Raises:
            ValueError: If an action has the wrong shape, is not a number or is infinite.
        """
        action = np.asarray(action)
        if action.shape[-1:] != (self.patch_dim,) or not np.issubdtype(action.dtype, np.number):
            raise ValueError(f"expected a patch of {self.patch_dim} numbers, got shape {action.shape} {action.dtype}")
        if not np.isfinite(action).all():
            raise ValueError("action holds NaN or infinite values")
        clipped = np.abs(action).max(-1) > ACTION_BOUND
        return np.clip(action, -ACTION_BOUND, ACTION_BOUND).astype(np.float32), clipped

    def finish(
        self, patches: torch.Tensor, conditioning: Conditioning, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Outcome:
        """Denoises and scores full noises ``(B, N, A)``, on any device."""
        patches = patches.float().clamp(-ACTION_BOUND, ACTION_BOUND)
        noise = unpatchify(patches, self.denoiser.latent_shape, self.patch_size)
        images = self.denoiser.denoise(noise, conditioning, seeds)
        components = self.reward.components(images, prompts)
        scores = {f"reward/{name}": values for name, values in components.items()}
        return Outcome(self.reward.total(components), scores, patches, noise, images)

    def noise_image(self, patches: np.ndarray) -> np.ndarray:
        """Shows patches ``(N, A)`` as ``(H, W, 3)`` uint8; see :func:`noisear_rl.images.noise_to_uint8`."""
        noise = unpatchify(torch.from_numpy(patches[None]), self.denoiser.latent_shape, self.patch_size)[0]
        return noise_to_uint8(noise, self.denoiser.image_size)
