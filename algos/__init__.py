"""Algorithms that improve the policy: one file each, readable from top to bottom."""
