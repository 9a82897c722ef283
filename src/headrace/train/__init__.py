"""Training over the graph that is served: quantization-aware, by distillation, exactly resumable."""

from headrace.train.hf import fake_quantize, masters

__all__ = ["fake_quantize", "masters"]
