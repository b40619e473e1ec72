"""Micro-benchmarks of single parts."""
