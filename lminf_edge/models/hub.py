"""GGUF files from the Hugging Face hub: user/repo, or user/repo:Q8_0 for one of its quantizations.

A file has its name only once its sha256 is the one that the hub lists, and lies in a folder that is named after this
hash: another version never takes its place. What is there is used where the hub cannot be asked. HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE are understood. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lminf_edge.errors import UserError
from lminf_edge.files import locked, sync_folder

DEFAULT_QUANT = "Q4_K_M"

_ASK_SECONDS = 10.0  # for a list of files
_READ_SECONDS = 30.0  # without a byte of a file
_TRIES = 4  # that bring nothing
_WAIT = 1.0  # seconds between them
_BLOCK = 1 << 20
_MAX_LIST = 8 << 20  # bytes of a page of it
_MAX_PAGES = 20
_ROOM = 64 << 20  # that is left on the disk

_REPO = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([A-Za-z0-9][\w./-]{0,199}))?", re.ASCII)
# what a name may be on any disk; a path has such names alone
_NAME = re.compile(r"[A-Za-z0-9_+=][\w.+= -]{0,199}", re.ASCII)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NO_MODEL = re.compile(r"(^|[/.-])(mmproj|imatrix)", re.IGNORECASE)

OnProgress = Callable[[int, int], None]  # bytes that are there, and how many there are


class HubError(UserError):
    """The hub cannot be asked, or gives no answer."""


@dataclass(frozen=True)
class HubFile:
    path: str  # in its repository
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """A model's file, which is downloaded to `path` unless it is there."""

    path: Path
    repo: str
    file: HubFile | None  # None: the hub was not asked
    note: str = ""  # why not


def find(spec: str, folder: Path) -> Found:
    """What user/repo[:quant] stands for. Raises UserError if there is no such file, HubError if nobody can say."""
    match = _REPO.fullmatch(spec)
    if match is None or ".." in spec:
        raise UserError(f"{spec[:200]!r} is no repository: give USER/REPO, or USER/REPO:QUANT for one of its files.")
    repo, wanted = match[1], match[2] or ""
    place = folder / "hub" / repo.replace("/", "--")
    try:
        files = {file.path: file for file in _files(repo)}
    except HubError as error:
        there = {path.name: path for path in sorted(place.glob("*/*.gguf"), key=lambda path: path.stat().st_mtime)}
        try:
            return Found(there[choose(repo, list(there), wanted.rpartition("/")[2])], repo, None, str(error))
        except UserError:
            raise error from None
    file = files[choose(repo, list(files), wanted)]
    return Found(place / file.sha256[:16] / file.path.rpartition("/")[2], repo, file)


def choose(repo: str, paths: Sequence[str], wanted: str) -> str:
    """One of a repository's files: a quantization that is wanted, or Q4_K_M, or the first. Raises UserError."""
    models = sorted(path for path in paths if not _NO_MODEL.search(path))
    if not models:
        raise UserError(f"{repo} has no GGUF files: look for another repository, with GGUF in its name.")
    if wanted.lower().endswith(".gguf"):
        fitting = [path for path in models if path == wanted]
    else:
        quant = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted or DEFAULT_QUANT)}(?=[./-])", re.IGNORECASE)
        fitting = sorted((path for path in models if quant.search(path)), key=len)
    if not fitting and not wanted:
        fitting = models
    if not fitting:
        names = ", ".join(models[:12]) + (", ..." if len(models) > 12 else "")
        raise UserError(f"{repo} has no {wanted}: it has {names}.")
    whole = [path for path in fitting if not _PART.search(path)]
    if not whole:
        raise UserError(
            f"{fitting[0]} of {repo} is one of several parts of a model: choose a quantization in one file, or join "
            "them with llama.cpp's llama-gguf-split and give the path."
        )
    return whole[0]


def download(found: Found, on_progress: OnProgress | None = None) -> Path:
    """Leaves the file at its path. Goes on with what an earlier try has left. Raises UserError."""
    file, path = found.file, found.path
    if file is None or is_present(found):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        output = locked(part)
    except BlockingIOError:
        raise UserError(f"Another process is downloading {path.name}: wait for it.") from None
    with output:
        if not _is_there(output, part):  # it was finished, and perhaps begun again, before it was locked
            if is_present(found):
                return path
            raise UserError(f"Another process is downloading {path.name}: wait for it.")
        if is_present(found):
            part.unlink()
            return path
        sha256 = _complete(output, path.parent, found.repo, file, on_progress)
        is_right = sha256 == file.sha256
        os.fsync(output.fileno())
        if os.name != "nt":  # while it is locked, so that no other process goes on with it; Windows cannot
            _settle(part, path, is_right)
    if os.name == "nt":
        _settle(part, path, is_right)
    if not is_right:
        raise UserError(f"What came is not {file.path} of {found.repo} (another sha256): it was not kept, try again.")
    return path


def _is_there(output: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that has this path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(output.fileno()), path.stat())
    return False


def _settle(part: Path, path: Path, is_right: bool) -> None:
    if is_right:
        part.replace(path)
        sync_folder(path.parent)
    else:
        part.unlink()


def is_present(found: Found) -> bool:
    """Whether a file has been downloaded; its hash was compared then."""
    size = None if found.file is None else found.file.n_bytes
    return found.path.is_file() and size in (None, found.path.stat().st_size)


def _complete(output: BinaryIO, folder: Path, repo: str, file: HubFile, on_progress: OnProgress | None) -> str:
    """Appends what a file lacks; the sha256 of all of it."""
    sha256, done, n_tries = hashlib.sha256(), 0, 0
    while block := output.read(_BLOCK):
        sha256.update(block)
        done += len(block)
    room = shutil.disk_usage(folder).free + done
    if room < file.n_bytes + _ROOM:
        raise UserError(f"There is no room for {file.path}: it has {file.n_bytes:,} bytes, and {room:,} are free.")
    address = f"{_endpoint()}/{repo}/resolve/main/{urllib.parse.quote(file.path)}"
    while done < file.n_bytes:
        before = done
        try:
            with _open(address, _READ_SECONDS, {"Range": f"bytes={done}-"} if done else {}) as answer:
                if done and not str(answer.headers.get("Content-Range")).startswith(f"bytes {done}-"):
                    sha256, done = hashlib.sha256(), 0  # it sends all of it again
                    output.seek(0)
                    output.truncate(0)
                while block := answer.read(_BLOCK):
                    done += len(block)
                    if done > file.n_bytes:
                        break
                    _write(output, block)
                    sha256.update(block)
                    if on_progress is not None:
                        on_progress(done, file.n_bytes)
        except urllib.error.HTTPError as error:
            raise _refused(error, repo) from None
        except (OSError, http.client.HTTPException) as error:
            reason: Exception | None = error
        else:
            reason = None
        if done > file.n_bytes:
            return ""
        n_tries = n_tries + 1 if done <= before else 0
        if n_tries == _TRIES:
            raise _unreachable(reason or "it sends nothing") from None
        if done < file.n_bytes:
            time.sleep(_WAIT)
    return sha256.hexdigest()


def _write(output: BinaryIO, block: bytes) -> None:
    view = memoryview(block)
    try:
        while view:
            view = view[output.write(view) :]
    except OSError as error:  # not one of the network
        raise UserError(f"The model cannot be written: {error.strerror}.") from error


# --- the hub ----------------------------------------------------------------------------------------------------------


def _endpoint() -> str:
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        is_address = urllib.parse.urlsplit(address).scheme in ("http", "https")
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"HF_ENDPOINT is the address of a hub, not {address[:200]!r}.")
    return address


def _host() -> str:
    return urllib.parse.urlsplit(_endpoint()).netloc.rpartition("@")[2]


def _files(repo: str) -> Iterator[HubFile]:
    """The GGUF files of a repository. Raises HubError."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise HubError("HF_HUB_OFFLINE is set: unset it to download what is not there yet.")
    address = f"{_endpoint()}/api/models/{repo}/tree/main?recursive=true"
    for _ in range(_MAX_PAGES):
        try:
            with _open(address, _ASK_SECONDS, {}) as answer:
                text, link = answer.read(_MAX_LIST + 1), answer.headers.get("Link", "")
        except urllib.error.HTTPError as error:
            raise _refused(error, repo) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error) from None
        try:
            yield from filter(None, map(_file, json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            raise HubError(f"{_host()} sends no list of files for {repo}.") from None
        more = re.search(r"<([^>]*)>;\s*rel=\"next\"", link)
        if more is None or not more[1].startswith(f"{_endpoint()}/"):
            return
        address = more[1]


def _file(entry: Any) -> HubFile | None:
    """A GGUF file of a list, if it is one with a hash and a name that any disk takes."""
    if not isinstance(entry, dict) or not isinstance(path := entry.get("path"), str):
        return None
    large = entry.get("lfs")
    if (
        not path.lower().endswith(".gguf")
        or not all(map(_NAME.fullmatch, path.split("/")))
        or not isinstance(large, dict)
    ):
        return None
    n_bytes, sha256 = large.get("size"), large.get("oid")
    if not isinstance(n_bytes, int) or n_bytes <= 0 or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
        return None
    return HubFile(path, n_bytes, str(sha256))


def _refused(error: urllib.error.HTTPError, repo: str) -> HubError:
    error.close()
    if error.code in (401, 403):
        return HubError(
            f"{_host()} does not let us read {repo}: there is none, or it is private, or has terms to accept on its "
            "page. With access to it, set HF_TOKEN to your token."
        )
    if error.code == 404:
        return HubError(f"There is no {repo} at {_host()}.")
    return HubError(f"{_host()} does not give us {repo}: it answers with status {error.code}, try again later.")


def _unreachable(error: object) -> HubError:
    reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    return HubError(
        f"{_host()} cannot be reached ({reason.rstrip('.')}): check the network, or download the GGUF file elsewhere "
        "and give its path."
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Goes where the hub sends us, with the token only to itself, and never from TLS to none."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        made = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if made is None:
            return None
        if made.type not in ("http", "https") or (req.type == "https" and made.type == "http"):
            raise urllib.error.URLError(f"it redirects to {made.type}")
        token = req.unredirected_hdrs.get("Authorization")
        if token and urllib.parse.urlsplit(made.full_url)[:2] == urllib.parse.urlsplit(req.full_url)[:2]:
            made.add_unredirected_header("Authorization", token)
        return made

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 has none


def _open(address: str, timeout: float, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(address, headers={"User-Agent": "lminf-edge", **headers})
    if token := os.environ.get("HF_TOKEN", "").strip():
        if not re.fullmatch("[!-~]+", token):
            raise UserError("HF_TOKEN is no token: it has spaces or other characters.")
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
