"""How many parameters a `config.json` describes, by class, in all and per token, without building the model."""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.base.errors import UnsupportedModelError
from headrace.models.config import Config

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MOE = ("mixtral", "qwen3_moe")
MLA = ("deepseek_v3", "kimi_k2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What attention keeps per token and layer, in values: of keys and values, or of their latent (`is_latent`).

    Attributes:
        num_kv_heads, head_dim: of grouped-query attention.
        latent: values of a latent and its rotary part, which all heads share (MLA, arXiv:2405.04434); 0: no latent.
        windowed_layers, window: layers that see so many positions and keep no more.
    """

    num_kv_heads: int
    head_dim: int
    latent: int = 0
    windowed_layers: int = 0
    window: int = 0

    @property
    def values(self) -> int:
        """Per token and layer."""
        return self.latent or 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Counts of parameters by class, and what memory plans need besides. Norms within attention count as norms."""

    kind: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    attention_kind: Attention
    embeddings: int
    head: int
    attention: int
    dense_mlp: int
    experts: int
    active_experts: int
    shared_experts: int
    router: int
    norms: int
    biases: int

    @property
    def total(self) -> int:
        """All that is stored."""
        rest = self.dense_mlp + self.experts + self.shared_experts + self.router + self.norms + self.biases
        return self.embeddings + self.head + self.attention + rest

    @property
    def activated(self) -> int:
        """What one token passes through, embeddings included."""
        return self.total - self.experts + self.active_experts


def count_parameters(values: Mapping[str, object]) -> ModelShape:
    """Count the parameters of a Hugging Face config. Layers that predict several tokens ahead are not counted.

    Raises:
        UnsupportedModelError: a `model_type` that is not known here.
        CheckpointError: a key that is missing or of the wrong type.
    """
    config = Config(values, "config.json")
    kind = config.text("model_type")
    if kind not in DENSE + MOE + MLA:
        known = ", ".join(sorted(DENSE + MOE + MLA))
        raise UnsupportedModelError(f"model_type {kind!r} in config.json cannot be counted.", f"Known: {known}.")
    hidden, layers, vocab = (config.positive(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    attention, attention_norms, biases, keeps = _latent(config) if kind in MLA else _grouped(config, kind)
    matrix = 3 * hidden  # gate, up and down of one feature
    sparse, expert_size, num_experts, active, shared = _experts(config, kind, layers)
    dense_size = config.positive("intermediate_size") if layers > sparse else 0
    mlp_biases = (2 * dense_size + hidden) * layers if kind == "llama" and config.boolean("mlp_bias", False) else 0
    return ModelShape(
        kind=kind,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        intermediate_size=max(dense_size, (active + shared) * expert_size),
        attention_kind=keeps,
        embeddings=vocab * hidden,
        head=0 if config.boolean("tie_word_embeddings", False) else vocab * hidden,
        attention=layers * attention,
        dense_mlp=(layers - sparse) * matrix * dense_size,
        experts=sparse * num_experts * matrix * expert_size,
        active_experts=sparse * active * matrix * expert_size,
        shared_experts=sparse * shared * matrix * expert_size,
        router=sparse * (num_experts * hidden + (num_experts if kind in MLA else 0)),
        norms=layers * (attention_norms + 2 * hidden) + hidden,
        biases=layers * biases + mlp_biases,
    )


def _experts(config: Config, kind: str, layers: int) -> tuple[int, int, int, int, int]:
    """Layers with experts, an expert's size, how many there are, how many a token takes, how many are shared."""
    if kind in DENSE:
        return 0, 0, 0, 0, 0
    active = config.positive("num_experts_per_tok")
    if kind == "mixtral":
        return layers, config.positive("intermediate_size"), config.positive("num_local_experts"), active, 0
    size = config.positive("moe_intermediate_size")
    if kind in MLA:
        sparse = max(0, layers - config.integer("first_k_dense_replace", 0))
        return sparse, size, config.positive("n_routed_experts"), active, config.integer("n_shared_experts", 0)
    step = config.positive("decoder_sparse_step", 1)
    dense = set(config.items("mlp_only_layers")) if config.has("mlp_only_layers") else set()
    sparse = sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
    return sparse, size, config.positive("num_experts"), active, 0


def _grouped(config: Config, kind: str) -> tuple[int, int, int, Attention]:
    """Of one layer: matrices, norms, biases; what it keeps of a token."""
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    kv_heads = config.positive("num_key_value_heads", heads)
    size = config.positive("head_dim", hidden // heads)
    biases = 0
    if kind == "qwen2" or (kind in ("llama", "qwen3", "qwen3_moe") and config.boolean("attention_bias", False)):
        biases = size * (heads + 2 * kv_heads) + (0 if kind == "qwen2" else hidden)
    norms = 2 * size if kind.startswith("qwen3") else 0
    window, windowed = 0, 0
    if config.has("sliding_window") and (kind in ("mistral", "mixtral") or config.boolean("use_sliding_window", False)):
        window = config.positive("sliding_window")
        layers = config.positive("num_hidden_layers")
        full = config.integer("max_window_layers", layers) if kind.startswith("qwen") else 0
        windowed = max(0, layers - full)
    keeps = Attention(num_kv_heads=kv_heads, head_dim=size, windowed_layers=windowed, window=window)
    return hidden * size * 2 * (heads + kv_heads), norms, biases, keeps


def _latent(config: Config) -> tuple[int, int, int, Attention]:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1), with or without a latent for queries."""
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    kv_rank = config.positive("kv_lora_rank")
    nope, rope, value = (config.positive(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank = config.positive("q_lora_rank") if config.has("q_lora_rank") else 0
    queries = q_rank * (hidden + heads * (nope + rope)) if q_rank else hidden * heads * (nope + rope)
    keys = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    keeps = Attention(num_kv_heads=1, head_dim=kv_rank + rope, latent=kv_rank + rope)
    return queries + keys + heads * value * hidden, q_rank + kv_rank, 0, keeps
