"""NPNet, which turns Gaussian noise into "golden" noise: Zhou et al. 2024 (arXiv 2411.09502).

    x' = svd(x) + (2·sigmoid(α) - 1)·t + β·swin(x + t),   t = AdaGroupNorm(x, text)

``svd`` keeps the singular vectors of the noise and corrects its singular values; ``swin`` is a Swin transformer. The
text moves the mean and the scale of every channel and nothing else, and Swin knows no absolute positions: what the
text alone adds is the same in every row of the latent. The map is deterministic, so that its noise has no density.

Modules bear the names of the authors' checkpoints, whose ``.pth`` files :meth:`NPNet.from_released` reads.
Stochastic depth, which their script leaves on when it samples, is left out.

The signs of singular vectors are the solver's choice and the network sees them: on another device, or with another
linear algebra library, the same noise may turn into another golden noise.

Shapes: ``B`` batch, ``C, h, w`` latent, ``L`` text tokens, ``D`` text width, ``K`` singular values.
"""

from collections.abc import Mapping  # no postponed annotations: the hub mixin reads the type of ``config``
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaGroupNorm
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from noisear_rl.checkpoints import find_checkpoint, list_checkpoints
from noisear_rl.denoisers import Denoiser
from noisear_rl.samplers.npnet.swin import Attention, Swin, swin_sizes

TEXT_TOKENS = 77  # what the authors' text encoders pad to
PARTS = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}  # theirs: ours
UNUSED = ("unet_svd.bn.", "unet_embedding.swin.head.")  # in the authors' files, but not in what they compute


def channel_grid(channels: int) -> tuple[int, int]:
    """How channels are laid out, rows by columns, to make one matrix of a latent; as square as they can be."""
    rows = max(n for n in range(1, isqrt(channels) + 1) if channels % n == 0)
    return rows, channels // rows


@dataclass
class NPNetConfig:
    """Sizes of the network; the defaults fit the embedded ``shapes`` denoiser.

    Published networks hold Swin-tiny (``image_size`` 224, ``patch_size`` 4, ``window_size`` 7, ``d_model`` 96,
    ``depths`` (2, 2, 6, 2), ``n_heads`` (3, 6, 12, 24)) and start from its ImageNet weights. A latent of 8 x 8 has no
    use for it: the defaults are the same structure with two stages on the latent's own grid, to be trained from
    nothing.

    Attributes:
        latent_shape: ``(C, h, w)`` of the denoiser's initial noise.
        text_shape: ``(L, D)`` of its text embeddings, which the network sees whole, padding included.
        svd_hidden: Hidden width of what reads the singular vectors.
        svd_heads: Attention heads over the singular values; must divide ``K``.
        svd_ff: Hidden width of what corrects the singular values.
        image_size: Side of the square that the latent is resized to before Swin cuts it into patches.
        patch_size: Side of Swin's patches.
        window_size: Side of Swin's attention windows, in patches.
        d_model: Width of Swin's first stage; each later one has twice the width on half the grid.
        depths: Blocks of each of Swin's stages.
        n_heads: Attention heads of each of Swin's stages.
    """

    latent_shape: tuple[int, ...] = (4, 8, 8)
    text_shape: tuple[int, ...] = (16, 256)
    svd_hidden: int = 64
    svd_heads: int = 8
    svd_ff: int = 1024
    image_size: int = 8
    patch_size: int = 1
    window_size: int = 4
    d_model: int = 32
    depths: tuple[int, ...] = (2, 2)
    n_heads: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        for name in ("latent_shape", "text_shape", "depths", "n_heads"):
            setattr(self, name, tuple(getattr(self, name)))
        if len(self.latent_shape) != 3 or len(self.text_shape) != 2:
            raise ValueError(f"expected shapes (C, h, w) and (L, D), got {self.latent_shape} and {self.text_shape}")
        if min(self.matrix_shape) % self.svd_heads:
            raise ValueError(f"svd_heads ({self.svd_heads}) must divide the {min(self.matrix_shape)} singular values")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of the latent as one matrix."""
        rows, columns = channel_grid(self.latent_shape[0])
        return rows * self.latent_shape[1], columns * self.latent_shape[2]


class SVDNoise(nn.Module):
    """The latent with corrected singular values; the identity before training."""

    def __init__(self, config: NPNetConfig):
        super().__init__()
        self.channel_grid = channel_grid(config.latent_shape[0])
        rows, columns = config.matrix_shape
        k, hidden = min(rows, columns), config.svd_hidden
        self.mlp1 = nn.Sequential(nn.Linear(rows, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.mlp2 = nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.mlp3 = nn.Sequential(nn.Linear(k, k))
        self.attention = Attention(k, config.svd_heads)
        self.mlp4 = nn.Sequential(nn.Linear(k, config.svd_ff), nn.ReLU(), nn.Linear(config.svd_ff, k))
        for parameter in self.mlp4[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, h, w)`` to the same."""
        tiled = x.unflatten(1, self.channel_grid).transpose(2, 3)  # (B, rows, h, columns, w)
        left, values, right = torch.linalg.svd(tiled.flatten(3).flatten(1, 2), full_matrices=False)
        tokens = self.mlp1(left.mT) + self.mlp2(right) + self.mlp3(values)[:, None]  # (B, K, K), one a singular value
        values = values + self.mlp4(self.attention(tokens).mean(1))
        return ((left * values[:, None]) @ right).reshape(tiled.shape).transpose(2, 3).flatten(1, 2)


class NoiseTransformer(nn.Module):
    """The latent through Swin and back.

    As in the authors' code, the way back takes the rows of Swin's last grid for channels and spreads its columns and
    the features of its tokens over the plane of the latent.
    """

    def __init__(self, config: NPNetConfig):
        super().__init__()
        channels, *self.plane = config.latent_shape
        self.image_size = config.image_size
        self.downconv = nn.Conv2d(channels, 3, 1)
        self.swin = Swin(
            config.image_size, config.patch_size, config.window_size, config.d_model, config.depths, config.n_heads
        )
        self.upconv = nn.Conv2d(self.swin.grids[-1], channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, h, w)`` to the same."""
        tokens = self.swin(self.downconv(F.interpolate(x, [self.image_size] * 2)))
        return self.upconv(F.interpolate(tokens, self.plane))


class NPNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="noisear-rl",
    tags=["noise-prior", "diffusion", "golden-noise"],
    license="apache-2.0",
):
    """Noise prompt network; see the module's docstring. Untrained it is the identity, up to rounding.

    Args:
        config: Sizes.

    Raises:
        ValueError: If Swin's sizes do not fit together.
    """

    def __init__(self, config: NPNetConfig):
        super().__init__()
        self.config = config
        length, width = config.text_shape
        self.unet_svd = SVDNoise(config)
        self.unet_embedding = NoiseTransformer(config)
        self.text_embedding = AdaGroupNorm(length * width, config.latent_shape[0], 1, eps=1e-6)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Turns Gaussian noise into golden noise.

        Args:
            noise: ``(B, C, h, w)`` from N(0, I).
            text: ``(B, L, D)``.

        Returns:
            ``(B, C, h, w)``.

        Raises:
            ValueError: If a shape is not the configured one.
        """
        expected = (len(noise), *self.config.latent_shape), (len(noise), *self.config.text_shape)
        if (tuple(noise.shape), tuple(text.shape)) != expected:
            raise ValueError(
                f"expected noise {expected[0]} and text {expected[1]}, got {tuple(noise.shape)} and "
                f"{tuple(text.shape)}; was the network made for another denoiser?"
            )
        by_text = self.text_embedding(noise, text.flatten(1))
        weight = 2 * torch.sigmoid(self.alpha) - 1
        return self.unet_svd(noise) + weight * by_text + self.beta * self.unet_embedding(noise + by_text)

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Refuses a denoiser of other sizes with a ``ValueError`` that names them."""
        for name in ("latent_shape", "text_shape"):
            own, other = getattr(self.config, name), tuple(getattr(denoiser, name))
            if own != other:
                raise ValueError(
                    f"the network was made for another denoiser: its {name} is {own}, that of {denoiser.name!r} {other}"
                )

    @classmethod
    def from_released(cls, path: str | Path, *, svd_heads: int = 8) -> Self:
        """Loads a ``.pth`` file of the authors (``sdxl.pth``, ``dreamshaper.pth``, ``dit.pth``), in eval mode.

        ``save_pretrained`` then writes it as safetensors.

        Args:
            path: Their file. Nothing but tensors is unpickled.
            svd_heads: Attention heads over the singular values, which leave no trace in it; theirs are 8.

        Raises:
            ValueError: If the file is truncated, holds more than tensors, or not their network.
            FileNotFoundError: If there is no such file.
        """
        saved = read_tensors(path)
        try:
            state = released_state(saved)
            npnet = cls(released_config(state, svd_heads))
            npnet.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not the authors' network: {error}") from error
        return npnet.eval()

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: Self, model_file: str, map_location: str, strict: bool
    ) -> Self:
        try:
            model.load_state_dict(load_file(model_file, device=map_location))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{Path(model_file)}: truncated, or not the weights of {model.config}") from error
        return model


def read_tensors(path: str | Path) -> Any:
    """What a ``.pth`` file holds; raises ``ValueError`` where that is more than tensors, or less than it was."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: truncated, or a pickle of more than tensors, which is not loaded") from error


def released_state(saved: Any) -> dict[str, torch.Tensor]:
    """Tensors of the authors' file by the names that they have here, without what their network does not use.

    Raises:
        ValueError: If a part is missing.
    """
    saved = dict(saved) if isinstance(saved, Mapping) else {}
    if "embedding" in saved:
        saved["embeeding"] = saved.pop("embedding")
    for name in (*PARTS, "alpha", "beta"):
        if name not in saved or not isinstance(saved[name], Mapping if name in PARTS else torch.Tensor):
            raise ValueError(f"{name!r} is missing; expected {', '.join(PARTS)}, alpha and beta")
    state = {f"{ours}.{key}": value for theirs, ours in PARTS.items() for key, value in saved[theirs].items()}
    state |= {name: saved[name].reshape(1) for name in ("alpha", "beta")}
    return {key: value for key, value in state.items() if not key.startswith(UNUSED)}


def released_config(state: Mapping[str, torch.Tensor], svd_heads: int = 8) -> NPNetConfig:
    """Reads the sizes of the authors' network off its state dict; latents are square, texts have 77 tokens.

    Raises:
        ValueError: If a tensor is missing or sizes do not fit together.
    """
    try:
        channels = state["unet_embedding.downconv.weight"].shape[1]
        rows = state["unet_svd.mlp1.0.weight"].shape[1]
        features = state["text_embedding.linear.weight"].shape[1]
        return NPNetConfig(
            latent_shape=(channels, *[rows // channel_grid(channels)[0]] * 2),
            text_shape=(TEXT_TOKENS, features // TEXT_TOKENS),
            svd_hidden=state["unet_svd.mlp1.0.weight"].shape[0],
            svd_heads=svd_heads,
            svd_ff=state["unet_svd.mlp4.0.weight"].shape[0],
            **swin_sizes(state, "unet_embedding.swin.", state["unet_embedding.upconv.weight"].shape[1]),
        )
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{error} is missing or of another shape") from error


def load_npnet(path: str | Path) -> NPNet:
    """Loads a network in eval mode.

    Args:
        path: A checkpoint, a run folder (its newest checkpoint), a Hub id, or a ``.pth`` file of the authors
            (:meth:`NPNet.from_released`).

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no network.
        ValueError: If the weights are truncated or of another architecture.
    """
    if Path(path).suffix == ".pth":
        return NPNet.from_released(path)
    return NPNet.from_pretrained(find_checkpoint(path, "NPNet")).eval()


def holds_npnet(path: str | Path) -> bool:
    """Whether a checkpoint, a run folder or a ``.pth`` file holds this network; another, or none, is false."""
    if Path(path).suffix == ".pth":
        return Path(path).is_file() and "unet_svd" in read_tensors(path)
    file = [Path(path), *list_checkpoints(path)][-1] / "config.json"
    return file.is_file() and "svd_heads" in file.read_text()
