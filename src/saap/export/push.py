"""Putting a finished folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from saap.core.errors import OutputError, first_line

_IGNORED = [".*", "*.part"]


def push_folder(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a checkpoint folder to a model repository, which is created if need be. Returns its address.

    Raises OutputError: nobody is logged in, the name is impossible, the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        created = api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, ignore_patterns=_IGNORED, commit_message="Upload pruned model"
        )
    except HFValidationError as error:
        raise OutputError(
            f"{repository!r} is no name of a repository ({first_line(error)})", "Write OWNER/NAME"
        ) from None
    except HfHubHTTPError as error:
        raise OutputError(
            f"The hub refuses the upload to {repository} ({first_line(error)})",
            "Log in with `hf auth login` as somebody who may write there",
        ) from None
    except Exception as error:  # no token, no connection: each version of the hub's client has its own
        raise OutputError(
            f"The upload to {repository} failed ({first_line(error)})", "Log in with `hf auth login`, and try again"
        ) from error
    return str(created)
