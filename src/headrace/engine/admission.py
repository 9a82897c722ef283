"""Whether a request can ever be served: the engine's edge, where inputs are checked once."""

from headrace.base.errors import CapacityError, ContextLengthError, InvalidRequestError
from headrace.engine.request import Request


def max_length(request: Request, *, vocab_size: int, max_model_len: int, pool_tokens: int) -> int:
    """The length, prompt and output, at which each sample of a servable request ends.

    The KV of a sequence's last token is never needed, so a pool of `pool_tokens` tokens carries a sequence of one more.
    ``max_tokens=None`` means as many as context window and pool hold; an explicit number that the window cuts short
    ends with ``length``, one that the pool cannot carry is refused.

    Raises:
        InvalidRequestError: an empty prompt, or a token id outside the vocabulary.
        ContextLengthError: the prompt leaves no room for an output token in the context window.
        CapacityError: the whole pool could not carry one sample.
    """
    _check_tokens(request, vocab_size)
    num_prompt = len(request.prompt_ids)
    if num_prompt + len(request.params.forced_ids) > max_model_len:
        raise ContextLengthError(
            f"Prompt and forced_ids have {num_prompt + len(request.params.forced_ids)} tokens; the context window holds"
            f" {max_model_len}.",
            "Force fewer, or raise max_model_len.",
        )
    if num_prompt >= max_model_len:
        raise ContextLengthError(
            f"The prompt has {num_prompt} tokens; the context window holds {max_model_len}, output included.",
            f"Shorten the prompt to {max_model_len - 1} tokens or fewer, or raise max_model_len.",
        )
    max_tokens = request.params.max_tokens
    longest = min(max_model_len, num_prompt + (max_tokens or max_model_len))
    if max_tokens is None and num_prompt <= pool_tokens:
        return min(longest, pool_tokens + 1)
    if longest - 1 > pool_tokens:
        raise CapacityError(
            f"The request may grow to {longest} tokens; the KV cache holds {pool_tokens}.",
            f"Ask for at most {max(pool_tokens + 1 - num_prompt, 0)} output tokens, or give the KV cache more memory."
            if num_prompt <= pool_tokens
            else f"Shorten the prompt to {pool_tokens} tokens or fewer, or give the KV cache more memory.",
        )
    return longest


def _check_tokens(request: Request, vocab_size: int) -> None:
    if not request.prompt_ids:
        raise InvalidRequestError("The prompt is empty.", "Give at least one token.", code="empty_prompt")
    params = request.params
    for name, ids in (
        ("The prompt", request.prompt_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
        ("forced_ids", params.forced_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise InvalidRequestError(
                f"{name} holds token {wrong}, which is not in the vocabulary.", f"Use 0 to {vocab_size - 1}."
            )
