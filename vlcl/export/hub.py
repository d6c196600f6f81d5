"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vlcl.errors import UserError
from vlcl.export.formats import FORMATS


def check_hub(repo: str) -> str:
    """Before the work: is `repo` a name that can be, and is somebody logged in? Its full name; UserError where not."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo!r}: {error}; give NAME or ORGANISATION/NAME") from None
    try:
        user = HfApi().whoami()["name"]
    except Exception as error:  # the hub's own, HTTP and system errors have no common base
        raise UserError(
            f"--push-to-hub {repo}: the hub does not let you in ({_line(error)}). Log in with `hf auth login`, or set "
            "HF_TOKEN; without --push-to-hub the export needs no network"
        ) from None
    return repo if "/" in repo else f"{user}/{repo}"


def push(folder: Path, repo: str, private: bool) -> str:
    """Make `repo` where there is none and upload the folder; the page's address. UserError where it fails."""
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        # Of an earlier export with another option, so that the files there are never of other weights.
        old = [f"{x.subfolder}/*" for x in FORMATS if x.subfolder and not (folder / x.subfolder).is_dir()]
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Export of vlcl", delete_patterns=old)
    except Exception as error:
        raise UserError(
            f"the upload to {repo} failed: {_line(error)}. The folder is whole; repeat with: hf upload {repo} {folder}"
        ) from None
    return str(url)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
