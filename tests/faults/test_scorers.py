"""Images that hold NaN are dropped and counted; scorers that fail end a command in one line with file and cause."""

import threading
import time
from dataclasses import replace

import pytest
import torch
import yaml

from noisear_rl import cli
from noisear_rl.algos import ppo, reinforce, reward_gradient
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.pairs import PAIR_FEATURES, PairsConfig, build_pairs, load_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.data.shards import write_shard
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.pipelines import check_guidance
from noisear_rl.files import check_manifest
from noisear_rl.images import to_uint8
from noisear_rl.learning.records import read_records
from noisear_rl.rewards import WeightedReward, load_reward
from noisear_rl.rewards.registry import FunctionReward
from noisear_rl.trust import trusting
from tests import toys
from tests.training_runs import PROMPTS, SMALL

NAN = float("nan")


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["brightness", "jpeg-compressibility", "shapes-match", "shapes-clip", "shapes-exact"])
def test_images_without_pixels_have_no_score(name, value):
    """Whatever the scorer makes of them; the other images get the score that they get alone."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1, 2, 5, 7] = images[3] = value
    prompts, reward = list(PROMPTS[:4]), load_reward(name)
    scores = reward.score(images, prompts)
    assert scores.isnan().tolist() == [False, True, False, True]
    alone = reward.score(images[[0, 2]], [prompts[0], prompts[2]])
    torch.testing.assert_close(scores[[0, 2]], alone)


class Broken(toys.NoDenoiser):
    """An identity denoiser whose image is NaN wherever the noise begins with a number above ``limit``."""

    def __init__(self, limit=1.0):
        super().__init__((1, 8, 4), 4)
        self.limit = limit

    def denoise(self, noise, conditioning, seeds=None):
        images = super().denoise(noise, conditioning)
        return torch.where((noise[:, 0, 0, 0] > self.limit)[:, None, None, None], NAN, images)

    denoise_differentiably = denoise


class Constant(toys.Target):
    """Gives every image a number, whatever it holds."""

    name = "constant"

    def score(self, images, prompts):
        return torch.nan_to_num(super().score(images, prompts), nan=50.0)


@pytest.mark.parametrize("algorithm", [ppo, reinforce])
def test_training_drops_and_counts_images_without_pixels(algorithm, tmp_path):
    config = {ppo: ppo.PPOConfig, reinforce: reinforce.ReinforceConfig}[algorithm]
    options = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 32, "policy": SMALL}
    algorithm.train(config(toys.register(Constant(), denoiser=Broken()), output_dir=tmp_path, **options))
    for record in read_records(tmp_path):
        assert 2 <= record["charts/dropped_episodes"] <= 30 and record["charts/episodic_return"] < 0


def test_collection_drops_and_counts_images_without_pixels(tmp_path):
    env = toys.register(Constant(), denoiser=Broken())
    options = {"num_prompts": 2, "samples_per_prompt": 40, "prompts_per_shard": 1, "save_images": True}
    collect(CollectConfig(env, output_dir=tmp_path, **options))
    rollouts = load_rollouts(tmp_path)
    assert 2 <= rollouts.dropped <= 40 and rollouts.rewards.max() <= 0
    assert all(image is not None for image in rollouts.dataset["image"])


CLIFF = """
def score(images, prompts):
    first = images[:, 0, 0, 0]  # the root has no finite gradient below -1
    return images.mean((1, 2, 3)) + 0 * (first + 1).clamp(min=0).sqrt()
"""


def test_reward_gradients_drop_images_without_pixels_or_gradient(tmp_path, monkeypatch):
    (tmp_path / "cliff.py").write_text(CLIFF)
    monkeypatch.setattr(reward_gradient, "load_denoiser", lambda *names, **options: Broken())
    options = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 40, "policy": SMALL}
    options |= {"prompts": toys.PROMPTS, "reward": str(tmp_path / "cliff.py"), "output_dir": tmp_path / "run"}
    policy = reward_gradient.train(reward_gradient.RewardGradientConfig(**options))
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    for record in read_records(tmp_path / "run"):
        assert 10 <= record["charts/dropped_episodes"] <= 50 and record["losses/approx_kl"] > 0


def test_evaluation_refuses_images_without_pixels(tmp_path, monkeypatch):
    """As files they would be black, and judged."""
    denoise = DiffusionPipelineDenoiser.denoise

    def broken(*arguments):
        images = denoise(*arguments).clone()
        images[1, 0, 5, 5] = NAN
        return images

    monkeypatch.setattr(DiffusionPipelineDenoiser, "denoise", broken)
    options = ["--denoiser", "shapes-turbo", "--samples", "2", "--num-prompts", "6", "--batch-size", "12"]
    options += ["--scorers", "brightness", "--output-dir", str(tmp_path / "it")]
    refused = r"method 'Gaussian': 1 of 12 images hold NaN .* for prompt 'a photo of .*' with seed 1000001: try"
    with pytest.raises(SystemExit, match=refused) as stop:
        cli.main(["evaluate", *options])
    assert stop.value.code == 2
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "it/scores").exists()
    with pytest.raises(ValueError, match="the image holds NaN"):
        to_uint8(torch.full((3, 2, 2), NAN))


def test_pairs_without_finite_targets(random_denoiser, tmp_path, monkeypatch):
    predict, calls = random_denoiser.predict_noise, []

    def broken(latents, *rest):
        calls.append(len(latents))
        found = predict(latents, *rest).clone()
        found[0] = NAN
        found[1] = 1e9 * len(calls)  # beyond float16
        return found

    monkeypatch.setattr(random_denoiser, "predict_noise", broken)
    prompts = ("a photo of a red circle", "two squares", "three crosses", "a photo of a blue square")
    config = PairsConfig(prompts=prompts, pairs=4, output_dir=tmp_path / "a", num_inference_steps=10)
    assert build_pairs(config, random_denoiser)["seed"][:] == [2, 3] and calls
    config = replace(config, output_dir=tmp_path / "filtered", filter_reward="brightness")
    assert set(build_pairs(config, random_denoiser)["seed"][:]) <= {2, 3}
    monkeypatch.setattr(random_denoiser, "predict_noise", lambda latents, *rest: torch.full_like(latents, NAN))
    with pytest.raises(ValueError, match="no pair passed the reward filter, or had a finite target"):
        build_pairs(PairsConfig(prompts=prompts, pairs=4, output_dir=tmp_path / "b"), random_denoiser)
    check_manifest(tmp_path / "c", {})
    rows = {"prompt": ["a"] * 2, "seed": [0, 1], "target": [[0.0] * 4, [0.0, NAN, 0.0, 0.0]]}
    write_shard(tmp_path / "c", 0, rows, PAIR_FEATURES)
    with pytest.raises(ValueError, match="some targets hold NaN or infinite values: make the pairs again"):
        load_pairs(tmp_path / "c")


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30, -1.0, 0.5])
def test_guidance_scales_without_images(value, random_denoiser):
    with pytest.raises(ValueError, match="guidance_scale must be from 1 to 1000"):
        check_guidance(value)
    with pytest.raises(ValueError, match="guidance_scale must be"):
        load_denoiser("shapes-turbo", guidance_scale=value)
    latents = torch.zeros(1, *random_denoiser.latent_shape)
    with pytest.raises(ValueError, match="guidance_scale must be from 1 to 1000"):
        random_denoiser.predict_noise(latents, 1.0, random_denoiser.encode(["a"]), value)


# What a user's function may do wrong with two images, and what is said of it.
BAD = {
    "raise KeyError('x')": r", line 3: scorer 'mine' failed: KeyError: 'x'",
    "raise SystemExit": r": scorer 'mine' failed: it exits \(code None\)",
    "import sys; sys.exit(3)": r": scorer 'mine' failed: it exits \(code 3\)",
    "return None": r": scorer 'mine' returned None, expected \(2,\) numbers",
    "return 'good'": r": scorer 'mine' returned 'good', expected",
    "return ['a', 'b']": r": scorer 'mine' returned \['a', 'b'\], expected",
    "return {'a': 1}": r": scorer 'mine' returned \{'a': 1\}, expected",
    "return 1.0": r": scorer 'mine' returned scores \(\), expected \(2,\): one number per image",
    "return [1.0]": r": scorer 'mine' returned scores \(1,\), expected \(2,\)",
    "return torch.ones(2, 1)": r": scorer 'mine' returned scores \(2, 1\), expected \(2,\)",
    "return [[1.0], [1.0, 2.0]]": r": scorer 'mine' returned \[\[1\.0\], \[1\.0, 2\.0\]\], expected",
    "return [1j, 2.0]": r": scorer 'mine' returned torch\.complex64 numbers, expected a tensor \(2,\) of real numbers",
    "return torch.ones(2) * 1j": r": scorer 'mine' returned torch\.complex64 numbers",
    "images.mul_(2); return torch.ones(2)": r": scorer 'mine' changes its images in place",
    "images[0] = 0; return [1.0, 1.0]": r": scorer 'mine' changes its images in place",
    "images.numpy()[:] = 3; return [1.0, 1.0]": r": scorer 'mine' changes its images in place",
}


def function_of(folder, body):
    path = folder / "mine.py"
    path.write_text(f"import time, torch\ndef score(images, prompts):\n    {body}\n")
    return path


@pytest.mark.parametrize("body", BAD)
def test_functions_that_fail(body, tmp_path):
    path = function_of(tmp_path, body)
    images = torch.full((2, 3, 4, 4), 0.5)
    with pytest.raises(ValueError, match=rf"^{path}{BAD[body]}") as caught:
        load_reward(str(path)).score(images, ["a", "b"])
    assert "\n" not in str(caught.value) and (images == 0.5).all()


@pytest.mark.parametrize(
    "body", ["return [1, 2]", "return torch.tensor([1, 2])", "return [True, 2]", "return (1.0, 2.0)"]
)
def test_integers_are_numbers(body, tmp_path):
    scores = load_reward(str(function_of(tmp_path, body))).score(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("body", ["time.sleep(60)", "for _ in range(3000): time.sleep(0.01)"])
def test_functions_that_hang(body, tmp_path):
    path, spec = function_of(tmp_path, body), tmp_path / "reward.yaml"
    spec.write_text(yaml.safe_dump({"weights": {str(path): 1.0}, "options": {str(path): {"timeout": 0.3}}}))
    with trusting(True):
        reward, began = load_reward(str(spec)), time.monotonic()
    prompts = ["a", "b"]
    with pytest.raises(ValueError, match=rf"^{path}: scorer 'mine' failed: TimeoutError: no result after 0.3 seconds"):
        reward.score(torch.rand(2, 3, 4, 4), prompts)
    assert time.monotonic() - began < 30
    for wrong in (0, -1.0, NAN, "soon", float("inf")):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            load_reward({str(path): 1.0}, options={str(path): {"timeout": wrong}})
    with pytest.raises(ValueError, match=r"takes no option 'seconds'; expected `timeout`"):
        load_reward({str(path): 1.0}, options={str(path): {"seconds": 1}})


def test_a_timeout_changes_nothing_else():
    """Gradients flow, and errors keep their cause."""
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    threads = []

    def mean(images, prompts):
        threads.append(threading.current_thread())
        return images.mean((1, 2, 3))

    timed, plain = FunctionReward("mean", mean, timeout=60.0), FunctionReward("mean", mean)
    for reward in (timed, plain):
        reward.score(images, ["a", "b"]).sum().backward()
    assert threads[0] is not threads[1] is threading.main_thread()
    torch.testing.assert_close(images.grad, torch.full_like(images, 2 / 48))
    with torch.no_grad():
        assert not timed.score(images, ["a", "b"]).requires_grad
    with pytest.raises(ValueError, match="scorer 'bad' failed: KeyError: 'x'"):
        FunctionReward("bad", lambda images, prompts: {}["x"], timeout=60.0).score(images, ["a", "b"])


class Careless:
    """A scorer object that returns whatever it is told to."""

    name = "careless"

    def __init__(self, found):
        self.found = found

    def score(self, images, prompts):
        return self.found


@pytest.mark.parametrize("found", [None, "good", [1.0, 2.0], torch.ones(2) * 1j, torch.ones(3), torch.tensor(1.0)])
def test_scorer_objects_that_fail(found):
    reward = WeightedReward([(Careless(found), 1.0)])
    with pytest.raises(ValueError, match=r"^scorer 'careless' returned .*expected .*\(2,\)"):
        reward.score(torch.rand(2, 3, 4, 4), ["a", "b"])
