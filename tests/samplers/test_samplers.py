import pytest
import torch

from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.rewards import WeightedReward, load_reward
from noisear_rl.samplers import BestOf, GaussianSampler, PolicySampler
from noisear_rl.samplers.base import derived_seeds
from noisear_rl.samplers.reno import Reno, norm_regularizer
from noisear_rl.samplers.search import ZerothOrderSearch
from tests.conftest import random_policy
from tests.toys import NoDenoiser, Target

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]
SEEDS = [3, 2**40, 11]


@pytest.fixture(scope="module")
def match():
    """The reward that searches choose by."""
    return load_reward("shapes-match")


@pytest.fixture(scope="module")
def exact():
    """The judge, which searches never use."""
    return load_reward("shapes-exact")


@pytest.fixture(scope="module")
def captions():
    """Held-out captions and a seed for each."""
    return [caption.text for caption in balanced_captions("validation", 24)], list(range(24))


@pytest.fixture(scope="module")
def gaussian_samples(turbo, captions):
    """Samples of the captions from Gaussian noise."""
    return GaussianSampler(turbo)(*captions)


class Indifferent:
    """Scores every image the same, so all candidates tie."""

    name, statistics = "indifferent", (0.0, 1.0)

    def score(self, images, prompts):
        return torch.zeros(len(images))


class StochasticDenoiser(NoDenoiser):
    """Adds its own noise to the image, drawn from the denoising seed."""

    def own(self, seeds):
        return standard_noise(seeds, (3, *self.latent_shape[1:]))

    def denoise(self, noise, conditioning, seeds=None):
        return super().denoise(noise, conditioning) + self.own(seeds)


def build(name, turbo, match):
    gaussian = GaussianSampler(turbo)
    return {
        "gaussian": lambda: gaussian,
        "policy": lambda: PolicySampler(turbo, random_policy(scale=0.05)),
        "best_of": lambda: BestOf(gaussian, 3, match),
        "search": lambda: ZerothOrderSearch(gaussian, turbo, match, iterations=2, neighbours=2),
        "reno": lambda: Reno(gaussian, turbo, match, iterations=4),
    }[name]()


@pytest.mark.parametrize("name", ["gaussian", "policy", "best_of", "search", "reno"])
def test_an_image_follows_from_its_prompt_and_seed_alone(turbo, match, name):
    sampler = build(name, turbo, match)
    batch = sampler(PROMPTS, SEEDS)
    assert batch.noise.dtype == batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    tolerance = 5e-3 if name == "reno" else 1e-5  # gradient ascent accumulates rounding errors
    for i in (2, 0):
        alone = sampler(PROMPTS[i : i + 1], SEEDS[i : i + 1])
        torch.testing.assert_close(alone.noise[0], batch.noise[i], rtol=0, atol=tolerance)
        # The denoiser amplifies what the noise differs by.
        torch.testing.assert_close(alone.images[0], batch.images[i], rtol=0, atol=max(tolerance, 5e-5))
    again = turbo.denoise(batch.noise, turbo.encode(PROMPTS))
    torch.testing.assert_close(batch.images, again, rtol=0, atol=5e-5)
    if name in ("gaussian", "policy"):
        assert batch.kl_to_gaussian.shape == (3,)
    else:
        assert batch.kl_to_gaussian is None


def test_an_untrained_policy_is_gaussian_and_a_trained_one_is_not(turbo):
    gaussian = GaussianSampler(turbo)(PROMPTS, SEEDS)
    assert torch.equal(gaussian.noise, standard_noise(SEEDS, turbo.latent_shape))
    untrained = PolicySampler(turbo, NoiseARPolicy(NoiseARConfig()).eval())(PROMPTS, SEEDS)
    assert torch.equal(untrained.noise, gaussian.noise) and torch.equal(untrained.images, gaussian.images)
    assert torch.equal(untrained.kl_to_gaussian, gaussian.kl_to_gaussian) and not gaussian.kl_to_gaussian.any()
    other = PolicySampler(turbo, random_policy())(PROMPTS, SEEDS)
    assert not torch.allclose(other.noise, gaussian.noise, atol=0.1)
    assert other.kl_to_gaussian.min() > 1


def test_ties_keep_the_start(turbo):
    plain = GaussianSampler(turbo)
    expected = plain(PROMPTS, SEEDS)
    tie = WeightedReward([(Indifferent(), 1.0)])
    for sampler in (BestOf(plain, 3, tie), ZerothOrderSearch(plain, turbo, tie, iterations=1, neighbours=2)):
        samples = sampler(PROMPTS, SEEDS)
        assert torch.equal(samples.noise, expected.noise) and torch.equal(samples.images, expected.images)


def test_best_of_one_is_the_plain_sampler(turbo, match):
    plain = PolicySampler(turbo, random_policy(scale=0.05))
    expected, samples = plain(PROMPTS, SEEDS), BestOf(plain, 1, match)(PROMPTS, SEEDS)
    assert torch.equal(samples.noise, expected.noise) and torch.equal(samples.images, expected.images)
    assert torch.equal(samples.kl_to_gaussian, expected.kl_to_gaussian) and samples.nfe == expected.nfe


def test_best_of_chooses_the_best_of_its_candidates(turbo, match):
    plain = GaussianSampler(turbo)
    candidates = [plain(PROMPTS, seeds) for seeds in (SEEDS, derived_seeds(SEEDS, 1), derived_seeds(SEEDS, 2))]
    scores = torch.stack([match.score(candidate.images, PROMPTS) for candidate in candidates])
    samples = BestOf(plain, 3, match)(PROMPTS, SEEDS)
    choice = scores.argmax(0).tolist()
    assert torch.equal(samples.noise, torch.stack([candidates[j].noise[i] for i, j in enumerate(choice)]))
    assert torch.equal(samples.images, torch.stack([candidates[j].images[i] for i, j in enumerate(choice)]))


def test_derived_seeds_differ_by_seed_and_index():
    indices = [(0,), (1,), (2,), (1, 1), (1, 2), (2, 1)]
    drawn = [seed for index in indices for seed in derived_seeds([0, 1, 2, 2**40], *index)]
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 0 and max(drawn) < 2**63
    assert derived_seeds([2], 1) == derived_seeds([1, 2], 1)[1:]


def test_candidates_differ_by_their_noise_alone():
    """The denoiser's own noise follows from the sample's seed, whichever candidate wins."""
    denoiser = StochasticDenoiser((1, 8, 4), 4)
    reward, prompts, seeds = WeightedReward([(Target(), 1.0)]), ["up"] * 8, list(range(8))
    plain = GaussianSampler(denoiser)
    search = ZerothOrderSearch(BestOf(plain, 4, reward), denoiser, reward, iterations=2, neighbours=2)
    for sampler in (BestOf(plain, 4, reward), BestOf(search, 2, reward)):
        samples = sampler(prompts, seeds)
        assert not torch.equal(samples.noise, plain(prompts, seeds).noise)
        torch.testing.assert_close(
            samples.images, samples.noise.expand(-1, 3, -1, -1) + denoiser.own(derived_seeds(seeds, 0))
        )


def counted(denoiser, sampler):
    """Rows per image that the network saw forward and backward, and the ``nfe`` that the sampler reports."""
    forward, backward = [], []
    hooks = [
        denoiser.network.register_forward_hook(lambda module, inputs, outputs: forward.append(len(outputs[0]))),
        denoiser.network.register_full_backward_hook(lambda module, inputs, outputs: backward.append(len(outputs[0]))),
    ]
    try:
        samples = sampler(PROMPTS, SEEDS)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(forward) / len(PROMPTS), sum(backward) / len(PROMPTS), samples.nfe


def test_network_evaluations_are_counted(shapes, turbo, match):
    guided, plain = GaussianSampler(shapes), GaussianSampler(turbo)
    assert counted(shapes, BestOf(guided, 2, match)) == (16, 0, 16)
    assert counted(turbo, plain) == (1, 0, 1)
    two = BestOf(plain, 2, match)
    assert counted(turbo, BestOf(two, 2, match)) == (4, 0, 4)
    assert counted(turbo, ZerothOrderSearch(two, turbo, match, iterations=2, neighbours=3)) == (8, 0, 8)
    reno = Reno(two, turbo, match, iterations=3)
    assert counted(turbo, reno) == (5, reno.gradient_evaluations, 5)
    assert reno.gradient_evaluations == 2
    for start in (plain, PolicySampler(turbo, random_policy(scale=0.05))):  # the first of its images is the start's
        assert counted(turbo, Reno(start, turbo, match, iterations=3)) == (3, 2, 3)


def test_best_of_four_beats_gaussian_noise(turbo, match, exact, captions, gaussian_samples):
    prompts, seeds = captions
    before = exact.score(gaussian_samples.images, prompts).mean()
    after = exact.score(BestOf(GaussianSampler(turbo), 4, match)(prompts, seeds).images, prompts).mean()
    assert after > before + 0.12  # 0.83 and 0.46


def test_search_beats_its_start_and_never_falls(turbo, match, exact, captions, gaussian_samples):
    prompts, seeds = captions
    start, samples = lambda prompts, seeds, denoising_seeds: gaussian_samples, gaussian_samples
    before, reward = exact.score(samples.images, prompts).mean(), match.score(samples.images, prompts)
    for iterations in (1, 4):
        search = ZerothOrderSearch(start, turbo, match, iterations=iterations)
        samples = search(prompts, seeds)
        higher = match.score(samples.images, prompts)
        assert (higher >= reward - 1e-5).all() and higher.mean() > reward.mean() + 0.01
        reward = higher
    assert exact.score(samples.images, prompts).mean() > before + 0.12  # 0.88 and 0.46
    assert samples.noise.std().item() == pytest.approx(1, abs=0.02)


def test_neighbours_keep_unit_variance_and_their_distance():
    """With a reward that always prefers the newest image, the search returns the neighbour itself."""

    class Newest:
        name, statistics, count = "newest", (0.0, 1.0), 0

        def score(self, images, prompts):
            self.count += 1
            return torch.full((len(images),), float(self.count))

    denoiser, seeds = NoDenoiser((4, 16, 16), 4), list(range(16))
    pivot = standard_noise(seeds, denoiser.latent_shape)
    for step_size in (0.1, 0.6, 1.0):
        reward = WeightedReward([(Newest(), 1.0)])
        start = GaussianSampler(denoiser)
        search = ZerothOrderSearch(start, denoiser, reward, iterations=1, neighbours=1, step_size=step_size)
        noise = search(["up"] * 16, seeds).noise
        assert noise.var().item() == pytest.approx(1, abs=0.05)
        cosine = torch.cosine_similarity(noise.flatten(1), pivot.flatten(1)).mean().item()
        assert cosine == pytest.approx((1 - step_size**2) ** 0.5, abs=0.03)


def test_norm_regularizer_is_minus_the_log_density_of_a_gaussian_norm():
    noise = standard_noise([1, 2, 3], (4, 8, 8)) * torch.tensor([0.8, 1.0, 1.3])[:, None, None, None]
    norm = noise.flatten(1).norm(dim=1)
    log_density = torch.distributions.Chi2(256.0).log_prob(norm.square()) + (2 * norm).log()
    constant = norm_regularizer(noise) + log_density
    torch.testing.assert_close(constant, constant[:1].expand(3), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_reno_is_torchs_sgd_on_each_sample(turbo, match, max_grad_norm):
    """The published recipe, sample by sample: clipped SGD with Nesterov momentum that keeps the best reward."""
    options = {"iterations": 4, "learning_rate": 2.0, "max_grad_norm": max_grad_norm, "batch_size": 1}
    prompts, seeds = PROMPTS[1:], SEEDS[1:]
    samples = Reno(GaussianSampler(turbo), turbo, match, **options)(prompts, seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        noise = standard_noise([seed], turbo.latent_shape).requires_grad_()
        optimizer = torch.optim.SGD([noise], lr=2.0, momentum=0.9, nesterov=True)
        tried = []
        for _ in range(4):
            images = turbo.denoise_differentiably(noise, turbo.encode([prompt])).clamp(0, 1)
            reward = match.score(images, [prompt])
            tried.append((reward.item(), noise.detach().clone()))
            optimizer.zero_grad()
            (-reward + 0.01 * norm_regularizer(noise)).sum().backward()
            torch.nn.utils.clip_grad_norm_(noise, max_grad_norm)
            optimizer.step()
        torch.testing.assert_close(samples.noise[i], max(tried, key=lambda t: t[0])[1][0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("reward", "gain"), [("shapes-match", 0.1), ("shapes-clip", 1.0)])
def test_reno_raises_its_reward(turbo, captions, gaussian_samples, reward, gain):
    prompts, seeds = captions[0][:6], captions[1][:6]
    climbed, start = load_reward(reward), GaussianSampler(turbo)
    with torch.no_grad():  # as an evaluation calls it
        before = climbed.score(gaussian_samples.images[:6], prompts)
        samples = Reno(start, turbo, climbed, iterations=6, learning_rate=10.0)(prompts, seeds)
        after = climbed.score(samples.images, prompts)
    assert (after >= before - 1e-4).all() and (after - before).mean() > gain
    assert not samples.noise.requires_grad and not samples.images.requires_grad


def test_regularization_keeps_the_noise_gaussian(turbo, match, captions):
    prompts, seeds = captions[0][8:12], captions[1][8:12]
    free, held = (
        Reno(GaussianSampler(turbo), turbo, match, iterations=10, learning_rate=10.0, regularization=w)(prompts, seeds)
        for w in (0.0, 0.01)
    )
    start = standard_noise(seeds, turbo.latent_shape)
    assert abs(held.noise.std() - start.std()) < 0.04 and abs(held.noise.mean() - start.mean()) < 0.04
    assert free.noise.std() > held.noise.std() + 0.04  # 1.10 and 1.01


@pytest.mark.parametrize("kind", ["best_of", "search", "reno"])
def test_searches_start_from_a_policy(turbo, match, captions, kind):
    start = PolicySampler(turbo, random_policy(scale=0.05))
    sampler = {
        "best_of": BestOf(start, 4, match),
        "search": ZerothOrderSearch(start, turbo, match, iterations=3),
        "reno": Reno(start, turbo, match, iterations=4),
    }[kind]
    prompts, seeds = captions[0][:8], captions[1][:8]
    first, samples = start(prompts, seeds), sampler(prompts, seeds)
    before, after = match.score(first.images, prompts), match.score(samples.images, prompts)
    assert (after >= before - 1e-4).all() and after.mean() > before.mean() + 0.02
    if kind == "reno":  # a few short steps from the policy's noise, far from the Gaussian one
        assert (samples.noise - first.noise).norm() < (samples.noise - standard_noise(seeds, turbo.latent_shape)).norm()


def test_an_image_that_cannot_be_scored_loses():
    """The scorer fails on about half of the images, and on all images of one prompt."""

    class Fails:
        name, statistics = "fails", (0.0, 1.0)

        def score(self, images, prompts):
            upper = images.clamp(0, 1).mean((1, 2, 3))
            lost = torch.tensor([prompt == "down" for prompt in prompts]) | (upper < 0.32)
            return torch.where(lost, torch.nan, upper)

    denoiser, reward = NoDenoiser((1, 8, 4), 4), WeightedReward([(Fails(), 1.0)])
    start, prompts, seeds = GaussianSampler(denoiser), ["up", "down"] * 16, list(range(32))
    plain = start(prompts, seeds).noise
    lost = reward.score(start(prompts, seeds).images, prompts).isnan()
    assert 4 < lost[::2].sum() < 16
    for sampler in (
        BestOf(start, 16, reward),
        ZerothOrderSearch(start, denoiser, reward, iterations=15, step_size=1.0),
        Reno(BestOf(start, 16, reward), denoiser, reward, iterations=3),
    ):
        samples = sampler(prompts, seeds)
        found = reward.score(samples.images, prompts).isfinite()
        assert found[::2].all() and not found[1::2].any() and samples.noise.isfinite().all()
        assert torch.equal(samples.noise[1::2], plain[1::2])


def test_arguments_out_of_range(turbo, match):
    gaussian = GaussianSampler(turbo)
    with pytest.raises(ValueError, match="count must be at least 1"):
        BestOf(gaussian, 0, match)
    for step_size in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="step_size"):
            ZerothOrderSearch(gaussian, turbo, match, step_size=step_size)
    for option in ({"iterations": 0}, {"neighbours": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            ZerothOrderSearch(gaussian, turbo, match, **option)
    for option in ("iterations", "batch_size"):
        with pytest.raises(ValueError, match="at least 1"):
            Reno(gaussian, turbo, match, **{option: 0})
    for option in ({"learning_rate": 0.0}, {"max_grad_norm": 0.0}, {"regularization": -1.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Reno(gaussian, turbo, match, **option)
    running = WeightedReward(match.rewards, normalize="running")
    for make in (
        lambda: BestOf(gaussian, 2, running),
        lambda: ZerothOrderSearch(gaussian, turbo, running),
        lambda: Reno(gaussian, turbo, running),
    ):
        with pytest.raises(ValueError, match="running statistics"):
            make()
    with pytest.raises(ValueError, match="one seed per prompt"):
        gaussian(PROMPTS, [1])
    with pytest.raises(ValueError, match="another denoiser or patch size: its text_dim"):
        PolicySampler(turbo, NoiseARPolicy(NoiseARConfig(text_dim=32)))


@pytest.mark.parametrize("spec", ["jpeg-compressibility", "shapes-exact", {"shapes-match": 1, "shapes-exact": 0.1}])
def test_reno_needs_a_gradient(turbo, spec):
    with pytest.raises(ValueError, match=r"'(jpeg-compressibility|shapes-exact)' gives no gradient"):
        Reno(GaussianSampler(turbo), turbo, load_reward(spec), iterations=2)(PROMPTS, SEEDS)
