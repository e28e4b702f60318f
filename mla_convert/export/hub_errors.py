"""Turns errors of a push to the Hub into one-line messages that never show a token."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from ..errors import UsageError, UserError

AGAIN = "run the same command again: files that have arrived are not sent twice"


def check_repo_id(repo_id: str) -> None:
    """Raise UsageError unless `repo_id` is `owner/name` with characters that the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError:
        well_formed = False
    else:
        well_formed = repo_id.count("/") == 1
    if not well_formed:
        raise UsageError(f"{repo_id!r} is not a repository id; write OWNER/NAME, with letters, digits, '-', '_', '.'")


def name_taken(repo_id: str) -> str:
    """The message for an existing repository whose content mla-convert did not push."""
    return (
        f"{repo_id} already exists on the Hub with files that mla-convert did not push; choose another name, "
        "or push without --create to add to it"
    )


def without_credentials(text: str) -> str:
    """`text` without the name and password of URLs such as `https://me:secret@hub.example`."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


@contextlib.contextmanager
def explain_push_errors(repo_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn errors of the Hub client during a push into a one-line UserError without `token`."""
    caught = (errors.HTTPError, ConnectionError, TimeoutError, PermissionError, RuntimeError, ValueError)
    try:
        yield
    except caught as error:
        message = without_credentials(" ".join(_explain(repo_id, revision, error).split()))
        raise UserError(message.replace(token, "(token)") if token else message) from None


def _explain(repo_id: str, revision: str | None, error: BaseException) -> str:
    # The client wraps upload errors in a RuntimeError.
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answer = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None:
        return _refused(repo_id, revision, answer)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        return "HF_HUB_OFFLINE is set; unset it to push"
    broken = next((cause for cause in chain if isinstance(cause, (errors.HTTPError, OSError))), None)
    if isinstance(broken, PermissionError):
        return f"the Hub's storage refused the files for {repo_id}: {broken}"
    if broken is not None:
        what = type(broken).__name__
        return f"the connection to {constants.ENDPOINT} failed ({what}); check the network and {AGAIN}"
    return f"the Hub client refused the push to {repo_id}: {error}"


def _refused(repo_id: str, revision: str | None, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch {revision or 'main'!r} on the Hub; add --create to create it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"your token can access no model {repo_id} on the Hub; add --create to create it"
    if status == 401:
        return "the Hub does not accept your token; set another HF_TOKEN, or log in again with `hf auth login`"
    if status == 403:
        return f"your token may not write to {repo_id}; use a token with write permission, or --pull-request"
    if status in (409, 412):
        return f"{repo_id} changed on the Hub during the push and nothing was committed; {AGAIN}"
    if status == 400:
        return f"the Hub refuses the push to {repo_id}: {error.server_message or 'bad request'}"
    return f"the Hub answered {status} for {repo_id}; {AGAIN}"
