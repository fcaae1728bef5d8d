"""noisear serve-reward: what it scores, and the bodies that it refuses."""

import contextlib
import json
import socket

import pytest
import torch
import urllib3
from safetensors.torch import save

from noisear_rl import cli
from noisear_rl.rewards import load_reward
from noisear_rl.rewards.http import png
from noisear_rl.rewards.server import ServeConfig, make_app
from tests.servers import JSON, LOOPBACK, SAFETENSORS, body_of, encoded, gray, post, serving


def with_image(text):
    return json.dumps({"images": [text], "prompts": ["a"]}).encode()


@pytest.fixture(scope="module")
def address():
    """A server of two scorers."""
    with serving(load_reward({"brightness": 2.0, "jpeg-compressibility": 0.5}), max_images=8, max_side=64) as url:
        yield url


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


def test_running_statistics_are_not_served():
    with pytest.raises(ValueError, match="running statistics"):
        make_app(load_reward("brightness", normalize="running"), ServeConfig())


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
