"""Figures of a training or a comparison, and the self-contained HTML page."""
