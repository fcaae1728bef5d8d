"""Examples run and learn: rewards rise far above those of Gaussian noise, which every one starts from."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DEVIATION = 0.033  # of the brightness of images from Gaussian noise, as in `noisear_rl/rewards/simple.py`


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example; what it writes goes to a temporary folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("name", ["sb3_ppo", "torchrl_ppo", "cleanrl_ppo", "skrl_ppo"])
def test_ppo_of_other_libraries_learns(name, example):
    """Means of 64 rewards, in standard deviations of what Gaussian noise gives: chance moves them by about 0.13."""
    returns = example(name).main()
    assert abs(returns[0]) < 0.6, returns
    assert returns[-1] > returns[0] + 1, returns


def test_a_policy_that_imitates_the_best_episodes_of_minari(example):
    """The recording is read back, slim, and its environment made again."""
    module = example("minari_cloning")
    recorded, imitated = module.main()
    assert imitated > recorded + 0.5 * DEVIATION
    dataset = module.minari.load_dataset(module.NAME)
    episode = dataset[0]
    assert len(dataset) == 256 and episode.observations.tolist() == list(range(17))
    assert episode.actions.shape == (16, 16) and episode.rewards[-1] > 0 and not episode.rewards[:-1].any()
    assert dataset.recover_environment().unwrapped.task.prompts == ["a photo of two red squares"]
    assert module.main()[0] == recorded  # the second time, nothing is recorded


def test_dpo_with_options_and_metrics_of_trl(example):
    result = example("trl_dpo").main()
    assert result["trained"] > result["gaussian"] + 0.5 * DEVIATION, result
    assert result["eval/rewards/accuracies"] > 0.65, result
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"} <= result.keys()
