"""Samplers: ways to choose the initial noise, from a Gaussian draw to a policy to a search; they compose."""

from noisear_rl.samplers.base import Sampler, Samples
from noisear_rl.samplers.best_of import BestOf
from noisear_rl.samplers.simple import GAUSSIAN, GaussianSampler, PolicySampler, as_sampler

__all__ = ["GAUSSIAN", "BestOf", "GaussianSampler", "PolicySampler", "Sampler", "Samples", "as_sampler"]
