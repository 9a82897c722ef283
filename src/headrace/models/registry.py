"""From a checkpoint's description to its family, and from there to spec and sources."""

from collections.abc import Mapping

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.models import gemma3, llama, mistral, qwen2, qwen3
from headrace.models.config import Config, Description
from headrace.models.family import Family, Kind
from headrace.models.sources import Source, StoredTensors
from headrace.models.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)


def load_spec(
    config: Mapping[str, object],
    kind: Kind,
    *,
    tensors: StoredTensors | None = None,
    context_length: int | None = None,
) -> ModelSpec:
    """Read a model's description.

    Args:
        config: the parsed `config.json`, or a GGUF file's metadata as plain values.
        kind: which of the two.
        tensors: the checkpoint's tensors by stored name. GGUF needs them: they tell whether the output matrix is
            tied, whether there are biases, and hold the factors of some rotary scalings.
        context_length: the longest context to be served, on which two rotary scalings depend; None: the model's own.

    Raises:
        UnsupportedModelError: an architecture, or a key's value, that is not built.
        CheckpointError: a key that is missing, of the wrong type, or contradicts another.
    """

    def description(reader: Config) -> Description:
        return Description(config=reader, tensors=tensors or {}, context_length=context_length)

    if kind == "hf":
        family = _hf_family(config)
        spec = family.from_hf(description(Config(config, "config.json")))
    else:
        assert tensors is not None, "GGUF metadata is read together with the file's tensors"
        where = "the GGUF metadata"
        architecture = Config(config, where).text("general.architecture")
        family = _find(architecture, "gguf_architectures", where)
        spec = family.from_gguf(description(Config(config, where, f"{architecture}.")))
    _check(spec)
    return spec


def sources(spec: ModelSpec, kind: Kind) -> Mapping[str, Source]:
    """Where each of the graph's parameters lies in a checkpoint of that kind, and what must be done to it."""
    (family,) = (each for each in FAMILIES if each.name == spec.family)
    return family.sources(spec, kind)


def ignorable(kind: Kind) -> tuple[str, ...]:
    """Shell-style patterns of tensor names that may be left unused without a word: they hold nothing of their own."""
    if kind == "hf":
        return ("*rotary_emb.inv_freq", "*.masked_bias", "lm_head.weight", "language_model.lm_head.weight")
    return ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "blk.*.attn_rot_embd")


def _hf_family(config: Mapping[str, object]) -> Family:
    """By ``architectures`` if the config names any, because ``model_type`` does not tell a language model from a
    classifier built on it; else by ``model_type``."""
    reader = Config(config, "config.json")
    if reader.has("architectures") and (names := reader.items("architectures")):
        return _find(str(names[0]), "architectures", reader.where)
    return _find(reader.text("model_type"), "model_types", reader.where)


def _find(name: str, field: str, where: str) -> Family:
    for family in FAMILIES:
        if name in getattr(family, field):
            return family
    known = sorted(each for family in FAMILIES for each in getattr(family, field))
    raise UnsupportedModelError(
        f"Architecture {name!r} in {where} is not supported.", f"Supported: {', '.join(known)}."
    )


def _check(spec: ModelSpec) -> None:
    """Numbers that are each sound and do not fit together."""
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(f"{spec.num_heads} attention heads do not share {spec.num_kv_heads} KV heads evenly.")
    if spec.head_dim % 2:
        raise CheckpointError(f"head_dim {spec.head_dim} is odd: rotary embeddings turn pairs of features.")
