"""Experimental losses: the docstrings say what is our interpretation of a paper without public code."""
