"""The environments as other libraries, and people who know only their documentation, use them.

Gymnasium's vectors and specs, TorchRL, skrl, pickle, own rewards, misspelt options.
"""

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from noisear_rl.envs import NoiseEnv, NoiseVectorEnv
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.rewards import load_reward
from tests.envs.test_envs import PROMPTS, episode

ID = "NoiseAR-ShapesTurbo-v0"
MODES = ["NextStep", "SameStep", "Disabled"]


def make_vec(num_envs=2, **options):
    return gymnasium.make_vec(ID, num_envs=num_envs, vectorization_mode="vector_entry_point", **options)


class Redness:
    """An own scorer that cannot be copied."""

    name = "redness"

    def score(self, images, prompts):
        return images[:, 0].mean((1, 2))

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be pickled")


class Measured(Redness):
    """One whose scores have been measured."""

    statistics = (0.0, 1.0)


def test_torchrl_makes_an_environment_by_id():
    """It probes whether an environment takes ``frameskip``, and reads the text of the error."""
    libs = pytest.importorskip("torchrl.envs")
    rollout = libs.GymEnv(ID).rollout(16)
    assert rollout["next", "reward"].shape == (16, 1) and rollout["next", "reward"][-1] != 0
    assert rollout["next", "terminated"].flatten().tolist() == [False] * 15 + [True]


def test_torchrl_wraps_the_batched_environment():
    GymWrapper = pytest.importorskip("torchrl.envs").GymWrapper
    env = GymWrapper(make_vec(autoreset_mode="Disabled", prompts=PROMPTS))
    steps = env.rollout(40, break_when_any_done=False)
    assert steps.shape == (2, 40)
    done = steps["next", "done"][..., 0]
    assert done.nonzero()[:, 1].tolist() == [15, 31, 15, 31]
    assert (steps["next", "reward"][..., 0] != 0).equal(done)
    assert (steps["next", "step"][:, 15].argmax(-1) == 16).all()  # one-hot; the end is kept
    assert (steps["step"][:, 16].argmax(-1) == 0).all()
    assert not steps["patches"][:, 16].any() and steps["next", "patches"][:, 15].all()


def test_skrl_takes_the_spaces():
    spaces = pytest.importorskip("skrl.utils.spaces.torch")
    env = gymnasium.make(ID)
    observation, _ = env.reset(seed=0)
    space = env.observation_space
    batched = {key: np.asarray(value)[None] for key, value in observation.items()}
    flat = spaces.flatten_tensorized_space(spaces.tensorize_space(space, batched))
    assert flat.shape == (1, spaces.compute_space_size(space, occupied_size=True))


def test_spaces_are_of_the_kinds_that_every_library_knows():
    for env in (gymnasium.make(ID), make_vec()):
        single = getattr(env, "single_observation_space", env.observation_space)
        kinds = {type(space) for space in (*single.spaces.values(), env.action_space)}
        assert kinds == {gymnasium.spaces.Box, gymnasium.spaces.Discrete}


@pytest.mark.parametrize("mode", MODES)
def test_autoreset_modes_are_those_of_gymnasium(mode, turbo):
    """Two rounds give what Gymnasium's own batch of scalar environments gives, key by key."""
    made = {"denoiser": turbo, "prompts": PROMPTS, "reward": {"shapes-match": 1.0, "brightness": 0.5}}
    ours = make_vec(autoreset_mode=mode, **made)
    theirs = SyncVectorEnv([lambda: NoiseEnv(**made)] * 2, autoreset_mode=AutoresetMode(mode))
    assert ours.metadata["autoreset_mode"] is AutoresetMode(mode)
    actions = np.random.default_rng(0).standard_normal((36, 2, 16), dtype=np.float32)
    results = [ours.reset(seed=3), theirs.reset(seed=3)]
    ended = 0
    for action in actions:
        same(*results)
        if mode == "Disabled" and results[0][2:] and results[0][2].all():
            with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
                ours.step(action)
            mask = {"reset_mask": np.ones(2, dtype=bool)}
            results = [env.reset(options=dict(mask)) for env in (ours, theirs)]
        else:
            results = [env.step(action) for env in (ours, theirs)]
            ended += results[0][2].all()
    assert ended == 2


def same(ours, theirs):
    """Equal in every observation, number and key, up to the rounding of rewards."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, tuple) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif isinstance(ours, np.ndarray):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=0.05)
    else:
        assert ours == theirs


def test_unknown_autoreset_modes_are_refused():
    with pytest.raises(ValueError, match=r"autoreset_mode must be one of .*'SameStep'"):
        make_vec(autoreset_mode="sometimes")
    assert make_vec(autoreset_mode=AutoresetMode.DISABLED).metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert NoiseVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP  # the class's is not touched


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_unknown_arguments_are_type_errors(make, turbo):
    with pytest.raises(TypeError, match="unknown denoiser option 'frameskip'"):
        make(ID, frameskip=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
        make(ID, denoiser=turbo, frameskip=4)
    with pytest.raises(ValueError, match="reward_device belongs to a reward given by name"):
        make(ID, reward=redness, reward_device="cpu")


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_misspelt_options_of_reset_are_refused(make):
    with pytest.raises(ValueError, match="unknown option 'promt' of reset; did you mean 'prompt'"):
        make(ID).reset(options={"promt": "a photo of a red circle"})


def test_infos_have_the_same_keys_shapes_and_types_on_every_call():
    """What Minari asks of infos that it records."""
    kinds = lambda info: {key: (type(value), np.shape(value)) for key, value in info.items()}
    env = gymnasium.make(ID, prompts=PROMPTS)
    _, first = env.reset(seed=0)
    infos = [env.step(np.full(16, 0.1, np.float32))[-1] for _ in range(16)]
    assert all(kinds(info) == kinds(first) for info in infos)
    assert {info["prompt"] for info in infos} == {first["prompt"]}
    assert not any(info["reward/shapes-match"] or info["noise"].any() for info in (first, *infos[:-1]))
    assert infos[-1]["reward/shapes-match"] and infos[-1]["noise"].all()


def test_options_that_minari_hands_on_are_let_through():
    for env in (gymnasium.make(ID), make_vec()):
        env.reset(options={"prompt": PROMPTS[0], "minari_autoseed": False})


def test_prompts_that_the_default_reward_cannot_judge_are_refused_at_reset():
    env = gymnasium.make(ID)
    with pytest.raises(ValueError, match="'a dog' is not a caption"):
        env.reset(options={"prompt": "a dog"})


def test_pickles_make_the_same_environment():
    env = gymnasium.make(ID, prompts=PROMPTS, reward={"brightness": 1.0})
    again = pickle.loads(pickle.dumps(env))
    assert again.unwrapped.task.prompts == PROMPTS and episode(again, 4)[1] == episode(env, 4)[1]
    envs = pickle.loads(pickle.dumps(make_vec(3, prompts=PROMPTS, autoreset_mode="SameStep")))
    assert envs.num_envs == 3 and envs.autoreset_mode is AutoresetMode.SAME_STEP
    assert set(envs.reset(seed=0)[1]["prompt"]) <= set(PROMPTS)


def redness(images, prompts):
    return [float(image[0].mean()) for image in images]


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (redness, "redness"),
        (Redness(), "redness"),
        (Measured(), "redness"),
        (lambda images, prompts: images[:, 0].mean((1, 2)), "lambda"),
    ],
)
def test_rewards_may_be_functions_and_scorers(reward, name):
    env = gymnasium.make(ID, reward=reward, prompts=PROMPTS, render_mode="rgb_array")
    *_, info = result = episode(env, 0)
    assert [key for key in info if key.startswith("reward/")] == [f"reward/{name}"]
    assert result[1] == info[f"reward/{name}"] == pytest.approx(np.asarray(env.render())[..., 0].mean() / 255, abs=0.01)
    for made in (gymnasium.make(ID, reward=reward), gymnasium.make_vec(ID, 2, reward=reward)):
        made.reset(seed=0)
        for _ in range(16):
            _, rewards, *_, info = made.step(made.action_space.sample())
        assert np.shape(rewards) == ((2,) if hasattr(made, "num_envs") else ())
        assert np.all((np.array(rewards) > 0) & (np.array(rewards) < 1))
        assert info[f"reward/{name}"] == pytest.approx(rewards)


@pytest.mark.parametrize("reward", [Redness, 3, object()])
def test_what_is_no_reward_is_refused(reward):
    with pytest.raises(ValueError, match=r"reward: expected a name, a function of images and prompts, or a scorer"):
        gymnasium.make(ID, reward=reward)
    with pytest.raises(ValueError, match="options and a device belong to scorers given by name"):
        load_reward(redness, device="cpu")
    assert load_reward(redness, normalize="running").normalize == "running"


def test_objects_are_shared_not_copied(turbo):
    reward = Redness()
    with pytest.raises(TypeError):
        copy.deepcopy(reward)
    env = gymnasium.make(ID, denoiser=turbo, reward=reward, prompts=PROMPTS)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    for spec in (env.spec, copy.deepcopy(env.spec), make_vec(denoiser=turbo, reward=reward, prompts=PROMPTS).spec):
        assert spec.kwargs["reward"] is reward and spec.kwargs["denoiser"] is turbo
    again = gymnasium.make(env.spec)
    task = again.get_wrapper_attr("task")
    assert task.reward.rewards[0][0] is reward and task.denoiser is turbo
    assert torch.equal(*(torch.tensor(episode(e, 1)[1]) for e in (env, again)))


def test_a_loaded_policy_draws_the_same_noise_twice(tmp_path):
    """Also with the authors' dropout."""
    NoiseARPolicy(NoiseARConfig(dropout=0.15)).save_pretrained(tmp_path)
    policy, text = NoiseARPolicy.from_pretrained(tmp_path), torch.randn(1, 16, 256)
    torch.nn.init.normal_(policy.network.prediction_head[-1].weight, std=0.1)
    assert torch.equal(policy.sample(text, seeds=[1]).patches, policy.sample(text, seeds=[1]).patches)
