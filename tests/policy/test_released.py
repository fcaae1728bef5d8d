"""The authors' released network against an independent computation from the description of its state dict."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy, load_released
from tests.conftest import random_policy


def attention(state, prefix, query, context, heads, causal):
    weight, bias = state[f"{prefix}.in_proj_weight"], state[f"{prefix}.in_proj_bias"]
    d = query.shape[-1]
    rows = [slice(i * d, (i + 1) * d) for i in range(3)]
    q, k, v = (F.linear(x, weight[row], bias[row]) for x, row in zip((query, context, context), rows, strict=True))
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d // heads)
        if causal:
            scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return F.linear(out, state[f"{prefix}.out_proj.weight"], state[f"{prefix}.out_proj.bias"])


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def recompute(state, patches, text, layers, heads, head_blocks):
    """Mean and log-variance ``(B, N, A)`` from a plain reading of the published description."""
    if "dim_adapter.weight" in state:
        text = linear(state, "dim_adapter", text)
    encoded = linear(state, "latent_patch_encoder.2", F.silu(linear(state, "latent_patch_encoder.0", patches)))
    start = state["learnable_start_token_emb"].expand(len(patches), 1, -1)
    x = torch.cat([start, encoded], 1) + state["pos_encoding"]  # N + 1 positions
    for i in range(layers):
        norm = lambda kind, y, i=i: F.layer_norm(
            y, y.shape[-1:], state[f"{kind}_norm.{i}.weight"], state[f"{kind}_norm.{i}.bias"]
        )
        x = norm("self_attn", x)
        x = x + attention(state, f"self_attn_layers.{i}", x, x, heads, causal=True)
        x = norm("cross_attn", x)
        x = x + attention(state, f"cross_attn_layers.{i}", x, text, heads, causal=False)
        x = norm("ffn", x)
        x = x + linear(state, f"ffn_layers.{i}.3", F.gelu(linear(state, f"ffn_layers.{i}.0", x)))

    def head(name):
        y = x
        for block in range(head_blocks):
            y = linear(state, f"{name}.{3 * block + 2}", F.gelu(linear(state, f"{name}.{3 * block}", y)))
        if head_blocks:
            return linear(state, f"{name}.{3 * head_blocks}", y)
        return linear(state, f"{name}.2", F.gelu(linear(state, f"{name}.0", y)))

    return head("prediction_head_mu")[:, :-1], head("prediction_head_logvar")[:, :-1]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("text_dim", [64, 48])
@pytest.mark.parametrize("head_blocks", [0, 1, 2])
def test_equals_an_independent_computation(layers, text_dim, head_blocks):
    policy = random_policy(
        scale=0.2,
        architecture="released",
        d_model=64,
        d_ff=96,
        n_heads=2,
        n_layers=layers,
        text_dim=text_dim,
        n_prediction_head=head_blocks,
        dropout=0.15,
    ).double()
    state = policy.network.state_dict()
    assert ("dim_adapter.weight" in state) == (text_dim != 64)
    patches, text = torch.randn(3, 16, 16).double(), torch.randn(3, 7, text_dim).double()
    mean, log_variance = recompute(state, patches, text, layers, 2, head_blocks)
    gaussian = policy.distribution(patches, text).base_dist
    torch.testing.assert_close(gaussian.mean, mean.float(), rtol=1e-5, atol=1e-5)
    expected = log_variance.clamp(-20, 10).float()
    torch.testing.assert_close(2 * gaussian.stddev.log(), expected, rtol=1e-5, atol=1e-5)


def published(text_dim=2048):
    with torch.device("meta"):
        return NoiseARPolicy(
            NoiseARConfig(
                latent_shape=(4, 128, 128),
                patch_size=32,
                text_dim=text_dim,
                d_model=2048,
                d_ff=4096,
                n_heads=1,
                n_layers=1,
                dropout=0.15,
                architecture="released",
                temperature=0.5,
            )
        )


def test_published_size_keys_and_shapes():
    policy = published()
    assert sum(p.numel() for p in policy.parameters()) == 113_301_504
    attention_shapes = {
        "in_proj_weight": (6144, 2048),
        "in_proj_bias": (6144,),
        "out_proj.weight": (2048, 2048),
        "out_proj.bias": (2048,),
    }
    expected = {
        "latent_patch_encoder.0.weight": (2048, 4096),
        "latent_patch_encoder.0.bias": (2048,),
        "latent_patch_encoder.2.weight": (2048, 2048),
        "latent_patch_encoder.2.bias": (2048,),
        "learnable_start_token_emb": (2048,),
        "pos_encoding": (1, 17, 2048),
        "ffn_layers.0.0.weight": (4096, 2048),
        "ffn_layers.0.0.bias": (4096,),
        "ffn_layers.0.3.weight": (2048, 4096),
        "ffn_layers.0.3.bias": (2048,),
    }
    for kind in ("self_attn", "cross_attn"):
        expected |= {f"{kind}_layers.0.{key}": shape for key, shape in attention_shapes.items()}
    for kind in ("self_attn", "cross_attn", "ffn"):
        expected |= {f"{kind}_norm.0.{key}": (2048,) for key in ("weight", "bias")}
    for head in ("mu", "logvar"):
        expected |= {
            f"prediction_head_{head}.0.weight": (4096, 2048),
            f"prediction_head_{head}.0.bias": (4096,),
            f"prediction_head_{head}.2.weight": (4096, 4096),
            f"prediction_head_{head}.2.bias": (4096,),
        }
    assert {key: tuple(value.shape) for key, value in policy.network.state_dict().items()} == expected
    assert not isinstance(policy.network.learnable_start_token_emb, torch.nn.Parameter)


def test_published_size_with_adapter():
    state = published(text_dim=1024).network.state_dict()
    assert tuple(state["dim_adapter.weight"].shape) == (2048, 1024)


def write_state(path, layers=1, text_dim=64, head_blocks=0):
    """Saves a state dict in the layout of the authors' module, with random values."""
    d, hidden, elements, patches = 64, 96, 16, 16
    generator = torch.Generator().manual_seed(layers + head_blocks)
    shapes = {"latent_patch_encoder.0": (elements // 2, elements), "latent_patch_encoder.2": (d, elements // 2)}
    if text_dim != d:
        shapes["dim_adapter"] = (d, text_dim)
    for i in range(layers):
        shapes |= {f"ffn_layers.{i}.0": (hidden, d), f"ffn_layers.{i}.3": (d, hidden)}
        shapes |= {f"{kind}_attn_layers.{i}.out_proj": (d, d) for kind in ("self", "cross")}
    for name in ("prediction_head_mu", "prediction_head_logvar"):
        for block in range(head_blocks):
            shapes |= {f"{name}.{3 * block}": (2 * d, d), f"{name}.{3 * block + 2}": (d, 2 * d)}
        last = {f"{name}.{3 * head_blocks}": (elements, d)}
        shapes |= last if head_blocks else {f"{name}.0": (2 * d, d), f"{name}.2": (elements, 2 * d)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    for i in range(layers):
        for kind in ("self", "cross"):
            state[f"{kind}_attn_layers.{i}.in_proj_weight"] = torch.randn(3 * d, d, generator=generator) / 8
            state[f"{kind}_attn_layers.{i}.in_proj_bias"] = 0.1 * torch.randn(3 * d, generator=generator)
        for kind in ("self_attn", "cross_attn", "ffn"):
            state[f"{kind}_norm.{i}.weight"] = 1 + 0.1 * torch.randn(d, generator=generator)
            state[f"{kind}_norm.{i}.bias"] = 0.1 * torch.randn(d, generator=generator)
    state["learnable_start_token_emb"] = 0.1 * torch.randn(d, generator=generator)
    angle = torch.arange(patches + 1)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
    state["pos_encoding"] = torch.stack([angle.sin(), angle.cos()], -1).reshape(1, patches + 1, d)
    torch.save(state, path)
    return state


@pytest.mark.parametrize(("layers", "text_dim", "head_blocks"), [(1, 64, 0), (1, 48, 0), (2, 64, 1), (3, 48, 2)])
def test_a_pth_file_in_the_authors_layout_loads(tmp_path, layers, text_dim, head_blocks):
    state = write_state(tmp_path / "model.pth", layers, text_dim, head_blocks)
    policy = load_released(tmp_path / "model.pth", n_heads=1)
    assert not policy.training and policy.config.temperature == 0.5 and policy.config.latent_shape == (4, 8, 8)
    patches, text = torch.randn(3, 16, 16), torch.randn(3, 7, text_dim)
    mean, log_variance = recompute(state, patches, text, layers, 1, head_blocks)
    gaussian = policy.distribution(patches, text).base_dist
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-5, atol=1e-5)
    std = 0.5 * torch.exp(0.5 * log_variance.clamp(-20, 10))
    torch.testing.assert_close(gaussian.stddev, std, rtol=1e-5, atol=1e-6)

    # Sampling with the same draws, patch by patch over the complete prefix as the authors do.
    draws = standard_noise([5, 6, 7], (4, 8, 8)).reshape(3, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
    expected = torch.zeros(3, 16, 16)
    for i in range(16):
        mean, log_variance = recompute(state, expected, text, layers, 1, head_blocks)
        expected[:, i] = mean[:, i] + 0.5 * torch.exp(0.5 * log_variance[:, i].clamp(-20, 10)) * draws[:, i]
    sample = policy.sample(text, seeds=[5, 6, 7])
    torch.testing.assert_close(sample.patches, expected, rtol=1e-4, atol=1e-4)
    latents = expected.reshape(3, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 4, 8, 8)  # channels first
    torch.testing.assert_close(policy.noise(sample), latents, rtol=1e-4, atol=1e-4)

    assert load_policy(tmp_path / "model.pth").config == policy.config  # every command accepts the file
    policy.save_pretrained(tmp_path / "converted")
    again = load_policy(tmp_path / "converted")
    assert again.config == policy.config
    torch.testing.assert_close(again.log_prob(patches, text), policy.log_prob(patches, text), rtol=0, atol=0)


def test_other_files_are_rejected(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    torch.save({"weights": Malicious()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_released(tmp_path / "code.pth")
    assert not (tmp_path / "touched").exists()
    state = write_state(tmp_path / "model.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_released(tmp_path / "short.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a state dict of the authors"):
        load_released(tmp_path / "other.pth")
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="not the authors' network"):
        load_released(tmp_path / "more.pth")
    with pytest.raises(FileNotFoundError):
        load_released(tmp_path / "none.pth")
