"""Small vocabularies for tests: bytes and a few merges, in the shape of GGUF metadata."""

from typing import Any

BYTE_ALPHABET = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
BYTE_ALPHABET += [chr(0x100 + i) for i in range(256 - len(BYTE_ALPHABET))]


def byte_level(pre: str = "gpt-2", **extra: Any) -> dict[str, Any]:
    """256 byte tokens, merges to "Ġthe" and "你", a user-defined token, two control tokens."""
    merges = ["t h", "th e", "Ġ the", "ä ½", "ä½ ł"]
    tokens = [*BYTE_ALPHABET, *(merge.replace(" ", "") for merge in merges), "<think>", "<|im_start|>", "<|im_end|>"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": [1] * (len(tokens) - 3) + [4, 3, 3],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        **extra,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def pieces(**extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, two control tokens, 256 bytes, a few pieces."""
    normal = ["▁", "h", "i", "▁h", "▁hi", "l", "o", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *normal]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(normal))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(normal),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
