"""A start in a few lines, for logs and terminals."""

from headrace.llm.config import LLMConfig
from headrace.llm.loader import LoadedModel


def describe_start(model: LoadedModel, config: LLMConfig, load_seconds: float) -> str:
    """What was loaded, the time of each part, the KV blocks, the kernels."""
    spec, memory = model.spec, model.memory
    num_params = sum(_count(param.shape) for param in model.graph.params.values())
    stored = sum(model.weights[param].num_bytes for param in model.graph.params)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in model.seconds.items())
    describe = getattr(model.executor, "describe", None)
    return "\n".join(
        [
            f"model    {model.name}: {spec.family}, {spec.num_layers} layers, {num_params / 1e6:.0f} M parameters,"
            f" {stored / 2**20:.0f} MiB stored, context {memory.max_model_len}",
            f"start    {load_seconds:.2f} s ({parts})",
            f"KV       {memory.num_blocks} blocks of {config.block_size} tokens, {config.kv_format}:"
            f" {memory.kv_bytes / 2**20:.0f} MiB of {memory.available / 2**30:.1f} GiB free;"
            f" prefix caching {'on' if config.enable_prefix_caching else 'off'}",
            *(f"{'kernels' if i == 0 else '':<8} {line}" for i, line in enumerate(describe() if describe else [])),
        ]
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
