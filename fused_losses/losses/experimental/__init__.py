"""Readings of papers that have no public code: docstrings say what is a reading."""
