"""Encodes prompts with a pipeline's own text encoders; embeddings are cached in memory and optionally on disk."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from noisear_rl.denoisers import Conditioning
from noisear_rl.denoisers.pipelines import PipelineInterface
from noisear_rl.denoisers.placement import drop_text_encoders
from noisear_rl.files import atomic

Tensors = dict[str, torch.Tensor]
LARGE = 100_000_000  # number of text-encoder parameters from which a disk cache pays off


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/noisear-rl``, or ``~/.cache/noisear-rl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisear-rl"


class EmbeddingCache:
    """Tensors by prompt.

    Args:
        folder: Folder for one model revision and dtype; ``None`` for memory only. Damaged files count as missing.
        limit: Bytes to keep in memory; the least recently used entries are dropped first.
        device: Device of the returned tensors.
    """

    def __init__(self, folder: Path | None, limit: int = 2**30, device: torch.device | str = "cpu") -> None:
        self.folder, self.limit, self.device = folder, limit, device
        self._memory: OrderedDict[str, Tensors] = OrderedDict()
        self._bytes = 0

    def file_of(self, prompt: str) -> Path:
        """The file of a prompt's tensors."""
        assert self.folder is not None
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, prompt: str) -> Tensors | None:
        """A prompt's tensors, or ``None``."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        if self.folder is None:
            return None
        try:
            tensors = load_file(self.file_of(prompt), device=str(self.device))
        except (FileNotFoundError, SafetensorError):
            return None
        self._remember(prompt, tensors)
        return tensors

    def put(self, prompt: str, tensors: Tensors) -> None:
        """Stores a prompt's tensors; if writing fails, the disk cache is disabled with a warning."""
        self._remember(prompt, tensors)
        if self.folder is None:
            return
        file = self.file_of(prompt)
        try:
            with atomic(file) as temporary:
                save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"prompt embeddings are no longer kept in {self.folder}: {error}", stacklevel=3)
            self.folder = None

    def _remember(self, prompt: str, tensors: Tensors) -> None:
        self._memory[prompt] = tensors
        self._bytes += _size(tensors)
        while self._bytes > self.limit and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1])


def _size(tensors: Tensors) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _floats_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class PromptEncoder:
    """Calls a pipeline's ``encode_prompt``, once and by itself for each distinct prompt.

    Args:
        pipeline: The pipeline.
        interface: Interface of its class.
        device: Device of the returned tensors.
        cache_dir: Folder of the disk cache, ``none``, or ``auto`` for the default one if the encoders are large.
        model: Name of the weights and their dtype in the disk cache.
        dtype: Dtype that embeddings are kept in; ``None`` for that of the text encoders.
        longest: Tokens of a prompt at most, of classes that let one choose; 0 for the class's own number.
        negative: Whether to embed the text without a prompt, for guidance.

    Attributes:
        length: ``L`` of ``prompt_embeds``.
    """

    def __init__(
        self,
        pipeline: Any,
        interface: PipelineInterface,
        device: torch.device,
        cache_dir: str,
        model: str,
        dtype: torch.dtype | None = None,
        longest: int = 0,
        negative: bool = True,
    ) -> None:
        self.pipeline, self.interface, self.device, self.dtype = pipeline, interface, device, dtype
        self._kept: int | None = None  # number of prompts that were embedded before the text encoders were dropped
        self.longest = interface.longest and (longest or interface.longest)
        self.negative = negative and interface.negative != "none"
        own = ((size or self.longest, getattr(pipeline, name)) for name, size in interface.tokens)
        self.lengths = [size or tokenizer.model_max_length for size, tokenizer in own]
        self.length = sum(self.lengths)
        folder = None if cache_dir == "none" else Path(cache_dir)
        if cache_dir == "auto":
            encoders = [part for name, part in pipeline.components.items() if "text_encoder" in name and part]
            large = sum(p.numel() for encoder in encoders for p in encoder.parameters()) >= LARGE
            folder = default_cache_folder() if large else None
        self.cache = EmbeddingCache(folder and folder / "conditioning" / model, device=device)
        self._masks: dict[str, torch.Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts.

        Raises:
            ValueError: If there is no prompt, or a prompt is empty.
        """
        if not len(prompts):
            raise ValueError("no prompt to encode")
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._masks:
                self._masks[prompt] = self._mask(prompt)
        rows = {prompt: self._embed(prompt) for prompt in dict.fromkeys(prompts)}
        inputs = {key: torch.cat([rows[prompt][key] for prompt in prompts]) for key in rows[prompts[0]]}
        if self.negative:  # the same for every prompt, so it is cached once
            empty = self._embed(self.interface.negative_prompt, negative=True)
            inputs |= {key: value.expand(len(prompts), *value.shape[1:]) for key, value in empty.items()}
        if self.dtype is not None:
            wanted = getattr(self.pipeline, self.interface.network).dtype
            inputs = {key: _floats_to(value, wanted) for key, value in inputs.items()}
        if self.interface.mask:
            mask = inputs[self.interface.mask].bool()
        else:
            mask = torch.stack([self._masks[prompt] for prompt in prompts]).to(self.device)
        return Conditioning(list(prompts), inputs["prompt_embeds"].float(), mask, inputs)

    def keep_only(self, prompts: Sequence[str]) -> None:
        """Embeds prompts and drops the text encoders; prompts that come later are refused, unless they are on disk."""
        if self._kept is not None:
            return
        limit, self.cache.limit = self.cache.limit, sys.maxsize
        for prompt in dict.fromkeys(prompts):
            self.encode([prompt])
        if self.cache.folder is not None:
            self.cache.limit = limit
        if self.negative:
            self._embed(self.interface.negative_prompt, negative=True)
        self._kept = len(set(prompts))
        drop_text_encoders(self.pipeline)

    def _mask(self, prompt: str) -> torch.Tensor:
        """Which of the tokens ``(L,)`` are not padding; warns about truncated prompts and unknown words."""
        if not prompt.strip():
            raise ValueError("empty prompt: describe what the image must show")
        masks = []
        for (name, _), length in zip(self.interface.tokens, self.lengths, strict=True):
            tokenizer = getattr(self.pipeline, name)
            if tokenizer is None:  # an encoder that is not loaded
                masks.append(torch.zeros(length, dtype=torch.bool))
                continue
            ids = tokenizer(prompt).input_ids
            if len(ids) > length:
                warnings.warn(f"prompt of {len(ids)} tokens is cut to {length}: {prompt!r}", stacklevel=5)
            known = {tokenizer.bos_token_id, tokenizer.eos_token_id}
            if tokenizer.unk_token_id in ids and tokenizer.unk_token_id not in known:
                warnings.warn(f"prompt contains words the text encoder does not know: {prompt!r}", stacklevel=5)
            masks.append(torch.arange(length) < len(ids))
        return torch.cat(masks)

    def _options(self, negative: bool) -> dict[str, Any]:
        """Arguments of ``encode_prompt`` that are not the same for all pipelines of a class."""
        options: dict[str, Any] = {"max_sequence_length": self.longest} if self.longest else {}
        if self.interface.negative == "together":
            options["do_classifier_free_guidance"] = negative
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return options | {name: parameters[name].default for name in self.interface.call_defaults}

    def _padded(self, found: Mapping[str, Any]) -> Tensors:
        """Embeddings ``(1, L, D)`` of one prompt that came without padding, and their masks ``(1, L)``."""
        padded: Tensors = {}
        for key, (row,) in found.items():
            padded[key] = torch.nn.functional.pad(row, (0, 0, 0, self.length - len(row)))[None]
            padded[f"{key}_mask"] = (torch.arange(self.length, device=row.device) < len(row))[None]
        return padded

    @torch.no_grad()
    def _embed(self, prompt: str, negative: bool = False) -> Tensors:
        """The pipeline's tensors ``(1, …)`` for a prompt, or the negative ones if ``negative``."""
        found = self.cache.get(prompt)
        if found is None:
            if self._kept is not None:
                raise ValueError(
                    f"the text encoders were dropped after the {self._kept} prompts of this run, and {prompt!r:.80} is "
                    "none of them: set the denoiser's option drop_text_encoders to false"
                )
            found = {}
            for options, names in self.interface.encodings:
                values = self.pipeline.encode_prompt(prompt, device=self.device, **self._options(negative), **options)
                found |= {key: value for key, value in zip(names, values, strict=True) if key}
            if negative and self.interface.negative == "apart":
                found = {f"negative_{key}": value for key, value in found.items()}
            found = {key: value for key, value in found.items() if key.startswith("negative_") == negative}
            if self.interface.ragged:
                found = self._padded(found)
            if self.dtype is not None:
                found = {key: _floats_to(value, self.dtype) for key, value in found.items()}
            self.cache.put(prompt, found)
        return found
