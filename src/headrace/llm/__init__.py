"""The composition root: a name becomes spec, graph, weights, executor and engine; `LLM` and `AsyncLLM` drive them."""
