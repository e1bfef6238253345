"""What is computed differently on each device: the count log-likelihoods, and sparse rows made dense."""
