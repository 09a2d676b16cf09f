"""Define inputs, outputs, checks, options, divergences and their mathematics; this package imports only torch."""
