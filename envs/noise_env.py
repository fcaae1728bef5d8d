"""The scalar environment: one noise, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import EzPickle

from noisear_rl.denoisers import Denoiser
from noisear_rl.envs.noise_task import NoiseTask, check_reset_options
from noisear_rl.envs.sharing import SharedSpec
from noisear_rl.images import to_uint8
from noisear_rl.policy.config import DENOISER
from noisear_rl.rewards import RewardLike


class NoiseEnv(SharedSpec, gymnasium.Env, EzPickle):
    """Choosing the initial noise of a diffusion model, one patch per step.

    ## Description
    A prompt is drawn. The agent emits the noise in raster order, one patch per step. After the last patch a
    frozen diffusion model denoises it, and scorers turn the image into the reward (NoiseAR, appendix D).

    ## Action Space
    ``Box(-10, 10, (A,), float32)``: a whole patch, channel first. The standard Gaussian is the usual prior.
    Values beyond the bounds are clipped (``info["clipped"]``); NaN or infinite ones raise ``ValueError``.

    ## Observation Space
    | key         | space                        | meaning                                        |
    |-------------|------------------------------|------------------------------------------------|
    | `patches`   | `Box(-10, 10, (N, A))`       | the patches so far, then zeros                 |
    | `step`      | `Discrete(N + 1)`            | number of patches so far                       |
    | `text`      | `Box(-inf, inf, (L, D))`     | the prompt as `text_encoder` reads it          |
    | `text_mask` | `Box(0, 1, (L,), int8)`      | 1 for tokens, 0 for padding                    |

    For `shapes` N = 16, A = 16, L = 16, D = 256; for SDXL N = 16, A = 4096, L = 77, D = 2048.

    ## Rewards
    0 until the last patch, then the weighted sum of the scorers.

    ## Info
    ``reset`` and every ``step`` return the same keys: ``prompt``, ``clipped`` (whether the action was), and, of the
    episode's end (zero before it), ``reward/<name>`` for each score and the ``noise`` ``(C, h, w)``.

    ## Starting State
    No patches. Prompt and denoising seed depend only on ``reset(seed=...)``;
    ``reset(options={"prompt": "..."})`` sets the prompt. ``info["prompt"]`` holds it.

    ## Episode End
    ``terminated`` at patch N. Never truncated.

    ## Arguments
    ``denoiser``, ``reward``, ``prompts``, ``patch_size``, ``text_encoder``, ``reward_device`` and the denoiser's
    options: names and numbers, so that ``env.spec`` can be serialised and the environment pickled (by its arguments,
    without the state of its episode); objects are accepted too, and shared, not copied. See
    :class:`~noisear_rl.envs.noise_task.NoiseTask`.

    ## Vectorized environment
    ``gymnasium.make_vec(id, num_envs=B)`` denoises all B noises in one batch.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        denoiser: str | Denoiser = "shapes",
        reward: RewardLike | None = None,
        prompts: str | Sequence[str] | None = None,
        patch_size: int | Sequence[int] | None = None,
        render_mode: str | None = None,
        text_encoder: str = DENOISER,
        reward_device: str | None = None,
        **denoiser_options: Any,
    ):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        made_of = (denoiser, reward, prompts, patch_size, render_mode, text_encoder, reward_device)
        EzPickle.__init__(self, *made_of, **denoiser_options)
        self.task = NoiseTask(denoiser, reward, prompts, patch_size, text_encoder, reward_device, **denoiser_options)
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space
        self.render_mode = render_mode
        self._image: torch.Tensor | None = None
        self._step = -1  # no episode yet

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; ``options={"prompt": text}`` sets its prompt."""
        super().reset(seed=seed)
        check_reset_options(options, ("prompt",))
        self._prompt, self._seed = self.task.draw(self.np_random, (options or {}).get("prompt"))
        self._conditioning = self.task.denoiser.encode([self._prompt])
        text, mask = self.task.reader.read(self._conditioning)
        self._text, self._mask = text[0].float().cpu().numpy(), mask[0].cpu().numpy().astype(np.int8)
        self._patches = np.zeros((self.task.n_patches, self.task.patch_dim), np.float32)
        self._step, self._image = 0, None
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Appends a patch ``(A,)``; denoises and scores after the last one."""
        if not 0 <= self._step < self.task.n_patches:
            raise ResetNeeded("the episode is over or has not begun: call reset()")
        patch, clipped = self.task.check_action(action)
        if patch.shape != self.action_space.shape:
            raise ValueError(f"expected one patch {self.action_space.shape}, got {patch.shape}")
        self._patches[self._step] = patch
        self._step += 1
        info = self._info(clipped=bool(clipped))
        reward, terminated = 0.0, self._step == self.task.n_patches
        if terminated:
            patches = torch.from_numpy(self._patches[None].copy())
            outcome = self.task.finish(patches, self._conditioning, [self._prompt], [self._seed])
            reward, self._image = float(outcome.rewards[0]), outcome.images[0]
            info |= {name: float(values[0]) for name, values in outcome.scores.items()}
            info["noise"] = outcome.noise[0].numpy().copy()
        return self._observation(), reward, terminated, False, info

    def render(self) -> np.ndarray | None:
        """``(H, W, 3)`` uint8: the noise so far, or the image after the last patch."""
        if self.render_mode is None:
            return None
        if self._step < 0:
            raise ResetNeeded("call reset() before render()")
        return self.task.noise_image(self._patches) if self._image is None else to_uint8(self._image)

    def _info(self, clipped: bool = False) -> dict[str, Any]:
        """Before the end: scores and noise are zero."""
        scores = dict.fromkeys(self.task.score_names, 0.0)
        noise = np.zeros(self.task.denoiser.latent_shape, np.float32)
        return {"prompt": self._prompt, "clipped": clipped, **scores, "noise": noise}

    def _observation(self) -> dict[str, Any]:
        return {
            "patches": self._patches.copy(),
            "step": np.int64(self._step),
            "text": self._text.copy(),
            "text_mask": self._mask.copy(),
        }
