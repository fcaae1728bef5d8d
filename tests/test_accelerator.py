"""What an accelerator computes is what the CPU computes, up to rounding, and every command runs on it.

Skipped where the device is the CPU; a test below runs all others on a second device that the CPU plays.
"""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from noisear_rl import cli
from noisear_rl.algos import ppo
from noisear_rl.algos.prior import train
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.evaluation.results import load_results
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from noisear_rl.rewards import load_reward
from tests import tiny_pipelines
from tests.algos.test_prior import TINY
from tests.conftest import random_policy
from tests.learning.test_precision import VARIANTS, episodes
from tests.resuming import assert_same_run, kill_and_resume
from tests.training_runs import PROMPTS, prepare, trainings

DEVICE = resolve_device("auto")
WORDS = ("a photo of a red circle", "two blue squares", "a lighthouse at dawn")
PLAYED = DEVICE.type == "mirror"
accelerated = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an accelerator")
real = pytest.mark.skipif(DEVICE.type in ("cpu", "mirror"), reason="needs an accelerator's own arithmetic")
pytestmark = pytest.mark.filterwarnings("ignore:prompt contains words")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="these are the tests that it runs")
@pytest.mark.skipif(not hasattr(backend_registration, "_DummyBackendModule"), reason="needs a newer torch")
def test_on_a_second_device():
    """On the CPU, but an operation on tensors of both devices is an error, as on an accelerator."""
    options = ["-p", "tests.second_device", "-p", "no:cacheprovider", __file__]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


@accelerated
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_draws_the_same_noise(variant):
    policy = random_policy(scale=0.05, **VARIANTS[variant])
    patches, text, mask = episodes(policy)
    text, mask = text.to(DEVICE), mask.to(DEVICE)
    sample = policy.to(DEVICE).sample(text, mask, seeds=range(len(text)))
    torch.testing.assert_close(sample.patches.cpu(), patches, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.log_prob(sample.patches, text, mask), sample.log_prob, rtol=1e-4, atol=1e-3)


def images_of(name, **options):
    defaults = {"num_inference_steps": 2, "dtype": "float32", "device": DEVICE, "cache_dir": "none"}
    defaults |= tiny_pipelines.OPTIONS.get(name, {})
    denoiser = DiffusionPipelineDenoiser(tiny_pipelines.build(name), name=name, **(defaults | options))
    return denoiser.denoise(standard_noise(range(3), denoiser.latent_shape), denoiser.encode(WORDS), [1, 2, 3]).cpu()


@accelerated
@pytest.mark.parametrize("options", [{}, {"offload": "model"}, {"offload": "sequential"}, {"compile": True}], ids=str)
@pytest.mark.parametrize("name", tuple(tiny_pipelines.BUILDERS))
def test_images(name, options, monkeypatch):
    if PLAYED and options:
        pytest.skip("accelerate and the compiler know real devices alone")
    if PLAYED and name == "sana-sprint":
        pytest.skip("its prompt encoding indexes by a list, which a played device does not know")
    if name == "hunyuan-dit" and options.get("offload") == "sequential":
        pytest.skip("refused")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose products have 10 bits
    images = images_of(name, **options)
    assert len(images) == 3 and images.shape[-3] == 3 and images.isfinite().all()  # videos have frames before channels
    torch.testing.assert_close(images, images_of(name, device="cpu"), rtol=0, atol=2e-2)


@accelerated
@pytest.mark.parametrize(
    "scorer", ["shapes-match", "shapes-clip", "shapes-exact", "brightness", "jpeg-compressibility"]
)
def test_scores(scorer):
    """They are where the images are, wherever the scorer's network is."""
    denoiser = load_denoiser("shapes-turbo", dtype="float32")
    images = denoiser.denoise(standard_noise(range(6), (4, 8, 8)), denoiser.encode(PROMPTS), range(6))
    expected = load_reward(scorer, device="cpu").score(images.cpu(), PROMPTS)
    for device in ("cpu", "auto"):
        for place in (images, images.cpu()):
            found = load_reward(scorer, device=device).score(place, PROMPTS)
            assert found.device == place.device
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


@accelerated
@pytest.mark.parametrize("name", trainings(Path(), 0))
def test_trainings(name, data, tmp_path):
    network = trainings(data, 2)[name](tmp_path)
    assert {parameter.device.type for parameter in network.parameters()} == {DEVICE.type}
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def of_shapes(folder, **options):
    sizes = {"prompts_per_update": 2, "samples_per_prompt": 8, "updates": 4, "save_every": 2}
    policy = NoiseARConfig(d_model=64, d_ff=64, n_layers=1, n_heads=2, log_variance="fixed")
    return ppo.PPOConfig("NoiseAR-ShapesTurbo-v0", output_dir=folder, policy=policy, **(sizes | options))


@real
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_ppos_first_ratio_is_exactly_1(tmp_path, precision, optimizer):
    ppo.train(of_shapes(tmp_path, precision=precision, optimizer=optimizer, micro_batches=2))
    assert [record["losses/first_ratio"] for record in read_records(tmp_path)] == [1.0] * 4


@real
def test_resumed_equals_uninterrupted(tmp_path):
    whole = ppo.train(of_shapes(tmp_path / "a"))
    resumed = kill_and_resume(ppo.train, of_shapes(tmp_path / "b"))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


@accelerated
def test_commands(data, tmp_path, monkeypatch):
    """One after the other, as a user goes through them."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("\n".join(PROMPTS) + "\n")
    for command in (
        "pairs --denoiser shapes --prompts captions.txt --pairs 6 --batch-size 3 --rounds 2 "
        "--filter-reward shapes-match --output-dir weak-to-strong",
        f"nll --pairs {data}/layouts --denoiser shapes-turbo --epochs 1 --policy.layouts 3 "
        "--policy.d-model 16 --policy.d-ff 16 --policy.n-heads 2 --output-dir nll",
        "pairs --kind signal_leak --denoiser shapes-turbo --prompts captions.txt --pairs 6 --rounds 2 --policy nll "
        "--filter-reward shapes-match --min-reward -1 --output-dir leaks",
        "ppo --env-id NoiseAR-ShapesTurbo-v0 --prompts captions.txt --updates 1 --prompts-per-update 2 "
        "--samples-per-prompt 4 --init-from nll --output-dir ppo",
        "npnet --pairs leaks --denoiser shapes-turbo --epochs 1 --npnet.d-model 8 --npnet.depths 2 1 "
        "--npnet.n-heads 2 2 --npnet.image-size 8 --npnet.patch-size 2 --npnet.window-size 2 --output-dir npnet",
        "evaluate --denoiser shapes-turbo --prompts captions.txt --num-prompts 4 --samples 2 "
        "--methods best-of-2 mine=ppo mine+search-2 reno-2 golden=npnet --output-dir evaluation",
        f"sample '{PROMPTS[0]}' --denoiser shapes-turbo --policy ppo --seeds 0 1 --output-dir samples",
        "reward-statistics --denoiser shapes-turbo --prompts captions.txt --num-prompts 4 --output statistics.yaml",
    ):
        cli.main(shlex.split(command))
    assert len(load_results(Path("evaluation")).methods) == 6
    train(replace(TINY, output_dir=tmp_path / "prior"))
