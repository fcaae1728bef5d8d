"""Comparisons: paired scores, intervals, diversity and tables."""
