"""Read an AnnData: record which parts the models use, check them, and turn them into tensors."""
