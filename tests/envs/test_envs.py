import json
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import NameNotFound, ResetNeeded
from gymnasium.utils.env_checker import check_env

import noisear_rl
from noisear_rl.denoisers import EMBEDDED
from noisear_rl.envs import NoiseEnv, NoiseVectorEnv
from noisear_rl.rewards import load_reward

ID = "NoiseAR-Shapes-v0"
EMBEDDED_IDS = [ID, "NoiseAR-ShapesTurbo-v0"]
PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]


def episode(env, seed, actions=None):
    observation, info = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for i in range(env.unwrapped.task.n_patches):
        action = rng.standard_normal(env.action_space.shape, dtype=np.float32) if actions is None else actions[i]
        observation, reward, terminated, truncated, info = env.step(action)
    return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("env_id", EMBEDDED_IDS)
def test_gymnasium_checker(env_id):
    env = gymnasium.make(env_id).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Text embeddings have no bounds, and actions are in units of the Gaussian's standard deviation.
        warnings.filterwarnings("ignore", message=".*(value is (-)?infinity|symmetric and normalized space).*")
        check_env(env, skip_render_check=False)


@pytest.mark.parametrize("env_id", EMBEDDED_IDS)
def test_stable_baselines3_checker(env_id):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(gymnasium.make(env_id), warn=False)


def test_make_by_module_prefix_and_spec_serialises():
    env = gymnasium.make(f"noisear_rl:{ID}", prompts=PROMPTS, dtype="float32", guidance_scale=2.0)
    assert env.spec is not None
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert json.loads(env.spec.to_json())["kwargs"]["guidance_scale"] == 2.0
    assert episode(env, 3)[1] == episode(again, 3)[1]


def test_registering_imports_no_heavy_library():
    code = "import noisear_rl, sys; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_episode():
    env = NoiseEnv(prompts=PROMPTS, render_mode="rgb_array", dtype="float32")
    observation, info = env.reset(seed=1)
    assert observation["patches"].shape == (16, 16) and not observation["patches"].any()
    assert info["prompt"] in PROMPTS
    for i in range(16):
        before = observation["patches"]
        observation, reward, terminated, truncated, info = env.step(np.full(16, i / 10, np.float32))
        assert observation["patches"] is not before  # fresh arrays
        assert observation["step"] == i + 1 and not truncated
        assert (observation["patches"][: i + 1, 0] == np.arange(i + 1, dtype=np.float32) / 10).all()
        assert terminated == (i == 15) and (i == 15 or reward == 0)
        assert env.observation_space.contains(observation)
        image = env.render()
        assert image is not None and image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert info["noise"].shape == (4, 8, 8) and info["reward/shapes-match"] == pytest.approx(reward)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(16, np.float32))


def test_same_seed_same_episode_and_prompt_option():
    env, other = (NoiseEnv(dtype="float32") for _ in range(2))
    a, b = episode(env, 7), episode(other, 7)
    assert a[1] == b[1] and a[4]["prompt"] == b[4]["prompt"]
    assert {episode(env, s)[4]["prompt"] for s in range(4)} != {a[4]["prompt"]}
    assert env.reset(seed=7, options={"prompt": "a photo of a cross"})[1]["prompt"] == "a photo of a cross"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("auto", 0.05)])
def test_scalar_and_vector_agree(dtype, tolerance):
    envs = gymnasium.make_vec(ID, num_envs=3, vectorization_mode="vector_entry_point", dtype=dtype)
    assert isinstance(envs, NoiseVectorEnv)
    scalar = NoiseEnv(dtype=dtype)
    actions = np.random.default_rng(0).standard_normal((16, 3, 16), dtype=np.float32)
    for round_ in range(2):  # the second round follows an autoreset
        observations, infos = envs.reset(seed=11) if round_ == 0 else envs.step(actions[0])[::4]
        for i in range(3):
            if round_ == 0:
                scalar.reset(seed=11 + i)
            else:
                scalar.reset(seed=11 + i)
                scalar.reset()
            for patch in range(16):
                observation, reward, terminated, _, info = scalar.step(actions[patch, i])
            if i == 0:
                for patch in range(16):
                    observations, rewards, terminations, truncations, infos = envs.step(actions[patch])
            assert infos["prompt"][i] == info["prompt"]
            assert rewards[i] == pytest.approx(reward, abs=tolerance)
            np.testing.assert_array_equal(observations["patches"][i], observation["patches"])
            np.testing.assert_allclose(infos["noise"][i], info["noise"])
        assert terminations.all() and not truncations.any()
        assert envs.observation_space.contains(observations)


def test_vector_reward_does_not_depend_on_the_batch(shapes):
    actions = np.random.default_rng(0).standard_normal((16, 5, 16), dtype=np.float32)
    rewards = []
    for size in (5, 2):
        envs = NoiseVectorEnv(size, denoiser=shapes)
        envs.reset(seed=0)
        for patch in actions:
            result = envs.step(patch[:size])
        rewards.append(result[1][:2])
    np.testing.assert_allclose(rewards[0], rewards[1], atol=1e-3)


def test_clipping_is_reported():
    env = NoiseEnv(prompts=PROMPTS)
    env.reset(seed=0)
    observation, *_, info = env.step(np.full(16, 12.0, np.float32))
    assert info["clipped"] and (observation["patches"][0] == 10).all()
    assert not env.step(np.zeros(16, np.float32))[-1]["clipped"]


@pytest.mark.parametrize("make", [NoiseEnv, lambda **options: NoiseVectorEnv(2, **options)])
def test_bad_input(make, tmp_path):
    env = make(prompts=PROMPTS)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(env.action_space.shape, np.float32))
    env.reset(seed=0)
    bad = np.zeros(env.action_space.shape, np.float32)
    bad[..., 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        env.step(bad)
    with pytest.raises(ValueError, match="expected a patch of 16 numbers"):
        env.step(np.zeros(15, np.float32))
    for empty in [{"prompt": " "}, *([{"prompts": [" ", " "]}] if isinstance(env, NoiseVectorEnv) else [])]:
        with pytest.raises(ValueError, match="empty prompt"):
            env.reset(options=empty)
    for options, error, message in (
        ({"prompts": []}, ValueError, "non-empty list"),
        ({"prompts": [""]}, ValueError, "non-empty strings"),
        ({"prompts": str(tmp_path / "none.txt")}, FileNotFoundError, "neither a file"),
        ({"denoiser": "sd15"}, ValueError, "unknown denoiser"),
        ({"reward": "beauty"}, ValueError, "unknown reward"),
        ({"patch_size": 3}, ValueError, "does not divide"),
        ({"steps": 3}, ValueError, r"unknown denoiser option 'steps'"),
        ({"render_mode": "human"}, ValueError, "render_mode"),
        ({"dtype": "int8"}, ValueError, "unknown dtype"),
    ):
        with pytest.raises(error, match=message):
            make(**options)


def test_unknown_id_and_missing_weights(monkeypatch):
    with pytest.raises(NameNotFound):
        gymnasium.make("NoiseAR-Shape-v0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    needs_weights = [name for name, denoiser in noisear_rl.ENVIRONMENTS.items() if denoiser not in EMBEDDED]
    assert len(needs_weights) == 17
    for name in needs_weights:
        with pytest.raises(FileNotFoundError, match="not on this machine and could not be fetched"):
            gymnasium.make(name, reward="brightness")
        with pytest.raises(ValueError, match="'a red cube on top of a blue sphere' is not a caption"):  # said first
            gymnasium.make(name, reward="shapes-match")


def test_objects_are_accepted(shapes):
    env = NoiseEnv(denoiser=shapes, reward=load_reward({"shapes-match": 1.0, "shapes-clip": 0.01}), prompts=PROMPTS)
    _, reward, *_, info = episode(env, 0)
    assert reward == pytest.approx(info["reward/shapes-match"] + 0.01 * info["reward/shapes-clip"], abs=1e-5)


def test_large_model_path_on_random_weights(random_denoiser):
    env = NoiseEnv(denoiser=random_denoiser, reward="shapes-match", prompts=PROMPTS)
    _, reward, terminated, _, info = episode(env, 0)
    assert terminated and np.isfinite(reward) and torch.isfinite(torch.from_numpy(info["noise"])).all()


def test_a_whole_episode_at_once_is_the_same(shapes):
    """What training calls gives the text, rewards, scores, noise and images of single steps."""
    envs = NoiseVectorEnv(3, denoiser=shapes, reward={"shapes-match": 1.0, "brightness": 0.5})
    prompts = envs.task.prompts[:3]
    actions = 4 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))  # some are clipped
    observation, _ = envs.reset(seed=5, options={"prompts": prompts})
    for patch in range(16):
        after, rewards, *_, info = envs.step(actions[:, patch].numpy())
    images, seeds = envs.images, envs.denoise_seeds
    text, mask = envs.begin(5, prompts)
    assert np.array_equal(text.numpy(), observation["text"]) and np.array_equal(mask.numpy(), observation["text_mask"])
    outcome = envs.play(actions)
    assert actions.abs().max() > 10 and np.array_equal(outcome.patches.numpy(), after["patches"])
    assert outcome.rewards.tolist() == rewards.tolist() and np.array_equal(outcome.noise.numpy(), info["noise"])
    assert {key: values.tolist() for key, values in outcome.scores.items()} == {
        key: info[key].tolist() for key in ("reward/shapes-match", "reward/brightness")
    }
    assert torch.equal(envs.images, images) and envs.denoise_seeds == seeds
    for bad, message in ((actions[:, :15], "expected patches"), (actions * torch.nan, "NaN or infinite")):
        with pytest.raises(ValueError, match=message):
            envs.play(bad)
    with pytest.raises(ResetNeeded):
        envs.step(actions[:, 0].numpy())  # begun for play, not for steps
