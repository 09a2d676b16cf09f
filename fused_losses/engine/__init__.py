"""How a call is carried out: operators, plans, products, parallelism. No loss is known here by its name."""
