"""The closed set of ops: what each reads, what it makes, and the shape rule that holds it to that.

| op | inputs | params | attrs | output |
|---|---|---|---|---|
| ``embed`` | – (the step's token ids) | table [vocab, hidden] | scale | row ``scale * table[id]`` |
| ``rms_norm`` | x | weight [group] | eps, group | each run of `group` features: x / rms(x) * weight |
| ``linear`` | x | weights [out_i, in] …, then, if bias, biases [out_i] … | parts, bias | x @ W_iᵀ + b_i, side by side |
| ``slice`` | x | – | start, size | columns start … start + size: a view |
| ``add`` | a, b | – | – | a + b |
| ``glu`` | gate, up | – | activation: silu or gelu_tanh | activation(gate) * up |
| ``rope`` | x | – | head_dim, rope | every head of x rotated at its row's position |
| ``attention`` | q, k, v | – | layer, num_heads, num_kv_heads, head_dim, scale, window | see below |
| ``select_rows`` | x | – | – | the rows that the step samples |

``attention`` appends k and v to the KV cache of `layer`, then each query attends to the keys of its own sequence at
positions ``max(0, p - window + 1) … p`` (``window`` 0: all up to p) with scores ``scale * q·k``. Query head h reads KV
head ``h // (num_heads // num_kv_heads)``.

A parameter vector (norm weight, bias) is f32 when it reaches an executor; the norm's weight is the factor itself.
"""

# ruff: noqa: ARG001 (every shape rule has the one signature; few need all of it)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.graph.ir import Attr, Graph, Node, Param, RopeTable, Rows


@dataclass(frozen=True, slots=True)
class Operand:
    """What a shape rule sees of an input value."""

    rows: Rows
    features: int


ShapeRule = Callable[[Sequence[Operand], Sequence[Param], Mapping[str, Attr]], Operand]


@dataclass(frozen=True, slots=True)
class Op:
    """An op's name, the attributes it takes, and its shape rule."""

    name: str
    num_inputs: int
    attrs: frozenset[str]
    shape: ShapeRule


def _expect(condition: bool, message: str) -> None:
    """For messages that cost little: a start makes thousands of these checks, and each message whether or not it is
    needed. Those that print operands or parameters are raised outright."""
    if not condition:
        raise ValueError(message)


def _int(attrs: Mapping[str, Attr], name: str) -> int:
    value = attrs[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an int, not {value!r}")
    return value


def _embed(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    _expect(len(params) == 1 and len(params[0].shape) == 2, "embed takes one table [vocab, hidden]")
    return Operand(Rows.TOKENS, params[0].shape[1])


def _rms_norm(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    group = _int(attrs, "group")
    _expect(group > 0 and inputs[0].features % group == 0, f"group {group} does not divide {inputs[0].features}")
    _expect([p.shape for p in params] == [(group,)], f"rms_norm takes one weight [{group}]")
    return inputs[0]


def _linear(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    parts = _int(attrs, "parts")
    _expect(parts >= 1, "linear takes one weight or more")
    _expect(len(params) == parts * (2 if attrs["bias"] else 1), f"{len(params)} params for {parts} parts")
    weights, biases = params[:parts], params[parts:]
    for weight in weights:
        _expect(len(weight.shape) == 2, f"{weight.name} is not a matrix")
        if weight.shape[1] != inputs[0].features:
            raise ValueError(f"{weight.name} {weight.shape} x {inputs[0].features} features")
    for weight, bias in zip(weights, biases, strict=False):
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias.name} {bias.shape} does not match {weight.name} {weight.shape}")
    return Operand(inputs[0].rows, sum(weight.shape[0] for weight in weights))


def _slice(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    start, size = _int(attrs, "start"), _int(attrs, "size")
    _expect(start >= 0 and size > 0 and start + size <= inputs[0].features, f"slice {start}+{size} leaves its input")
    return Operand(inputs[0].rows, size)


def _same(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    if inputs[0] != inputs[1]:
        raise ValueError(f"operands differ: {inputs[0]} and {inputs[1]}")
    return inputs[0]


def _glu(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    _expect(attrs["activation"] in ("silu", "gelu_tanh"), f"unknown activation {attrs['activation']!r}")
    return _same(inputs, params, attrs)


def _rope(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    head_dim, table = _int(attrs, "head_dim"), attrs["rope"]
    _expect(isinstance(table, RopeTable), "rope must be a RopeTable")
    assert isinstance(table, RopeTable)
    _expect(inputs[0].features % head_dim == 0, f"head_dim {head_dim} does not divide {inputs[0].features}")
    _expect(0 < table.rotary_dim <= head_dim, f"rotary_dim {table.rotary_dim} exceeds head_dim {head_dim}")
    return inputs[0]


def _attention(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    heads, kv_heads, dim = _int(attrs, "num_heads"), _int(attrs, "num_kv_heads"), _int(attrs, "head_dim")
    _expect(kv_heads > 0 and heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} KV heads evenly")
    expected = [heads * dim, kv_heads * dim, kv_heads * dim]
    found = [value.features for value in inputs]
    _expect(found == expected, f"attention expects q, k, v of {expected} features, not {found}")
    _expect(all(value.rows is Rows.TOKENS for value in inputs), "attention reads token rows")
    return Operand(Rows.TOKENS, heads * dim)


def _select_rows(inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    _expect(inputs[0].rows is Rows.TOKENS, "select_rows reads token rows")
    return Operand(Rows.SAMPLED, inputs[0].features)


OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op("embed", 0, frozenset({"scale"}), _embed),
        Op("rms_norm", 1, frozenset({"eps", "group"}), _rms_norm),
        Op("linear", 1, frozenset({"parts", "bias"}), _linear),
        Op("slice", 1, frozenset({"start", "size"}), _slice),
        Op("add", 2, frozenset(), _same),
        Op("glu", 2, frozenset({"activation"}), _glu),
        Op("rope", 1, frozenset({"head_dim", "rope"}), _rope),
        Op(
            "attention",
            3,
            frozenset({"layer", "num_heads", "num_kv_heads", "head_dim", "scale", "window"}),
            _attention,
        ),
        Op("select_rows", 1, frozenset(), _select_rows),
    )
}


def output_of(op: str, inputs: Sequence[Operand], params: Sequence[Param], attrs: Mapping[str, Attr]) -> Operand:
    """The output's rows and features; ValueError, saying why, if the op does not take these operands."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}")
    rule = OPS[op]
    if len(inputs) != rule.num_inputs:
        raise ValueError(f"{op} takes {rule.num_inputs} inputs, not {len(inputs)}")
    if attrs.keys() != rule.attrs:
        raise ValueError(f"{op} takes attributes {sorted(rule.attrs)}, not {sorted(attrs)}")
    return rule.shape(inputs, params, attrs)


def validate(graph: Graph) -> None:
    """Check every node against its op's rule; ValueError naming the first node that breaks it."""
    seen: dict[str, Node] = {}
    for node in graph.nodes:
        try:
            _expect(node.name not in seen, "its name is taken")
            inputs = [Operand(seen[name].rows, seen[name].features) for name in node.inputs]
            made = output_of(node.op, inputs, [graph.params[name] for name in node.params], node.attrs)
            if (made.rows, made.features) != (node.rows, node.features):
                raise ValueError(f"it declares {node.rows} x {node.features}, not {made}")
        except KeyError as missing:
            raise ValueError(f"node {node.name}: {missing} is not defined before it") from None
        except ValueError as error:
            raise ValueError(f"node {node.name}: {error}") from None
        seen[node.name] = node
    _expect(graph.output in seen, f"output {graph.output!r} is not a node")
