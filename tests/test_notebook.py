"""``examples/notebook.ipynb`` runs from top to bottom, and what it promises happens."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install nbformat nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install ipykernel")

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "notebook.ipynb"
SECONDS = 1800  # per cell, on a busy machine; all of them take less than a minute on an idle one


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What every code cell shows: its text, and its number of pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path_factory.mktemp("jupyter")))
        notebook = nbformat.read(FILE, as_version=4)
        folder = {"metadata": {"path": str(FILE.parent)}}
        nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder).execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(part.get("text", "") for part in parts if part.get("name") == "stdout") for parts in shown]
    pictures = [sum("image/png" in part.get("data", {}) for part in parts) for parts in shown]
    return texts, pictures


def test_pictures(outputs):
    assert outputs[1] == [0, 1, 1, 1, 0]


def test_the_shipped_policy_is_right_more_often(outputs):
    shares = [int(number) for number in re.findall(r": (\d+) % of 64 images are exactly right", outputs[0][2])]
    assert len(shares) == 2 and shares[1] > shares[0] + 20


def test_a_few_updates_of_ppo_raise_the_reward(outputs):
    rewards = [float(number) for number in re.findall(r": reward ([\d.]+), exactly right", outputs[0][4])]
    assert len(rewards) == 2 and rewards[1] > rewards[0] + 0.03


def test_it_is_small():
    assert FILE.stat().st_size < 200_000
