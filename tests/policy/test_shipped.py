"""Policies that come with the library, by name, at every entry point."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from noisear_rl import cli
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.files import sha256
from noisear_rl.policy import load_policy, loading, policy_sha256
from noisear_rl.policy.loading import best_shipped, find_policy, shipped_policies
from noisear_rl.samplers import as_sampler
from noisear_rl.samplers.by_name import plan_methods
from tests.conftest import random_policy

ROOT = Path(__file__).parents[2]
PROMPT = "a photo of a red circle left of a blue square"
TURBO = ["--env-id", "NoiseAR-ShapesTurbo-v0", "--samples-per-prompt", "4"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two policies as if they came with the library, in an empty working directory."""
    for seed, name in enumerate(("nll", "ppo")):
        random_policy(seed).save_pretrained(tmp_path / "shipped" / name)
    (tmp_path / "shipped/.dpo").mkdir()  # what a killed publication leaves
    (tmp_path / "shipped/.dpo/config.json").write_text("{}")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "shipped"


def test_load_policy_by_name(shipped):
    assert shipped_policies() == ["shapes/nll", "shapes/ppo"] and best_shipped() == "shapes/ppo"
    for seed, name in enumerate(shipped_policies()):
        assert policy_sha256(load_policy(name)) == policy_sha256(random_policy(seed))
    assert find_policy("owner/ppo") == "owner/ppo"  # the Hub's
    for unknown in ("shapes/pop", "shapes/.dpo", "shapes/"):
        with pytest.raises(FileNotFoundError, match=rf"{unknown}: .*those that do: shapes/nll, shapes/ppo"):
            load_policy(unknown)


def test_a_path_that_exists_wins(shipped):
    random_policy(7).save_pretrained("shapes/ppo")
    assert policy_sha256(load_policy("shapes/ppo")) == policy_sha256(random_policy(7))
    assert policy_sha256(load_policy("shapes/nll")) == policy_sha256(random_policy(0))  # the folder has no such policy
    Path("shapes/empty").mkdir()
    with pytest.raises(FileNotFoundError, match="shapes/empty holds no policy"):
        load_policy("shapes/empty")


def test_nothing_shipped(shipped, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", shipped / "none")
    assert shipped_policies() == [] and best_shipped() is None
    with pytest.raises(FileNotFoundError, match="those that do: none"):
        load_policy("shapes/ppo")
    cli.main(["sample", PROMPT, "--denoiser", "shapes-turbo", "--seeds", "0", "--output-dir", "out"])
    assert list(load_file("out/noise.safetensors")) == ["gaussian"]


@pytest.mark.parametrize(("options", "seed"), [([], 1), (["--policy", "shapes/nll"], 0)])
def test_sample(shipped, turbo, capsys, options, seed):
    """Unset, ``--policy`` is the best policy that comes with the library."""
    cli.main(["sample", PROMPT, "--denoiser", "shapes-turbo", "--seeds", "0", "1", "--output-dir", "out", *options])
    assert f"policy: {'shapes/nll' if options else 'shapes/ppo'}" in capsys.readouterr().out
    drawn = load_file("out/noise.safetensors")
    expected = as_sampler(turbo, random_policy(seed))([PROMPT] * 2, [0, 1]).noise
    assert set(drawn) == {"gaussian", "policy"}
    torch.testing.assert_close(drawn["policy"], expected, rtol=1e-3, atol=1e-3)


def test_sample_from_gaussian_noise_only(shipped, capsys):
    cli.main(
        ["sample", PROMPT, "--denoiser", "shapes-turbo", "--seeds", "0", "--policy", "gaussian", "--output-dir", "out"]
    )
    assert list(load_file("out/noise.safetensors")) == ["gaussian"]
    assert "policy: none" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert "best one that comes" in capsys.readouterr().out


def test_evaluate(shipped, turbo):
    Path("prompts.txt").write_text(f"{PROMPT}\na photo of two squares\n")
    options = ["--denoiser", "shapes-turbo", "--prompts", "prompts.txt", "--samples", "2", "--output-dir", "out"]
    cli.main(["evaluate", "--methods", "PPO=shapes/ppo", "both=shapes/nll,shapes/ppo", "PPO+best-of-2", *options])
    methods = json.loads(Path("out/results.json").read_text())["methods"]
    assert list(methods) == ["Gaussian", "PPO", "both 0", "both 1", "PPO + best of 2"]
    assert methods["PPO"]["scores"] == methods["both 1"]["scores"]
    assert methods["PPO"]["kl_to_gaussian"] == methods["both 1"]["kl_to_gaussian"] > 0
    identity = json.loads(Path("out/noise/ppo/manifest.json").read_text())["is"]
    assert identity[0] == sha256(shipped / "ppo/model.safetensors")  # other weights of this name are another method
    with pytest.raises(FileNotFoundError, match=r"shapes/pop: .*shapes/nll, shapes/ppo"):
        plan_methods(["PPO=shapes/pop"], turbo)


def test_collect_and_training(shipped):
    few = ["--num-prompts", "2", "--prompts-per-shard", "2"]
    cli.main(["collect", "--policy", "shapes/nll", "--output-dir", "rollouts", *TURBO, *few])
    assert load_rollouts("rollouts").manifest["policy_sha256"] == policy_sha256(random_policy(0))
    few = ["--updates", "1", "--prompts-per-update", "2", "--target-kl", "1e-6"]
    cli.main(["reinforce", "--init-from", "shapes/nll", "--output-dir", "run", *TURBO, *few])
    start, trained = random_policy(0).state_dict(), load_policy("run").state_dict()
    assert all((trained[name] - value).abs().max() < 0.01 for name, value in start.items())
    with pytest.raises(SystemExit, match=r"shapes/pop: .*shapes/nll, shapes/ppo"):
        cli.main(["reinforce", "--init-from", "shapes/pop", "--output-dir", "other", *TURBO, *few])


def test_the_package_contains_every_asset():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["noisear_rl"]
    package = ROOT / "noisear_rl"
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    assert {file for file in ASSETS.rglob("*") if file.is_file()} <= packed
    assert loading.SHIPPED == ASSETS / "policies"


@pytest.mark.parametrize("name", shipped_policies())
def test_what_is_shipped_loads_and_has_a_card(name, turbo):
    folder = Path(find_policy(name))
    assert (folder / "model.safetensors").stat().st_size <= 5e6
    assert f"# Policy `{name}`" in (folder / "README.md").read_text()
    drawn = as_sampler(turbo, load_policy(name))([PROMPT], [0])
    assert drawn.noise.isfinite().all() and drawn.kl_to_gaussian > 0
    assert best_shipped() in shipped_policies()
