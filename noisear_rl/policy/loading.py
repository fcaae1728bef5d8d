"""Policies from disk, from the package or from the Hub, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisear_rl.checkpoints import check_finite, find_checkpoint, read_tensors
from noisear_rl.config import to_mapping
from noisear_rl.policy.config import NoiseARConfig
from noisear_rl.policy.model import NoiseARPolicy
from noisear_rl.policy.released import released_config

SHIPPED = Path(__file__).parents[1] / "assets/shapes/policies"  # one folder per policy of the embedded denoisers
FAMILY = "shapes/"  # prefix of their names
BEST = ("shapes/ppo", "shapes/nll")  # the first of these that is shipped is used where none is named


def shipped_policies() -> list[str]:
    """Names of the policies that come with the library, as :func:`load_policy` takes them."""
    return sorted(FAMILY + file.parent.name for file in SHIPPED.glob("[!.]*/config.json"))


def best_shipped() -> str | None:
    """Name of the best policy that comes with the library; ``None`` if there is none."""
    shipped = shipped_policies()
    return next((name for name in BEST if name in shipped), None)


def find_policy(path: str | Path) -> str:
    """The folder of a shipped policy for its name; any other path or Hub id as it is.

    A path that exists takes precedence over a shipped policy of the same name.

    Raises:
        FileNotFoundError: If a name ``shapes/…`` is neither on disk nor among the shipped policies.
    """
    name = str(path)
    if Path(path).exists() or not name.startswith(FAMILY):
        return str(path)
    shipped = shipped_policies()
    if name not in shipped:
        raise FileNotFoundError(
            f"{name}: no such folder, and no policy of this name comes with the library; those that do: "
            f"{', '.join(shipped) or 'none'}"
        )
    return str(SHIPPED / name.removeprefix(FAMILY))


def load_policy(path: str | Path) -> NoiseARPolicy:
    """Loads a policy in eval mode.

    Args:
        path: A checkpoint, a run folder (its newest checkpoint), the name of a policy that comes with the library
            (:func:`shipped_policies`, such as ``shapes/nll``), a Hub id, or a ``.pth`` file of the authors' network
            (:func:`load_released`).

    Raises:
        FileNotFoundError: If a folder holds no policy, or no policy of this name comes with the library.
        ValueError: If the weights are truncated or of another architecture.
    """
    path = find_policy(path)
    if Path(path).suffix == ".pth":
        return load_released(path)
    return NoiseARPolicy.from_pretrained(find_checkpoint(path, "policy")).eval()


def load_released(path: str | Path, *, n_heads: int = 1) -> NoiseARPolicy:
    """Loads a ``.pth`` file of the authors' released network, in eval mode, at their temperature of 0.5.

    ``save_pretrained`` then writes it as safetensors.

    Args:
        path: Their state dict. Nothing but tensors is unpickled.
        n_heads: Attention heads, which a state dict does not tell; theirs is 1.

    Raises:
        ValueError: If the file holds anything but tensors, or not their network.
        FileNotFoundError: If there is no such file.
    """
    state = read_tensors(path)
    policy = NoiseARPolicy(released_config(state, n_heads))
    try:
        policy.network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the authors' network: {error}") from error
    check_finite(policy, str(path))
    return policy.eval()


def text_encoder_of(path: str | None, config: NoiseARConfig) -> str:
    """What the policy reads that :func:`initial_policy` returns: a loaded policy's, or else ``config``'s."""
    return load_policy(path).config.text_encoder if path else config.text_encoder


def initial_policy(
    path: str | None, config: NoiseARConfig, sizes: Mapping[str, Any], owner: str, *, any_patch_size: bool = False
) -> NoiseARPolicy:
    """What training starts from, in eval mode.

    Args:
        path: As :func:`load_policy` takes it; ``None`` for a fresh policy.
        config: The fresh policy's, in whatever sizes: those below are set.
        sizes: What the policy must agree on with a denoiser, a task or rollouts.
        owner: Whose sizes they are, for the message.
        any_patch_size: Whether a loaded policy may cut the latent into other patches.

    Raises:
        ValueError: If a loaded policy has other sizes, or ``config`` asks for others.
        FileNotFoundError: If a folder holds no policy.
    """
    if not path:
        return NoiseARPolicy(config.resized(sizes)).eval()
    policy = load_policy(path)
    checked = {name: size for name, size in sizes.items() if name != "patch_size" or not any_patch_size}
    policy.config.check_sizes(checked, owner)
    return policy


def policy_sha256(policy: NoiseARPolicy) -> str:
    """Fingerprint of a policy's configuration and weights."""
    digest = hashlib.sha256(json.dumps(to_mapping(policy.config), sort_keys=True).encode())
    for name, value in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
