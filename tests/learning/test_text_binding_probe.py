"""The benchmark of binding: its questions, and probes of every reading."""

import torch

from benchmarks import binding_probe
from noisear_rl.denoisers.shapes.captions import COLORS, captions_of
from noisear_rl.prompts.reader import PromptReader


def few(split, category):
    return captions_of(split, category)[-60::3]


def test_the_answer_is_the_colour_of_the_left_object(random_denoiser, monkeypatch):
    monkeypatch.setattr(binding_probe, "captions_of", few)
    text, mask, colors = binding_probe.questions(PromptReader("tokens", random_denoiser), "train")
    assert len(text) == len(mask) == len(colors) and 0 < len(text) <= 20
    tokenizer = random_denoiser.pipeline.tokenizer
    for ids, seen, color in zip(text[..., 0].long(), mask, colors, strict=True):
        words = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids[seen])]
        named = [word for word in words if word in COLORS]
        assert len(named) == 2 and COLORS[color] == named[0 if "left" in words else 1]


def test_every_probe_learns_and_ignores_padding(random_denoiser, monkeypatch):
    monkeypatch.setattr(binding_probe, "captions_of", few)
    monkeypatch.setattr(binding_probe, "SEEDS", (0, 1))
    record = binding_probe.measure(random_denoiser, steps=30)
    assert record["captions"]["train"] > 0 < record["captions"]["validation"]
    for name, probes in record["right"].items():
        assert all(min(probes[kind]["train"]) > 0.4 for kind in binding_probe.PROBES), (name, probes)
    table = binding_probe.table(record)
    assert all(f"| {name} | " in table for name in binding_probe.READINGS)

    data = binding_probe.questions(PromptReader("tokens", random_denoiser), "train")
    for kind in binding_probe.PROBES:
        torch.manual_seed(0)
        probe = binding_probe.Probe("tokens, 1 layer", kind, data, 100)
        padded = torch.where(data[1][..., None], data[0], 5.0)
        torch.testing.assert_close(probe(padded, data[1]), probe(data[0], data[1]))
