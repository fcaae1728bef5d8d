"""Files of scorers: missing, wrong or mismatched weights, published names, the authors' packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from noisear_rl.rewards import REWARDS
from noisear_rl.rewards.aesthetic import AestheticV1, AestheticV2
from noisear_rl.rewards.clip import CLIPScore
from noisear_rl.rewards.mps import MPS
from noisear_rl.rewards.package import WORKER, PackageReward
from noisear_rl.rewards.pickscore import PickScore
from noisear_rl.rewards.registry import make_reward
from noisear_rl.rewards.weights import load_weights, read_state_dict
from tests.rewards import tiny_scorers

PROMPTS = ["a photo of a red circle", "two squares", "a photo of a blue cross above a red circle", "three crosses"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_scorers.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 40, 64, generator=torch.Generator().manual_seed(2))


def test_weights_that_are_missing_wrong_or_damaged(made, images, tmp_path):
    tiny = tiny_scorers.shrunk(PickScore)
    with pytest.raises(FileNotFoundError, match=r"no such file. Pass weights=FOLDER with model.safetensors"):
        tiny(tmp_path / "none.safetensors").score(images, PROMPTS)
    with pytest.raises(FileNotFoundError, match="Kwai-Kolors/MPS"):
        MPS().score(images, PROMPTS)
    network = made[1]["pickscore"]
    state = network.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    folder = tiny(tmp_path).score(images, PROMPTS)  # a folder with a file of the published name
    torch.testing.assert_close(folder, made[0]["pickscore"]().score(images, PROMPTS))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or not a file of weights"):
        tiny(tmp_path).score(images, PROMPTS)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is damaged or not a file of weights"):
        tiny(tmp_path / "page.pt").score(images, PROMPTS)
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="contains no named weights, only a dict"):
        tiny(tmp_path / "step.pt").score(images, PROMPTS)
    save_file({"a": torch.ones(2)} | state, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"not the weights of pickscore: a is unexpected \(1 differences\)"):
        tiny(tmp_path / "more.safetensors").score(images, PROMPTS)
    state["visual_projection.weight"] = state["visual_projection.weight"][:, :4].clone()
    state.pop("logit_scale")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(
        ValueError, match=r"logit_scale is missing; visual_projection.weight is \(128, 4\), not \(128, 48\)"
    ):
        tiny(tmp_path / "less.safetensors").score(images, PROMPTS)
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*pass tokenizer=FOLDER"):
        made[0]["pickscore"](tokenizer=tmp_path / "nowhere").score(images, PROMPTS)


class Evil(torch.nn.Module):
    """A module whose pickle would run code."""

    ran = []

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("volatile", torch.ones(2), persistent=False)

    def __setstate__(self, state):
        Evil.ran.append(1)
        super().__setstate__(state)


def test_a_pickled_module_is_read_without_its_code(tmp_path):
    module = Evil()
    torch.save(module, tmp_path / "module.pth")
    state = read_state_dict(tmp_path / "module.pth")
    assert state.keys() == {"inner.weight", "inner.bias", "kept"} and not Evil.ran
    assert torch.equal(state["inner.weight"], module.inner.weight)
    torch.load(tmp_path / "module.pth", weights_only=False)
    assert Evil.ran  # the code would run


@pytest.mark.parametrize("scorer", [CLIPScore, PickScore, MPS])
def test_published_sizes(scorer):
    """Parameter counts at full size match the model cards; names match the published ones."""
    with torch.device("meta"):
        network = scorer().build()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == {"clip-score": 427_616_513, "pickscore": 986_109_441, "mps": 1_104_614_913}[scorer.name]
    names = set(network.state_dict())
    if scorer is MPS:
        clip = {f"model.{name.removeprefix('clip.')}" for name in names if name.startswith("clip.")}
        layers = {
            f"cross_model.layers.{i}.{name}"
            for i in range(4)
            for name in (
                *(f"0.fn.{part}.weight" for part in ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2")),
                *(f"1.fn.{part}.weight" for part in ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")),
                *("0.fn.norm.bias", "1.fn.norm.bias", "1.fn.rotary_emb.inv_freq"),
            )
        }
        published = {name: torch.empty(0) for name in clip | layers}
        assert set(scorer().convert(published)) == names
    else:
        old = {name: torch.empty(0) for name in names} | {"text_model.embeddings.position_ids": torch.empty(0)}
        assert set(scorer().convert(old)) == names


def test_heads_have_their_published_names_and_shapes():
    published = {
        "layers.0": (1024, 768),
        "layers.2": (128, 1024),
        "layers.4": (64, 128),
        "layers.6": (16, 64),
        "layers.7": (1, 16),
    }
    state = {f"{name}.weight": torch.empty(*shape) for name, shape in published.items()}
    state |= {f"{name}.bias": torch.empty(shape[0]) for name, shape in published.items()}
    with torch.device("meta"):
        two, one = AestheticV2.make_head(768), AestheticV1.make_head(768)
    load_weights(two, state, "aesthetic-v2")
    load_weights(one, {"weight": torch.empty(1, 768), "bias": torch.empty(1)}, "aesthetic-v1")
    with pytest.raises(ValueError, match="not the weights of aesthetic-v1"):
        load_weights(one, state, "aesthetic-v1")


FAKE = """import clip

assert clip.mine

def load(name, **options):
    return Model()

class Model:
    def score(self, prompt, image):
"""


def test_package_backend_talks_to_another_process(tmp_path, monkeypatch):
    """The package is a small stand-in with the original's name and calls; the process and the pipe are real."""
    (tmp_path / "ImageReward.py").write_text(
        f"{FAKE}        print('noise')\n        return len(prompt) + image.size[0]\n"
    )
    (tmp_path / "clip.py").write_text("mine = True\n")  # not the file of that name next to the worker
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = make_reward("image-reward", backend="package", python=sys.executable)
    images = torch.zeros(2, 3, 8, 16)
    assert reward.score(images, ["abc", "a"]).tolist() == [19.0, 17.0]
    process = reward._process
    assert reward.score(images[:1], ["abcd"]).tolist() == [20.0] and reward._process is process
    (tmp_path / "ImageReward.py").write_text("raise ImportError('no weights here')\n")
    with pytest.raises(RuntimeError, match=r"(?s)image-reward failed: .*no weights here"):
        make_reward("image-reward", backend="package", python=sys.executable).score(images[:1], ["a"])
    with pytest.raises(FileNotFoundError, match="-m venv packages"):
        PackageReward("hpsv2")
    with pytest.raises(ValueError, match="no package computes 'mps'"):
        PackageReward("mps", sys.executable)


def test_package_worker_needs_nothing_of_this_library():
    code = (
        "import sys; sys.path.insert(0, ''); sys.modules['torch'] = sys.modules['noisear_rl'] = None; "
        f"exec(open({str(WORKER)!r}).read().split('if __name__')[0])"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_golden_scores_name_the_missing_weights(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks/golden_scores.py"
    done = subprocess.run([sys.executable, script, "--images", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "THUDM/ImageReward" in done.stderr
    golden = json.loads(script.with_suffix(".json").read_text())
    assert all(len(scorer["values"]) == len(golden["images"]) == 4 for scorer in golden["scores"].values())
    assert set(golden["scores"]) < set(REWARDS)
