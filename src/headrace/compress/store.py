"""Matrices that are done, kept on disk until the model is whole: a run that was stopped goes on where it was.

They are handed out as maps of their files, so that memory does not grow with the number of matrices.
"""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.base.errors import StorageError
from headrace.numerics.formats import format_named
from headrace.numerics.tensor import RawTensor

_RUN = "run.json"


class Store:
    """A folder of finished matrices. What another run left, of another model or recipe, is removed.

    Args:
        folder: made if it is not there.
        run: what the matrices depend on, JSON: the model's files, the recipe, the calibration.

    Raises StorageError if it cannot be written.
    """

    def __init__(self, folder: Path, run: Any) -> None:
        self._folder = folder
        stated = json.dumps(run, sort_keys=True)
        try:
            said = folder / _RUN
            if not said.is_file() or said.read_text() != stated:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                said.write_text(stated)
            self.num_kept = len(list(folder.glob("*.json"))) - 1
        except OSError as error:
            raise _failed(folder, error) from error

    def load(self, name: str) -> RawTensor | None:
        """A matrix that was kept, a map of its file; None if it was not, or not whole."""
        try:
            said = json.loads(self._path(name, "json").read_text())
            data = np.load(self._path(name, "npy"), mmap_mode="r")
        except (OSError, ValueError):
            return None
        if hashlib.sha256(data).hexdigest() != said["digest"]:
            return None
        return RawTensor(format_named(said["format"]), tuple(said["shape"]), data)

    def keep(self, name: str, tensor: RawTensor) -> RawTensor:
        """Keep a matrix; returns it as `load` will. Raises StorageError."""
        data = np.ascontiguousarray(tensor.data)
        said = {"format": tensor.format.name, "shape": tensor.shape, "digest": hashlib.sha256(data).hexdigest()}
        partial = self._path(name, "partial")
        try:
            with partial.open("wb") as file:
                np.save(file, data)
            os.replace(partial, self._path(name, "npy"))
            partial.write_text(json.dumps(said))
            os.replace(partial, self._path(name, "json"))
            mapped = np.load(self._path(name, "npy"), mmap_mode="r")
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _failed(self._folder, error) from error
        return replace(tensor, source=mapped, interleaved_heads=0)

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}.{kind}"


def _failed(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder} cannot be written: {error.strerror or error}.", "Free some space: the run goes on where it was."
    )
