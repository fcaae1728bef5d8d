"""NPNet equals the authors' network, loads their files, and samples from prompt and seed alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import BestOf, GaussianSampler
from noisear_rl.samplers.npnet import NPNet, NPNetConfig, NPNetSampler, holds_npnet, load_npnet

SMALL = {"image_size": 16, "patch_size": 2, "window_size": 4, "d_model": 6, "depths": (2, 3), "n_heads": (2, 3)}
PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]


def published_shapes(config: NPNetConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes in an authors' file, part by part, taken from their code and timm's."""
    channels, side, _ = config.latent_shape
    k, hidden, ff = 2 * side, config.svd_hidden, config.svd_ff
    linear = lambda name, out, width: {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
    norm = lambda name, width: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    svd = {"attention.qkv.weight": (3 * k, k), "bn.num_batches_tracked": ()}
    svd |= linear("attention.proj", k, k) | linear("mlp3.0", k, k)
    svd |= linear("mlp4.0", ff, k) | linear("mlp4.2", k, ff)
    for name in ("mlp1", "mlp2"):
        svd |= linear(f"{name}.0", hidden, k) | linear(f"{name}.2", k, hidden)
    svd |= {f"bn.{name}": (k,) for name in ("weight", "bias", "running_mean", "running_var")}
    grid = config.image_size // config.patch_size // 2 ** (len(config.depths) - 1)
    d, patch = config.d_model, config.patch_size
    swin = {"upconv.weight": (channels, grid, 1, 1), "upconv.bias": (channels,)}
    swin |= {"downconv.weight": (3, channels, 1, 1), "downconv.bias": (3,)}
    swin |= {"swin.patch_embed.proj.weight": (d, 3, patch, patch), "swin.patch_embed.proj.bias": (d,)}
    swin |= norm("swin.patch_embed.norm", d)
    for i, (depth, heads) in enumerate(zip(config.depths, config.n_heads, strict=True)):
        width, stage = d * 2**i, f"swin.layers.{i}"
        if i:
            swin |= norm(f"{stage}.downsample.norm", 2 * width)
            swin[f"{stage}.downsample.reduction.weight"] = (width, 2 * width)
        for block in (f"{stage}.blocks.{j}" for j in range(depth)):
            swin |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            swin[f"{block}.attn.relative_position_bias_table"] = ((2 * config.window_size - 1) ** 2, heads)
            swin |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
            swin |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    swin |= norm("swin.norm", width) | linear("swin.head.fc", 1000, width)
    text = linear("linear", 2 * channels, int(np.prod(config.text_shape)))
    return {"unet_svd": svd, "unet_embedding": swin, "embeeding": text, "alpha": (1,), "beta": (1,)}


def write_authors_file(path, config=None, spelling="embeeding"):
    """Writes a file in the authors' layout with random values."""
    config = config or NPNetConfig(text_shape=(77, 5), **SMALL)
    generator = torch.Generator().manual_seed(0)

    def fill(shapes):
        if isinstance(shapes, dict):
            return {name: fill(shape) for name, shape in shapes.items()}
        if len(shapes) < 2:
            return 0.5 + 0.5 * torch.randn(shapes, generator=generator)
        return torch.randn(shapes, generator=generator) / shapes[1] ** 0.5

    state = fill(published_shapes(config)) | {"alpha": torch.tensor([1.0]), "beta": torch.tensor([0.7])}
    state[spelling] = state.pop("embeeding")
    torch.save(state, path)
    return state


def attention(state, x, heads, allowed=None, bias=0.0):
    """Plain attention of ``x (B, T, d)``."""
    query, key, value = (x @ w.T for w in state["qkv.weight"].chunk(3))
    if "qkv.bias" in state:
        query, key, value = (a + b for a, b in zip((query, key, value), state["qkv.bias"].chunk(3), strict=True))
    query, key, value = (torch.stack(part.chunk(heads, -1), 1) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    mixed = torch.cat((scores.softmax(-1) @ value).unbind(1), -1)
    return mixed @ state["proj.weight"].T + state["proj.bias"]


def recompute(state, noise, text, config):
    """The authors' formulas for ``noise (B, 4, h, w)``, written independently: full attention with a window mask."""
    part = lambda group, name: {k.removeprefix(name): v for k, v in state[group].items() if k.startswith(name)}
    linear = lambda s, name, x: F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))
    norm = lambda s, name, x: F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])
    mlp = lambda s, name, x: linear(s, f"{name}.2", linear(s, f"{name}.0", x).relu())

    # Text: one group, scale and shift of each channel.
    flat = noise.flatten(1)
    normal = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    scale, shift = linear(state["embeeding"], "linear", text.flatten(1))[..., None, None].chunk(2, 1)
    by_text = normal.view_as(noise) * (1 + scale) + shift

    # Singular values of the 2 x 2 mosaic of channels.
    svd = state["unet_svd"]
    a, b, c, d = noise.unbind(1)
    left, values, right = torch.linalg.svd(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))
    tokens = mlp(svd, "mlp1", left.transpose(1, 2)) + mlp(svd, "mlp2", right) + linear(svd, "mlp3.0", values)[:, None]
    values = values + mlp(svd, "mlp4", attention(part("unet_svd", "attention."), tokens, 8).mean(1))
    mosaic = left @ torch.diag_embed(values) @ right
    golden = torch.stack([quarter for half in mosaic.chunk(2, 1) for quarter in half.chunk(2, 2)], 1)

    # Swin; nearest neighbours on the way in and out.
    swin = state["unet_embedding"]
    nearest = lambda new, old: torch.arange(new) * old // new
    x, size, side = noise + by_text, config.image_size, noise.shape[-1]
    x = x[:, :, nearest(size, side)][..., nearest(size, side)]
    x = torch.einsum("oc,bchw->bohw", swin["downconv.weight"][..., 0, 0], x) + swin["downconv.bias"][:, None, None]
    patch = config.patch_size
    kernel = swin["swin.patch_embed.proj.weight"].flatten(1)
    x = F.unfold(x, patch, stride=patch).transpose(1, 2) @ kernel.T + swin["swin.patch_embed.proj.bias"]
    x, grid = norm(swin, "swin.patch_embed.norm", x), size // patch  # (B, G·G, d)
    for i, (depth, heads) in enumerate(zip(config.depths, config.n_heads, strict=True)):
        if i:
            field = x.unflatten(1, (grid, grid))
            corners = [field[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            grid //= 2
            x = norm(swin, f"swin.layers.{i}.downsample.norm", torch.cat(corners, -1).flatten(1, 2))
            x = linear(swin, f"swin.layers.{i}.downsample.reduction", x)
        row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
        for j in range(depth):
            block = part("unet_embedding", f"swin.layers.{i}.blocks.{j}.")
            window = min(config.window_size, grid)
            moved = window // 2 if j % 2 and grid > window else 0
            allowed, index = torch.ones(grid * grid, grid * grid, dtype=torch.bool), 0
            for axis in (row, column):
                cell = (axis - moved) % grid // window
                over_the_edge = axis < moved
                allowed &= cell[:, None] == cell
                allowed &= over_the_edge[:, None] == over_the_edge
                index = index * (2 * window - 1) + axis[:, None] - axis + window - 1
            bias = block["attn.relative_position_bias_table"][index.where(allowed, 0)].permute(2, 0, 1)
            own = {key.removeprefix("attn."): value for key, value in block.items()}
            x = x + attention(own, norm(block, "norm1", x), heads, allowed, bias)
            x = x + linear(block, "mlp.fc2", F.gelu(linear(block, "mlp.fc1", norm(block, "norm2", x))))
    x = norm(swin, "swin.norm", x).unflatten(1, (grid, grid))
    x = x[:, :, nearest(side, grid)][..., nearest(side, x.shape[-1])]
    x = torch.einsum("oc,bchw->bohw", swin["upconv.weight"][..., 0, 0], x) + swin["upconv.bias"][:, None, None]
    return golden + (2 / (1 + torch.exp(-state["alpha"])) - 1) * by_text + state["beta"] * x


@pytest.mark.parametrize("spelling", ["embeeding", "embedding"])
def test_a_file_of_the_authors_layout_gives_their_noise(tmp_path, spelling):
    config = NPNetConfig(text_shape=(77, 5), **SMALL)
    state = write_authors_file(tmp_path / "sdxl.pth", config, spelling)
    npnet = load_npnet(tmp_path / "sdxl.pth")
    assert not npnet.training and npnet.config == config
    noise, text = standard_noise(range(3), (4, 8, 8)), torch.randn(3, 77, 5)
    expected = recompute(state | {"embeeding": state[spelling]}, noise, text, config)
    torch.testing.assert_close(npnet(noise, text), expected, rtol=1e-4, atol=1e-4)
    for weight in ("alpha", "beta"):  # both branches matter
        without = recompute(state | {"embeeding": state[spelling], weight: torch.zeros(1)}, noise, text, config)
        assert (without - expected).abs().mean() > 0.05
    npnet.save_pretrained(tmp_path / "converted")
    assert holds_npnet(tmp_path / "sdxl.pth") and holds_npnet(tmp_path / "converted") and not holds_npnet(tmp_path)
    again = load_npnet(tmp_path / "converted")
    assert again.config == config and torch.equal(again(noise, text), npnet(noise, text))


@pytest.mark.parametrize(("width", "parameters"), [(2048, 29_700_915), (1024, 29_070_131)])
def test_published_size(tmp_path, width, parameters):
    """Every name and shape of their networks for SDXL and Hunyuan-DiT; expanded zeros keep the file small."""
    config = NPNetConfig(
        latent_shape=(4, 128, 128), text_shape=(77, width), image_size=224, patch_size=4, window_size=7,
        d_model=96, depths=(2, 2, 6, 2), n_heads=(3, 6, 12, 24),
    )  # fmt: skip
    zeros = lambda shapes: (
        {name: zeros(shape) for name, shape in shapes.items()}
        if isinstance(shapes, dict)
        else torch.zeros(()).expand(shapes)
    )
    torch.save(zeros(published_shapes(config)), tmp_path / "dit.pth")
    npnet = NPNet.from_released(tmp_path / "dit.pth")
    assert npnet.config == config and sum(p.numel() for p in npnet.parameters()) == parameters
    noise = standard_noise([0], config.latent_shape)
    torch.testing.assert_close(npnet(noise, torch.randn(1, 77, width)), noise, rtol=0, atol=1e-4)


def test_files_that_are_not_theirs_are_rejected(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    path = tmp_path / "a.pth"
    state = write_authors_file(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_npnet(path)
    path.write_text("<html>sign in to download</html>")
    with pytest.raises(ValueError, match="truncated"):
        load_npnet(path)
    torch.save({"unet_svd": Malicious()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        load_npnet(path)
    assert not (tmp_path / "touched").exists()
    svd, swin = state["unet_svd"], state["unet_embedding"]
    table = "swin.layers.1.blocks.0.attn.relative_position_bias_table"
    wrong = {
        "'unet_svd' is missing": {"model": torch.zeros(1)},
        "'unet_embedding' is missing": state | {"unet_embedding": torch.zeros(1)},
        "'beta' is missing": {key: value for key, value in state.items() if key != "beta"},
        "downconv.weight": state | {"unet_embedding": {k: v for k, v in swin.items() if "downconv" not in k}},
        f"{table}.* is missing": state | {"unet_embedding": {k: v for k, v in swin.items() if k != table}},
        "unet_svd.mlp3.0.bias": state | {"unet_svd": {k: v for k, v in svd.items() if k != "mlp3.0.bias"}},
        "unet_svd.more": state | {"unet_svd": svd | {"more": torch.zeros(1)}},
        "size mismatch for unet_svd.mlp4.2.bias": state | {"unet_svd": svd | {"mlp4.2.bias": torch.zeros(3)}},
        "not the authors' network": [torch.zeros(1)],
    }
    for message, saved in wrong.items():
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            load_npnet(path)
    with pytest.raises(FileNotFoundError):
        load_npnet(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="holds no NPNet"):
        load_npnet(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_npnet(tmp_path / "none")
    NPNet(NPNetConfig()).save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_npnet(tmp_path / "cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_shape": (4, 8)}, "expected shapes"),
        ({"svd_heads": 5}, "must divide the 16 singular values"),
        ({"n_heads": (2,)}, "one number per stage"),
        ({"image_size": 9}, "does not halve 1 times"),
        ({"window_size": 3}, "do not tile a grid of 8"),
        ({"n_heads": (2, 7)}, "do not divide a width of 64"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        NPNet(NPNetConfig(**options))


def random_npnet(seed=0, **options) -> NPNet:
    """A network far from the identity."""
    npnet = NPNet(NPNetConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in npnet.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            if "norm" not in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        npnet.alpha.fill_(1.0)
        npnet.beta.fill_(0.5)
    return npnet


@pytest.mark.parametrize(("latent_shape", "heads"), [((4, 8, 8), 8), ((16, 6, 10), 8), ((3, 8, 4), 4), ((1, 5, 5), 1)])
def test_any_latent_batch_equals_single(latent_shape, heads):
    """An untrained network is the identity; the matrix of the latent need not be square."""
    options = {"latent_shape": latent_shape, "text_shape": (3, 7), "svd_heads": heads}
    noise, text = standard_noise(range(5), latent_shape), torch.randn(5, 3, 7)
    torch.testing.assert_close(NPNet(NPNetConfig(**options))(noise, text), noise, rtol=0, atol=1e-5)
    npnet = random_npnet(**options)
    golden = npnet(noise, text)
    assert (golden - noise).abs().mean() > 0.1
    singles = [npnet(noise[i : i + 1], text[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(golden, torch.cat(singles), rtol=1e-4, atol=1e-4)
    assert (npnet(noise, text.flip(0)) - golden).abs().mean() > 0.05  # the text matters
    added = npnet.unet_embedding(torch.ones(1, latent_shape[0], 1, 1).expand(-1, -1, *latent_shape[1:]))
    torch.testing.assert_close(added, added[:, :, :1].expand_as(added), rtol=0, atol=1e-4)  # the same in every row
    with pytest.raises(ValueError, match="another denoiser"):
        npnet(noise, text[:, :2])


def test_sampler(turbo):
    """Prompt and seed alone decide; an untrained network draws the Gaussian sampler's images; searches compose."""
    seeds = [5, 2**40, 7]
    plain = GaussianSampler(turbo)(PROMPTS, seeds)
    same = NPNetSampler(turbo, NPNet(NPNetConfig()))(PROMPTS, seeds)
    torch.testing.assert_close(same.images, plain.images, rtol=0, atol=1e-3)
    npnet = random_npnet()
    sampler = NPNetSampler(turbo, npnet)
    samples = sampler(PROMPTS, seeds)
    text = turbo.encode(PROMPTS).policy_embeds
    torch.testing.assert_close(samples.noise, npnet(standard_noise(seeds, (4, 8, 8)), text), rtol=0, atol=1e-5)
    torch.testing.assert_close(samples.images, turbo.denoise(samples.noise, turbo.encode(PROMPTS)))
    assert samples.nfe == turbo.nfe and samples.kl_to_gaussian is None
    assert (samples.images - plain.images).abs().mean() > 0.01
    alone = sampler(PROMPTS[1:2], seeds[1:2])
    torch.testing.assert_close(alone.noise, samples.noise[1:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.images, samples.images[1:2], rtol=0, atol=1e-3)
    reward = load_reward("shapes-match")
    best = BestOf(sampler, 3, reward)(PROMPTS, seeds)
    assert best.nfe == 3 and (reward.score(best.images, PROMPTS) >= reward.score(samples.images, PROMPTS)).all()
    with pytest.raises(ValueError, match="one seed per prompt"):
        sampler(PROMPTS, seeds[:2])
    with pytest.raises(ValueError, match=r"its text_shape is \(77, 256\)"):
        NPNetSampler(turbo, NPNet(NPNetConfig(text_shape=(77, 256))))
