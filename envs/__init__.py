"""Noise sampling as a Markov decision process: a scalar and a batched Gymnasium environment."""

from noisear_rl.envs.noise_env import NoiseEnv
from noisear_rl.envs.noise_vector_env import EnvId, NoiseVectorEnv, check_env_id, make_vector_env

__all__ = ["EnvId", "NoiseEnv", "NoiseVectorEnv", "check_env_id", "make_vector_env"]
