"""From cells to an embedding in one call: integration, the choice of settings, clustering."""
