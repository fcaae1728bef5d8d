"""Signals, kills, full disks, read-only and missing folders, and two runs in one folder."""

import contextlib
import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noisear_rl.algos.reinforce import ReinforceConfig, train
from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.integrity import InUseError, verify
from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import Run
from noisear_rl.policy import NoiseARConfig
from tests import toys
from tests.faults.test_damage import resume, write_run
from tests.learning.test_run import Options
from tests.resuming import assert_same_run

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Misfortune(toys.Target):
    """A reward in whose ``at``-th update something happens."""

    name = "target"

    def __init__(self, happens, at):
        self.happens, self.at, self.updates = happens, at, 0

    def score(self, images, prompts):
        self.updates += 1
        if self.updates == self.at:
            self.happens()
        return super().score(images, prompts)


def config(folder, happens=lambda: None, at=0, **options):
    policy = NoiseARConfig(d_model=32, d_ff=32, n_heads=2, n_layers=1, log_variance="fixed")
    defaults = {"updates": 6, "save_every": 2, "prompts_per_update": 2, "samples_per_prompt": 4, "optimizer": "adam"}
    return ReinforceConfig(
        env_id=toys.register(Misfortune(happens, at)), output_dir=folder, policy=policy, **(defaults | options)
    )


def steps(folder):
    """Steps of the checkpoints, which are all whole; nothing else lies beside them."""
    for checkpoint in list_checkpoints(folder):
        verify(checkpoint)
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return train(config(folder)), folder


def assert_resumes_exactly(whole, folder):
    resumed = train(config(folder, resume=True))
    assert_same_run(whole[0], resumed, whole[1], folder)
    assert [record["step"] for record in read_records(folder)] == [1, 2, 3, 4, 5, 6]


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops(number, whole, tmp_path, capsys):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit, match=r"saved update 3\. Resume with: .* --resume$") as stop:
        train(config(tmp_path, lambda: send(number), at=3))
    assert stop.value.code == 0 and steps(tmp_path) == [2, 3]
    assert f"{number.name}: stopping after this update, in 120 s at most" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert_resumes_exactly(whole, tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_stops_at_once(number, whole, tmp_path):
    with pytest.raises(SystemExit, match=r"stopped at once; the checkpoints so far are whole\. Resume with") as stop:
        train(config(tmp_path, lambda: send(number, number), at=4))
    assert stop.value.code == 128 + number and steps(tmp_path) == [2]
    assert_resumes_exactly(whole, tmp_path)


def test_a_signal_before_an_update_is_done(tmp_path):
    with pytest.raises(SystemExit, match="stopped before an update was done") as stop:
        train(config(tmp_path, lambda: send(signal.SIGTERM), at=1))
    assert stop.value.code == 0 and steps(tmp_path) == []


def test_an_update_that_takes_too_long(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("NOISEAR_GRACE", "0.2")

    def hang():
        send(signal.SIGTERM)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(SystemExit, match=r"the update took too long .*whole\. Resume with") as stop:
        train(config(tmp_path, hang, at=4))
    assert stop.value.code == 0 and steps(tmp_path) == [2] and time.monotonic() - began < 50
    monkeypatch.delenv("NOISEAR_GRACE")
    assert_resumes_exactly(whole, tmp_path)


def test_a_run_that_failed_keeps_no_signals(tmp_path):
    """After an error in a notebook, Ctrl-C is Ctrl-C again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        Run(tmp_path, Options())  # never closed
        gc.collect()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def small_files():
    """Files cannot grow beyond 40 kB, as if the disk were full; a checkpoint's weights are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def another_user():
    """The process may not write to its folders any more."""
    if os.geteuid():
        pytest.skip("needs root")
    try:
        yield lambda: os.seteuid(65534)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("trouble", "message"), [(small_files, "cannot be written|File too large"), (another_user, "denied")]
)
def test_trouble_with_the_disk(trouble, message, whole, tmp_path):
    """One error, earlier checkpoints whole, and the run goes on once there is room."""
    with trouble() as begin, pytest.raises(OSError, match=message) as caught:
        train(config(tmp_path, begin, at=4))
    assert str(tmp_path) in f"{caught.value} {caught.value.filename}"
    assert steps(tmp_path) == [2]
    assert_resumes_exactly(whole, tmp_path)
    assert not list(tmp_path.rglob("*.tmp")) and not list((tmp_path / "checkpoints").glob(".*"))


def test_the_folder_is_removed(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError) as caught:
        train(config(folder, lambda: shutil.rmtree(folder), at=3))
    assert caught.value.errno == errno.ENOENT and str(folder) in str(caught.value.filename)


HOLD = """
import sys
from pathlib import Path
from noisear_rl.integrity import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print(1, flush=True)
input()
"""


def test_two_runs_in_one_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(InUseError, match=rf"{tmp_path} is in use: another process writes to it"):
            Run(tmp_path, Options())
        assert not (tmp_path / "config.yaml").exists()
    finally:
        holder.kill()
        holder.wait()
    run = Run(tmp_path, Options())  # a dead process holds nothing
    run.close()


def test_killed_between_two_renames(tmp_path, monkeypatch):
    """A checkpoint that is written again is put back if the process dies before the new one is in place."""
    policies = write_run(tmp_path, (1, 2))
    rename, calls = Path.rename, []

    def killed(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    policy, optimizer, counters = resume(tmp_path)
    run = Run(tmp_path, Options(), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run.save(policy, counters, optimizer=optimizer)
    run.close()
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert resume(tmp_path)[2].step == 2 and steps(tmp_path) == [1, 2]
    assert len(policies) == 2 and not list((tmp_path / "checkpoints").glob(".*"))


def test_records_of_killed_runs_are_kept_once(tmp_path):
    """Records without a checkpoint, and a torn line, are dropped; TensorBoard shows every step once, too."""
    write_run(tmp_path, (1, 2))
    killed = Run(tmp_path, Options(), resume=True)
    for step in (3, 4):
        killed.log({"charts/episodic_return": 9.0}, step)
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "charts/epi')
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]
    assert resume(tmp_path)[2].step == 2
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    again = Run(tmp_path, Options(), resume=True)
    for step in (3, 4):
        again.log({"charts/episodic_return": 5.0}, step)
    again.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]
    shown = EventAccumulator(str(tmp_path / "tensorboard/noisear-rl")).Reload().Scalars("charts/episodic_return")
    assert [(event.step, event.value) for event in shown] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 5.0)]


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    options = config(tmp_path, updates=6, save_every=1, keep_checkpoints=2)
    train(options)
    rewards = [record["charts/episodic_return"] for record in read_records(tmp_path)]
    means = {step: sum(rewards[:step]) / step for step in range(1, 7)}
    kept = steps(tmp_path)
    assert kept[-2:] == [5, 6] and len(kept) <= 3
    assert means[kept[0]] >= max(means[5], means[6])
    train(replace(options, env_id=toys.register(Misfortune(lambda: None, 0)), updates=8, resume=True))
    assert steps(tmp_path)[-2:] == [7, 8]
