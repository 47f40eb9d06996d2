"""Access to a model: one thread at a time moves its stream, one generator owns it, and nothing uses it once freed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

from lminf_edge.errors import UserError

T = TypeVar("T", bound=type)


class ClosedError(UserError, RuntimeError):
    """The model was closed before it was used."""

    def __init__(self) -> None:
        super().__init__("This model has been closed.")


class StreamTakenError(UserError, RuntimeError):
    """A generator is continued after another call has moved the stream."""

    def __init__(self) -> None:
        super().__init__("Another call has moved this model's stream since: begin anew, or load one Llama for each.")


class Freed:
    """The class of objects that `close` has freed: any use raises ClosedError, not a dangling pointer."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise ClosedError

    def __setattr__(self, name: str, value: Any) -> None:
        raise ClosedError


class Guard:
    """
    Three rules:
    - A call that needs the context holds `lock`; a call from another thread waits.
    - A generator takes the stream with its first step and holds the lock during each step. It loses the stream when
      a call outside its own steps moves it.
    - `close` waits for all calls in progress, including those that need only the vocabulary.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closed = False
        self._owner: object | None = None  # of the stream
        self._step: object | None = None  # whose step is in progress; read only under the lock
        self._in_callback = False
        self._idle = threading.Condition()
        self._n_users = 0  # threads inside a call
        self._calls = threading.local()  # .depth: calls this thread is inside of

    def enter(self) -> None:
        """Begins a call. Raises ClosedError."""
        depth = getattr(self._calls, "depth", 0)
        if depth == 0:
            with self._idle:
                if self.closed:
                    raise ClosedError
                self._n_users += 1
        self._calls.depth = depth + 1

    def leave(self) -> None:
        self._calls.depth -= 1
        if self._calls.depth == 0:
            with self._idle:
                self._n_users -= 1
                self._idle.notify_all()

    def moved(self) -> None:
        """This call is about to move the stream. Raises UserError inside a callback."""
        if self._in_callback:
            raise UserError("A logits processor or stopping criterion cannot move the stream it is called for.")
        if self._step is None:
            self._owner = None

    @property
    def owns(self) -> bool:
        """Whether the generator whose step this is still has the stream."""
        return self._step is not None and self._owner is self._step and not self.closed

    @contextmanager
    def callback(self) -> Generator[None, None, None]:
        """Keeps a user's function from moving the stream that it looks at."""
        before, self._in_callback = self._in_callback, True
        try:
            yield
        finally:
            self._in_callback = before

    def steps(self, generator: Generator[Any, Any, Any], drives: bool = False) -> Generator[Any, Any, None]:
        """The same generator; each step has the lock, and raises StreamTakenError once the stream was lost.

        A generator that another one drives is a part of it; one that `drives` leaves it to that one to find out, since
        it may have something to say after the end of the stream.
        """
        me: object | None = None
        sent: Any = None
        try:
            while True:
                with self.lock:
                    self.enter()
                    outer = self._step
                    try:
                        if me is None:
                            me = outer or object()
                            self.moved()
                            self._owner = me
                        elif self._owner is not me and not drives:
                            raise StreamTakenError
                        self._step = me
                        value = generator.send(sent)
                    except StopIteration:
                        return
                    finally:
                        self._step = outer
                        self.leave()
                sent = yield value
        finally:
            with self.lock:
                outer, self._step = self._step, me
                try:
                    generator.close()
                finally:
                    self._step = outer

    @contextmanager
    def closing(self) -> Generator[bool, None, None]:
        """Waits until the model is idle and admits no more calls; yields whether it was open.

        Raises UserError inside a call of the same thread.
        """
        if getattr(self._calls, "depth", 0):
            raise UserError("This model is being used: close it after the call.")
        with self.lock:
            with self._idle:
                was_open, self.closed = not self.closed, True
                while self._n_users:
                    self._idle.wait()
            yield was_open


def guarded(*, shared: Iterable[str], moving: Iterable[str], free: Iterable[str]) -> Callable[[T], T]:
    """A class decorator that guards every public method and property, inherited ones too, by `self._guard`.

    shared  methods that need only the vocabulary and do not wait for a thread that moves the stream
    moving  methods that move the stream
    free    methods that touch nothing that `close` frees
    """
    shared, moving, free = frozenset(shared), frozenset(moving), frozenset(free)

    def guard(method: Any, name: str) -> Any:
        if name in shared:

            @functools.wraps(method)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                self._guard.enter()
                try:
                    return method(self, *args, **kwargs)
                finally:
                    self._guard.leave()
        else:
            moves = name in moving

            @functools.wraps(method)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                guard = self._guard
                with guard.lock:
                    guard.enter()
                    try:
                        if moves:
                            guard.moved()
                        return method(self, *args, **kwargs)
                    finally:
                        guard.leave()

        return call

    def decorate(cls: T) -> T:
        for name in dir(cls):
            if (name.startswith("_") and name != "__call__") or name in free:
                continue
            found = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
            if isinstance(found, property):
                setter = found.fset and guard(found.fset, f"{name}=")
                setattr(cls, name, property(guard(found.fget, name), setter, found.fdel, found.__doc__))
            elif callable(found) and not isinstance(found, (staticmethod, classmethod, type)):
                setattr(cls, name, guard(found, name))
        return cls

    return decorate
