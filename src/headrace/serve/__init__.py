"""The HTTP server: the OpenAI API over one model, with its errors, limits, metrics and shutdown."""
