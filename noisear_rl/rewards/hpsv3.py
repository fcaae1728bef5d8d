"""Human Preference Score v3: how much people like an image of a prompt, read by a vision-language model.

Source: Ma et al. 2025, "HPSv3: Towards wide-spectrum human preference score" (arXiv 2508.03789), code and weights
``MizzenAI/HPSv3`` (MIT licence): Qwen2-VL 7B with one more token, ``<|Reward|>``, and three linear layers that read it
at the end of an instruction with image and prompt; the first of their two numbers is the score.
Range: unbounded, about -5 to 15.
Preprocessing: RGB, about 448 × 448 pixels of the image's own shape (bicubic), sides divisible by 28, CLIP's
standardisation. As in the original, tokens of image and text count their positions along one line.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1], ``M`` image tokens, ``L`` text tokens, ``D`` width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image

from noisear_rl.images import to_tensor
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.pretrained import PretrainedReward

QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151_658,  # the tokenizer's 151,657, and <|Reward|>
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584, "patch_size": 14},
}
REWARD = "<|Reward|>"
IMAGE = "<|image_pad|>"
PATCH, MERGED, FRAMES = 14, 2, 2  # an image token is 2 × 2 patches of 14 × 14 pixels; an image counts as two frames
FACTOR = PATCH * MERGED
PIXELS = 256 * FACTOR**2
BEFORE = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{IMAGE}"
AFTER = "<|vision_end|>"
# The model was trained on this text (MizzenAI/HPSv3, MIT licence); nothing behind <|Reward|> changes what that reads.
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense "
    "of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, "
    "or adult material. If such content is present, the image quality and satisfaction score should be the "
    "lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance the "
    "subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - "
)
QUESTION = f"\n\n\n\nPlease provide the overall ratings of this image: {REWARD}"


@dataclass(frozen=True)
class Pixels(Preprocess):
    """Both sides to multiples of 28 whose product is at most ``size``, close to the image's own shape."""

    size: int = PIXELS

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """New width and height, as ``qwen-vl-utils`` computes them for the same least and largest number of pixels.

        Raises:
            ValueError: If one side is more than 200 times the other.
        """
        if max(width, height) > 200 * min(width, height):
            raise ValueError(f"hpsv3: an image of {width} x {height} pixels; one side may be 200 times the other")
        sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height)]
        beta = math.sqrt(width * height / self.size)
        if sides[0] * sides[1] > self.size:
            sides = [max(FACTOR, math.floor(side / beta / FACTOR) * FACTOR) for side in (width, height)]
        elif sides[0] * sides[1] < self.size:
            sides = [math.ceil(side / beta / FACTOR) * FACTOR for side in (width, height)]
        return sides[0], sides[1]

    def _one(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        return self.standardize(to_tensor(image.resize(self.resized(*image.size), Image.Resampling.BICUBIC)))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        width, height = self.resized(images.shape[3], images.shape[2])
        images = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
        return self.standardize(images.clamp(0, 1))


class HPSv3(PretrainedReward):
    """Human Preference Score v3; see the module docstring.

    Args:
        dtype: Dtype of the network, the original's by default; about 17 GB of memory in half precision.
        batch_size: Images per batch.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`.
    """

    name = "hpsv3"
    architecture = QWEN2_VL_7B
    source = "MizzenAI/HPSv3/HPSv3.safetensors"
    how = "Pass weights=FILE with HPSv3.safetensors of MizzenAI/HPSv3."
    default_tokenizer = "Qwen/Qwen2-VL-7B-Instruct"
    preprocessing: ClassVar[Preprocess] = Pixels("transformers")

    def __init__(self, *args: Any, dtype: Any = "bfloat16", batch_size: int = 8, **options: Any) -> None:
        super().__init__(*args, dtype=dtype, batch_size=batch_size, **options)

    def build(self) -> torch.nn.Module:
        """See the base class."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        network = torch.nn.Module()
        network.model = model = Qwen2VLModel(Qwen2VLConfig(**self.architecture))
        width, drop = self.architecture["text_config"]["hidden_size"], torch.nn.Identity()
        hidden = torch.nn.Linear(width, 1024), torch.nn.ReLU(), drop, torch.nn.Linear(1024, 16), torch.nn.ReLU()
        network.rm_head = torch.nn.Sequential(*hidden, torch.nn.Linear(16, 2))
        visual, text = model.visual, model.language_model
        with torch.device("cpu"):  # frequencies, which no file holds
            visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)
            text.rotary_emb = type(text.rotary_emb)(text.config)
        return network

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See the base class; both of transformers' names for the parts of Qwen2-VL are in use."""
        converted = {}
        for name, value in state.items():
            if name != "lm_head.weight":  # not part of the score
                name = re.sub(r"^visual\.", "model.visual.", name)
                name = re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)
                converted[name] = value
        return converted

    def load(self) -> None:
        """See the base class."""
        with self._lock:
            fresh = self.tokenizer is None
            super().load()
            self.network.rm_head.float()  # as in the original
            if fresh:
                self.tokenizer.add_tokens([REWARD], special_tokens=True)
                last = self.network.model.language_model.embed_tokens.num_embeddings - 1
                if (found := self.tokenizer.convert_tokens_to_ids(REWARD)) != last:
                    raise ValueError(f"{self.name}: {REWARD} is token {found} of this tokenizer, not {last}")

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """See the base class; PIL images that differ in their new size are scored one by one."""
        if not isinstance(images, torch.Tensor) and len(images) == len(prompts) and not isinstance(prompts, str):
            sizes = {self.preprocessing.resized(*image.size) for image in images if isinstance(image, Image.Image)}
            if len(sizes) > 1:
                pairs = zip(images, prompts, strict=True)
                return torch.cat([super(HPSv3, self).score([image], [prompt]) for image, prompt in pairs])
        return super().score(images, prompts)

    def text(self, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Token ids ``(B, L)`` up to ``<|Reward|>`` and then anything, and the number of tokens ``(B,)``."""
        asked = [BEFORE + AFTER + INSTRUCTION + prompt + QUESTION for prompt in prompts]
        rows = [torch.tensor(row) for row in self.tokenizer(asked, verbose=False).input_ids]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(self.device), torch.tensor([len(row) for row in rows], device=self.device)

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens themselves: the text is read together with each image."""
        return ids, mask

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        ids, lengths = text
        model, rows = self.network.model, torch.arange(len(ids), device=ids.device)
        high, wide = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        grid = torch.tensor([[1, high, wide]] * len(ids), device=ids.device)
        seen = model.visual(patches(pixels), grid).pooler_output.unflatten(0, (len(ids), -1))  # (B, M, D)
        read = model.language_model.embed_tokens(ids)  # (B, L, D)
        place = int((ids[0] == self.tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[0])  # the same for all
        both = torch.cat([read[:, :place], seen.to(read), read[:, place + 1 :]], 1)
        positions = torch.arange(both.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = model.language_model(inputs_embeds=both, position_ids=positions, use_cache=False).last_hidden_state
        return self.network.rm_head(hidden[rows, lengths + seen.shape[1] - 2].float())[:, 0]


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Standardised images ``(B, 3, H, W)`` as rows of patches, in the order in which Qwen2-VL merges 2 × 2 of them."""
    tiles = (pixels.shape[2] // FACTOR, pixels.shape[3] // FACTOR)
    cut = pixels.reshape(len(pixels), 3, tiles[0], MERGED, PATCH, tiles[1], MERGED, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    return cut.reshape(-1, 3 * FRAMES * PATCH**2)
