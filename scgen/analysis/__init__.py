"""Questions put to a trained VAE; the methods of the models call these functions."""
