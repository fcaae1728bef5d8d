"""The policy: an autoregressive Gaussian over the patches of the initial noise (NoiseAR §2)."""

from noisear_rl.policy.config import NoiseARConfig, Precision
from noisear_rl.policy.loading import initial_policy, load_policy, load_released, policy_sha256, text_encoder_of
from noisear_rl.policy.model import NoiseARPolicy, PolicySample

__all__ = [
    "NoiseARConfig",
    "NoiseARPolicy",
    "PolicySample",
    "Precision",
    "initial_policy",
    "load_policy",
    "load_released",
    "policy_sha256",
    "text_encoder_of",
]
