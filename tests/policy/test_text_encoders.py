"""What a policy reads: token ids, other frozen encoders, and layers over the text; one density whatever it is."""

import json

import gymnasium
import pytest
import torch
from huggingface_hub import HfApi
from transformers import BartConfig, BartModel, LlamaConfig, LlamaModel

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.policy.critic import NoiseARCritic
from noisear_rl.policy.layers import Whitening
from noisear_rl.prompts.reader import LONGEST, PromptReader, frozen_encoder
from noisear_rl.samplers import PolicySampler
from tests import tiny_pipelines, toys
from tests.conftest import random_policy

TOKENS = {"text_encoder": "tokens", "text_vocabulary": 50, "text_length": 16}
READINGS = {
    "tokens": TOKENS,
    "whitened tokens, two layers": TOKENS | {"text_layers": 2, "text_features": "whitened", "text_scale": 4.0},
    "embedding, one layer": {"text_layers": 1},
    "whitened embedding, two layers": {"text_layers": 2, "text_features": "whitened", "text_scale": 4.0},
}
BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
MASK = torch.arange(16) < torch.tensor([16, 4, 9, 12, 7, 16])[:, None]
PROMPTS = ["a photo of a red circle", "two blue squares", "a photo of a red circle", "a lighthouse at dawn"]


def text_of(options, seed=0):
    """Six prompts as the policy reads them, ``(6, 16, D)``."""
    generator = torch.Generator().manual_seed(seed)
    if "text_vocabulary" in options:
        return torch.randint(50, (6, 16, 1), generator=generator).float()
    return torch.randn(6, 16, 256, generator=generator)


@pytest.fixture(params=READINGS)
def options(request):
    return READINGS[request.param]


def fitted(policy, text):
    """The policy with its text statistics, if it needs any."""
    if policy.needs_text_statistics:
        policy.fit_text(text, MASK)
    return policy


def test_whitening_is_of_the_embeddings_and_of_the_layers_output():
    for name, widths in (("whitened tokens, two layers", [128]), ("whitened embedding, two layers", [128, 256])):
        options = READINGS[name] | {"text_layers": 2}
        text = text_of(options)
        policy = fitted(NoiseARPolicy(NoiseARConfig(**options)), text)
        white = [m for m in policy.modules() if isinstance(m, Whitening)]
        assert sorted(len(m.mean) for m in white) == widths and all(m.fitted for m in white)
        encoded = policy.network.encode(text, MASK[:, None, None])[MASK]  # (tokens, d)
        torch.testing.assert_close(encoded.mean(0), torch.zeros(128), rtol=0, atol=1e-4)
        covariance = torch.cov(encoded.T)
        assert (covariance - covariance.diag().diag()).abs().max() < 0.6 * covariance.diag().max()


def test_an_untrained_policy_is_the_gaussian_prior(options):
    text = text_of(options)
    policy = fitted(NoiseARPolicy(NoiseARConfig(**options)).eval(), text)
    sample = policy.sample(text, MASK, seeds=range(6))
    assert torch.equal(policy.noise(sample), standard_noise(range(6), (4, 8, 8)))
    assert policy.kl_divergence(sample.patches, text, MASK).abs().max() == 0
    assert NoiseARCritic(policy.config).eval()(sample.patches, text, MASK).abs().max() == 0


def test_one_density(options):
    text = text_of(options)
    policy = fitted(random_policy(**options), text)
    sample = policy.sample(text, MASK, seeds=range(6))
    assert policy.kl_divergence(sample.patches, text, MASK).mean() > 0.1  # far from the prior
    torch.testing.assert_close(policy.log_prob(sample.patches, text, MASK), sample.log_prob, rtol=1e-4, atol=1e-3)
    uncached = policy.sample(text, MASK, seeds=range(6), use_cache=False)
    torch.testing.assert_close(sample.patches, uncached.patches, rtol=1e-4, atol=1e-4)
    single = [policy.sample(text[i : i + 1], MASK[i : i + 1], seeds=[i]).patches for i in range(6)]
    torch.testing.assert_close(sample.patches, torch.cat(single), rtol=1e-4, atol=1e-4)
    shorter = policy.sample(text[1:2, :4], MASK[1:2, :4], seeds=[1]).patches
    torch.testing.assert_close(shorter, sample.patches[1:2], rtol=1e-4, atol=1e-4)


def test_padding_does_not_count_and_other_tokens_do(options):
    text, other = text_of(options), text_of(options, seed=1)
    policy = fitted(random_policy(**options), text)
    patches = standard_noise(range(6), (16, 16))
    expected = policy.log_prob(patches, text, MASK)
    padded = torch.where(MASK[..., None], text, other)
    torch.testing.assert_close(policy.log_prob(patches, padded, MASK), expected, rtol=1e-4, atol=1e-3)
    changed = torch.where(MASK[..., None], other, text)
    assert ((policy.log_prob(patches, changed, MASK) - expected).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_have_an_order_in_every_dtype(dtype):
    """Ids beyond 256 have no exact bfloat16."""
    policy = random_policy(**(TOKENS | {"text_vocabulary": 50_000})).to(dtype)
    ids = torch.tensor([[40_001, 300, 40_003], [40_003, 300, 40_001], [40_000, 300, 40_002]]).float()[..., None]
    patches = standard_noise(range(1), (16, 16)).expand(3, -1, -1)
    means = policy.distribution(patches, ids).mean
    assert min((means[0] - means[i]).abs().max().item() for i in (1, 2)) > 1e-3


def test_layers_are_trained_with_the_policy(options):
    text = text_of(options)
    policy = fitted(random_policy(**options), text)
    policy.log_prob(standard_noise(range(6), (16, 16)), text, MASK).sum().backward()
    read = [p for n, p in policy.named_parameters() if "text_layers" in n or "token_embedding" in n]
    assert read and all(p.grad is not None and p.grad.abs().max() > 0 for p in read)


def test_checkpoints(options, tmp_path):
    text = text_of(options)
    policy = fitted(random_policy(**options), text)
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config == policy.config
    patches = standard_noise(range(6), (16, 16))
    assert torch.equal(loaded.log_prob(patches, text, MASK), policy.log_prob(patches, text, MASK))


def test_a_checkpoint_from_before_these_options_still_loads(tmp_path):
    policy = random_policy()
    assert not [name for name in policy.state_dict() if "text_layers" in name or "token" in name.split(".")[1:2]]
    policy.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for name in ("text_encoder", "text_layers", "text_vocabulary", "text_length", "text_features", "text_scale"):
        del values[name]
    file.write_text(json.dumps(values))
    loaded, text = load_policy(tmp_path), text_of({})
    assert loaded.config == policy.config
    patches = standard_noise(range(6), (16, 16))
    assert torch.equal(loaded.log_prob(patches, text, MASK), policy.log_prob(patches, text, MASK))


def test_what_is_refused():
    for bad, message in (
        ({"text_encoder": ""}, "text_encoder must not be empty"),
        ({"text_layers": -1}, "text_layers must be at least 0, not -1"),
        ({"text_encoder": "tokens", "architecture": "released"}, "belong to architecture='paper'"),
        ({"text_layers": 1, "architecture": "released"}, "belong to architecture='paper'"),
    ):
        with pytest.raises(ValueError, match=message):
            NoiseARConfig(**bad)
    assert NoiseARConfig(text_encoder="tokens").text_layers == 1
    with pytest.raises(ValueError, match="needs text_vocabulary and text_length"):
        NoiseARPolicy(NoiseARConfig(text_encoder="tokens"))
    policy = random_policy(**TOKENS)
    with pytest.raises(ValueError, match=r"expected token ids \(B, 16, 1\), got \(6, 16, 256\)"):
        policy.sample(text_of({}), MASK)
    with pytest.raises(ValueError, match=r"expected token ids \(B, 16, 1\), got \(6, 17, 1\)"):
        policy.sample(torch.zeros(6, 17, 1))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of small frozen encoders with their models: T5, BERT, an encoder-decoder and a language model."""
    root, found = tmp_path_factory.mktemp("encoders"), {}
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    tokenizer = tiny_pipelines.t5(77)[1]
    vocabulary = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    bart = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in BART.items()}
    models = {
        "t5": tiny_pipelines.t5(77),
        "bert": tiny_pipelines.bert(),
        "bart": (BartModel(BartConfig(d_model=24, **vocabulary, **bart)), tokenizer),
        "llama": (LlamaModel(LlamaConfig(hidden_size=24, **vocabulary, **sizes)), tokenizer),
    }
    for name, (model, own) in models.items():
        model.save_pretrained(root / name)
        own.save_pretrained(root / name)
        found[name] = (str(root / name), model.eval(), own)
    return found


@pytest.mark.filterwarnings("ignore:prompt")
@pytest.mark.parametrize("name", ["t5", "bert", "bart", "llama"])
def test_hidden_states_of_another_encoder(name, encoders, random_denoiser):
    folder, model, tokenizer = encoders[name]
    reader = PromptReader(folder, random_denoiser)
    text, mask = reader.read(random_denoiser.encode(PROMPTS))
    assert text.shape == (4, *reader.shape) and reader.sizes == {"text_dim": text.shape[2]}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            encoder = model.get_encoder() if name == "bart" else model
            expected = encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text[i][mask[i]], expected, rtol=1e-4, atol=1e-5)
        assert mask[i].sum() == ids.shape[1] and not text[i][~mask[i]].any()
    assert torch.equal(reader.read_prompts(PROMPTS[:2])[0], text[:2])

    encoder = frozen_encoder(folder, reader.device)
    assert encoder is frozen_encoder(folder, reader.device)  # one for all readers
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())


def test_every_distinct_prompt_is_encoded_once_and_long_ones_are_cut(encoders):
    reader, seen = PromptReader(encoders["bert"][0], toys.NoDenoiser((1, 8, 4), 4)), []
    embed = reader._embed
    reader._embed = lambda prompt: seen.append(prompt) or embed(prompt)
    for _ in range(2):
        reader.read_prompts(PROMPTS)
    assert seen == list(dict.fromkeys(PROMPTS))
    assert reader.shape == (77, 32) and LONGEST == 128
    with pytest.warns(UserWarning, match="prompt of 102 tokens is cut to 77"):
        assert reader.read_prompts(["red " * 100])[1].all()


def test_encoders_that_cannot_be_loaded(monkeypatch, tmp_path, encoders):
    toy = toys.NoDenoiser((1, 8, 4), 4)

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    (tmp_path / "config.json").write_text("{}")
    for name in ("token", "someone/an-encoder", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="expected 'denoiser', 'tokens', or the folder or Hub id"):
            PromptReader(name, toy)
    with pytest.raises(ValueError, match="needs a tokenizer, and denoiser 'none' has none"):
        PromptReader("tokens", toy)


def test_tokens_are_those_of_the_denoisers_tokenizer(random_denoiser):
    reader = PromptReader("tokens", random_denoiser)
    prompts = ["a photo of a red circle left of a blue square", "a photo of a circle"]
    text, mask = reader.read_prompts(prompts)
    tokenizer = random_denoiser.pipeline.tokenizer
    assert reader.sizes == {"text_dim": 1, "text_vocabulary": len(tokenizer), "text_length": reader.shape[0]}
    for i, prompt in enumerate(prompts):
        assert text[i, mask[i], 0].tolist() == tokenizer(prompt).input_ids
    assert torch.equal(mask, random_denoiser.encode(prompts).policy_mask)


def test_samplers_and_environments_read_as_the_policy_does(random_denoiser):
    sizes = PromptReader("tokens", random_denoiser).sizes
    policy = random_policy(text_encoder="tokens", text_vocabulary=sizes["text_vocabulary"], text_length=16)
    policy.config.check_sizes(sizes, "the tokenizer")
    prompts = ["a photo of a red circle left of a blue square", "a photo of a circle"]
    drawn = PolicySampler(random_denoiser, policy)(prompts, [0, 1])
    expected = policy.noise(policy.sample(*PromptReader("tokens", random_denoiser).read_prompts(prompts), seeds=[0, 1]))
    assert torch.equal(drawn.noise, expected)

    other = random_policy(text_encoder="tokens", text_vocabulary=7, text_length=16)
    with pytest.raises(ValueError, match="its text_vocabulary is 7"):
        PolicySampler(random_denoiser, other)
    kwargs = {"denoiser": random_denoiser, "prompts": prompts, "reward": "brightness"}
    env = gymnasium.make("NoiseAR-Shapes-v0", text_encoder="tokens", **kwargs)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation) and observation["text"].shape == (16, 1)
    envs = gymnasium.make_vec("NoiseAR-Shapes-v0", 2, "vector_entry_point", text_encoder="tokens", **kwargs)
    batch, infos = envs.reset(seed=0)
    assert envs.observation_space.contains(batch)
    text, mask = PromptReader("tokens", random_denoiser).read_prompts(list(infos["prompt"]))
    assert (batch["text"] == text.numpy()).all() and (batch["text_mask"] == mask.numpy()).all()
    assert info["prompt"] == infos["prompt"][0] and (observation["text"] == batch["text"][0]).all()
    default = gymnasium.make("NoiseAR-Shapes-v0", **kwargs).reset(seed=0)[0]
    assert default["text"].shape == random_denoiser.text_shape
