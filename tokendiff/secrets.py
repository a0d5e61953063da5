"""What is kept out of messages, MLflow and reports: values named like a secret, logins in URLs."""

import re

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
