"""Policies that whiten their text or read tokens distinguish prompts that differ only in the order of their words."""

import itertools

import pytest
import torch
from transformers import BertTokenizer

from noisear_rl.algos import reinforce
from noisear_rl.denoisers import Conditioning
from noisear_rl.learning.records import read_records
from noisear_rl.learning.text_pathway import cross_talk, fit_text
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.prompts.reader import PromptReader
from tests import toys

SIZES = {"latent_shape": (1, 8, 4), "patch_size": 4, "text_dim": 24, "d_model": 64, "d_ff": 64, "n_layers": 1}
WORDS, SPECIAL = ("a", "b", "c", "d"), ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPTS = tuple(f"{first} {second}" for first, second in itertools.permutations(WORDS, 2))
WHITENED = {"text_features": "whitened", "text_scale": 4.0}
TOKENS = {"text_encoder": "tokens", "text_layers": 1}


class BagOfWords(toys.NoDenoiser):
    """Embeds a prompt as text encoders do: which words there are makes up nearly all of it, their order 2 %."""

    text_shape = (4, 24)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL + WORDS)}, model_max_length=4)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(24, generator=generator)
    words = dict(zip(WORDS, torch.randn(4, 24, generator=generator), strict=True))
    orders = dict(zip(WORDS, torch.randn(4, 24, generator=generator), strict=True))

    def encode(self, prompts):
        rows = []
        for prompt in prompts:
            first, second = prompt.split()
            bag = 2 * self.common + self.words[first] + self.words[second]
            rows.append(torch.stack([bag + 0.02 * self.orders[first], bag - 0.02 * self.orders[second]]))
        text = torch.nn.functional.pad(torch.stack(rows), (0, 0, 0, 2))
        mask = torch.tensor([True, True, False, False]).expand(len(prompts), 4)
        return Conditioning(list(prompts), text, mask, {"text": text})


class Order(toys.Obey):
    """The upper projection should be 2 if the words are in alphabetical order, otherwise -2."""

    name = "order"

    def score(self, images, prompts):
        return super().score(
            images, ["up" if prompt == " ".join(sorted(prompt.split())) else "down" for prompt in prompts]
        )


def trained(folder, **features) -> float:
    """Progress of the last three updates; 0 for Gaussian noise, and without the order, 1 at the optimum."""
    config = reinforce.ReinforceConfig(
        toys.register(Order(), prompts=PROMPTS, denoiser=BagOfWords((1, 8, 4), 4)),
        policy=NoiseARConfig(**(SIZES | features), log_variance="fixed"),
        output_dir=folder,
        prompts_per_update=12,
        samples_per_prompt=16,
        updates=25,
        target_kl=0.5,
        save_every=25,
    )
    reinforce.train(config)
    returns = [record["charts/episodic_return"] for record in read_records(folder)]
    return toys.progress(Order(), sum(returns[-3:]) / 3)


def test_order_of_words_is_learned_from_whitened_text_and_from_tokens(tmp_path):
    assert trained(tmp_path / "normalized") < 0.3
    assert trained(tmp_path / "whitened", **WHITENED) > 0.8
    assert trained(tmp_path / "tokens", **TOKENS) > 0.8
    talk = {name: read_records(tmp_path / name)[-1]["policy/cross_talk"] for name in ("normalized", "whitened")}
    assert talk["whitened"] < 0.5 < talk["normalized"]
    assert not load_policy(tmp_path / "whitened").needs_text_statistics  # the checkpoint holds them


def batch(policy, denoiser, prompts):
    """64 episodes per prompt, whose advantage is the mean of the last patch."""
    conditioning = denoiser.encode([prompt for prompt in prompts for _ in range(64)])
    text, mask = conditioning.policy_embeds, conditioning.policy_mask
    patches = policy.sample(text, mask, seeds=range(len(text))).patches
    groups = torch.arange(len(prompts)).repeat_interleave(64)
    return patches, text, mask, patches[:, -1].mean(-1), groups


def test_cross_talk_is_the_share_of_a_step_that_others_take():
    denoiser = BagOfWords((1, 8, 4), 4)
    torch.manual_seed(0)
    policy = NoiseARPolicy(NoiseARConfig(**SIZES)).eval()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    patches, text, mask, advantages, groups = same = batch(policy, denoiser, ["a b", "a b"])
    assert cross_talk(policy, *same) == pytest.approx(1.0, abs=1e-3)
    assert cross_talk(policy, *batch(policy, denoiser, ["a b", "b a"])) > 0.95
    assert torch.tensor(cross_talk(policy, *batch(policy, denoiser, ["a b"]))).isnan()
    assert torch.tensor(cross_talk(policy, patches, text, mask, 0 * advantages, groups)).isnan()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())

    torch.manual_seed(0)
    whitened = NoiseARPolicy(NoiseARConfig(**SIZES, **WHITENED)).eval()
    fit_text(whitened, PromptReader("denoiser", denoiser), PROMPTS, seed=0)
    assert cross_talk(whitened, *batch(whitened, denoiser, ["a b", "b a"])) < 0.9


@pytest.mark.parametrize("reading", [{"text_layers": 1}, TOKENS], ids=["embedding", "tokens"])
def test_whitening_distinguishes_captions_that_share_most_words(random_denoiser, reading):
    """Before any training: otherwise a policy has to learn first that one word of many matters."""
    captions = [f"a photo of a red circle {relation} a blue square" for relation in ("left of", "right of", "above")]
    reader = PromptReader(reading.get("text_encoder", "denoiser"), random_denoiser)
    talk = {}
    for name, features in {"normalized": {"text_scale": 4.0}, "whitened": WHITENED}.items():
        torch.manual_seed(0)
        config = NoiseARConfig(d_model=64, d_ff=64, n_layers=1, **reading, **features)
        policy = NoiseARPolicy(config.resized(reader.sizes)).eval()
        fit_text(policy, reader, captions, seed=0)
        text, mask = reader.read_prompts([caption for caption in captions for _ in range(64)])
        patches = policy.sample(text, mask, seeds=range(len(text))).patches
        groups = torch.arange(3).repeat_interleave(64)
        talk[name] = cross_talk(policy, patches, text, mask, patches[:, -1].mean(-1), groups)
    assert talk["whitened"] < 0.5 < 0.85 < talk["normalized"]


def test_statistics_are_fitted_once_and_only_where_they_are_needed():
    denoiser = BagOfWords((1, 8, 4), 4)
    reader = PromptReader("denoiser", denoiser)
    policy = NoiseARPolicy(NoiseARConfig(**SIZES, **WHITENED))
    fit_text(policy, reader, PROMPTS, seed=0)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    fit_text(policy, reader, PROMPTS[:2], seed=0)  # a policy that goes on training keeps its statistics
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    plain = NoiseARPolicy(NoiseARConfig(**SIZES))
    fit_text(plain, reader, PROMPTS, seed=0)
    conditioning = denoiser.encode(PROMPTS)
    for unfit in (policy, plain):
        with pytest.raises(ValueError, match="needs no text statistics"):
            unfit.fit_text(conditioning.policy_embeds, conditioning.policy_mask)
