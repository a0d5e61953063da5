"""One run at a time: a lock on the folder, and on a cluster a name that only one can have.

The system frees the first when its holder dies, the cluster the second: an actor goes with the
driver that made it. A folder behind a URI has a lease besides (`alone`).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.interrupt import Interrupt
from pipelines.paths import RUNS
from tokendiff.artifacts.locations import (
    Location,
    RemotePath,
    guarded_writes,
    mirror_of,
)
from tokendiff.artifacts.manifest import write_atomically

_NAMESPACE = "tokendiff-locks"
_ANSWER_SECONDS = 5.0
_GLANCE_SECONDS = 1.0  # `is_held` has the lock for an instant, which refuses nobody
_HOLDER = ".lock.holder"
EXIT_LOCKED = 4
RENEWAL_SECONDS = 10.0
PAUSE_SECONDS = 1.0
LAST_RESORT_SECONDS = 60.0
DEAD_AFTER = 4  # renewals that did not come
logger = logging.getLogger(__name__)


@dataclass
class Hold:
    """A folder's lock while it is held; `lost` says who took its lease meanwhile."""

    lost: BlockingIOError | None = None

    def check(self) -> None:
        """Raise BlockingIOError where the lease is lost."""
        if self.lost is not None:
            raise self.lost

    @contextmanager
    def told(self) -> Iterator[None]:
        """However this block ends once the lease is lost, it ends with that."""
        try:
            yield
        except BaseException:
            if self.lost is not None:
                raise self.lost from None
            raise
        self.check()


@contextmanager
def alone(
    folder: Location,
    *,
    over: Location | None = None,
    renewal_s: float | None = None,
    pause_s: float | None = None,
) -> Iterator[Hold]:
    """Hold the folder's lock.

    For a folder behind a URI, runs on this machine exclude each other by a lock on its mirror, and
    runs on other machines by a lease, `.lock.holder`, which says who holds it and is written anew
    every `renewal_s` seconds. Object stores have no locks, so a lease is weaker than one:

    - Who starts while it is renewed is refused. Who writes one waits `pause_s`, and goes on only if
      it is still there: of two that start at once, the later writer stays. This holds as long as a
      write arrives within `pause_s`, and what was written is what the next reader gets, as with S3
      and Google's store.
    - A lease that was not renewed four times over, by its own time and this machine's clock, and is
      not renewed within two renewals more, while this run looks, is taken over. So clocks may
      differ: a wrong one costs a wait, not the lease.
    - A holder that was only cut off from the store for that long, or suspended, looks at its lease
      before it writes anything more, and at its next renewal. It finds another's, or none where the
      other has ended. A renewal whose own write took that long ends the run too, since it may have
      hidden another's lease. What is on its way to the store in that instant may still arrive
      there: what a manifest does not vouch for is made again.

    From the moment that it finds so, this process can write nothing more under
    `over`, and the block is interrupted, which leaves it as a BlockingIOError. A block that is not
    left within LAST_RESORT_SECONDS, since it is not in the main thread or does not heed the
    interrupt, takes the process with it, with exit code 4; so Ray's workers end too, at the latest
    then.

    Args:
        over: where only the holder may write, `runs/` apart, in which each run has a folder of its
            own; `folder` itself by default.
        renewal_s, pause_s: of the lease; RENEWAL_SECONDS and PAUSE_SECONDS.

    Raises:
        BlockingIOError: another run holds it, or took it; the message says which.
    """
    hold = Hold()
    here = mirror_of(folder)
    here.mkdir(parents=True, exist_ok=True)
    holder = here / _HOLDER
    try:
        locked = FileLock(here / ".lock", timeout=_GLANCE_SECONDS).acquire()
    except Timeout as error:
        raise _taken(folder, _read(holder)) from error
    with locked:
        before, me = _read(holder), _myself()
        write_atomically(holder, json.dumps(me).encode())
        lease = None
        try:
            if isinstance(folder, RemotePath):
                renewal_s = RENEWAL_SECONDS if renewal_s is None else renewal_s
                pause_s = PAUSE_SECONDS if pause_s is None else pause_s
                over = folder if over is None else over
                assert isinstance(over, RemotePath)
                lease = _Lease(folder, over, me, renewal_s, hold)
                # One that died here left both; this machine's lock says that it is dead.
                lease.take(is_dead=before.get("token"), pause_s=pause_s)
                with hold.told(), Interrupt() as interrupt, lease.kept(interrupt):
                    yield hold
            else:
                yield hold
        finally:
            if lease is None or lease.is_given_back:  # else the next run here knows it by this
                holder.unlink(missing_ok=True)


def is_held(folder: Location) -> bool:
    """Whether a run holds the folder's lock; of another machine's, whether it seems to be alive."""
    here = mirror_of(folder)
    if (here / ".lock").exists() and _is_locked(here / ".lock"):
        return True
    if isinstance(folder, Path):
        return False
    there, died_here = _read(folder / _HOLDER), _read(here / _HOLDER)
    return _fresh(there) and there.get("token") != died_here.get("token")


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:  # who watches may have no right to write there
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class _Lease:
    """An object in the store that says who has a folder, for as long as its thread renews it."""

    def __init__(
        self,
        folder: RemotePath,
        over: RemotePath,
        holder: dict[str, Any],
        renewal_s: float,
        hold: Hold,
    ) -> None:
        self._folder, self._path, self._over, self._hold = folder, folder / _HOLDER, over, hold
        self._holder, self._renewal_s = holder, renewal_s
        self._is_over = threading.Event()
        self._renewed = 0.0  # when, by `_now`
        self.is_given_back = True

    def take(self, *, is_dead: str | None, pause_s: float) -> None:
        """Write it where there is none that is alive.

        Args:
            is_dead: the token of a holder that is known to be.

        Raises:
            BlockingIOError: another run has it.
        """
        there = self._read_now()
        if there and there.get("token") != is_dead:
            self._see_it_dead(there)
        looked = _now()
        self.is_given_back = False
        try:
            self._write()
            time.sleep(pause_s)
            if not self._is_ours(there := _read(self._path)):
                raise _taken(self._folder, there)
            if self._is_long_since(looked):  # and what is there may hide that of another
                raise self._overtaken()
        except BaseException:
            self._give_back()
            raise

    def _see_it_dead(self, there: dict[str, Any]) -> None:
        if _fresh(there):
            raise _taken(self._folder, there)
        # Its time is that of another clock: one that lives writes it anew while we look.
        wait_s = 2 * float(there.get("renewal_s", self._renewal_s))
        logger.warning(
            "%s: no sign of life of the run that has it (process %s on %s); it is taken over if "
            "there is none within %g s",
            *(self._folder, there.get("pid"), there.get("host"), wait_s),
        )
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._renewal_s / 2))
            if (now := _read(self._path)) and now != there:
                raise _taken(self._folder, now)

    @contextmanager
    def kept(self, interrupt: Interrupt) -> Iterator[None]:
        """It is renewed while this block runs, and given back then; `interrupt` is sent when it is
        found to be another's.
        """
        name = f"lease {self._folder}"
        thread = threading.Thread(target=self._keep, args=(interrupt,), name=name, daemon=True)
        thread.start()
        but_to = (self._over / RUNS, self._path)
        with guarded_writes(self._over, but_to=but_to, check=self._check):
            try:
                yield
            finally:
                self._is_over.set()
                try:
                    thread.join()  # which an interrupt may cut short
                finally:
                    self._give_back()

    def _give_back(self) -> None:
        try:
            if self._is_ours(there := self._read_now()):
                self._path.unlink(missing_ok=True)
            else:  # the loss ends the run here as it does anywhere else
                self._note_loss(there)
            self.is_given_back = True
        except Exception as error:  # the run is over; what is left goes dead by itself
            logger.warning("%s is left behind: %s", self._path, error)

    def _keep(self, interrupt: Interrupt) -> None:
        while not self._is_over.wait(self._renewal_s):
            try:
                if self._is_lost() or self._renew():
                    break
            except Exception as error:  # whatever the store's package raises: the next may succeed
                logger.warning("%s is not renewed: %s", self._path, error)
        else:
            return
        lost = self._hold.lost
        logger.error("%s; this run is stopped", lost)
        interrupt.send()
        if not self._is_over.wait(LAST_RESORT_SECONDS):
            logger.critical("%s; the process ends, since the run does not", lost)
            time.sleep(PAUSE_SECONDS)  # stderr may be passed on by a thread of this process
            os._exit(EXIT_LOCKED)

    def _check(self) -> None:
        """Raise BlockingIOError where the lease is lost; asks the store only where another may have
        taken it since.
        """
        if self._hold.lost is None and self._may_be_taken() and not self._is_lost():
            self._renew()  # before somebody who looks takes it over
        if self._hold.lost is not None:
            raise BlockingIOError(str(self._hold.lost))

    def _is_lost(self) -> bool:
        self._note_loss(self._read_now())
        return self._hold.lost is not None

    def _note_loss(self, there: dict[str, Any]) -> None:
        if there and not self._is_ours(there):
            self._hold.lost = _taken(self._folder, there)
        elif not there and self._may_be_taken():
            self._hold.lost = BlockingIOError(
                f"{self._folder}: another run took this over while this one was suspended or cut "
                "off, and has ended; run the same command again: it goes on"
            )

    def _renew(self) -> bool:
        """Write it anew; returns whether it is lost: a write that took so long may have come behind
        that of a run which took it over, and hidden it.
        """
        begun = _now()
        self._write()
        if self._is_long_since(begun):
            self._hold.lost = self._overtaken()
        return self._hold.lost is not None

    def _overtaken(self) -> BlockingIOError:
        return BlockingIOError(
            f"{self._folder}: this run was suspended or cut off while it wrote its lease, and "
            "another may have taken this over; run the same command again: it goes on"
        )

    def _read_now(self) -> dict[str, Any]:
        """What is there. Where this process was suspended before it had the answer, it asks again:
        another run may have taken the lease since, and to renew it would be to take it back.

        Raises:
            TimeoutError: the second answer took as long.
        """
        for _ in range(2):
            asked = _now()
            there = _read(self._path)
            if not self._is_long_since(asked):
                return there
        raise TimeoutError(f"{self._path}: the store takes {_now() - asked:.0f} s to answer")

    def _may_be_taken(self) -> bool:
        return self._is_long_since(self._renewed)

    def _is_long_since(self, time_s: float) -> bool:
        """Whether a lease that was last renewed then is dead for those who look at it."""
        return _now() - time_s >= DEAD_AFTER * self._renewal_s

    def _write(self) -> None:
        begun = _now()
        fields = {**self._holder, "renewed": time.time(), "renewal_s": self._renewal_s}
        self._path.write_bytes(json.dumps(fields).encode())
        self._renewed = begun

    def _is_ours(self, there: dict[str, Any]) -> bool:
        return there.get("token") == self._holder["token"]


def _now() -> float:
    """Seconds that a machine which sleeps counts too, where the system can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _fresh(lease: dict[str, Any]) -> bool:
    """Whether it was renewed of late, by its own time and our clock."""
    try:
        age, renewal_s = time.time() - lease["renewed"], lease["renewal_s"]
    except (KeyError, TypeError):  # not a lease of ours
        return False
    return bool(abs(age) < DEAD_AFTER * renewal_s)


@contextmanager
def alone_on_cluster(folder: Location) -> Iterator[None]:
    """Hold the folder's name on the connected Ray cluster, whatever machine its file system is on.

    Raises:
        BlockingIOError: another driver holds it.
    """
    import ray

    class Holder:
        def __init__(self, description: dict[str, Any]) -> None:
            self._description = description

        def describe(self) -> dict[str, Any]:
            return self._description

    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    options = {"name": name, "namespace": _NAMESPACE, "num_cpus": 0}
    try:
        actor: Any = ray.remote(Holder).options(**options).remote(_myself())
    except ValueError as error:  # the name is taken
        raise _taken(folder, _ask(name)) from error
    try:
        ray.get(actor.describe.remote())  # the name is ours once it answers
        yield
    finally:
        if ray.is_initialized():
            ray.kill(actor)


def _ask(name: str) -> dict[str, Any]:
    import ray

    try:
        actor = ray.get_actor(name, namespace=_NAMESPACE)
        answer: Any = ray.get(actor.describe.remote(), timeout=_ANSWER_SECONDS)
    except (ValueError, ray.exceptions.RayError):  # it is just ending
        return {}
    return dict(answer)


def _myself() -> dict[str, Any]:
    since = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "since": since,
        "token": uuid.uuid4().hex,
    }


def _read(path: Location) -> dict[str, Any]:
    """Who holds a lock, as it says there; nothing where nobody does."""
    try:
        holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _taken(folder: Location, holder: dict[str, Any]) -> BlockingIOError:
    who = (
        f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
        if {"pid", "host", "since"} <= holder.keys()
        else ""
    )
    return BlockingIOError(
        f"{folder}: another run that writes there is under way{who}; wait for it, or choose "
        "another folder or name"
    )
