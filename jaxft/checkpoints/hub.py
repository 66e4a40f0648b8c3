"""Pushing a directory to the Hugging Face hub."""

from __future__ import annotations

import os
import pathlib

from jaxft.models import CheckpointError


def check_push(repo: str) -> str:
    """The full name, user/name, of a repository that can be pushed to; asks the hub for the token's user.

    HF_ENDPOINT names the hub; the token is HF_TOKEN, or that of `hf auth login`.

    Raises:
        CheckpointError: for a name that the hub would refuse, without a token, or if the hub rejects
            the token.
        ModuleNotFoundError: without huggingface_hub.
    """
    hub = _hub()
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError:
        raise CheckpointError(
            f"--push-to-hub {repo}: no name of a repository; expected user/name or name."
        ) from None
    if not hub.get_token():
        raise CheckpointError(
            f"--push-to-hub {repo}: no token; set HF_TOKEN, or log in with `hf auth login`."
        )
    try:
        user = _api(hub).whoami()["name"]
    except (
        Exception
    ) as error:  # The hub's errors have no common base other than OSError or ValueError.
        raise CheckpointError(f"--push-to-hub {repo}: {_said(error)}") from None
    return repo if "/" in repo else f"{user}/{repo}"


def push(path: str | os.PathLike, repo: str, *, private: bool = True, message: str = "") -> str:
    """Pushes the directory's files to a repository, made if needed, and returns its address.

    Args:
        path: the directory.
        repo: user/name.
        private: of a new repository; an existing one keeps its setting.
        message: of the commit.

    Raises:
        CheckpointError: if the hub refuses or cannot be reached; the local files are kept.
    """
    api = _api(_hub())
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=pathlib.Path(path),
            commit_message=message or "Upload by jaxft",
        )
    except Exception as error:
        raise CheckpointError(
            f"{path} was not pushed to {repo}: {_said(error)} The files are there: push them with "
            f"`hf upload {repo} {path}`."
        ) from None
    return f"{api.endpoint}/{repo}"


def _hub():
    try:
        import huggingface_hub
    except ImportError:
        raise ModuleNotFoundError(
            "--push-to-hub needs the package huggingface_hub: pip install 'jaxft[text]'"
        ) from None
    return huggingface_hub


def _api(hub):
    # The package reads HF_ENDPOINT only at import; here it is read at each call.
    return hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200].rstrip('.')}."
