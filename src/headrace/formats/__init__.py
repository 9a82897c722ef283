"""Model files in and out of memory: finding a model by name, opening its files, loading a graph's parameters."""
