"""Scorers with published architectures at tiny sizes, and random weights in files with the published names."""

from functools import partial

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.denoisers.shapes.captions import vocabulary
from noisear_rl.rewards.aesthetic import AestheticV1, AestheticV2, linear_head, mlp_head
from noisear_rl.rewards.clip import CLIPH, CLIPScore
from noisear_rl.rewards.mps import MPS, NAMES, CrossLayer
from noisear_rl.rewards.pickscore import PickScore
from noisear_rl.rewards.preprocess import Preprocess

TOKENIZER = ASSETS / "pipeline" / "tokenizer"
WIDTH, SIZE, TOKENS = 128, 28, 16


def architecture(activation="quick_gelu"):
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": activation, "projection_dim": WIDTH}
    text = {
        "vocab_size": len(vocabulary()) + 3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": TOKENS,
    }
    return {
        "projection_dim": WIDTH,
        "text_config": {"hidden_size": 64, "intermediate_size": 96, **text, **shared},
        "vision_config": {"hidden_size": 48, "intermediate_size": 80, "image_size": SIZE, "patch_size": 7, **shared},
    }


def shrunk(scorer, **changes):
    """A subclass of a scorer with tiny sizes; code, names and preprocessing are unchanged."""
    changes = {
        "architecture": architecture(scorer.architecture["text_config"].get("hidden_act", "quick_gelu")),
        "max_tokens": TOKENS,
        "preprocessing": Preprocess(scorer.preprocessing.order, SIZE),
        "default_tokenizer": str(TOKENIZER),
    } | changes
    return type(f"Tiny{scorer.__name__}", (scorer,), changes)


def random_clip(activation="quick_gelu"):
    """With larger weights than at initialisation, so that scores differ between images and prompts."""
    network = CLIPModel(CLIPConfig(**architecture(activation))).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        network.logit_scale.fill_(3.0)
    return network


def published_mps(network, layers=2):
    """A state dict with MPS's published names, and the same layers under our names."""
    ours = [CrossLayer(WIDTH) for _ in range(layers)]
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    published = {own: name for name, own in NAMES.items()}
    for i, layer in enumerate(ours):
        for name, value in layer.state_dict().items():
            part, kind = name.rsplit(".", 1)
            state[f"cross_model.layers.{i}.{published[part]}.{kind}"] = value
        state[f"cross_model.layers.{i}.1.fn.rotary_emb.inv_freq"] = torch.ones(32)
    return state, ours


def write(folder):
    """Writes weight files; returns scorers that read them, and the networks they were written from, by name."""
    torch.manual_seed(4)
    folder.mkdir(exist_ok=True)
    scorers, networks = {}, {}
    for scorer, activation in ((CLIPScore, "quick_gelu"), (PickScore, "gelu")):
        network = networks[scorer.name] = random_clip(activation)
        save_file(network.state_dict(), folder / f"{scorer.name}.safetensors")
        scorers[scorer.name] = partial(shrunk(scorer), folder / f"{scorer.name}.safetensors")
    for scorer, make in ((AestheticV1, linear_head), (AestheticV2, mlp_head)):
        head = make(WIDTH)
        for parameter in head.parameters():
            parameter.data.mul_(2)
        networks[scorer.name] = networks["clip-score"], head
        torch.save(head.state_dict(), folder / f"{scorer.name}.pth")
        files = folder / "clip-score.safetensors", folder / f"{scorer.name}.pth"
        scorers[scorer.name] = partial(shrunk(scorer), files[0], head=files[1])
    network = random_clip("gelu")
    state, layers = published_mps(network)
    networks["mps"] = network, layers
    torch.save({"state_dict": state}, folder / "mps.pth")
    scorers["mps"] = partial(shrunk(MPS, layers=2), folder / "mps.pth")
    network = networks[CLIPH.name] = random_clip("gelu")  # last, so that the others keep their random weights
    save_file(network.state_dict(), folder / f"{CLIPH.name}.safetensors")
    scorers[CLIPH.name] = partial(shrunk(CLIPH), folder / f"{CLIPH.name}.safetensors")
    return scorers, networks
