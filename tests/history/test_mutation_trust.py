"""Each guard of trust is needed: with any single one taken out, the test that watches it fails.

A mutant is applied in a pytest of its own (this module is its plugin), which runs the one test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from checkout import ROOT, SUPPORT

CHOSEN = "MEMO_TRUST_MUTANT"
TESTS = ROOT / "tests"


def seal_check() -> None:
    """Mutant: seals are not compared."""
    from memo.records import seal

    seal.check_seal = lambda view, secrets: None


def key_binding() -> None:
    """An authentic entry is taken for whatever key it lies under."""
    from memo.records import seal

    def unpack(record: bytes, secrets: Any, namespace: str, key: str) -> Any:
        view = memoryview(record)
        seal.check_seal(view, secrets)
        header, stream = seal.parse(view)
        return seal.entry(header, stream, record)

    seal.unpack = unpack


def deadline() -> None:
    """Redis may take its time."""
    from memo.stores.redis.client import Client

    begin = Client.__init__
    Client.__init__ = lambda self, url, deadline, options=None: begin(self, url, 60.0)  # type: ignore[method-assign]


def shield() -> None:
    """Mutant: a cancelled caller takes the computation with it."""
    from memo.coordination.flights import Flights

    def remove_waiter(self: Flights, flight: Any, waiter: Any) -> None:
        if waiter in flight.waiters:
            flight.waiters.remove(waiter)
        if not flight.over and flight.handle is not None:
            flight.handle.cancel()

    Flights.remove_waiter = remove_waiter  # type: ignore[method-assign]


def size_check() -> None:
    """A payload file is mapped whatever its size."""
    from memo.runtime import private_files
    from memo.stores.disk import payload_files

    def open_(self: Any, size: int) -> memoryview:
        descriptor = private_files.open_old(self.path)
        try:
            return payload_files.map_file(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    payload_files.PayloadFile.open = open_  # type: ignore[method-assign]


def payload_digest() -> None:
    """The bytes of a payload are believed."""
    from memo.engine import loading

    loading.verify = lambda source, view, table: None


def voucher() -> None:
    """Any voucher vouches."""
    from memo.stores.disk.payload_files import PayloadFile

    PayloadFile.is_verified = lambda self, digest: True  # type: ignore[method-assign]


def private_copy() -> None:
    """Files are mapped where others may change them."""
    from memo.runtime import ownership

    ownership.exposed = lambda directory: False


def lost_journal() -> None:
    """A journal that cannot be read is taken to be empty."""
    from memo.stores.disk import recovery

    recovery.NAMESPACE_TURNS = "[]"


def expiry() -> None:
    """The times of the header do not matter."""
    from memo.validity import check

    check.ttl_in_force = lambda times, policy, live_ttl: None


def arguments() -> None:
    """Mutant: the arguments of a refresh are not compared again."""
    from memo.engine import computing

    async def same(port: Any, job: Any) -> bool:
        return True

    computing.has_same_key = same


def silence() -> None:
    """Events quote what others raised."""
    from memo.engine import answering, computing

    computing.error_text = answering.error_text = repr


def fall_through() -> None:
    """Mutant: an error of a tier reaches the caller."""
    from memo.errors import TierError
    from memo.stores.chain import Chain

    ask = Chain._ask

    async def raising(self: Chain, *args: Any) -> Any:
        try:
            return await ask(self, *args)
        except TierError as error:
            raise RuntimeError from error

    Chain._ask = raising  # type: ignore[method-assign]


WATCHED: dict[str, tuple[Callable[[], None], str]] = {
    "seal_check": (seal_check, "unit/records/test_seal.py::test_every_byte_counts"),
    "key_binding": (
        key_binding,
        "unit/records/test_seal.py::test_an_entry_belongs_to_its_key_and_namespace",
    ),
    "deadline": (deadline, "faults/test_redis_faults.py::test_dripped_reply"),
    "shield": (shield, "faults/test_cancellation.py::test_cancelled_follower"),
    "size_check": (
        size_check,
        "unit/stores/test_disk.py::test_a_missing_or_short_payload_is_a_tier_error",
    ),
    "payload_digest": (
        payload_digest,
        "unit/records/test_seal.py::test_forged_payload_bytes_in_redis_are_never_believed",
    ),
    "voucher": (voucher, "unit/records/test_seal.py::test_a_voucher_is_not_forged"),
    "private_copy": (private_copy, "faults/test_places.py::test_there_each_hit_is_a_verified_copy"),
    "lost_journal": (
        lost_journal,
        "faults/test_faults.py::test_a_broken_host_file_does_not_cost_redis",
    ),
    "expiry": (expiry, "unit/records/test_seal.py::test_expiry_is_enforced_from_the_header"),
    "arguments": (
        arguments,
        "unit/engine/test_values.py::test_a_refresh_of_changed_arguments_is_not_stored_sync",
    ),
    "silence": (silence, "unit/engine/test_trust.py::test_nothing_secret_shows"),
    "fall_through": (fall_through, "faults/test_faults.py::test_a_disk_that_takes_nothing"),
}

if CHOSEN in os.environ:  # as a plugin
    WATCHED[os.environ[CHOSEN]][0]()


def _outcome(mutant: str, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
    given = {
        **os.environ,
        "MEMO_TEST_GRACE": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT), str(TESTS / "history"))),
    }
    if mutant:
        given[CHOSEN] = mutant
        command += ["-p", "test_mutation_trust"]
    return subprocess.run(
        [*command, str(TESTS / tests)],
        capture_output=True,
        text=True,
        timeout=100,
        env=given,
        cwd=ROOT,
    )


@pytest.mark.parametrize("mutant", WATCHED)
def test_a_guard_of_trust_is_missed(mutant: str) -> None:
    """Without it, the test that watches it fails."""
    done = _outcome(mutant, WATCHED[mutant][1])
    assert done.returncode == 1, f"not noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert " failed" in done.stdout or " error" in done.stdout


def test_without_a_mutant_a_watching_test_passes() -> None:
    """The tests that notice the mutants let memo itself pass."""
    done = _outcome("", WATCHED["seal_check"][1])
    assert done.returncode == 0, done.stdout[-2000:]
