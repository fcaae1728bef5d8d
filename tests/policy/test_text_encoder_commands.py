"""Every command with every kind of text encoder, on tiny random pipelines of the classes of SDXL and SD3."""

import pytest
import torch
from safetensors.torch import load_file

import noisear_rl
from noisear_rl import cli
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.policy import load_policy
from tests import tiny_pipelines

PROMPTS = ["a photo of a red circle", "two blue squares", "a lighthouse at dawn"]
IDS = {denoiser: name for name, denoiser in noisear_rl.ENVIRONMENTS.items()}
READINGS = {
    "tokens": ["--policy.text-encoder", "tokens"],
    "whitened": ["--policy.text-layers", "1", "--policy.text-features", "whitened", "--policy.text-scale", "4"],
    "layouts": ["--policy.text-encoder", "tokens", "--policy.layouts", "4"],
    "t5": ["--policy.text-encoder", "T5", "--policy.text-layers", "1"],
}
pytestmark = pytest.mark.filterwarnings("ignore:prompt contains words", "ignore:prompt of")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two pipelines and of a text encoder, and a file of prompts."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sdxl", "sd3"):
        tiny_pipelines.build(name).save_pretrained(root / name)
    torch.manual_seed(0)
    for part in tiny_pipelines.t5(77):
        part.save_pretrained(root / "t5")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


STAGES = ("nll", "reinforce", "ppo", "dpo", "trajectory-balance", "reward-gradient")


@pytest.mark.parametrize(
    ("name", "reading"),
    [("sdxl", "tokens"), ("sd3", "tokens"), ("sdxl", "whitened"), ("sdxl", "layouts"), ("sd3", "t5")],
)
def test_all_commands(name, reading, folders, tmp_path):
    where = ["--denoiser-options", "path", str(folders / name), "num_inference_steps", "2", "cache_dir", "none"]
    policy = ["--policy.d-model", "32", "--policy.d-ff", "32", *READINGS[reading]]
    policy = [str(folders / "t5") if word == "T5" else word for word in policy]
    prompts, free = ["--prompts", str(folders / "prompts.txt")], ["--reward", "brightness"]
    denoiser, environment = ["--denoiser", name], ["--env-id", IDS[name]]
    small = ["--updates", "1", "--samples-per-prompt", "4", *prompts, *free, *environment]
    out = {stage: str(tmp_path / stage) for stage in ("pairs", "nll", "ppo", "collect", "dpo")}

    def command(stage, *options, folder=None):
        cli.main([stage, "--output-dir", str(tmp_path / (folder or stage)), *options, *where, "dtype", "float32"])

    command("pairs", "--pairs", "6", "--num-inference-steps", "4", *denoiser, *prompts)
    command("nll", "--pairs", out["pairs"], "--epochs", "1", "--batch-size", "4", *denoiser, *policy)
    command("reinforce", *small, *policy)
    command("ppo", *small, "--init-from", out["nll"], "--advantage", "gae")
    collecting = ["--num-prompts", "3", "--samples-per-prompt", "4", *prompts, *free, *environment]
    command("collect", *collecting, "--policy", out["ppo"])
    preferences = ["--rollouts", out["collect"], "--threshold", "0", "--epochs", "1"]
    command("dpo", *preferences, *policy)
    command("dpo", *preferences, "--init-from", out["ppo"], folder="dpo-from-ppo")
    command("trajectory-balance", *small, "--rollouts", out["collect"], *policy)
    gradient = ["--updates", "1", "--prompts-per-update", "3", *prompts, *free, *denoiser]
    command("reward-gradient", *gradient, *policy)
    methods = [f"{stage}={tmp_path / stage}" for stage in STAGES]
    scorers = ["--scorers", "jpeg-compressibility", "brightness"]
    command("evaluate", "--methods", *methods, *scorers, "--samples", "2", *denoiser, *prompts)
    command("sample", *PROMPTS[:2], "--policy", out["ppo"], "--seeds", "0", "1", *denoiser)

    trained = [load_policy(tmp_path / stage) for stage in STAGES]
    expected = {"whitened": "denoiser", "t5": str(folders / "t5")}.get(reading, "tokens")
    assert {(p.config.text_encoder, p.config.text_layers) for p in trained} == {(expected, 1)}
    assert not any(p.needs_text_statistics for p in trained)
    assert {p.config.layouts for p in trained} == {4 if reading == "layouts" else 0}
    assert all(p.network.prediction_head[-1].weight.any() for p in trained)  # 0 at first
    assert all(record["policy/kl_to_gaussian"] < 1e-6 for record in read_records(tmp_path / "reinforce"))  # at first
    noise = load_file(tmp_path / "sample/noise.safetensors")
    gaussian = standard_noise([0, 1] * 2, trained[0].config.latent_shape)
    assert torch.equal(noise["gaussian"], gaussian) and not torch.equal(noise["policy"], gaussian)
    assert (tmp_path / "evaluate/table.md").read_text().count("\n| ") >= 6
