"""Log-probabilities of prompts, which ``echo`` together with ``logprobs`` asks for."""

from dataclasses import replace
from math import nan
from typing import Literal

from headrace.base.errors import ExecutorError
from headrace.engine.sampling import SamplingParams
from headrace.llm.outputs import RequestOutput, TokenLogprob
from headrace.serve.model import AsyncModel

Scoring = Literal["none", "too", "alone"]
"""Whether a request wants logprobs of its prompts: no, beside its output, or without any output."""


async def prompt_logprobs(llm: AsyncModel, prompt_ids: list[int], num_top: int, request_id: str) -> list[TokenLogprob]:
    """One entry for each token: what the model gives it after those before it, NaN for the first.

    The tokens are forced, one a step, beside whatever else runs: the values are those that the model gave if it had
    chosen them itself, to the bit.

    Raises ExecutorError for a token so unlikely that it cannot be forced, and as `AsyncModel.generate` does.
    """
    entries = [TokenLogprob(prompt_ids[0], nan)]
    following = tuple(prompt_ids[1:])
    if not following:
        return entries
    params = SamplingParams(max_tokens=len(following), forced_ids=following, temperature=0.0, logprobs=num_top)
    output = await llm.generate(prompt_ids[:1], params, request_id=request_id)
    (sample,) = output.outputs
    for i, (made, wanted) in enumerate(zip(sample.token_ids, following, strict=True)):
        if made != wanted:
            raise ExecutorError(
                f"Token {i + 1} of the prompt, {wanted}, is less likely than another by more than e^-100.",
                "Leave out echo or logprobs.",
            )
    assert sample.logprobs is not None
    return entries + sample.logprobs


def without_output(output: RequestOutput) -> RequestOutput:
    """What is left where no token was asked for."""
    samples = [
        replace(one, text="", token_ids=[], logprobs=[], weight_versions=[], finish_reason="length")
        for one in output.outputs
    ]
    return replace(output, outputs=samples, metrics=replace(output.metrics, num_output_tokens=0))
