"""How much time does a thread save that scores one batch while the next one is denoised?

    python benchmarks/overlap.py --device cuda --scorer-device cuda:1
    python benchmarks/overlap.py                    # on two CPU cores

:func:`overlapped` is a recipe of thirty lines with the standard library: a separate thread scores batches, on its own
CUDA stream if there is one, and returns them in order. Networks release the interpreter lock while they compute, so
denoising and scoring run in parallel if each has its own hardware: a second device, another stream or idle cores. The
scores are bit-identical. Writes ``overlap.md`` and the times behind it, ``overlap.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pages import markdown, page, parser_of, write  # in this folder

from noisear_rl.denoisers import Denoiser, load_denoiser
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.gaussian import standard_noise
from noisear_rl.provenance import provenance
from noisear_rl.rewards.clip import VIT_L_14, CLIPScore
from noisear_rl.rewards.pretrained import load_tokenizer

LAYERS, STEPS = 2, 32  # of the scorer and the denoiser, chosen so that both take about the same time


def overlapped(
    batches: Iterable[tuple[torch.Tensor, list[str]]],
    score: Callable[[torch.Tensor, list[str]], torch.Tensor],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yields the scores ``(B,)`` of batches in order; the next batch is made while the last one is scored.

    Args:
        batches: Yields images ``(B, 3, H, W)`` and their prompts, computed on demand.
        score: The ``score`` method of a scorer.
        device: Device of the scorer.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def work(images: torch.Tensor, prompts: list[str], ready: torch.cuda.Event | None) -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            if stream is not None and ready is not None:
                ready.wait(stream)  # the images must be complete
                images.record_stream(stream)
            return score(images, prompts).cpu()

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[torch.Tensor] | None = None
        for images, prompts in batches:
            ready = torch.cuda.current_stream(images.device).record_event() if stream and images.is_cuda else None
            last, waiting = waiting, pool.submit(work, images, prompts, ready)
            if last is not None:
                yield last.result()
        if waiting is not None:
            yield waiting.result()


def random_scorer(device: torch.device) -> CLIPScore:
    """Returns a CLIPScore of a few layers with random weights: its cost is real, its scores are meaningless."""
    layers = {part: VIT_L_14[part] | {"num_hidden_layers": LAYERS} for part in ("text_config", "vision_config")}
    scorer = type("RandomCLIPScore", (CLIPScore,), {"architecture": VIT_L_14 | layers})(device=device)
    torch.manual_seed(0)
    scorer.network = scorer.build().to(device, scorer.dtype).eval().requires_grad_(False)
    scorer.tokenizer = load_tokenizer(ASSETS / "pipeline" / "tokenizer")
    return scorer


def make_batches(denoiser: Denoiser, prompts: list[str], size: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Denoises prompts batch by batch; yields images and prompts."""
    for start in range(0, len(prompts), size):
        texts = prompts[start : start + size]
        seeds = list(range(start, start + len(texts)))
        noise = standard_noise(seeds, denoiser.latent_shape)
        with torch.no_grad():
            yield denoiser.denoise(noise, denoiser.encode(texts), seeds), texts


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    median = {name: np.median(seconds) for name, seconds in record["seconds"].items()}
    base, options = median["one after the other"], record["options"]
    return page(
        [
            f"{options['batches']} batches of {options['batch_size']} images; `shapes` denoises in {STEPS} steps on "
            f"{options['device']}, a CLIP ViT-L/14 of {LAYERS} layers (random weights) scores on "
            f"{options['scorer_device']}; median of {options['repeats']}, relative to one after the other. Scores are "
            "bit-identical.",
            markdown(["", "relative time"], [[name, f"{seconds / base:.2f}"] for name, seconds in median.items()]),
        ],
        "overlap",
        record["provenance"],
    )


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="device of the denoiser")
    parser.add_argument("--scorer-device", help="device of the scorer; unset for the same")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.render:
        write("overlap", table, None)
        return
    where = torch.device(arguments.scorer_device or arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # one core each for denoising and scoring
    denoiser, scorer = load_denoiser("shapes", device=arguments.device, num_inference_steps=STEPS), random_scorer(where)
    prompts = [caption.text for caption in balanced_captions("train", arguments.batches * arguments.batch_size)]
    batches = lambda: make_batches(denoiser, prompts, arguments.batch_size)
    one_by_one = lambda: [scorer.score(images, texts).cpu() for images, texts in batches()]
    both = lambda: list(overlapped(batches(), scorer.score, where))
    halves = {"denoising alone": lambda: list(batches()), "one after the other": one_by_one, "overlapped": both}
    reference = torch.cat(one_by_one())  # also warms up
    assert torch.equal(torch.cat(both()), reference)
    seconds: dict[str, list[float]] = {name: [] for name in halves}
    for _ in range(arguments.repeats):
        for name, run in halves.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    options = {name: getattr(arguments, name) for name in ("device", "batches", "batch_size", "repeats")}
    options["scorer_device"] = str(where)
    write("overlap", table, {"provenance": provenance(), "options": options, "seconds": seconds})


if __name__ == "__main__":
    main()
