"""Scorers with published weights: equal to a plain computation, loading, preprocessing, batches, bad input."""

import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil

from noisear_rl.rewards.clip import CLIPScore
from noisear_rl.rewards.mps import MPS, OVERALL
from noisear_rl.rewards.pickscore import PickScore
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.registry import make_reward
from tests.rewards import tiny_scorers

NAMES = ("clip-score", "clip-h", "pickscore", "aesthetic-v1", "aesthetic-v2", "mps")
PROMPTS = ["a photo of a red circle", "two squares", "a photo of a blue cross above a red circle", "three crosses"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_scorers.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 40, 64, generator=torch.Generator().manual_seed(2))


def pil(images):
    return [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]


def tokens(prompts):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_scorers.TOKENIZER)
    options = {"padding": "max_length", "max_length": tiny_scorers.TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, **options).input_ids


def pixels(images):
    """Computed by CLIP's published processor; on these images all orders except `float` agree with it."""
    size = tiny_scorers.SIZE
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(pil(images), return_tensors="pt").pixel_values


def plain_mps(network, layers, images, prompts, threshold):
    """MPS's score, one image at a time, with loops over heads and rotations as complex numbers."""
    with torch.no_grad():
        project = lambda ids: network.text_projection(network.text_model(ids).last_hidden_state)[0]
        condition, scores = project(tokens([OVERALL])), []
        for image, prompt in zip(pixels(images), prompts, strict=True):
            ids = tokens([prompt])
            text, pooled = project(ids), network.text_projection(network.text_model(ids).pooler_output)[0]
            close = torch.stack([torch.stack([token @ word for word in condition]).max() for token in text])
            mask = torch.where(close / close.max() > threshold, 0.0, -torch.inf)
            x = network.visual_projection(network.vision_model(image[None]).last_hidden_state)[0]
            for layer in layers:
                x = plain_layer(layer, x, text, mask)
            scores.append(network.logit_scale.exp() * F.cosine_similarity(x[0], pooled, dim=0))
    return torch.stack(scores)


def plain_layer(layer, x, text, mask):
    def swiglu(y):
        half = y.shape[-1] // 2
        return y[:, half:] * torch.sigmoid(y[:, half:]) * y[:, :half]

    def turn(y):
        angle = torch.arange(len(y))[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        turned = torch.complex(y[:, :32], y[:, 32:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], 1)

    h = layer.cross_norm(x)
    q, (k, v) = layer.to_q(h), layer.to_kv(text).chunk(2, -1)
    read = [((q[:, i : i + 64] @ k.T) / 8 + mask).softmax(-1) @ v for i in range(0, q.shape[1], 64)]
    x = x + layer.to_out(torch.cat(read, 1)) + layer.cross_down(swiglu(layer.cross_up(h)))
    width = x.shape[1]
    mixed = layer.fused(layer.self_norm(x))
    q, k, v, up = (
        mixed[:, :width],
        mixed[:, width : width + 64],
        mixed[:, width + 64 : width + 128],
        mixed[:, width + 128 :],
    )
    read = [((turn(q[:, i : i + 64]) @ turn(k).T) / 8).softmax(-1) @ v for i in range(0, width, 64)]
    return x + layer.self_out(torch.cat(read, 1)) + layer.self_down(swiglu(up))


def plain(name, networks, images, prompts):
    """The original computation with transformers' own processor, network and tokenizer."""
    if name == "mps":
        return plain_mps(*networks["mps"], images, prompts, 0.3)
    network = networks["clip-score" if name.startswith("aesthetic") else name]
    network, head = network if isinstance(network, tuple) else (network, None)
    if name.startswith("aesthetic"):
        network, head = networks[name]
    with torch.no_grad():
        output = network(tokens(prompts), pixels(images))
        image, text = output.image_embeds, output.text_embeds  # unit vectors
        if name in ("pickscore", "clip-h"):
            return output.logits_per_image.diagonal()
        if name == "clip-score":
            return 2.5 * (image * text).sum(-1).clamp(min=0)
        weights = [value for key, value in head.state_dict().items() if key.endswith("weight")]
        biases = [value for key, value in head.state_dict().items() if key.endswith("bias")]
        for weight, bias in zip(weights, biases, strict=True):
            image = image @ weight.T + bias
        return image[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_plain_computation(name, made, images):
    scorers, networks = made
    scores = scorers[name]().score(images, PROMPTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, plain(name, networks, images, PROMPTS), rtol=0, atol=1e-5)
    assert scores.std() > 1e-3  # images and prompts matter


@pytest.mark.parametrize("name", NAMES)
def test_does_not_depend_on_the_batch(name, made, images):
    scorer = made[0][name](batch_size=3)
    whole = scorer.score(images, PROMPTS)
    single = torch.cat([scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = made[0][name]().score(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(scorer.score(pil(images), PROMPTS), whole, rtol=0, atol=1e-5)


def test_mps_masks_by_the_prompts_own_maximum_by_default(made, images):
    """Prompts whose similarities to the condition differ by a factor: uncoupled scores must not change."""
    scorer, coupled = made[0]["mps"](threshold=0.55), made[0]["mps"](threshold=0.55, batch_coupled=True)
    own = scorer.score(images, PROMPTS)
    torch.testing.assert_close(own, plain_mps(*made[1]["mps"], images, PROMPTS, 0.55), rtol=0, atol=1e-5)
    torch.testing.assert_close(coupled.score(images, PROMPTS), own)  # here all prompts have the same maximum
    tokens_of, prompt, similarity = scorer.text(PROMPTS)
    factors = torch.tensor([1.0, 0.9, 0.8, 0.7])[:, None]
    seen = scorer.preprocessing.exact(images)
    with torch.no_grad():
        scaled = scorer.compare(seen, tokens_of, prompt, factors * similarity)
        together = coupled.compare(seen, tokens_of, prompt, factors * similarity)
        kept = factors * similarity / (factors * similarity).max() > 0.55
        original = scorer.network(seen, tokens_of, kept)
    torch.testing.assert_close(scaled, own, rtol=0, atol=1e-5)
    cosine = F.cosine_similarity(original, prompt)
    torch.testing.assert_close(together, scorer.network.clip.logit_scale.exp() * cosine, rtol=0, atol=1e-5)
    assert (together - own).abs()[1:].max() > 1e-2 and (together - own).abs()[0] < 1e-5


def test_mps_condition_and_threshold_matter(made, images):
    default = made[0]["mps"]().score(images, PROMPTS)
    high = made[0]["mps"](threshold=0.6).score(images, PROMPTS)
    other = made[0]["mps"](threshold=0.6, condition="a red circle").score(images, PROMPTS)
    assert (high - default).abs().min() > 1e-3 and (other - high).abs().max() > 1e-3
    with pytest.raises(ValueError, match="a condition and a threshold"):
        MPS(condition=" ")
    with pytest.raises(ValueError, match="a condition and a threshold"):
        MPS(threshold=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_device_and_half_precision(name, made, images):
    exact = made[0][name]().score(images, PROMPTS)
    scorer = made[0][name](preprocess="tensor")
    tensor = images.clone().requires_grad_()
    scores = scorer.score(tensor, PROMPTS)
    scale = exact.std()
    assert (scores.detach() - exact).abs().max() < 0.1 * scale  # 8-bit rounding on noise, the worst case
    (gradient,) = torch.autograd.grad(scores.sum(), tensor)
    moves = scores.detach() != 0  # CLIPScore is cut at 0
    assert gradient.isfinite().all() and (gradient[moves].abs().amax((1, 2, 3)) > 0).all() and moves.any()
    half = made[0][name](dtype="bfloat16").score(images, PROMPTS)
    assert half.dtype == torch.float32 and (half - exact).abs().max() < 0.05 * exact.abs().max() + 0.5 * scale
    with pytest.raises(ValueError, match="no gradient; use preprocess='tensor'"):
        made[0][name]().score(tensor, PROMPTS)


def test_text_is_computed_once(made, images, monkeypatch):
    scorer = made[0]["pickscore"]()
    scorer.load()
    calls, encode = [], scorer.encode_text
    monkeypatch.setattr(scorer, "encode_text", lambda ids, mask: calls.append(len(ids)) or encode(ids, mask))
    first = scorer.score(images, PROMPTS)
    again = scorer.score(images, PROMPTS)
    assert len(calls) == 4 and torch.equal(first, again)


def test_loads_once_from_many_threads(made, images):
    scorer, results = made[0]["pickscore"](), []
    builds, build = [], scorer.build
    scorer.build = lambda: builds.append(1) or build()
    threads = [threading.Thread(target=lambda: results.append(scorer.score(images, PROMPTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_clip_score_rescaling(made, images):
    hessel = made[0]["clip-score"]().score(images, PROMPTS)
    cosine = made[0]["clip-score"](rescale="cosine").score(images, PROMPTS)
    torch.testing.assert_close(hessel, 2.5 * cosine.clamp(min=0))
    assert cosine.abs().max() <= 1
    with pytest.raises(ValueError, match="unknown rescale"):
        CLIPScore(rescale="percent")


def test_long_prompts_warn_once(made, images):
    scorer = made[0]["pickscore"]()
    long = " ".join(["a photo of a red circle"] * 5)
    with pytest.warns(UserWarning, match=r"pickscore reads 16 tokens per prompt, but one has \d\d"):
        scores = scorer.score(images[:2], [long, PROMPTS[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score(images[:1], [long + " two"])
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name, made, images):
    scorer = made[0][name]()
    assert scorer.score(images[:0], []).shape == (0,)
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from -0.5"):
        scorer.score(images - 0.5, PROMPTS)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        scorer.score(images * torch.nan, PROMPTS)
    with pytest.raises(ValueError, match="as many prompts as images"):
        scorer.score(images, PROMPTS[:3])
    with pytest.raises(ValueError, match="as many prompts as images"):
        scorer.score(images[:1], "a")
    with pytest.raises(ValueError, match="non-empty strings"):
        scorer.score(images[:1], [" "])
    with pytest.raises(ValueError, match=r"floating-point images \(B, 3, H, W\)"):
        scorer.score(images[:, :1], PROMPTS)
    with pytest.raises(ValueError, match=r"tensor .* or PIL"):
        scorer.score([np.zeros((8, 8, 3))], ["a"])


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="unknown preprocess"):
        PickScore(preprocess="fast")
    with pytest.raises(ValueError, match="unknown dtype"):
        PickScore(dtype="int8")
    with pytest.raises(ValueError, match="batch_size"):
        PickScore(batch_size=0)
    with pytest.raises(ValueError, match=r"'pickscore'.*weight_file"):
        make_reward("pickscore", weight_file="x")


def odd_images():
    rng = np.random.default_rng(0)
    noise = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)
    yield from (
        Image.fromarray(noise(h, w, 3)) for h, w in [(1, 1), (10, 700), (700, 10), (28, 28), (29, 28), (57, 91)]
    )
    yield Image.fromarray(noise(2160, 3840, 3))
    yield from (
        Image.fromarray(noise(33, 47)),
        Image.fromarray(noise(33, 48, 4)),
        Image.fromarray(noise(40, 31, 2), "LA"),
    )
    yield Image.fromarray(noise(33, 47, 3)).convert("P")
    yield Image.fromarray(noise(33, 47)).convert("1")
    yield Image.fromarray(noise(50, 60, 4), "CMYK")
    yield from (Image.fromarray(noise(h, h + 1, 3)) for h in (224, 225, 300, 331, 512, 640, 777))


def test_odd_images_match_the_published_processor():
    processor, preprocess = CLIPImageProcessorPil(), Preprocess("transformers")
    images = list(odd_images())
    assert len(images) == 20
    for image in images:
        expected = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        torch.testing.assert_close(preprocess.exact([image]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["torchvision", "transformers", "float"])
def test_tensor_preprocessing_agrees_with_exact_on_smooth_images(order):
    """Within two 8-bit steps; channels are standardised to about unit variance, where a step is 1/68."""
    grid = torch.linspace(0, 1, 300)
    image = torch.stack([grid[:200, None] * grid, grid.expand(200, -1), 1 - grid[:200, None].expand(-1, 300)])[None]
    preprocess = Preprocess(order)
    difference = (preprocess.tensor(image) - preprocess.exact(image)).abs().max()
    assert difference < 2 / 68
    assert preprocess.exact(image).shape == (1, 3, 224, 224)
