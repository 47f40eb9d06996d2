"""Stored responses: what a conversation grew by in each, in memory and in files of the conversations' folder.

A stored response is its own input and output, and the name of the response before it: its size does not depend on how
long the conversation is. The stream that belongs to it is a checkpoint as any other (lminf_edge.cache.store): a request
that goes on from it is rendered as a whole, and only what no checkpoint has is processed.

The folder is untrusted input, and a cache: what is damaged, missing or cannot be written is unknown afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lminf_edge.files import open_regular

MAGIC = b"LMINFRSP1\n"
SUFFIX = ".response"
MAX_RESPONSES = 1 << 16
HELD_BYTES = 16 << 20  # of memory, for those that are in files

_NAME = re.compile(r"[0-9a-f]{32}")
_DIGEST = 16
_MAX_HEAD = 4 << 10
_ENTRY_BYTES = 600  # of memory, for each, about


Take = Callable[[int], None]  # raises what it will if so many bytes are too many


def _nothing(n_bytes: int) -> None:
    pass


@dataclass(frozen=True)
class Response:
    """
    owner     digest of its API key
    parent    name of the response before it, "" if it is the first
    n_tokens  of its prompt
    n_compacted  tokens of the prompt of the conversation's last compaction, 0 if there was none
    input     what the request added to the conversation
    output    what the answer added
    body      as it is given to clients; None: it is part of later ones only
    path      of the API whose terms input and output are in, "" if that is not known
    """

    owner: str
    parent: str
    n_tokens: int
    n_compacted: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    body: dict[str, Any] | None
    path: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class _Entry:
    owner: str
    parent: str
    n_bytes: int
    is_deleted: bool
    in_file: bool
    n_children: int = 0


class StoredResponses:
    """All stored responses of a server, the least recently used of which are dropped. Thread-safe."""

    def __init__(
        self, folder: Path | None, budget: int, note: Callable[[BaseException], None] = lambda _: None
    ) -> None:
        """
        folder  None: they are kept in memory alone; otherwise nobody else uses it
        budget  bytes of files, or of memory without a folder
        note    is told why something could not be kept
        """
        self._folder, self._budget, self._note = folder, budget, note
        self._lock = threading.Lock()
        # the first is used the longest ago, and nothing else goes on from it: each comes before its parent
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._held: OrderedDict[str, bytes] = OrderedDict()  # the least recently used first
        self.n_bytes = 0  # of all, about
        self._n_held = 0  # bytes of those in memory
        if folder is not None:
            try:
                self._scan(folder)
            except OSError as error:
                note(error)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, response: Response, before: Sequence[dict[str, Any]] = ()) -> None:
        """`before`: what was said until then; a part of the response if its parent was dropped while it was made."""
        with self._lock:
            is_orphan = bool(before) and response.parent not in self._entries
        if is_orphan:
            response = replace(response, parent="", input=[*before, *response.input])
        data = _packed(response, is_deleted=False)
        in_file = self._write(response.name, data)
        with self._lock:
            self._link(response.name, _Entry(response.owner, response.parent, len(data), False, in_file))
            self._hold(response.name, data)
            self._use(response.name)
            self._trim()

    def get(self, name: str, owner: str, take: Take = _nothing) -> Response | None:
        """The response of this name and owner, None if there is none. `take` is told its bytes before it is read."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.owner != owner or entry.is_deleted:
                return None
            take(entry.n_bytes)
            self._use(name)
            if entry.in_file:
                with contextlib.suppress(OSError):
                    os.utime(self._path(name), follow_symlinks=False)
            return self._read(name)

    def history(self, response: Response, take: Take = _nothing) -> list[dict[str, Any]] | None:
        """Inputs and outputs up to this response; None if a part of it is lost. `take` as in `get`, for the others."""
        with self._lock:
            names = [response.parent]
            while names[-1]:
                entry = self._entries.get(names[-1])
                if entry is None or entry.owner != response.owner or len(names) > len(self._entries):
                    return None
                names.append(entry.parent)
            take(sum(self._entries[name].n_bytes for name in names[:-1]))
            turns = [(response.input, response.output)]
            for name in names[:-1]:
                before = self._read(name)
                if before is None:
                    return None
                turns.append((before.input, before.output))
        return [item for turn in reversed(turns) for items in turn for item in items]

    def delete(self, name: str, owner: str) -> bool:
        """Deletes a response; what later ones need of it stays with them. False if there is none."""
        with self._lock:
            response = self._read(name)
            entry = self._entries.get(name)
            if response is None or entry is None or entry.owner != owner or entry.is_deleted:
                return False
            entry.is_deleted = True
            if entry.n_children:
                data = _packed(replace(response, body=None), is_deleted=True)
                entry.in_file = self._write(name, data)
                self.n_bytes += len(data) - entry.n_bytes
                entry.n_bytes = len(data)
                self._hold(name, data)
            else:
                self._drop(name)
            return True

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _link(self, name: str, entry: _Entry) -> None:
        self._entries[name] = entry
        self.n_bytes += entry.n_bytes + _ENTRY_BYTES
        if entry.parent in self._entries:
            self._entries[entry.parent].n_children += 1

    def _use(self, name: str) -> None:
        """Makes it, and what it goes on from, the most recently used."""
        seen: set[str] = set()  # files may claim to go on from each other
        while name in self._entries and name not in seen:
            seen.add(name)
            self._entries.move_to_end(name)
            name = self._entries[name].parent

    def _trim(self) -> None:
        while self._entries and (self.n_bytes > self._budget or len(self._entries) > MAX_RESPONSES):
            self._drop(next(iter(self._entries)))

    def _drop(self, name: str) -> None:
        """Drops a response, and those before it that are deleted and needed no more."""
        entry: _Entry | None = self._entries[name]
        while entry is not None:
            del self._entries[name]
            self.n_bytes -= entry.n_bytes + _ENTRY_BYTES
            self._n_held -= len(self._held.pop(name, b""))
            if entry.in_file:
                self._unlink(self._path(name))
            name = entry.parent
            entry = self._entries.get(name)
            if entry is not None:
                entry.n_children -= 1
                if not entry.is_deleted or entry.n_children > 0:
                    break

    def _hold(self, name: str, data: bytes) -> None:
        """Keeps its bytes in memory, as long as there is room."""
        self._n_held += len(data) - len(self._held.pop(name, b""))
        self._held[name] = data
        while self._folder is not None and self._n_held > HELD_BYTES and len(self._held) > 1:
            oldest, held = self._held.popitem(last=False)
            self._n_held -= len(held)
            if not self._entries[oldest].in_file:
                self._drop(oldest)

    # --- files --------------------------------------------------------------------------------------------------------

    def _scan(self, folder: Path) -> None:
        """What a process before has left."""
        found: list[tuple[float, str, _Entry]] = []
        with os.scandir(folder) as files:
            names = [file.name.partition(".") for file in files]
        for name, _, rest in names:
            if not _NAME.fullmatch(name) or f".{rest}" not in (SUFFIX, f"{SUFFIX}.part"):
                continue
            if rest.endswith(".part"):  # of a process that was killed
                self._unlink(folder / f"{name}{SUFFIX}.part")
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                file, size = open_regular(self._path(name), follow=False)
                with file:
                    head = _head(file.read(_MAX_HEAD))
                    used = os.fstat(file.fileno()).st_mtime
                entry = _Entry(str(head["owner"]), str(head["parent"]), size, bool(head["is_deleted"]), True)
                found.append((used, name, entry))
        for _, name, entry in found:
            self._link(name, entry)
        children = Counter(entry.parent for entry in self._entries.values())
        for name, entry in self._entries.items():
            entry.n_children = children[name]
        for _, name, _ in sorted(found, key=lambda each: each[0]):
            self._use(name)
        self._trim()

    def _read(self, name: str) -> Response | None:
        entry = self._entries.get(name)
        if entry is None:
            return None
        try:
            data = self._held.get(name)
            if data is None:
                file, size = open_regular(self._path(name), follow=False)
                with file:
                    data = file.read(size)
            response = _unpacked(name, data)
            if (response.owner, response.parent) != (entry.owner, entry.parent):
                raise ValueError("it is another response")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._note(error)
            self._drop(name)
            return None
        self._hold(name, data)
        return response

    def _write(self, name: str, data: bytes) -> bool:
        """Whether it is in a file now."""
        if self._folder is None:
            return False
        path = self._path(name)
        part = path.with_name(f"{path.name}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
                file.write(data)
            os.replace(part, path)
            return True
        except OSError as error:
            self._unlink(part)
            self._note(error)
            return False

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        assert _NAME.fullmatch(name)
        return self._folder / f"{name}{SUFFIX}"

    @staticmethod
    def _unlink(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _packed(response: Response, is_deleted: bool) -> bytes:
    """The bytes of a file: the magic, a line that tells whose it is, the rest, and a checksum."""
    head = {"owner": response.owner, "parent": response.parent, "is_deleted": is_deleted}
    fields = {name: value for name, value in asdict(response).items() if name not in ("owner", "parent", "name")}
    body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    data = MAGIC + json.dumps(head).encode() + b"\n" + body
    return data + blake2b(data, digest_size=_DIGEST).digest()


def _head(data: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    if not data.startswith(MAGIC):
        raise ValueError("it is no stored response")
    head = json.loads(data[len(MAGIC) :].partition(b"\n")[0])
    if not isinstance(head, dict):
        raise ValueError("its head is damaged")
    return head


def _unpacked(name: str, data: bytes) -> Response:
    """Raises ValueError, KeyError or TypeError for anything but what _packed has made."""
    if blake2b(memoryview(data)[:-_DIGEST], digest_size=_DIGEST).digest() != data[-_DIGEST:]:
        raise ValueError("it is damaged")
    head = _head(data[:_MAX_HEAD])
    fields = json.loads(data[data.index(b"\n", len(MAGIC)) + 1 : -_DIGEST].decode("utf-8", "surrogatepass"))
    return Response(owner=head["owner"], parent=head["parent"], name=name, **fields)


def names_in(text: str) -> Iterator[str]:
    """The names of responses that a text holds."""
    return iter(_NAME.findall(text))
