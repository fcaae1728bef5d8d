"""Code shared by the scorers with published weights: loading, preprocessing, batches, cached text.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1], ``L`` text tokens.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image

from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.weights import find_weights, load_weights, read_state_dict

TEXTS_KEPT = 2048
Mode = Literal["exact", "tensor"]


class PretrainedReward(ABC):
    """A scorer with published weights, loaded once, on first use.

    Args:
        weights: File or folder with the published weights; ``None`` to look in the caches and download them.
        tokenizer: Folder or Hub id of the tokenizer; ``None`` for the published one.
        device: Device of the network; ``None`` for the accelerator if there is one.
        dtype: Dtype of the network, such as ``float16``; scores are always float32.
        batch_size: Images per batch.
        preprocess: ``exact`` follows the original through PIL; ``tensor`` stays on the device and is differentiable.

    Raises:
        ValueError: If an option is invalid.
    """

    name: ClassVar[str]
    max_tokens: ClassVar[int] = 77
    source: ClassVar[str] = ""
    how: ClassVar[str] = "Pass weights=FILE."
    default_tokenizer: ClassVar[str] = ""
    preprocessing: ClassVar[Preprocess]

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | torch.dtype = "float32",
        batch_size: int = 32,
        preprocess: Mode = "exact",
    ) -> None:
        if preprocess not in get_args(Mode):
            raise ValueError(f"unknown preprocess {preprocess!r}; expected one of {get_args(Mode)}")
        self.dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"unknown dtype {dtype!r}; expected float32, bfloat16 or float16")
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        self.device = resolve_device(device or "auto")
        self.weights, self.tokenizer_source = weights, tokenizer or self.default_tokenizer
        self.batch_size, self.preprocess = batch_size, preprocess
        self.network: Any = None
        self.tokenizer: Any = None
        self._texts: OrderedDict[str, tuple[torch.Tensor, ...]] = OrderedDict()
        self._lock = threading.RLock()
        self._warned = False

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The network at its published size, without weights."""

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps published weight names to those of :meth:`build`."""
        return state

    @abstractmethod
    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encodes prompts given as token ids and mask ``(B, L)``; the returned tensors, ``B`` rows each, are cached."""

    @abstractmethod
    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """Scores ``(B,)`` of preprocessed images against the text that :meth:`encode_text` encoded."""

    def load(self) -> None:
        """Loads the network and the tokenizer unless they are loaded already.

        Raises:
            FileNotFoundError: If weights or tokenizer are missing; the message says where to get them.
            ValueError: If a file is damaged or contains other weights.
        """
        with self._lock:
            if self.network is None:
                state = self.convert(read_state_dict(find_weights(self.weights, self.source, self.how)))
                with torch.device("meta"):
                    network = self.build()
                load_weights(network, state, self.name)
                self.network = network.to(self.device, self.dtype).eval().requires_grad_(False)
            if self.tokenizer is None and self.tokenizer_source:
                self.tokenizer = load_tokenizer(self.tokenizer_source)

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores images against their prompts.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], or ``B`` PIL images of any size and mode. With
                ``preprocess="tensor"``, gradients flow to tensors that require them.
            prompts: ``B`` texts. Tokens beyond ``max_tokens`` are ignored; the first such prompt triggers a warning.

        Returns:
            ``(B,)`` float32, on the device of the images.

        Raises:
            ValueError: If shapes, values or prompts are invalid, or a gradient is requested with ``exact``.
            FileNotFoundError: See :meth:`load`.
        """
        check_images(images, prompts)
        gradient, where = False, self.device
        if isinstance(images, torch.Tensor):
            gradient, where = images.requires_grad and torch.is_grad_enabled(), images.device
        if gradient and self.preprocess == "exact":
            raise ValueError(f"{self.name}: preprocess='exact' has no gradient; use preprocess='tensor'")
        if not len(images):
            return torch.zeros(0, device=where)
        self.load()
        scores = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            if isinstance(part, torch.Tensor) and self.preprocess == "tensor":
                pixels = self.preprocessing.tensor(part.to(self.device))
            else:
                pixels = self.preprocessing.exact(part)
            text = self.text(prompts[start : start + self.batch_size])
            with torch.set_grad_enabled(gradient):
                scores.append(self.compare(pixels.to(self.device, self.dtype), *text).float())
        return torch.cat(scores).to(where)

    def text(self, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """The result of :meth:`encode_text`; each prompt is computed once and cached."""
        with self._lock, torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._texts:
                    encoded = self.encode_text(*self.tokenize([prompt]))
                    self._texts[prompt] = tuple(part[0] for part in encoded)
                self._texts.move_to_end(prompt)
            rows = [self._texts[prompt] for prompt in prompts]
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
        return tuple(torch.stack(part) for part in zip(*rows, strict=True))

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask ``(B, max_tokens)``."""
        longest = max(len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
        if longest > self.max_tokens and not self._warned:
            self._warned = True
            warnings.warn(f"{self.name} reads {self.max_tokens} tokens per prompt, but one has {longest}", stacklevel=4)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)


def load_tokenizer(source: str | Path) -> Any:
    """Loads a tokenizer from a folder or the Hub.

    Raises:
        FileNotFoundError: If it is not on disk and cannot be downloaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"tokenizer {source} is not on disk and could not be downloaded; pass tokenizer=FOLDER"
        ) from error


def check_images(images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Rejects input that no scorer can score.

    Raises:
        ValueError: If shapes, values or prompts are invalid.
    """
    if isinstance(prompts, str) or len(images) != len(prompts):
        raise ValueError(f"expected as many prompts as images, got {len(images)} images and {prompts!r:.80}")
    if any(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts):
        raise ValueError("prompts must be non-empty strings")
    if not isinstance(images, torch.Tensor):
        if any(not isinstance(image, Image.Image) for image in images):
            raise ValueError("expected a tensor (B, 3, H, W) or PIL images")
        return
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected floating-point images (B, 3, H, W), got {tuple(images.shape)} {images.dtype}")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):  # false for NaN, too
        low, high = images.amin().item(), images.amax().item()
        raise ValueError(f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}")
