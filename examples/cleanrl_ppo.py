"""PPO in one file and in CleanRL's order (``ppo_continuous_action.py``), with our policy as its agent.

    python examples/cleanrl_ppo.py --total-timesteps 8192 --seed 1

Two things differ: a transformer scores all 16 actions of an episode in one pass, so minibatches are of episodes; and
actions are not clipped, for the prior's are seldom beyond the bounds.
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn, optim
from torch.utils.tensorboard import SummaryWriter

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic


@dataclass
class Args:
    exp_name: str = "cleanrl_ppo"
    seed: int = 1
    env_id: str = "NoiseAR-ShapesTurbo-v0"
    prompt: str = "a photo of two red squares"
    total_timesteps: int = 8192
    learning_rate: float = 1e-3
    num_envs: int = 64
    gamma: float = 1.0
    gae_lambda: float = 0.95
    num_minibatches: int = 2
    update_epochs: int = 4
    clip_coef: float = 0.5
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float = 0.05
    """Per patch."""


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """In standard deviations of the images that Gaussian noise gives."""
    return (0.858 - images.mean((1, 2, 3))) / 0.026


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")  # untrained, it is N(0, I)
        self.actor, self.critic = NoiseARPolicy(config), NoiseARCritic(config)

    def get_action_and_value(self, obs: dict[str, torch.Tensor], action: torch.Tensor | None = None):
        """Actions ``(B, A)`` of the observed step, or log-probabilities of all: ``(B, N)``, if ``action`` is given."""
        seen = obs["patches"] if action is None else action
        distribution = self.actor.distribution(seen, obs["text"], obs["text_mask"])
        value = self.critic(seen, obs["text"], obs["text_mask"])
        if action is not None:
            return action, distribution.log_prob(action), distribution.entropy(), value
        step = int(obs["step"][0])  # all copies are at the same one
        action = distribution.sample()[:, step]
        log_prob = distribution.base_dist.log_prob(action[:, None])[:, step].sum(1)
        return action, log_prob, distribution.entropy()[:, step], value[:, step]


def main(args: Args | None = None) -> list[float]:
    """Trains, and returns the mean reward of each iteration's episodes."""
    args = args or Args()
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    writer = SummaryWriter(f"runs/{run_name}")
    torch.manual_seed(args.seed)

    # env setup
    options = {"prompts": args.prompt, "reward": darkness, "autoreset_mode": "SameStep"}
    envs = gym.make_vec(args.env_id, args.num_envs, "vector_entry_point", None, None, **options)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=args.num_envs)
    num_steps, dim = envs.single_observation_space["patches"].shape
    agent = Agent()
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    # storage setup
    actions = torch.zeros(args.num_envs, num_steps, dim)
    logprobs, rewards, dones, values = (torch.zeros(args.num_envs, num_steps) for _ in range(4))

    # start the game
    global_step, start_time, returns = 0, time.time(), []
    next_obs, _ = envs.reset(seed=args.seed)
    next_done = torch.zeros(args.num_envs)
    for iteration in range(1, args.total_timesteps // (args.num_envs * num_steps) + 1):
        text, text_mask = (torch.as_tensor(next_obs[key].copy()) for key in ("text", "text_mask"))  # of the episodes
        for step in range(num_steps):
            global_step += args.num_envs
            dones[:, step] = next_done
            obs = {key: torch.as_tensor(value) for key, value in next_obs.items()}

            # action logic
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(obs)
            actions[:, step], logprobs[:, step], values[:, step] = action, logprob, value

            # execute the game and log data.
            next_obs, reward, terminations, truncations, infos = envs.step(action.numpy())
            next_done = torch.as_tensor(np.logical_or(terminations, truncations)).float()
            rewards[:, step] = torch.as_tensor(reward)
        returns.append(float(np.mean(envs.return_queue)))
        writer.add_scalar("charts/episodic_return", returns[-1], global_step)

        # bootstrap value if not done: all episodes are, so nothing comes after the last step
        advantages, lastgaelam = torch.zeros_like(rewards), 0.0
        for t in reversed(range(num_steps)):
            nextnonterminal = 1.0 - (next_done if t == num_steps - 1 else dones[:, t + 1])
            nextvalues = 0.0 if t == num_steps - 1 else values[:, t + 1]
            delta = rewards[:, t] + args.gamma * nextvalues * nextnonterminal - values[:, t]
            advantages[:, t] = lastgaelam = delta + args.gamma * args.gae_lambda * nextnonterminal * lastgaelam
        b_returns = advantages + values

        # Optimizing the policy and value network, by whole episodes
        approx_kl = torch.zeros(())
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(args.num_envs).chunk(args.num_minibatches):
                mb_obs = {"text": text[mb_inds], "text_mask": text_mask[mb_inds]}
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb_obs, actions[mb_inds])
                logratio = newlogprob - logprobs[mb_inds]
                ratio = logratio.exp()
                approx_kl = ((ratio - 1) - logratio).mean().detach()
                if approx_kl > args.target_kl:
                    break
                mb_advantages = advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

                # Policy loss
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # Value loss
                v_loss = 0.5 * ((newvalue - b_returns[mb_inds]) ** 2).mean()

                loss = pg_loss - args.ent_coef * entropy.mean() + v_loss * args.vf_coef
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
            if approx_kl > args.target_kl:
                break

        # record rewards for plotting purposes
        writer.add_scalar("losses/value_loss", v_loss.item(), global_step)
        writer.add_scalar("losses/policy_loss", pg_loss.item(), global_step)
        writer.add_scalar("losses/approx_kl", approx_kl.item(), global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - start_time)), global_step)
        print(f"iteration={iteration}, episodic_return={returns[-1]:.2f}, approx_kl={approx_kl:.3f}")
    envs.close()
    writer.close()
    return returns


if __name__ == "__main__":
    main(tyro.cli(Args))
