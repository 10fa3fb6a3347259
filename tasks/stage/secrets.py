"""Keeps secrets out of what is recorded and printed."""

import os
import re
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"^(?:.*_)?(?:password|passwd|secret|api_key|access_key|secret_key|private_key|credentials?)$"
    r"|^(?:(?:auth|access|api|hf|hub|bearer|github|session)_)?token$",
    re.IGNORECASE,
)
SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIALS?)$")
KNOWN_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
)
USER_IN_URI = re.compile(r"(?<=://)[^/\s@]+@")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this (dotted) name holds a secret; `pad_token` or `max_new_tokens` does not."""
    return bool(SECRET_NAME.match(name.rsplit(".", 1)[-1]))


def redact(text: str) -> str:
    """`text` without user and password in addresses, without tokens of known forms, and without the values of
    environment variables that are named like secrets."""
    text = KNOWN_FORMS.sub(HIDDEN, USER_IN_URI.sub("", text))
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


def redacted(value: Any) -> Any:
    """`value` (text, numbers, lists, mappings) with every secret in it blotted out."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {
                key: HIDDEN if is_secret_name(str(key)) else redacted(inner) for key, inner in value.items()
            }
        case list() | tuple():
            return [redacted(inner) for inner in value]
    return value
