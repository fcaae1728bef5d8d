"""A page on this machine: a prompt, and the images of Gaussian noise and of a policy side by side, on the same seeds.

    noisear app                                                   # http://127.0.0.1:7860, the embedded denoiser
    noisear app --denoiser sdxl --policy OWNER/POLICY --reward pickscore

The page needs no network: Gradio's files come from this machine, its analytics and share links are off. Every image
follows from denoiser, policy, prompt and seed, so the same seeds give the same images again. There is no password:
bind to another address than loopback only in a network that you trust; the page then offers nothing but the denoisers
and policies that come with the library and those of the command line.

Shapes: ``S`` seeds, noise ``(S, C, h, w)``, images ``(S, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from PIL import Image

from noisear_rl.command import USER_ERRORS, describe, run_script
from noisear_rl.config import PositiveInt, Seed, check_config, parse_config
from noisear_rl.denoisers import EMBEDDED, Denoiser, DenoiserName, DenoiserOptions, check_denoiser, load_denoiser
from noisear_rl.images import noise_to_uint8, to_uint8
from noisear_rl.policy import NoiseARPolicy, load_policy
from noisear_rl.policy.loading import best_shipped, shipped_policies
from noisear_rl.report.embed import EmbeddedImage, embed_image
from noisear_rl.rewards import RewardSpec, WeightedReward, load_reward
from noisear_rl.samplers import GAUSSIAN, as_sampler
from noisear_rl.trust import is_loopback, values_from

ASSETS = Path(__file__).parent / "assets" / "app"
NO_POLICY = "gaussian"
JUDGES = {"shapes-exact": 1.0, "shapes-match": 1.0}  # of the embedded denoisers
LARGEST = 512  # pixels of an image on the page
MOST_IMAGES = 16
EXAMPLE = "a photo of a red circle left of a blue square"


@dataclass
class AppConfig:
    """Options of the page."""

    policy: str | None = None
    """Checkpoint, run folder, name of a policy that comes with the library (`shapes/NAME`) or Hub id; `gaussian` for
    Gaussian noise only. Unset, the embedded denoisers use the best one that comes with the library, and others Gaussian
    noise only. The page can choose another one."""
    denoiser: DenoiserName = "shapes-turbo"
    """Name or folder of the denoiser. The page can choose another one."""
    reward: RewardSpec | None = None
    """Scorer or reward file; unset for the judges of the embedded denoisers, and no scores for others."""
    images: PositiveInt = 4
    """Images per method at first."""
    seed: Seed = 0
    """First seed at first."""
    host: str = "127.0.0.1"
    """Address to listen at; only this machine reaches the default one."""
    port: PositiveInt = 7860
    """Port to listen at."""
    open: bool = False
    """Open the page in the browser."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser of the command line, such as `dtype float32` or `num_inference_steps 30`."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.images > MOST_IMAGES:
            raise ValueError(f"images must be at most {MOST_IMAGES}, got {self.images}")

    @property
    def chosen_policy(self) -> str:
        """The policy at first."""
        return self.policy or (best_shipped() if self.denoiser in EMBEDDED else None) or NO_POLICY


@dataclass
class Drawn:
    """What one method draws from the seeds.

    Attributes:
        name: The method.
        noise: ``(S, C, h, w)``.
        images: ``(S, 3, H, W)``.
        scores: ``(S,)`` by scorer; NaN where one fails.
        kl: Mean KL of the noise to N(0, I) in nats; ``None`` if it has no density.
        nfe: Network evaluations of the denoiser per image.
    """

    name: str
    noise: torch.Tensor
    images: torch.Tensor
    scores: dict[str, torch.Tensor]
    kl: float | None
    nfe: float


def draw_pair(
    denoiser: Denoiser,
    policies: dict[str, NoiseARPolicy | None],
    reward: WeightedReward | None,
    prompt: str,
    seeds: Sequence[int],
) -> list[Drawn]:
    """Images of every method on the same seeds.

    Args:
        denoiser: Frozen diffusion model.
        policies: By name; ``None`` for Gaussian noise.
        reward: Scorers; ``None`` for no scores.
        prompt: One prompt.
        seeds: ``S`` seeds.

    Raises:
        ValueError: If the prompt is empty, no caption that the embedded denoisers can read, or none that the scorers
            can judge.
    """
    if not prompt.strip():
        raise ValueError("type a prompt: what the images should show")
    if denoiser.name in EMBEDDED:
        from noisear_rl.denoisers.shapes.captions import parse_caption

        parse_caption(prompt)
    if reward is not None:
        reward.check_prompts([prompt])
    drawn, prompts = [], [prompt] * len(seeds)
    for name, policy in policies.items():
        samples = as_sampler(denoiser, policy)(prompts, seeds)
        with torch.no_grad():
            scores = reward.components(samples.images, prompts) if reward is not None else {}
        kl = None if samples.kl_to_gaussian is None else samples.kl_to_gaussian.mean().item()
        drawn.append(Drawn(name, samples.noise.cpu(), samples.images.cpu(), scores, kl, samples.nfe))
    return drawn


def shown(pixels: Any) -> EmbeddedImage:
    """Pixels ``(H, W, 3)`` as part of the page: small images unchanged, others at most 512 pixels high and wide."""
    image = Image.fromarray(pixels)
    if max(image.size) <= LARGEST:
        return embed_image(image, "PNG")
    image.thumbnail((LARGEST, LARGEST))
    return embed_image(image, "WEBP", quality=90)


def facts_of(drawn: Sequence[Drawn]) -> str:
    """One line on all images: mean scores, KL and cost."""
    first, last = drawn[0], drawn[-1]
    parts = []
    for scorer, values in first.scores.items():
        means = [method.scores[scorer].mean().item() for method in drawn]
        parts.append(f"{scorer} {' → '.join(f'{mean:.3f}' for mean in means)} on average over {len(values)}")
    if len(drawn) > 1 and last.kl is not None:
        parts.append(f"the policy is {last.kl:.1f} nats from N(0, I)")
    parts.append(f"{last.nfe:g} network evaluation{'' if last.nfe == 1 else 's'} per image")
    return "; ".join(parts) + "."


def render(drawn: Sequence[Drawn], denoiser: Denoiser, prompt: str, seeds: Sequence[int]) -> str:
    """The table of the page: a row per seed, a column per method."""
    methods = [
        {
            "name": method.name,
            "images": [shown(to_uint8(image)) for image in method.images],
            "noises": [shown(noise_to_uint8(noise, denoiser.image_size)) for noise in method.noise],
            "scores": {name: values.tolist() for name, values in method.scores.items()},
        }
        for method in drawn
    ]
    template = jinja2.Environment(autoescape=True).from_string((ASSETS / "pairs.html").read_text(encoding="utf-8"))
    return template.render(methods=methods, seeds=seeds, prompt=prompt, facts=facts_of(drawn))


def error_text(message: str) -> str:
    """A message for the page, which screen readers announce."""
    return str(Markup('<p class="error" role="alert"><b>Nothing was drawn.</b> {}</p>').format(message))


def make_draw(config: AppConfig) -> Callable[..., str]:
    """The function behind the page's button; loads the denoiser and the policy of the command line at once.

    Raises:
        ValueError: If they do not fit each other, or an option is wrong.
        FileNotFoundError: If weights are missing.
    """

    @functools.lru_cache(maxsize=1)  # denoisers are large
    def denoiser_of(name: str) -> Denoiser:
        return load_denoiser(name, **(config.denoiser_options if name == config.denoiser else {}))

    @functools.lru_cache(maxsize=2)
    def reward_of(embedded: bool) -> WeightedReward | None:
        if config.reward is not None:
            return load_reward(config.reward)
        return load_reward(JUDGES) if embedded else None

    offered = {*EMBEDDED, config.denoiser}, {*shipped_policies(), NO_POLICY, config.chosen_policy}

    def draw(prompt: str, denoiser_name: str, policy_name: str, seed: float | None, count: float) -> str:
        """HTML of the images, or of an error."""
        try:
            names = (denoiser_name or "").strip(), (policy_name or NO_POLICY).strip()
            for name, known in zip(names, offered, strict=True):
                if name not in known and not is_loopback(config.host):
                    raise ValueError(f"{name!r:.80} is not offered here; expected one of {sorted(known)}")
            if seed is None or not 0 <= int(seed) < 2**62:
                raise ValueError("the first seed must be a whole number from 0 on")
            seeds = range(int(seed), int(seed) + min(int(count), MOST_IMAGES))
            if names[0] != config.denoiser:
                with values_from("the page"):  # it may name no code to run
                    check_denoiser(names[0])
            denoiser = denoiser_of(names[0])
            policies: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
            if names[1] != NO_POLICY:
                policies[names[1]] = load_policy(names[1])  # a run folder may have a newer checkpoint
            drawn = draw_pair(denoiser, policies, reward_of(names[0] in EMBEDDED), prompt or "", list(seeds))
            return render(drawn, denoiser, prompt, list(seeds))
        except USER_ERRORS as error:
            return error_text(describe(error))

    reward_of(config.denoiser in EMBEDDED)
    policy = None if config.chosen_policy == NO_POLICY else load_policy(config.chosen_policy)
    as_sampler(denoiser_of(config.denoiser), policy)  # a policy that does not fit is refused before the page opens
    return draw


def make_page(config: AppConfig) -> Any:
    """The page as ``gradio.Blocks``; see :func:`serve`.

    Raises:
        ValueError: If Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("`noisear app` needs Gradio: pip install 'noisear-rl[app]'")
    draw, own = make_draw(config), is_loopback(config.host)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"  # read when it is imported
    import gradio as gr  # which takes seconds

    denoisers = list(dict.fromkeys([config.denoiser, *EMBEDDED]))
    policies = list(dict.fromkeys([config.chosen_policy, *shipped_policies(), NO_POLICY]))
    with gr.Blocks(title="noisear app", analytics_enabled=False) as page:
        gr.HTML("<h1>Noise for a prompt: Gaussian or chosen by a policy</h1>")
        prompt = gr.Textbox(
            EXAMPLE if config.denoiser in EMBEDDED else "",
            label="Prompt",
            info=f"The embedded denoisers read captions of coloured shapes only, such as “{EXAMPLE}”.",
            elem_id="prompt",
        )
        with gr.Row():
            other = " Or any name, folder or Hub id." if own else ""
            denoiser = gr.Dropdown(
                denoisers, label="Denoiser", info=f"The diffusion model.{other}", allow_custom_value=own
            )
            policy = gr.Dropdown(policies, label="Policy", info=f"Chooses the noise.{other}", allow_custom_value=own)
            seed = gr.Number(config.seed, label="First seed", info="The same seeds give the same images.", precision=0)
            count = gr.Slider(1, MOST_IMAGES, config.images, step=1, label="Images per method")
        with gr.Row():
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            following = gr.Button("Draw the next seeds", elem_id="next")
        result = gr.HTML(elem_id="result")
        asked = {"fn": draw, "inputs": [prompt, denoiser, policy, seed, count], "outputs": result}
        gr.on([button.click, prompt.submit], **asked, api_visibility="private")
        next_seed = lambda seed, count: int(seed or 0) + int(count)
        following.click(next_seed, [seed, count], seed, api_visibility="private").then(
            **asked, api_visibility="private"
        )
    return page


def launch(config: AppConfig) -> tuple[Any, str]:
    """Starts the page in threads; returns it and its address.

    Raises:
        ValueError: If Gradio is not installed, or the denoiser and the policy do not fit.
        OSError: If the port is taken.
    """
    page = make_page(config)
    import gradio as gr

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font of Google's
    _, address, _ = page.launch(
        server_name=config.host,
        server_port=config.port,
        share=False,
        inbrowser=config.open,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),  # readable
        css_paths=ASSETS / "style.css",
    )
    return page, address


def serve(config: AppConfig) -> None:
    """Shows the page until the process is told to stop (Ctrl-C).

    Raises:
        ValueError, OSError: See :func:`launch`.
    """
    page, address = launch(config)
    print(f"the page is at {address}", flush=True)
    if not is_loopback(config.host):
        print("every machine that reaches this address can use it: there is no password", flush=True)
    page.block_thread()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    serve(parse_config(AppConfig, argv, __doc__))


if __name__ == "__main__":
    run_script(main)
