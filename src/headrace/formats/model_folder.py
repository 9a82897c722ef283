"""Making a model's folder, or its file and what lies beside it: whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headrace.base.errors import InvalidRequestError, StorageError

_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack",
               "*.onnx", ".*", "config.json", "hf_quant_config.json", "*.bin.index.json")  # fmt: skip


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends, or is removed if it fails.

    It lies beside `target` until then, and its bytes are on the disk before it gets the name. One writer per target:
    what one that was interrupted left is removed.

    Raises:
        InvalidRequestError: `target` exists: nothing is overwritten.
        StorageError: something cannot be written, such as for want of room.
    """
    refuse_existing(target)
    partial = _partial(target)
    with _all_or_nothing(target, [partial]):
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(target)
        _sync(target.parent)


@contextmanager
def new_files(*targets: Path) -> Iterator[list[Path]]:
    """Files of one folder to write, which get their names when the block ends, the last of them last.

    Until then they have other names, and if anything fails none of either is left. The same holds as for `new_folder`.
    """
    for target in targets:
        refuse_existing(target)
    partials = [_partial(target) for target in targets]
    made = list(partials)
    with _all_or_nothing(targets[-1], made):
        yield partials
        for partial, target in zip(partials, targets, strict=True):
            _sync(partial)
            partial.rename(target)
            made.append(target)
        _sync(targets[-1].parent)


def refuse_existing(target: Path) -> None:
    """Nothing is overwritten. Raises InvalidRequestError."""
    if target.exists():
        raise InvalidRequestError(f"{target} exists already.", "Give another name, or remove it first.")


def _partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@contextmanager
def _all_or_nothing(target: Path, paths: Sequence[Path]) -> Iterator[None]:
    """Remove paths before a block, and after it if it fails, with those that were added to the list meanwhile.

    What the disk refuses becomes a StorageError.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(paths)
        yield
    except OSError as error:
        _remove(paths)
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}.", "Free some space, or give another place."
        ) from error
    except BaseException:
        _remove(paths)
        raise


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()


def companions(folder: Path) -> list[Path]:
    """Files of a model's folder that go with its weights into another: tokenizer, chat template, generation config."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in paths if not any(path.match(pattern) for pattern in _NOT_COPIED)]


def fill(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write config.json, and copies of files. Raises OSError."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
