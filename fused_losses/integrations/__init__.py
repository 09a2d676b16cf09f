"""Bridges to other libraries, each in a module of its own. Nothing else here imports them, and they import theirs late."""
