"""Comparisons of methods: paired scores, intervals, diversity and tables."""
