"""Datasets on disk: rollouts, preference pairs from them, and the pairs that pretraining reads."""
