"""Runs on several machines and one folder behind a URI: one at a time, as far as a lease can see.

A machine is a TOKENDIFF_CACHE: locks on files reach no further.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines import lock
from pipelines.lock import is_held
from tests.starts import STARTERS, started_by
from tokendiff.artifacts.locations import RemotePath, remove, upload

RENEWAL, PAUSE = 0.4, 0.02
HOLD = """
import sys, time
from pipelines.lock import alone
from tokendiff.artifacts.locations import RemotePath
with alone(RemotePath(sys.argv[1]), renewal_s=0.5, pause_s=0.0):
    print("held", flush=True)
    time.sleep(60)
"""
Move = Callable[[str], None]


def alone(folder: RemotePath) -> AbstractContextManager[object]:
    return lock.alone(folder, renewal_s=RENEWAL, pause_s=PAUSE)


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Move:
    """Go on on the machine of that name."""

    def move(name: str) -> None:
        monkeypatch.setenv("TOKENDIFF_CACHE", str(tmp_path / name))

    move("a")
    return move


@pytest.fixture
def folder(tmp_path: Path) -> RemotePath:
    return RemotePath(f"memory://{tmp_path.name}/toy")


def write_lease(folder: RemotePath, **fields: Any) -> dict[str, Any]:
    """A lease of somebody else's, as it stands there."""
    lease = {"host": "far", "pid": "7", "since": "2026", "token": "other", "renewal_s": RENEWAL}
    lease |= {"renewed": time.time(), **fields}
    (folder / ".lock.holder").write_bytes(json.dumps(lease).encode())
    return lease


def read_lease(folder: RemotePath) -> dict[str, Any]:
    lease: dict[str, Any] = json.loads((folder / ".lock.holder").read_text())
    return lease


def test_while_it_is_held_others_are_refused_wherever_they_are(
    folder: RemotePath, move: Move
) -> None:
    assert not is_held(folder)
    with alone(folder):
        since = read_lease(folder)["since"]
        for machine in ("a", "b"):
            move(machine)
            assert is_held(folder)
            with pytest.raises(BlockingIOError, match=rf"process \d+ on .*, since {since}"):
                alone(folder).__enter__()
        time.sleep(8 * RENEWAL)  # twice what an unrenewed one lives
        assert is_held(folder)
        with pytest.raises(BlockingIOError):
            alone(folder).__enter__()
    assert not is_held(folder)
    assert not (folder / ".lock.holder").exists()
    with alone(folder):
        pass


@pytest.mark.parametrize("machine", ["a", "b"])
def test_the_lease_of_a_killed_run_is_taken_over(s3: str, move: Move, machine: str) -> None:
    """At once where its machine's own lock tells of its death, elsewhere after a while."""
    folder = RemotePath(f"{s3}/lease/{machine}")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder.uri], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        move(machine)
        with pytest.raises(BlockingIOError, match=rf"is under way \(process {process.pid} on"):
            alone(folder).__enter__()
        process.kill()
        process.wait()
    killed = time.monotonic()
    if machine == "b":
        # A machine that is too busy to look in time finds nothing to wait for.
        with suppress(BlockingIOError), alone(folder):
            assert time.monotonic() - killed > 4 * 0.5
            return
        time.sleep(max(0.0, 4 * 0.5 - (time.monotonic() - killed)))
        assert not is_held(folder)
    with alone(folder):
        assert read_lease(folder)["pid"] != str(process.pid)
    took = time.monotonic() - killed
    assert took < 4 * 0.5 if machine == "a" else took > 6 * 0.5


def test_a_wrong_clock_costs_a_wait_and_not_the_lease(folder: RemotePath, move: Move) -> None:
    for wrong in (-3600.0, 3600.0):
        write_lease(folder, renewed=time.time() + wrong)  # dead
        started = time.monotonic()
        with alone(folder):
            assert time.monotonic() - started >= 2 * RENEWAL
        write_lease(folder, renewed=time.time() + wrong)
        is_over = threading.Event()

        def renew(wrong: float = wrong, is_over: threading.Event = is_over) -> None:
            while not is_over.wait(RENEWAL / 2):
                write_lease(folder, renewed=time.time() + wrong)

        holder = threading.Thread(target=renew)
        holder.start()
        try:
            with pytest.raises(BlockingIOError, match="process 7 on far"):
                lock.alone(folder, renewal_s=RENEWAL, pause_s=0.0).__enter__()
        finally:
            is_over.set()
            holder.join()
        assert read_lease(folder)["token"] == "other"


def test_of_two_that_start_at_once_the_later_writer_stays(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        write_lease(folder)
        sleep(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        with pytest.raises(BlockingIOError, match="process 7 on far"):
            alone(folder).__enter__()
    assert read_lease(folder)["token"] == "other"


@pytest.mark.parametrize("starter", STARTERS)
def test_who_lost_the_lease_is_interrupted_and_leaves_it(
    folder: RemotePath, move: Move, starter: str
) -> None:
    def lose() -> None:
        with alone(folder):
            write_lease(folder)
            time.sleep(10)

    started = time.monotonic()
    with started_by(starter), pytest.raises(BlockingIOError, match="process 7 on far"):
        lose()
    assert time.monotonic() - started < 5
    assert read_lease(folder)["token"] == "other"


def test_who_lost_the_lease_can_write_nothing_more(
    folder: RemotePath, move: Move, tmp_path: Path
) -> None:
    """Though the interrupt is kept from it, as it may be by a library."""
    (tmp_path / "part").write_text("")

    def go_on() -> None:
        with alone(folder):
            write_lease(folder)
            with suppress(KeyboardInterrupt):
                time.sleep(10)
            for write in (
                lambda: (folder / "part").write_bytes(b""),
                lambda: (folder / "old").unlink(),
                lambda: remove(folder / "data"),
                lambda: upload(tmp_path, folder / "data", ["part"]),
            ):
                with pytest.raises(BlockingIOError, match="process 7 on far"):
                    write()
            (folder / "runs" / "mine").write_bytes(b"")
            (folder.parent / "toy2").write_bytes(b"")

    (folder / "old").write_bytes(b"")
    (folder / "data" / "kept").write_bytes(b"")
    with pytest.raises(BlockingIOError, match="process 7 on far"):
        go_on()
    assert (folder / "old").exists()
    assert (folder / "data" / "kept").exists()
    assert not (folder / "part").exists()
    assert (folder / "runs" / "mine").exists()
    assert (folder.parent / "toy2").exists()
    (folder / "part").write_bytes(b"")  # of the next holder in this process


def test_a_lease_that_is_lost_outside_of_the_main_thread_ends_the_run_at_its_next_write(
    folder: RemotePath, move: Move
) -> None:
    ended_with: list[BaseException] = []

    def lose() -> None:
        try:
            with alone(folder):
                write_lease(folder)
                while True:
                    (folder / "part").write_bytes(b"")
                    time.sleep(RENEWAL / 10)
        except BaseException as error:
            ended_with.append(error)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    thread.join(10)  # in which this thread is not interrupted
    assert isinstance(ended_with[0], BlockingIOError)
    assert read_lease(folder)["token"] == "other"


DEAF = """
import time
from pipelines import lock
from tokendiff.artifacts.locations import RemotePath
lock.LAST_RESORT_SECONDS = 0.2
folder = RemotePath("memory://toy")
with lock.alone(folder, renewal_s=0.3, pause_s=0.0):
    (folder / ".lock.holder").write_bytes(b'{"token": "other"}')
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_a_run_that_does_not_heed_the_interrupt_takes_the_process_with_it(move: Move) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 4
    assert "memory://toy: another run that writes there is under way" in done.stderr
    assert done.stderr.rstrip().endswith("the process ends, since the run does not")


def test_a_lease_that_was_deleted_is_written_again(folder: RemotePath, move: Move) -> None:
    with alone(folder):
        (folder / ".lock.holder").unlink()
        time.sleep(3 * RENEWAL)
        assert is_held(folder)
        move("b")
        with pytest.raises(BlockingIOError):
            alone(folder).__enter__()


@pytest.mark.parametrize("has_ended", [False, True])
def test_who_was_suspended_writes_nothing_before_it_has_looked(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    """Long before its next renewal; also where the other run has come and gone meanwhile."""
    wakes_at = lock._now() + 1000.0

    def sleep_and_go_on() -> None:
        with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
            (folder / "part").write_bytes(b"mine")
            if has_ended:
                (folder / ".lock.holder").unlink()
            else:
                write_lease(folder)
            (folder / "part").write_bytes(b"other")
            monkeypatch.setattr(lock, "_now", lambda: wakes_at)
            (folder / "part").write_bytes(b"mine again")

    says = "took this over.*and has ended" if has_ended else "process 7 on far"
    with pytest.raises(BlockingIOError, match=says):
        sleep_and_go_on()
    assert (folder / "part").read_bytes() == b"other"


def test_who_was_suspended_and_is_still_the_holder_goes_on(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
        before, wakes_at = read_lease(folder)["renewed"], lock._now() + 1000.0
        monkeypatch.setattr(lock, "_now", lambda: wakes_at)
        (folder / "part").write_bytes(b"")
        assert read_lease(folder)["renewed"] > before


@pytest.mark.parametrize("has_ended", [False, True])
def test_who_was_suspended_while_it_looked_looks_again(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    """What it read was true before: written anew, its lease would be back."""
    read, start = lock._read, lock._now()

    def sleep_and_go_on() -> None:
        with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
            (folder / "part").write_bytes(b"mine")
            monkeypatch.setattr(lock, "_now", lambda: start + 1000.0)
            monkeypatch.setattr(lock, "_read", read_and_sleep)
            (folder / "part").write_bytes(b"mine again")

    def read_and_sleep(path: RemotePath) -> dict[str, object]:
        there = read(path)
        monkeypatch.setattr(lock, "_read", read)
        monkeypatch.setattr(lock, "_now", lambda: start + 2000.0)
        if has_ended:
            (folder / ".lock.holder").unlink()
        else:
            write_lease(folder)
        return there

    says = "took this over.*and has ended" if has_ended else "process 7 on far"
    with pytest.raises(BlockingIOError, match=says):
        sleep_and_go_on()
    assert (folder / "part").read_bytes() == b"mine"
    assert (folder / ".lock.holder").exists() is not has_ended


def test_who_was_suspended_while_it_gave_its_lease_back_leaves_that_of_another(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, start = lock._read, lock._now()

    def read_and_sleep(path: RemotePath) -> dict[str, object]:
        there = read(path)
        monkeypatch.setattr(lock, "_read", read)
        monkeypatch.setattr(lock, "_now", lambda: start + 1000.0)
        write_lease(folder)
        return there

    def work() -> None:
        with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
            monkeypatch.setattr(lock, "_read", read_and_sleep)

    with pytest.raises(BlockingIOError, match="process 7 on far"):
        work()
    assert read_lease(folder)["token"] == "other"


def test_who_finds_all_done_by_the_run_that_took_over_lost_its_lease_all_the_same(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes nothing, and so does not look before its end."""
    start = lock._now()

    def sleep_and_read() -> None:
        with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
            (folder / ".lock.holder").unlink()
            monkeypatch.setattr(lock, "_now", lambda: start + 1000.0)

    with pytest.raises(BlockingIOError, match=r"took this over.*and has ended"):
        sleep_and_read()


@pytest.mark.parametrize("looks", ["before a write", "at a renewal"])
def test_who_was_suspended_while_it_renewed_does_not_trust_its_lease(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch, looks: str
) -> None:
    """A write of several requests may end behind all that another run did, and so hide it."""
    write, start = RemotePath.write_bytes, lock._now()

    def sleep_and_write(path: RemotePath, data: bytes) -> None:
        if path.name == ".lock.holder":
            monkeypatch.setattr(lock, "_now", lambda: start + 2000.0)
        write(path, data)

    def work() -> None:
        renewal_s = RENEWAL if looks == "at a renewal" else 60.0
        with lock.alone(folder, renewal_s=renewal_s, pause_s=0.0):
            monkeypatch.setattr(lock, "_now", lambda: start + 1000.0)
            monkeypatch.setattr(RemotePath, "write_bytes", sleep_and_write)
            if looks == "at a renewal":
                time.sleep(10)
            (folder / "part").write_bytes(b"mine")

    with pytest.raises(BlockingIOError, match="while it wrote its lease"):
        work()
    assert not (folder / "part").exists()
    assert not (folder / ".lock.holder").exists()


def test_who_was_suspended_while_it_took_a_lease_gives_it_back(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have written over that of a run which began meanwhile, and writes its own again."""
    write, start = RemotePath.write_bytes, lock._now()

    def sleep_and_write(path: RemotePath, data: bytes) -> None:
        monkeypatch.setattr(lock, "_now", lambda: start + 1000.0)
        write(path, data)

    monkeypatch.setattr(RemotePath, "write_bytes", sleep_and_write)
    with pytest.raises(BlockingIOError, match="while it wrote its lease"):
        alone(folder).__enter__()
    assert not (folder / ".lock.holder").exists()


def test_a_lease_lives_from_when_it_began_to_be_written(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That time stands in it, and others go by it, however long the store took to write it."""
    write, start = RemotePath.write_bytes, lock._now()

    def write_for_long(path: RemotePath, data: bytes) -> None:
        monkeypatch.setattr(lock, "_now", lambda: start + 200.0)
        write(path, data)

    def work() -> None:
        with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
            monkeypatch.setattr(RemotePath, "write_bytes", write)
            write_lease(folder)
            monkeypatch.setattr(lock, "_now", lambda: start + 300.0)
            (folder / "part").write_bytes(b"mine")

    monkeypatch.setattr(RemotePath, "write_bytes", write_for_long)
    with pytest.raises(BlockingIOError, match="process 7 on far"):
        work()
    assert not (folder / "part").exists()


def test_a_store_that_never_answers_in_time_is_an_error(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, clock = lock._now(), iter(range(1000, 100_000, 1000))
    with lock.alone(folder, renewal_s=60.0, pause_s=0.0):
        monkeypatch.setattr(lock, "_now", lambda: start + next(clock))
        with pytest.raises(TimeoutError, match=r"\.lock\.holder: the store takes \d+ s to answer"):
            (folder / "part").write_bytes(b"mine")
        monkeypatch.undo()
        move("a")


def test_renewal_survives_whatever_the_store_raises(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[RemotePath] = []
    write = RemotePath.write_bytes

    def fail(path: RemotePath, data: bytes) -> None:
        if len(failures) < 2:
            failures.append(path)
            raise RuntimeError("of a package that knows no OSError")
        write(path, data)

    with alone(folder):
        monkeypatch.setattr(RemotePath, "write_bytes", fail)
        before = read_lease(folder)["renewed"]
        time.sleep(5 * RENEWAL)
        assert len(failures) == 2
        assert read_lease(folder)["renewed"] > before


def test_a_renewal_that_is_under_way_as_the_run_ends_leaves_no_lease(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, has_begun, has_ended = RemotePath.write_bytes, threading.Event(), threading.Event()

    def write_for_long(path: RemotePath, data: bytes) -> None:
        has_begun.set()
        time.sleep(0.1)
        write(path, data)
        has_ended.set()

    with alone(folder):
        monkeypatch.setattr(RemotePath, "write_bytes", write_for_long)
        assert has_begun.wait(10)
    assert has_ended.wait(10)
    assert not (folder / ".lock.holder").exists()


def test_a_start_that_is_interrupted_leaves_no_lease(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            alone(folder).__enter__()
    assert not (folder / ".lock.holder").exists()


def test_a_lease_that_could_not_be_given_back_is_known_to_be_dead_here(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: RemotePath, *, missing_ok: bool = False) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch, alone(folder):
        patch.setattr(RemotePath, "unlink", refuse)
    token = read_lease(folder)["token"]
    assert not is_held(folder)
    with alone(folder):
        assert read_lease(folder)["token"] != token


def test_a_lease_whose_writing_had_no_answer_is_known_to_be_dead_here(
    folder: RemotePath, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RemotePath.write_bytes

    def lose_the_answer(path: RemotePath, data: bytes) -> None:
        write(path, data)
        raise ConnectionError("no answer")

    def refuse(path: RemotePath, *, missing_ok: bool = False) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "write_bytes", lose_the_answer)
        patch.setattr(RemotePath, "unlink", refuse)
        with pytest.raises(ConnectionError, match="no answer"):
            alone(folder).__enter__()
    assert not is_held(folder)
    with alone(folder):
        pass


HOLD_ON_CLUSTER = """
import sys, time
from pathlib import Path
import ray
from pipelines.lock import alone_on_cluster
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
with alone_on_cluster(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_on_a_cluster_another_driver_waits_until_the_holder_is_dead(
    ray_session: None, tmp_path: Path
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_ON_CLUSTER, address, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with (
            pytest.raises(BlockingIOError, match=rf"process {holder.pid} on "),
            lock.alone_on_cluster(tmp_path),
        ):
            pass
        with lock.alone_on_cluster(tmp_path / "another"):
            pass
    finally:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 30.0
    while True:
        try:
            with lock.alone_on_cluster(tmp_path):
                break
        except BlockingIOError:
            assert time.monotonic() < deadline, "the lock of a killed driver is never freed"
            time.sleep(0.2)
