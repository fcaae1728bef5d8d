"""The ComfyUI node, called as ComfyUI calls it: loaded as a custom node, run by its mappings, its noise sampled."""

import importlib.util
from pathlib import Path

import pytest
import torch

from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import load_policy
from noisear_rl.samplers import as_sampler
from tests.conftest import random_policy

FILE = Path(__file__).parents[1] / "examples" / "comfyui_noisear.py"
PROMPT = "a photo of a red circle left of a blue square"


class Clip:
    """ComfyUI's interface to text encoders (``comfy.sd.CLIP``), around those of an SDXL pipeline of diffusers."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def tokenize(self, text, return_word_ids=False, **options):
        pad = {"padding": "max_length", "truncation": True}
        both = {"g": self.pipeline.tokenizer_2, "l": self.pipeline.tokenizer}
        return {name: [[(token, 1.0) for token in own(text, **pad).input_ids]] for name, own in both.items()}

    @torch.no_grad()
    def encode_from_tokens(self, tokens, return_pooled=False):
        """As ``comfy.sdxl_clip``: the last hidden states but one of both encoders, side by side."""
        encoders = {"l": self.pipeline.text_encoder, "g": self.pipeline.text_encoder_2}
        ids = {name: torch.tensor([[token for token, _ in tokens[name][0]]]) for name in encoders}
        found = {name: encoder(ids[name], output_hidden_states=True) for name, encoder in encoders.items()}
        embeds = torch.cat([found[name].hidden_states[-2] for name in encoders], -1)
        return (embeds, found["g"].text_embeds) if return_pooled else embeds


@pytest.fixture(scope="module")
def module():
    """As ``nodes.load_custom_node`` imports a file."""
    specification = importlib.util.spec_from_file_location("custom_nodes.comfyui_noisear", FILE)
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


def run(module, **inputs):
    """As ComfyUI's executor runs a node: inputs by name, one output per type."""
    node = module.NODE_CLASS_MAPPINGS["NoiseARLatent"]
    assert inputs.keys() == node.INPUT_TYPES()["required"].keys()
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return dict(zip(node.RETURN_TYPES, outputs, strict=True))


@pytest.mark.parametrize("reads", ["denoiser", "tokens"])
def test_noise_is_that_of_the_library(module, turbo, reads, tmp_path):
    """SamplerCustomAdvanced asks for the noise of its latent; a policy draws the same from the same seeds elsewhere."""
    policy = load_policy("shapes/ppo") if reads == "tokens" else random_policy()
    assert policy.config.text_encoder == reads
    policy.save_pretrained(tmp_path)
    made = run(module, clip=Clip(turbo.pipeline), text=PROMPT, policy=str(tmp_path), seed=5, batch_size=3)
    latent = made["LATENT"].copy()
    assert latent["samples"].shape == (3, 4, 8, 8) and not latent["samples"].any()
    noise = made["NOISE"].generate_noise(latent)
    expected = as_sampler(turbo, policy)([PROMPT] * 3, [5, 6, 7])
    torch.testing.assert_close(noise, expected.noise, rtol=1e-4, atol=1e-5)
    assert made["NOISE"].seed == 5 and noise.dtype == latent["samples"].dtype and noise.device.type == "cpu"
    assert (noise - standard_noise([5, 6, 7], (4, 8, 8))).abs().max() > 0.1
    again = made["NOISE"].generate_noise({"samples": torch.zeros(2, 4, 8, 8), "batch_index": [2, 0]})
    torch.testing.assert_close(again, noise[[2, 0]], rtol=1e-4, atol=1e-5)


def test_largest_seed(module, turbo, tmp_path):
    random_policy().save_pretrained(tmp_path)
    inputs = {"clip": Clip(turbo.pipeline), "text": PROMPT, "policy": str(tmp_path), "batch_size": 2}
    largest = module.NoiseARLatent.INPUT_TYPES()["required"]["seed"][1]["max"]
    last, first = run(module, **inputs, seed=largest), run(module, **inputs, seed=0)
    wrapped = last["NOISE"].generate_noise(last["LATENT"])[1]
    torch.testing.assert_close(wrapped, first["NOISE"].generate_noise(first["LATENT"])[0], rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_named(module, turbo, tmp_path):
    random_policy().save_pretrained(tmp_path / "good")
    random_policy(text_dim=64).save_pretrained(tmp_path / "other")
    clip, common = Clip(turbo.pipeline), {"seed": 0, "batch_size": 1}
    for text, policy, message in (
        (" ", "good", "type a prompt"),
        (PROMPT, "", "name a policy"),
        (PROMPT, "none", "no such folder|holds no policy"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(module, clip=clip, text=text, policy=policy and str(tmp_path / policy), **common)
    made = run(module, clip=clip, text=PROMPT, policy=str(tmp_path / "other"), **common)
    with pytest.raises(ValueError, match="another denoiser"):
        made["NOISE"].generate_noise(made["LATENT"])
    made = run(module, clip=clip, text=PROMPT, policy=str(tmp_path / "good"), **common)
    with pytest.raises(ValueError, match=r"draws noise of \(4, 8, 8\), not \(4, 16, 16\): connect the output `latent`"):
        made["NOISE"].generate_noise({"samples": torch.zeros(1, 4, 16, 16)})
    with pytest.raises(ValueError, match="reads 'BAAI/bge-m3'"):
        module.read_text(clip, PROMPT, "BAAI/bge-m3")
