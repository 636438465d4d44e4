"""A directory for one process alone. What a killed one leaves is removed when the next one is made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "owner"
"""Locked by the owner as long as it lives. A killed process cannot clean up, but its lock is gone."""


class OwnDirectory:
    """Made in the system's directory for temporary files; no other user can enter it.

    Those of the same prefix whose owners have died without removing them are removed first.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, prefix: str) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()), prefix)
        self.path, self._lock = _make(prefix)

    def remove(self) -> None:
        """With all that is in it; a second time does nothing."""
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _make(prefix: str) -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                return path, lock
        except BlockingIOError:
            pass
        except OSError:  # no locks on this file system: nobody may take it for abandoned
            os.close(lock)
            (path / _LOCK).unlink()
            return path, None
        os.close(lock)  # another process took it for abandoned before it was locked


def _remove(path: Path) -> None:
    """The lock last: what is interrupted can be done again."""
    for entry in path.glob("*"):
        if entry.name != _LOCK:
            entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(path / _LOCK):  # others' directories, or owners that live
            _remove(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """
    Raises:
        OSError: it is not there, is somebody else's, or is locked already.
    """
    lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
