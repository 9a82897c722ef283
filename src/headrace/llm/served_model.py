"""What `LLM` and `AsyncLLM` share: a loaded model with an engine around it, and what can be asked of it."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from headrace.base.errors import InvalidRequestError
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.graph.cost import Formats
from headrace.llm.config import LLMConfig
from headrace.llm.loader import LoadedModel, Stopwatch, load_model, stored_formats
from headrace.llm.refit import WeightSource, WeightUpdate, as_served, read_update
from headrace.llm.report import describe_start
from headrace.llm.runtime import Runtime
from headrace.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How a running model takes new weights.

    Attributes:
        version: what tokens are to carry that the new weights give: above every version there has been; None: the next.
        running: what becomes of requests that are being served. "continue": they go on from the keys and values that
            the old weights gave, so the rest of their output mixes both. "recompute": what they have so far is computed
            again first, so every later token is the new weights' alone.
        keep_previous: hold on to the old weights, as packed, for `rollback_weights`; takes their memory once more.
        sha256: digests to check the source by: of every weight file by its name, or of every tensor by its own.
    """

    version: int | None = None
    running: str = "continue"
    keep_previous: bool = False
    sha256: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.running not in ("continue", "recompute"):
            raise InvalidRequestError(
                f"running={self.running!r} is not known.", 'Use "continue" or "recompute".', code="invalid_value"
            )


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
        self._updating = threading.Lock()  # held by the one update that may go on
        self._newest = 0  # the highest version there has been: going back does not free a number for other weights
        self._previous: tuple[int, object] | None = None  # version and packed weights to go back to
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

    @property
    def weight_version(self) -> int:
        """Of the weights that the next step runs with; 0 for those the model was loaded with."""
        return self._runtime.engine.weight_version

    @contextmanager
    def _one_update(self) -> Iterator[None]:
        if not self._updating.acquire(blocking=False):
            raise InvalidRequestError(
                "Another weight update is going on.", "Wait for its end, then send this one.", code="update_in_progress"
            )
        try:
            yield
        finally:
            self._updating.release()

    def _stage(self, source: WeightSource, options: UpdateOptions) -> tuple[object, WeightUpdate]:
        """Read, convert and pack new weights while the engine goes on; all that can be wrong with them shows here."""
        replaced = self.weight_version
        version = self._newest + 1 if options.version is None else options.version
        if version <= self._newest:
            raise InvalidRequestError(
                f"Version {version} is not above {self._newest}, the newest there has been.",
                "Number weights upwards: a token's version must say which weights gave it.",
            )
        watch = Stopwatch()
        with watch.part("read"):
            given = read_update(source, self._model, options.sha256)
        with watch.part("convert"):
            served = self._model.weights
            made = {name: as_served(name, tensor, served[name]) for name, tensor in given.items()}
        with watch.part("pack"):
            staged = self._executor.stage_weights(made)
        requantized = sum(made[name].format.block_size > 1 and made[name] is not given[name] for name in made)
        source_bytes = sum(tensor.num_bytes for tensor in given.values())
        return staged, WeightUpdate(version, replaced, len(made), requantized, source_bytes, dict(watch.parts))

    def _install(self, staged: object, update: WeightUpdate, options: UpdateOptions) -> WeightUpdate:
        """Between two steps: run with what `_stage` made from the next one on."""
        watch = Stopwatch()
        with watch.part("swap"):
            self._runtime.engine.install_weights(staged, update.version, recompute=options.running == "recompute")
        self._newest = max(self._newest, update.version)
        self._previous = (update.replaced, staged) if options.keep_previous else None
        return replace(update, seconds={**update.seconds, **watch.parts})

    def _roll_back(self, options: UpdateOptions) -> WeightUpdate:
        """Between two steps: run with the weights before the last update."""
        if self._previous is None:
            raise InvalidRequestError(
                "There are no previous weights to go back to.", "Update with keep_previous=True.", code="no_previous"
            )
        version, staged = self._previous
        update = WeightUpdate(version, self.weight_version, len(self._model.weights), 0, 0)
        return self._install(staged, update, replace(options, keep_previous=False))

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
