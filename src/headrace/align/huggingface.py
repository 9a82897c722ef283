"""A side that Hugging Face transformers runs: the same tokens through somebody else's implementation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.align.divergence import Scores
from headrace.align.options import DTYPES, options_in
from headrace.align.taps import Tap
from headrace.base.errors import CheckpointError, InvalidRequestError, MissingDependencyError
from headrace.engine.step import Float32
from headrace.formats.weights import Weights
from headrace.graph.ir import Graph
from headrace.llm.loader import OpenedModel, open_model
from headrace.models import sources
from headrace.models.sources import Transform

_BY_HEAD = ("q_norm", "k_norm")  # families lay their rows out in different ways
_ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersSide:
    """A model in transformers.

    Attributes:
        model: as `headrace serve` takes it: a folder, which transformers reads itself; a GGUF file, whose weights
            headrace decodes and whose metadata transformers reads; a hub name; empty: the embedded one.
        dtype: float32, float64, bfloat16 or float16.
        attn: transformers' implementation of attention: eager or sdpa.
    """

    model: str = ""
    dtype: str = "float32"
    attn: str = "eager"

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("attn", _ATTENTIONS)):
            if getattr(self, name) not in known:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not known.", f"Use one of {', '.join(known)}."
                )

    @property
    def title(self) -> str:
        """The line that names it."""
        return f"hf:{self.model or 'smollm2-135m'}?dtype={self.dtype}&attn={self.attn}"


def transformers_named(text: str) -> TransformersSide:
    """``hf:MODEL?dtype=float32&attn=eager``. Raises InvalidRequestError for a key or a value that is not known."""
    model, _, options = text.removeprefix("hf:").partition("?")
    return TransformersSide(model=model, **options_in(text, options, ("dtype", "attn")))


@dataclass(frozen=True, slots=True)
class OpenTransformers:
    """A loaded model, and the graph that its modules are named by.

    `outputs` and `inputs` say which module's output, or first input, a node's value is.
    """

    graph: Graph
    weights: Weights
    module: Any
    outputs: Mapping[str, str]
    inputs: Mapping[str, str]

    def scores(self, tokens: Sequence[Sequence[int]]) -> Iterator[Scores]:
        """Logits of each text."""
        for ids in tokens:
            yield self._run(ids)

    @contextmanager
    def tapping(self, ids: Sequence[int]) -> Iterator[Tap]:
        """Values of the nodes that some module reads or makes on one text; of others, such as rotated keys, none."""
        values = self._values(ids)
        yield lambda names: {name: values[name] for name in names if name in values}

    @torch.inference_mode()
    def _run(self, ids: Sequence[int]) -> Float32:
        logits: Tensor = self.module(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.float().numpy()

    def _values(self, ids: Sequence[int]) -> dict[str, Float32]:
        found: dict[str, Float32] = {}

        def keep(node: str, value: Tensor) -> None:
            found[node] = value.detach().float().reshape(len(ids), -1).numpy().copy()

        hooks = [
            self.module.get_submodule(path).register_forward_hook(lambda _m, _i, made, node=node: keep(node, made))
            for node, path in self.outputs.items()
        ] + [
            self.module.get_submodule(path).register_forward_pre_hook(lambda _m, given, node=node: keep(node, given[0]))
            for node, path in self.inputs.items()
        ]
        try:
            self._run(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def open_transformers(side: TransformersSide) -> OpenTransformers:
    """Load it. Raises MissingDependencyError without transformers, CheckpointError for what it cannot load, and as
    `headrace.llm.loader.open_model` does."""
    model = open_model(side.model or None)
    module = _load(model, side)
    module.eval()
    outputs = {"logits": "lm_head"}
    modules = dict(module.named_modules())
    for name, source in sources(model.spec, "hf").items():
        node, path = name.removesuffix(".weight"), source.name.removesuffix(".weight")
        if name.endswith(".weight") and path in modules and not node.endswith(_BY_HEAD):
            outputs[node] = path
    inputs = {
        reader.inputs[0]: outputs[reader.name]
        for reader in model.graph.nodes
        if reader.name in outputs and reader.inputs and reader.inputs[0] not in outputs
    }
    names = {node.name for node in model.graph.nodes}
    assert outputs.keys() <= names, f"no nodes: {outputs.keys() - names}"
    return OpenTransformers(model.graph, model.weights, module, outputs, inputs)


def _load(model: OpenedModel, side: TransformersSide) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingDependencyError("A side hf:… needs transformers.", "pip install transformers") from error
    options = {"dtype": getattr(torch, side.dtype), "attn_implementation": side.attn}
    kind: Any = transformers.AutoModelForCausalLM
    path = model.path
    try:
        if path.is_dir():
            return kind.from_pretrained(path, local_files_only=True, **options)
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        module = kind.from_config(config, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(f"transformers cannot load {path}: {cause}.", "Give a model that it knows.") from error
    _fill(module, model)
    return module


@torch.no_grad()
def _fill(module: Any, model: OpenedModel) -> None:
    """Give it the values of a GGUF file's tensors, decoded, under the names that they have in a folder."""
    given = module.state_dict()
    left = set(given)
    for name, source in sources(model.spec, "hf").items():
        values = torch.from_numpy(model.weights[name].to_f32().copy())
        given[source.name].copy_(values - 1 if source.transform is Transform.ADD_ONE else values)
        left.discard(source.name)
    if getattr(module.config, "tie_word_embeddings", False):
        left.discard("lm_head.weight")
    if left:
        raise CheckpointError(
            f"{model.path} has no {min(left)}, which transformers wants.", "Give a folder of the model."
        )
