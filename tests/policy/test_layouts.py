"""Policies with several layouts: the first patch chooses one, with the probabilities that the text decides."""

import numpy as np
import pytest
import torch

from noisear_rl.algos import nll
from noisear_rl.data.layouts import LayoutRows
from noisear_rl.data.pairs import LAYOUT_FEATURES
from noisear_rl.data.shards import write_shard
from noisear_rl.files import check_manifest
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import unpatchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.policy.layouts import choose_layout, layout_codes
from noisear_rl.prompts.reader import PromptReader
from tests.conftest import random_policy

TEXT = torch.randn(6, 7, 256, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(6, 7, dtype=torch.bool)
MASK[::2, 4:] = False


def decided_policy():
    """A random policy whose text makes some layouts much more likely than others."""
    policy = random_policy(layouts=5)
    torch.nn.init.normal_(policy.network.layout_head.logits.weight, std=1.0)
    torch.nn.init.normal_(policy.network.layout_head.embedding.weight, std=2.0)
    return policy


def test_codes_are_orthogonal_unit_vectors():
    codes = layout_codes(5, 16)
    torch.testing.assert_close(codes @ codes.T, torch.eye(5, dtype=torch.float64))
    first, last = layout_codes(12, 16)[[0, -1], [1, 13]].tolist()  # trained policies depend on them
    assert (first, last) == (pytest.approx(0.5011018104), pytest.approx(0.2359294760))


def test_standard_normal_first_patches_choose_by_the_softmax_of_the_logits():
    logits = torch.tensor([0.0, 1.5, -1.0, 0.5])
    first = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(choose_layout(first, logits.expand(len(first), -1)), minlength=4) / len(first)
    torch.testing.assert_close(share, logits.softmax(0), rtol=0, atol=0.01)
    far = 40 * layout_codes(4, 8).float()  # where a distribution function in float32 is 1
    assert choose_layout(far, logits.expand(4, -1)).tolist() == [0, 1, 2, 3]


def test_untrained_is_gaussian_noise():
    policy = NoiseARPolicy(NoiseARConfig(layouts=16))
    sample = policy.sample(TEXT, MASK, seeds=range(6))
    torch.testing.assert_close(policy.noise(sample), standard_noise(range(6), (4, 8, 8)), rtol=0, atol=0)
    assert policy.kl_divergence(sample.patches, TEXT, MASK).abs().max() == 0


def test_one_density():
    """What is sampled is what is scored: with and without cache, alone and in a batch, after saving and loading."""
    policy = decided_policy()
    sample = policy.sample(TEXT, MASK, seeds=range(6))
    torch.testing.assert_close(policy.log_prob(sample.patches, TEXT, MASK), sample.log_prob, rtol=1e-4, atol=1e-3)
    again = policy.sample(TEXT, MASK, seeds=range(6), use_cache=False)
    torch.testing.assert_close(again.patches, sample.patches, rtol=1e-4, atol=1e-4)
    alone = policy.sample(TEXT[3:4], MASK[3:4], seeds=[3])
    torch.testing.assert_close(alone.patches[0], sample.patches[3], rtol=1e-4, atol=1e-4)


def test_the_layout_of_the_first_patch_is_what_the_density_uses(tmp_path):
    policy = decided_policy()
    policy.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    patches = policy.sample(TEXT, MASK, seeds=range(6)).patches
    logits = policy.network.read(TEXT, MASK).layout_logits
    chosen = choose_layout(patches[:, 0], logits)
    assert len(chosen.unique()) > 1 and torch.equal(policy.chosen_layout(patches, TEXT, MASK), chosen)
    given, log_prob = policy.given_layout(patches, TEXT, MASK, chosen)
    mean = policy.distribution(patches, TEXT, MASK).mean
    torch.testing.assert_close(given.mean, mean)
    torch.testing.assert_close(log_prob, logits.log_softmax(1)[torch.arange(6), chosen])
    other, _ = policy.given_layout(patches, TEXT, MASK, (chosen + 1) % 5)
    torch.testing.assert_close(other.mean[:, 0], mean[:, 0])  # before the choice
    assert ((other.mean - mean)[:, 1:].abs().amax((1, 2)) > 0.01).all()


def test_a_low_layout_temperature_takes_the_likeliest_layout():
    policy = decided_policy()
    policy.set_temperatures(layout_temperature=1e-3)
    likeliest = policy.network.read(TEXT, MASK).layout_logits.argmax(1)
    for start in range(0, 60, 6):
        patches = policy.sample(TEXT, MASK, seeds=range(start, start + 6)).patches
        assert torch.equal(policy.chosen_layout(patches, TEXT, MASK), likeliest)
    layout = torch.arange(6) % 5
    _, cold = policy.given_layout(patches, TEXT, MASK, layout)
    _, log_prob = decided_policy().given_layout(patches, TEXT, MASK, layout)
    torch.testing.assert_close(cold, log_prob)  # what pretraining fits


def test_temperatures_that_are_refused():
    with pytest.raises(ValueError, match="temperatures must be positive, got 0 and None"):
        decided_policy().set_temperatures(0)
    with pytest.raises(ValueError, match="this one has none"):
        random_policy().set_temperatures(layout_temperature=2.0)


def test_rejects():
    with pytest.raises(ValueError, match="layouts must be at most 16, the elements of a patch, not 17"):
        NoiseARConfig(layouts=17)
    with pytest.raises(ValueError, match="layouts belong to architecture='paper'"):
        NoiseARConfig(layouts=2, architecture="released")
    patches, layout = torch.zeros(6, 16, 16), torch.full((6,), 2)
    for layouts in (0, 2):
        with pytest.raises(ValueError, match=f"layout 2 of a policy whose configuration has layouts: {layouts}"):
            NoiseARPolicy(NoiseARConfig(layouts=layouts)).given_layout(patches, TEXT, MASK, layout)


def test_rows_of_several_layouts():
    prompts, layouts = ["a", "a", "b", "b", "b", "b", "c"], [0, 2, 1, 1, 0, 3, 2]  # b counts twice
    rows = LayoutRows(prompts, layouts)
    assert rows.leads(np.arange(7)).tolist() == [0, 2, 3, 6]
    assert rows.leads(np.array([5, 1, 3, 0])).tolist() == [3, 0]
    for row, possible in ((0, [0, 1]), (3, [2, 4, 5]), (6, [6])):
        drawn = rows.draw(np.full(3000, row), np.random.default_rng(0))
        assert np.unique(drawn).tolist() == possible
        np.testing.assert_allclose(np.bincount(drawn)[possible] / 3000, 1 / len(possible), atol=0.05)


@pytest.mark.parametrize("several", [True, False])
def test_pretraining_keeps_both_layouts(tmp_path, turbo, several):
    """Two opposite layouts of each prompt, which differ in the last patch: a policy without layouts blurs them."""
    pattern = 1.5 * torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    layout = unpatchify(torch.cat([torch.zeros(1, 15, 16), pattern], 1), (4, 8, 8), 2)
    prompts = [f"a photo of a {color} circle" for color in ("red", "green", "blue", "yellow") for _ in range(64)]
    targets = [(sign * layout).flatten().tolist() for sign in (1, -1)]
    rows: dict[str, list] = {
        "prompt": prompts,
        "seed": [0] * len(prompts),
        "target": targets * 128,
        "layout": [0, 1] * 128,
    }
    kept = [name for name in rows if several or name != "layout"]
    check_manifest(tmp_path / "pairs", {"denoiser": "shapes-turbo", "noise_scale": 0.5, "noises": 2})
    write_shard(
        tmp_path / "pairs",
        0,
        {name: rows[name] for name in kept},
        type(LAYOUT_FEATURES)({n: LAYOUT_FEATURES[n] for n in kept}),
    )
    config = nll.NLLConfig(
        tmp_path / "pairs",
        output_dir=tmp_path / "run",
        denoiser="shapes-turbo",
        policy=NoiseARConfig(text_encoder="tokens", log_variance="shared", d_model=64, d_ff=64, n_layers=1, layouts=2),
        epochs=100,
        batch_size=64,
        held_out_share=0.25,
        learning_rate=1e-2,
        log_every=100,
    )
    policy = nll.train(config)
    text, mask = PromptReader("tokens", turbo).read_prompts(prompts[:1] * 400)
    patches = policy.sample(text, mask, seeds=range(400)).patches
    share = policy.distribution(patches, text, mask).mean[:, -1] @ pattern[0, 0] / pattern.square().sum()
    if several:  # 1 for one layout, -1 for the other
        assert ((share.abs() - 1).abs() < 0.2).float().mean() > 0.95
        assert 0.4 < (share > 0).float().mean() < 0.6
        config.output_dir, config.policy = tmp_path / "without", NoiseARConfig()
        with pytest.raises(ValueError, match=r"several layouts per prompt: set policy\.layouts to at least 2"):
            nll.train(config)
    else:
        assert (share.abs() < 0.2).all()
