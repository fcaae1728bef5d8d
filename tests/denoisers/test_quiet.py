"""Loading from Python prints nothing, and only the hints of third-party libraries are hidden."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from noisear_rl.denoisers.quiet import HINTS, quietly

SNIPPETS = {
    "reward": "from noisear_rl.rewards import load_reward; load_reward({'shapes-match': 1, 'shapes-clip': 1})",
    "denoiser and reward": """
import noisear_rl
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward

denoiser = noisear_rl.load_denoiser("shapes")
prompts = ["a photo of a red circle"]
images = denoiser.denoise(standard_noise([0], denoiser.latent_shape), denoiser.encode(prompts))
load_reward({"shapes-match": 1, "shapes-clip": 1, "shapes-exact": 1}).score(images, prompts)
""",
    "training": "import noisear_rl.denoisers.shapes.train, noisear_rl.denoisers.shapes.distill",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_nothing_is_printed(name):
    hidden = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "PYTHONWARNINGS", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run([sys.executable, "-c", SNIPPETS[name]], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def messages():
    """Everything that reaches the handlers of the logger that hints."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger(HINTS)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_other_messages_and_settings_stay(messages):
    logger = logging.getLogger(HINTS)
    hint = "`CLIPImageProcessor` requires torchvision (not installed); falling back"
    verbosity = transformers_logging.get_verbosity(), diffusers_logging.get_verbosity()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quietly(), quietly():
            logger.warning(hint)
            logger.warning("something else")
            warnings.warn("`torch_dtype` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
            assert not transformers_logging.is_progress_bar_enabled()
            assert not diffusers_logging.is_progress_bar_enabled()
    assert messages == ["something else"]
    assert [str(warning.message) for warning in caught] == ["something else is deprecated"]
    assert (transformers_logging.get_verbosity(), diffusers_logging.get_verbosity()) == verbosity
    logger.warning(hint)
    assert messages == ["something else", hint]  # hidden only while loading


@pytest.mark.parametrize("library", [transformers_logging, diffusers_logging])
def test_progress_bars_stay_as_the_user_set_them(library):
    assert library.is_progress_bar_enabled()
    with quietly(progress_bars=True):
        assert library.is_progress_bar_enabled()
    with quietly():
        pass
    assert library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        with quietly():
            pass
        assert not library.is_progress_bar_enabled()
    finally:
        library.enable_progress_bar()
