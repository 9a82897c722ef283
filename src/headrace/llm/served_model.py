"""What `LLM` and `AsyncLLM` share: a loaded model with an engine around it, and what can be asked of it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.graph.cost import Formats
from headrace.llm.config import LLMConfig
from headrace.llm.loader import LoadedModel, load_model, stored_formats
from headrace.llm.report import describe_start
from headrace.llm.runtime import Runtime
from headrace.text.tokenizer import Tokenizer


class ServedModel:
    """Loads a model and builds its engine; running it is left to the subclasses."""

    def __init__(self, name: str | None, config: LLMConfig) -> None:
        start = time.perf_counter()
        self._config = config
        self._model: LoadedModel = load_model(name, config)
        self._executor = self._model.executor
        max_model_len = self._model.memory.max_model_len
        engine_config = EngineConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prefill_chunk=config.max_prefill_chunk,
            max_model_len=max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        engine = Engine(self._executor, engine_config)
        self._runtime = Runtime(engine, self._model.text.tokenizer, max_model_len)
        self._load_seconds = time.perf_counter() - start

    @property
    def model(self) -> LoadedModel:
        """What was loaded: graph, weights, executor, memory. For looking at; the engine alone runs its steps."""
        return self._model

    @property
    def model_name(self) -> str:
        """The model as its user names it."""
        return self._model.name

    @property
    def max_model_len(self) -> int:
        """The context window in tokens: prompt and output together."""
        return self._runtime.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.text.tokenizer

    @property
    def num_threads(self) -> int:
        """Threads that run a step."""
        return getattr(self._executor, "num_threads", 1)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """A conversation as the token ids that the model expects.

        Raises TemplateError if the model has no usable chat template, or if the template refuses the messages.
        """
        template = self._model.text.template
        text = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_arguments)
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself

    def describe(self) -> str:
        """What was loaded, how long each part of the start took, how much KV fits, which kernels were chosen."""
        return describe_start(self._model, self._config, self._load_seconds)

    def formats(self) -> Formats:
        """Bytes that the model's numbers take, for the cost model."""
        return stored_formats(self._model.graph, self._model.weights, self._config.kv_format)
