"""NPNet, the network of Golden Noise (Zhou et al. 2024, arXiv 2411.09502), as a sampler to compare with."""

from noisear_rl.samplers.npnet.network import NPNet, NPNetConfig, holds_npnet, load_npnet
from noisear_rl.samplers.npnet.sampler import NPNetSampler

__all__ = ["NPNet", "NPNetConfig", "NPNetSampler", "holds_npnet", "load_npnet"]
