"""Number formats: how each is rounded, grouped, packed and read back. One rule per format, in one place."""
