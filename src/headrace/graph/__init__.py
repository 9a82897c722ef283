"""The one description of a model: a small dataflow graph over a closed set of ops, and its rewrites and price."""
