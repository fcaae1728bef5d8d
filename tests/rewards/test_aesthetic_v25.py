"""Aesthetic predictor 2.5 on a tiny SigLIP with the published names, against transformers' own model and processor."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from noisear_rl.rewards.aesthetic import AestheticV25, siglip_head
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.registry import REWARDS

SIZE = 28
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SMALL | {"image_size": SIZE, "patch_size": 7}
HEAD: dict[int, tuple[int, ...]] = {
    0: (1024, 1152),
    2: (128, 1024),
    4: (64, 128),
    6: (16, 64),
    8: (1, 16),
}  # of the published file


class Tiny(AestheticV25):
    architecture = VISION
    preprocessing = Preprocess("squash", SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The original network and head, and a scorer that reads their files; the head's is in half precision."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("siglip")
    network = SiglipModel(SiglipConfig(text_config=SMALL | {"vocab_size": 50}, vision_config=VISION)).eval()
    head = siglip_head(64).half().float()
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    torch.save({name: value.half() for name, value in head.state_dict().items()}, folder / "head.pth")
    return network, head, Tiny(folder, head=folder / "head.pth", device="cpu")


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (28, 28)])
def test_equals_a_plain_computation(made, shape):
    network, head, scorer = made
    images = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(1))
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=Image.Resampling.BICUBIC)
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        pooled = network.vision_model(pixels).pooler_output
        expected = pooled / pooled.norm(dim=-1, keepdim=True)
        for i in HEAD:
            layer = head.scoring_head[i]
            expected = expected @ layer.weight.T + layer.bias
    for given in (images, pictures):
        torch.testing.assert_close(scorer.score(given, ["a", "b", "c"]), expected[:, 0], rtol=0, atol=1e-5)
    assert expected.std() > 1e-4  # images differ


def test_gradients_reach_the_pixels(made):
    images = torch.rand(2, 3, 40, 64, requires_grad=True)
    scorer = Tiny(made[2].weights, head=made[2].head_weights, device="cpu", preprocess="tensor")
    scorer.score(images, ["a", "b"]).sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_sizes_are_those_of_the_published_weights():
    with torch.device("meta"):
        network, head = AestheticV25(device="cpu").build(), siglip_head(1152)
    assert sum(parameter.numel() for parameter in network.parameters()) == 428_225_600
    shapes = {f"scoring_head.{i}.weight": shape for i, shape in HEAD.items()}
    shapes |= {f"scoring_head.{i}.bias": shape[:1] for i, shape in HEAD.items()}
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == shapes
    assert REWARDS["aesthetic-v2.5"] == ("aesthetic", "AestheticV25")
