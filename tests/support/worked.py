"""Functions that tests send to workers by reference: the workers import this module."""

from __future__ import annotations

import os
import time
from pathlib import Path

import memo


@memo.cache(use_lock=True, ttl=None)
def slow(log: str, x: int) -> str:
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return f"{x} by {os.getpid()}"


class Service:
    """Methods of every kind."""

    @memo.cache
    def method(self, x: int) -> int:
        return x + 1

    @classmethod
    @memo.cache
    def of_class(cls, x: int) -> str:
        return f"{cls.__name__} {x}"

    @memo.cache
    @classmethod
    def of_class_too(cls, x: int) -> str:
        return f"{cls.__name__} {x}"

    @staticmethod
    @memo.cache
    def static(x: int) -> int:
        return x + 2

    @memo.cache
    @staticmethod
    def static_too(x: int) -> int:
        return x + 3


def where(function: object = None) -> tuple[str, str, str]:
    """The directory in use, where it came from, and the id of the secret.

    Args:
        function: a cached one, which brings the settings along.
    """
    settings = memo.settings.configuration.current()
    return str(settings.directory), settings.sources["directory"], settings.secrets[0].id.hex()
