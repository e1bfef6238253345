"""Code with a version for each device: log-likelihoods of counts, and dense rows of sparse matrices."""
