"""headrace: run, price and check a language model from one description of it.

The public names load lazily, so that ``import headrace`` (and ``headrace --help``) costs milliseconds.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headrace.base.errors import HeadraceError
    from headrace.engine.sampling import SamplingParams
    from headrace.llm.async_llm import AsyncLLM
    from headrace.llm.llm import LLM
    from headrace.llm.outputs import CompletionOutput, RequestOutput

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "HeadraceError", "RequestOutput", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "headrace.llm.llm",
    "AsyncLLM": "headrace.llm.async_llm",
    "RequestOutput": "headrace.llm.outputs",
    "CompletionOutput": "headrace.llm.outputs",
    "SamplingParams": "headrace.engine.sampling",
    "HeadraceError": "headrace.base.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
