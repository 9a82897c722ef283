"""Matrices that are done, kept on disk until the model is whole: a run that was stopped goes on where it was."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from headrace.base.errors import StorageError
from headrace.numerics.formats import format_named
from headrace.numerics.tensor import RawTensor


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
            said = folder / "run.json"
            if not said.is_file() or said.read_text() != stated:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                said.write_text(stated)
            self.num_kept = len(list(folder.glob("*.npz")))
        except OSError as error:
            raise _failed(folder, error) from error

    def load(self, name: str) -> RawTensor | None:
        """A matrix that was kept; None if it was not, or not whole."""
        path = self._path(name)
        try:
            with np.load(path) as held:
                data, shape, digest = held["data"], tuple(held["shape"].tolist()), str(held["digest"])
                format_name = str(held["format"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            return None
        return RawTensor(format_named(format_name), shape, data)

    def keep(self, name: str, tensor: RawTensor) -> None:
        """Keep a matrix. Raises StorageError."""
        path = self._path(name)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    data=tensor.data,
                    shape=np.array(tensor.shape),
                    format=np.array(tensor.format.name),
                    digest=np.array(hashlib.sha256(tensor.data).hexdigest()),
                )
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _failed(self._folder, error) from error

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


def _failed(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder} cannot be written: {error.strerror or error}.", "Free some space: the run goes on where it was."
    )
