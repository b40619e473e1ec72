"""Torch: cutting a network, merging features, averaging states, dropout, schedule, evaluation."""
