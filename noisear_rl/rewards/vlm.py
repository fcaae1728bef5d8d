"""A vision-language model as a judge, behind any server with OpenAI's API (vLLM, sglang, llama.cpp, a service).

VQAScore (Lin et al. 2024, arXiv 2404.01291): the probability that the model answers a question on the image with "Yes",

    score = P("Yes" | image, question),   question = 'Does this figure show "PROMPT"? Please answer Yes or No.'

read from the log-probabilities of the first answer token: the sum over the tokens that say yes in any case, with or
without a space. ``relative`` divides by the probability of yes and no together, so that other beginnings of an answer
do not matter. With several questions the score is the mean of their probabilities.

Models that write their judgement (UnifiedReward, Wang et al. 2025, arXiv 2503.05236) are asked with ``numbers``: the
score is then the mean of the numbers that the answer gives behind these labels, in the model's own range. Presets:
``configs/rewards/unified_reward.yaml`` and ``unified_reward_2.yaml``.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from noisear_rl.rewards.http import COUNTS, JSON, HTTPReward, ServerError, base64_text, png
from noisear_rl.trust import check_secret

VQASCORE = 'Does this figure show "{prompt}"? Please answer Yes or No.'
KEPT = 100_000  # answers
MOST_TOKENS = 20  # alternatives that servers tell, at most
NUMBER = r"[-+]?\d+(?:\.\d+)?"


class VLMJudge(HTTPReward):
    """The probability that a vision-language model answers yes; see the module docstring.

    Range: [0, 1]; with ``numbers``, the model's own.

    Every answer is kept under the hash of image and question, so that the same image is asked about once.

    Args:
        url: Address of the API, with its version: ``http://127.0.0.1:8000/v1``.
        name: Name in records.
        model: Name of the model at the server.
        questions: Question, or questions, on an image; ``{prompt}`` stands for its prompt.
        relative: Whether to divide by the probability of yes and no together.
        numbers: Label, or labels, of the numbers in a written answer, such as ``Final Score:``; the last number behind
            each counts. ``None`` for the probability of yes. An answer without one of them gives no score.
        max_tokens: Length of a written answer, at most.
        key: Environment variable with the service's key, such as ``OPENAI_API_KEY``; ``None`` for none.
        **options: See :class:`~noisear_rl.rewards.http.HTTPReward`; one request asks one question on one image.

    Raises:
        ValueError: If an option is invalid, or the variable is not set.
        UntrustedCodeError: If a file that is not trusted names a key.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        model: str,
        questions: str | Sequence[str] = VQASCORE,
        relative: bool = False,
        numbers: str | Sequence[str] | None = None,
        max_tokens: int = 2048,
        key: str | None = None,
        **options: Any,
    ) -> None:
        if options.get("batch_size", 1) != 1:
            raise ValueError(f"a request asks about one image: leave out batch_size, got {options['batch_size']!r}")
        super().__init__(url, name, **options | {"batch_size": 1})
        questions = [questions] if isinstance(questions, str) else list(questions)
        if not questions or any(not isinstance(question, str) or not question.strip() for question in questions):
            raise ValueError(f"scorer {self.name!r}: expected at least one question, got {questions!r:.200}")
        if not isinstance(model, str) or not model or not isinstance(relative, bool):
            raise ValueError(f"scorer {self.name!r}: expected a model and relative true or false, got {model!r:.80}")
        labels = [numbers] if isinstance(numbers, str) else list(numbers or ())
        if any(not isinstance(label, str) or not label.strip() for label in labels) or (relative and labels):
            raise ValueError(f"scorer {self.name!r}: expected labels as numbers, without relative, got {numbers!r:.80}")
        try:
            self.max_tokens = COUNTS.validate_python(max_tokens) if labels else 1
        except ValidationError as error:
            raise ValueError(f"scorer {self.name!r}: max_tokens must be at least 1, got {max_tokens!r:.80}") from error
        self.labels = labels
        self.url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.questions, self.relative = model, questions, relative
        self._headers: dict[str, str] = {}
        if key is not None:
            check_secret(key)
            if not os.environ.get(key):
                raise ValueError(f"scorer {self.name!r}: the environment variable {key!r:.80} is not set")
            self._headers = {"Authorization": f"Bearer {os.environ[key]}"}
        self._kept: OrderedDict[bytes, float] = OrderedDict()
        self._keeping = threading.Lock()

    def ask(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """See the base class."""
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            picture = png(image)
            asked = [question.replace("{prompt}", prompt) for question in self.questions]
            scores.append(sum(self._answer(picture, question) for question in asked) / len(asked))
        return scores

    def _answer(self, picture: bytes, question: str) -> float:
        """The score of one question, from what is kept or from the server."""
        key = hashlib.sha256(hashlib.sha256(picture).digest() + question.encode()).digest()
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        answer = self.post(self.url, self._request(picture, question), JSON, self._headers)
        found = self._mean(answer) if self.labels else self._probability(answer)
        with self._keeping:
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def _request(self, picture: bytes, question: str) -> bytes:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_text(picture)}"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        asked = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}
        read = {} if self.labels else {"logprobs": True, "top_logprobs": MOST_TOKENS}
        return json.dumps(asked | read).encode()

    def _mean(self, answer: Any) -> float:
        """The mean of the labelled numbers of a written answer."""
        try:
            text = answer["choices"][0]["message"]["content"]
            found = [re.findall(rf"{re.escape(label)}\s*({NUMBER})", text) for label in self.labels]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.url} answered no text ({answer!r:.200})", False) from error
        missing = [label for label, numbers in zip(self.labels, found, strict=True) if not numbers]
        mean = math.nan if missing else sum(float(numbers[-1]) for numbers in found) / len(found)
        if not math.isfinite(mean):
            raise ServerError(f"{self.url}: no number behind {missing!r:.100} in {text!r:.200}", False)
        return mean

    def _probability(self, answer: Any) -> float:
        """P(yes) from an answer's first token and its alternatives."""
        try:
            first = answer["choices"][0]["logprobs"]["content"][0]
            told = {entry["token"]: float(entry["logprob"]) for entry in [*first["top_logprobs"], first]}
            said = {token: math.exp(min(value, 0.0)) for token, value in told.items()}
            yes, no = (sum(p for token, p in said.items() if _word(token) == word) for word in ("yes", "no"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self.url} answered no log-probabilities of tokens ({answer!r:.200}): are logprobs supported?", False
            ) from error
        if not 0 < yes + no < math.inf:
            raise ServerError(f"{self.url}: neither yes nor no among the first tokens {sorted(told)!r:.200}", False)
        return min(yes / (yes + no) if self.relative else yes, 1.0)


def _word(token: str) -> str:
    """A token without the marks of spaces and in lower case."""
    return token.strip("Ġ▁ \n\t.,'\"").lower()
