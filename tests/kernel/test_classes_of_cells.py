"""Instances of a class that is defined in a cell, as they come from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Kernel

CLASS = """
import dataclasses, enum

@dataclasses.dataclass
class Result:
    value: int

    def twice(self):
        return 2 * self.value

class Colour(enum.Enum):
    RED = 1
"""
FUNCTION = """
@cache(ttl=None, version="1", name="cells:load")
def load(x):
    print("computed")
    return [Result(x), Colour.RED]
"""
CALL = """
result, colour = load(2)
print(isinstance(result, Result), type(result) is Result, colour is Colour.RED, result.twice())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def kernel(home: Path) -> Iterator[Kernel]:
    kernel = Kernel(home)
    yield kernel
    kernel.close()


@pytest.fixture(scope="module")
def restarted(home: Path) -> Iterator[Kernel]:
    kernel = Kernel(home)
    yield kernel
    kernel.close()


def test_a_cell_that_is_run_again(kernel: Kernel) -> None:
    """A hit is of the class that the notebook has now; of one that was edited, it is computed."""
    kernel.run(CLASS)
    kernel.run(FUNCTION)
    assert kernel.run(CALL).stdout == "computed\nTrue True True 4\n"
    kernel.run(CLASS)  # the same code, another class
    assert kernel.run(CALL).stdout == "True True True 4\n"
    kernel.run(CLASS.replace("2 * self.value", "3 * self.value"))
    assert kernel.run(CALL).stdout == "computed\nTrue True True 6\n"
    assert kernel.run(CALL).stdout == "True True True 6\n"


def test_a_class_in_a_restarted_kernel(kernel: Kernel, restarted: Kernel) -> None:
    """After a restart too, and where the class is gone or another the function is computed."""
    kernel.run(CLASS)
    kernel.run(FUNCTION)
    assert kernel.run(CALL).stdout == "computed\nTrue True True 4\n"
    restarted.run(CLASS)
    restarted.run(FUNCTION)
    assert restarted.run(CALL).stdout == "True True True 4\n"
    restarted.run(CLASS.replace("value: int", "value: int\n    unit: str = ''"))
    assert restarted.run(CALL).stdout == "computed\nTrue True True 4\n"
