"""HPSv3 on a tiny Qwen2-VL with the published names, against the original's computation in transformers' own parts."""

import hashlib
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from noisear_rl.rewards.hpsv3 import INSTRUCTION, QUESTION, HPSv3, Pixels
from noisear_rl.rewards.registry import REWARDS
from tests import tiny_pipelines

WIDTH, SIZE = 32, 6 * 28 * 28  # pixels of a tiny image
PROMPTS = ["a hen", "two red foxes in the snow"]
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (  # of Qwen2-VL, for one message with an image and a text
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}"
    "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
END = "\n\nEND\n"


def tokenizer():
    own = tiny_pipelines.byte_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *SPECIAL]})
    return own


VOCABULARY = len(tokenizer()) + 1
TINY = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 14},
}


class Tiny(HPSv3):
    architecture = TINY
    preprocessing = Pixels("transformers", SIZE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The original's parts with random weights, its head, and a folder with its file and the tokenizer."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("hpsv3")
    network = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**TINY)).eval()
    head = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    ).eval()
    for part, scale in ((network, 0.2), (head, 0.1)):  # so that scores differ
        for parameter in part.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter))
    state = {}
    for name, value in network.state_dict().items():  # the names of transformers 4.45, which the file holds
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[name] = value.clone()
    state |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    tokenizer().save_pretrained(folder / "tokenizer")
    return network, head, folder


def scorer(folder, **options):
    given = {"tokenizer": folder / "tokenizer", "device": "cpu", "dtype": "float32"}
    return Tiny(folder / "HPSv3.safetensors", **given | options)


def original(network, head, pictures, prompts):
    """The published forward pass: image tokens scattered into the text, right padding, one line of positions."""
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
    reward, image = (tokens.convert_tokens_to_ids(name) for name in ("<|Reward|>", "<|image_pad|>"))
    assert reward == VOCABULARY - 1
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": SIZE, "longest_edge": SIZE})
    read = processor(pictures, return_tensors="pt")
    texts = []
    for prompt, (_, high, wide) in zip(prompts, read.image_grid_thw.tolist(), strict=True):
        text = INSTRUCTION + prompt + QUESTION + END
        texts.append(TEMPLATE.format(image="<|image_pad|>" * (high * wide // 4), text=text))
    batch = tokens(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        embeds = network.model.language_model.embed_tokens(batch.input_ids)
        seen = network.model.visual(read.pixel_values, grid_thw=read.image_grid_thw).pooler_output
        embeds = embeds.masked_scatter((batch.input_ids == image)[..., None].expand_as(embeds), seen)
        hidden = network.model.language_model(inputs_embeds=embeds, attention_mask=batch.attention_mask)
        logits = head(hidden.last_hidden_state)
    return logits[batch.input_ids == reward].view(len(prompts), -1)[:, 0]


def photographs(*sizes):
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8) for _ in sizes]
    return [
        Image.fromarray(n.numpy()).resize(size, Image.Resampling.BICUBIC) for n, size in zip(noise, sizes, strict=True)
    ]


def test_equals_the_original(made):
    network, head, folder = made
    pictures = photographs((100, 70), (100, 70))
    expected = original(network, head, pictures, PROMPTS)
    ours = scorer(folder)
    torch.testing.assert_close(ours.score(pictures, PROMPTS), expected, rtol=0, atol=1e-4)
    assert (expected[0] - expected[1]).abs() > 1e-2
    swapped = ours.score(pictures, PROMPTS[::-1])
    assert (swapped - expected).abs().min() > 1e-3  # the prompt matters
    torch.testing.assert_close(ours.score(pictures[:1], PROMPTS[:1]), expected[:1], rtol=0, atol=1e-4)
    mixed = photographs((100, 70), (60, 200))
    alone = torch.cat([original(network, head, [one], [text]) for one, text in zip(mixed, PROMPTS, strict=True)])
    torch.testing.assert_close(ours.score(mixed, PROMPTS), alone, rtol=0, atol=1e-4)


def test_tensors_gradients_and_half_precision(made):
    folder = made[2]
    pictures = photographs((84, 56), (84, 56))  # the size that is kept
    images = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures])
    exact = scorer(folder).score(pictures, PROMPTS)
    torch.testing.assert_close(scorer(folder).score(images, PROMPTS), exact, rtol=0, atol=1e-5)
    soft = scorer(folder, preprocess="tensor")
    leaf = images.clone().requires_grad_()
    scores = soft.score(leaf, PROMPTS)
    torch.testing.assert_close(scores.detach(), exact, rtol=0, atol=1e-3)
    scores.sum().backward()
    assert leaf.grad.abs().amax((1, 2, 3)).min() > 0
    half = scorer(folder, dtype="bfloat16")
    found = half.score(images, PROMPTS)
    assert found.dtype == torch.float32 and half.network.rm_head[0].weight.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


def test_both_names_of_the_parts_are_read(made, tmp_path):
    network, head, folder = made
    state = {name: value.clone() for name, value in network.state_dict().items()}
    save_file(
        state | {f"rm_head.{name}": value for name, value in head.state_dict().items()}, tmp_path / "new.safetensors"
    )
    new = Tiny(tmp_path / "new.safetensors", tokenizer=folder / "tokenizer", device="cpu", dtype="float32")
    pictures = photographs((84, 56))
    assert torch.equal(new.score(pictures, ["a hen"]), scorer(folder).score(pictures, ["a hen"]))
    with pytest.raises(ValueError, match="these are not the weights of hpsv3"):
        other = {name: value for name, value in state.items() if "norm" not in name}
        save_file(other, tmp_path / "other.safetensors")
        Tiny(tmp_path / "other.safetensors", tokenizer=folder / "tokenizer", device="cpu").load()
    short = tiny_pipelines.byte_tokenizer()
    short.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=rf"<\|Reward\|> is token \d+ of this tokenizer, not {VOCABULARY - 1}"):
        scorer(folder, tokenizer=tmp_path / "tokenizer").load()


def test_the_question_is_the_published_one():
    """Checksum of ``INSTRUCTION`` and ``prompt_with_special_token`` up to the token, in the authors' repository."""
    text = INSTRUCTION + "{text_prompt}" + QUESTION
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "d2bd49bb6c77a870071f49e8dce38ce6bfc71dd2060de9a1f7a03711f3e67e45"
    )


def test_sizes_of_images():
    """As the published resizing, whose sides are multiples of 28 and whose product is at most 256 times 28²."""
    full = HPSv3.preprocessing
    assert full.resized(1024, 1024) == full.resized(512, 512) == full.resized(448, 448) == (448, 448)
    assert full.resized(64, 64) == (448, 448)
    assert full.resized(1024, 768) == (504, 364) and full.resized(768, 1024) == (364, 504)
    for width, height in product((28, 100, 500, 2000), repeat=2):
        new = full.resized(width, height)
        assert all(side % 28 == 0 and side for side in new) and new[0] * new[1] < 1.25 * 200_704
    with pytest.raises(ValueError, match="201 x 1 pixels; one side may be 200 times"):
        full.resized(201, 1)


def test_published_names_and_shapes_fit_at_full_size():
    """Those of Qwen2-VL 7B's own files, with one more token than its tokenizer has, and the head's."""
    shapes = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (1280,),
        "visual.merger.ln_q.bias": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.0.bias": (5120,),
        "visual.merger.mlp.2.weight": (3584, 5120),
        "visual.merger.mlp.2.bias": (3584,),
        "model.embed_tokens.weight": (151_658, 3584),
        "model.norm.weight": (3584,),
        "lm_head.weight": (151_658, 3584),
        "rm_head.0.weight": (1024, 3584),
        "rm_head.0.bias": (1024,),
        "rm_head.3.weight": (16, 1024),
        "rm_head.3.bias": (16,),
        "rm_head.5.weight": (2, 16),
        "rm_head.5.bias": (2,),
    }
    seeing = {"attn.qkv": (3840, 1280), "attn.proj": (1280, 1280), "mlp.fc1": (5120, 1280), "mlp.fc2": (1280, 5120)}
    for i, (part, shape) in product(range(32), seeing.items()):
        shapes[f"visual.blocks.{i}.{part}.weight"], shapes[f"visual.blocks.{i}.{part}.bias"] = shape, shape[:1]
    for i, norm, kind in product(range(32), ("norm1", "norm2"), ("weight", "bias")):
        shapes[f"visual.blocks.{i}.{norm}.{kind}"] = (1280,)
    for i in range(28):
        layer = f"model.layers.{i}."
        for part, rows in (("q", 3584), ("k", 512), ("v", 512)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (rows, 3584)
            shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (3584, 3584)
        for part, shape in (("gate", (18_944, 3584)), ("up", (18_944, 3584)), ("down", (3584, 18_944))):
            shapes[f"{layer}mlp.{part}_proj.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (3584,)
    with torch.device("meta"):
        network = HPSv3(device="cpu").build()
        published = HPSv3(device="cpu").convert({name: torch.empty(shape) for name, shape in shapes.items()})
    own = {name: value.shape for name, value in network.state_dict().items()}
    assert own == {name: value.shape for name, value in published.items()}
    assert REWARDS["hpsv3"] == ("hpsv3", "HPSv3") and HPSv3(device="cpu").dtype == torch.bfloat16
