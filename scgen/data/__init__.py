"""Cells: what of an AnnData the models read, whether it is fit to be read, and how it becomes tensors."""
