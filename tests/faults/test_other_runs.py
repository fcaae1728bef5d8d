"""Going on with something else: another seed, optimiser, reward, algorithm, precision, or an edited file is refused."""

import dataclasses
import json
import shutil

import pytest
import yaml

from noisear_rl import cli
from noisear_rl.algos import dpo, nll, npnet, ppo, reinforce, reward_gradient, trajectory_balance
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.config import to_mapping
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.data.rollouts import rollout_manifest
from noisear_rl.denoisers import dtype_of, load_denoiser
from noisear_rl.envs.noise_task import NoiseTask
from noisear_rl.files import check_manifest, read_manifest
from noisear_rl.integrity import DamagedError
from noisear_rl.learning.resumption import MAY_CHANGE
from noisear_rl.learning.run import Counters, Run
from noisear_rl.rewards import reward_sha256
from tests import toys
from tests.conftest import random_policy
from tests.faults.test_divergence import TINY
from tests.training_runs import SMALL, TOP_LEFT

CONFIGS = (
    ppo.PPOConfig,
    reinforce.ReinforceConfig,
    nll.NLLConfig,
    npnet.NPNetTrainingConfig,
    dpo.DPOConfig,
    reward_gradient.RewardGradientConfig,
    trajectory_balance.TrajectoryBalanceConfig,
)


def saved(config):
    """Saves one checkpoint of a run."""
    run = Run(config.output_dir, config)
    run.save(random_policy(**TINY), Counters(1))
    run.close()
    return list_checkpoints(config.output_dir)[0]


def refused(config, message, **options):
    before = (config.output_dir / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        Run(config.output_dir, config, resume=True, **options)
    assert (config.output_dir / "config.yaml").read_bytes() == before  # not rewritten
    return str(caught.value)


def another(value):
    """Another value that most options of this type take."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return (value / 2 or 0.5) if isinstance(value, float) else None


@pytest.mark.parametrize("cls", CONFIGS)
def test_resumption_takes_the_same_options(cls, tmp_path):
    """Every number and switch in turn: those that may change are taken, all others are refused by name."""
    config = cls(output_dir=tmp_path / "run")
    checkpoint = saved(config)
    taken = set()
    for field in dataclasses.fields(cls):
        value = getattr(config, field.name)
        if another(value) is None:
            continue
        changed = dataclasses.replace(config, **{field.name: another(value)})
        if field.name in MAY_CHANGE:
            Run(config.output_dir, changed, resume=True).close()
            taken.add(field.name)
        else:
            text = refused(changed, rf"{checkpoint} is of a run with other options: {field.name} was ")
            assert f"was {value!r}, not {another(value)!r}. Pass the same" in text and "save_every" in text
    assert {"save_every", "micro_batches", "resume", "wandb", "keep_checkpoints"} <= taken
    Run(config.output_dir, config, resume=True).close()


def test_seed_optimizer_reward_and_network(tmp_path):
    """All differences are named at once."""
    config = ppo.PPOConfig(output_dir=tmp_path, policy=SMALL, denoiser_options={"dtype": "float32"})
    saved(config)
    other = dataclasses.replace(config, seed=1, optimizer="adam", reward="brightness", prompts=("a", "b"))
    text = refused(other, "seed was 0, not 1")
    assert "optimizer was 'natural', not 'adam'" in text and "reward was None, not 'brightness'" in text
    assert r"prompts was None, not ['a', 'b']" in text
    network = dataclasses.replace(SMALL, d_model=32)
    refused(dataclasses.replace(config, policy=network), r"options: policy\.d_model was 16, not 32\. Pass")
    for options, found in (({"dtype": "bfloat16"}, r"denoiser_options\.dtype was 'float32', not 'bfloat16'"),):
        refused(dataclasses.replace(config, denoiser_options=options), found)
    memory = {"dtype": "float32", "micro_batch_size": "2", "device": "cpu"}
    Run(tmp_path, dataclasses.replace(config, denoiser_options=memory, updates=7), resume=True).close()


def test_options_of_one_algorithm_that_may_change(tmp_path):
    config = dpo.DPOConfig(output_dir=tmp_path)
    saved(config)
    longer = dataclasses.replace(config, epochs=9)
    refused(longer, "epochs was 4, not 9")
    Run(tmp_path, longer, resume=True, may_change=("epochs",)).close()


@pytest.mark.parametrize("cls", CONFIGS)
def test_another_algorithm(cls, tmp_path):
    config = cls(output_dir=tmp_path)
    saved(config)
    for other in CONFIGS:
        if other is not cls:
            refused(
                other(output_dir=tmp_path), rf"is of a run of {cls.__name__[:-6]}, not {other.__name__[:-6]}: choose"
            )


def test_checkpoints_of_earlier_versions_and_damaged_ones(tmp_path):
    config = ppo.PPOConfig(output_dir=tmp_path)
    checkpoint = saved(config)
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "inputs.json").write_text("{")
    with pytest.raises(DamagedError, match=rf"{checkpoint}/inputs\.json: damaged"):
        Run(tmp_path, config, resume=True)
    (checkpoint / "inputs.json").unlink()
    options = to_mapping(config)
    options.pop("kl_stop")  # an option that it did not have yet
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(options))
    Run(tmp_path, config, resume=True).close()
    refused(dataclasses.replace(config, seed=3), "seed was 0, not 3")


def test_an_edited_file_is_noticed(tmp_path):
    reward, prompts = tmp_path / "mine.py", tmp_path / "prompts.txt"
    shutil.copy(TOP_LEFT, reward)
    prompts.write_text("a\nb\n")
    config = ppo.PPOConfig(reward=str(reward), prompts=str(prompts), output_dir=tmp_path / "run")
    saved(config)
    Run(config.output_dir, config, resume=True).close()
    reward.write_text(reward.read_text() + "\n# edited\n")
    refused(config, rf"the content of reward: {reward} has changed\. Pass")
    shutil.copy(TOP_LEFT, reward)
    prompts.write_text("a\nc\n")
    refused(config, rf"the content of prompts: {prompts} has changed")


@pytest.mark.parametrize(("cls", "name"), [(nll.NLLConfig, "pairs"), (dpo.DPOConfig, "rollouts")])
def test_data_may_move_but_not_change(cls, name, tmp_path):
    check_manifest(tmp_path / "a", {"seed": 0})
    check_manifest(tmp_path / "other", {"seed": 1})
    config = cls(output_dir=tmp_path / "run", **{name: tmp_path / "a"})
    saved(config)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    Run(config.output_dir, dataclasses.replace(config, **{name: tmp_path / "moved"}), resume=True).close()
    refused(dataclasses.replace(config, **{name: tmp_path / "other"}), rf"the content of {name}: .*other has changed")


def test_fingerprints_of_rewards(tmp_path):
    reward = tmp_path / "mine.py"
    shutil.copy(TOP_LEFT, reward)
    assert reward_sha256("brightness") is None and reward_sha256("brightness", "shapes-match") is None
    one, named = reward_sha256(str(reward)), reward_sha256(f"{reward}:score")
    assert one == named != reward_sha256("brightness", str(reward), str(reward))
    weights = tmp_path / "reward.yaml"
    weights.write_text("weights: {brightness: 1.0}\n")
    first = reward_sha256(str(weights))
    weights.write_text("weights: {brightness: 2.0}\n")
    assert first != reward_sha256(str(weights)) is not None
    reward.write_text("x = 1\n")
    assert one != reward_sha256(str(reward))


def test_a_collection_with_an_edited_reward(tmp_path):
    """Both shards of a folder have rewards of the same function, or the second is refused."""
    reward, folder = tmp_path / "mine.py", tmp_path / "rollouts"
    reward.write_text("def score(images, prompts):\n    return [0.78] * len(prompts)\n")
    options = {"num_prompts": 2, "samples_per_prompt": 2, "prompts_per_shard": 1, "output_dir": folder}
    config = CollectConfig("NoiseAR-ShapesTurbo-v0", reward=str(reward), **options)
    collect(config)
    (folder / "shard-00001.parquet").unlink()
    reward.write_text("def score(images, prompts):\n    return [-80.0] * len(prompts)\n")
    with pytest.raises(ValueError, match=rf"{folder} was written with other settings \(reward_sha256: "):
        collect(config)
    assert not (folder / "shard-00001.parquet").exists()


def test_pairs_with_an_edited_filter(tmp_path, random_denoiser):
    reward, folder = tmp_path / "mine.py", tmp_path / "pairs"
    shutil.copy(TOP_LEFT, reward)
    prompts = ("a photo of a red circle",)
    options = {"pairs": 2, "num_inference_steps": 5, "prompts": prompts, "filter_reward": str(reward), "seed": 3}
    config = PairsConfig(output_dir=folder, **options)
    reward.write_text("def score(images, prompts):\n    return images.flatten(1).sum(1)\n")
    build_pairs(config, random_denoiser)
    reward.write_text("def score(images, prompts):\n    return -images.flatten(1).sum(1)\n")
    with pytest.raises(ValueError, match="other settings \\(reward_sha256"):
        build_pairs(config, random_denoiser)


def test_an_evaluation_with_an_edited_judge(tmp_path):
    """A user's own judge works, and is not replaced by another of its name."""
    judge, folder = tmp_path / "judge.py", tmp_path / "it"
    shutil.copy(TOP_LEFT, judge)
    options = ["--denoiser", "shapes-turbo", "--samples", "2", "--num-prompts", "6", "--batch-size", "12"]
    options += ["--scorers", str(judge), "--output-dir", str(folder)]
    cli.main(["evaluate", *options])
    record = json.loads((folder / "results.json").read_text())
    assert record["judge"] == "judge" and list(record["methods"]["Gaussian"]["scores"]) == ["judge"]
    judge.write_text(judge.read_text() + "\n# edited\n")
    with pytest.raises(SystemExit, match=rf"{folder} was written with other settings \(reward_sha256") as stop:
        cli.main(["evaluate", *options])
    assert stop.value.code == 2


def test_precision_is_in_the_manifest(tmp_path):
    single, half = (load_denoiser("shapes-turbo", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert [dtype_of(denoiser) for denoiser in (single, half)] == ["float32", "bfloat16"]
    assert dtype_of(toys.NoDenoiser((1, 8, 4), 4)) == "unknown"
    manifests = [rollout_manifest(NoiseTask(denoiser)) for denoiser in (single, half)]
    check_manifest(tmp_path, manifests[0])
    with pytest.raises(ValueError, match="other settings \\(dtype: 'float32', not 'bfloat16'\\)"):
        check_manifest(tmp_path, manifests[1])
    earlier = {key: value for key, value in manifests[0].items() if key != "dtype"}
    check_manifest(tmp_path / "earlier", earlier)  # its shards can be completed
    check_manifest(tmp_path / "earlier", manifests[1])
    assert read_manifest(tmp_path / "earlier") == json.loads(json.dumps(earlier))
