"""What is importable from ``noisear_rl`` itself."""

import subprocess
import sys

import pytest

import noisear_rl
from noisear_rl.denoisers import load_denoiser
from noisear_rl.envs import make_vector_env
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.rewards import load_reward


def test_public_names_are_those_of_their_rooms():
    homes = [NoiseARConfig, NoiseARPolicy, load_denoiser, load_policy, load_reward, make_vector_env]
    assert [getattr(noisear_rl, name) for name in sorted(noisear_rl.__all__)] == homes
    assert set(noisear_rl.__all__) <= set(dir(noisear_rl))
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        getattr(noisear_rl, "load_polcy")  # noqa: B009


def test_a_public_name_loads_only_its_room():
    code = (
        "import sys, noisear_rl; noisear_rl.NoiseARConfig; "
        "assert 'torch' in sys.modules and not {'diffusers', 'noisear_rl.envs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
