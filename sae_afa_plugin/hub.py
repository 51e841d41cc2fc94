"""Whether a repository on the hub can be read, and in which state."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from sae_afa_plugin._upstream import repo_folder_name

_SECONDS = 10.0


def check_readable(repo: str, kind: str = "model") -> None:
    """Make sure that the hub answers, or that a repository is in its cache.

    What is asked of a hub that does not answer is asked again for half a minute, file by file.

    Args:
        repo: Its name on the hub.
        kind: ``model`` or ``dataset``.

    Raises:
        ValueError: If neither is so.
    """
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    if cached.is_dir():
        return
    if offline():
        raise ValueError(
            f"{repo!r} is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub: fetch "
            "it once without that, or name a local folder"
        )
    try:
        HfApi().model_info(repo, timeout=_SECONDS, expand=["sha"])  # of a dataset it is a 404
    except HfHubHTTPError:
        return  # an answer; what it means is said by who reads
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        raise ValueError(
            f"the hub does not answer ({type(error).__name__}), and {repo!r} is not in its cache: "
            "mind the network and HF_ENDPOINT, or name a local folder"
        ) from error


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return constants.HF_HUB_OFFLINE


def cached_file(repo: str, file: str) -> bool:
    """Whether a file of a repository is in the hub's cache."""
    return _from_cache(repo, file) is not None


def _from_cache(
    repo: str, file: str, kind: str = "model", revision: str | None = None
) -> str | None:
    try:
        found = try_to_load_from_cache(repo, file, repo_type=kind, revision=revision)
    except ValueError:  # no name of a repository
        return None
    return found if isinstance(found, str) else None


def commit_of(
    repo: str, kind: str = "model", revision: str | None = None, file: str = "config.json"
) -> str | None:
    """The commit that a revision of a repository stands for: changes when the repository does.

    Args:
        repo: Its name on the hub.
        kind: ``model`` or ``dataset``.
        revision: A branch, tag or commit; None: the one that is read by default.
        file: Of the repository; where the hub does not answer, the commit is that of this file's
            copy in the cache.

    Returns:
        The hash; None where neither the hub nor the cache says.
    """
    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        return ask(repo, revision=revision, timeout=_SECONDS, expand=["sha"]).sha
    except Exception:  # errors of requests or httpx, by the version of huggingface_hub
        pass
    found = _from_cache(repo, file, kind, revision)
    if found is None:
        return None
    parts = Path(found).parts
    return parts[len(parts) - parts[::-1].index("snapshots")] if "snapshots" in parts else None
