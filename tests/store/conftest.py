"""A kill -9 that strikes before a chosen system call."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


class Killed(BaseException):
    """Stands for a kill -9: nothing in the code may catch it."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], bool]:
    """killed_at(action, k): run `action`, end it before its system call number k on files; True when it got that far."""

    def run(action: Callable[[], object], k: int) -> bool:
        calls = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls > k:
                    raise Killed
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                action()
            except Killed:
                return True
        return False

    return run
