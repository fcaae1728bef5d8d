"""The batched environment: many noises, denoised together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils import EzPickle, seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from pydantic import AfterValidator

from noisear_rl.denoisers import Denoiser
from noisear_rl.envs.noise_task import NoiseTask, Outcome, check_reset_options
from noisear_rl.envs.sharing import SharedSpec
from noisear_rl.images import to_uint8
from noisear_rl.policy.config import DENOISER
from noisear_rl.rewards import RewardLike
from noisear_rl.trust import import_module_of
from noisear_rl.wording import nearest


class NoiseVectorEnv(SharedSpec, VectorEnv, EzPickle):
    """``num_envs`` copies of :class:`~noisear_rl.envs.noise_env.NoiseEnv` that act and denoise together.

    The spaces are the scalar environment's, batched, and the same seeds give the same episodes: ``reset(seed=s)``
    seeds copy ``i`` with ``s + i``. All episodes end at the same step. What happens then is ``autoreset_mode``:

    * ``"NextStep"``: the next step starts new ones and ignores its actions. Calling ``reset`` instead is fine, too.
    * ``"SameStep"``: the last step starts new ones and returns their observation; ``info["final_obs"]`` and
      ``info["final_info"]`` hold the end, in the form of Gymnasium's ``SyncVectorEnv``.
    * ``"Disabled"``: ``reset`` does. TorchRL's ``GymWrapper`` wants this.

    ``reset(options={"prompts": [...]})`` sets the prompts, one per copy, and ``{"prompt": "..."}`` one for all. A
    ``reset_mask`` must be true for every copy, since they act in lockstep. A seed also seeds ``np_random``. The
    observations of an episode share one array of its text and one of its mask. Training calls :meth:`begin` and
    :meth:`play` instead, which give the same rewards without copies from the device.

    Attributes:
        images: The last images ``(B, 3, H, W)`` in [0, 1], or ``None`` before the first episode's end.
        denoise_seeds: Seeds of the schedulers' own noise, one per copy.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        denoiser: str | Denoiser = "shapes",
        reward: RewardLike | None = None,
        prompts: str | Sequence[str] | None = None,
        patch_size: int | Sequence[int] | None = None,
        render_mode: str | None = None,
        text_encoder: str = DENOISER,
        reward_device: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **denoiser_options: Any,
    ):
        made_of = (num_envs, denoiser, reward, prompts, patch_size, render_mode, text_encoder, reward_device)
        EzPickle.__init__(self, *made_of, autoreset_mode, **denoiser_options)
        modes = [mode.value for mode in AutoresetMode]
        if autoreset_mode not in (*AutoresetMode, *modes):
            raise ValueError(f"autoreset_mode must be one of {modes}, not {autoreset_mode!r}")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.task = NoiseTask(denoiser, reward, prompts, patch_size, text_encoder, reward_device, **denoiser_options)
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.images: torch.Tensor | None = None
        self.denoise_seeds: list[int] = []
        self._generators: list[np.random.Generator] = []
        self._step = -1

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts ``num_envs`` episodes.

        Raises:
            ValueError: If the numbers of seeds or prompts are wrong, or ``reset_mask`` leaves a copy out.
            ClosedEnvironmentError: After :meth:`close`.
        """
        text, mask = self.begin(seed, self._prompts_of(options or {}))
        self._text, self._mask = text.float().cpu().numpy(), mask.cpu().numpy().astype(np.int8)
        self._patches = np.zeros((self.num_envs, self.task.n_patches, self.task.patch_dim), np.float32)
        self._step = 0
        return self._observation(), self._info()

    def begin(
        self, seed: int | Sequence[int | None] | None = None, prompts: Sequence[str | None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts the episodes that :meth:`reset` would start, for :meth:`play`.

        Returns:
            What a policy sees: text ``(B, L, D)`` float32 and mask ``(B, L)`` bool, on the denoiser's device.
        """
        self._check_open()
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        if seed is not None or not self._generators:
            seeds: list[int | None] = [None] * self.num_envs
            if isinstance(seed, int | np.integer):
                seeds = [int(seed) + i for i in range(self.num_envs)]
            elif seed is not None:
                seeds = list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"expected {self.num_envs} seeds, got {len(seeds)}")
            self._generators = [seeding.np_random(s)[0] for s in seeds]
        prompts = [None] * self.num_envs if prompts is None else prompts
        if len(prompts) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} prompts, got {len(prompts)}")
        drawn = [self.task.draw(rng, prompt) for rng, prompt in zip(self._generators, prompts, strict=True)]
        self._prompts, self.denoise_seeds = [prompt for prompt, _ in drawn], [s for _, s in drawn]
        self._conditioning = self.task.denoiser.encode(self._prompts)
        self._step, self.images = -1, None
        return self.task.reader.read(self._conditioning)

    def play(self, actions: torch.Tensor) -> Outcome:
        """Takes all steps of the episodes that :meth:`begin` started: nothing is observed between them.

        The rewards are those of :meth:`step`, but no observation leaves the device.

        Args:
            actions: ``(B, N, A)`` finite patches, on any device; clipped like actions.

        Raises:
            ValueError: If the shape is wrong, or a value is NaN or infinite.
        """
        expected = (self.num_envs, self.task.n_patches, self.task.patch_dim)
        if tuple(actions.shape) != expected:
            raise ValueError(f"expected patches {expected}, got {tuple(actions.shape)}")
        if not actions.isfinite().all():
            raise ValueError("action holds NaN or infinite values")
        outcome = self.task.finish(actions, self._conditioning, self._prompts, self.denoise_seeds)
        self.images = outcome.images
        return outcome

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Appends a patch to every noise, ``(B, A)``; denoises and scores after the last one."""
        self._check_open()
        if self._step < 0:
            raise ResetNeeded("call reset() before step()")
        rewards, never = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        if self._step == self.task.n_patches and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded("the episodes are over: call reset()")
        if self._step == self.task.n_patches:  # the step after the end: new episodes
            observation, info = self.reset()
            return observation, rewards, never, never.copy(), info
        patches, clipped = self.task.check_action(actions)
        if patches.shape != self.action_space.shape:
            raise ValueError(f"expected patches {self.action_space.shape}, got {patches.shape}")
        self._patches[:, self._step] = patches
        self._step += 1
        info = self._info(clipped=clipped)
        terminated = np.full(self.num_envs, self._step == self.task.n_patches)
        if terminated[0]:
            whole = torch.from_numpy(self._patches.copy())
            outcome = self.task.finish(whole, self._conditioning, self._prompts, self.denoise_seeds)
            rewards, self.images = outcome.rewards.cpu().numpy().astype(np.float64), outcome.images
            scores = {name: values.cpu().numpy() for name, values in outcome.scores.items()}
            info |= {"noise": outcome.noise.numpy().copy(), **scores}
        if terminated[0] and self.autoreset_mode is AutoresetMode.SAME_STEP:
            last, final_info = self._observation(), info
            observation, info = self.reset()
            final_obs = np.empty(self.num_envs, dtype=object)
            final_obs[:] = [{key: values[i] for key, values in last.items()} for i in range(self.num_envs)]
            info |= _with_masks(self.num_envs, final_obs=final_obs, final_info=final_info)
            return observation, rewards, terminated, never, info
        return self._observation(), rewards, terminated, never, info

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environment is closed: make a new one")

    def _prompts_of(self, options: Mapping[str, Any]) -> Sequence[str | None]:
        """One prompt per copy, ``None`` to draw it."""
        check_reset_options(options, ("prompt", "prompts", "reset_mask"))
        if "reset_mask" in options and not np.array_equal(options["reset_mask"], np.ones(self.num_envs, dtype=bool)):
            raise ValueError(
                f"reset_mask must be ({self.num_envs},) and all true: the copies act in lockstep and end together"
            )
        prompts = options.get("prompts", [options.get("prompt")] * self.num_envs)
        if isinstance(prompts, str) or len(prompts) != self.num_envs:
            given = "one text" if isinstance(prompts, str) else len(prompts)
            raise ValueError(f"expected {self.num_envs} prompts, got {given}")
        return prompts

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One ``(H, W, 3)`` uint8 image per copy: the noise so far, or the image after the last patch."""
        if self.render_mode is None:
            return None
        if self._step < 0:
            raise ResetNeeded("call reset() before render()")
        if self.images is None:
            return tuple(self.task.noise_image(patches) for patches in self._patches)
        return tuple(to_uint8(image) for image in self.images)

    def _info(self, clipped: np.ndarray | None = None) -> dict[str, Any]:
        """Before the end: scores and noise are zero."""
        scores = {name: np.zeros(self.num_envs, np.float32) for name in self.task.score_names}
        return _with_masks(
            self.num_envs,
            prompt=np.array(self._prompts, dtype=object),
            clipped=np.zeros(self.num_envs, dtype=bool) if clipped is None else clipped,
            noise=np.zeros((self.num_envs, *self.task.denoiser.latent_shape), np.float32),
            **scores,
        )

    def _observation(self) -> dict[str, Any]:
        return {
            "patches": self._patches.copy(),
            "step": np.full(self.num_envs, self._step, dtype=np.int64),
            "text": self._text,
            "text_mask": self._mask,
        }


def _with_masks(num_envs: int, **values: Any) -> dict[str, Any]:
    """Gymnasium's form: every key has a mask ``_key`` of the copies that it is valid for."""
    return values | {f"_{key}": np.ones(num_envs, dtype=bool) for key in values}


def check_env_id(env_id: str) -> str:
    """Returns the id of a noise environment; loads no weights. ``module:id`` imports the module first.

    Raises:
        ValueError: If there is no such environment (names the nearest one), or it is none of noise.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            import_module_of(env_id)
        except ImportError as error:
            raise ValueError(f"{env_id!r:.80}: module {module!r:.80} cannot be imported: {error}") from error
    known = sorted(key for key, spec in gymnasium.registry.items() if "NoiseVectorEnv" in str(spec.vector_entry_point))
    if name not in gymnasium.registry:
        raise ValueError(f"unknown environment {env_id!r:.80}{nearest(name, known) or f'; expected one of {known}'}")
    entry = gymnasium.registry[name].vector_entry_point
    made = load_env_creator(entry) if isinstance(entry, str) else entry
    if made is None or (isinstance(made, type) and not issubclass(made, NoiseVectorEnv)):
        raise ValueError(f"{env_id!r} is no noise environment; expected one of {known}")
    return env_id


EnvId = Annotated[str, AfterValidator(check_env_id)]
"""A configuration's environment."""


def make_vector_env(env_id: str, num_envs: int, **options: Any) -> NoiseVectorEnv:
    """``gymnasium.make_vec`` of a noise environment, denoised in one batch; options that are ``None`` are left out."""
    check_env_id(env_id)
    given = {key: value for key, value in options.items() if value is not None}
    made = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **given)
    if not isinstance(made.unwrapped, NoiseVectorEnv):
        raise ValueError(f"{env_id!r} is not a noise environment; expected one such as 'NoiseAR-Shapes-v0'")
    return made.unwrapped
