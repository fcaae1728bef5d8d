"""What the public functions refuse, by the name of the argument, and what is shared instead of copied."""

import copy

import gymnasium
import numpy as np
import pytest
import torch

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.denoisers import load_denoiser
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.rewards import WeightedReward, load_reward
from tests import toys
from tests.faults.test_divergence import TINY

NAN = float("nan")


@pytest.fixture(scope="module")
def policy():
    return NoiseARPolicy(NoiseARConfig(**TINY)).eval()


def with_value(shape, value, dtype=torch.float32):
    values = torch.zeros(shape, dtype=dtype)
    values.view(-1)[3] = value
    return values


TEXT, PATCHES, MASK = (2, 5, 256), (2, 16, 16), torch.ones(2, 5, dtype=torch.bool)
BAD_TEXT = {
    "text holds NaN or infinite": [with_value(TEXT, value) for value in (NAN, float("inf"), -float("inf"))],
    r"text must be real numbers, not torch\.complex64": [with_value(TEXT, 1j, torch.complex64)],
    "expected a text embedding": [torch.zeros(2, 5, 255), torch.zeros(2, 256), torch.zeros(2, 5, 256, 1)],
}


@pytest.mark.parametrize("message", BAD_TEXT)
def test_text_that_is_refused(message, policy):
    for text in BAD_TEXT[message]:
        for call in (
            lambda text=text: policy.sample(text, seeds=[0, 1]),
            lambda text=text: policy.log_prob(torch.zeros(PATCHES), text),
            lambda text=text: policy.distribution(torch.zeros(PATCHES), text),
            lambda text=text: policy.kl_divergence(torch.zeros(PATCHES), text),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.stack([MASK[0], ~MASK[0]]), "text_mask is false for every token of a row"),
        (torch.zeros(2, 5), "text_mask is false for every token of a row"),
        (MASK[:, :4], r"expected a text mask \(2, 5\), got \(2, 4\)"),
        (MASK[:1], r"expected a text mask \(2, 5\)"),
    ],
)
def test_masks_that_are_refused(mask, message, policy):
    for call in (
        lambda: policy.sample(torch.zeros(TEXT), mask, seeds=[0, 1]),
        lambda: policy.log_prob(torch.zeros(PATCHES), torch.zeros(TEXT), mask),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (with_value(PATCHES, NAN), "patches hold NaN or infinite"),
        (with_value(PATCHES, float("inf")), "patches hold NaN or infinite"),
        (with_value(PATCHES, 1j, torch.complex64), r"patches must be real numbers, not torch\.complex64"),
        (torch.zeros(2, 16, 15), r"expected patches \(2, 16, 16\)"),
    ],
)
def test_patches_that_are_refused(patches, message, policy):
    with pytest.raises(ValueError, match=message):
        policy.log_prob(patches, torch.zeros(TEXT))


def test_sources_of_noise(policy):
    text = torch.zeros(TEXT)
    with pytest.raises(ValueError, match="seeds and generator are both given: choose one"):
        policy.sample(text, seeds=[0, 1], generator=torch.Generator())
    with pytest.raises(ValueError, match="3 seeds for 2 samples"):
        policy.sample(text, seeds=[0, 1, 2])
    one, two = (policy.sample(text, generator=torch.Generator().manual_seed(1)).patches for _ in range(2))
    assert torch.equal(one, two)


def test_a_density_that_is_not_finite():
    policy = NoiseARPolicy(NoiseARConfig(**TINY)).eval()
    for parameter in policy.parameters():
        parameter.data.fill_(1e30)
    with pytest.raises(ValueError, match="the policy's density is not finite") as caught:
        policy.sample(torch.ones(TEXT), seeds=[0, 1])
    assert "\n" not in str(caught.value)


def test_denoisers_and_rewards_are_shared_not_copied():
    """`gym.make` copies its arguments; a pipeline would be copied with all its weights."""
    denoiser, reward = load_denoiser("shapes-turbo", dtype="float32"), load_reward("brightness")
    for thing in (denoiser, reward):
        assert copy.deepcopy(thing) is thing and copy.deepcopy({"a": [thing]})["a"][0] is thing
    scalar = gymnasium.make("NoiseAR-Shapes-v0", denoiser=denoiser, reward=reward)
    batched = gymnasium.make_vec("NoiseAR-Shapes-v0", 2, denoiser=denoiser, reward=reward)
    for task in (scalar.unwrapped.task, batched.unwrapped.task):
        assert task.denoiser is denoiser and task.reward is reward
    assert scalar.spec.kwargs["denoiser"] is denoiser
    again = gymnasium.make(scalar.spec)
    assert again.unwrapped.task.denoiser is denoiser
    env = toys.register(toys.Target())
    given = gymnasium.registry[env].kwargs["reward"]
    assert gymnasium.make(env, disable_env_checker=True).unwrapped.task.reward is given


class Session:
    """A denoiser that cannot be copied, like a session of ONNX Runtime; its author shares it."""

    def __init__(self):
        self.inner = toys.NoDenoiser((1, 8, 4), 4)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle this session")

    def __deepcopy__(self, memo):
        return self


def test_a_denoiser_that_cannot_be_copied():
    session = Session()
    reward = WeightedReward([(toys.Target(), 1.0)])
    env = gymnasium.make("NoiseAR-Shapes-v0", denoiser=session, reward=reward, prompts=toys.PROMPTS)
    assert env.unwrapped.task.denoiser is session
    env.reset(seed=0)
    for _ in range(2):
        _, value, terminated, *_ = env.step(np.zeros(16, dtype=np.float32))
    assert terminated and value == pytest.approx(-9.0)


@pytest.mark.parametrize("prompt", ["", "  ", 3, ["up"], {"a": 1}, b"up"])
def test_prompts_that_are_refused(prompt):
    env = gymnasium.make("NoiseAR-ShapesTurbo-v0", disable_env_checker=True)
    with pytest.raises(ValueError, match="a prompt must be text, not"):
        env.reset(options={"prompt": prompt})
    with pytest.raises(ValueError, match=r"a photo of a red circl\b.*"):
        env.reset(options={"prompt": "a photo of a red circl"})
