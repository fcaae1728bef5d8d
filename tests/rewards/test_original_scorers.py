"""ImageReward and HPSv2 against the code of their original packages; test_published_scorers.py works without it."""

import json
import warnings
from collections import Counter

import pytest
import torch
from transformers import BertTokenizer

from noisear_rl.rewards.clip import VIT_H_14
from noisear_rl.rewards.hpsv2 import HPSv2
from noisear_rl.rewards.image_reward import BLIP_LARGE, ImageReward
from noisear_rl.rewards.preprocess import Preprocess
from tests.rewards import originals
from tests.rewards import published_scorers as published
from tests.rewards.published_scorers import SAMPLE_IMAGES, sample_image

pytestmark = pytest.mark.skipif(not originals.installed(), reason=originals.REASON)
ODD_PROMPTS = [
    "a",
    "A Red LIGHTHOUSE at Dawn",
    "  two   spaces\tand a\nline  ",
    "don't, can't; it's the fox's",
    "50% off!!! #1 (a+b)=c",
    "naïve café, crème brûlée",
    "Straße und Übermut",
    "ΑΣ Σίσυφος",
    "İstanbul ığ",
    "東京の夜景、雨",
    "한국의 산",
    "صورة قطة",
    "Москва зимой",
    "a 🦊 with 👩‍🚀 and 🇯🇵",
    "e\u0301 and é",
    "ﬁre ﬂy Ⅳ ½ ①",
    "“curly” ‘quotes’ — dash… ",
    "full　ｗｉｄｔｈ",
    "&amp; &lt;b&gt; &quot;x&quot;",
    "&amp;lt; twice",
    "tab\u00a0nbsp\u200bzero",
    "x" * 200,
    "antidisestablishmentarianism",
    "1234567890 3.14159",
    "https://example.org/a_b?c=d&e=f",
    "@user #tag $5 ~^`|\\",
    "[MASK] [CLS]",
    "word " * 60,
    "a very, very long prompt with punctuation: " * 8,
    "schÃ¶n",
]


@pytest.fixture(scope="module")
def original():
    return originals.load()


def random_weights(network, seed=0):
    state = {
        name: published.random(name, tuple(value.shape), torch.Generator().manual_seed(seed + i))
        for i, (name, value) in enumerate(network.state_dict().items())
    }
    network.load_state_dict(state)
    return state


def test_published_names_and_shapes_are_the_originals(original):
    assert originals.published(originals.states()) == json.loads(published.PUBLISHED.read_text())


@pytest.mark.parametrize("scorer", [ImageReward, HPSv2])
def test_settings_that_no_weight_shows_are_the_originals(original, scorer, tmp_path):
    with torch.device("meta"):
        ours = scorer().build()
        theirs = originals.image_reward(tmp_path) if scorer is ImageReward else originals.hpsv2(tmp_path)[0]

    def settings(network):
        parts = [vars(part) for part in network.modules()]
        return Counter((name, part[name]) for part in parts for name in ("eps", "num_heads") if name in part) + Counter(
            ("num_heads", part["num_attention_heads"]) for part in parts if "num_attention_heads" in part
        )

    assert settings(ours) == settings(theirs)
    assert len(settings(ours)) == (4 if scorer is ImageReward else 2)


def test_image_reward_equals_the_original(original, tmp_path):
    """At full width, with two layers instead of 24 and 12."""
    network = originals.image_reward(tmp_path, vision_layers=2, text_layers=2)
    torch.save(random_weights(network), tmp_path / "ImageReward.pt")
    BertTokenizer(vocab=str(originals.bert_vocabulary())).save_pretrained(tmp_path / "bert")

    class Shallow(ImageReward):
        architecture = {part: config | {"num_hidden_layers": 2} for part, config in BLIP_LARGE.items()}

    ours = Shallow(tmp_path / "ImageReward.pt", tokenizer=tmp_path / "bert", device="cpu")
    images = [sample_image(name) for name in ("RGB 331x500", "RGBA 223x227", "L 301x300", "CMYK 260x301")]
    prompts = ["A red lighthouse, at dawn", "naïve café 🦊", "word " * 60, "two blue circles"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt is too long
        expected = torch.tensor([network.score(*pair) for pair in zip(prompts, images, strict=True)])
        scores = ours.score(images, prompts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.2


def test_hpsv2_equals_the_original(original, tmp_path):
    """With the original kinds of layers and heads, but only two layers and two heads."""
    vision = {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    network, preprocess = originals.hpsv2(tmp_path, "narrow", embed_dim=64, vision_cfg=vision, text_cfg=text)
    state = {name: value.half() for name, value in random_weights(network).items()}  # like the published file
    torch.save({"state_dict": state}, tmp_path / "HPS.pt")
    originals.clip_tokenizer().save_pretrained(tmp_path / "clip")

    class Narrow(HPSv2):
        shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 64}
        architecture = {
            "projection_dim": 64,
            "text_config": VIT_H_14["text_config"] | shared | {"hidden_size": 128, "intermediate_size": 512},
            "vision_config": VIT_H_14["vision_config"] | shared | {"hidden_size": 160, "intermediate_size": 640},
        }

    ours = Narrow(tmp_path / "HPS.pt", tokenizer=tmp_path / "clip", device="cpu")
    images = [sample_image(name) for name in ("RGB 331x500", "RGB 1024x1024", "L 301x300", "CMYK 260x301")]
    prompts = ["A red lighthouse, at dawn", "“naïve” café &amp; 🦊", "word " * 90, "two blue circles"]
    expected = [
        originals.hps_score(network, preprocess, tmp_path / "HPS.pt", [one], prompt)[0]
        for prompt, one in zip(prompts, images, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt is too long
        scores = ours.score(images, prompts)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)
    assert torch.tensor(expected).std() > 0.02


@pytest.mark.parametrize("name", SAMPLE_IMAGES)
def test_preprocessing_of_image_reward(original, name):
    expected = original.image_reward._transform(224)(sample_image(name))[None]
    torch.testing.assert_close(Preprocess("torchvision").exact([sample_image(name)]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLE_IMAGES)
def test_preprocessing_of_hpsv2(original, name):
    given = sample_image(name)
    preprocess = original.factory.image_transform(224, is_train=False, resize_longest_max=True)
    ours = Preprocess("float").exact([given])
    if name == "RGB 1000x2":
        with pytest.raises(RuntimeError, match="H: 0"):  # less than half a pixel remains
            preprocess(given)
    elif name in ("RGBA 223x227", "RGB 224x100"):  # it keeps an alpha channel, and adds no bars: its network fails
        assert preprocess(given).shape in ((4, 224, 224), (3, 100, 224)) and ours.shape == (1, 3, 224, 224)
    else:
        torch.testing.assert_close(ours, preprocess(given)[None], rtol=0, atol=1e-6)


def test_tokens_of_image_reward(original, tmp_path):
    """Ids and masks are equal. Theirs also knows [DEC] and [ENC], which prompts do not contain, and turns a final
    capital sigma into ς, where transformers 5 writes σ."""
    ours = ImageReward(device="cpu")
    ours.tokenizer = BertTokenizer(vocab=str(originals.bert_vocabulary()))
    theirs = originals.image_reward(tmp_path, 1, 1).blip.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = ours.tokenize(ODD_PROMPTS)
    expected = theirs(ODD_PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    different = (ids != expected.input_ids).any(-1)
    assert [prompt for prompt, flag in zip(ODD_PROMPTS, different, strict=True) if flag] == ["ΑΣ Σίσυφος"]
    assert mask.equal(expected.attention_mask)


def test_tokens_of_hpsv2(original):
    """Ids are equal up to the first end of text. Theirs pads with 0, ours repeats the end of text: tokens do not
    attend to later ones, and the feature is that of the first end of text."""
    ours = HPSv2(device="cpu")
    ours.tokenizer = originals.clip_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, _ = ours.tokenize(ODD_PROMPTS)
    expected = original.factory.get_tokenizer("ViT-H-14")(ODD_PROMPTS)
    end = expected.argmax(-1, keepdim=True)
    assert (ids == 49407).int().argmax(-1, keepdim=True).equal(end)
    read = torch.arange(77) <= end
    assert (ids * read).equal(expected * read)
