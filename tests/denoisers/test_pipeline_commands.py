"""The shipped presets of every pipeline class on the command line, with tiny random weights and tiny sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

import noisear_rl
from tests import tiny_pipelines

ROOT = Path(__file__).parents[2]
PROMPTS = ("a photo of a red circle", "two blue squares", "a lighthouse at dawn")
IDS = {denoiser: name for name, denoiser in noisear_rl.ENVIRONMENTS.items()}
CLASSES = {name: name for name in tiny_pipelines.BUILDERS} | {"sdxl-lightning": "sdxl", "sd3.5-medium": "sd3"}
FOLDERS = {
    "flux-dev": "flux",
    "flux-schnell": "flux",
    "sd3": "sd3_5",
    "sd3.5-medium": "sd3_5",
    "z-image-turbo": "z_image",
}
SLOWER = ("flux-schnell", "qwen-image", "wan", "flux2-klein", "sd3.5-medium")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in CLASSES]
NO_PAIRS = ("sana-sprint", "flux-schnell", "flux2-klein")  # no guidance, or a schedule of its own


def preset_of(name, stage):
    """The preset of a stage in the folder of a denoiser; SDXL's where it has none of its own."""
    own = ROOT / "configs" / FOLDERS.get(name, name.replace("-", "_"))
    return next(file for file in (own / f"{stage}.yaml", ROOT / f"configs/sdxl/{stage}.yaml") if file.is_file())


def pretrains_on_pairs(name):
    """Whether its presets pretrain on weak-to-strong pairs; the others do on noises that suit many prompts."""
    return name not in NO_PAIRS and (preset_of(name, "pairs").parent == preset_of(name, "nll").parent)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_presets_on_the_command_line(name, tmp_path):
    """Pairs or shared noises, NLL, PPO from there, and the evaluation of both."""
    folder, written = tmp_path / "pipeline", tmp_path / "prompts.txt"
    tiny_pipelines.build(CLASSES[name]).save_pretrained(folder)
    written.write_text("\n".join(PROMPTS) + "\n")
    where = ["--denoiser-options", "path", str(folder), "num_inference_steps", "2", "cache_dir", "none"]
    where += [str(part) for option in tiny_pipelines.OPTIONS.get(CLASSES[name], {}).items() for part in option]
    small = ["--policy.d-model", "32", "--policy.d-ff", "32", "--policy.n-heads", "1"]
    quick = ["--updates", "1", "--samples-per-prompt", "2"]
    free = ["--reward", "jpeg-compressibility"]  # the presets' scorers need weights

    def command(stage, *options, prompts=True):
        kind = ["--env-id", IDS[name]] if stage in ("ppo", "collect") else ["--denoiser", name]
        text = ["--prompts", str(written)] if prompts else []
        out = ["--output-dir", str(tmp_path / stage)]
        return [stage, "--config", str(preset_of(name, stage)), *kind, *text, *out, *options, *where]

    if pretrains_on_pairs(name):
        targets = [command("pairs", "--pairs", "4")]
    else:
        tried = ["--same-noise", "--samples-per-prompt", "3", "--num-prompts", "3", *free]
        chosen = ["--rollouts", str(tmp_path / "collect"), "--output-dir", str(tmp_path / "pairs"), "--noises", "2"]
        targets = [command("collect", *tried), ["shared-noise", *chosen, *where]]
    methods = ["--methods", *(f"{stage}={tmp_path / stage}" for stage in ("nll", "ppo"))]
    commands = [
        *targets,
        command("nll", *small, "--pairs", str(tmp_path / "pairs"), "--epochs", "1", "--batch-size", "2", prompts=False),
        command("ppo", "--init-from", str(tmp_path / "nll"), *small, *quick, *free),
        command("evaluate", *methods, "--scorers", "jpeg-compressibility", "brightness"),
    ]
    script = f"from noisear_rl.cli import main\nfor line in {commands!r}:\n    main(line)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "evaluate/table.md").read_text()
    assert "| nll |" in table and "| ppo |" in table


def test_every_folder_of_a_published_pipeline_is_covered():
    """Every folder with an NLL preset is one of the classes' here; `dreamshaper` is SDXL's."""
    folders = {file.parent.name for file in (ROOT / "configs").glob("*/nll.yaml")} - {"shapes", "dreamshaper"}
    assert folders == {preset_of(name, "nll").parent.name for name in CLASSES}
