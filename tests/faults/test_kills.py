"""Kills at random moments: what a resumed command leaves equals what an uninterrupted one does, byte by byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kills import NAMES

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("NOISEAR_KILLS", 20))  # per command


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_kills(name, tmp_path):
    command = [sys.executable, "-m", "tests.faults.kills", name, str(KILLS), str(tmp_path)]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\nkills, {name}: {found['kills']} in {found['trials']} runs, different {len(found['different'])}")
    assert found["different"] == [] and found["kills"] == KILLS
