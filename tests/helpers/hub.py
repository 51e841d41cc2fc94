"""A model hub on the loopback: the part of Hugging Face's HTTP interface that the tests need.

The real clients (huggingface_hub, transformers, datasets, SAELens) talk HTTP to it, so nothing
in them is replaced. A repository is a plain folder. It has one revision, ``main``, whose commit
hash is computed from the files, so that every change of a file is a new commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "somebody"
_CLIENT_SECONDS = 300

# "gpt2" or "user/name"; regular expressions go back a step where "gpt2/tree" is no repository
_REPO = r"(?P<repo>(?:[^/]+/)?[^/]+)"
_RESOLVE = re.compile(rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_REPO}"
    r"(?:/(?P<what>revision|tree|paths-info|preupload|commit)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


# --- repositories as folders ---


def _blob_id(file: Path) -> str:
    """The hash that git gives to a file; clients compare it with that of their own file."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _files(repo: Path) -> dict[str, Path]:
    return {
        file.relative_to(repo).as_posix(): file
        for file in sorted(repo.rglob("*"))
        if file.is_file()
    }


def _commit_hash(repo: Path) -> str:
    listing = [f"{path} {_blob_id(file)}" for path, file in _files(repo).items()]
    return hashlib.sha1("\n".join(listing).encode()).hexdigest()


def _entry(repo: Path, path: str) -> dict[str, Any]:
    """A file or folder, as tree listings and paths-info tell of it."""
    place = repo / path
    if place.is_dir():
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {"type": "directory", "path": path, "size": 0, "oid": oid}
    return {
        "type": "file",
        "path": path,
        "size": place.stat().st_size,
        "oid": _blob_id(place),
    }


def _tree(repo: Path, path: str, recursive: bool) -> list[dict[str, Any]]:
    found = (repo / path).rglob("*") if recursive else (repo / path).glob("*")
    return [_entry(repo, place.relative_to(repo).as_posix()) for place in sorted(found)]


def _commit(repo: Path, lines: list[dict[str, Any]]) -> None:
    """Carry out the operations of a commit."""
    for line in lines:
        if line["key"] == "header":
            continue
        place = repo / line["value"]["path"]
        if line["key"] == "file":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(base64.b64decode(line["value"]["content"]))
        elif line["key"] == "deletedFile":
            place.unlink()
        elif line["key"] == "deletedFolder":
            shutil.rmtree(place)
        else:
            raise _RefusedError(400, "BadRequest", f"this hub does not take {line['key']!r}")


# --- HTTP ---


class _RefusedError(Exception):
    """A status and the error code by which clients choose the exception they raise."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


def _asked_range(header: str, size: int) -> tuple[int, int]:
    """``bytes=2-5``, ``bytes=2-`` or ``bytes=-4`` as start and stop."""
    first, last = header.removeprefix("bytes=").split("-")
    if first == "":
        return max(0, size - int(last)), size
    start, stop = int(first), min(int(last) + 1, size) if last else size
    if start >= stop:
        raise _RefusedError(
            416, "RangeNotSatisfiable", header, **{"Content-Range": f"bytes */{size}"}
        )
    return start, stop


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep their connections
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr: ``LoopbackHub.requests`` is the log."""

    def _answer(self) -> None:
        # The body is read in any case, or the next request on this connection would start in it.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.hub.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            self._route(url.path)
        except _RefusedError as error:
            self._send(error.status, {"error": str(error)}, **error.headers)

    def _route(self, path: str) -> None:
        # Parts are unquoted one by one: a quoted slash belongs to a revision or a file's path.
        if path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {}})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(**json.loads(self.body))
        elif match := _RESOLVE.fullmatch(path):
            parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
            kind = "datasets" if parts["kind"] else "models"
            repo = self._repo(kind, parts["repo"], parts["revision"])
            self._resolve(repo, parts["path"])
        elif match := _API.fullmatch(path):
            parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
            repo = self._repo(parts["kind"], parts["repo"], parts["revision"])
            self._api(parts["what"], repo, parts["repo"], parts["path"])
        else:
            self.server.hub.unknown_requests.append(f"{self.command} {self.path}")
            raise _RefusedError(404, "NotFound", "this hub has no such route")

    def _repo(self, kind: str, name: str, revision: str) -> Path:
        repo = self.server.hub.repo(name, kind)
        if not repo.is_dir():
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        if revision not in ("", "main", _commit_hash(repo)):
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def _create(
        self, name: str, organization: str | None = None, type: str | None = None, **_: Any
    ) -> None:
        full_name = f"{organization or USER}/{name}"
        repo = self.server.hub.repo(full_name, f"{type or 'model'}s")
        status = 409 if repo.exists() else 200  # the address comes in both cases
        repo.mkdir(parents=True, exist_ok=True)
        prefix = "datasets/" if type == "dataset" else ""
        self._send(status, {"url": f"{self.server.hub.url}/{prefix}{full_name}"})

    def _api(self, what: str, repo: Path, name: str, path: str) -> None:
        if what in ("", "revision"):
            files = [{"rfilename": file} for file in _files(repo)]
            self._send(200, {"id": name, "sha": _commit_hash(repo), "siblings": files, "tags": []})
        elif what == "tree":
            if not (repo / path).is_dir():
                raise self._no_entry(repo, path)
            recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
            self._send(200, _tree(repo, path, recursive))
        elif what == "paths-info":
            paths = parse_qs(self.body.decode())["paths"]
            self._send(200, [_entry(repo, path) for path in paths if (repo / path).exists()])
        elif what == "preupload":
            # "regular" for every file: its content comes with the commit, without LFS or Xet
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": _blob_id(repo / file["path"])
                    if (repo / file["path"]).is_file()
                    else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._send(200, {"files": files})
        else:
            _commit(repo, [json.loads(line) for line in self.body.splitlines()])
            oid = _commit_hash(repo)
            url = f"{self.server.hub.url}/{name}/commit/{oid}"
            self._send(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _resolve(self, repo: Path, path: str) -> None:
        if not (repo / path).is_file():
            raise self._no_entry(repo, path)
        content = (repo / path).read_bytes()
        headers = {
            "ETag": f'"{_blob_id(repo / path)}"',
            "X-Repo-Commit": _commit_hash(repo),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if "Range" in self.headers:
            start, stop = _asked_range(self.headers["Range"], len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, content[start:stop], **headers)
        else:
            self._send(200, content, **headers)

    def _no_entry(self, repo: Path, path: str) -> _RefusedError:
        # with the commit, so that clients can remember that this file does not exist
        commit = {"X-Repo-Commit": _commit_hash(repo)}
        return _RefusedError(404, "EntryNotFound", f"Entry not found: {path}", **commit)

    def _send(self, status: int, answer: Any, **headers: str) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub


class LoopbackHub:
    """A context manager that answers like the hub on a free port of 127.0.0.1.

    Args:
        root: Where the repositories lie, as ``models/gpt2/config.json`` or
            ``datasets/user/name/train.jsonl``. Files put there are served at once.

    Attributes:
        url: The address, for ``HF_ENDPOINT``.
        requests: Every request so far, as ``"GET /gpt2/resolve/main/config.json"``.
        unknown_requests: Those for which this hub has no route.
    """

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[str] = []
        self.unknown_requests: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def repo(self, name: str, kind: str = "models") -> Path:
        """The folder of a repository, whether it exists or not."""
        return self.root / kind / name

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# --- clients ---


def client_environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """The environment in which the libraries know this hub and no other.

    They read ``HF_ENDPOINT`` when they are imported, so clients are processes of their own.
    """
    foreign = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|WANDB)_.*|.*_PROXY", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_dummy",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would tell amazonaws.com of each load
        "OMP_NUM_THREADS": "2",
    }


def run_client(hub: LoopbackHub, code: str, tmp_path: Path) -> str:
    """Run Python code in a new process that knows only this hub; returns what it printed.

    The process works in ``tmp_path`` and keeps its cache there.

    Raises:
        AssertionError: If the process fails, with its stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=client_environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_CLIENT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"the client failed ({done.returncode}):\n{done.stderr}"
    return done.stdout
