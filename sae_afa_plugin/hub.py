"""Which state of a repository on the hub is read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

_SECONDS = 10.0


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
    try:
        found = try_to_load_from_cache(repo, file, repo_type=kind, revision=revision)
    except ValueError:  # no name of a repository
        return None
    if not isinstance(found, str):
        return None
    parts = Path(found).parts
    return parts[len(parts) - parts[::-1].index("snapshots")] if "snapshots" in parts else None
