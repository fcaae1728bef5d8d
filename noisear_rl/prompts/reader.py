"""What a policy reads of its prompts: the denoiser's embedding, token ids, or another frozen encoder's hidden states.

Shapes: ``B`` prompts, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import HfApi

from noisear_rl.denoisers import Conditioning, Denoiser, embed_all
from noisear_rl.denoisers.quiet import quietly
from noisear_rl.policy.config import DENOISER, TOKENS

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
LONGEST = 128  # tokens that a frozen encoder reads of a prompt, at most
REACHABLE_WITHIN = 3.0  # seconds to wait for an answer from the Hub


class PromptReader:
    """Turns prompts into the text that a policy reads.

    Every distinct prompt is tokenized or encoded once and by itself, so that batches do not matter.

    Args:
        text_encoder: As in :class:`~noisear_rl.policy.NoiseARConfig`: ``"denoiser"``, ``"tokens"``, or the folder or
            Hub id of an encoder.
        denoiser: Supplies its embeddings for ``"denoiser"``, and its first tokenizer for ``"tokens"``: that of its
            ``pipeline``, or its own ``tokenizer``.

    Attributes:
        shape: ``(L, D)`` of the text.
        sizes: What a policy that reads this text must agree on, by field name of its configuration.

    Raises:
        ValueError: If the denoiser has no tokenizer, or the encoder has no hidden states of text.
        FileNotFoundError: If the encoder cannot be loaded.
    """

    def __init__(self, text_encoder: str, denoiser: Denoiser):
        from noisear_rl.denoisers.prompt_encoder import EmbeddingCache  # imports diffusers

        self.text_encoder, self.denoiser = text_encoder, denoiser
        self.device = torch.device(getattr(denoiser, "device", "cpu"))
        self._cache = EmbeddingCache(None, device=self.device)
        self._embed: Callable[[str], torch.Tensor]  # prompt → (tokens, D)
        if text_encoder == DENOISER:
            self.shape = denoiser.text_shape
            self.sizes = {"text_dim": self.shape[1]}
        elif text_encoder == TOKENS:
            ids = TokenIds(tokenizer_of(denoiser), denoiser.text_shape[0])
            self._embed, self.shape = ids, (ids.length, 1)
            self.sizes = {"text_dim": 1, "text_vocabulary": ids.vocabulary, "text_length": ids.length}
        else:
            encoder = frozen_encoder(text_encoder, self.device)
            self._embed, self.shape = encoder, (encoder.ids.length, encoder.width)
            self.sizes = {"text_dim": encoder.width}

    def read(self, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """The text of encoded prompts: ``(B, L, D)`` float32, and a mask ``(B, L)``, true where a token counts."""
        if self.text_encoder == DENOISER:
            return conditioning.policy_embeds, conditioning.policy_mask
        return self._read(conditioning.prompts)

    def read_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`read`; the denoiser encodes the prompts only if its embedding is what is read."""
        return self.read(self.denoiser.encode(prompts)) if self.text_encoder == DENOISER else self._read(prompts)

    def embed_all(self, prompts: Sequence[str]) -> None:
        """Reads all prompts of a run and frees all text encoders, if the denoiser's ``drop_text_encoders`` asks for it.

        A prompt that comes later is refused.
        """
        if not getattr(self.denoiser, "drop_text_encoders", False):
            return
        embed_all(self.denoiser, prompts)
        if self.text_encoder not in (DENOISER, TOKENS):
            self._cache.limit = sys.maxsize
            self._read(prompts)
            self._embed = _dropped

    def _read(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        text = torch.zeros(len(rows), *self.shape, device=self.device)
        mask = torch.zeros(len(rows), self.shape[0], dtype=torch.bool, device=self.device)
        for i, row in enumerate(rows.values()):
            text[i, : len(row)], mask[i, : len(row)] = row, True
        index = {prompt: i for i, prompt in enumerate(rows)}
        at = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        return text[at], mask[at]

    def _row(self, prompt: str) -> torch.Tensor:
        """What is read of one prompt, without padding: ``(tokens, D)``."""
        found = self._cache.get(prompt)
        if found is None:
            found = {"text": self._embed(prompt).to(self.device, torch.float32)}
            self._cache.put(prompt, found)
        return found["text"]


def _dropped(prompt: str) -> torch.Tensor:
    raise ValueError(
        f"the text encoder was dropped after the prompts of this run, and {prompt!r:.80} is none of them: set the "
        "denoiser's option drop_text_encoders to false"
    )


class TokenIds:
    """Token ids of one prompt, cut to ``length``.

    Args:
        tokenizer: A tokenizer of ``transformers``.
        longest: Tokens per prompt, at most; fewer if the tokenizer says so.
    """

    def __init__(self, tokenizer: Any, longest: int):
        self.tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        self.length = min(tokenizer.model_max_length, longest)

    def __call__(self, prompt: str) -> torch.Tensor:
        """``(tokens, 1)`` int64."""
        ids = self.tokenizer(prompt).input_ids
        if len(ids) > self.length:
            warnings.warn(f"prompt of {len(ids)} tokens is cut to {self.length}: {prompt!r}", stacklevel=6)
            ids = self.tokenizer(prompt, truncation=True, max_length=self.length).input_ids
        return torch.tensor(ids)[:, None]


def tokenizer_of(denoiser: Denoiser) -> Any:
    """The first tokenizer of a denoiser's pipeline, or of the denoiser itself.

    Raises:
        ValueError: If there is none.
    """
    owner = getattr(denoiser, "pipeline", denoiser)
    for name in TOKENIZERS:
        if (found := getattr(owner, name, None)) is not None:
            return found
    raise ValueError(
        f"text_encoder='tokens' needs a tokenizer, and denoiser {denoiser.name!r} has none: name an encoder, or use "
        "text_encoder='denoiser'"
    )


class FrozenEncoder:
    """Last hidden states of a ``transformers`` model, in eval mode.

    Args:
        name: Folder or Hub id.
        device: Device of the model.

    Attributes:
        ids: Its tokenizer.
        width: ``D``.
    """

    def __init__(self, name: str, device: torch.device):
        tokenizer, model = _load(name)
        self.model = model.eval().requires_grad_(False).to(device)
        positions = getattr(model.config, "max_position_embeddings", None) or LONGEST
        self.ids = TokenIds(tokenizer, min(LONGEST, positions))
        try:
            self.width = self("a photo").shape[1]
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"text_encoder {name!r} gives no hidden states of text: {error}") from error

    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        """``(tokens, D)``."""
        ids = self.ids(prompt)[:, 0].to(self.model.device)
        return self.model(input_ids=ids[None]).last_hidden_state[0]


_loaded: WeakValueDictionary[tuple[str, str], FrozenEncoder] = WeakValueDictionary()


def frozen_encoder(name: str, device: torch.device) -> FrozenEncoder:
    """Loads an encoder, or returns the one that another reader uses at the moment."""
    key = (name, str(device))
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = FrozenEncoder(name, device)
    return found


def _load(name: str) -> tuple[Any, Any]:
    """Tokenizer and model: from a folder or the Hub's cache, or downloaded if the Hub can be reached."""
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )

    def load(local: bool) -> tuple[Any, Any]:
        options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **options)
        auto = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = auto.from_pretrained(name, use_safetensors=True, dtype="auto", **options)
        if config.is_encoder_decoder:
            model = model.get_encoder()
        return tokenizer, getattr(model, "text_model", model)  # of a model for images and text, the part for text

    is_local = Path(name).is_dir()
    try:
        if not is_local:
            with quietly(), contextlib.suppress(OSError, ValueError):  # not in the Hub's cache
                return load(local=True)
            HfApi().model_info(name, timeout=REACHABLE_WITHIN)
        with quietly(progress_bars=not is_local):
            return load(local=is_local)
    except Exception as error:  # from many libraries: no such model, unreachable, incomplete, of an unknown kind
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"text_encoder {name!r} could not be loaded: expected 'denoiser', 'tokens', or the folder or Hub id of a "
            "transformers model with its tokenizer, as safetensors and without code of its own. With access to the "
            f"Hub, `hf download {name}` fetches one. Cause: {lines[0]}"
        ) from error
