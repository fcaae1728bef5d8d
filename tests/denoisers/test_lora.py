"""LoRAs in the formats that are in use, merged into tiny pipelines: the weights, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from noisear_rl.denoisers import load_denoiser
from noisear_rl.gaussian import standard_noise
from tests import tiny_pipelines

RANK, ALPHA = 4, 2.0
LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"
CONV = "up_blocks.0.resnets.0.conv1"
SDXL = (LINEAR, OUT, CONV)
FLUX = ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("sdxl", "flux-dev", "hunyuan-dit"):
        tiny_pipelines.build(name).save_pretrained(root / name)
    return root


def options_of(name, folders, **more):
    own = tiny_pipelines.OPTIONS.get(name, {}) | {"path": str(folders / name), "dtype": "float32", "cache_dir": "none"}
    return own | {"num_inference_steps": 2} | more


def factors(network, layers):
    """Random ``A`` and ``B`` per layer."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for layer in layers:
        weight = dict(network.named_parameters())[f"{layer}.weight"]
        a = torch.randn(RANK, *weight.shape[1:], generator=generator)
        found[layer] = a, torch.randn(weight.shape[0], RANK, *[1] * (weight.dim() - 2), generator=generator)
    return found


def product(a, b):
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def kohya(network, pairs):
    state = {}
    for layer, (a, b) in pairs.items():
        name = f"lora_{network}_{layer.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(ALPHA)}
    return state, None


def diffusers(network, pairs):
    return {
        f"{network}.{layer}.lora.{part}.weight": value
        for layer, both in pairs.items()
        for part, value in zip(("down", "up"), both, strict=True)
    }, None


def peft(network, pairs, **adapter):
    state = {
        f"{network}.{layer}.lora_{part}.weight": value
        for layer, both in pairs.items()
        for part, value in zip("AB", both, strict=True)
    }
    metadata = {f"{network}.{key}": value for key, value in adapter.items()}
    return state, {"lora_adapter_metadata": json.dumps(metadata)} if adapter else None


def with_alpha(network, pairs):
    return peft(network, pairs, r=RANK, lora_alpha=ALPHA, target_modules=list(pairs))


def stabilised(network, pairs):
    return peft(network, pairs, r=RANK, lora_alpha=ALPHA, use_rslora=True)


CASES = [
    ("sdxl", kohya, ALPHA / RANK),
    ("sdxl", diffusers, 1.0),
    ("sdxl", peft, 1.0),
    ("sdxl", with_alpha, ALPHA / RANK),
    ("sdxl", stabilised, ALPHA / RANK**0.5),
    ("flux-dev", peft, 1.0),
    ("flux-dev", with_alpha, ALPHA / RANK),
]


@pytest.mark.parametrize(("name", "form", "factor"), CASES)
def test_weights_are_the_sum(name, form, factor, folders, tmp_path):
    plain = load_denoiser(name, **options_of(name, folders))
    layers = SDXL if name == "sdxl" else FLUX
    pairs = factors(plain.network, layers)
    state, metadata = form("unet" if name == "sdxl" else "transformer", pairs)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors", metadata)
    lora = str(tmp_path / "lora.safetensors")
    for scale in (1.0, 0.5):
        merged = load_denoiser(name, **options_of(name, folders, lora=lora, lora_scale=str(scale)))
        before, after = (one.network.state_dict() for one in (plain, merged))
        for key, value in after.items():
            layer = key.removesuffix(".weight")
            if layer in pairs:
                expected = before[key] + scale * factor * product(*pairs[layer])
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, before[key]), key
        assert merged.revision.startswith(plain.revision) and merged.revision != plain.revision


def test_images_change_and_records_say_so(folders, tmp_path):
    plain = load_denoiser("sdxl", **options_of("sdxl", folders))
    state, _ = peft("unet", factors(plain.network, SDXL))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors")
    options = options_of("sdxl", folders, lora=str(tmp_path / "lora.safetensors"))
    noise, found = standard_noise([1], plain.latent_shape), {}
    for scale in (None, 1.0, 0.25, 0.0):
        denoiser = plain if scale is None else load_denoiser("sdxl", **options, lora_scale=scale)
        found[scale] = denoiser.denoise(noise, denoiser.encode(["a red circle"])), denoiser.revision
    assert torch.equal(found[None][0], found[0.0][0])
    assert (found[1.0][0] - found[None][0]).abs().max() > 1e-3
    assert len({revision for _, revision in found.values()}) == 4


def test_a_student_by_lora_needs_no_other_unet(folders, tmp_path):
    """SDXL-Lightning's LoRA on SDXL's own UNet, with its scheduler and four steps."""
    state, _ = kohya("unet", factors(tiny_pipelines.build("sdxl").unet, (LINEAR,)))
    save_file(state, tmp_path / "lora.safetensors")
    options = options_of("sdxl", folders, lora=str(tmp_path / "lora.safetensors"))
    denoiser = load_denoiser("sdxl-lightning", **{k: v for k, v in options.items() if k != "num_inference_steps"})
    assert (denoiser.num_inference_steps, denoiser.nfe) == (4, 4)
    assert denoiser.pipeline.scheduler.config.timestep_spacing == "trailing"


def bad(state, **metadata):
    return {key: value.contiguous() for key, value in state.items()}, metadata or None


GOOD = {f"unet.{LINEAR}.lora_A.weight": torch.ones(2, 16), f"unet.{LINEAR}.lora_B.weight": torch.ones(16, 2)}
REFUSED = {
    "another network's": (
        bad({key.replace("unet", "transformer"): value for key, value in GOOD.items()}),
        "only LoRAs of the unet are supported",
    ),
    "of a text encoder, too": (
        bad(GOOD | {f"text_encoder.layer.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}),
        r"changes 'text_encoder.* \(2 of 4 tensors\)",
    ),
    "an unknown layer": (bad({key.replace("attn1", "attn7"): value for key, value in GOOD.items()}), "of 'down_blocks"),
    "half a pair": (bad(dict(list(GOOD.items())[:1])), "expected A and B of a layer"),
    "another width": (bad(GOOD | {f"unet.{LINEAR}.lora_A.weight": torch.ones(2, 5)}), "does not fit 'down_blocks"),
    "another rank": (bad(GOOD | {f"unet.{LINEAR}.lora_A.weight": torch.ones(3, 16)}), "does not fit 'down_blocks"),
    "a DoRA": (bad(GOOD | {f"unet.{LINEAR}.dora_scale": torch.ones(16)}), "it is a DoRA"),
    "whole weights": (bad({f"{LINEAR}.weight": torch.ones(16, 16)}), "holds no LoRA of this pipeline"),
    "broken metadata": (bad(GOOD, lora_adapter_metadata="{"), "holds no LoRA of this pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_the_pipeline_is_refused(name, folders, tmp_path):
    (state, metadata), problem = REFUSED[name]
    save_file(state, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ValueError, match=problem):
        load_denoiser("sdxl", **options_of("sdxl", folders, lora=str(tmp_path / "lora.safetensors")))


def test_files_that_are_missing_or_no_safetensors(folders, tmp_path, monkeypatch):
    load = lambda lora, name="sdxl", **more: load_denoiser(name, **options_of(name, folders, lora=lora, **more))
    with pytest.raises(FileNotFoundError, match=r"lora: .*none\.safetensors: no such file"):
        load(str(tmp_path / "none.safetensors"))
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(ValueError, match="is no safetensors file; expected FILE or OWNER/REPOSITORY/FILE"):
        load(str(tmp_path / "lora.bin"))
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(ValueError, match="holds no LoRA of this pipeline"):
        load(str(tmp_path / "lora.safetensors"))
    save_file(GOOD, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="diffusers reads no LoRAs of a HunyuanDiTPipeline"):
        load(str(tmp_path / "lora.safetensors"), "hunyuan-dit")
    with pytest.raises(ValueError, match="lora_scale must be a number"):
        load(str(tmp_path / "lora.safetensors"), lora_scale="much")

    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **o: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(
        FileNotFoundError, match=r"hf download ByteDance/SDXL-Lightning a/lora\.safetensors`, or pass lo"
    ):
        load("ByteDance/SDXL-Lightning/a/lora.safetensors")


@pytest.mark.parametrize(("name", "form"), [("sdxl", kohya), ("sdxl", with_alpha), ("flux-dev", with_alpha)])
def test_equals_diffusers_with_peft(name, form, folders, tmp_path):
    """The same weights as diffusers' own loading and fusing."""
    pytest.importorskip("peft")
    network = "unet" if name == "sdxl" else "transformer"
    pipeline = tiny_pipelines.build(name)
    state, metadata = form(network, factors(getattr(pipeline, network), SDXL if name == "sdxl" else FLUX))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors", metadata)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipeline.fuse_lora(components=[network], lora_scale=0.7)
    pipeline.unload_lora_weights()
    options = options_of(name, folders, lora=str(tmp_path / "lora.safetensors"), lora_scale=0.7)
    ours = load_denoiser(name, **options).network.state_dict()
    theirs = getattr(pipeline, network).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5)
