"""How long two ways of running a model write the same: free-running, through the engine, on shared random numbers."""

from collections.abc import Sequence

import numpy as np

from headrace.align.divergence import Float64
from headrace.align.subjects import Opened
from headrace.base.errors import InvalidRequestError
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.events import FailedEvent, TokenEvent
from headrace.engine.request import Request
from headrace.engine.sampling import SamplingParams


def continuations(
    opened: Opened, prompts: Sequence[Sequence[int]], *, num_tokens: int, temperature: float, seed: int = 0
) -> list[list[int]]:
    """What a subject writes after each prompt: `num_tokens` token ids each, ends of sequence being tokens like others.

    Prompt i is sampled with seed `seed` + i whatever the subject, so its nth tokens are drawn by the same number: what
    differs between two subjects is their distributions alone.

    Args:
        prompts: token ids, at least one each.
        num_tokens: at least 1.
        temperature: 0 for the likeliest token each time.

    Raises InvalidRequestError for no prompts, or for tokens or parameters that the engine would not take.
    """
    if not prompts:
        raise InvalidRequestError("There is no prompt to continue.", "Give at least one.")
    length = max(map(len, prompts)) + num_tokens
    limits = EngineConfig(max_num_seqs=min(len(prompts), length), max_num_batched_tokens=length, max_model_len=length)
    written: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    with opened.executor(length, at_once=limits.max_num_seqs) as executor:
        engine = Engine(executor, limits)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=seed + i, ignore_eos=True)
            engine.add(Request(request_id=str(i), prompt_ids=tuple(prompt), params=params))
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, FailedEvent):
                    raise event.error
                if isinstance(event, TokenEvent):
                    written[event.request_id].append(event.token_id)
    return list(written.values())


def agreed_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two continuations have in common before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def agreement(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> Float64:
    """The share of continuations that still agree after 1, 2, … tokens: float64 ``[num_tokens]``, never rising.

    Args:
        a, b: two subjects' continuations of the same prompts, all of one length.
    """
    lasted = np.array([agreed_tokens(x, y) for x, y in zip(a, b, strict=True)])
    return (lasted[None] > np.arange(len(a[0]))[:, None]).mean(axis=1)
