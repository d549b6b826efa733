"""Claims: what keeps two drivers of one result set from doing the same. Files in `OUT/_claims`, gone when the run ends.

`NAME.1` is the claim of NAME, made exclusively, and holds its owner's name; `OWNER.beat` holds a number that its owner
raises every few seconds. Who sees the number stand still for a lease, by its own clock, takes over by making `NAME.2`
exclusively: of several one succeeds, and the former owner, if it lives after all, finds that and stops. No two
machines' clocks are compared. On one machine a dead process is seen at once.

An exclusive creation is all that a place must give: O_EXCL on file systems (NFS from version 3), `If-None-Match: *` on
S3, what fsspec calls mode="create" elsewhere. Where it is tried and does not hold, nothing is claimed.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from deadbench.runners.results.exclusive import makes_once
from deadbench.runners.results.signs_of_life import facts_of, has_died, own_facts
from deadbench.runners.results.store import ResultStore
from deadbench.suite.storage import can_create_new, create_new, is_local

LEASE_SECONDS = 60.0  # after which the claims of an owner without a sign of life lapse; all drivers must agree
BEAT_SECONDS = 10.0
FOLDER = "_claims"
_MOST_BYTES = 2**24  # of one, of which a stranger's file may have any number
_LOOKS = 3  # at whether a claim is still held, where each takes as long as none should
_BESIDE = 8  # threads for a remote place

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass
class _Sign:
    """An owner's last sign of life, and since when it is the same, by this process's clock."""

    beat: bytes | None
    since: float


class Claims:
    """The claims of one driver, `owner`, which is a name that no other ever has."""

    def __init__(
        self,
        store: ResultStore,
        owner: str,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`lease` in seconds of `clock`."""
        self._fs, root = store.place()
        self._folder, self._owner, self._lease, self._clock = f"{root}/{FOLDER}", owner, lease, clock
        self._local = is_local(self._fs)
        self._held: dict[str, int] = {}  # generation by name
        self._there: dict[str, int] = {}  # the same of all there are, as they were last looked at
        self._owners: dict[tuple[str, int, str], str] = {}
        self._claimed_by: dict[str, str | None] = {}  # of those of others
        self._signs: dict[str, _Sign] = {}
        self._dead: set[str] = set()
        self._beats = 0
        self._over = threading.Event()
        self._beating = threading.RLock()
        self.at: Callable[[], list[dict[str, Any]]] = list  # where this driver is, for those who follow it
        self.company: set[str] = set()  # owners that were there beside this one, and those that these had met
        self.others: list[str] = []  # who lives beside this one, as was last seen
        self.works = can_create_new(self._fs)  # whether this place can hold claims

    def begin(self) -> None:
        """Be there: others see it, and whether this place can hold claims is tried.

        Raises:
            OSError, or what the place's library raises.
        """
        if self.works:
            self._try()
        if self.works:
            self.look()

    def beat_on(self, seconds: float = BEAT_SECONDS) -> threading.Thread:
        """Start a thread that gives signs of life until `end`."""

        def beat() -> None:
            while not self._over.wait(seconds):
                with contextlib.suppress(Exception):  # the next one may come through; reads are checked when stored
                    self.beat()

        thread = threading.Thread(target=beat, name="claims", daemon=True)
        thread.start()
        return thread

    def beat(self) -> None:
        """Give a sign of life, and see who else gives one: a read may take hours, and others come and go meanwhile."""
        with self._beating:
            if self.works and not self._over.is_set():
                names = (entry["name"].rsplit("/", 1)[-1] for entry in self._entries())
                self.company |= {name.removesuffix(".beat") for name in names if name.endswith(".beat")} - {self._owner}
                self._fs.pipe_file(self._path(f"{self._owner}.beat"), self._sign_of_life())

    def look(self) -> None:
        """See what is claimed, and who lives."""
        if not self.works:
            return
        self._there, beats, versions = {}, [], {}
        for entry in self._entries():
            name, _, last = entry["name"].rsplit("/", 1)[-1].rpartition(".")
            if last == "beat":
                beats.append(name)
            elif last.isdigit() and int(last) > self._there.get(name, 0):
                self._there[name] = int(last)
                versions[name] = str([entry.get(key) for key in ("ETag", "etag", "ino", "mtime", "created")])
        foreign = [name for name in self._there if name not in self._held]
        owners = dict(zip(foreign, self._each(lambda n: self._owner_of(n, versions[n]), foreign), strict=True))
        # Made, or not taken away, by a request whose answer did not come: nobody else would ever succeed one who lives.
        self._held |= {name: self._there[name] for name, owner in owners.items() if owner == self._owner}
        known = {owner for owner in owners.values() if owner is not None} | set(beats)
        known.discard(self._owner)
        self._dead = {owner for owner, dead in zip(known, self._each(self._lapsed, known), strict=True) if dead}
        self.others = sorted(set(beats) & known - self._dead)
        if self.others:  # the dead are company too, but alone one is alone with them
            self.meet(beats)
        self._claimed_by = owners

    def free(self, name: str) -> bool:
        """Whether nobody else has `name`, as was last seen."""
        return self.holder(name) is None

    def holder(self, name: str) -> str | None:
        """Who else has `name`, and lives as far as is known."""
        if name in self._held or name not in self._there:
            return None
        owner = self._claimed_by.get(name)
        return None if owner is None or owner in self._dead else owner

    def take(self, names: Sequence[str]) -> set[str]:
        """Claim those of `names` that were free when `look` was called; returns those that are this driver's now.

        Raises:
            OSError, or what the place's library raises.
        """
        wanted = [name for name in names if name not in self._held and self.free(name)]
        if self.works:
            won = self._each(lambda name: self._create(name, self._there.get(name, 0) + 1), wanted)
            self._held |= {n: self._there.get(n, 0) + 1 for n, w in zip(wanted, won, strict=True) if w}
        else:
            self._held |= dict.fromkeys(wanted, 1)
        return {name for name in names if name in self._held}

    def holds(self, name: str) -> bool:
        """Whether `name` is still this driver's: nobody has taken it over.

        Raises:
            OSError, or what the place's library raises.
        """
        generation = self._held.get(name)
        if generation is None or not self.works:
            return generation is not None
        ours = False
        for _ in range(_LOOKS):
            began = self._clock()
            taken_over = self._content(f"{name}.{generation + 1}") is not None
            ours = not taken_over and self._content(f"{name}.{generation}") == self._owner.encode()
            if not ours or self._clock() - began < self._lease / 2:
                break  # else it stood still between the two: who took over then was not there at the first
        if ours:
            return True
        del self._held[name]
        return False

    def give_back(self, names: Iterable[str]) -> None:
        """Let others have `names`; what cannot be removed lapses."""
        mine = [(name, self._held.pop(name)) for name in names if name in self._held]
        if self.works:
            self._each(lambda each: self._remove(each[0], each[1]), mine)

    def end(self, finished: Collection[str] = ()) -> None:
        """Give all back and leave; take away what owners left that died and have no claim any more but to `finished`.

        Who dies after it stored a read, and before it let go, leaves a claim that nobody ever needs to take over.
        """
        self.give_back(list(self._held))
        self._over.set()
        if not self.works:
            return
        with contextlib.suppress(Exception), self._beating:
            self.look()
            self.give_back(list(self._held))
            for name in [name for name, owner in self._claimed_by.items() if owner in self._dead and name in finished]:
                self._remove(name, self._there[name])
                del self._claimed_by[name]
            for owner in self._dead - {*self._claimed_by.values()}:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._path(f"{owner}.beat"))
        with contextlib.suppress(Exception), self._beating:
            self._fs.rm_file(self._path(f"{self._owner}.beat"))
            if self._local:
                os.rmdir(self._folder)  # unless it is another's too

    def describe(self, owner: str) -> str:
        """Who that is, for people."""
        sign = self._signs.get(owner)
        facts = facts_of(sign.beat) if sign is not None else {}
        return f"run {owner} on {facts['host']}" if "host" in facts else f"run {owner}"

    def meet(self, owners: Iterable[str]) -> None:
        """Remember that these were there beside this one, and whom they had met; those who come later are told."""
        met = set(owners)
        for owner in met & self._signs.keys():
            told = facts_of(self._signs[owner].beat).get("company")
            met |= {each for each in (told if isinstance(told, list) else ()) if isinstance(each, str)}
        met -= {self._owner}
        if not met <= self.company:
            with self._beating:
                self.company |= met
            self.beat()

    def _try(self) -> None:
        """The first sign of life, made exclusively, and others over it, which must be refused."""
        name, told = f"{self._owner}.beat", self._sign_of_life()
        path = self._path(name)
        self.works = makes_once(lambda each: self._make(path, each), lambda: self._content(name), told)
        if not self.works:
            self._fs.pipe_file(path, told)  # raises where nothing can be written, whichever way
            with contextlib.suppress(Exception):
                self._fs.rm_file(path)

    def _sign_of_life(self) -> bytes:
        self._beats += 1
        return json.dumps(
            own_facts() | {"beat": self._beats, "company": sorted(self.company), "at": self.at()}
        ).encode()

    def _lapsed(self, owner: str) -> bool:
        beat, now, sign = self._content(f"{owner}.beat"), self._clock(), self._signs.get(owner)
        if sign is None or sign.beat != beat:
            sign = self._signs[owner] = _Sign(beat, now)
        return now - sign.since > self._lease or has_died(facts_of(beat))

    def _owner_of(self, name: str, version: str) -> str | None:
        """Who made the claim of `name` that is there; None where it has gone meanwhile."""
        key = (name, self._there[name], version)
        if key not in self._owners:
            content = self._content(f"{name}.{self._there[name]}")
            if content is None:
                return None
            if not content:  # it is just being written; or never will be, and lapses as an owner's would
                return f"{name}.{self._there[name]}"
            self._owners[key] = content.decode(errors="replace")
        return self._owners[key]

    def _create(self, name: str, generation: int) -> bool:
        path, own = self._path(f"{name}.{generation}"), self._owner.encode()
        try:
            self._make(path, own)
        except Exception:
            content = self._content(f"{name}.{generation}")
            if content is None:  # it is not there and could not be made
                raise
            return content == own  # a request that was repeated finds its own first attempt
        return True

    def _make(self, path: str, content: bytes) -> None:
        """Make a file that must not be there."""
        try:
            create_new(path, content, self._fs)
        except FileNotFoundError:  # the last driver took the folder away
            self._fs.makedirs(self._folder, exist_ok=True)
            create_new(path, content, self._fs)

    def _remove(self, name: str, generation: int) -> None:
        """Take a claim away, the oldest generation first: nobody then takes for the last one what it succeeded."""
        for each in range(1, generation + 1):
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._path(f"{name}.{each}"))

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return list(self._fs.ls(self._folder, detail=True, refresh=True))
        except FileNotFoundError:
            return []

    def _content(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(name), end=_MOST_BYTES))
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _each(self, function: Callable[[_Given], _Made], given: Iterable[_Given]) -> list[_Made]:
        """Of a remote place several at once."""
        given = list(given)
        if self._local or len(given) < 2:
            return [function(each) for each in given]
        with ThreadPoolExecutor(_BESIDE, "claims") as pool:
            return list(pool.map(function, given))
