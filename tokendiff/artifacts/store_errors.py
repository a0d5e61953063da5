"""What the errors of stores mean: which may pass, which are refusals, and their words in short."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tokendiff.errors import InputError, outage_behind, reason_of

# Codes in pyarrow's words, once the SDK's own attempts are over: its OSErrors have no errno.
_PASSING = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING|"
    r"INTERNAL_FAILURE|UNKNOWN \(HTTP status (429|5\d\d)\))"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RESOURCE_EXHAUSTED):"
)
_NO_TOKEN = "Could not create a OAuth2 access token"
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)|" + _NO_TOKEN
)
# What of Google's words is for a user.
_GOOGLE = re.compile(
    r"google::cloud::Status\((?P<code>\w+): (?:[\w ]+, with a last message of )?"
    r"(?P<words>.*?)(?: error_info=.*)?\)?$"
)


def is_store_down(error: OSError) -> bool:
    """Whether pyarrow says that a store is down or overloaded, and so may be well again later."""
    words = str(error)
    if _NO_TOKEN in words:
        return "CURL error" in words and _has_google_key()
    return _PASSING.search(words) is not None


def _has_google_key() -> bool:
    """Whether there is one where Google's client looks for it. Without any, it asks the cloud's own
    machine; that this is none looks, in its errors, as if the network were away.
    """
    kept = os.path.expanduser("~/.config/gcloud/application_default_credentials.json")
    return bool(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) or os.path.isfile(kept)


@contextmanager
def naming_store(uri: str) -> Iterator[None]:
    """Errors of the store, with the URI, which its own messages may lack: a ConnectionError where
    it may be well again later, a PermissionError where it refuses. Stores of fsspec packages raise
    classes of their own.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{uri}: no such file") from None
    except OSError as error:
        kind: type[OSError] = OSError
        if is_store_down(error) or outage_behind(error) is not None:
            kind = ConnectionError
        elif _REFUSED.search(str(error)) or isinstance(error, PermissionError):
            kind = PermissionError
        raise kind(f"{uri}: {words_of_store(error)}") from error
    except (InputError, MemoryError, AttributeError, NameError, TypeError):
        raise  # the last three are mistakes of a program, which need their traceback
    except Exception as error:
        kind = OSError if outage_behind(error) is None else ConnectionError
        raise kind(f"{uri}: {reason_of(error)}") from error


def words_of_store(error: OSError) -> str:
    """What a store says, without what is for its programmers."""
    words = str(error).split("\n")[0]
    if _NO_TOKEN in words and not is_store_down(error):
        return (
            "no valid credentials for Google Cloud; run 'gcloud auth application-default login', "
            "or set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account"
        )
    found = _GOOGLE.search(words)
    return words if found is None else f"Google Cloud Error {found['code']}: {found['words']}"
