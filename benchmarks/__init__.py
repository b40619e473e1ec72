"""Measurements: comparisons of methods, and micro-benchmarks of single parts."""
