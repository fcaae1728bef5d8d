"""Figures of trainings and comparisons, and the self-contained HTML page."""
