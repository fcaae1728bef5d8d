"""The autoregressive Gaussian policy over noise patches: NoiseAR §2 (arXiv 2506.01337).

``p(x | text) = Π_i p(x_i | x_<i, text)``; patch ``i`` is a diagonal Gaussian whose mean and log-variance a
transformer decoder computes from the patches before it and the text. What :meth:`NoiseARPolicy.sample` draws,
:meth:`NoiseARPolicy.log_prob` scores: temperature and clamping belong to the one density.

Shapes: ``B`` batch, ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width,
``d`` model width, ``H`` heads.
"""

import dataclasses  # no postponed annotations here: the hub mixin reads the type of ``config``
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from noisear_rl.checkpoints import load_weights
from noisear_rl.gaussian import kl_to_gaussian, standard_noise
from noisear_rl.patches import patchify, sequence_shape, unpatchify
from noisear_rl.policy.card import PolicyHubMixin
from noisear_rl.policy.checks import check_numbers, check_text
from noisear_rl.policy.config import NoiseARConfig, Precision
from noisear_rl.policy.decoder import Decoder, PaperDecoder, Text
from noisear_rl.policy.layers import Whitening, autocast
from noisear_rl.policy.layouts import choose_layout
from noisear_rl.policy.released import ReleasedDecoder

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


class NoiseARPolicy(nn.Module, PolicyHubMixin):
    """Autoregressive Gaussian policy over the patches of a diffusion model's initial noise.

    Dropout is only active in train mode; reinforcement learning keeps the policy in eval mode, so that it samples
    from the density that it scores.

    Args:
        config: Sizes and architecture.

    Attributes:
        n_patches: ``N``.
        patch_dim: ``A``.
        precision: As :meth:`compute_in` set it.
    """

    def __init__(self, config: NoiseARConfig):
        super().__init__()
        self.config = config
        self.precision: Precision = "float32"
        self.n_patches, self.patch_dim = sequence_shape(config.latent_shape, config.patch_size)
        self.network: Decoder = PaperDecoder(config) if config.architecture == "paper" else ReleasedDecoder(config)
        for name, head in self.network.named_children():  # an untrained policy is N(0, I)
            if isinstance(head, nn.Sequential) and name.startswith("prediction_head"):
                for parameter in head[-1].parameters():
                    nn.init.zeros_(parameter)

    def compute_in(self, precision: Precision = "float32", compile: bool = False) -> Self:
        """Sets how the network computes; checkpoints do not hold it.

        Args:
            precision: ``"bfloat16"`` is autocast over float32 weights; densities and text statistics stay float32.
            compile: Compiles the teacher-forced pass by ``torch.compile`` on first use; sampling, whose prefix grows,
                and second derivatives stay as they are. A copy of the policy is not compiled.
        """
        self.precision = precision
        if compile:
            self.network.compile()
        return self

    def _autocast(self) -> torch.autocast:
        return autocast(self.network.pos_encoding.device, self.precision == "bfloat16")

    def _gaussian(self, features: torch.Tensor, first: int = 0) -> Independent:
        """Features ``(B, T, d)`` of the patches from ``first`` on → their Gaussians."""
        with self._autocast():
            mean, log_variance = self.network.heads(features, first)
        std = self.config.temperature * torch.exp(0.5 * log_variance.float().clamp(*LOG_VARIANCE_RANGE))
        return Independent(Normal(mean.float(), std, validate_args=False), 1, validate_args=False)

    def distribution(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> Independent:
        """The Gaussian of every patch given those before it (teacher forcing, §2.3).

        Args:
            patches: ``(B, N, A)``, finite.
            text: Text ``(B, L, D)``, as :class:`~noisear_rl.prompts.reader.PromptReader` reads it for the policy's
                ``text_encoder``.
            text_mask: ``(B, L)``, true where a token counts; ``None`` for all. ``"released"`` ignores it.

        Returns:
            ``Independent(Normal)`` with batch shape ``(B, N)`` and event shape ``(A,)``, float32.

        Raises:
            ValueError: If a shape is wrong, a patch or the text is complex or not finite, or all text is masked.
        """
        check_text(self.config, text, text_mask)
        expected = (len(text), self.n_patches, self.patch_dim)
        if tuple(patches.shape) != expected:
            raise ValueError(f"expected patches {expected}, got {tuple(patches.shape)}")
        check_numbers("patches", patches)
        return self._gaussian(self.features(patches, text, text_mask))

    @torch.no_grad()
    def exact_distribution(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> Independent:
        """:meth:`distribution` in float32 and without gradients, to measure a KL.

        Rounding to bfloat16 looks like a KL of 0.03 nats per noise in the size of SDXL: as long as a small step.
        """
        asked, self.precision = self.precision, "float32"
        try:
            return self.distribution(patches, text, text_mask)
        finally:
            self.precision = asked

    def features(self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None) -> torch.Tensor:
        """The network's features of every prefix and the text: ``(B, N, d)``; row ``i`` sees ``i`` patches."""
        return self._features(patches, self._read(text, text_mask))

    def _read(self, text: torch.Tensor, text_mask: torch.Tensor | None) -> Text:
        with self._autocast():
            return self.network.read(text, text_mask)

    def _features(self, patches: torch.Tensor, prepared: Text, layout: torch.Tensor | None = None) -> torch.Tensor:
        layout = self._choose(patches[:, 0], prepared) if layout is None else layout
        with self._autocast():
            return self.network(self.network.tokens(patches, layout), prepared)

    def _choose(self, first: torch.Tensor, prepared: Text) -> torch.Tensor | None:
        if prepared.layout_logits is None:
            return None
        return choose_layout(first, prepared.layout_logits / self.config.layout_temperature)

    def chosen_layout(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The layout ``(B,)`` int64 that each first patch chooses; ``None`` if the policy has no layouts."""
        return self._choose(patches[:, 0], self._read(text, text_mask))

    def given_layout(
        self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None, layout: torch.Tensor
    ) -> tuple[Independent, torch.Tensor]:
        """Both factors of ``p(layout | text) · p(patches | layout, text)``, to pretrain a policy that has layouts.

        Args:
            patches: ``(B, N, A)``.
            text: ``(B, L, D)``.
            text_mask: ``(B, L)`` or ``None``.
            layout: ``(B,)`` int64.

        Returns:
            The Gaussians of all patches, and the log-probabilities ``(B,)`` of the layouts: those with which standard
            normal first patches choose them at a ``layout_temperature`` of 1.

        Raises:
            ValueError: If the policy has fewer layouts.
        """
        prepared = self._read(text, text_mask)
        if prepared.layout_logits is None or int(layout.max()) >= self.config.layouts:
            raise ValueError(
                f"layout {int(layout.max())} of a policy whose configuration has layouts: {self.config.layouts}"
            )
        log_prob = prepared.layout_logits.log_softmax(-1).gather(1, layout[:, None])[:, 0]
        return self._gaussian(self._features(patches, prepared, layout)), log_prob

    @torch.no_grad()
    def fit_text(self, text: torch.Tensor, text_mask: torch.Tensor) -> None:
        """Measures the statistics of the text that ``text_features="whitened"`` needs.

        Fitted once, before training: statistics are part of the policy, and of the reference of a KL.

        Args:
            text: Training prompts ``(B, L, D)``.
            text_mask: ``(B, L)``, true where a token counts.

        Raises:
            ValueError: If the policy has no such statistics, or they are fitted already.
        """
        check_text(self.config, text, text_mask)
        layers, device = self._unfitted(), next(self.parameters()).device
        if not layers:
            raise ValueError("this policy needs no text statistics, or has them already")
        text, mask = text.to(device), text_mask.bool().to(device)
        fit = lambda layer, inputs: layer.fit(inputs[0][mask])  # each on what those before it put out
        hooks = [layer.register_forward_pre_hook(fit) for layer in layers]
        try:
            self.network.encode(text, mask[:, None, None])
        finally:
            for hook in hooks:
                hook.remove()

    def set_temperatures(self, temperature: float | None = None, layout_temperature: float | None = None) -> None:
        """Changes the temperatures of the density; ``None`` leaves one as it is.

        Args:
            temperature: Factor on the standard deviation.
            layout_temperature: Divides the logits of the layouts.

        Raises:
            ValueError: If a temperature is not positive, or the policy has no layouts.
        """
        if any(value is not None and not value > 0 for value in (temperature, layout_temperature)):
            raise ValueError(f"temperatures must be positive, got {temperature} and {layout_temperature}")
        if layout_temperature is not None and not self.config.layouts:
            raise ValueError("layout_temperature is for policies with layouts, and this one has none")
        self.config = dataclasses.replace(
            self.config,
            temperature=temperature or self.config.temperature,
            layout_temperature=layout_temperature or self.config.layout_temperature,
        )

    @property
    def needs_text_statistics(self) -> bool:
        """Whether :meth:`fit_text` must be called before training."""
        return bool(self._unfitted())

    def _unfitted(self) -> list[Whitening]:
        """The layers that wait for their statistics."""
        return [layer for layer in self.network.modules() if isinstance(layer, Whitening) and not bool(layer.fitted)]

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
            seeds: One seed per sample; the same seed gives the same noise at any batch size, and an untrained
                policy gives exactly ``standard_noise(seeds, latent_shape)``.
            generator: Source of randomness if no seeds are given; ``None`` for torch's default.
            use_cache: Keep keys and values (default), or recompute the prefix at every patch.
            differentiable: Let gradients flow from the patches to the parameters, through every prefix.

        Raises:
            ValueError: If shapes or the number of seeds are wrong, both seeds and a generator are given, the text is
                not finite or wholly masked, or the density is not finite.
        """
        check_text(self.config, text, text_mask)
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator are both given: choose one source of noise")
        b, device = len(text), text.device
        if seeds is None:
            on = generator.device if generator is not None else device
            noise = torch.randn(b, self.n_patches, self.patch_dim, generator=generator, device=on).to(device)
        else:
            latents = standard_noise(seeds, self.config.latent_shape)
            noise = patchify(latents, self.config.patch_size).to(device)
            if len(noise) != b:
                raise ValueError(f"{len(noise)} seeds for {b} samples")
        with torch.set_grad_enabled(differentiable), self._autocast():
            prepared = self.network.read(text, text_mask)
            cache: list = [None] * self.config.n_layers
            layout: torch.Tensor | None = None
            patches: list[torch.Tensor] = []
            means, stds = list[torch.Tensor](), list[torch.Tensor]()  # (B, A)
            for i in range(self.n_patches):
                if use_cache:
                    token = self.network.token(patches[-1] if patches else None, i, b, layout)
                    gaussian = self._gaussian(self.network.forward(token, prepared, cache), i).base_dist
                    mean, std = gaussian.mean[:, 0], gaussian.stddev[:, 0]
                else:
                    filled = torch.stack([*patches, *noise[:, i:].unbind(1)], 1)  # later patches are not seen
                    gaussian = self.distribution(filled, text, text_mask).base_dist
                    mean, std = gaussian.mean[:, i], gaussian.stddev[:, i]
                patches.append(mean + std * noise[:, i])
                means.append(mean)
                stds.append(std)
                if i == 0:
                    layout = self._choose(patches[0], prepared)
            drawn = torch.stack(patches, 1)
            density = Normal(torch.stack(means, 1), torch.stack(stds, 1), validate_args=False)
            sample = PolicySample(drawn, density.log_prob(drawn).sum(-1))
        if not sample.patches.isfinite().all():
            raise ValueError("the policy's density is not finite: are its weights, or the text, extremely large?")
        return sample

    def noise(self, sample: PolicySample) -> torch.Tensor:
        """The latents ``(B, C, *spatial)`` of a sample."""
        return unpatchify(sample.patches, self.config.latent_shape, self.config.patch_size)

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: Self, model_file: str, map_location: str, strict: bool
    ) -> Self:
        load_weights(model, model_file, map_location, f"a policy with {dataclasses.asdict(model.config)}")
        return model.eval()  # with dropout, a seed would give other noise every time
