"""A vision-language judge against a small server of the API, whose answers depend on image and question."""

import base64
import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from noisear_rl.config import load_yaml
from noisear_rl.rewards import RewardConfig, load_reward
from noisear_rl.rewards.http import ServerError
from noisear_rl.rewards.vlm import VQASCORE, VLMJudge
from noisear_rl.trust import UntrustedCodeError, trusting
from tests.servers import answering, gray

ROOT = Path(__file__).parents[2]


class Model:
    """Says yes with the image's gray level as probability, split over spellings of it, and no with half of the rest.

    A question with "not" swaps yes and no.
    """

    def __init__(self):
        self.asked, self.keys = [], []

    def __call__(self, path, headers, body):
        asked = json.loads(body)
        assert path == "/v1/chat/completions" and asked["model"] == "tiny" and asked["max_tokens"] == 1
        assert asked["logprobs"] is True and asked["temperature"] == 0 and asked["top_logprobs"] >= 10
        (message,) = asked["messages"]
        picture, text = message["content"]
        start, _, code = picture["image_url"]["url"].partition(",")
        assert start == "data:image/png;base64" and message["role"] == "user" and text["type"] == "text"
        level = Image.open(io.BytesIO(base64.b64decode(code))).getpixel((0, 0))[0] / 255
        self.asked.append(text["text"])
        self.keys.append(headers.get("Authorization"))
        yes, no = (level, (1 - level) / 2) if "not" not in text["text"] else ((1 - level) / 2, level)
        tokens = {"Yes": 0.7 * yes, " yes": 0.2 * yes, "YES": 0.1 * yes, "No": no, "Yesterday": 0.01, "The": 0.1}
        told = [{"token": token, "logprob": math.log(max(p, 1e-30))} for token, p in tokens.items()]
        first = told[list(tokens.values()).index(max(tokens.values()))]
        return 200, json.dumps({"choices": [{"logprobs": {"content": [first | {"top_logprobs": told}]}}]}).encode(), 0


LEVELS = (25, 102, 229)
PROMPTS = ["a hen", "a fox", "two hens"]


def test_the_score_is_the_probability_of_yes():
    model = Model()
    with answering(model) as url:
        judge = VLMJudge(f"{url}/v1", "judge", model="tiny", concurrency=1)
        scores = judge.score(gray(*LEVELS), PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(LEVELS) / 255, rtol=0, atol=1e-6)
    assert model.asked == [f'Does this figure show "{prompt}"? Please answer Yes or No.' for prompt in PROMPTS]
    assert model.keys == [None] * 3


def test_relative_to_yes_and_no():
    with answering(Model()) as url:
        scores = VLMJudge(f"{url}/v1/", model="tiny", relative=True).score(gray(*LEVELS), PROMPTS)
    p = torch.tensor(LEVELS) / 255
    torch.testing.assert_close(scores, p / (p + (1 - p) / 2), rtol=0, atol=1e-6)


def test_several_questions_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    file, model = tmp_path / "judge.yaml", Model()
    with answering(model) as url:
        file.write_text(
            "weights: {judge: 2.0}\noptions:\n  judge:\n    api: openai\n"
            f"    url: {url}/v1\n    model: tiny\n    concurrency: 1\n    key: MY_KEY\n"
            "    questions: ['Is it {prompt}?', 'Is it not {prompt}? {other}']\n"
        )
        with pytest.raises(UntrustedCodeError, match="wants the environment variable 'MY_KEY' to be sent"):
            load_reward(str(file))
        with trusting(True):
            scores = load_reward(str(file)).score(gray(*LEVELS), PROMPTS)
    p = torch.tensor(LEVELS) / 255
    torch.testing.assert_close(scores, 2 * (p + (1 - p) / 2) / 2, rtol=0, atol=1e-6)
    assert model.asked[:2] == ["Is it a hen?", "Is it not a hen? {other}"] and set(model.keys) == {"Bearer secret"}


def test_an_image_is_asked_about_once():
    model = Model()
    with answering(model) as url:
        judge = VLMJudge(f"{url}/v1", model="tiny", concurrency=1)
        first = judge.score(gray(*LEVELS), PROMPTS)
        assert torch.equal(judge.score(gray(*reversed(LEVELS)), PROMPTS[::-1]), first.flip(0)) and len(model.asked) == 3
        judge.score(gray(LEVELS[0]), ["a fox"])  # another question on the same image
        judge.score(gray(LEVELS[0] + 1), ["a hen"])  # another image
        assert len(model.asked) == 5


def written(texts):
    """A server whose answers are these texts, one after the other, and what it was asked."""
    asked = []

    def respond(path, headers, body):
        asked.append(json.loads(body))
        return 200, json.dumps({"choices": [{"message": {"content": texts.pop(0)}}]}).encode(), 0

    return respond, asked


def preset(name, url):
    """A preset's judge with the server's address; the number of its scorers is one."""
    config = load_yaml(RewardConfig, ROOT / f"configs/rewards/{name}.yaml")
    ((scorer, options),) = config.options.items()
    return load_reward(config, options={scorer: options | {"url": f"{url}/v1", "concurrency": 1}}).rewards[0][0]


def test_unified_reward_reads_its_final_score():
    respond, asked = written(["hen (animal): 1\nFinal Score: 3.62\n", "Final Score: 4, no: Final Score:  2.5"])
    with answering(respond) as url:
        judge = preset("unified_reward", url)
        assert judge.score(gray(1, 2), ["a hen", "two hens"]).tolist() == pytest.approx([3.62, 2.5])
    (content,) = (message["content"] for message in asked[0]["messages"])
    assert content[1]["text"].endswith("\nYour task is provided as follows:\nText Caption: [a hen]")
    assert "  " not in content[1]["text"] and "evaluate this image based" in content[1]["text"]
    assert asked[0]["max_tokens"] == 2048 and asked[0]["temperature"] == 0 and "logprobs" not in asked[0]
    assert judge.name == "unified-reward" and asked[0]["model"] == "UnifiedReward"


def test_unified_reward_2_is_the_mean_of_three_scores():
    full = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3.0\nStyle Score (1-5): 4.25"
    respond, asked = written([full, full.partition("Style")[0], "I cannot say."])
    with answering(respond) as url:
        judge = preset("unified_reward_2", url)
        assert judge.score(gray(1), ["a hen"]).tolist() == [3.25]
        with pytest.warns(UserWarning, match=r"no number behind \['Style Score"):
            assert judge.score(gray(2, 3), ["a hen"] * 2).isnan().all()  # never 0
    text = asked[0]["messages"][0]["content"][1]["text"]
    assert text.count("\n") == 13 and "Style Score (1-5): Z\n\nYour task is" in text and "  " not in text


def test_the_preset_of_vqascore():
    with answering(lambda *request: (200, json.dumps(first_token(Yes=math.log(0.25))).encode(), 0)) as url:
        assert preset("vqascore", url).score(gray(1), ["a hen"]).tolist() == pytest.approx([0.25])


def first_token(**alternatives):
    told = [{"token": token, "logprob": value} for token, value in alternatives.items()]
    return {"choices": [{"logprobs": {"content": [told[0] | {"top_logprobs": told}]}}]}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"message": {"content": "Yes"}, "logprobs": None}]},
        {"choices": []},
        {"error": "no such model"},
        ["Yes"],
        first_token(The=-0.1, A=-3.0),
        first_token(Yes="high"),
        first_token(Yes=float("nan")),
    ],
)
def test_an_answer_without_yes_or_no_is_no_score(answer):
    """Never 0."""
    contents = [first_token(Yes=0.0, No=-9.0), answer]
    with answering(lambda *request: (200, json.dumps(contents.pop(0)).encode(), 0)) as url:
        judge = VLMJudge(f"{url}/v1", "judge", model="tiny", retries=0)
        assert judge.score(gray(1), ["a hen"]).tolist() == [1]
        with pytest.warns(UserWarning, match="scorer 'judge': 1 images get no score"):
            assert judge.score(gray(2), ["a hen"]).isnan().all()


def test_an_unlikely_yes_is_a_low_score():
    with answering(lambda *request: (200, json.dumps(first_token(No=-0.01, The=-5.0)).encode(), 0)) as url:
        assert VLMJudge(f"{url}/v1", model="tiny").score(gray(1), ["a hen"]).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "model"),
        ({"model": "tiny", "questions": []}, "at least one question"),
        ({"model": "tiny", "questions": [" "]}, "at least one question"),
        ({"model": "tiny", "relative": "yes"}, "relative true or false"),
        ({"model": "tiny", "numbers": [" "]}, "expected labels as numbers"),
        ({"model": "tiny", "numbers": "Score:", "relative": True}, "without relative"),
        ({"model": "tiny", "numbers": "Score:", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"model": "tiny", "key": "NO_SUCH_VARIABLE"}, "'NO_SUCH_VARIABLE' is not set"),
        ({"model": "tiny", "batch_size": 4}, "leave out batch_size"),
        ({"model": "tiny", "api": "other"}, "unknown api 'other'"),
    ],
)
def test_wrong_options(options, problem):
    with pytest.raises(ValueError, match=problem):
        load_reward({"judge": 1.0}, options={"judge": {"api": "openai", "url": "http://127.0.0.1:1/v1"} | options})


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/v1/chat/completions"):
        VLMJudge("http://127.0.0.1:9/v1", model="tiny", retries=0).score(gray(1), ["a hen"])
    assert "{prompt}" in VQASCORE
