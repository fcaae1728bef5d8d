"""Datasets on disk: rollouts, preference pairs made from them, and the pairs used for pretraining."""
