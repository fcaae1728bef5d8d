"""What the benchmarks of speed compare with is the same thing, and their pages say what was measured."""

import pytest
import torch

from benchmarks import bench, bench_loops, bench_policy, full_size, on_paper, published_pipelines, resources
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.envs import make_vector_env
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import patchify
from tests import tiny_pipelines
from tests.conftest import random_policy

LIMIT = "10.7× fewer FLOPs; 8.0×: weights are read at every patch"


def row_of(page, title):
    """The cells of the first row whose title contains some words."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return next(row for row in rows if title in row[0])


def test_the_authors_loop_draws_what_sample_draws():
    policy = random_policy(architecture="released")
    text = torch.randn(3, 16, 256, generator=torch.Generator().manual_seed(0))
    noise = patchify(standard_noise(range(3), policy.config.latent_shape), policy.config.patch_size)
    expected = policy.sample(text, seeds=range(3)).patches
    torch.testing.assert_close(bench_policy.authors_loop(policy, text, noise), expected, rtol=0, atol=1e-5)


def test_table():
    seconds = {"as the authors' loop": [8.0, 8.0, 16.0], "float32": [2.0, 1.0, 2.0], "bfloat16": [1.0, 1.0, 1.0]}
    seconds |= {"reading the weights": [1.0, 1.0, 1.0]}
    record = {
        "provenance": {},
        "repeats": 3,
        "sampling": {"seconds": {"1": seconds, "8": seconds, "32": seconds}, "difference": {"1": 0.25}},
        "nll": {
            "seconds": {"float32": [2.0] * 3, "product, float32": [1.0] * 3}
            | {"bfloat16": [4.0] * 3, "product, bfloat16": [1.0] * 3},
            "flops": 150,
            "product": 100,
        },
        "rollouts": {"rollout": [1.0, 1.0, 1.0], "bare": [0.9, 0.96, 0.97]},
        "ppo": {
            "ours": {"seconds": [1.0], "return": [0.5]},
            "Stable-Baselines3": {"seconds": [2.5], "return": [0.4]},
            "TorchRL": {"seconds": [4.0], "return": [0.4]},
        },
        "natural": {"natural": [[10.0, 3, 1.0]], "adam 0.001": [[30.0, 9, 1.0]], "adam 0.01": [[50.0, 20, 0.0]]},
        "memory": 5.0,
    }
    page = bench.table(record)
    assert row_of(page, "float32, batch 32")[1:] == ["8.0× (4.0 to 8.0)", "≥ 8×", LIMIT, "yes"]
    assert row_of(page, "bfloat16, batch 32")[-1] == "**no**"
    assert row_of(page, "NLL step in float32")[1:] == ["75 % (75 to 75)", "≥ 70 %", "100 %", "yes"]
    assert row_of(page, "rollouts")[1:] == ["96 % (90 to 97)", "≥ 95 %", "100 %", "yes"]
    assert [row_of(page, f"beside {name}")[-1] for name in ("Stable-Baselines3", "TorchRL")] == ["**no**", "yes"]
    assert row_of(page, "Adam over natural")[1] == "3.0×" and "1 of 1 never" in page
    assert row_of(page, "peak memory")[-1] == "**no**"
    assert "at most 0.250 of their standard deviation" in page


def test_the_flops_of_a_training_step_are_those_of_both_passes():
    policy = random_policy()
    patches, text, mask = resources.batch_of(policy, 7, 3)
    forward = sum(resources.flops(lambda: resources.nll_of(policy, patches, text, mask)).values())
    both = resources.flops(lambda: resources.nll_of(policy, patches, text, mask).backward(), gradients=True)
    assert 2.5 * forward < sum(both.values()) <= 3 * forward


def test_training_beside_other_libraries_ends_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(bench_loops, "SAMPLES", 2)
    for envs in (bench_loops.ours(2), bench_loops.stable_baselines3(2), bench_loops.torch_rl(2)):
        assert len(envs.returns) == len(envs.ended) == 2 and envs.num_envs == 2 * len(bench_loops.HARD)
        assert 0 < envs.ended[0] < envs.ended[1] <= envs.outside


@pytest.mark.parametrize("name", published_pipelines.PUBLISHED)
def test_published_pipelines_have_their_published_sizes(name):
    assert all(p.is_meta for m in published_pipelines.empty_modules(name).values() for p in m.parameters())


def test_random_weights_are_finite_and_shared_parameters_stay_shared():
    with torch.device("meta"):
        first, second = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    second.weight = first.weight
    module = published_pipelines.fill(torch.nn.ModuleList([first, second]), torch.bfloat16, torch.device("cpu"))
    assert module[0].weight is module[1].weight and module[0].bias is not module[1].bias
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in module.parameters())
    assert 0.2 < module[0].weight.float().std() < 1.0


def test_weights_in_half_precision_stay_so_on_a_cpu():
    half = DiffusionPipelineDenoiser(
        tiny_pipelines.build("sdxl").to(torch.bfloat16), name="tiny", dtype="bfloat16", device="cpu"
    )
    full = DiffusionPipelineDenoiser(tiny_pipelines.build("sdxl"), name="tiny", dtype="bfloat16", device="cpu")
    assert (half.network.dtype, full.network.dtype) == (torch.bfloat16, torch.float32)
    noise = standard_noise([0], half.latent_shape)
    images = [d.denoise(noise, d.encode(["a photo of red circle"]), [0]) for d in (half, full)]
    torch.testing.assert_close(*images, rtol=0, atol=0.1)


def test_observations_of_an_episode_share_their_text():
    envs = make_vector_env("NoiseAR-ShapesTurbo-v0", 2)
    first, _ = envs.reset(seed=0)
    second, *_ = envs.step(envs.action_space.sample())
    assert second["text"] is first["text"] and second["patches"] is not first["patches"]
    assert envs.reset(seed=1)[0]["text"] is not first["text"]


def test_estimates_on_paper():
    assert on_paper.sent(8.0, 1) == 0 and on_paper.sent(8.0, 4) == 12.0
    assert on_paper.seconds_per_image(on_paper.PUBLISHED, on_paper.PUBLISHED_STEPS) == pytest.approx(2.496)
    config = PPOConfig(prompts_per_update=4, samples_per_prompt=32, epochs=2, cg_iterations=8)
    one, all_ = (on_paper.ppo_update(config, 1000, 1e9, 1e9, 2.0, gpus) for gpus in (1, 128))
    assert one[0] == 128 * 2.0 and all_[0] == 2.0 and one[3] == 0
    assert all_[-1] == pytest.approx(2 * 127 / 128 * 2 * 10 * 4000)  # a gradient and nine products per epoch
    found = on_paper.on_paper(105_000_000, 5e9, 5e9, 3)
    hours = {(row["run"], row["gpus"]): row["hours"][0] for row in found["rows"]}
    assert hours["2,000 × 20 rollouts for DPO", 1] == pytest.approx(8 * hours["2,000 × 20 rollouts for DPO", 8])


def test_page_of_the_full_size():
    stage = {"stage": "denoise", "seconds": 12.0, "seconds predicted": 10.0, "GiB": 6.0, "GiB predicted": None}
    found = {"provenance": {}, "TFLOPs per second": {"half": 1.0, "float32": 0.1}, "UNet": 2.5e9, "dtype": "bfloat16"}
    page = full_size.table({"cpu": found | {"stages": [stage]}})
    assert row_of(page, "denoise")[1:] == ["12.00", "10.00", "1.20", "6.00", "", ""]


def test_micro_batches_divide_the_activations_alone():
    cost = resources.policy_cost("sdxl")
    assert cost[resources.MICRO] < cost["PPO, natural"]
    assert cost[resources.MICRO] == pytest.approx(9 * 4 * cost["parameters"], rel=0.05)


def test_resources_have_a_row_for_every_published_denoiser():
    """Its network has the published number of parameters, and can be called with the shapes of its preset."""
    assert set(resources.NETWORKS) == {name for name in PRESETS if not name.startswith("shapes")}
    assert set(resources.GUIDED) < set(resources.NETWORKS)
    for name in ("sana-sprint-0.6b", "flux2-klein"):
        parameters, counted = resources.denoiser_cost(name)
        assert 0.99 < parameters / resources.NETWORKS[name].parameters < 1.01 and sum(counted.values()) > 1e12
