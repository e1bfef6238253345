"""Models: AnnData in, AnnData out."""
