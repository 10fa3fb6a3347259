"""What makes two texts the same, and a hash of it."""

import unicodedata

import xxhash


def normalise(text: str) -> str:
    """`text` with one spelling of each character, in lower case, with single spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def key(*parts: str) -> int:
    """A 64-bit hash of `parts`, the same on every machine."""
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode())
