"""Downloads from the Hugging Face Hub; failures are reported in one clear line and never show a token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from .weights import WEIGHT_SUFFIXES

FILE_ENDINGS = (*WEIGHT_SUFFIXES, ".gguf", ".json", ".yaml", ".parquet")
"""Of weights and of what may be mistaken for them: `ckpts/model.pt` is a path, though it has the form of a Hub ID."""


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn exceptions of the Hub client about `repo_id` into a UserError of one line."""
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repo_id} is gated; accept its terms on its Hub page, then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo_id} has no revision {revision!r} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo_id} is neither a local folder nor a model on the Hub; if it is private, log in with `hf auth login`"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{repo_id!r} is neither a folder nor a valid Hub ID (owner/name)") from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_unreachable(repo_id, error)) from None
    except errors.HfHubHTTPError as error:
        raise UserError(_refused(repo_id, error)) from None
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise UserError(_unreachable(repo_id, error)) from None


def download(repo_id: str, revision: str | None, patterns: list[str], ignored: list[str] | None = None) -> Path:
    """Download the files of a model repository that match `patterns`, but not `ignored`; returns the snapshot folder.

    The name of the folder is the commit. Raises UserError in one line.
    """
    with explain_hub_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def _refused(repo_id: str, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub does not accept your token for {repo_id}; log in again with `hf auth login` or unset HF_TOKEN"
    if status == 403:
        return f"your Hub account has no permission to read {repo_id}"
    return f"the Hub answered {status} for {repo_id}; try again later"


def _unreachable(repo_id: str, error: Exception) -> str:
    causes = (error, error.__cause__)
    http = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if http is not None:
        return _refused(repo_id, http)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return f"{repo_id} is neither a local folder nor in the Hub cache, and HF_HUB_OFFLINE forbids downloads"
    return f"{repo_id} is not a local folder and the Hub cannot be reached; check the network connection"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `owner/name` of a repository on the Hub; no repository is named like a file."""
    if text.endswith(FILE_ENDINGS):
        return False
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return "/" in text
