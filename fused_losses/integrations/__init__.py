"""Bridges to other libraries, each in a module of its own, which nothing else in the package imports."""
