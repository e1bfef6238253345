"""The parts of a variational auto-encoder: tensors in, distributions out."""
