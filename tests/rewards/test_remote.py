"""Rewards over HTTP: real servers on this machine, requests that fail, bad bodies, addresses in files."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import urllib3
import uvicorn
from safetensors.torch import save

from noisear_rl import cli
from noisear_rl.algos import reinforce
from noisear_rl.learning.records import read_records
from noisear_rl.rewards import RewardConfig, WeightedReward, check_reward, load_reward
from noisear_rl.rewards.http import ServerError, png
from noisear_rl.rewards.registry import FunctionReward
from noisear_rl.rewards.remote import RemoteReward
from noisear_rl.rewards.server import ServeConfig, make_app
from noisear_rl.trust import UntrustedCodeError, trusting
from tests import toys
from tests.servers import LOOPBACK, answering, encoded, gray
from tests.training_runs import SMALL

JSON, SAFETENSORS = "application/json", "application/x-safetensors"


@contextlib.contextmanager
def serving(reward, **options):
    """A server in a thread; yields its address."""
    app = make_app(reward, ServeConfig(**options))
    listening = socket.create_server((LOOPBACK, 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def with_image(text):
    return json.dumps({"images": [text], "prompts": ["a"]}).encode()


def body_of(images, prompts, **changes):
    texts = [encoded(png(image)) for image in images]
    return json.dumps({"images": texts, "prompts": prompts} | changes).encode()


def post(url, body, content_type=JSON, **headers):
    response = urllib3.request("POST", url, body=body, headers={"Content-Type": content_type, **headers}, timeout=30)
    return response.status, json.loads(response.data) if response.data[:1] == b"{" else response.data


@pytest.fixture(scope="module")
def address():
    """A server of two scorers."""
    with serving(load_reward({"brightness": 2.0, "jpeg-compressibility": 0.5}), max_images=8, max_side=64) as url:
        yield url


@pytest.mark.parametrize("body", ["png", "safetensors"])
def test_scores_are_those_of_the_served_reward(address, body):
    images = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255 if body == "png" else images
    prompts, own = [f"prompt {i}" for i in range(5)], load_reward({"brightness": 2.0, "jpeg-compressibility": 0.5})
    remote = RemoteReward(address, body=body, batch_size=2, concurrency=3)
    torch.testing.assert_close(remote.score(images, prompts), own.score(images, prompts), rtol=0, atol=1e-6)
    assert remote.failures == 0 and remote.name == address.removeprefix("http://")
    assert remote.score(images[:0], []).shape == (0,)


def test_a_server_tells_every_scorer_and_names_them(address):
    status, answer = post(f"{address}/score", body_of(gray(0, 255), ["a", "b"]))
    assert status == 200 and answer["components"]["brightness"] == [0, 1]
    compressed = answer["components"]["jpeg-compressibility"]
    assert answer["scores"] == pytest.approx([2 * b + 0.5 * c for b, c in zip([0, 1], compressed, strict=True)])
    health = json.loads(urllib3.request("GET", f"{address}/health").data)
    assert health == {"name": "brightness+jpeg-compressibility", "scorers": ["brightness", "jpeg-compressibility"]}


def test_images_of_several_sizes_and_modes_in_one_request(address):
    pictures = [gray(51, size=8)[0], gray(102, size=16)[0], gray(204, size=8)[0]]
    answer = post(f"{address}/score", body_of(pictures, ["a"] * 3))[1]
    assert answer["components"]["brightness"] == pytest.approx([0.2, 0.4, 0.8])


IMAGES = {"images": gray(0, 255)}
BAD = {
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "application/python-pickle", 415),
    "a pickle as JSON": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", JSON, 400),
    "a pickle as safetensors": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", SAFETENSORS, 400),
    "a pickle as an image": (with_image(encoded(b"\x80\x04}\x94.")), JSON, 400),
    "nothing": (b"", JSON, 400),
    "deep": (b"[" * 100_000, JSON, 400),
    "a path": (with_image("/etc/hostname"), JSON, 400),
    "an address": (with_image("file:///etc/hostname"), JSON, 400),
    "a GIF": (
        with_image(encoded(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")),
        JSON,
        400,
    ),
    "half a PNG": (with_image(encoded(png(gray(9)[0])[:40])), JSON, 400),
    "too wide": (body_of(gray(9, size=65), ["a"]), JSON, 400),
    "too many": (body_of(gray(*range(9)), ["a"] * 9), JSON, 400),
    "no prompt": (body_of(gray(9), []), JSON, 400),
    "an empty prompt": (body_of(gray(9), [" "]), JSON, 400),
    "a long prompt": (body_of(gray(9), ["a" * 10_001]), JSON, 400),
    "a number": (body_of(gray(9), [7]), JSON, 400),
    "another key": (body_of(gray(9), ["a"], code="import os"), JSON, 400),
    "two dimensions": (save({"images": torch.zeros(3, 8)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
    "one channel": (save({"images": torch.zeros(1, 1, 8, 8)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
    "integers": (save({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
    "another range": (save({"images": torch.full((1, 3, 8, 8), 255.0)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
    "no images": (save({"images": torch.zeros(0, 3, 8, 8)}, {"prompts": "[]"}), SAFETENSORS, 400),
    "no pixels": (save({"images": torch.zeros(1, 3, 0, 8)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
    "no metadata": (save(IMAGES), SAFETENSORS, 400),
    "prompts that are no list": (save(IMAGES, {"prompts": '"ab"'}), SAFETENSORS, 400),
    "another tensor": (save({"images": gray(9), "more": gray(9)}, {"prompts": '["a"]'}), SAFETENSORS, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused(address, name):
    body, content_type, status = BAD[name]
    found, answer = post(f"{address}/score", body, content_type)
    assert found == status and answer["error"] and len(answer["error"]) < 600
    assert post(f"{address}/score", body_of(gray(51), ["a"]))[0] == 200  # and the server goes on


def test_large_bodies_are_refused_before_they_are_read_whole(address):
    assert post(f"{address}/score", b" " * (100 * 2**20))[0] == 413
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # a length that is only declared
        head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: {JSON}\r\nContent-Length: {2**40}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(200)
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # and in chunks without any length
        head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: {JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(65):
                connection.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        assert b" 413 " in connection.recv(200)


def test_a_body_that_does_not_arrive_is_given_up():
    with serving(load_reward("brightness"), body_timeout=0.2) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: {JSON}\r\nContent-Length: 10\r\n\r\n{{"
            connection.sendall(head.encode())
            assert b" 408 " in connection.recv(200)


def test_another_name_of_this_machine_is_refused(address):
    """As a web page would use that resolves its own name to loopback."""
    assert post(f"{address}/score", body_of(gray(9), ["a"]), Host="evil.example")[0] == 400


def test_a_scorer_that_fails_answers_500_and_goes_on():
    def fails(images, prompts):
        return [1.0 / (prompt != "fail") for prompt in prompts]

    with serving(WeightedReward([(FunctionReward("fails", fails), 1.0)])) as url:
        status, answer = post(f"{url}/score", body_of(gray(9), ["fail"]))
        assert status == 500 and "ZeroDivisionError" in answer["error"]
        assert post(f"{url}/score", body_of(gray(9), ["a"]))[1]["scores"] == [1.0]
        remote = RemoteReward(url, "judge", batch_size=1, retries=0)
        with pytest.warns(UserWarning, match=r"scorer 'judge': 1 images get no score: .*500.*ZeroDivisionError"):
            scores = remote.score(gray(1, 2, 3), ["a", "fail", "b"])
        assert scores.isnan().tolist() == [False, True, False] and remote.failures == 1


def test_a_score_that_is_nan_stays_nan():
    def some(images, prompts):
        return [float(prompt) for prompt in prompts]

    with serving(WeightedReward([(FunctionReward("some", some), 1.0)])) as url:
        scores = RemoteReward(url).score(gray(1, 2, 3, 4), ["nan", "0", "inf", "-2"])
    assert scores.isnan().tolist() == [True, False, True, False] and scores[[1, 3]].tolist() == [0, -2]


def test_running_statistics_are_not_served():
    with pytest.raises(ValueError, match="running statistics"):
        make_app(load_reward("brightness", normalize="running"), ServeConfig())


WRONG = {
    "too few": b'{"scores": [1]}',
    "too many": b'{"scores": [1, 2, 3]}',
    "text": b'{"scores": ["1", "2"]}',
    "truth values": b'{"scores": [true, false]}',
    "no list": b'{"scores": 1}',
    "no object": b"[1, 2]",
    "no JSON": b"<html>",
    "a pickle": b"\x80\x04]\x94(K\x01K\x02e.",
    "too much": b'{"scores": [1, 2], "more": "' + b" " * (17 * 2**20) + b'"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_none_gives_no_score(name):
    answers = [b'{"scores": [1, 2]}', WRONG[name]]
    with answering(lambda *request: (200, answers.pop(0), 0)) as url:
        remote = RemoteReward(url, "judge", retries=0)
        assert remote.score(gray(1, 2), ["a", "b"]).tolist() == [1, 2]
        with pytest.warns(UserWarning, match="scorer 'judge': 2 images get no score"):
            assert remote.score(gray(1, 2), ["a", "b"]).isnan().all()
    assert remote.failures == 2


def test_requests_are_repeated_while_a_failure_may_pass():
    tried = []

    def respond(path, headers, body):
        tried.append(json.loads(body)["prompts"])
        return (200, b'{"scores": [0.5]}', 0) if len(tried) > 2 else (503, b"busy", 0)

    with answering(respond) as url:
        assert RemoteReward(url, retries=2).score(gray(1), ["a"]).tolist() == [0.5]
        assert tried == [["a"]] * 3
        tried.clear()
        with pytest.raises(ServerError, match="answered 503: busy"):
            RemoteReward(url, retries=1).score(gray(1), ["a"])
        assert len(tried) == 2


def test_a_request_that_was_wrong_is_not_repeated_nor_redirected():
    tried = []

    def respond(path, headers, body):
        tried.append(path)
        return (404, b"not here", 0) if path == "/score" else (307, b"http://127.0.0.1:9/elsewhere", 0)

    with answering(respond) as url:
        with pytest.raises(ServerError, match="answered 404: not here"):
            RemoteReward(url, retries=5).score(gray(1), ["a"])
        with pytest.raises(ServerError, match="answered 307"):
            RemoteReward(f"{url}/moved", retries=5).score(gray(1), ["a"])
    assert tried == ["/score", "/moved"]


@pytest.mark.parametrize("slowly", [(b'{"scores": [1]}', 5), (b"", 0)])
def test_a_slow_answer_is_no_answer(slowly):
    """Late as a whole, or byte by byte."""
    content, pause = slowly
    with answering(lambda *request: (200 if content else 0, content, pause)) as url:
        remote = RemoteReward(url, "judge", timeout=0.3, retries=0)
        with pytest.raises(ServerError, match=r"no answer in 0\.3 seconds"):
            remote.score(gray(1), ["a"])


def test_requests_are_sent_at_the_same_time():
    """Every request waits for three others."""
    together = threading.Barrier(4)

    def respond(path, headers, body):
        together.wait(30)
        return 200, json.dumps({"scores": [float(prompt) for prompt in json.loads(body)["prompts"]]}).encode(), 0

    with answering(respond) as url:
        remote = RemoteReward(url, batch_size=2, concurrency=4)
        assert remote.score(gray(*range(8)), [str(i) for i in range(8)]).tolist() == list(range(8))


def test_required_scorers_and_servers_that_never_answered_are_errors():
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=rf"http://127\.0\.0\.1:{port}/score: .*refused"):
        RemoteReward(f"http://127.0.0.1:{port}", retries=0).score(gray(1), ["a"])
    answers = [(200, b'{"scores": [1]}', 0), (500, b"lost", 0)]
    with answering(lambda *request: answers.pop(0)) as url:
        remote = RemoteReward(url, required=True, retries=0)
        assert remote.score(gray(1), ["a"]).tolist() == [1]
        with pytest.raises(ServerError, match="answered 500: lost"):
            remote.score(gray(1), ["a"])


class Bounded(toys.NoDenoiser):
    """An identity denoiser with pixels in [0, 1]."""

    def denoise(self, noise, conditioning, seeds=None):
        return super().denoise(noise, conditioning).sigmoid()


def test_training_drops_and_counts_what_a_server_does_not_score(tmp_path):
    """Every other request of 8 episodes is lost."""
    count = [0]

    def respond(path, headers, body):
        count[0] += 1
        number = len(json.loads(body)["prompts"])
        return (500, b"lost", 0) if count[0] % 2 == 0 else (200, json.dumps({"scores": [1.0] * number}).encode(), 0)

    with answering(respond) as url:
        reward = RemoteReward(url, "judge", batch_size=8, concurrency=1, retries=0)
        config = reinforce.ReinforceConfig(
            toys.register(reward, denoiser=Bounded((1, 8, 4), 4)),
            output_dir=tmp_path,
            updates=2,
            prompts_per_update=2,
            samples_per_prompt=16,
            policy=SMALL,
        )
        with pytest.warns(UserWarning, match="get no score"):
            reinforce.train(config)
    assert [record["charts/dropped_episodes"] for record in read_records(tmp_path)] == [16, 16]
    assert [record["charts/episodic_return"] for record in read_records(tmp_path)] == [1, 1]
    assert reward.failures == 32


def test_rewards_name_servers(tmp_path):
    assert check_reward("http://127.0.0.1:8000") == "http://127.0.0.1:8000"
    assert check_reward("https://models.python.org:8000/v1/score.py").startswith("https")  # no file
    alone = load_reward("http://127.0.0.1:8000/mine").rewards[0][0]
    assert (alone.url, alone.name) == ("http://127.0.0.1:8000/mine", "127.0.0.1:8000")
    file = tmp_path / "reward.yaml"
    file.write_text(
        "weights: {brightness: 1.0, taste: 0.5}\noptions:\n  taste: {url: 'http://127.0.0.1:8001', required: true, "
        "timeout: 5, retries: 1, batch_size: 4}\n"
    )
    assert check_reward(str(file)) == str(file)
    taste = load_reward(str(file), device="cpu").rewards[1][0]
    assert (taste.url, taste.name, taste.required) == ("http://127.0.0.1:8001/score", "taste", True)
    assert (taste.timeout, taste.retries, taste.batch_size) == (5, 1, 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": float("nan")}, "timeout must be a positive number"),
        ({"retries": -1}, "retries at least 0"),
        ({"batch_size": 0}, "batch_size and concurrency at least 1"),
        ({"concurrency": "many"}, "concurrency at least 1"),
        ({"required": "no"}, "true or false"),
        ({"body": "pickle"}, "expected one of .*png"),
        ({"tiemout": 5}, "tiemout"),
        ({"url": "ftp://127.0.0.1"}, "expected http://HOST:PORT"),
        ({"url": "http://"}, "expected http://HOST:PORT"),
        ({"url": "http://127.0.0.1:99999"}, "is no address"),
        ({"url": "http://127.0.0.1/a b"}, "expected http://HOST:PORT"),
        ({"url": "http://me:secret@127.0.0.1:8000"}, "holds a user, a password"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(options, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        load_reward(RewardConfig({"taste": 1.0}, options={"taste": {"url": "http://127.0.0.1:8000"} | options}))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("where", ["weights: {'URL': 1.0}", "weights: {taste: 1.0}\noptions: {taste: {url: 'URL'}}"])
def test_a_file_that_names_another_machine_is_refused_unless_trusted(where, tmp_path):
    file = tmp_path / "reward.yaml"
    for url in (
        "http://10.0.0.1:80",
        "http://example.org/score",
        "http://127.0.0.1.example.org",
        "http://[2001:db8::1]",
    ):
        file.write_text(where.replace("URL", url))
        with pytest.raises(UntrustedCodeError, match=r"reward\.yaml names a server that images .* would be sent to"):
            load_reward(str(file))
        with trusting(True):
            assert load_reward(str(file)).rewards[0][0].url.startswith(url)
        assert load_reward(url).rewards[0][0].url.startswith(url)  # on the command line
    for url in ("http://127.0.0.1:80", "http://localhost:80", "http://[::1]:80"):
        file.write_text(where.replace("URL", url))
        assert load_reward(str(file)).rewards[0][0].url.startswith(url)


SCORER = """
import pathlib, time
folder = pathlib.Path(__file__).parent

def score(images, prompts):
    if "stop" in prompts and not (folder / "open").exists():
        (folder / "stopped").touch()
        time.sleep(600)
    return images.mean((1, 2, 3))
"""


def test_two_hundred_requests_while_the_server_is_killed_and_restarted(tmp_path):
    """One request never ends in the first server. Requests with retries all find the second one, others may get NaN."""
    (tmp_path / "level.py").write_text(SCORER)
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "noisear_rl.cli", "serve-reward", str(tmp_path / "level.py"), "--port", str(port)]
    command += ["--device", "cpu"]

    def start():
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert server.stdout.readline() == f"serving level at http://127.0.0.1:{port}\n"
        return server

    levels = list(range(200))
    url, server = f"http://127.0.0.1:{port}", start()
    try:
        patient = RemoteReward(url, "patient", timeout=120, retries=200, concurrency=100)
        hasty = RemoteReward(url, "hasty", timeout=120, retries=0, concurrency=100)
        for remote in (patient, hasty):
            assert remote.score(gray(255), ["first"]).tolist() == [1]

        def ask(level):
            return (hasty if level % 2 else patient).score(gray(level), ["stop" if level == 101 else "go"]).item()

        with (
            pytest.warns(UserWarning, match="scorer 'hasty': 1 images get no score"),
            ThreadPoolExecutor(200) as threads,
        ):
            asked = [threads.submit(ask, level) for level in levels]
            while not (tmp_path / "stopped").exists():
                time.sleep(0.01)
            server.send_signal(signal.SIGKILL)
            server.wait()
            (tmp_path / "open").touch()
            server = start()
            scores = torch.tensor([answer.result(timeout=240) for answer in asked])
        lost = scores.isnan()
        torch.testing.assert_close(scores[~lost], torch.tensor(levels)[~lost] / 255, rtol=0, atol=1e-6)
        assert lost[101] and not lost[::2].any() and hasty.failures == lost.sum() and patient.failures == 0
        assert WeightedReward([(hasty, 1.0)]).score(gray(*levels[:16]), ["go"] * 16).isfinite().all()  # and goes on
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()


def test_the_command_refuses_what_it_cannot_serve(tmp_path, capsys):
    for arguments, problem in (
        ([], "expected a scorer or a reward file"),
        (["britghness"], "brightness"),
        (["brightness", "--port", "70000"], "port"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve-reward", *arguments])
        assert caught.value.code == 2 and problem in capsys.readouterr().err
    with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(SystemExit):
        cli.main(["serve-reward", "brightness", "--port", str(taken.getsockname()[1])])
    assert "in use" in capsys.readouterr().err
