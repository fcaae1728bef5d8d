"""ImageReward and HPSv2 without their original packages; test_original_scorers.py compares with those."""

import sys
import warnings

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPTokenizer

from noisear_rl.rewards.clip import VIT_H_14, clean
from noisear_rl.rewards.hpsv2 import HPSv2, HPSv21
from noisear_rl.rewards.image_reward import BLIP_LARGE, ImageReward
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.weights import load_weights
from tests.rewards import published_scorers as published
from tests.rewards.published_scorers import SAMPLE_IMAGES, sample_image

HEADS = 4
WORDS = ["a", "photo", "of", "red", "blue", "two", "circles", ",", "lighthouse", "at", "dawn"]
PROMPTS = ["a red lighthouse", "a photo of two blue circles, a lighthouse at dawn", "blue", "a lighthouse", "at dawn"]


SHALLOW = {"num_hidden_layers": 2, "num_attention_heads": HEADS}


class NarrowImageReward(ImageReward):
    """With the sizes of ``published_scorers.narrow``."""

    architecture = {
        "vision_config": BLIP_LARGE["vision_config"] | SHALLOW | {"hidden_size": 64, "intermediate_size": 256},
        "text_config": BLIP_LARGE["text_config"]
        | SHALLOW
        | {"hidden_size": 48, "encoder_hidden_size": 64, "intermediate_size": 192},
    }


class NarrowHPSv2(HPSv2):
    """With the sizes of ``published_scorers.narrow``; its tokens are bytes, and the last one ends a text."""

    tokens = {"vocab_size": 3088, "bos_token_id": 512, "eos_token_id": 513}
    architecture = {
        "projection_dim": 64,
        "text_config": VIT_H_14["text_config"]
        | SHALLOW
        | tokens
        | {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64},
        "vision_config": VIT_H_14["vision_config"]
        | SHALLOW
        | {"hidden_size": 80, "intermediate_size": 320, "projection_dim": 64},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Narrow weights under their published names, and tokenizers."""
    folder = tmp_path_factory.mktemp("scorers")
    torch.save(published.narrow("image-reward"), folder / "ImageReward.pt")
    torch.save({"epoch": 1, "state_dict": published.narrow("hpsv2")}, folder / "HPS_v2_compressed.pt")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    BertTokenizer(vocab=words).save_pretrained(folder / "bert")
    letters = sorted(ByteLevel.alphabet())
    tokens = (*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>")
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder / "clip")
    return folder


NARROW = {
    "image-reward": (NarrowImageReward, "ImageReward.pt", "bert"),
    "hpsv2": (NarrowHPSv2, "HPS_v2_compressed.pt", "clip"),
}
each_scorer = pytest.mark.parametrize("name", NARROW)


def narrow(name, folder, **options):
    scorer, _, tokenizer = NARROW[name]
    return scorer(folder, tokenizer=folder / tokenizer, device="cpu", **options)


def images(count=5, height=90, width=70):
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("scorer", [ImageReward, HPSv2, HPSv21])
def test_published_names_and_shapes_fit_at_full_size(scorer):
    sizes = published.shapes("image-reward" if scorer is ImageReward else "hpsv2")
    with torch.device("meta"):
        network = scorer().build()
        state = {name: torch.empty(shape) for name, shape in sizes.items()}
    load_weights(network, scorer().convert(state), scorer.name)  # rejects missing, unexpected and misshapen tensors


@each_scorer
def test_equals_a_plain_computation_from_the_published_names(name, folder):
    scorer = narrow(name, folder)
    scores = scorer.score(images(), PROMPTS)
    ids, mask = scorer.tokenize(PROMPTS)
    pixels = scorer.preprocessing.exact(images())
    if name == "image-reward":
        expected = published.image_reward(published.narrow(name), pixels, ids, mask, HEADS)
    else:
        expected = published.hpsv2(published.narrow(name), pixels, ids, HEADS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


@each_scorer
def test_a_score_does_not_depend_on_the_batch(name, folder):
    scorer = narrow(name, folder, batch_size=3)
    whole = scorer.score(images(), PROMPTS)
    other = narrow(name, folder, batch_size=1)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(
        other.score(images()[order], [PROMPTS[i] for i in order]), whole[order], rtol=0, atol=1e-5
    )


@each_scorer
def test_attention_is_the_same_in_one_kernel_and_written_out(name, folder):
    scorer = narrow(name, folder)
    fused = scorer.score(images(), PROMPTS)
    for part in scorer.network.modules():
        if hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation("eager")
    torch.testing.assert_close(scorer.score(images(), PROMPTS), fused, rtol=0, atol=1e-5)
    assert not any(value.is_meta for value in (*scorer.network.parameters(), *scorer.network.buffers()))


@each_scorer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(name, dtype, folder):
    scores = narrow(name, folder, dtype=dtype).score(images(), PROMPTS)
    assert scores.dtype == torch.float32
    expected = narrow(name, folder).score(images(), PROMPTS)
    share = {"bfloat16": 0.15, "float16": 0.02}[dtype]  # relative to the spread of scores
    torch.testing.assert_close(scores, expected, rtol=0, atol=share * expected.std().item())


@each_scorer
def test_tensor_mode_is_close_to_exact_and_has_a_gradient(name, folder):
    exact = narrow(name, folder).score(images(), PROMPTS)
    given = images().requires_grad_()
    scores = narrow(name, folder, preprocess="tensor").score(given, PROMPTS)
    torch.testing.assert_close(scores.detach(), exact, rtol=0, atol=0.05 * exact.std().item())
    scores.sum().backward()
    assert (given.grad.abs().amax((1, 2, 3)) > 0).all() and given.grad.isfinite().all()


@each_scorer
def test_wrong_damaged_and_missing_files(name, folder, tmp_path):
    scorer, file, _ = NARROW[name]
    other = next(entry[1] for key, entry in NARROW.items() if key != name)
    with pytest.raises(ValueError, match=f"not the weights of {name}"):
        scorer(folder / other, tokenizer=folder).load()
    whole = (folder / file).read_bytes()
    for size in (len(whole) - 1000, 100, 0):
        (tmp_path / file).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            scorer(tmp_path, tokenizer=folder).load()
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"Pass weights=FILE with {file}"):
        scorer(tmp_path, tokenizer=folder).load()


@each_scorer
def test_a_file_with_one_name_more_or_less_is_refused(name, folder, tmp_path):
    scorer, _, _ = NARROW[name]
    state = published.narrow(name)
    for changed in (state | {"extra.weight": torch.zeros(2)}, dict(list(state.items())[1:])):
        torch.save(changed, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="1 differences"):
            scorer(tmp_path / "weights.pt").load()


def test_another_clip_of_the_same_size_is_refused(folder, tmp_path):
    scorer = narrow("hpsv2", folder)
    scorer.load()
    torch.save(scorer.network.state_dict(), tmp_path / "clip.pt")  # with transformers' names, like PickScore
    with pytest.raises(ValueError, match=r"not the weights of hpsv2: .* is missing"):
        NarrowHPSv2(tmp_path / "clip.pt").load()


@each_scorer
def test_a_prompt_beyond_the_limit_warns_once_and_is_cut(name, folder):
    scorer = narrow(name, folder)
    long = "a photo of a lighthouse at dawn, " * 9
    with pytest.warns(UserWarning, match=rf"{name} reads {scorer.max_tokens} tokens"):
        scores = scorer.score(images(2), [long, long + "blue"])
    assert scores.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score(images(2), [long + "red", long + "blue red"])
    assert scorer.text([long])[0].equal(scorer.text([long + " blue"])[0])


def test_prompts_are_cleaned_as_by_the_published_tokenizer(monkeypatch):
    assert clean("  A &amp;amp; B\t&lt;C&gt;\n") == "a & b <c>"
    monkeypatch.setitem(sys.modules, "ftfy", None)  # not installed
    with pytest.warns(UserWarning, match="without ftfy"):
        assert clean("CAFÉ  &amp; “tea”") == "café & “tea”"


@pytest.mark.parametrize("name", SAMPLE_IMAGES)
def test_preprocessing_of_transformers(name):
    given = sample_image(name)
    if given.mode in (
        "LA",
        "RGBA",
    ):  # since 5.23 transparency becomes white; when PickScore was published, it was dropped
        given = given.convert("RGB")
    expected = CLIPImageProcessorPil()(given, return_tensors="pt").pixel_values
    torch.testing.assert_close(Preprocess("transformers").exact([sample_image(name)]), expected, rtol=0, atol=1e-5)


def test_the_longer_side_is_kept_between_black_bars():
    preprocess = Preprocess("float")
    pixels = preprocess.exact([Image.new("RGB", (448, 151), "white")])[0]
    white, black = (preprocess.standardize(torch.full((1, 3, 1, 1), value))[0] for value in (1.0, 0.0))
    torch.testing.assert_close(pixels[:, 74:150], white.expand(3, 76, 224))
    torch.testing.assert_close(pixels[:, [*range(74), *range(150, 224)]], black.expand(3, 148, 224))


def test_antialiasing():
    stripes = (torch.arange(896) % 3 == 0).float().expand(1, 3, 896, 896)
    smooth, aliased = (Preprocess("float", antialias=on).tensor(stripes)[0, 0, 0].std() for on in (True, False))
    assert smooth < 0.1 and aliased > 1
