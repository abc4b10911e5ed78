"""Functions and arguments of a notebook in the workers of Dask, loky and Ray: the same entries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernels import Kernel

CELL = """
import dataclasses, os

FACTOR = 3

def helper(x):
    return FACTOR * x

class Plain:
    def __init__(self, n):
        self.n = n
    def __call__(self, x):
        return helper(self.n) + x

@dataclasses.dataclass(frozen=True)
class Data:
    n: int
    def __call__(self, x):
        return self.n + x

def closure(n):
    def inner(x):
        return helper(x) + n
    return inner

MADE = {
    "lambda": lambda x: helper(x),
    "function": helper,
    "closure": closure(2),
    "instance": Plain(2),
    "dataclass": Data(2),
}

@cache(ttl=None)
def load(make, x):
    return make(x), os.getpid()

@cache(ttl=None)
def fresh(make, x):
    return make(x), os.getpid()

here = {name: load(make, 5) for name, make in MADE.items()}
"""
ASK = """
there = ask(load)
first = ask(fresh)
back = {name: fresh(make, 5) for name, make in MADE.items()}
print(there == here, {pid for _, pid in here.values()} == {os.getpid()})
print(first == back, os.getpid() in {pid for _, pid in back.values()})
"""
WORKERS = {
    "dask": """
        from distributed import Client, LocalCluster
        cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
        client = Client(cluster)
        def ask(f):
            sent = {n: client.submit(f, m, 5, pure=False) for n, m in MADE.items()}
            return {name: future.result(60) for name, future in sent.items()}
        def end():
            client.close()
            cluster.close()
    """,
    "loky": """
        from joblib.externals.loky import get_reusable_executor
        pool = get_reusable_executor(max_workers=1)
        def ask(f):
            return {name: pool.submit(f, make, 5).result(60) for name, make in MADE.items()}
        def end():
            pool.shutdown(wait=True, kill_workers=True)
    """,
    "ray": """
        import ray, tempfile
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20,
                 _temp_dir=folder.name, log_to_driver=False)
        @ray.remote
        def call(f, make, x):
            return f(make, x)
        def ask(f):
            sent = {name: call.remote(f, make, 5) for name, make in MADE.items()}
            return {name: ray.get(there, timeout=60) for name, there in sent.items()}
        def end():
            ray.shutdown()
            folder.cleanup()
    """,
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("workers"))
    kernel.run(CELL)
    yield kernel
    kernel.close()


@pytest.mark.parametrize(
    "name", ["dask", "loky", pytest.param("ray", marks=pytest.mark.frameworks)]
)
def test_workers_share_entries_with_the_kernel(kernel: Kernel, name: str) -> None:
    """Workers find the kernel's results, and the kernel theirs."""
    kernel.run("fresh.invalidate()")
    kernel.run(WORKERS[name])
    try:
        assert kernel.run(ASK).stdout == "True True\nTrue False\n"
    finally:
        kernel.run("end()")
