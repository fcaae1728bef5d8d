"""Prepares a policy, rollouts or pairs for the Hugging Face Hub: files in its layout, with a card that is filled in.

    noisear push runs/transfer --evaluation runs/evaluate                # writes runs/hub, and says what is in it
    noisear push runs/transfer --evaluation runs/evaluate --to OWNER/NAME    # uploads it, too
    noisear push runs/rollouts --to OWNER/NAME --private

The card of a policy tells the prompts, the command, the commit, every stage's options and, with ``--evaluation``, its
table with intervals. Rollouts and pairs become datasets: ``datasets.load_dataset("OWNER/NAME")`` reads them, and so do
``noisear dpo --rollouts`` and ``noisear nll --pairs`` from a downloaded copy.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from noisear_rl import __version__
from noisear_rl.checkpoints import find_checkpoint
from noisear_rl.command import run_script
from noisear_rl.config import check_config, parse_config
from noisear_rl.data.pairs import load_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import EMBEDDED
from noisear_rl.files import read_entries, read_manifest, sha256, write_atomically
from noisear_rl.policy import load_policy
from noisear_rl.provenance import provenance
from noisear_rl.report.publishing import evaluation_section, listed, stage_section, stages_of, without_folders

DATASET_CARD = """---
{front}---
# {title}

{what} Written by noisear-rl {version} (commit {commit}).

```python
from datasets import load_dataset

rows = load_dataset("{place}", split="train")
```

`{use}` reads a downloaded copy (`hf download {place} --repo-type dataset --local-dir FOLDER`).

| | |
|---|---|
{facts}

## Columns
| name | type | what it is |
|---|---|---|
{columns}

## Settings
```yaml
{settings}```
{licence}
"""
MEANINGS = {
    "prompt": "what the image should show",
    "seed": "seed of the Gaussian noise that the noise was made from",
    "denoise_seed": "seed of the denoiser's own random numbers",
    "noise": "the initial noise, flattened",
    "log_prob": "log-probability of each patch under the policy that drew it, in nats",
    "reward": "weighted sum of the scorers; NaN where one failed",
    "image": "the image that the denoiser made of the noise",
    "target": "the noise that a policy should learn for the prompt, flattened",
    "layout": "which of the prompt's layouts it belongs to",
}


@dataclass
class PushConfig:
    """Options of publishing on the Hub."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs/ppo")
    """Run folder of a training, or folder of rollouts or pairs."""
    to: str | None = None
    """Hub id, `OWNER/NAME`; unset writes the files, and uploads nothing."""
    evaluation: Path | None = None
    """Folder of an evaluation that includes the policy; its table becomes part of the card."""
    output_dir: Path = Path("runs/hub")
    """Folder for the files; replaced if an earlier `noisear push` wrote it."""
    private: bool = False
    """Make the repository private."""

    def __post_init__(self) -> None:
        check_config(self)


def write_policy(run: Path, folder: Path, *, evaluation: Path | None = None, place: str | None = None) -> None:
    """Writes the newest policy of a run in the Hub's layout: configuration, safetensors, and a card.

    Args:
        run: Run folder.
        folder: Where to.
        evaluation: Folder of an evaluation that includes this policy, for its table.
        place: Hub id, for the card.

    Raises:
        FileNotFoundError: If the run has no policy.
        ValueError: If it is not the policy that was evaluated.
    """
    checkpoint = Path(find_checkpoint(run, "policy"))
    starts = read_entries(run / "provenance.json")
    digest = sha256(checkpoint / "model.safetensors")
    stages = stages_of(run)
    facts = {
        "place": place or "FOLDER_OR_HUB_ID",
        "evaluation": evaluation_section(evaluation, digest) if evaluation else "",
        "training": _training(stages, starts),
    }
    load_policy(checkpoint).save_pretrained(folder, model_card_kwargs=facts)


def _training(stages: dict[str, dict[str, Any]], starts: Sequence[dict[str, Any]]) -> str:
    """The section on data, command and commit of a run, and the options of all its stages."""
    options = next(iter(stages.values()))
    data = {key: without_folders(options[key]) for key in ("prompts", "pairs", "rollouts") if options.get(key)}
    if not data:
        data = {"prompts": "the training captions of the denoiser"}
    lines = [f"- {name}: `{json.dumps(value, default=str)}`" for name, value in data.items()]
    for start in starts:
        facts = {key: value for key, value in start.items() if key not in ("command", "step")}
        command = shlex.join(without_folders(shlex.split(start["command"])))
        lines.append(f"- from update {start['step']}: `{command}`, {listed(facts)}")
    sections = "\n".join(stage_section(name, values) for name, values in stages.items())
    return "\n## Training\n" + "\n".join(lines) + f"\n\n{sections}"


def write_dataset(source: Path, folder: Path, *, place: str | None = None) -> None:
    """Copies rollouts or pairs with their manifest and checksums, and writes the dataset's card.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If they are damaged or incomplete.
    """
    manifest = read_manifest(source)
    is_rollouts = "reward" in manifest and "rollouts" in manifest
    dataset = load_rollouts(source).dataset if is_rollouts else load_pairs(source)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*sorted(source.glob("shard-*.parquet")), source / "manifest.json"):
        shutil.copy(file, folder)
    if (source / "checksums").is_dir():
        shutil.copytree(source / "checksums", folder / "checksums", dirs_exist_ok=True)
    write_atomically(folder / "README.md", dataset_card(dataset, manifest, is_rollouts, place or "FOLDER"))


def dataset_card(dataset: Any, manifest: dict[str, Any], is_rollouts: bool, place: str) -> str:
    """The card of rollouts or pairs, with the front matter that ``load_dataset`` reads.

    Args:
        dataset: What the folder holds.
        manifest: Its manifest.
        is_rollouts: Otherwise pairs.
        place: Hub id or folder, for the card.
    """
    denoiser = manifest.get("denoiser", "unknown")
    front: dict[str, Any] = {"license": "apache-2.0"} if denoiser in EMBEDDED else {}
    front |= {
        "library_name": "noisear-rl",
        "tags": ["noise-prior", "diffusion", "reinforcement-learning", "rollouts" if is_rollouts else "pairs"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "shard-*.parquet"}]}],
    }
    prompts = list(dataset["prompt"])
    facts: dict[str, Any] = {"rows": f"{len(prompts):,}", "prompts": f"{len(set(prompts)):,}", "denoiser": denoiser}
    if "latent_shape" in manifest:
        facts["noise"] = " × ".join(map(str, manifest["latent_shape"]))
    if is_rollouts:
        values = dataset.with_format("numpy")["reward"][:]
        facts["reward"] = ", ".join(f"{weight:g} × {name}" for name, weight in manifest["reward"].items())
        facts["reward, mean and range"] = f"{values.mean():.3f}, {values.min():.3f} to {values.max():.3f}"
        facts["policy"] = manifest.get("policy", "unknown")
    columns = [
        f"| `{name}` | {_type_of(feature)} | {MEANINGS.get(name, 'score of a scorer')} |"
        for name, feature in dataset.features.items()
    ]
    what = (
        "Finished episodes: initial noises, the images' scores, and the log-probabilities of the policy that drew them."
        if is_rollouts
        else "Pairs of a prompt and an initial noise that suits it, to pretrain a noise prior."
    )
    return DATASET_CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title="Rollouts" if is_rollouts else "Pairs",
        what=what,
        version=__version__,
        commit=provenance()["commit"],
        place=place,
        use="noisear dpo --rollouts FOLDER" if is_rollouts else "noisear nll --pairs FOLDER",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        columns="\n".join(columns),
        settings=yaml.safe_dump(without_folders(manifest), sort_keys=False),
        licence=(
            "\nLicence: Apache-2.0."
            if denoiser in EMBEDDED
            else f"\nThe licence of {denoiser} may bind what was made with it; add `license:` above."
        ),
    )


def _type_of(feature: Any) -> str:
    inner = getattr(feature, "feature", None)
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    return f"list of {inner.dtype}" if inner is not None else str(kind).replace("PIL.Image.Image", "image")


def push(config: PushConfig) -> Path:
    """Writes the files, uploads them if ``to`` is set, and returns their folder.

    Raises:
        FileNotFoundError: If the folder is neither a run nor a dataset of this library.
        ValueError: If what it holds is damaged, or not what was evaluated.
        FileExistsError: If ``output_dir`` holds other files.
    """
    is_run = (config.folder / "config.yaml").is_file()
    if not is_run and not (config.folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{config.folder} is no run folder, and holds neither rollouts nor pairs")
    if config.evaluation and not is_run:
        raise ValueError("evaluation: only policies are evaluated")
    folder = config.output_dir
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "README.md").is_file() or "noisear-rl" not in (folder / "README.md").read_text():
            raise FileExistsError(f"{folder} holds other files: choose another output_dir")
        shutil.rmtree(folder)
    if is_run:
        write_policy(config.folder, folder, evaluation=config.evaluation, place=config.to)
    else:
        write_dataset(config.folder, folder, place=config.to)
    if config.to:
        from huggingface_hub import HfApi

        api, kind = HfApi(), "model" if is_run else "dataset"
        repo = api.create_repo(config.to, repo_type=kind, private=config.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=f"noisear-rl {__version__}")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PushConfig, argv, __doc__)
    folder = push(config)
    print(f"written: {folder} ({', '.join(sorted(file.name for file in folder.iterdir()))})")
    print(f"uploaded to {config.to}" if config.to else "nothing was uploaded: --to OWNER/NAME does that")


if __name__ == "__main__":
    run_script(main)
