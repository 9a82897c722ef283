"""Errors that users meet: a stable code, the cause first, then a remedy.

Inputs are checked once, at the edge, and fail with one of these. Inside, invariants are asserted.
"""


class HeadraceError(Exception):
    """An error that a user can act on.

    Args:
        cause: what went wrong, in one sentence that names the offending thing.
        remedy: what to do about it, in one sentence; may be empty where there is nothing to do.
        code: a stable, machine-readable name; defaults to the class's own.
    """

    code = "internal_error"

    def __init__(self, cause: str, remedy: str = "", code: str | None = None) -> None:
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy
        if code is not None:
            self.code = code


class InvalidRequestError(HeadraceError, ValueError):
    """A request or an argument that can never succeed as given."""

    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """A prompt that does not fit the context window."""

    code = "context_length_exceeded"


class ModelNotFoundError(HeadraceError):
    """A model name that resolves to nothing; the cause lists what was tried."""

    code = "model_not_found"


class UnsupportedModelError(HeadraceError):
    """A model that was found and understood, but that uses something not built yet; the cause names it."""

    code = "unsupported_model"


class CheckpointError(HeadraceError):
    """A model file that is damaged, incomplete, or contradicts its own header or config; the cause names the item."""

    code = "bad_checkpoint"


class TemplateError(HeadraceError):
    """A chat template that is missing, cannot be read, or refuses the conversation."""

    code = "bad_chat_template"


class CapacityError(HeadraceError):
    """Not enough memory for what was asked; the remedy says what would fit."""

    code = "insufficient_memory"


class StorageError(HeadraceError):
    """Files that could not be written; what was begun is gone again."""

    code = "storage_failed"


class ExecutorError(HeadraceError):
    """A step that failed, or an executor that cannot run what it was given."""

    code = "executor_failed"


class MissingDependencyError(HeadraceError):
    """An optional package that the asked feature needs; the remedy names the extra that brings it."""

    code = "missing_dependency"


class CancelledRequestError(HeadraceError):
    """A request that its owner cancelled before it ended."""

    code = "cancelled"
