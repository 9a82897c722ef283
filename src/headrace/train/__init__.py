"""Training over the graph that is served: quantization-aware, by distillation, exactly resumable."""
