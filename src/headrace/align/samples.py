"""Text by where it comes from: what a model says itself, Python's documents, or a user's file.

A method that is fitted to one kind of text is fitted to that kind (docs/quantization.md has the figures), so several
make the default.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace.align.corpus import Part, texts
from headrace.base.errors import HeadraceError, InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.llm import LLM
from headrace.llm.text_side import TextSide

KINDS = ("own", "chat", "corpus")
"""``own``: what the model says after the beginnings of documents; ``chat``: conversations that it makes up, both sides
of them (Magpie, arXiv:2406.08464); ``corpus``: documents (`headrace.align.corpus`). Anything else names a file."""

_OPENING = 4  # tokens of a document that an own sample begins with
_USER_SAYS = "what the user says"  # where a chat template puts it, a conversation begins
_SEEDS_APART = 1 << 32  # between parts


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise InvalidRequestError unless these are `KINDS` or files, none twice."""
    files = [kind for kind in kinds if kind not in KINDS]
    if not kinds or len(set(kinds)) < len(kinds) or not all(Path(name).is_file() for name in files):
        raise InvalidRequestError(
            f"Text {','.join(kinds)!r} is no file that exists, or said twice.",
            f"Use one of {', '.join(KINDS)}, a file of text, or several of them.",
        )


def default_kinds(text: TextSide, context: int, count: int, length: int) -> tuple[str, ...]:
    """All, or as many as there are texts; documents alone if `length` exceeds the model's `context`, and no
    conversations with a model that has no template for them."""
    if length > context:
        return ("corpus",)
    try:
        chat_opening(text, length)
    except HeadraceError:
        return ("own", "corpus")[-count:]
    return KINDS[-count:]


def shares(kinds: Sequence[str], count: int) -> dict[str, int]:
    """As much of each, the first ones one more. Raises InvalidRequestError if there is not one of each."""
    if count < len(kinds):
        raise InvalidRequestError(f"{count} texts cannot come from {len(kinds)} kinds.", "Ask for more.")
    whole, rest = divmod(count, len(kinds))
    return {kind: whole + (i < rest) for i, kind in enumerate(kinds)}


def said(
    model: str | None, counts: Mapping[str, int], length: int, seed: int, part: Part = "calibration"
) -> dict[str, np.ndarray]:
    """Token ids ``[count, length]``, int64, of each kind in `counts` that a model says itself, at temperature 1 and
    past the ends that it sees. The same for the same model, seed, part and machine.

    Raises as `chat_opening` does, and as loading the model does.
    """
    wanted = {kind: count for kind, count in counts.items() if kind in ("own", "chat")}
    if not wanted:
        return {}
    found = {}
    with LLM(model, max_model_len=length, enable_prefix_caching=False, weight_cache="off") as llm:
        for kind, count in wanted.items():
            if kind == "own":
                prompts = own_openings(llm.model.text, count, part)
            else:
                prompts = [chat_opening(llm.model.text, length)] * count
            params = [
                SamplingParams(
                    max_tokens=length - len(prompt),
                    temperature=1.0,
                    ignore_eos=True,
                    seed=seed + i + (_SEEDS_APART if part == "held_out" else 0),
                )
                for i, prompt in enumerate(prompts)
            ]
            results = llm.generate(prompts, params)
            found[kind] = np.array([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in results], np.int64)
    return found


def own_openings(text: TextSide, count: int, part: Part) -> list[list[int]]:
    """The first tokens of the part's documents, again and again."""
    encoded = (text.tokenizer.encode(document[:200]) for document in texts(part))
    openings = [ids[:_OPENING] for ids in encoded if len(ids) >= _OPENING]
    return [openings[i % len(openings)] for i in range(count)]


def chat_opening(text: TextSide, length: int) -> list[int]:
    """What a chat template writes before a user's first word.

    Raises:
        TemplateError: the model has no chat template.
        InvalidRequestError: its template puts nothing before what a user says, or changes that, or takes `length`
            tokens or more until then.
    """
    message = {"role": "user", "content": _USER_SAYS}
    opening, found, _ = text.template.render([message], add_generation_prompt=False).partition(_USER_SAYS)
    if not (opening and found):
        raise InvalidRequestError(
            "The chat template shows no beginning of a user's turn.", "Use other text than chat: own or corpus."
        )
    ids = text.tokenizer.encode(opening, add_special_tokens=False)
    if len(ids) >= length:
        raise InvalidRequestError(
            f"The chat template begins a user's turn with {len(ids)} tokens; texts have {length}.",
            "Ask for longer texts.",
        )
    return ids
