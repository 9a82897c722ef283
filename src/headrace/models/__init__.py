"""Model families: from a checkpoint's own description to a spec, from the spec to the graph, one file per family."""

from headrace.models.decoder import build_graph
from headrace.models.registry import ignorable, load_spec, sources
from headrace.models.spec import LayerSpec, ModelSpec

__all__ = ["LayerSpec", "ModelSpec", "build_graph", "ignorable", "load_spec", "sources"]
