"""Scoring one batch while the next one is denoised: what a thread gains.

    python benchmarks/overlap.py --device cuda --scorer-device cuda:1
    python benchmarks/overlap.py                    # what two CPU cores give

:func:`overlapped` is the recipe, thirty lines of the standard library: a thread of its own scores, on a CUDA stream of
its own where there is one, and hands over finished batches in order. Networks release Python's lock while they compute,
so both halves really run at once where they have hardware of their own: a second device, another stream, idle cores.
Scores are the same bit for bit. Writes ``benchmarks/results/overlap.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from noisear_rl.denoisers import Denoiser, load_denoiser
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.provenance import provenance
from noisear_rl.files import write_atomically
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards.clip import VIT_L_14, CLIPScore
from noisear_rl.rewards.pretrained import load_tokenizer

RESULTS = Path(__file__).parent / "results"
LAYERS, STEPS = 2, 32  # of the scorer and of the denoiser: so that both halves cost about the same


def overlapped(
    batches: Iterable[tuple[torch.Tensor, list[str]]],
    score: Callable[[torch.Tensor, list[str]], torch.Tensor],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Scores of batches of pictures, in order; the next batch is made while the last one is scored.

    Args:
        batches: Makes pictures ``(B, 3, H, W)`` and their prompts when it is asked for the next.
        score: A reward's ``score``.
        device: Where the scorer runs.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None

    def work(images: torch.Tensor, prompts: list[str], ready: torch.cuda.Event | None) -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
            if ready is not None:
                ready.wait(stream)  # not before the pictures are there
                images.record_stream(stream)
            return score(images, prompts).cpu()

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[torch.Tensor] | None = None
        for images, prompts in batches:
            ready = torch.cuda.current_stream(images.device).record_event() if cuda and images.is_cuda else None
            last, waiting = waiting, pool.submit(work, images, prompts, ready)
            if last is not None:
                yield last.result()
        if waiting is not None:
            yield waiting.result()


def random_scorer(device: torch.device) -> CLIPScore:
    """CLIPScore of a few layers with random weights: the cost is real, the scores mean nothing."""
    layers = {part: VIT_L_14[part] | {"num_hidden_layers": LAYERS} for part in ("text_config", "vision_config")}
    scorer = type("RandomCLIPScore", (CLIPScore,), {"architecture": VIT_L_14 | layers})(device=device)
    torch.manual_seed(0)
    scorer.network = scorer.build().to(device, scorer.dtype).eval().requires_grad_(False)
    scorer.tokenizer = load_tokenizer(ASSETS / "pipeline" / "tokenizer")
    return scorer


def make_batches(denoiser: Denoiser, prompts: list[str], size: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Denoises prompts batch by batch."""
    for start in range(0, len(prompts), size):
        texts = prompts[start : start + size]
        seeds = list(range(start, start + len(texts)))
        noise = standard_noise(seeds, denoiser.latent_shape)
        with torch.no_grad():
            yield denoiser.denoise(noise, denoiser.encode(texts), seeds), texts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where pictures are denoised")
    parser.add_argument("--scorer-device", help="where they are scored; the same if unset")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    where = torch.device(arguments.scorer_device or arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # a core for each half
    denoiser, scorer = load_denoiser("shapes", device=arguments.device, num_inference_steps=STEPS), random_scorer(where)
    prompts = [caption.text for caption in balanced_captions("train", arguments.batches * arguments.batch_size)]
    batches = lambda: make_batches(denoiser, prompts, arguments.batch_size)
    one_by_one = lambda: [scorer.score(images, texts).cpu() for images, texts in batches()]
    both = lambda: list(overlapped(batches(), scorer.score, where))
    halves = {"denoising alone": lambda: list(batches()), "one after the other": one_by_one, "overlapped": both}
    reference = torch.cat(one_by_one())  # warms up as well
    assert torch.equal(torch.cat(both()), reference)
    seconds: dict[str, list[float]] = {name: [] for name in halves}
    for _ in range(arguments.repeats):
        for name, run in halves.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    base = np.median(seconds["one after the other"])
    lines = [
        f"{arguments.batches} batches of {arguments.batch_size} pictures; `shapes` denoises in {STEPS} steps on "
        f"{arguments.device}, a CLIP ViT-L/14 of {LAYERS} layers (random weights) scores on {where}; median of "
        f"{arguments.repeats}, relative to one after the other. Scores are equal bit for bit.",
        "",
        "| | relative time |",
        "|---|---|",
        *(f"| {name} | {np.median(values) / base:.2f} |" for name, values in seconds.items()),
        "",
        f"Command: `python benchmarks/overlap.py`. Measured at {provenance()}.",
    ]
    write_atomically(RESULTS / "overlap.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
