"""Denoisers of other people: what each feature asks of them, how they are named, and latents that are no images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import noisear_rl  # noqa: F401
from noisear_rl.algos import collect, dpo, evaluate, nll, ppo, reinforce
from noisear_rl.config import ConfigError, load_yaml
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.data.shared_noise import SharedNoiseConfig
from noisear_rl.data.shared_noise import build_pairs as share_noise
from noisear_rl.denoisers import (
    Denoiser,
    DifferentiableDenoiser,
    LatentDenoiser,
    NoisePredictor,
    load_denoiser,
    require,
)
from noisear_rl.gaussian import standard_noise
from noisear_rl.images import load_png, save_png
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, load_policy
from noisear_rl.rewards import WeightedReward, load_reward
from noisear_rl.sample import SampleConfig, sample
from noisear_rl.samplers.reno import Reno
from noisear_rl.samplers.search import ZerothOrderSearch
from noisear_rl.samplers.simple import GaussianSampler
from noisear_rl.trust import UntrustedCodeError, values_from

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROMPTS = ("bright sky", "a dark sea", "grey")
NAME = "own_denoiser:OwnDenoiser"
NAMES = (NAME, "other_latents:Signal", "other_latents:Video")
SMALL = NoiseARConfig(d_model=32, d_ff=32, n_heads=4, n_layers=1, log_variance="fixed")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_the_example_is_short():
    assert len((EXAMPLES / "own_denoiser.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_environment(name):
    """By name and by object; the noise is shown, and the image after it; the batched environment agrees."""
    env = gymnasium.make("NoiseAR-Shapes-v0", denoiser=name, reward="brightness", render_mode="rgb_array")
    observation, info = env.reset(seed=3, options={"prompt": PROMPTS[0]})
    assert observation["text"].shape == (8, 16) and observation["text_mask"].sum() == 2
    rng, patches = np.random.default_rng(0), []
    for _ in range(env.unwrapped.task.n_patches):
        size = env.unwrapped.task.denoiser.image_size
        assert env.render().shape == (size, size, 3)
        patches.append(rng.standard_normal(env.action_space.shape, dtype=np.float32))
        _, reward, terminated, _, info = env.step(patches[-1])
    denoiser = load_denoiser(name)
    noise = torch.from_numpy(info["noise"])[None]
    assert tuple(noise.shape[1:]) == denoiser.latent_shape and terminated
    assert torch.equal(patchify(noise, denoiser.patch_size)[0], torch.from_numpy(np.stack(patches)))
    images = denoiser.denoise(noise, denoiser.encode(PROMPTS[:1]))
    assert reward == pytest.approx(load_reward("brightness").score(images, PROMPTS[:1]).item(), abs=1e-5)
    assert env.render().ndim == 3
    envs = gymnasium.make_vec(
        "NoiseAR-Shapes-v0",
        2,
        vectorization_mode="vector_entry_point",
        denoiser=denoiser,
        reward="brightness",
        text_encoder="denoiser",
    )
    envs.unwrapped.begin(0, PROMPTS[:2])
    played = envs.unwrapped.play(torch.from_numpy(np.stack([patches, patches])))
    assert played.rewards[0].item() == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop(name, tmp_path):
    """PPO learns, its policy scores what it samples; rollouts, DPO, evaluation and sampling go on from there."""
    shared = {"denoiser": name, "reward": "brightness", "prompts": PROMPTS}
    sizes = {"prompts_per_update": 3, "samples_per_prompt": 32, "updates": 5, "step": "fixed", "target_kl": 3.0}
    ppo.train(ppo.PPOConfig(output_dir=tmp_path / "ppo", policy=SMALL, **sizes, **shared))
    records = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    rewards = [record["charts/episodic_return"] for record in records]
    assert rewards[-1] > rewards[0] + 0.005  # at least five standard errors of Gaussian noise

    policy, denoiser = load_policy(tmp_path / "ppo"), load_denoiser(name)
    text = denoiser.encode(PROMPTS)
    drawn = policy.sample(text.policy_embeds, text.policy_mask, seeds=[1, 2, 3])
    again = policy.log_prob(drawn.patches, text.policy_embeds, text.policy_mask)
    torch.testing.assert_close(again, drawn.log_prob, rtol=1e-4, atol=1e-3)

    rollouts = {"num_prompts": 3, "samples_per_prompt": 4, "prompts_per_shard": 3, "save_images": True}
    folder = tmp_path / "rollouts"
    collect.collect(collect.CollectConfig(output_dir=folder, policy=str(tmp_path / "ppo"), **rollouts, **shared))
    found = load_rollouts(folder)
    assert found.manifest["denoiser"] == name and found.patches().shape[1:] == (policy.n_patches, policy.patch_dim)
    made = {"rollouts": folder, "init_from": str(tmp_path / "ppo"), "threshold": 0.0, "epochs": 1, "batch_size": 2}
    with pytest.raises(UntrustedCodeError, match=name):  # the folder may come from somebody else
        dpo.train(dpo.DPOConfig(output_dir=tmp_path / "no", **made))
    os.environ["NOISEAR_TRUST_CODE"] = "1"
    try:
        dpo.iterate(dpo.DPOConfig(output_dir=tmp_path / "dpo", rounds=2, **made))
    finally:
        del os.environ["NOISEAR_TRUST_CODE"]
    assert (tmp_path / "dpo/round-1/rollouts/manifest.json").is_file()

    rows = evaluate.run(
        evaluate.EvaluateConfig(
            (f"ppo={tmp_path / 'ppo'}", "best-of-2"),
            name,
            str(write_prompts(tmp_path)),
            samples=2,
            scorers=("brightness",),
            choose_by="jpeg-compressibility",
            output_dir=tmp_path / "evaluation",
        )
    )
    assert "| ppo |" in rows and "| best of 2 |" in rows
    drawn = {"policy": str(tmp_path / "ppo"), "output_dir": tmp_path / "sample"}
    assert sample(SampleConfig(PROMPTS[:1], denoiser=name, **drawn)).is_file()


def test_black_box_algorithms_only_need_encode_and_denoise(tmp_path):
    denoiser, reward = load_denoiser(NAME), load_reward("brightness")
    assert isinstance(denoiser, Denoiser)
    assert not isinstance(denoiser, NoisePredictor | DifferentiableDenoiser | LatentDenoiser)
    assert (denoiser.nfe, denoiser.revision, denoiser.name) == (1, "unknown", NAME)
    search = ZerothOrderSearch(GaussianSampler(denoiser), denoiser, reward, iterations=1, neighbours=2)
    assert search(PROMPTS, [1, 2, 3]).noise.shape == (3, 4, 8, 8)
    options = {"denoiser": NAME, "reward": "brightness", "prompts": PROMPTS, "policy": SMALL, "updates": 1}
    reinforce.train(reinforce.ReinforceConfig(output_dir=tmp_path / "run", samples_per_prompt=4, **options))


def test_features_name_what_they_need(tmp_path):
    denoiser, reward = load_denoiser(NAME), load_reward("brightness")
    needs = r"needs a denoiser with {} \(noisear_rl\.denoisers\.{}\), and 'own_denoiser:OwnDenoiser' has none"
    with pytest.raises(ValueError, match="ReNO " + needs.format("denoise_differentiably", "DifferentiableDenoiser")):
        Reno(GaussianSampler(denoiser), denoiser, reward)
    pairs = PairsConfig(NAME, prompts=PROMPTS, output_dir=tmp_path / "pairs")
    lacks = needs.format("first_order_schedule, predict_noise", "NoisePredictor")
    with pytest.raises(ValueError, match=f"weak_to_strong {lacks}"):
        build_pairs(pairs)
    leaks = needs.format("denoise_with_latents, signal_level", "LatentDenoiser")
    with pytest.raises(ValueError, match=f"signal_leak {leaks}"):
        build_pairs(PairsConfig(NAME, "signal_leak", PROMPTS, tmp_path / "pairs", filter_reward="brightness"))
    tried = {"denoiser": NAME, "reward": "brightness", "prompts": PROMPTS, "same_noise": True, "num_prompts": 3}
    collect.collect(collect.CollectConfig(output_dir=tmp_path / "tried", samples_per_prompt=4, **tried))
    with pytest.raises(ValueError, match=f"target: leak {leaks}"):
        share_noise(SharedNoiseConfig(tmp_path / "tried", target="leak"), denoiser)
    with pytest.raises(ValueError, match="an environment needs a denoiser with denoise, encode, guidance_scale"):
        gymnasium.make("NoiseAR-Shapes-v0", denoiser=object(), reward="brightness")
    with pytest.raises(TypeError, match="denoise"):
        type("Half", (Denoiser,), {"encode": None})()
    assert require(denoiser, Denoiser, "a test") is denoiser


def test_noises_shared_by_prompts_need_no_more(tmp_path):
    """The noises themselves as targets, and NLL on them."""
    tried = {"denoiser": NAME, "reward": "brightness", "prompts": PROMPTS, "same_noise": True, "num_prompts": 3}
    collect.collect(collect.CollectConfig(output_dir=tmp_path / "tried", samples_per_prompt=4, **tried))
    share_noise(SharedNoiseConfig(tmp_path / "tried", noises=2, output_dir=tmp_path / "shared"), load_denoiser(NAME))
    made = nll.NLLConfig(tmp_path / "shared", output_dir=tmp_path / "nll", denoiser=NAME, epochs=1, policy=SMALL)
    assert nll.train(made).config.latent_shape == (4, 8, 8)


def test_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'own_denoiser:Other' cannot be imported: .*PYTHONPATH"):
        load_denoiser("own_denoiser:Other")
    with pytest.raises(ValueError, match=r"'nowhere:Own' cannot be imported"):
        load_denoiser("nowhere:Own")
    with pytest.raises(ValueError, match=r"with options \['speed'\]: .*argument"):
        load_denoiser(NAME, speed="2")
    with pytest.raises(ValueError, match=r"unknown denoiser 'sdxll'.*module:Class.*'sdxl'"):
        load_denoiser("sdxll")
    with pytest.raises(ConfigError, match="cannot be imported"):
        ppo.PPOConfig(denoiser="own_denoiser:Other")
    with values_from(tmp_path / "preset.yaml"), pytest.raises(UntrustedCodeError, match="trust-code"):
        load_denoiser(NAME)
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"denoiser: {NAME}\n")
    with pytest.raises(UntrustedCodeError, match=r"preset\.yaml names code to run, 'own_denoiser:OwnDenoiser'"):
        load_yaml(ppo.PPOConfig, preset)


def test_entry_points(tmp_path, monkeypatch):
    """An installed package offers a denoiser by a name of its own; installing it is trusting it."""
    package = tmp_path / "own-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[noisear_rl.denoisers]\nmine = own_denoiser:OwnDenoiser\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_denoiser("mine").name == "mine"
    preset = tmp_path / "preset.yaml"
    preset.write_text("denoiser: mine\n")
    assert load_yaml(ppo.PPOConfig, preset).denoiser == "mine"
    with pytest.raises(ValueError, match=r"expected one of \[.*'mine'.*\]"):
        load_denoiser("unknown")


def test_files_of_the_current_folder(tmp_path, monkeypatch):
    """An installed command does not look there by itself, `python -m` does."""
    source = (EXAMPLES / "own_denoiser.py").read_text()
    (tmp_path / "of_this_folder.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = list(sys.path)
    assert load_denoiser("of_this_folder:OwnDenoiser").latent_shape == (4, 8, 8) and sys.path == before
    monkeypatch.delitem(sys.modules, "of_this_folder")


def test_the_command_line(tmp_path):
    """The line of the example's docstring, in a small size."""
    line = (EXAMPLES / "own_denoiser.py").read_text().splitlines()[2]
    assert line.startswith("PYTHONPATH=examples noisear ppo --denoiser own_denoiser:OwnDenoiser")
    arguments = ["ppo", "--denoiser", NAME, "--reward", "brightness", "--prompts", "dark sea", "--updates", "1"]
    arguments += ["--samples-per-prompt", "4", "--output-dir", str(tmp_path / "run")]
    script = f"from noisear_rl.cli import main\nmain({arguments!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/checkpoints").is_dir()


def write_prompts(folder):
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


class Frames:
    name, takes_frames = "frames", True

    def score(self, images, prompts):
        return (images[:, -1] - images[:, 0]).mean((1, 2, 3))


class Echo:
    """Whether the first pixel is the prompt's length: which frame belongs to which prompt."""

    name = "echo"

    def score(self, images, prompts):
        return images[:, 0, 0, 0] * torch.tensor([len(prompt) for prompt in prompts])


def test_rewards_of_videos():
    videos = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = WeightedReward([(Frames(), 1.0), (Echo(), 1.0)])
    found = reward.components(videos, PROMPTS)
    torch.testing.assert_close(found["frames"], (videos[:, -1] - videos[:, 0]).mean((1, 2, 3)))
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    torch.testing.assert_close(found["echo"], videos[:, :, 0, 0, 0].mean(1) * lengths)
    videos[1, 2, 0, 0, 0] = torch.nan
    assert reward.score(videos, PROMPTS).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="expected images"):
        reward.components(videos[:, 0, 0], PROMPTS)


def test_one_prompts_of_other_ranks_do_not_move_others():
    """The incumbent and ReNO's clipping go by sample, whatever the rank."""
    denoiser, reward = load_denoiser("other_latents:Video"), load_reward("brightness")
    search = ZerothOrderSearch(GaussianSampler(denoiser), denoiser, reward, iterations=2, neighbours=3)
    together = search(PROMPTS, [1, 2, 3])
    alone = search(PROMPTS[1:2], [2])
    torch.testing.assert_close(together.noise[1:2], alone.noise)
    first = denoiser.denoise(standard_noise([2], denoiser.latent_shape), denoiser.encode(PROMPTS[1:2]))
    assert reward.score(alone.images, PROMPTS[1:2]) > reward.score(first, PROMPTS[1:2])


def test_files_of_videos(tmp_path):
    """All frames come back, in order and to the last bit, also if they are the same."""
    video = (torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    video[2] = video[1]
    for name, images in (("video", video), ("image", video[0])):
        save_png(images, tmp_path / f"{name}.png")
        assert torch.equal(load_png(tmp_path / f"{name}.png"), images[None])
