"""Training a module: the loop, its options, its optimiser, and what it watches."""
