"""Rewards over HTTP: real servers on this machine, requests that fail, addresses in files."""

import json
import socket
import threading

import pytest
import torch

from noisear_rl.algos import reinforce
from noisear_rl.learning.records import read_records
from noisear_rl.rewards import RewardConfig, WeightedReward, check_reward, load_reward
from noisear_rl.rewards.http import ServerError
from noisear_rl.rewards.registry import FunctionReward
from noisear_rl.rewards.remote import RemoteReward
from noisear_rl.trust import UntrustedCodeError, trusting
from tests import toys
from tests.servers import LOOPBACK, answering, body_of, gray, post, serving
from tests.training_runs import SMALL


@pytest.fixture(scope="module")
def address():
    """A server of two scorers."""
    with serving(load_reward({"brightness": 2.0, "jpeg-compressibility": 0.5})) as url:
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
            toys.register(reward, denoiser=toys.Bounded((1, 8, 4), 4)),
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
