"""Models and names of scvi-tools."""
