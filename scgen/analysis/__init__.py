"""Functions that compute results from a trained VAE. The methods of the models call them."""
