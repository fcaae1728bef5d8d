"""Several processes give what one gives, end together, and resume; started by torchrun, each says how many they are."""

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.distributed import Part, among, shard
from noisear_rl.learning.records import read_records
from tests.launching import ENVIRONMENT, ROOT, launch
from tests.training_runs import flat, parameters, prepare, trainings

NAMES = ("ppo-natural", "ppo-adam", "ppo-gae", "reinforce", "reinforce-running", "dpo", "dpo-aot", "reward-gradient")
SUPERVISED = ("nll", "nll-layouts", "npnet", "critic")
QUICK = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


def train_together(count, data, folder, updates, *names, check=True):
    return launch(count, "tests/training_runs.py", data, folder, str(updates), *names, check=check)


def assert_close(whole, folder, name, count, tolerance=1e-5):
    """All processes have the same parameters, which are those of a single process up to rounding."""
    expected, *found = [flat(load_file(parameters(folder, name, rank))) for rank in range(count)]
    assert all(torch.equal(expected, other) for other in found)
    error = (expected - flat(whole.state_dict())).norm() / expected.norm()
    assert error < tolerance, f"{name}: {error:.1e}"


def compare(data, tmp_path, updates, names, count=2, tolerance=1e-5):
    train_together(count, data, tmp_path / "many", updates, *names)
    for rank in range(count):
        assert json.loads((tmp_path / f"many/process-{rank}.json").read_text()) == {"processes": count}
    for name in names:
        whole = trainings(data, updates)[name](tmp_path / "one" / name)
        assert_close(whole, tmp_path / "many", name, count, tolerance)
        one, many = (read_records(tmp_path / folder / name) for folder in ("one", "many"))
        assert len(one) == len(many) > 0  # the main process alone writes
        starts = json.loads((tmp_path / "many" / name / "provenance.json").read_text())
        assert [start["processes"] for start in starts] == [count]
        for a, b in zip(one, many, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"charts/SPS"}:
                assert b[key] == pytest.approx(a[key], rel=1e-2, abs=1e-3), (name, key)


def test_two_processes_train_as_one(data, tmp_path):
    """A few updates of every algorithm, in one launch."""
    compare(data, tmp_path, QUICK, NAMES + SUPERVISED)


@pytest.mark.slow
def test_two_processes_train_as_one_for_long(data, tmp_path):
    compare(data, tmp_path / "20", 20, [name for name in NAMES if name != "ppo-gae"])
    compare(data, tmp_path / "critic", 20, ["ppo-gae"], tolerance=1e-4)  # whose critic takes eight Adam steps each time
    compare(data, tmp_path / "50", 50, SUPERVISED)


@pytest.mark.slow
def test_three_processes_train_as_one(data, tmp_path):
    compare(data, tmp_path, QUICK, NAMES + SUPERVISED, count=3)


@pytest.mark.parametrize("name", [name for name in NAMES + SUPERVISED if name != "dpo-aot"])
def test_micro_batches_train_as_one_batch(data, tmp_path, name):
    whole = trainings(data, QUICK)[name](tmp_path / "one")
    split = trainings(data, QUICK)[name](tmp_path / "many", micro_batches=4)
    a, b = flat(whole.state_dict()), flat(split.state_dict())
    assert (a - b).norm() / a.norm() < 1e-5
    assert not torch.equal(a, b) or name == "reward-gradient"  # it did split: rounding differs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-natural", "reinforce-running", "dpo", "reward-gradient", "nll", "npnet"])
def test_killed_and_resumed_by_two_or_one(data, tmp_path, name):
    """The main process is killed at its first checkpoint, which ends the other one; then two go on, or one."""
    train_together(2, data, tmp_path / "whole", 8, name)
    for count in (2, 1):
        folder = tmp_path / str(count)
        done = train_together(2, data, folder, 8, "KILL", name, check=False)
        (checkpoint,) = list_checkpoints(folder / name)
        assert done.returncode and "Signal 9 (SIGKILL)" in done.stderr and time.time() - checkpoint.stat().st_mtime < 60
        assert not parameters(folder, name, 0).exists() and not parameters(folder, name, 1).exists()
        train_together(count, data, folder, 8, f"{name}:resume=true")
        found = load_file(parameters(folder, name))
        expected = load_file(parameters(tmp_path / "whole", name))
        if count == 2:
            assert torch.equal(flat(found), flat(expected))
        else:
            assert (flat(found) - flat(expected)).norm() / flat(expected).norm() < 1e-5
        steps = [record["step"] for record in read_records(folder / name)]
        assert steps == [record["step"] for record in read_records(tmp_path / "whole" / name)]


DYING = """
import os, signal, sys, time
from noisear_rl import heartbeat
heartbeat.BEAT, heartbeat.SILENCE = 0.2, float(sys.argv[2])
from noisear_rl.distributed import barrier, process
state = process()
barrier()
if state.process_index == 1:
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit()
time.sleep(float(sys.argv[3]))
print("done")
"""


def started_by_hand(how, silence, work):
    """Two processes that no launcher watches, as on two machines; what became of the first one when the second left."""
    processes = []
    port = str(free_port())
    for rank in ("0", "1"):
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = ENVIRONMENT | given | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", DYING, how, str(silence), str(work)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
    outputs = [process.communicate() for process in processes]
    return processes[0].returncode, *outputs[0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_process_that_dies_ends_the_others():
    code, out, errors = started_by_hand("killed", 3, 300)
    assert code == 1 and not out and "process 0 ends: no sign of life of [1] for 3 s" in errors


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_a_minute():
    began = time.monotonic()
    code, out, _ = started_by_hand("killed", 40, 300)
    assert code == 1 and not out and time.monotonic() - began < 60


@pytest.mark.slow
def test_a_process_that_is_done_does_not():
    code, out, errors = started_by_hand("done", 20, 30)
    assert (code, out) == (0, "done\n"), errors


def test_launched_processes_that_do_not_meet_are_refused():
    """As MPI starts them without telling where to meet."""
    code = "from noisear_rl.distributed import process; process()"
    environment = ENVIRONMENT | {"OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "ValueError" in done.stderr


def test_accelerates_own_launch_on_a_cpu_is_refused():
    """It sets the address to meet at, and then starts a single process."""
    given = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-c", "from noisear_rl.distributed import process; process()"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | given, capture_output=True, text=True)
    assert done.returncode and "asks for several processes, but starts one: use `torchrun`" in done.stderr


def test_a_command_for_one_process_refuses_more():
    command = [sys.executable, "-m", "noisear_rl.cli", "demo"]
    environment = ENVIRONMENT | {"WORLD_SIZE": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "noisear demo runs in one process" in done.stderr


def test_parts_of_a_batch():
    whole = shard(5)
    assert whole.rows.tolist() == whole.places.tolist() == [0, 1, 2, 3, 4] and whole.weight == 1
    held = np.array([3, 4, 7])  # this process has the rows 3, 4 and 7 of all
    part = among(np.array([7, 0, 4, 9]), held)
    assert (part.rows.tolist(), part.places.tolist(), part.weight) == ([2, 1], [0, 2], 0.5)
    assert part.take(torch.tensor([7.0, 0.0, 4.0, 9.0])).tolist() == [7.0, 4.0]
    micro = list(part.local().split(2))
    assert [(p.rows.tolist(), p.places.tolist(), p.weight) for p in micro] == [([0], [0], 0.25), ([1], [2], 0.25)]


def test_a_process_without_rows_takes_a_stand_in_of_no_weight():
    part = among(np.array([0, 1]), np.array([3, 4]))
    assert (part.rows.tolist(), part.places.tolist(), part.weight) == ([0], [], 0.0)
    assert part.take(torch.ones(2, 3)).tolist() == [[0.0] * 3]
    assert part.gather(torch.ones(1, 3)).shape == (0, 3)
    assert [p.weight for p in part.split(2)] == [0.0, 0.0]
    assert Part(np.arange(1), np.arange(0), 4).mean(torch.tensor(7.0)) == 0


def test_fewer_rows_than_processes(monkeypatch):
    monkeypatch.setattr("noisear_rl.distributed.num_processes", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    assert (shard(2).rows.tolist(), shard(2).weight) == ([0], 0.0)
    with pytest.raises(ValueError, match="2 episodes per update are too few for 3 processes"):
        shard(2, "episodes per update")
