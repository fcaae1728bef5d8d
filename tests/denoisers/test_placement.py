"""Large pipelines: offloaded, without their text encoders, with embeddings in half precision, scored elsewhere."""

import gc
import weakref

import pytest
import torch

from noisear_rl.algos import collect, ppo
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.placement import place, resolve_device
from noisear_rl.envs import NoiseVectorEnv
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import load_reward
from tests import tiny_pipelines

PROMPTS = ("a photo of a red circle", "two blue squares", "a lighthouse at dawn")
NAMES = tuple(tiny_pipelines.BUILDERS)
pytestmark = pytest.mark.filterwarnings("ignore:prompt contains words")


def denoiser_of(name, **options):
    defaults = {"num_inference_steps": 2, "dtype": "float32", "device": "cpu", "cache_dir": "none"}
    own = tiny_pipelines.OPTIONS.get(name, {})
    return DiffusionPipelineDenoiser(tiny_pipelines.build(name), name=name, **(defaults | own | options))


def images_of(denoiser):
    return denoiser.denoise(standard_noise(range(3), denoiser.latent_shape), denoiser.encode(PROMPTS), [1, 2, 3])


def modules_of(denoiser):
    return [part for part in denoiser.pipeline.components.values() if isinstance(part, torch.nn.Module)]


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_pipelines_give_the_same_images(name):
    """The hooks do on a CPU what they do on an accelerator, but for the device that they move weights to."""
    expected = images_of(denoiser_of(name))
    denoiser = denoiser_of(name, offload="model", drop_text_encoders=True)
    count = len(modules_of(denoiser))
    assert count > 2 and all(hasattr(part, "_hf_hook") for part in modules_of(denoiser))
    denoiser.embed_all(PROMPTS)
    for _ in range(2):  # offloaded anew after every call
        assert torch.equal(images_of(denoiser), expected)
        assert all(hasattr(part, "_hf_hook") for part in modules_of(denoiser)) and len(modules_of(denoiser)) < count


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hunyuan-dit"])
def test_sequentially_offloaded_pipelines_hold_no_weights(name):
    """They wait on the CPU, from where every layer gets its own; accelerate runs this on accelerators alone."""
    denoiser = denoiser_of(name, offload="sequential")
    assert {p.device.type for part in modules_of(denoiser) for p in part.parameters()} == {"meta"}
    hooks = [layer._hf_hook for layer in denoiser.network.modules() if hasattr(layer, "_hf_hook")]
    assert len(hooks) > 10 and denoiser.pipeline._execution_device == torch.device("cpu:0")
    assert not any(p.requires_grad for part in modules_of(denoiser) for p in part.parameters())


def test_where_offloading_is_refused(monkeypatch):
    for option in ({"offload": "model"}, {"device_map": "balanced"}):
        with pytest.raises(ValueError, match="spare the memory of accelerators, but the device is the CPU"):
            load_denoiser("shapes", device="cpu", **option)
    for option in ("offload", "device_map"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, not 'cpu'"):
            load_denoiser("shapes", device="cpu", **{option: "cpu"})
    with pytest.raises(ValueError, match="compile needs the whole network on a device"):
        denoiser_of("sdxl", offload="sequential", compile=True)
    with pytest.raises(ValueError, match="set offload to 'model'"):
        denoiser_of("hunyuan-dit", offload="sequential")
    with pytest.raises(ValueError, match="embedding_dtype must be one of"):
        denoiser_of("sdxl", embedding_dtype="int8")


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders_are_dropped_once_all_prompts_are_embedded(name):
    expected = images_of(denoiser_of(name))
    denoiser = denoiser_of(name, drop_text_encoders=True)
    encoders = [part for key, part in denoiser.pipeline.components.items() if key.startswith("text_encoder")]
    weights = [weakref.ref(next(encoder.parameters())) for encoder in encoders]
    del encoders
    denoiser.embed_all(PROMPTS)
    gc.collect()
    assert weights and all(reference() is None for reference in weights)  # the memory is free
    assert torch.equal(images_of(denoiser), expected)
    with pytest.raises(ValueError, match="dropped after the 3 prompts of this run, and 'a photo of a blue square' is"):
        denoiser.encode(["a photo of a blue square"])


def test_embeddings_are_not_evicted_without_text_encoders(tmp_path):
    """In memory, all stay; on disk, the oldest are read again."""
    for cache_dir in ("none", str(tmp_path)):
        denoiser = denoiser_of("sdxl", drop_text_encoders=True, cache_dir=cache_dir)
        denoiser._encoder.cache.limit = 1
        denoiser.embed_all(PROMPTS)
        expected = denoiser_of("sdxl").encode(PROMPTS)
        for _ in range(2):
            found = denoiser.encode(PROMPTS)
            assert all(torch.equal(found.inputs[key], value) for key, value in expected.inputs.items())


def test_an_environment_drops_text_encoders(tmp_path):
    """Its prompts are known; others are refused. Without the option, they are not."""
    for drop in (True, False):
        denoiser = denoiser_of("sdxl", drop_text_encoders=drop)
        envs = NoiseVectorEnv(2, denoiser, "brightness", PROMPTS)
        assert (denoiser.pipeline.text_encoder is None) == drop
        envs.reset(seed=0)
        if not drop:
            envs.reset(options={"prompts": ["a red square"] * 2})
            continue
        with pytest.raises(ValueError, match="set the denoiser's option drop_text_encoders to false"):
            envs.reset(options={"prompts": ["a red square"] * 2})


def test_a_policys_own_text_encoder_is_dropped(tmp_path):
    encoder, tokenizer = tiny_pipelines.t5()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    denoiser = denoiser_of("sdxl", drop_text_encoders=True)
    reader = PromptReader(str(tmp_path), denoiser)
    expected, _ = PromptReader(str(tmp_path), denoiser).read_prompts(PROMPTS)
    model = weakref.ref(vars(reader._embed)["model"])
    del encoder
    reader.embed_all(PROMPTS)
    gc.collect()
    assert model() is None and torch.equal(reader.read_prompts(PROMPTS)[0], expected)
    with pytest.raises(ValueError, match="the text encoder was dropped"):
        reader.read_prompts(["a red square"])


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_in_half_precision(name, tmp_path):
    exact, half = denoiser_of(name), denoiser_of(name, embedding_dtype="bfloat16", cache_dir=str(tmp_path))
    sizes = [sum(value.nbytes for value in d._encoder._embed(PROMPTS[0]).values() if value.is_floating_point())
             for d in (exact, half)]  # fmt: skip
    assert sizes[0] == 2 * sizes[1]
    expected, found = exact.encode(PROMPTS), half.encode(PROMPTS)
    for key, value in expected.inputs.items():
        assert found.inputs[key].dtype == value.dtype  # the pipeline gets what it expects
        torch.testing.assert_close(found.inputs[key], value, rtol=2**-8, atol=1e-6)
    assert found.policy_embeds.dtype == torch.float32
    torch.testing.assert_close(images_of(half), images_of(exact), rtol=0, atol=0.02)


def test_the_device_of_scorers(tmp_path):
    """It is that of ``reward_device``, unless a scorer's own options name another; not all have one."""
    spec = {"image-reward": 1.0, "pickscore": 1.0, "brightness": 1.0, "shapes-match": 1.0}
    reward = load_reward(spec, options={"pickscore": {"device": "cpu"}}, device="auto")
    assert [vars(scorer)["device"] for scorer, _ in reward.rewards[:2]] == [resolve_device("auto"), torch.device("cpu")]
    missing = "cuda:7" if resolve_device("auto").type != "cuda" else "mps"
    with pytest.raises(ValueError, match=f"device '{missing}' is not available here"):
        load_reward("brightness", device=missing)
    for train, config in (
        (ppo.train, ppo.PPOConfig(reward_device=missing, output_dir=tmp_path / "ppo")),
        (collect.collect, collect.CollectConfig(reward_device=missing, output_dir=tmp_path / "rollouts")),
    ):
        with pytest.raises(ValueError, match=f"device '{missing}' is not available here"):
            train(config)


def test_a_reward_that_is_an_object_has_its_device_already():
    with pytest.raises(ValueError, match="reward_device belongs to a reward given by name"):
        NoiseVectorEnv(1, "shapes", load_reward("brightness"), reward_device="cpu")


def test_nothing_moves_a_pipeline_that_is_spread_over_devices():
    pipeline = tiny_pipelines.build("sdxl")
    pipeline.hf_device_map = {"unet": 0, "vae": 1}  # as from_pretrained sets it; diffusers then refuses to move it
    with pytest.raises(ValueError, match="device mapping strategy"):
        pipeline.to("cpu")
    assert place(pipeline, torch.device("cpu")) == pipeline._execution_device


@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_images():
    eager, compiled = denoiser_of("pixart-sigma"), denoiser_of("pixart-sigma", compile=True)
    latents = standard_noise(range(3), eager.latent_shape)
    predicted = [d.predict_noise(latents, 500.0, d.encode(PROMPTS), 3.0) for d in (eager, compiled)]
    torch.testing.assert_close(*predicted, rtol=1e-3, atol=1e-4)
    assert not torch.equal(*predicted)  # it did compile: rounding differs
    torch.testing.assert_close(images_of(compiled), images_of(eager), rtol=0, atol=1e-4)


def test_small_policy_trains_without_text_encoders(tmp_path):
    """PPO and rollouts, by options as on the command line."""
    folder = tmp_path / "sdxl"
    tiny_pipelines.build("sdxl").save_pretrained(folder)
    options = {"path": str(folder), "num_inference_steps": "2", "cache_dir": "none", "drop_text_encoders": "true"}
    small = NoiseARConfig(d_model=32, d_ff=32, n_heads=4, n_layers=1)
    shared = {"denoiser_options": options | {"embedding_dtype": "bfloat16"}, "reward": "brightness", "prompts": PROMPTS}
    sizes = {"prompts_per_update": 2, "samples_per_prompt": 3, "updates": 1, "policy": small}
    ppo.train(ppo.PPOConfig("NoiseAR-SDXL-v0", output_dir=tmp_path / "ppo", **shared, **sizes))
    sizes = {"num_prompts": 3, "samples_per_prompt": 2, "prompts_per_shard": 2, "policy": str(tmp_path / "ppo")}
    collect.collect(collect.CollectConfig("NoiseAR-SDXL-v0", output_dir=tmp_path / "rollouts", **shared, **sizes))
