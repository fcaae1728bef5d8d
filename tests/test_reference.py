"""The authors' released network, computed again from the description of its state dict."""

import math

import pytest
import torch
import torch.nn.functional as F

from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
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
        architecture="reference",
        d_model=64,
        d_ff=96,
        n_heads=2,
        n_layers=layers,
        text_dim=text_dim,
        n_prediction_head=head_blocks,
        dropout=0.15,
    ).double()
    state = policy.state_dict()
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
                architecture="reference",
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
    assert {key: tuple(value.shape) for key, value in policy.state_dict().items()} == expected
    assert not isinstance(policy.learnable_start_token_emb, torch.nn.Parameter)


def test_published_size_with_adapter():
    state = published(text_dim=1024).state_dict()
    assert tuple(state["dim_adapter.weight"].shape) == (2048, 1024)
