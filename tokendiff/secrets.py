"""What is kept out of messages, MLflow and reports: values named like a secret, logins in URLs."""

import re
from collections.abc import Mapping
from typing import Any

# "token" as a word of its own: `hf_token` is a secret, `tokenizer` and `mask_token_id` are not.
_SECRET_NAME = re.compile(
    r"secret|passw|passphrase|credential|(api|access|private)_?key|(?<![a-z])token(?![a-z]|_id)",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s]*@")


def is_secret_name(name: str) -> bool:
    """Whether a field, param or variable of this name (dotted or not) may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def without_credentials(text: str) -> str:
    """Drop `user:password@` from every URL in a text; its query is left as it is."""
    return _URL_LOGIN.sub("", text)


def without_secrets(value: Any) -> Any:
    """Plain data with what is named like a secret left out, and without logins in its texts."""
    if isinstance(value, Mapping):
        return {
            name: without_secrets(item)
            for name, item in value.items()
            if not is_secret_name(str(name))
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
