"""Compute calls: operators, plans, matrix products, parallelism. No loss is known here by its name."""
