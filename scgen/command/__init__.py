"""What the command `scgen` is made of, besides `scgen.cli`: its flags, the files that it reads and writes."""
