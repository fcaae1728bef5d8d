"""The autoregressive Gaussian policy over noise patches: NoiseAR §2 (arXiv 2506.01337).

``p(x | text) = Π_i p(x_i | x_<i, text)``; patch ``i`` is a diagonal Gaussian whose mean and log-variance a
transformer decoder reads off the patches before it and the text. What :meth:`NoiseARPolicy.sample` draws,
:meth:`NoiseARPolicy.log_prob` scores: temperature and clamping belong to the one density.

Shapes: ``B`` batch, ``N`` patches, ``A`` elements a patch, ``L`` text tokens, ``D`` text width,
``d`` model width, ``H`` heads.
"""

import dataclasses  # no postponed annotations here: the hub mixin reads the type of ``config``
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from noisear_rl.gaussian import kl_to_gaussian, standard_noise
from noisear_rl.policy.layers import attend, prediction_head, project_keys_values, sinusoidal_encoding
from noisear_rl.patches import patchify, sequence_shape, unpatchify
from noisear_rl.policy.config import NoiseARConfig, reference_config

__all__ = ["NoiseARConfig", "NoiseARPolicy", "PolicySample"]

LOG_VARIANCE_RANGE = (-20.0, 10.0)


@dataclass
class PolicySample:
    """What :meth:`NoiseARPolicy.sample` returns.

    Attributes:
        patches: ``(B, N, A)`` float32.
        log_prob: ``(B, N)`` log-density of each patch, summed over its elements.
    """

    patches: torch.Tensor
    log_prob: torch.Tensor


class NoiseARPolicy(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="noisear-rl",
    tags=["noise-prior", "diffusion", "reinforcement-learning"],
    license="apache-2.0",
):
    """Autoregressive Gaussian policy over the patches of a diffusion model's initial noise.

    Dropout is active in train mode only; reinforcement learning keeps the policy in eval mode, so that the
    density it samples from is the density it scores.

    Args:
        config: Sizes and architecture.

    Attributes:
        n_patches: ``N``.
        patch_dim: ``A``.
    """

    def __init__(self, config: NoiseARConfig):
        super().__init__()
        self.config = config
        self.n_patches, self.patch_dim = n, a = sequence_shape(config.latent_shape, config.patch_size)
        d, paper = config.d_model, config.architecture == "paper"
        attention = {"num_heads": config.n_heads, "dropout": config.dropout, "batch_first": True}
        layers = range(config.n_layers)
        if paper:
            self.latent_patch_encoder: nn.Module = nn.Linear(a, d)
            # Small at first: a step on few samples would else be spent on telling their prefixes apart.
            nn.init.normal_(self.latent_patch_encoder.weight, std=0.1 / a**0.5)
            self.learnable_start_token_emb = nn.Parameter(torch.randn(d) * 0.1)
            self.text_norm = nn.LayerNorm(config.text_dim)
        else:
            self.latent_patch_encoder = nn.Sequential(nn.Linear(a, a // 2), nn.SiLU(), nn.Linear(a // 2, d))
            self.register_buffer("learnable_start_token_emb", torch.randn(d) * 0.1)
        if paper or config.text_dim != d:
            self.dim_adapter = nn.Linear(config.text_dim, d)
        encoding = sinusoidal_encoding(n + 1, d)
        if paper and config.positions == "learned":
            self.pos_encoding = nn.Parameter(torch.randn_like(encoding))  # nearly orthogonal positions
        else:
            self.register_buffer("pos_encoding", encoding)
        self.self_attn_layers = nn.ModuleList(nn.MultiheadAttention(d, **attention) for _ in layers)
        self.self_attn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.cross_attn_layers = nn.ModuleList(nn.MultiheadAttention(d, **attention) for _ in layers)
        self.cross_attn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.ffn_layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(d, config.d_ff),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.d_ff, d),
                nn.Dropout(config.dropout),
            )
            for _ in layers
        )
        self.ffn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        if paper:
            self.final_norm = nn.LayerNorm(d)
            predicted = config.log_variance == "predicted"
            self.prediction_head = prediction_head(d, 2 * a if predicted else a, 0)
            if config.log_variance == "shared":
                self.log_variance = nn.Parameter(torch.zeros(n))
            heads = [self.prediction_head]
        else:
            self.prediction_head_mu = prediction_head(d, a, config.n_prediction_head)
            self.prediction_head_logvar = prediction_head(d, a, config.n_prediction_head)
            heads = [self.prediction_head_mu, self.prediction_head_logvar]
        for head in heads:  # an untrained policy is N(0, I)
            for parameter in head[-1].parameters():
                nn.init.zeros_(parameter)

    def _text(self, text: torch.Tensor, text_mask: torch.Tensor | None) -> tuple[list, torch.Tensor | None]:
        """Keys and values of the text for every block, and the attention mask ``(B, 1, 1, L)``."""
        paper = self.config.architecture == "paper"
        text = text.to(self.pos_encoding.dtype)
        if paper:
            text = self.text_norm(text)
        if hasattr(self, "dim_adapter"):
            text = self.dim_adapter(text)  # (B, L, d)
        mask = text_mask.bool()[:, None, None] if paper and text_mask is not None else None
        return [project_keys_values(layer, text) for layer in self.cross_attn_layers], mask

    def _blocks(
        self, x: torch.Tensor, text: tuple[list, torch.Tensor | None], cache: list | None = None
    ) -> torch.Tensor:
        """Tokens ``(B, T, d)`` → features ``(B, T, d)``.

        With a cache, ``x`` is the one next token and ``cache`` holds the keys and values of all before.
        """
        paper = self.config.architecture == "paper"
        keys_values, mask = text
        for i in range(self.config.n_layers):
            normed = self.self_attn_norm[i](x)
            own = project_keys_values(self.self_attn_layers[i], normed)
            if cache is not None:
                if cache[i] is not None:
                    own = torch.cat([cache[i][0], own[0]], 2), torch.cat([cache[i][1], own[1]], 2)
                cache[i] = own
            update = attend(self.self_attn_layers[i], normed, own, causal=cache is None)
            x = (x if paper else normed) + update
            normed = self.cross_attn_norm[i](x)
            update = attend(self.cross_attn_layers[i], normed, keys_values[i], mask)
            x = (x if paper else normed) + update
            normed = self.ffn_norm[i](x)
            x = (x if paper else normed) + self.ffn_layers[i](normed)
        return self.final_norm(x) if paper else x

    def _gaussian(self, features: torch.Tensor, first: int = 0) -> Independent:
        """Heads: features ``(B, T, d)`` of the patches from ``first`` on → their Gaussians."""
        if self.config.architecture != "paper":
            mean, log_variance = self.prediction_head_mu(features), self.prediction_head_logvar(features)
        elif self.config.log_variance == "predicted":
            mean, log_variance = self.prediction_head(features).chunk(2, -1)
        else:
            mean = self.prediction_head(features)
            log_variance = torch.zeros_like(mean)
            if self.config.log_variance == "shared":
                log_variance = log_variance + self.log_variance[first : first + features.shape[1], None]
        std = self.config.temperature * torch.exp(0.5 * log_variance.float().clamp(*LOG_VARIANCE_RANGE))
        return Independent(Normal(mean.float(), std, validate_args=False), 1, validate_args=False)

    def _token(self, patch: torch.Tensor | None, position: int, batch: int) -> torch.Tensor:
        """The token at a position, ``(B, 1, d)``: the start token, or the embedded patch before it."""
        if patch is None:
            token = self.learnable_start_token_emb.expand(batch, 1, -1)
        else:
            token = self.latent_patch_encoder(patch.to(self.pos_encoding.dtype))[:, None]
        return token + self.pos_encoding[:, position : position + 1]

    def distribution(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> Independent:
        """The Gaussian of every patch given those before it (teacher forcing, §2.3).

        Args:
            patches: ``(B, N, A)``, finite.
            text: Text embedding ``(B, L, D)``.
            text_mask: ``(B, L)``, true where a token counts; ``None`` for all. ``"reference"`` ignores it.

        Returns:
            ``Independent(Normal)`` with batch shape ``(B, N)`` and event shape ``(A,)``, float32.

        Raises:
            ValueError: If a shape is wrong or a patch is not finite.
        """
        self._check_text(text, text_mask)
        expected = (len(text), self.n_patches, self.patch_dim)
        if tuple(patches.shape) != expected:
            raise ValueError(f"expected patches {expected}, got {tuple(patches.shape)}")
        if not patches.isfinite().all():
            raise ValueError("patches hold NaN or infinite values")
        return self._gaussian(self.features(patches, text, text_mask))

    def features(self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None) -> torch.Tensor:
        """What the network makes of every prefix and the text: ``(B, N, d)``; row ``i`` sees ``i`` patches."""
        start = self.learnable_start_token_emb.expand(len(patches), 1, -1)
        past = self.latent_patch_encoder(patches[:, :-1].to(self.pos_encoding.dtype))  # (B, N-1, d)
        tokens = torch.cat([start, past], 1) + self.pos_encoding[:, : self.n_patches]
        return self._blocks(tokens, self._text(text, text_mask))

    def log_prob(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-density of each patch ``(B, N)``, in nats, summed over its ``A`` elements."""
        return self.distribution(patches, text, text_mask).log_prob(patches.float())

    def kl_divergence(
        self,
        patches: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        other: "NoiseARPolicy | None" = None,
    ) -> torch.Tensor:
        """Closed-form KL of each patch's Gaussian to another's, given the same prefix: ``(B, N)`` in nats.

        Summed over patches and averaged over this policy's own samples it estimates the KL of the whole
        noise.

        Args:
            patches: ``(B, N, A)``.
            text: ``(B, L, D)``.
            text_mask: ``(B, L)`` or ``None``.
            other: The second policy; ``None`` for N(0, I).
        """
        own = self.distribution(patches, text, text_mask)
        if other is None:
            return kl_to_gaussian(own)
        return kl_divergence(own, other.distribution(patches, text, text_mask))

    def sample(
        self,
        text: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        differentiable: bool = False,
    ) -> PolicySample:
        """Draws noise patch by patch (§2.4).

        Args:
            text: ``(B, L, D)``.
            text_mask: ``(B, L)`` or ``None``.
            seeds: One seed a sample; the same seed gives the same noise at any batch size, and an untrained
                policy gives exactly ``standard_noise(seeds, latent_shape)``.
            generator: Source of randomness where no seeds are given; ``None`` for torch's own.
            use_cache: Keep keys and values (default), or recompute the prefix at every patch.
            differentiable: Let gradients flow from the patches to the parameters, through every prefix.

        Raises:
            ValueError: If shapes or the number of seeds are wrong.
        """
        self._check_text(text, text_mask)
        b, device = len(text), text.device
        if seeds is None:
            on = generator.device if generator is not None else device
            noise = torch.randn(b, self.n_patches, self.patch_dim, generator=generator, device=on).to(device)
        else:
            latents = standard_noise(seeds, self.config.latent_shape)
            noise = patchify(latents, self.config.patch_size).to(device)
            if len(noise) != b:
                raise ValueError(f"{len(noise)} seeds for {b} samples")
        with torch.set_grad_enabled(differentiable):
            prepared = self._text(text, text_mask)
            cache: list = [None] * self.config.n_layers
            patches: list[torch.Tensor] = []
            log_prob: list[torch.Tensor] = []
            for i in range(self.n_patches):
                if use_cache:
                    token = self._token(patches[-1] if patches else None, i, b)
                    gaussian = self._gaussian(self._blocks(token, prepared, cache), i).base_dist
                    mean, std = gaussian.mean[:, 0], gaussian.stddev[:, 0]  # (B, A)
                else:
                    filled = torch.stack([*patches, *noise[:, i:].unbind(1)], 1)  # what comes after is not seen
                    gaussian = self.distribution(filled, text, text_mask).base_dist
                    mean, std = gaussian.mean[:, i], gaussian.stddev[:, i]
                patches.append(mean + std * noise[:, i])
                log_prob.append(Normal(mean, std).log_prob(patches[-1]).sum(-1))
            return PolicySample(torch.stack(patches, 1), torch.stack(log_prob, 1))

    def noise(self, sample: PolicySample) -> torch.Tensor:
        """The latents ``(B, C, *spatial)`` of a sample."""
        return unpatchify(sample.patches, self.config.latent_shape, self.config.patch_size)

    def _check_text(self, text: torch.Tensor, text_mask: torch.Tensor | None) -> None:
        if text.dim() != 3 or text.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"expected a text embedding (B, L, {self.config.text_dim}), got {tuple(text.shape)}; "
                "was the policy made for another denoiser?"
            )
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise ValueError(f"expected a text mask {tuple(text.shape[:2])}, got {tuple(text_mask.shape)}")

    @classmethod
    def from_reference(cls, path: str | Path, *, n_heads: int = 1) -> Self:
        """Loads a ``.pth`` file of the authors' released network, in eval mode, at their temperature of 0.5.

        ``save_pretrained`` then writes it as safetensors, which every command here takes as a policy.

        Args:
            path: Their state dict. Nothing but tensors is unpickled.
            n_heads: Attention heads, which a state dict does not tell; theirs is 1.

        Raises:
            ValueError: If the file holds anything but tensors, or not their network.
            FileNotFoundError: If there is no such file.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: truncated, or a pickle of more than tensors, which is not loaded") from error
        policy = cls(reference_config(state, n_heads))
        try:
            policy.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: not the authors' network: {error}") from error
        return policy.eval()

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: Self, model_file: str, map_location: str, strict: bool
    ) -> Self:
        try:
            model.load_state_dict(load_file(model_file, device=map_location))
        except (SafetensorError, RuntimeError) as error:
            what = dataclasses.asdict(model.config)
            raise ValueError(
                f"{Path(model_file)}: truncated, or not the weights of a policy with {what}: {error}"
            ) from error
        return model
