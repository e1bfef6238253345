"""How good a model and an integration are."""
