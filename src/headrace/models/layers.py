"""Which layers see all positions and which a sliding window, as Hugging Face configs say it."""

from collections.abc import Sequence

from headrace.models.config import Config
from headrace.models.spec import LayerSpec


def layer_types(config: Config, num_layers: int, default: Sequence[str]) -> Sequence[str]:
    """``layer_types``, one of ``full_attention`` and ``sliding_attention`` per layer, or else the default."""
    if not config.has("layer_types"):
        return default
    kinds = config.items("layer_types")
    known = ("full_attention", "sliding_attention")
    if len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise config.wrong("layer_types", f"{num_layers} of {known}", kinds)
    return [str(kind) for kind in kinds]


def windowed(config: Config, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Qwen's rule: with ``use_sliding_window``, layers from ``max_window_layers`` on see ``sliding_window`` positions.
    An explicit ``layer_types`` overrules where, but not whether."""
    window = config.positive("sliding_window", 4096) if config.boolean("use_sliding_window", False) else 0
    config.skip("sliding_window")
    first = config.integer("max_window_layers", 28) if window else len(layers)
    default = ["full_attention" if i < first else "sliding_attention" for i in range(len(layers))]
    kinds = layer_types(config, len(layers), default)
    return tuple(
        LayerSpec(rope=layer.rope, window=window if kind == "sliding_attention" else 0)
        for layer, kind in zip(layers, kinds, strict=True)
    )
