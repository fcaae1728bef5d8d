"""All stages of a prior in one command: each resumes, and each is what its own command makes."""

from dataclasses import replace
from pathlib import Path

import pytest

from noisear_rl.algos.collect import CollectConfig
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.algos.prior import PriorConfig, train
from noisear_rl.data.shared_noise import SharedNoiseConfig
from noisear_rl.policy import NoiseARConfig, load_policy, policy_sha256

ENV = "NoiseAR-ShapesTurbo-v0"
TINY = PriorConfig(
    collect=CollectConfig(ENV, num_prompts=6, samples_per_prompt=4, prompts_per_shard=3),
    shared_noise=SharedNoiseConfig(noises=2, target="leak", min_reward=-1.0, text_encoder="tokens", noise_scale=0.8),
    nll=NLLConfig(
        denoiser="shapes-turbo",
        policy=NoiseARConfig(text_encoder="tokens", text_layers=1, d_model=32, d_ff=32, n_heads=2, n_layers=1),
        epochs=2,
        held_out_share=0.3,
    ),
    ppo=PPOConfig(ENV, updates=1, prompts_per_update=2, samples_per_prompt=2),
)


def test_stages_resume_and_follow_each_other(tmp_path):
    config = replace(TINY, output_dir=tmp_path)
    pretrained = train(replace(config, last="nll"))
    assert not (tmp_path / "ppo").exists()
    assert policy_sha256(pretrained) == policy_sha256(load_policy(tmp_path / "nll"))
    files = {file: file.stat().st_mtime_ns for stage in ("tried", "shared") for file in written(tmp_path / stage)}
    improved = train(config)
    assert files == {file: file.stat().st_mtime_ns for file in files}  # finished stages write nothing
    assert policy_sha256(load_policy(tmp_path / "nll")) == policy_sha256(pretrained) != policy_sha256(improved)
    assert policy_sha256(load_policy(tmp_path / "ppo")) == policy_sha256(improved)
    with pytest.raises(ValueError, match="other settings"):
        train(replace(config, shared_noise=replace(TINY.shared_noise, noises=3)))
    with pytest.raises(ValueError, match="last must be one of"):
        train(replace(config, last="dpo"))  # type: ignore[arg-type]


def written(folder: Path) -> list[Path]:
    """The Parquet files of a stage."""
    return sorted(folder.rglob("*.parquet"))
