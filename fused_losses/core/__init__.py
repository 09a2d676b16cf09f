"""Mathematics and contracts: inputs, outputs, checks, options, divergences. It imports torch alone."""
