"""A graph's parameters in the hands of the native runtime: packed matrices, raw tables, vectors, rotary tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace._native import Runtime, StagedWeights, packed_bytes
from headrace.base.errors import ExecutorError
from headrace.executors.weight_cache import WeightCache, sample_of
from headrace.graph.ir import Graph, RopeTable
from headrace.numerics.tensor import RawTensor


def planned_bytes(graph: Graph, weights: Mapping[str, RawTensor], isa: str | None, activation: str) -> int:
    """Bytes that `graph`'s parameters will take with that instruction set and activation, known before any is packed.

    Matrices in their packed form, embedding tables as they are stored (they are read in place), vectors in f32. Raises
    ExecutorError for a matrix that no kernel takes.
    """
    sizes: dict[tuple[str, bool], int] = {}
    for node in graph.nodes:
        parts = node.integer("parts") if node.op == "linear" else 0
        for i, name in enumerate(node.params):
            tensor, packed = weights[name], i < parts
            if packed:
                sizes[name, packed] = _packed_bytes(name, tensor, isa or "", activation)
            else:
                sizes[name, packed] = tensor.num_bytes if node.op == "embed" else 4 * tensor.shape[0]
    return sum(sizes.values())


def _packed_bytes(name: str, tensor: RawTensor, isa: str, activation: str) -> int:
    try:
        return packed_bytes(tensor.format.name, *tensor.shape, isa, activation)
    except ValueError as error:
        raise _no_kernel(name, error) from error


def _no_kernel(name: str, error: Exception) -> ExecutorError:
    return ExecutorError(
        f"No native kernel takes {name}: {error}.",
        "Load the model with weight_format='f32' (exact) or 'bf16' (rounded once more), or with executor='torch'.",
    )


class StagedUpdate:
    """Packed weights that wait to be exchanged with those a runtime has. See `PackedWeights.stage`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._staged = StagedWeights(runtime)
        self._tables: list[npt.NDArray[np.uint8]] = []  # read in place for as long as they, or their like, are in use

    def set_linear(self, number: int, tensor: RawTensor) -> None:
        self._staged.set_linear(number, tensor.format.name, tensor.stored, tensor.shape[1], tensor.interleaved_heads)

    def set_table(self, number: int, tensor: RawTensor) -> None:
        data = tensor.data
        self._staged.set_table(number, tensor.format.name, data, tensor.shape[1])
        self._tables.append(data)

    def set_vector(self, number: int, tensor: RawTensor) -> None:
        self._staged.set_vector(number, np.ascontiguousarray(tensor.to_f32().reshape(-1)))

    def exchange(self, held: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.uint8]]:
        """Swap with the runtime; given what its tables lie in, returns what they lie in now."""
        self._staged.exchange(self._runtime)
        tables, self._tables = self._tables, held
        return tables


class PackedWeights:
    """Numbers by which plans name parameters. Each parameter is handed over once, however many nodes share it."""

    def __init__(
        self, graph: Graph, weights: Mapping[str, RawTensor], runtime: Runtime, cache: WeightCache | None = None
    ) -> None:
        self._runtime = runtime
        self._linears: dict[str, int] = {}
        self._tables: dict[str, int] = {}
        self._vectors: dict[str, int] = {}
        self._rotations: dict[RopeTable, int] = {}
        self._unpacked: list[npt.NDArray[np.uint8]] = []  # what the runtime reads until it is packed
        self._table_data: list[
            npt.NDArray[np.uint8]
        ] = []  # of the last update; the first ones the runtime itself holds
        for node in graph.nodes:
            parts = node.integer("parts") if node.op == "linear" else 0
            for i, name in enumerate(node.params):
                tensor = weights[name]
                assert tensor.shape == graph.params[name].shape, f"{name} is {tensor.shape}"
                if node.op == "embed":
                    self._add_table(name, tensor)
                elif i < parts:
                    self._add_linear(name, tensor)
                else:
                    self._add_vector(name, tensor)
            if node.op == "rope":
                self._add_rotation(node.rope())
        self.from_cache = self._pack(weights, cache)
        self._unpacked.clear()

    def stage(self, weights: Mapping[str, RawTensor]) -> StagedUpdate:
        """Pack other values of every parameter beside running steps, on the calling thread.

        Raises ExecutorError for other formats or shapes than the runtime has, MemoryError if there is no room for both.
        """
        update = StagedUpdate(self._runtime)
        for numbers, set_one in (
            (self._linears, update.set_linear),
            (self._tables, update.set_table),
            (self._vectors, update.set_vector),
        ):
            for name, number in numbers.items():
                try:
                    set_one(number, weights[name])
                except (ValueError, TypeError) as error:
                    raise ExecutorError(f"{name} cannot take the place of the one that runs: {error}.") from error
        return update

    def swap(self, update: StagedUpdate) -> None:
        """Exchange the runtime's weights for those of `update`, which then holds the old ones. No step may run."""
        self._table_data = update.exchange(self._table_data)

    def linear(self, name: str) -> int:
        return self._linears[name]

    def table(self, name: str) -> int:
        return self._tables[name]

    def vector(self, name: str) -> int:
        return self._vectors[name]

    def rotation(self, table: RopeTable) -> int:
        return self._rotations[table]

    def kernels(self) -> list[dict[str, Any]]:
        """Each kernel in use: its name, the stored format and shape it serves, how many weights, their packed bytes."""
        found: dict[tuple[str, int, int], dict[str, Any]] = {}
        for index in self._linears.values():
            info = self._runtime.describe_linear(index)
            key = (info["kernel"], info["out_features"], info["in_features"])
            entry = found.setdefault(key, {**info, "packed_bytes": 0, "count": 0})
            entry["count"] += 1
            entry["packed_bytes"] += info["packed_bytes"]
        return list(found.values())

    def _pack(self, weights: Mapping[str, RawTensor], cache: WeightCache | None) -> bool:
        """Take the packed matrices from the cache, or make them and leave them there; returns whether they were."""
        if cache is None:
            self._runtime.pack()
            return False
        description = {
            "isa": self._runtime.isa,
            "activation": self._runtime.activation,
            "matrices": [self._describe(name, weights[name]) for name in self._linears],
        }
        if cache.load(description, self._runtime):
            return True
        cache.keep(description, self._runtime.pack())
        return False

    def _describe(self, name: str, tensor: RawTensor) -> list[str | int]:
        info = self._runtime.describe_linear(self._linears[name])
        stored = [tensor.format.name, *tensor.shape, tensor.interleaved_heads, sample_of(tensor.stored)]
        return [name, *stored, info["kernel"], info["packed_bytes"]]

    def _add_linear(self, name: str, tensor: RawTensor) -> None:
        if name not in self._linears:
            stored = tensor.stored
            self._unpacked.append(stored)
            try:
                self._linears[name] = self._runtime.add_linear(
                    tensor.format.name,
                    stored,
                    tensor.shape[1],
                    mapped=tensor.is_mapped,
                    interleaved_heads=tensor.interleaved_heads,
                )
            except (ValueError, TypeError) as error:
                raise _no_kernel(name, error) from error

    def _add_table(self, name: str, tensor: RawTensor) -> None:
        if name not in self._tables:
            try:
                self._tables[name] = self._runtime.add_table(tensor.format.name, tensor.data, tensor.shape[1])
            except ValueError as error:
                raise _no_kernel(name, error) from error

    def _add_vector(self, name: str, tensor: RawTensor) -> None:
        if name not in self._vectors:
            self._vectors[name] = self._runtime.add_vector(np.ascontiguousarray(tensor.to_f32().reshape(-1)))

    def _add_rotation(self, table: RopeTable) -> None:
        if table not in self._rotations:
            self._rotations[table] = self._runtime.add_rotation(list(table.inv_freq), table.scale)
