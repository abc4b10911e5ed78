"""State that a function changes itself, in notebook cells, and in a second kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("ipykernel")

from kernels import Kernel

CELLS = """
import warnings, memo
warnings.simplefilter("ignore")
runs = []
class Api:
    def __init__(self): self.requests, self.region = 0, "EU"
    def get(self, x):
        self.requests += 1
        return f"{self.region} {x}"
api, G = Api(), None
"""
FUNCTIONS = """
@memo.cache(name="nb:fetch", ttl=None)
def fetch(x):
    runs.append(x)
    return api.get(x)
@memo.cache(name="nb:lazy", ttl=None)
async def lazy(x):
    global G
    runs.append(x)
    if G is None: G = {"size": 1}
    return G["size"]
class Service:
    def __init__(self): self.api = Api()
    @memo.cache(name="nb:get", ttl=None)
    def get(self, x):
        runs.append(x)
        return self.api.get(x)
service = Service()
"""
CALLS = "print(fetch(1), fetch(1), await lazy(1), await lazy(1), service.get(1), service.get(1))"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Kernel]]:
    """Two kernels that share a cache."""
    home = tmp_path_factory.mktemp("kernels")
    made = [Kernel(home), Kernel(home)]
    yield made
    for kernel in made:
        kernel.close()


def test_cells_and_a_second_kernel_hit(kernels: list[Kernel]) -> None:
    """Counters and lazy globals cost no hit, in this kernel nor in the next; changes by hand do."""
    told = "EU 1 EU 1 1 1 EU 1 EU 1\n"
    first, second = kernels
    for kernel in kernels:
        kernel.run(CELLS)
        kernel.run(FUNCTIONS)
    assert first.run(CALLS).stdout == told
    assert first.run("print(runs)").stdout == "[1, 1, 1]\n"
    second.run("api.requests = 17")
    assert second.run(CALLS).stdout == told
    assert second.run("print(runs)").stdout == "[]\n"
    first.run("api.region, service.api.region, G = 'US', 'US', {'size': 9}")
    assert first.run(CALLS).stdout == "US 1 US 1 9 9 US 1 US 1\n"
