"""This package holds modules for models: an LM head, a loss inside a model's forward, and a moving reference."""
