"""NPNet, which turns Gaussian noise into "golden" noise: Zhou et al. 2024 (arXiv 2411.09502).

    x' = svd(x) + (2·sigmoid(α) - 1)·t + β·swin(x + t),   t = AdaGroupNorm(x, text)

``svd`` keeps the singular vectors of the noise and corrects its singular values; ``swin`` is a Swin transformer. The
text changes only the mean and the scale of each channel, and Swin has no absolute positions, so the text's own
contribution is the same in every row of the latent. The map is deterministic, so its noise has no density.

Module names match the authors' checkpoints; :meth:`NPNet.from_released` reads their ``.pth`` files. Stochastic depth,
which their script leaves on when it samples, is omitted.

The solver chooses the signs of singular vectors, and the network sees them: another device or linear algebra library
may turn the same noise into another golden noise.

Shapes: ``B`` batch, ``C, h, w`` latent, ``L`` text tokens, ``D`` text width, ``K`` singular values.
"""

from collections.abc import Mapping  # no postponed annotations: the hub mixin reads the type of ``config``
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from noisear_rl.checkpoints import find_checkpoint, list_checkpoints, load_weights, read_tensors
from noisear_rl.config import PositiveInt, check_config
from noisear_rl.denoisers import Denoiser
from noisear_rl.policy.config import Precision
from noisear_rl.samplers.npnet.swin import Attention, Swin, swin_sizes

TEXT_TOKENS = 77  # the padded length of the authors' text encoders
PARTS = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}  # theirs: ours
UNUSED = ("unet_svd.bn.", "unet_embedding.swin.head.")  # in the authors' files, but unused by their forward pass


def channel_grid(channels: int) -> tuple[int, int]:
    """Rows and columns in which channels are tiled to make one matrix of a latent, as square as possible."""
    rows = max(n for n in range(1, isqrt(channels) + 1) if channels % n == 0)
    return rows, channels // rows


@dataclass
class NPNetConfig:
    """Sizes of the network; the defaults fit the embedded ``shapes`` denoiser.

    The published networks contain Swin-tiny (``image_size`` 224, ``patch_size`` 4, ``window_size`` 7, ``d_model`` 96,
    ``depths`` (2, 2, 6, 2), ``n_heads`` (3, 6, 12, 24)) and start from its ImageNet weights. A latent of 8 x 8 is too
    small for it: the defaults have the same structure with two stages on the latent's own grid, trained from scratch.

    Attributes:
        latent_shape: ``(C, h, w)`` of the denoiser's initial noise.
        text_shape: ``(L, D)`` of its text embeddings; the network sees all tokens, including padding.
        svd_hidden: Hidden width of the layers that read the singular vectors.
        svd_heads: Attention heads over the singular values; must divide ``K``.
        svd_ff: Hidden width of the layers that correct the singular values.
        image_size: Side of the square that the latent is resized to before Swin cuts it into patches.
        patch_size: Side of Swin's patches.
        window_size: Side of Swin's attention windows, in patches.
        d_model: Width of Swin's first stage; each later stage has twice the width on half the grid.
        depths: Blocks per Swin stage.
        n_heads: Attention heads per Swin stage.
    """

    latent_shape: tuple[PositiveInt, ...] = (4, 8, 8)
    text_shape: tuple[PositiveInt, ...] = (16, 256)
    svd_hidden: PositiveInt = 64
    svd_heads: PositiveInt = 8
    svd_ff: PositiveInt = 1024
    image_size: PositiveInt = 8
    patch_size: PositiveInt = 1
    window_size: PositiveInt = 4
    d_model: PositiveInt = 32
    depths: tuple[PositiveInt, ...] = (2, 2)
    n_heads: tuple[PositiveInt, ...] = (2, 4)

    def __post_init__(self) -> None:
        check_config(self)
        if len(self.latent_shape) != 3 or len(self.text_shape) != 2:
            raise ValueError(f"expected shapes (C, h, w) and (L, D), got {self.latent_shape} and {self.text_shape}")
        if min(self.matrix_shape) % self.svd_heads:
            raise ValueError(f"svd_heads ({self.svd_heads}) must divide the {min(self.matrix_shape)} singular values")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the latent as one matrix."""
        rows, columns = channel_grid(self.latent_shape[0])
        return rows * self.latent_shape[1], columns * self.latent_shape[2]


class SVDNoise(nn.Module):
    """Corrects the singular values of the latent; the identity before training."""

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
        """Maps ``(B, C, h, w)`` to the same shape."""
        tiled = x.unflatten(1, self.channel_grid).transpose(2, 3)  # (B, rows, h, columns, w)
        left, values, right = torch.linalg.svd(tiled.flatten(3).flatten(1, 2), full_matrices=False)
        tokens = self.mlp1(left.mT) + self.mlp2(right) + self.mlp3(values)[:, None]  # (B, K, K): one per singular value
        values = values + self.mlp4(self.attention(tokens).mean(1))
        return ((left * values[:, None]) @ right).reshape(tiled.shape).transpose(2, 3).flatten(1, 2)


class NoiseTransformer(nn.Module):
    """Maps the latent through Swin and back.

    As in the authors' code, the way back treats the rows of Swin's last grid as channels and interpolates its columns
    and token features to the plane of the latent.
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
        """Maps ``(B, C, h, w)`` to the same shape."""
        tokens = self.swin(self.downconv(F.interpolate(x, [self.image_size] * 2)))
        return self.upconv(F.interpolate(tokens, self.plane))


class NPNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="noisear-rl",
    tags=["noise-prior", "diffusion", "golden-noise"],
    license="apache-2.0",
):
    """Noise prompt network; see the module docstring. Before training it is the identity, up to rounding.

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
        from diffusers.models.normalization import AdaGroupNorm  # here: it takes seconds to load

        self.text_embedding = AdaGroupNorm(length * width, config.latent_shape[0], 1, eps=1e-6)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.precision: Precision = "float32"  # "bfloat16": autocast of Swin; singular values would not survive it

    def forward(self, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Turns Gaussian noise into golden noise.

        Args:
            noise: ``(B, C, h, w)`` from N(0, I).
            text: ``(B, L, D)``.

        Returns:
            ``(B, C, h, w)``.

        Raises:
            ValueError: If a shape does not match the configuration.
        """
        expected = (len(noise), *self.config.latent_shape), (len(noise), *self.config.text_shape)
        if (tuple(noise.shape), tuple(text.shape)) != expected:
            raise ValueError(
                f"expected noise {expected[0]} and text {expected[1]}, got {tuple(noise.shape)} and "
                f"{tuple(text.shape)}; was the network made for another denoiser?"
            )
        by_text = self.text_embedding(noise, text.flatten(1))
        weight = 2 * torch.sigmoid(self.alpha) - 1
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            by_swin = self.unet_embedding(noise + by_text)
        return self.unet_svd(noise) + weight * by_text + self.beta * by_swin

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Checks that a denoiser's sizes match.

        Raises:
            ValueError: If the latent shape or the text shape differs.
        """
        for name in ("latent_shape", "text_shape"):
            own, other = getattr(self.config, name), tuple(getattr(denoiser, name))
            if own != other:
                raise ValueError(
                    f"the network was made for another denoiser: its {name} is {own}, that of {denoiser.name!r} is "
                    f"{other}"
                )

    @classmethod
    def from_released(cls, path: str | Path, *, svd_heads: int = 8) -> Self:
        """Loads an authors' ``.pth`` file (``sdxl.pth``, ``dreamshaper.pth``, ``dit.pth``) in eval mode.

        ``save_pretrained`` then writes it as safetensors.

        Args:
            path: The file. Only tensors are unpickled.
            svd_heads: Attention heads over the singular values, which the file does not record; the authors use 8.

        Raises:
            ValueError: If the file is truncated, contains more than tensors, or is not their network.
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
        load_weights(model, model_file, map_location, str(model.config))
        return model.eval()


def released_state(saved: Any) -> dict[str, torch.Tensor]:
    """Tensors of an authors' file under the names used here, without those that their network does not use.

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
    """Infers the sizes of the authors' network from its state dict; latents are square, texts have 77 tokens.

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
        path: A checkpoint, a run folder (its newest checkpoint), a Hub id, or an authors' ``.pth`` file
            (:meth:`NPNet.from_released`).

    Raises:
        FileNotFoundError: If there is no such folder, or it contains no network.
        ValueError: If the weights are truncated or of another architecture.
    """
    if Path(path).suffix == ".pth":
        return NPNet.from_released(path)
    return NPNet.from_pretrained(find_checkpoint(path, "NPNet")).eval()


def holds_npnet(path: str | Path) -> bool:
    """Whether a checkpoint, a run folder or a ``.pth`` file contains an NPNet."""
    if Path(path).suffix == ".pth":
        return Path(path).is_file() and "unet_svd" in read_tensors(path)
    file = [Path(path), *list_checkpoints(path)][-1] / "config.json"
    return file.is_file() and "svd_heads" in file.read_text()
