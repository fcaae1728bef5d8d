"""A reward server in a process of its own, killed and restarted while requests and a training wait for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

from noisear_rl.algos import reinforce
from noisear_rl.learning.records import read_records
from noisear_rl.rewards.remote import RemoteReward
from tests import toys
from tests.servers import JSON, LOOPBACK, SAFETENSORS, body_of, gray, post
from tests.training_runs import SMALL

SCORER = """
import pathlib, time
folder = pathlib.Path(__file__).parent

def score(images, prompts):
    if "stop" in prompts and not (folder / "open").exists():
        (folder / "stopped").touch()
        time.sleep(600)
    return images.mean((1, 2, 3))
"""


class Interrupted:
    """Scores of ``remote`` for three updates; in the middle of the second one, ``kill`` ends its server.

    The third update begins with ``restart``. ``found`` holds all scores and the images' own means.
    """

    name = "interrupted"

    def __init__(self, remote, kill, restart):
        self.remote, self.kill, self.restart, self.found = remote, kill, restart, []

    def score(self, images, prompts):
        update, half = len(self.found) + 1, len(prompts) // 2
        if update == 3:
            self.restart()
        first = self.remote.score(images[:half], prompts[:half])
        if update == 2:
            self.kill()
        scores = torch.cat([first, self.remote.score(images[half:], prompts[half:])])
        self.found.append((scores, images.mean((1, 2, 3))))
        return scores


def test_two_hundred_requests_and_a_training_while_the_server_is_killed_and_restarted(tmp_path):
    """One request never ends in the first server. Requests with retries all find the second one, others may get NaN.

    The training loses half the episodes of its second update. Bad bodies do the second server no harm.
    """
    (tmp_path / "level.py").write_text(SCORER)
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "noisear_rl.cli", "serve-reward", str(tmp_path / "level.py"), "--port", str(port)]
    command += ["--device", "cpu"]
    servers, asked, url = [], [], f"http://127.0.0.1:{port}"

    def start():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        assert servers[-1].stdout.readline() == f"serving level at {url}\n"

    levels = list(range(200))
    try:
        start()
        patient = RemoteReward(url, "patient", timeout=120, retries=200, concurrency=100)
        hasty = RemoteReward(url, "hasty", timeout=120, retries=0, concurrency=100)
        for remote in (patient, hasty):
            assert remote.score(gray(255), ["first"]).tolist() == [1]

        def ask(level):
            return (hasty if level % 2 else patient).score(gray(level), ["stop" if level == 101 else "go"]).item()

        with ThreadPoolExecutor(200) as threads:

            def kill():
                asked.extend(threads.submit(ask, level) for level in levels)
                while not (tmp_path / "stopped").exists():
                    time.sleep(0.01)
                servers[0].send_signal(signal.SIGKILL)
                servers[0].wait()
                (tmp_path / "open").touch()

            trained = Interrupted(RemoteReward(url, "trained", retries=0, batch_size=4), kill, start)
            config = reinforce.ReinforceConfig(
                toys.register(trained, denoiser=toys.Bounded((1, 8, 4), 4)),
                output_dir=tmp_path / "run",
                updates=3,
                prompts_per_update=2,
                samples_per_prompt=8,
                policy=SMALL,
            )
            with pytest.warns(UserWarning, match="scorer '(hasty|trained)': . images get no score"):
                reinforce.train(config)
                scores = torch.tensor([answer.result(timeout=240) for answer in asked])
        lost = scores.isnan()
        torch.testing.assert_close(scores[~lost], torch.tensor(levels)[~lost] / 255, rtol=0, atol=1e-6)
        assert lost[101] and not lost[::2].any() and hasty.failures == lost.sum() and patient.failures == 0
        assert hasty.score(gray(*levels[:16]), ["go"] * 16).isfinite().all()  # and goes on

        assert [scores.isnan().tolist() for scores, _ in trained.found] == [
            [False] * 16,
            [False] * 8 + [True] * 8,
            [False] * 16,
        ]
        records = read_records(tmp_path / "run")
        assert [record["charts/dropped_episodes"] for record in records] == [0, 8, 0]
        for record, (given, means) in zip(records, trained.found, strict=True):
            kept = ~given.isnan()
            torch.testing.assert_close(given[kept], means[kept], rtol=0, atol=0.5 / 255)  # PNG rounds
            assert record["charts/episodic_return"] == pytest.approx(given[kept].mean().item(), abs=1e-6)

        pickled, path = b"\x80\x04}\x94.", json.dumps({"images": [str(tmp_path / "level.py")], "prompts": ["a"]})
        shape = save({"images": torch.zeros(1, 1, 8, 8)}, {"prompts": '["a"]'})
        for body, content_type, status in (
            (pickled, "application/octet-stream", 415),
            (pickled, JSON, 400),
            (b" " * (100 * 2**20), JSON, 413),
            (shape, SAFETENSORS, 400),
            (path.encode(), JSON, 400),
        ):
            assert post(f"{url}/score", body, content_type)[0] == status
        assert post(f"{url}/score", body_of(gray(255), ["a"]))[1]["scores"] == [1]
        servers[-1].send_signal(signal.SIGTERM)
        assert servers[-1].wait(60) in (0, -signal.SIGTERM)
    finally:
        for server in servers:
            server.kill()
