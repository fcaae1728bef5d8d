"""Prompts: one resolver for every command, the published sets, and generated GenEval-style prompts."""

from noisear_rl.prompts.resolve import categories_of, resolve_prompts
from noisear_rl.prompts.sets import PUBLISHED, PromptSet, load_prompt_set

__all__ = ["PUBLISHED", "PromptSet", "categories_of", "load_prompt_set", "resolve_prompts"]
