"""Modules and models: a head as a module, a loss inside a model's forward, a reference that follows its policy."""
