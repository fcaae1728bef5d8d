"""Which colour is the left object? What a small probe can answer from each thing that a policy may read of a prompt.

    python benchmarks/binding_probe.py            # trains the probes
    python benchmarks/binding_probe.py --render   # the page again from its data

The answer needs colour, object and relation bound together, as a policy needs them to place objects. Probes train on
the training captions of two coloured objects left or right of each other and are scored on the validation captions. A
linear probe sees all tokens side by side; an attention probe is one learned query, as in a policy's cross-attention.
Writes ``binding_probe.md`` and the scores behind it, ``binding_probe.json``, in ``benchmarks/results``.

Shapes: ``B`` captions, ``L`` text tokens, ``D`` text width, ``d`` width of probes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pages import SEEDS, publish  # in this folder
from torch import nn
from tqdm.auto import tqdm

from noisear_rl.denoisers import Denoiser, load_denoiser
from noisear_rl.denoisers.shapes.captions import COLORS, Split, captions_of
from noisear_rl.policy.layers import TextLayer, TokenEmbedding, Whitening, attend, project_keys_values
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.provenance import provenance

READINGS = {
    "embedding, normalized": "denoiser",
    "embedding, whitened": "denoiser",
    "words at their places": "tokens",
    "tokens, 1 layer": "tokens",
}
PROBES = ("linear", "attention")
WIDTH, HEADS = 64, 4
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1000, 128, 2e-3, 0.01

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # text (B, L, D), mask (B, L), the left object's colour (B,)


def questions(reader: PromptReader, split: Split) -> Data:
    """Returns the captions of one part as the reader reads them, with their answers."""
    sides = ("left of", "right of")
    captions = [c for c in captions_of(split, "position") if c.objects[0].color and c.relation in sides]
    left = [c.objects[0 if c.relation == "left of" else 1].color for c in captions]
    text, mask = reader.read_prompts([c.text for c in captions])
    return text, mask, torch.tensor([COLORS.index(str(color)) for color in left])


class Probe(nn.Module):
    """A reading, and a linear or an attention probe on it.

    Args:
        reading: Name in :data:`READINGS`.
        kind: ``linear`` or ``attention``.
        data: Training captions, which statistics are fitted on.
        vocabulary: Number of tokens, for readings of tokens.
    """

    def __init__(self, reading: str, kind: str, data: Data, vocabulary: int):
        super().__init__()
        text, mask, _ = data
        length, width = text.shape[1:]
        self.one_hot = vocabulary if reading == "words at their places" and kind == "linear" else 0
        self.layer = TextLayer(WIDTH, 2 * WIDTH, HEADS, 0.0) if reading == "tokens, 1 layer" else None
        self.embed: nn.Module = nn.Identity()
        if self.one_hot:
            width = vocabulary
        elif READINGS[reading] == "tokens":
            self.embed, width = TokenEmbedding(vocabulary, length, WIDTH), WIDTH
        elif reading == "embedding, whitened":
            self.embed = Whitening(width)
            self.embed.fit(text[mask])
        else:
            self.embed = nn.LayerNorm(width, elementwise_affine=False)
        self.query = None
        if kind == "attention":
            self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.adapter = nn.Linear(width, WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.answer = nn.Linear(WIDTH if kind == "attention" else length * width, len(COLORS))

    def forward(self, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the colours, ``(B, 6)``."""
        if self.one_hot:
            x = nn.functional.one_hot(text[..., 0].long(), self.one_hot).float()
        else:
            x = self.embed(text[..., 0].long() if isinstance(self.embed, TokenEmbedding) else text)  # (B, L, D)
        seen = mask[:, None, None]
        if self.layer is not None:
            x = self.layer(x, seen)
        if self.query is None:
            return self.answer((x * mask[..., None]).flatten(1))
        keys_values = project_keys_values(self.attention, self.adapter(x))
        return self.answer(attend(self.attention, self.query.expand(len(x), -1, -1), keys_values, seen)[:, 0])


def accuracy(probe: Probe, data: Data) -> float:
    """Returns the share of right answers."""
    text, mask, colors = data
    with torch.no_grad():
        return (probe(text, mask).argmax(1) == colors).float().mean().item()


def trained(reading: str, kind: str, train: Data, vocabulary: int, seed: int, steps: int) -> Probe:
    """Trains a probe, by AdamW with a cosine decay."""
    torch.manual_seed(seed)
    probe = Probe(reading, kind, train, vocabulary)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(train[2]), (BATCH,))
        text, mask, colors = (part[rows] for part in train)
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe(text, mask), colors).backward()
        optimizer.step()
        schedule.step()
    return probe


def measure(denoiser: Denoiser, steps: int = STEPS) -> dict[str, Any]:
    """Returns every probe's share of right answers, by seed."""
    readers = {name: PromptReader(name, denoiser) for name in set(READINGS.values())}
    vocabulary = readers["tokens"].sizes["text_vocabulary"]
    data = {name: (questions(reader, "train"), questions(reader, "validation")) for name, reader in readers.items()}
    right: dict[str, dict[str, Any]] = {name: {} for name in READINGS}
    for reading, kind in tqdm([(reading, kind) for reading in READINGS for kind in PROBES], desc="probes"):
        train, validation = data[READINGS[reading]]
        probes = [trained(reading, kind, train, vocabulary, seed, steps) for seed in SEEDS]
        right[reading][kind] = {
            "train": [round(accuracy(probe, train), 4) for probe in probes],
            "validation": [round(accuracy(probe, validation), 4) for probe in probes],
        }
    counts = {split: len(part[2]) for split, part in zip(("train", "validation"), data["tokens"], strict=True)}
    return {"provenance": provenance(), "captions": counts, "steps": steps, "right": right}


def table(record: dict[str, Any]) -> str:
    """Renders the table from the record."""
    counts, origin = record["captions"], record["provenance"]
    lines = [
        "Which colour is the left object? Right answers in % of probes of what a policy may read of a prompt: trained "
        f"on {counts['train']} captions of two coloured objects left or right of each other, scored on "
        f"{counts['validation']} validation captions. Means over {len(SEEDS)} seeds, their standard deviation in "
        "brackets; training captions after the slash. Guessing one of the two named colours gives 50, one of six 17.",
        "",
        "| reading | linear probe | attention probe |",
        "|---|---|---|",
    ]
    for reading, probes in record["right"].items():
        cells = []
        for kind in PROBES:
            train, validation = (100 * np.array(probes[kind][split]) for split in ("train", "validation"))
            cells.append(f"{validation.mean():.1f} ({validation.std(ddof=1):.1f}) / {train.mean():.1f}")
        lines.append(f"| {reading} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Embedding: the denoiser's text embedding. Words at their places: every token by itself, with its position. "
        "Tokens, 1 layer: `text_encoder=tokens`, `text_layers=1`, trained with the probe.",
        "",
        f"Command: `python benchmarks/binding_probe.py`, {record['steps']} steps per probe. Commit {origin['commit']}, "
        f"torch {origin['torch']}, {origin['device']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    publish("binding_probe", __doc__, table, lambda: measure(load_denoiser("shapes", dtype="float32")))
