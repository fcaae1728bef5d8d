"""The rows of ``bench.py`` on whole loops: rollouts, pairs, PPO beside other libraries, the natural step beside Adam's.

Shapes: ``B`` environments, ``N`` patches, ``A`` elements per patch, ``F`` observed numbers.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from timing import Seconds, interleaved  # in this folder
from torch import nn

from noisear_rl.algos import ppo
from noisear_rl.data.weak_to_strong import network_evaluations, weak_to_strong
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.envs import NoiseVectorEnv, make_vector_env
from noisear_rl.gaussian import standard_noise

HARD = tuple((Path(__file__).parent / "hard_captions.txt").read_text().splitlines()[:4])
ENVS, PAIRS, SAMPLES = 256, 128, 64
TIMED, GAIN, WIDTH = "NoiseAR-Timed-v0", 0.2, 104  # with this width, the others' networks are as large as ours


def rollouts(repeats: int) -> Seconds:
    """CPU seconds of a rollout, and of denoising and scoring the same noises alone."""
    envs = make_vector_env("NoiseAR-ShapesTurbo-v0", ENVS)
    task, prompts = envs.task, [caption.text for caption in balanced_captions("train", ENVS)]
    seeds = list(range(ENVS))
    noise, conditioning = standard_noise(seeds, task.denoiser.latent_shape), task.denoiser.encode(prompts)
    actions = np.random.default_rng(0).standard_normal((task.n_patches, ENVS, task.patch_dim), np.float32)

    def rollout() -> None:
        envs.reset(seed=seeds, options={"prompts": prompts})
        for action in actions:
            envs.step(action)

    bare = lambda: task.reward.score(task.denoiser.denoise(noise, conditioning, seeds), prompts)
    return interleaved({"rollout": rollout, "bare": bare}, repeats, "rollouts")


@torch.inference_mode()
def pairs(repeats: int) -> Seconds:
    """CPU seconds of weak-to-strong pairs, and of the UNet alone on as many inputs."""
    denoiser = load_denoiser("shapes")
    assert isinstance(denoiser, DiffusionPipelineDenoiser)
    prompts = [caption.text for caption in balanced_captions("train", PAIRS)]
    noise, conditioning = standard_noise(range(PAIRS), denoiser.latent_shape), denoiser.encode(prompts)
    denoiser.micro_batch_size = PAIRS
    recorded: list[tuple[Any, Any]] = []
    hook = denoiser.network.register_forward_pre_hook(lambda _, *given: recorded.append(given), with_kwargs=True)
    weak_to_strong(denoiser, noise, conditioning)
    hook.remove()
    assert sum(len(arguments[0]) for arguments, _ in recorded) == network_evaluations() * PAIRS

    def bare() -> None:
        with denoiser._autocast():
            for arguments, options in recorded:
                denoiser.network(*arguments, **options)

    return interleaved({"pairs": lambda: weak_to_strong(denoiser, noise, conditioning), "bare": bare}, repeats, "pairs")


class Reached(Exception):
    """Returns rose as far as asked."""


class TimedEnv(NoiseVectorEnv):
    """Counts the CPU seconds that environments take, and remembers when and with which returns episodes ended.

    Attributes:
        goal: How far returns must rise to end the training; ``None`` for never.
        spent: CPU seconds in the environments.
        returns: Mean return of each batch of episodes.
        ended: CPU seconds outside the environments at each batch's end.
    """

    made: list[TimedEnv] = []
    goal: float | None = None

    def __init__(self, num_envs: int = 1, **options: Any):
        super().__init__(num_envs, "shapes-turbo", **options)
        self.spent, self.began, self.inside = 0.0, time.process_time(), False
        self.returns, self.ended = list[float](), list[float]()
        self.made.append(self)

    def timed(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.inside:  # one method calls another
            return call(*args, **options)
        self.inside, began = True, time.process_time()
        result = call(*args, **options)
        self.inside, self.spent = False, self.spent + time.process_time() - began
        return result

    @property
    def outside(self) -> float:
        """CPU seconds spent outside the environments since they were made."""
        return time.process_time() - self.began - self.spent

    def reset(self, **options: Any) -> Any:
        return self.timed(super().reset, **options)

    def begin(self, *args: Any, **options: Any) -> Any:
        return self.timed(super().begin, *args, **options)

    def step(self, actions: np.ndarray) -> Any:
        result = self.timed(super().step, actions)
        if result[2][0]:
            self.note(result[1])
        return result

    def play(self, actions: torch.Tensor) -> Any:
        outcome = self.timed(super().play, actions)
        self.note(outcome.rewards)
        return outcome

    def note(self, rewards: Any) -> None:
        """Remembers the end of a batch of episodes."""
        self.returns.append(float(rewards.mean()))
        self.ended.append(self.outside)
        if self.goal is not None and self.returns[-1] >= self.returns[0] + self.goal:
            raise Reached


def ours(updates: int, goal: float | None = None, **options: Any) -> TimedEnv:
    """Trains our PPO, until returns rose by ``goal``; returns its environments."""
    TimedEnv.goal = goal
    if TIMED not in gymnasium.registry:
        gymnasium.register(TIMED, vector_entry_point=TimedEnv)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Reached):
        config = ppo.PPOConfig(
            TIMED,
            prompts=HARD,
            output_dir=Path(folder) / "run",
            updates=updates,
            prompts_per_update=len(HARD),
            samples_per_prompt=SAMPLES,
            save_every=updates,
            **options,
        )
        ppo.train(config)
    return TimedEnv.made[-1]


def stable_baselines3(updates: int, seed: int = 0) -> TimedEnv:
    """Trains Stable-Baselines3's PPO with its defaults; returns the environments."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        """Our environments as theirs."""

        def __init__(self, envs: TimedEnv):
            self.envs = envs
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

        def reset(self) -> Any:
            return self.envs.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            observation, rewards, ended, *_ = self.envs.step(self.actions)
            infos: list[dict[str, Any]] = [{} for _ in rewards]
            if ended[0]:
                observation = self.reset()
            return observation, rewards.astype(np.float32), ended, infos

        def close(self) -> None:
            self.envs.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self.envs, attr_name, None)] * self.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * self.num_envs

    envs = TimedEnv(len(HARD) * SAMPLES, prompts=HARD)
    steps = envs.task.n_patches
    network = {"net_arch": [WIDTH, WIDTH]}
    model = PPO(
        "MultiInputPolicy", Adapter(envs), n_steps=steps, gamma=1.0, policy_kwargs=network, seed=seed, device="cpu"
    )
    model.learn(updates * steps * envs.num_envs)
    return envs


def torch_rl(updates: int, seed: int = 0) -> TimedEnv:
    """Trains with TorchRL's modules and the epochs and minibatches of Stable-Baselines3's defaults."""
    from tensordict import TensorDict
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.manual_seed(seed)
    envs = TimedEnv(len(HARD) * SAMPLES, prompts=HARD)
    steps, count, width = envs.task.n_patches, envs.num_envs, envs.task.patch_dim

    def flat(observation: dict[str, np.ndarray]) -> torch.Tensor:
        """``(B, F)``."""
        step = np.eye(steps + 1, dtype=np.float32)[observation["step"]]
        parts = [observation["patches"].reshape(count, -1), step, observation["text"].reshape(count, -1)]
        return torch.from_numpy(np.concatenate([*parts, observation["text_mask"].astype(np.float32)], 1))

    observation = flat(envs.reset(seed=seed)[0])
    inputs = observation.shape[1]
    layers = {"num_cells": [WIDTH, WIDTH], "activation_class": nn.Tanh}
    mean_and_scale = MLP(inputs, 2 * width, **layers)
    nn.init.zeros_(mean_and_scale[-1].weight)  # starts as N(0, I), as ours does
    body = nn.Sequential(mean_and_scale, NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=torch.distributions.Normal,
        distribution_kwargs={},
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(inputs, 1, **layers), in_keys=["observation"])
    advantage, loss = GAE(gamma=1.0, lmbda=0.95, value_network=critic), ClipPPOLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    for _ in range(updates):
        rows = []
        for _ in range(steps):
            with torch.no_grad():
                row = actor(TensorDict({"observation": observation}, [count]))
            following, rewards, ended, *_ = envs.step(row["action"].numpy())
            done = torch.from_numpy(ended)[:, None]
            reward = torch.from_numpy(rewards).float()[:, None]
            observation = flat(following)
            after = {"observation": observation, "reward": reward, "done": done, "terminated": done}
            row["next"] = TensorDict(after, [count])
            rows.append(row)
        batch = torch.stack(rows, 1)  # (B, N)
        with torch.no_grad():
            advantage(batch)
        batch = batch.reshape(-1)
        for _ in range(10):
            for part in torch.randperm(len(batch)).split(64):
                values = loss(batch[part])
                optimizer.zero_grad()
                (values["loss_objective"] + values["loss_critic"] + values["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        observation = flat(envs.reset()[0])
    return envs


def ppo_beside_others(updates: int, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """By library and training seed: CPU seconds per image outside the environments, and the mean return at the end."""
    libraries = {"ours": lambda u, s: ours(u, seed=s), "Stable-Baselines3": stable_baselines3, "TorchRL": torch_rl}
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "return": []} for name in libraries}
    for seed in seeds:
        for name, train in libraries.items():
            envs = train(updates, seed)
            found[name]["seconds"].append(envs.outside / (updates * envs.num_envs))
            found[name]["return"].append(envs.returns[-1])
            print(name, found[name], flush=True)
    return found


def natural_beside_adam(updates: int, seeds: Sequence[int], rates: Sequence[float]) -> dict[str, list[list[float]]]:
    """By optimiser and training seed: CPU seconds, environments included, until the return rose by :data:`GAIN`.

    Also the number of updates. Where it never did within ``updates``, all of them and their seconds, marked by a 0.
    """
    ways: dict[str, dict[str, Any]] = {"natural": {}}
    ways |= {f"adam {rate:g}": {"optimizer": "adam", "learning_rate": rate} for rate in rates}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for seed in seeds:
        for name, options in ways.items():
            envs = ours(updates, GAIN, seed=seed, step="fixed", **options)  # small first steps would delay both
            rose = envs.returns[-1] >= envs.returns[0] + GAIN
            found[name].append([envs.ended[-1] + envs.spent, len(envs.returns) - 1, float(rose)])
            print(name, found[name][-1], np.round(envs.returns, 2).tolist(), flush=True)
    return found
