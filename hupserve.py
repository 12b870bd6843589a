#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""hupserve: a WSGI server that switches to a new configuration without losing a request.

    python hupserve.py example.ini          serve
    kill -HUP <pid of the master>           reload: new workers, new code, new settings

The promise. A reload refuses and resets no client, and every request that has begun to arrive is
answered, even if the new configuration is wrong. The same holds for a graceful stop, and for a
worker that is replaced alone. Two exceptions:

- drain_timeout, where it is set, cuts short the requests that take longer.
- A request that is sent while we close its idle connection is lost, as everywhere in HTTP/1.1
  (RFC 9112 section 9.5). The connection is read once more just before, so this window is no wider
  than the network makes it. A reload does not widen it, but opens it once for each idle
  connection: these are closed idle_grace after the order to drain.

A worker that crashes or hangs is replaced, but its connections are lost; the log names the
requests that its threads were running. Left to others: HTTP/2, websockets, async applications,
privileges, static files at scale.

Who is who:

    operator --signals--> MASTER    owns the listeners, starts and counts the workers; runs no
                          |    ^    application code and no thread, so it can fork for years
       go, drain (line)   v    |    ready, serving, leaving, exiting (line)
                        WORKER      its main thread owns every connection that is not in flight:
                          |    ^    it accepts, reads, waits, expires, closes
     a complete request   v    |    the connection, answered
                        THREADS     run the application: one request, one response

A reload. A generation is the workers started from one reading of the configuration.

    master        SIGHUP: read, bind, fork ...... every new worker is ready: commit
    old workers   serve ........................................| drain: finish what has begun, go
    new workers                    load the application ...ready| serve
                  a mistake before the commit rolls back: nothing has changed

    signal         to the master                       to a worker
    HUP            reload                              drain if ordered by the master, else log it
    TERM, QUIT     stop when everything is answered    serve until replaced, then drain (not while
                                                       it loads: then ignored)
    INT            as TERM, without grace for the idle ignored: Ctrl-C reaches the master too
    a second stop  stop at once                        drain at once
    USR1, USR2     ignored: logs follow their rotation ignored
    TTIN, TTOU     ignored                             ignored

Four rules make it safe. The code refers to them by number.

1. A connection has one owner. The main thread owns it until it puts it into `jobs`; a request
   thread owns it until it puts it into `returned`; then the main thread owns it again. Only the
   owner reads, writes or parses. (append and popleft of a deque are atomic.)
2. The main thread alone registers and closes sockets. If another thread closed one, its number
   could belong to a new socket while the selector still knows the old.
3. Whatever can fail is done before the commit, listen() last of all; until then no client notices
   anything. One exception: if listen() fails at the second of two new addresses, clients that have
   reached the first are reset.
4. Closing the last copy of a listening socket resets the clients in its queue. So for a dropped
   address the master closes its copy first, and then orders; each worker accepts all that are
   queued just before it closes its own. (A moment later they would have been refused.)

The parts. Part I alone is the reload; it can be read without the others.

    I    The reload      the states; the master; the worker's side: boot, obey, drain, leave
    II   Serving         one thread owns the sockets, the others run the application
    III  One exchange    RFC 9110, RFC 9112 and PEP 3333: read a request, send a response
    IV   Tools           bell, line, scoreboard, limits, listeners, fork guard, the guest
    V    The operator    configuration, logs, pidfile, systemd, status and demo, command line
"""

from __future__ import annotations

import _thread
import argparse
import atexit
import collections
import configparser
import contextlib
import difflib
import email.utils
import enum
import errno
import faulthandler
import fcntl
import functools
import http
import importlib
import io
import ipaddress
import itertools
import json
import logging.config
import logging.handlers
import mmap
import os
import pkgutil
import re
import resource
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import termios
import threading
import time
import traceback
import urllib.parse
import weakref
import wsgiref.util
from _thread import start_new_thread
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from select import PIPE_BUF, POLLIN, POLLOUT, poll
from ssl import SSLSocket
from typing import Any, NamedTuple, NoReturn, cast

__version__ = "2.0.0"
log = logging.getLogger("hupserve")
access_log = logging.getLogger("hupserve.access")

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
# What the sockets of one address bind: (family, what socket.bind() takes) each.
Binds = tuple[tuple[int, Any], ...]
FOREVER = float("inf")

# Applications may replace or remove functions in Python's modules, as monkey_patch() of gevent and
# eventlet does. So start_new_thread, poll and sockets are bound here, before one is loaded.
Socket = socket.socket


# ==================================================================================================
# Part I: the reload
#
# The master and its workers are processes. They talk over a line, a socketpair for each worker.
# Up go "ready", "serving", "leaving", "hurry", "exiting" and "failed". Down come "go", "drain" and
# the question "are you well?", which needs no answer: the kernel tells whether it was read. What
# follows are the states of a worker and of a generation, the master, then the worker's side.
# ==================================================================================================
class Life(enum.IntEnum):
    """A worker's life. Dying ends every state.

    Child.enter() changes it in the master's books, WorkerLife.enter() in the worker.
    """

    # fmt: off
    VACANT = 0    # a place without a worker       -> BOOTING: forked, now or after the back-off
    BOOTING = 1   # loads the application          -> READY: it says "ready"
    #                                              -> DRAINING, in the master's books: it kills it
    READY = 2     # has loaded, accepts nothing    -> SERVING: the master says "go"
    #                                              -> DRAINING: a roll-back or a stop orders it
    SERVING = 3   # accepts                        -> LEAVING: it wants a successor, says "leaving"
    #                                              -> DRAINING: the master orders it
    LEAVING = 4   # serves on                      -> DRAINING: ordered; its successor serves, or
    #                                                 a second SIGTERM, a commit, a stop
    DRAINING = 5  # finishes what it has begun     -> EXITING: it says "exiting"
    EXITING = 6   # runs the exit functions        -> gone
    # fmt: on


class Stage(enum.Enum):
    """A generation's life; Generation.enter() alone changes it.

    A reload is a generation, Master.upcoming, on its way from BINDING to CURRENT or to VOID. The
    start is a reload, too: from a generation 0 without addresses.
    """

    # fmt: off
    BINDING = 0   # its new addresses are being bound  -> LOADING: all are bound
    #                                                  -> VOID: a bind fails, or a stop
    LOADING = 1   # its workers load the application   -> CURRENT: every worker is READY, the commit
    #                                                  -> VOID: a worker dies, boot_timeout, a stop
    CURRENT = 2   # serves                             -> PAST: the next one's commit, or a stop
    PAST = 3      # its workers drain or are gone
    VOID = 4      # rolled back, or the empty one before the start
    # fmt: on


# What wins when events coincide, from the strongest:
#
#   a second stop             kills every worker.
#   a stop                    ends a reload that has not committed, and drains every worker. If none
#                             serves but some boot, it waits for them: they answer what is queued.
#   a worker's death or hang  rolls the reload back if its generation is loading; otherwise the
#                             worker is replaced, after a back-off.
#   a reload's commit         drains the leaving workers of the old generation like all others;
#                             they need no successor any more.
#   a reload that loads       goes on while workers of the current generation are replaced.
#   a worker that leaves      is replaced: its successor loads, and then it drains.

VACANT, BOOTING, READY, SERVING, LEAVING, DRAINING, EXITING = Life

STOPS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
MASTER_SIGNALS = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
# By default the ignored ones would end or stop a process.
TERMINAL_SIGNALS = (signal.SIGTTIN, signal.SIGTTOU)  # see Bell.note()
IGNORED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, *TERMINAL_SIGNALS)

TICK = 0.02  # seconds between two looks while a reload or a replacement is under way
BIND_PATIENCE = 1.0  # seconds for an old worker to close an address that comes back
BACK_OFF = (0, 0.2, 0.4, 0.8, 1.6, 3.2, 5)  # seconds before a worker that died is replaced
STEADY = 10.0  # seconds: a worker that has served for longer is replaced at once
DRAIN_REPORT = 30.0  # seconds between two log lines on what a draining worker waits for
EXIT_TIME = 10  # seconds for what the application's threads still do, and its exit functions
OVERTIME = 15.0  # seconds of EXITING, or after drain_timeout: a worker that is still there hangs
QUESTIONS = 4  # in a row that a worker leaves unread: it hangs
ABORT_TIME = 1.0  # seconds for faulthandler to write the tracebacks of a worker that hangs
MAX_REQUESTS = "max_requests"  # the reason to leave for which the workers take turns
LONGEST_REASON = 500  # characters of an exception's text that go up the line
SHOWN_OUTCOME = 500  # characters of a reload's outcome that are in the scoreboard
SHOWN_INI = 150  # characters of the file's path there, the last ones


class Child:
    """(master) One of a generation's places for a worker and, once forked, the worker in it."""

    life = VACANT
    since = 0.0  # when it came to this state, in time.monotonic() seconds
    pid = 0
    slot = 0  # its place in the scoreboard
    line: Line
    desks: Desks
    has_begun = False  # it has said that it serves
    why = ""  # it is LEAVING
    hurries = False  # it is LEAVING, and shall not wait for its successor
    predecessor: Child | None = None  # LEAVING, and serves until this one has begun
    unread = 0  # questions in a row that it has not read
    kill_at = FOREVER  # after an abort or a kill: when to send the next SIGKILL
    failure: tuple[int, str] | None = None  # exit status and reason, which it said before it died

    def __init__(self, generation: Generation, number: int, deaths: int = 0, fork_at: float = 0.0):
        self.generation = generation
        self.number = number
        self.deaths = deaths  # in a row here, since a worker was steady or left by itself
        self.fork_at = fork_at  # the back-off: not before

    def enter(self, life: Life) -> None:
        """The one place where a worker's life changes in the master's books."""
        log.debug("%s of generation %d: %s", self, self.generation.number, life.name.lower())
        self.life = life
        self.since = time.monotonic()

    def hear(self) -> None:
        """Note what the worker has said. What crossed our order to drain counts no longer."""
        for word, *arguments in self.line.hear():
            if word == "failed":
                status, reason = arguments
                self.failure = (status, reason)
            elif word == "ready" and self.life == BOOTING:
                self.enter(READY)
            elif word == "serving":
                self.has_begun = True
            elif word == "leaving" and self.life in (SERVING, LEAVING):
                self.enter(LEAVING)
                self.why = arguments[0]
            elif word == "hurry" and self.life == LEAVING:
                self.hurries = True
            elif word == "exiting" and self.life == DRAINING:
                self.enter(EXITING)

    def accepts(self) -> bool:
        return self.life in (SERVING, LEAVING)

    def signal(self, signum: int) -> None:
        """A worker that is dead keeps its pid until reap(), so this cannot reach a stranger.

        (Unless the calling program waits for all children there are. Then the pid is free.)
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def deadline(self) -> float:
        """-> when its time in this state is over, in time.monotonic() seconds."""
        config = self.generation.config
        if self.kill_at < FOREVER:
            return self.kill_at
        if self.life == BOOTING:
            return self.since + config.boot_timeout
        if self.life == DRAINING and config.drain_timeout:
            return self.since + config.drain_timeout + OVERTIME
        if self.life == EXITING:
            return self.since + OVERTIME
        return FOREVER

    def overdue(self) -> str:
        """-> what to say if that time is over."""
        config = self.generation.config
        if self.life == BOOTING:
            return f"was not ready within {config.boot_timeout:g} s (boot_timeout)"
        if self.life == DRAINING:
            return f"is still there {OVERTIME:g} s after drain_timeout"
        return f"has not ended within {OVERTIME:g} s of its exit functions"

    def what_was_in_flight(self) -> str:
        requests = "; ".join(self.desks.read())
        return f"; in flight: {requests}" if requests else ""

    def successor(self, now: float) -> Child:
        """-> the one that takes this place, after the back-off."""
        if self.life == LEAVING:
            return Child(self.generation, self.number, 0, now)
        was_steady = self.life == SERVING and now - self.since > STEADY
        deaths = 1 if was_steady else self.deaths + 1
        pause = BACK_OFF[min(deaths, len(BACK_OFF)) - 1]
        return Child(self.generation, self.number, deaths, now + pause)

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.pid})"


class Generation:
    """(master) The workers of one reading of the configuration, and what they listen on."""

    stage = Stage.BINDING

    def __init__(
        self,
        number: int,
        config: Config,
        adopted: Collection[tuple[int, Any]] = (),
        kept: Mapping[str, list[Listener]] | None = None,
    ):
        """adopted: what systemd's sockets are bound to. kept: the old generation's listeners."""
        self.number = number
        self.config = config
        self.begun_at = time.monotonic()
        kept = kept or {}
        self.listeners = {address: kept[address] for address in config.listen if address in kept}
        # Their queue is systemd's, and outlives us.
        self.borrowed = {
            address
            for address, binds in config.listen.items()
            if not set(binds).isdisjoint(adopted)
        }
        self.children: list[Child] = []  # by number, from LOADING on
        # At each worker's number: how many connections it has open, plus 1; 0 if it accepts none.
        # All workers read this to leave a newcomer to the one that has the fewest.
        shared_memory = mmap.mmap(-1, 4 * config.workers)
        self.loads = memoryview(shared_memory).cast("I")

    def enter(self, stage: Stage) -> None:
        """The one place where a generation's stage changes."""
        log.debug("generation %d: %s", self.number, stage.name.lower())
        self.stage = stage


class Master:
    """The process that the operator started. It sits in one poll() all its life."""

    sighup_waits = False  # one that no reload has taken up yet
    stopping = False  # it was ordered
    stop_grace: float | None = None  # seconds for idle connections then, if not idle_grace
    asked_at = 0.0  # when the workers were last asked whether they are well
    now = 0.0  # time.monotonic() at the last wake-up

    def __init__(self, config: Config):
        # A --check has no address. It counts as failed until it has succeeded.
        self.status = 0 if config.listen else 2
        self.notify_socket = take_notify_socket()
        self.adopted = adopt_listeners()
        self.bell = Bell()
        self.bell.handle(*MASTER_SIGNALS, *IGNORED_SIGNALS)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a dead worker's line is an error of send()
        self.fork_pause = Pause("start a worker")
        self.children: dict[int, Child] = {}  # by pid: every living worker of every generation
        self.generation_numbers = itertools.count()
        nothing = config._replace(listen={}, pidfile="")
        self.current = Generation(next(self.generation_numbers), nothing)
        self.upcoming: Generation | None = Generation(
            next(self.generation_numbers), config, self.adopted
        )

    def run(self) -> int:
        """-> exit status. Each step does what is due and returns; only wait() sleeps."""
        while self.children or self.current.listeners or not self.stopping:
            self.wait()
            # Before reap(): this empties the bell, so a death from here on rings it again.
            self.obey()
            self.reap()
            self.advance_stop()
            self.advance_reload()
            self.maintain_workers()
            self.watch_workers()
        release_pidfile(self.current.config.pidfile)
        if self.current.number:
            log.info("stopped")
            sd_notify(self.notify_socket, "", "stopped")
        return self.status

    def wait(self) -> None:
        """Sleep until a signal or a worker's word comes or something is due; then hear all workers.

        They are heard first. So if the whole group got a TERM, ours is obeyed in the same round in
        which we hear "leaving", and no successor is forked.
        """
        # No epoll: it would be shared over fork, and a child that unregisters would deafen us.
        poller = poll()
        poller.register(self.bell, POLLIN)
        for child in self.children.values():
            if not child.line.ended:
                poller.register(child.line, POLLIN)
        seconds = self.next_deadline() - time.monotonic()
        poller.poll(None if seconds == FOREVER else max(0, seconds * 1000))
        self.now = time.monotonic()
        for child in self.children.values():
            child.hear()

    def next_deadline(self) -> float:
        """-> when something comes due without a signal or a word, in time.monotonic() seconds."""
        due = [self.ask_at(), *(child.deadline() for child in self.children.values())]
        reloads = self.sighup_waits or self.upcoming
        # In a stop a worker that got its "go" in this round is drained in the next.
        must_still_drain = self.stopping and self.current.listeners
        some_are_loading = any(child.life < SERVING for child in self.current.children)
        if reloads or must_still_drain or some_are_loading:
            due.append(self.now + TICK)
        return min(due)

    # What comes from the operator
    def obey(self) -> None:
        for signum in self.bell.take_signals():
            log.debug("heard %s", signal.Signals(signum).name)
            if signum in STOPS and self.stopping:
                self.stop_by_force()
            elif signum in STOPS:
                self.stop(signal.Signals(signum))
            elif signum == signal.SIGHUP and not self.stopping:
                self.sighup_waits = True

    def stop(self, signum: signal.Signals) -> None:
        """A stop is ordered. It ends a reload; advance_stop() does the rest."""
        self.stopping = True
        self.sighup_waits = False
        if signum == signal.SIGINT:
            self.stop_grace = 0
        if self.upcoming and self.current.number:
            self.notify("READY=1", "the reload is given up")
        self.notify(
            "STOPPING=1", f"{signum.name}: stopping, when every request that has begun is answered"
        )
        self.settle(self.current, self.upcoming)

    def advance_stop(self) -> None:
        """Carry the stop out, as soon as what is queued will be answered."""
        if not self.stopping or not self.current.listeners or self.must_come_up_first():
            return
        accepting = [child for child in self.children.values() if child.accepts()]
        if not accepting and self.clients_are_queued(self.current.listeners.keys()):
            log.error("no worker could come up to answer the clients that are queued")
        self.drop_all_addresses()
        if self.stop_grace is not None:  # a second message, also to workers that drained already
            for child in self.children.values():
                child.line.say("drain", [], self.stop_grace)

    def drop_all_addresses(self) -> None:
        """A stop is a reload to a configuration without addresses. The pidfile stays to the end."""
        nothing = self.current.config._replace(listen={})
        self.settle(Generation(self.current.number, nothing), self.current)

    def must_come_up_first(self) -> bool:
        """Is there nobody to answer what is queued, but a worker that will in a moment?

        systemd keeps the queue of its sockets. Workers come up for it only if a client is in it.
        """
        here = [child for child in self.children.values() if child.generation is self.current]
        if any(child.accepts() for child in here):
            return False
        if not any(self.is_coming_up(child) for child in self.current.children):
            return False
        ours = self.current.listeners.keys() - self.current.borrowed
        return bool(ours) or self.clients_are_queued(self.current.borrowed)

    def is_coming_up(self, child: Child) -> bool:
        """In a stop, a place whose workers have died twice in a row is left vacant."""
        if child.life == VACANT:
            return child.deaths <= 1 and not self.fork_pause.until
        return child.life in (BOOTING, READY)

    def clients_are_queued(self, addresses: Iterable[str]) -> bool:
        listeners = [each for address in addresses for each in self.current.listeners[address]]
        return any(is_ready(listener, POLLIN, 0) for listener in listeners)

    def stop_by_force(self) -> None:
        """A second stop. The places go first, so nothing that is killed here is replaced."""
        log.warning("stopped by force")
        self.status = self.status or 1
        self.drop_all_addresses()
        for child in self.children.values():
            self.kill(child)

    # What comes from below
    def reap(self) -> None:
        """Bury the workers that have ended.

        Children of the calling program are left to it. Only process 1 waits for any child: it
        inherits the orphans of all other processes.
        """
        any_child = -1
        wanted = itertools.repeat(any_child) if os.getpid() == 1 else list(self.children)
        for process in wanted:
            try:
                pid, status = os.waitpid(process, os.WNOHANG)
            except ChildProcessError:  # there is none, or the calling program has waited for it
                pid, status = max(process, 0), 0
            if pid in self.children:
                self.bury(self.children.pop(pid), os.waitstatus_to_exitcode(status))
            elif pid == 0 and process == any_child:
                return

    def bury(self, child: Child, code: int) -> None:
        """A worker has ended. It ends a reload that loads, is replaced, or was ordered to go."""
        log.debug("reaped %s", child)
        child.hear()  # its last words
        child.line.sock.close()
        scoreboard.write(child.slot, None)
        kind = "status" if code >= 0 else "signal"
        end = f"{child} ended with {kind} {abs(code)}"
        status, reason = child.failure or (1, end)
        generation = child.generation
        if generation.stage == Stage.LOADING:
            self.roll_back(reason, status)
        elif child.life < DRAINING:
            self.fill_place_of(child, reason)
        elif code and generation.stage != Stage.VOID and child.kill_at == FOREVER:
            log.warning("%s, of generation %d", end, generation.number)
        others = [other for other in self.children.values() if other.generation is generation]
        if generation.stage == Stage.PAST and not others and not self.stopping:
            log.info("the last worker of generation %d is gone", generation.number)

    def fill_place_of(self, dead: Child, reason: str) -> None:
        """A worker has died without an order to drain."""
        generation = dead.generation
        generation.loads[dead.number] = 0
        reason += dead.what_was_in_flight()
        place = generation.children[dead.number]
        if place.predecessor is dead:  # its successor is on the way
            place.predecessor = None
            log.error("%s, before its successor was ready", reason)
            return
        pause = self.replace(dead, dead.predecessor).fork_at - self.now
        old = f"; until then {dead.predecessor} serves on" if dead.predecessor else ""
        log.error("%s; it is replaced in %g s%s", reason, pause, old)

    def replace(self, child: Child, predecessor: Child | None) -> Child:
        """-> the successor, now in the child's place. The predecessor serves until it does."""
        successor = child.successor(self.now)
        successor.predecessor = predecessor
        child.generation.children[child.number] = successor
        return successor

    # The reload
    def advance_reload(self) -> None:
        """Move the reload on as far as it goes. A SIGHUP meanwhile is remembered, once."""
        if self.sighup_waits and not self.upcoming:
            self.begin_reload()
        new = self.upcoming
        if new is None:
            return
        if new.stage == Stage.BINDING:
            self.bind(new)
        elif all(child.life == READY for child in new.children):
            self.commit(new)
        elif self.now > new.begun_at + new.config.boot_timeout:
            self.give_up_forking(new)

    def give_up_forking(self, new: Generation) -> None:
        """A worker that was forked has its own boot_timeout: see watch_workers()."""
        if any(child.life == VACANT for child in new.children):
            limit = f"{new.config.boot_timeout:g} s (boot_timeout)"
            self.roll_back(f"not every worker could be forked within {limit}")

    def begin_reload(self) -> None:
        self.sighup_waits = False
        clock = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
        self.notify(f"RELOADING=1\n{clock}", "SIGHUP: reloading")
        ini = self.current.config.ini
        try:
            config = read_config(ini.path, ini.folder)
            number = next(self.generation_numbers)
            self.upcoming = Generation(number, config, self.adopted, self.current.listeners)
        except (ConfigError, OSError) as error:  # OSError: there is no memory to share
            self.notify("READY=1", f"reload refused: {error}", logging.ERROR)
            return
        now = config.listen.keys()
        before = self.current.listeners.keys()
        changes = [in_words(now & before), in_words(now - before), in_words(before - now)]
        message = "generation %d: configuration read; addresses kept: %s; new: %s; dropped: %s"
        log.debug(message, number, *changes)

    def bind(self, new: Generation) -> None:
        """Bind the new addresses. One that stays keeps its sockets, and with them its queue."""
        for address, binds in new.config.listen.items():
            if address in new.listeners:
                continue
            try:
                self.refuse_overlap(binds)
                new.listeners[address] = open_listeners(binds, self.adopted)
            except OSError as error:
                patience = self.now < new.begun_at + BIND_PATIENCE
                if error.errno == errno.EADDRINUSE and patience:
                    return  # an old worker may be about to close it: try again in the next round
                self.roll_back(mistake(new.config, "listen", f"{address}: {reason_of(error)}"))
                return
        new.children = [Child(new, number) for number in range(new.config.workers)]
        new.enter(Stage.LOADING)
        workers = count_workers(new.config)
        self.show("reloading", f"loading generation {new.number} with {workers}")

    def refuse_overlap(self, binds: Binds) -> None:
        for other in self.current.listeners:
            if overlap(binds, self.current.config.listen[other]):
                raise OSError(errno.EEXIST, f"overlaps {other}, which is being served")

    def commit(self, new: Generation) -> None:
        """Every new worker is ready, none has accepted anything: the new generation takes over.

        If a step fails, `undo` removes what the steps before it have created (rule 3).
        """
        old = self.current
        if not new.config.listen:  # this was a --check
            self.roll_back(f"{new.config.ini.path}: good", 0)
            return
        undo = contextlib.ExitStack()
        try:
            logs = open_logs(new.config, undo)
            write_pidfile(new.config, undo)
            self.listen(new, old)
        except ConfigError as error:
            undo.close()
            self.roll_back(str(error))
            return
        use_logs(logs)
        log.debug("generation %d: every worker is ready: commit", new.number)
        self.current = new
        self.upcoming = None
        new.enter(Stage.CURRENT)
        self.maintain_workers()  # says "go" to the new workers, before the old ones are to drain
        self.settle(new, old)
        warn_about_unnamed(self.adopted, new.config)
        if old.number == 0:
            announce(new)
        self.notify("READY=1", f"generation {new.number} serves with {count_workers(new.config)}")

    def listen(self, new: Generation, old: Generation) -> None:
        """Listen on the new addresses first. A kept one only gets its new backlog and file mode."""
        added = [address for address in new.listeners if address not in old.listeners]
        kept = [address for address in new.listeners if address in old.listeners]
        for address in added + kept:
            try:
                for listener in new.listeners[address]:
                    if address in added:
                        listener.refuse_if_replaced()
                    listener.set_file_mode(new.config.socket_mode)
                    listener.listen(new.config.backlog)
            except OSError as error:
                reason = f"{address}: {reason_of(error)}"
                raise ConfigError(mistake(new.config, "listen", reason)) from None

    def roll_back(self, reason: str, status: int = 1) -> None:
        """Nothing has changed: the old generation has never stopped serving."""
        self.settle(self.current, self.upcoming)
        if self.current.number:
            self.notify("READY=1", f"reload rolled back: {reason}", logging.ERROR)
            return
        # It was the start, or a --check. There is nothing for a remembered SIGHUP to reload.
        self.stopping = True
        self.sighup_waits = False
        self.status = max(status, self.status) if status else 0
        tell(reason, logging.ERROR if status else logging.INFO)

    def settle(self, heir: Generation, *others: Generation | None) -> None:
        """A commit, a roll-back and a stop all end here: let go of what only the others have.

        Rule 4: close the dropped addresses here first, then order their workers to drain. If our
        copy were still open when theirs are closed, clients would go on queueing on it.
        """
        self.current = heir
        self.upcoming = None
        for generation in filter(None, others):
            was_current = generation.stage == Stage.CURRENT
            generation.enter(Stage.PAST if was_current else Stage.VOID)
            dropped = generation.listeners.keys() - heir.listeners.keys()
            for address in dropped:
                close_listeners(generation.listeners[address])
            if generation.config.pidfile != heir.config.pidfile:
                release_pidfile(generation.config.pidfile)
            # Kill those that still boot first: they have a copy, too, and empty no queue.
            for child in sorted(self.children.values(), key=lambda child: child.life):
                if child.generation is generation and child.life < DRAINING:
                    self.order_to_drain(child, dropped - generation.borrowed)

    def order_to_drain(self, child: Child, dropped: Collection[str]) -> None:
        """Order a worker to drain, once, or kill it if it has not loaded yet.

        The order is written before the signal is sent. So a worker that hears the signal finds the
        order at the start of its next round, before it begins anything new.
        dropped: the addresses whose queue nobody inherits.
        """
        if child.life == BOOTING:
            self.kill(child)
        else:
            grace = child.generation.config.idle_grace
            log.debug("drain, to %s; addresses that nobody inherits: %s", child, in_words(dropped))
            child.line.say("drain", sorted(dropped), grace)
            child.signal(signal.SIGHUP)
        child.enter(DRAINING)

    def notify(self, state: str, outcome: str, level: int = logging.INFO) -> None:
        """Tell the log, the page and, if it started us, systemd, which waits for a reload's end."""
        log.log(level, "%s", outcome)
        sd_notify(self.notify_socket, state, outcome)
        word = state.partition("=")[0].lower()
        self.show(word, outcome, has_failed=level >= logging.ERROR)

    def show(self, state: str, outcome: str, has_failed: bool = False) -> None:
        """Tell the scoreboard, for the page. state: "ready", "reloading" or "stopping"."""
        facts = {
            "pid": os.getpid(),
            "ini": self.current.config.ini.path[-SHOWN_INI:],
            "state": state,
            "outcome": outcome[:SHOWN_OUTCOME],
            "failed": has_failed,
            "since": self.now,
        }
        scoreboard.write(Scoreboard.MASTER, facts)

    # The workers
    def generations(self) -> list[Generation]:
        """-> those that may fork: the one that serves, and the one that a reload prepares."""
        return [self.current, self.upcoming] if self.upcoming else [self.current]

    def maintain_workers(self) -> None:
        """Look at every place, and do what it needs."""
        for generation in self.generations():
            for child in list(generation.children):
                self.maintain(child)

    def maintain(self, child: Child) -> None:
        """Let a predecessor go, fork for a vacant place, send the ready to work.

        A worker that leaves before its own predecessor has gone waits until that one is ordered to
        drain: a place remembers only one predecessor.
        """
        old = child.predecessor
        if old and (old.hurries or child.has_begun):
            child.predecessor = None
            self.order_to_drain(old, ())
            successor = f"pid {child.pid} takes its place" if child.has_begun else "at once"
            log.info("%s drains (%s); %s", old, old.why, successor)
        if child.life == LEAVING and not child.predecessor and self.may_be_replaced(child):
            child = self.replace(child, predecessor=child)
        if child.life == VACANT:
            self.fork_when_due(child)
        elif child.life == READY and child.generation.stage == Stage.CURRENT:
            log.debug("go, to %s", child)
            child.line.say("go")
            child.enter(SERVING)

    def may_be_replaced(self, child: Child) -> bool:
        """For max_requests one at a time: otherwise a whole generation could load at once."""
        old = [place.predecessor for place in child.generation.children if place.predecessor]
        return child.why != MAX_REQUESTS or not any(each.why == MAX_REQUESTS for each in old)

    def fork_when_due(self, child: Child) -> None:
        if self.stopping and not self.is_coming_up(child):
            return
        if self.now >= max(child.fork_at, self.fork_pause.until):
            self.spawn(child)

    # Workers that hang
    def watch_workers(self) -> None:
        """End the workers that hang: they read no question, or take too long to boot or to leave.

        One question for each turn of our own loop: after a suspend of the machine, or a SIGSTOP
        that stopped us, too, at most one counts as unread.
        """
        must_ask = self.now >= self.ask_at()
        if must_ask:
            self.asked_at = self.now
        for child in self.children.values():
            was_aborted = child.kill_at < FOREVER
            if self.now < child.deadline():
                if must_ask and not was_aborted and READY <= child.life <= DRAINING:
                    self.ask(child)
            elif was_aborted:
                self.kill(child)
            else:
                self.abort(child, f"{child} {child.overdue()}")

    def ask_at(self) -> float:
        """-> when to ask next, as the current configuration has it. A reload may change it.

        QUESTIONS + 1: a hang may begin just after an answer, which costs one interval more.
        """
        hang_timeout = self.current.config.hang_timeout
        return self.asked_at + hang_timeout / (QUESTIONS + 1) if hang_timeout else FOREVER

    def ask(self, child: Child) -> None:
        """Has the worker's main thread read the last question? Then ask the next one.

        The kernel tells what is unread (on Linux), so the worker need not send an answer, and an
        idle master is not woken by one.
        """
        child.unread = child.unread + 1 if unsent_bytes(child.line.sock) else 0
        if child.unread == QUESTIONS:
            timeout = f"{self.current.config.hang_timeout:g} s"
            self.abort(child, f"{child} has not answered for {timeout} (hang_timeout)")
        else:
            child.line.say("are you well?")

    def abort(self, child: Child, reason: str) -> None:
        """End a worker that hangs. At SIGABRT faulthandler writes every thread's traceback."""
        log.error("%s%s", reason, child.what_was_in_flight())
        child.failure = child.failure or (1, reason)
        child.kill_at = self.now + ABORT_TIME
        child.signal(signal.SIGABRT)

    def kill(self, child: Child) -> None:
        """End a worker at once. (Should it be stuck in the kernel, once more in a while.)"""
        child.kill_at = self.now + ABORT_TIME
        child.signal(signal.SIGKILL)

    def spawn(self, child: Child) -> None:
        """Fork a worker into its place, or begin a pause if the system has no more to give."""
        taken = {other.slot for other in self.children.values()}
        child.slot = min({*Scoreboard.WORKERS} - taken, default=Scoreboard.UNSEEN)
        # Signals are blocked around the fork: the child must not run the master's handlers, nor
        # lose a signal before it has its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            child.desks = Desks(child.generation.config.threads)
            ours, theirs = socket.socketpair()
            child.line = Line(ours)
            child.pid = os.fork()
            if child.pid == 0:
                self.become_worker(child, Line(theirs))
            theirs.close()
            self.fork_pause.end()
            child.enter(BOOTING)
            self.children[child.pid] = child
        except OSError as error:
            self.fork_pause.begin(self.now, error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def become_worker(self, child: Child, line: Line) -> NoReturn:
        """(worker) Run a worker's life in the forked process. Whatever happens, end with it.

        Were an exception to leave this function, the child would go on as a second master.
        """
        try:
            self.close_what_is_not_for(child)
            run_worker(child, line)
            leave(line, 0)
        except ConfigError as error:
            line.say("failed", 2, str(error))
        except BaseException as error:  # an import may well call sys.exit()
            log.exception("worker %d failed", child.number)
            reason = reason_of(error, with_type=True)[:LONGEST_REASON]
            line.say("failed", 1, f"worker {child.number} failed: {reason}")
        finally:
            leave(line, 1)

    def close_what_is_not_for(self, child: Child) -> None:
        """(worker) Close the master's files, and the listeners of another generation."""
        self.bell.reader.close()
        self.bell.writer.close()
        for listener in self.adopted.values():
            listener.close()
        child.line.sock.close()
        for other in self.children.values():
            other.line.sock.close()
        mine = child.generation.listeners.keys()
        for generation in self.generations():
            for address in generation.listeners.keys() - mine:
                for listener in generation.listeners[address]:
                    listener.close()


class WorkerLife:
    """(worker) The worker's side of the protocol. It runs in the worker's main thread.

    Its subclass Worker, in Part II, serves. It must provide the five methods at the end.
    """

    life = BOOTING
    has_begun = False  # it has said that it serves
    why = ""  # it is leaving
    now = 0.0  # time.monotonic() at the last wake-up
    explain_at = FOREVER  # when a draining worker says next what it waits for
    give_up_at = FOREVER  # drain_timeout: when it leaves whatever is in flight

    def __init__(self, child: Child, line: Line, bell: Bell):
        self.generation = child.generation
        self.number = child.number
        self.config = child.generation.config
        self.line = line
        self.bell = bell
        self.selector = selectors.DefaultSelector()  # each key's data is the function to call
        self.selector.register(bell, selectors.EVENT_READ)  # obey() asks it every round
        self.selector.register(line, selectors.EVENT_READ, self.on_line)

    def enter(self, life: Life) -> None:
        """The one place where a worker's life changes, as the worker knows it."""
        log.debug("worker %d: %s", self.number, life.name.lower())
        self.life = life

    def drains(self) -> bool:
        """(any thread) Is this worker on its way out? Then answers say `Connection: close`."""
        return self.life >= DRAINING

    def accepts(self) -> bool:
        return self.life in (SERVING, LEAVING)

    def obey(self) -> None:
        """Act on the signals that have come. An order was written before its SIGHUP was sent."""
        for signum in self.bell.take_signals():
            self.hear()
            if signum == signal.SIGHUP and not self.drains():
                log.warning("SIGHUP without an order from the master: serving on")
            elif signum in (signal.SIGTERM, signal.SIGQUIT) and self.accepts():
                self.ask_to_leave(signal.Signals(signum).name)

    def ask_to_leave(self, why: str) -> None:
        """Ask the master for a successor, and serve on until it orders to drain.

        The second signal asks for that order at once. (It is the master's to give. Were this worker
        to close its listeners by itself, a stop at that moment could leave nobody for the queue.)
        """
        if self.life == SERVING or self.why == MAX_REQUESTS:
            log.info("%s: asking the master for a successor, serving on until it is ready", why)
            self.line.say("leaving", why)
            self.why = why
            self.enter(LEAVING)
        else:
            log.info("%s again: asking the master to drain at once", why)
            self.line.say("hurry")

    def say_that_it_serves(self) -> None:
        """The master waits for this word before it lets a predecessor go."""
        if self.accepts() and not self.has_begun:
            self.has_begun = True
            self.line.say("serving")

    def on_line(self) -> None:
        """The master has said something, or it is gone: that is the end of the line."""
        self.hear()
        if self.line.ended:
            self.selector.unregister(self.line)
            log.error("the master is gone: draining")
            if not self.drains():
                nobody_inherits = self.generation.listeners.keys() - self.generation.borrowed
                self.drain(nobody_inherits, self.config.idle_grace)

    def hear(self) -> None:
        """Act on the master's words. A question whether we are well has only to be read."""
        for word, *arguments in self.line.hear():
            if word == "go":
                self.enter(SERVING)
                use_new_logs(self.config)
            elif word == "drain":
                dropped, grace = arguments
                self.drain(dropped, grace)

    def drain(self, dropped: Collection[str], grace: float) -> None:
        """Accept nothing more, finish what has begun, and leave when no connection is left.

        dropped: the addresses whose queue nobody inherits (rule 4).
        grace: how many seconds an idle connection has left. A later order can only shorten it.

        An answer under way learns of the order in Exchange.may_keep(), Part III. If its head has
        promised keep-alive already, the connection goes idle afterwards and has its grace then.
        """
        if not self.drains():
            self.enter(DRAINING)
            self.generation.loads[self.number] = 0
            self.explain_at = self.now + DRAIN_REPORT
            if self.config.drain_timeout:
                self.give_up_at = self.now + self.config.drain_timeout
            self.stop_accepting()
            self.close_listeners(but_empty_first=dropped)
            self.tell_what_is_left()
        else:
            self.shorten_lingering()  # INT alone orders twice: a person waits at a terminal
        self.shorten_grace(grace)
        log.debug("drain: an idle connection has %g s", grace)

    def stop_accepting(self) -> None:
        """Take the listeners out of the selector."""
        raise NotImplementedError

    def close_listeners(self, but_empty_first: Collection[str]) -> None:
        """Close the listeners now, but those of these addresses when their queue is empty."""
        raise NotImplementedError

    def tell_what_is_left(self) -> None:
        """Log what this worker has begun and must finish."""
        raise NotImplementedError

    def shorten_grace(self, grace: float) -> None:
        """Let no idle connection stay for more than `grace` seconds."""
        raise NotImplementedError

    def shorten_lingering(self) -> None:
        """Discard no client's input for long any more."""
        raise NotImplementedError


def run_worker(child: Child, line: Line) -> None:
    """(worker) A worker's life. All signals are still blocked when it begins."""
    # 1. Load the application. SIGIO ends this process if the master ends meanwhile.
    bell = Bell()
    prepare_for_guest(bell, child.generation.config.ini.folder)
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    master_is_gone = is_ready(line, POLLIN, 0)
    if master_is_gone:
        return
    worker = Worker(child, line, bell)
    worker.report()
    log.debug("worker %d: loading the application", worker.number)
    # For a SIGABRT of the master: it works even while a C call hangs.
    faulthandler.enable(stderr_log().file)
    worker.application = load_application(worker.config)
    raise_descriptor_limit(worker)
    fcntl.fcntl(line, fcntl.F_SETFL, os.O_NONBLOCK)
    take_back_from_guest(bell, worker.config)
    worker.warm_up()
    # 2. Serve, when the master says "go", until it has drained.
    worker.enter(READY)
    line.say("ready")
    worker.run()
    if worker.open_connections:
        others = worker.open_connections - worker.in_flight
        message = "drain_timeout: %d requests in flight are cut short, and %d other connections"
        log.warning(message, worker.in_flight, others)
    else:
        log.debug("drain: the last connection is gone")
    worker.enter(EXITING)
    worker.report()


# ==================================================================================================
# Part II: serving
#
# One thread owns the sockets, the others run the application. The main thread accepts, reads
# requests, and hands each complete one to a request thread through `jobs`. The thread runs the
# application, sends the response, and hands the connection back through `returned`.
# ==================================================================================================
class State(enum.IntEnum):
    """Where a connection is; Worker.move() alone changes it.

    In every state but WAITING and IN_FLIGHT the deadline, or the client's end of file, closes the
    connection; in READING and RECEIVING an answer of 408 or 400 goes first, by CLOSING.
    """

    # fmt: off
    NEW = 0        # accepted, no byte of a request yet, perhaps in the TLS handshake
    #                                             -> READING, RECEIVING, WAITING: what has come
    IDLE = 1       # kept alive, no byte of a next request has come
    #                                             -> READING, RECEIVING, WAITING: what has come
    READING = 2    # a part of a head has come    -> RECEIVING, WAITING: what has come
    RECEIVING = 3  # the head has come, and a part of its short, announced body
    #                                             -> WAITING: all of it has come
    WAITING = 4    # all that is read before a thread is taken has come
    #                                             -> IN_FLIGHT: a thread is free
    IN_FLIGHT = 5  # in `jobs`, in a thread or in `returned`
    #                                             -> IDLE: answered and kept
    #                                             -> READING, RECEIVING, WAITING: more has come
    CLOSING = 6    # refused, or answered for the last time: our side is shut down, and what still
    #                comes is discarded           -> closed (a state need not pass through here)
    # fmt: on


NEW, IDLE, READING, RECEIVING, WAITING, IN_FLIGHT, CLOSING = State

HEAD_START = 0.001  # seconds that the main thread leaves the interpreter's lock to others
LOOK_PAUSE = 0.02  # the same while no thread can be started
RETRY_PAUSE = 0.5  # seconds until the next try when the system has no more to give
JUST_BUSY = 0.5  # seconds: a connection that was busy so recently is not closed to make room
POLITE_PAUSE = 0.001  # seconds to step back, so that a worker with fewer connections can accept
FULL_PAUSE = 0.1  # seconds between two looks of a full worker whether it can make room
FAIR_DIFFERENCE = 3  # connections: having so many more than another worker does not count
ACCEPT_SHARE = (
    4  # a worker accepts for a quarter of its free threads at a time: others get the rest
)
LINGER = 30.0  # seconds in which the input of a closing connection is discarded, at most
LINGER_AFTER_INT = 2.0  # seconds: the same when somebody has pressed Ctrl-C
LINGER_LOOK = 1.0  # seconds between two looks at what closing connections do
LINGER_PATIENCE = 5.0  # seconds in which the client of a closing connection may do nothing
LONGEST_SLEEP = 3600.0  # seconds; epoll takes no infinity
REPORT_PAUSE = 0.02  # seconds between two entries in the scoreboard
SHOWN_REQUESTS = 8  # of those in flight, in the scoreboard
SHOWN_PATH = 60  # characters of a path, or a method, there
REQUEST_THREAD = "request-"  # how the names of our threads begin
PIECE = 16384  # bytes read at once: taking a request off the buffer copies what follows it

NO_DATA_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """A client's connection. Its owner (rule 1) alone touches the socket, buffer and request."""

    state = NEW
    since = 0.0  # when it came to this state, in time.monotonic() seconds
    deadline = FOREVER  # when it must have left it
    is_registered = False  # with the selector
    buffer = b""  # input that has arrived and is not used yet
    scanned = 0  # bytes of the buffer in which the end of a head was sought already
    request: Any = None  # a Request, from the end of its head to the end of its exchange
    is_kept = False  # after this exchange another may follow
    must_linger = True  # the client may still be sending when we close
    must_make_room = False  # other clients are queued and there is no place for them
    looked_ahead = False  # in a drain: the input was searched for one more request
    active_at = 0.0  # CLOSING: when the client last sent something or took a part of the answer
    untaken = 0  # CLOSING: bytes of the answer that it had not taken at the last look

    def __init__(
        self, sock: socket.socket, client: str, common_environ: Environ, tls: ssl.SSLContext | None
    ):
        """client: its address, for logs. common_environ: what the environ of all requests has."""
        self.sock = sock
        self.client = client
        self.common_environ = common_environ
        self.tls = tls

    @property
    def line(self) -> str:
        """The request line, or what has come of it, escaped for logs."""
        if self.request:
            return str(self.request.line)
        return escaped(self.buffer[:80].split(b"\r\n")[0].decode("latin-1"))

    def receive(self, target: memoryview | None = None) -> int | None:
        """(owner) Read once without waiting, into `target` or the buffer.

        -> the number of bytes; None if there are none yet; 0 if none will come, for the client has
        ended or is gone.
        """
        try:
            if target is not None:
                return self.sock.recv_into(target)
            data = self.sock.recv(PIECE)
            if self.tls:
                # TLS may have decrypted more than was asked for, which no selector can see.
                while cast(ssl.SSLSocket, self.sock).pending():
                    data += self.sock.recv(PIECE)
        except NO_DATA_YET:
            return None
        except OSError as error:
            log.debug("%s: %s", self.client, reason_of(error))
            return 0
        self.buffer += data
        return len(data)


class Worker(WorkerLife, socketserver.ThreadingMixIn, socketserver.BaseServer):
    """A worker, Part I, as a server. What socketserver calls a request is a Connection here.

    Request threads read `config`, `application` and `life`; the deques, the sleepers, the desks and
    the bell are for both; everything else belongs to the main thread.
    """

    application: Application  # from run_worker()
    is_accepting = False  # the listeners are registered
    in_flight = 0  # requests between dispatch() and take_back(); the main thread alone counts them
    open_connections = 0
    served = 0  # requests answered
    polite_until = 0.0  # until then newcomers are left to other workers
    look_at = FOREVER  # when closing connections are looked at next
    report_at = 0.0  # not before
    reported: dict[str, Any] | None = None  # what stands in the scoreboard

    def __init__(self, child: Child, line: Line, bell: Bell):
        WorkerLife.__init__(self, child, line, bell)
        socketserver.BaseServer.__init__(self, None, None)  # type: ignore[arg-type]
        self.slot = child.slot
        self.desks = child.desks
        self.leave_after = requests_of_a_life(self.config.max_requests)
        self.listeners: dict[Listener, str] = {}  # each one's address, as configured
        self.common_environ: dict[Listener, Environ] = {}
        for address, listeners in self.generation.listeners.items():
            for listener in listeners:
                self.listeners[listener] = address
                self.common_environ[listener] = self.environ_of(listener)
        # How many seconds a connection may be in each State.
        self.limits = {
            NEW: self.config.header_timeout,
            IDLE: self.config.keepalive_timeout,
            READING: self.config.header_timeout,
            RECEIVING: self.config.io_timeout,
            WAITING: FOREVER,
            IN_FLIGHT: FOREVER,
            CLOSING: LINGER,
        }
        # The connections in each State, the longest there first: a dict is an ordered set from
        # which anything can be taken at once.
        self.by_state: list[dict[Connection, None]] = [{} for _ in State]
        self.jobs: collections.deque[Connection] = collections.deque()  # for the threads
        self.returned: collections.deque[Connection] = collections.deque()  # from the threads
        self.sleepers: list[threading.Lock] = []  # each opens one idle thread's gate
        # One for each thread that may yet be started.
        self.free_desks: collections.deque[int] = collections.deque(range(self.config.threads))
        self.accept_pause = Pause("accept")
        self.thread_pause = Pause("start a thread")
        self.fork_guard = ForkGuard(self)

    def enter(self, life: Life) -> None:
        """A new state is shown in this round, not when REPORT_PAUSE is over."""
        super().enter(life)
        self.report_at = 0.0

    # One round
    def run(self) -> None:
        """(main thread) Serve until an order to drain is carried out."""
        self.fork_guard.forbid()
        while not self.is_done():
            events = self.wait()
            # First, so that nothing begins after an order. It also empties the bell: a connection
            # that is handed back from here on rings it again.
            self.obey()
            # Before the reads: an answered client's next request must not look like input that
            # comes while its request is in flight.
            self.take_back()
            for key, _ in events:
                if key.data:
                    key.data()
            self.expire()
            self.end_idle_lingering()
            self.empty_queues()
            self.resume_accepting()
            self.dispatch()
            self.explain()
            self.report()
        self.fork_guard.allow()

    def is_done(self) -> bool:
        if self.now >= self.give_up_at:  # drain_timeout
            return True
        return self.life == DRAINING and not self.listeners and not self.open_connections

    def wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """(main thread) Sleep until something happens or is due; return the selector's events.

        Three facts make this right:
        - Jobs are looked at before `returned`. A thread fills `returned` before it takes its next
          job, so one of the two is seen here, or the bell rings.
        - A thread may have found no job and not be among the sleepers yet. A job given just then
          wakes nobody. So while there are jobs this loop pauses only for the head start, and the
          next round finds the sleeper.
        - Application threads may fork only while the fork guard allows it, that is, in here.
        """
        self.fork_guard.allow()
        if self.jobs:
            self.leave_interpreter_to_threads()
        if self.jobs or self.returned:
            timeout = 0.0
        else:
            timeout = min(self.next_deadline() - time.monotonic(), LONGEST_SLEEP)
        events = self.selector.select(timeout)
        self.fork_guard.forbid()
        self.now = time.monotonic()
        return events

    def leave_interpreter_to_threads(self) -> None:
        """(main thread) One thread was woken for all jobs: let it run for HEAD_START.

        If the bell has not rung by then, dispatch() wakes another. While no more threads can be
        started, there is no use in hurrying: then a look now and then is enough.
        """
        no_threads = self.now < self.thread_pause.until
        is_ready(self.bell, POLLIN, LOOK_PAUSE if no_threads else HEAD_START)

    def next_deadline(self) -> float:
        """-> when something is due next, in time.monotonic() seconds. A past timer is off."""
        if self.life == DRAINING and self.listeners and self.now >= self.accept_pause.until:
            return self.now  # empty_queues() goes on in the next round
        timers = (
            self.accept_pause.until,
            self.polite_until,
            self.look_at,
            self.report_at,
            self.explain_at,
            self.give_up_at,
        )
        due = [when for when in timers if when > self.now]
        for connections in self.by_state:
            if connections:
                due.append(next(iter(connections)).deadline)
        return min(due, default=FOREVER)

    # Hand-over to the threads and back
    def dispatch(self) -> None:
        """(main thread) Hand complete requests to the threads, as many as are free.

        One thread is woken for all: at the interpreter's lock they take turns anyway, and every
        switch costs.
        """
        waiting = self.by_state[WAITING]
        must_make_room = bool(waiting) and self.is_full() and self.clients_are_queued()
        while waiting and self.in_flight < self.config.threads:
            connection = next(iter(waiting))
            connection.must_make_room = must_make_room
            connection.is_kept = False
            self.move(connection, IN_FLIGHT)
            self.in_flight += 1
            self.jobs.append(connection)
        if not self.jobs:
            return
        if self.sleepers:
            self.sleepers.pop().release()
            return
        if self.free_desks and self.now >= self.thread_pause.until:
            self.start_thread()

    def start_thread(self) -> None:
        desk = self.free_desks.popleft()
        name = f"{REQUEST_THREAD}{desk}"
        try:
            threading.Thread(target=self.work, args=(desk,), daemon=True, name=name).start()
        except RuntimeError as error:  # the threads that there are go on
            self.free_desks.appendleft(desk)
            self.thread_pause.begin(self.now, error)
            return
        self.thread_pause.end()

    def warm_up(self) -> None:
        """(main thread) Do what the first requests need, before clients wait for it.

        At a reload all clients connect within milliseconds. A process is slow in what it does for
        the first time: memory that it shares with the master is copied then, page by page.
        """
        self.start_thread()
        parse_head(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        begin_head("200 OK", (("Content-Type", "text/plain"), ("Content-Length", "0")), 0)

    def work(self, desk: int) -> None:
        """(request thread) Do jobs until the end.

        If an exception escapes, the thread ends, and dispatch() may start another in its place.
        """
        # Started as a daemon, so that leave() does not wait for it. This is cleared here, or every
        # thread that the application starts in it would be a daemon, too.
        threading.current_thread()._daemonic = False  # type: ignore[attr-defined]
        try:
            self.do_jobs(desk)
        finally:
            self.desks.memory[self.desks.place(desk)] = Desks.EMPTY
            self.free_desks.append(desk)

    def do_jobs(self, desk: int) -> None:
        """(request thread) Do one job after another.

        To start a thread for each would cost more than most jobs do. The request lies on the
        thread's desk meanwhile, where the master sees it if this worker hangs.
        """
        place = self.desks.place(desk)
        gate = threading.Lock()
        gate.acquire()
        while True:
            try:
                connection = self.jobs.popleft()
            except IndexError:
                self.sleepers.append(gate)
                gate.acquire()
                continue
            self.desks.memory[place] = connection.request.label
            # socketserver's: it calls finish_request() and, in any case, shutdown_request().
            self.process_request_thread(connection, connection.client)  # type: ignore[arg-type]
            self.desks.memory[place] = Desks.EMPTY

    def finish_request(self, connection: Any, client_address: Any) -> None:
        """(request thread) Run the application for this connection's request."""
        Exchange(self, connection).run()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """(request thread) A mistake of ours: Exchange.run() should have caught it."""
        log.exception("%s: the exchange failed", client_address)

    def shutdown_request(self, connection: Any) -> None:
        """(request thread) Hand the connection back to the main thread.

        With two or more jobs left it need not ring: while there are jobs the main thread pauses
        only for a moment, see wait().
        """
        self.returned.append(connection)
        if len(self.jobs) < 2:
            self.bell.ring()

    def take_back(self) -> None:
        """(main thread) The connections whose exchange is over: keep or close them."""
        while self.returned:
            connection = self.returned.popleft()
            connection.request = None
            self.in_flight -= 1
            self.served += 1
            if self.served == self.leave_after and self.life == SERVING:
                self.ask_to_leave(MAX_REQUESTS)
            if connection.tls and connection.is_kept and not connection.buffer:
                connection.receive()  # the next request may be decrypted already: no selector tells
            if not connection.is_kept:
                self.close_answered(connection)
            elif connection.buffer:
                self.advance(connection)
            else:
                self.move(connection, IDLE)

    # Accept
    def environ_of(self, listener: Listener) -> Environ:
        """-> the part of the environ that is the same for all requests of a listener (PEP 3333)."""
        name = listener.getsockname()
        tls = self.config.tls
        host, port = name[:2] if isinstance(name, tuple) else ("localhost", 443 if tls else 80)
        return {
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "SERVER_SOFTWARE": f"hupserve/{__version__}",
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https" if tls else "http",
            "wsgi.multithread": self.config.threads > 1,
            "wsgi.multiprocess": self.config.workers > 1,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": wsgiref.util.FileWrapper,
            # Flask asks for it before it reads a body without a length.
            "wsgi.input_terminated": True,
            "hupserve.generation": self.generation.number,
            "hupserve.worker": self.number,
        }

    def on_listener(self, listener: Listener) -> None:
        """(main thread) A client is queued. Leave it to a worker that has fewer connections.

        Every worker wakes up for it. To step back for POLITE_PAUSE is enough: the other one has
        taken the client by then. A worker that is full, and has no idle connection to close, leaves
        it queued.
        """
        if self.open_connections > self.fewest_connections() + FAIR_DIFFERENCE:
            self.pause_accepting(POLITE_PAUSE)
        elif self.is_full():
            self.pause_accepting(FULL_PAUSE)
        else:
            self.accept_some(listener)

    def fewest_connections(self) -> float:
        """-> the least number of connections that an accepting worker of this generation has."""
        accepting = [load - 1 for load in self.generation.loads if load]
        return min(accepting, default=FOREVER)

    def pause_accepting(self, seconds: float) -> None:
        self.polite_until = self.now + seconds
        self.stop_accepting()

    def accept_some(self, listener: Listener) -> None:
        """(main thread) Accept a few. Of many that come at once other workers get their share."""
        busy = self.in_flight + len(self.by_state[WAITING])
        for _ in range(max(1, (self.config.threads - busy) // ACCEPT_SHARE)):
            if self.in_flight >= self.config.threads:  # the other workers get the rest
                self.stop_accepting()
                return
            if not self.is_accepting or self.is_full() or not self.admit(listener):
                return

    def resume_accepting(self) -> None:
        """(main thread) Accept as soon as a thread is free.

        This comes before dispatch() gives the thread away. Otherwise clients that are kept alive
        could starve newcomers.
        """
        if self.is_accepting or not self.accepts() or self.in_flight >= self.config.threads:
            return
        if self.now < max(self.accept_pause.until, self.polite_until):
            return
        self.is_accepting = True
        for listener in self.listeners:
            on_listener = functools.partial(self.on_listener, listener)
            self.selector.register(listener, selectors.EVENT_READ, on_listener)
        for listener in self.listeners:  # after a pause to be polite, take what is left
            self.accept_some(listener)

    def stop_accepting(self) -> None:
        if self.is_accepting:
            for listener in self.listeners:
                self.selector.unregister(listener)
        self.is_accepting = False

    def admit(self, listener: Listener) -> bool:
        """(main thread) Accept one client. -> is it worth trying again at once?"""
        try:
            sock, address = listener.accept()
            sock.setblocking(False)
            if self.config.tls:  # the handshake is a part of the first reads
                sock = self.config.tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
        except NO_DATA_YET:  # another worker was faster
            return False
        except OSError as error:
            if error.errno in EXHAUSTED:
                return self.make_room_or_pause(listener, error)
            # EINVAL: it has never listened. Otherwise only that client is gone.
            return error.errno != errno.EINVAL
        self.accept_pause.end()
        # A draining worker empties its queues whatever its limits.
        while self.accepts() and self.open_connections >= self.config.connections:
            if not self.close_least_needed():
                break
        host, port = address[:2] if isinstance(address, tuple) else ("", "")
        remote = {"REMOTE_ADDR": host, "REMOTE_PORT": str(port)}
        common_environ = {**self.common_environ[listener], **remote}
        connection = Connection(sock, host or "unix:", common_environ, self.config.tls)
        self.open_connections += 1
        self.by_state[NEW][connection] = None
        # Often its request is here already, and it need not be registered.
        self.read(connection)
        return True

    def make_room_or_pause(self, listener: Listener, error: OSError) -> bool:
        """(main thread) Out of descriptors or memory. -> did that make room for a queued client?

        accept() fails in this way even when nobody is queued.
        """
        if not is_ready(listener, POLLIN, 0):
            return False
        if self.close_least_needed():
            return True
        self.accept_pause.begin(self.now, error)
        self.stop_accepting()
        return False

    # Limits: who has to make room
    def is_full(self) -> bool:
        """(main thread) Is there no place for a newcomer, nor anybody to close for it?"""
        return self.open_connections >= self.config.connections and not self.least_needed()

    def clients_are_queued(self) -> bool:
        return any(is_ready(listener, POLLIN, 0) for listener in self.listeners)

    def least_needed(self) -> Connection | None:
        """-> the new or kept connection that has been idle for longest, and for JUST_BUSY at least.

        Failing that, the one that has lingered for longest. JUST_BUSY protects a client that was
        answered a moment ago: it may be about to speak, or to take its answer.
        """
        firsts = [next(iter(self.by_state[state]), None) for state in (NEW, IDLE, CLOSING)]
        quiet = [first for first in firsts if first and first.since <= self.now - JUST_BUSY]
        return min(quiet, key=lambda first: (first.state == CLOSING, first.since), default=None)

    def close_least_needed(self) -> bool:
        """(main thread) Make room. -> was there one to close, or to read because it has spoken?"""
        connection = self.least_needed()
        if connection:
            connection.deadline = self.now
            self.expire()  # reads it once more before it closes it
        return connection is not None

    # Read
    def move(self, connection: Connection, state: State) -> None:
        """(main thread) The one place where a connection's state changes.

        All connections in a state have the same timeout, so the first is the first that is due.
        (shorten() keeps that true.)
        """
        del self.by_state[connection.state][connection]
        self.by_state[state][connection] = None
        connection.state = state
        # Not `now`, which may be old: our own delay must not shorten the client's time.
        connection.since = time.monotonic()
        connection.deadline = connection.since + self.limits[state]
        if not connection.is_registered and state not in (WAITING, IN_FLIGHT):
            connection.is_registered = True
            read = functools.partial(self.read, connection)
            self.selector.register(connection.sock, selectors.EVENT_READ, read)

    def read(self, connection: Connection) -> None:
        """(main thread) Input has come, or the end of it."""
        if connection not in self.by_state[connection.state]:
            return  # it was closed on account of an earlier event of this round
        if connection.state in (WAITING, IN_FLIGHT):
            # It would wake us again and again. (Not at dispatch(): most clients await their answer
            # before they send more, and to leave them registered saves two system calls a request.)
            connection.is_registered = False
            self.selector.unregister(connection.sock)
            return
        if connection.state == CLOSING:
            self.discard(connection)
            return
        came = connection.receive()
        if came is None and connection.is_registered:
            return
        if came == 0:
            self.on_end_of_input(connection)
        else:
            self.advance(connection)

    def on_end_of_input(self, connection: Connection) -> None:
        if connection.state in (READING, RECEIVING):
            self.refuse(connection, Refusal(400, "the request was cut short"))
        else:
            self.close(connection)

    def advance(self, connection: Connection) -> None:
        """(main thread) Move a connection to the state that its input now justifies."""
        try:
            state = take_request(connection, self.config.max_body)
        except Refusal as refusal:
            self.refuse(connection, refusal)
            return
        # A part of a body is progress: io_timeout starts again.
        is_news = state != connection.state or state == RECEIVING
        if is_news or not connection.is_registered:
            self.move(connection, state)

    def refuse(self, connection: Connection, refusal: Refusal) -> None:
        """(main thread) Answer with an error, and close."""
        log.debug("%s: %s: %s", connection.client, connection.line, refusal.reason)
        with contextlib.suppress(OSError):  # a few hundred bytes into an empty buffer do not wait
            connection.sock.send(refusal.response(connection.line))
        if self.config.access_log != "off":
            log_access(connection, str(refusal.status.value), 0)
        self.linger(connection)

    # Close
    def close_answered(self, connection: Connection) -> None:
        """(main thread) After the last answer: close at once if the client can send no more."""
        has_ended = not connection.buffer and connection.receive() == 0
        if connection.buffer or (connection.must_linger and not has_ended):
            self.linger(connection)
        else:
            self.close(connection)

    def linger(self, connection: Connection) -> None:
        """(main thread) Shut down our side, and discard what still comes.

        A close with input unread is a reset, which can overtake the answer. A client that still
        sends or takes something has LINGER seconds, any other LINGER_PATIENCE.
        """
        self.say_goodbye(connection)
        connection.buffer = b""
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        connection.active_at = self.now
        connection.untaken = unsent_bytes(connection.sock)
        self.look_at = min(self.look_at, self.now + LINGER_LOOK)
        self.move(connection, CLOSING)

    def discard(self, connection: Connection) -> None:
        """(main thread) Discard one piece: endless input must not keep this thread from others.

        It is read past TLS: to decrypt it would be work for nothing.
        """
        try:
            came = Socket.recv(connection.sock, PIECE)
        except NO_DATA_YET:
            return
        except OSError:
            came = b""
        if came:
            connection.active_at = self.now
        else:
            self.close(connection)

    def end_idle_lingering(self) -> None:
        """(main thread) Close the closing connections whose clients do nothing any more.

        No event tells that a client has taken a part of its answer. So this looks every LINGER_LOOK
        seconds at what is left of it. (The overall limit is the `deadline`, as in all states.)
        """
        if self.now < self.look_at:
            return
        closing = self.by_state[CLOSING]
        for connection in list(closing):
            untaken = unsent_bytes(connection.sock)
            if untaken < connection.untaken:
                connection.active_at = self.now
            connection.untaken = untaken
            if self.now >= connection.active_at + LINGER_PATIENCE:
                self.close(connection)
        self.look_at = self.now + LINGER_LOOK if closing else FOREVER

    def close(self, connection: Connection) -> None:
        """(main thread) Close the socket. This is the only place that does (rule 2)."""
        self.say_goodbye(connection)
        if connection.is_registered:
            self.selector.unregister(connection.sock)
        del self.by_state[connection.state][connection]
        if self.open_connections >= self.config.connections:
            self.polite_until = 0.0  # a full worker has a place for a newcomer now
        self.open_connections -= 1
        connection.sock.close()

    def say_goodbye(self, connection: Connection) -> None:
        """Send TLS's close_notify: without it a client cannot tell the end from a cut."""
        if connection.tls:
            with contextlib.suppress(OSError, ValueError):
                cast(ssl.SSLSocket, connection.sock).unwrap()

    def expire(self) -> None:
        """(main thread) End what is due.

        An idle connection is read once more just before. A request that is sent after this read is
        lost: the one race that HTTP/1.1 leaves.
        """
        for connections in self.by_state:
            while connections:
                connection = next(iter(connections))
                if connection.deadline > self.now:
                    break
                if connection.state <= IDLE and connection.receive():
                    self.advance(connection)
                if connection not in connections:
                    continue
                if connection.state in (READING, RECEIVING):
                    self.refuse(connection, Refusal(408, "the request took too long to arrive"))
                else:
                    self.close(connection)

    # Drain: what WorkerLife.drain() asks for
    def close_listeners(self, but_empty_first: Collection[str]) -> None:
        for listener, address in list(self.listeners.items()):
            if address not in but_empty_first:
                self.close_listener(listener)

    def close_listener(self, listener: Listener) -> None:
        address = self.listeners.pop(listener)
        listener.close()
        log.debug("drain: closed the listener of %s", address)

    def empty_queues(self) -> None:
        """(main thread) Accept whatever is queued at addresses that nobody inherits; close them.

        Out of descriptors, this goes on when there may be some again.
        """
        if self.life != DRAINING or self.now < self.accept_pause.until:
            return
        for listener in list(self.listeners):
            tries = 0  # one queue's length a round: this thread has other things to do
            while tries < self.config.backlog and self.admit(listener):
                tries += 1
            log.debug("drain: accepted %d clients from the queue", tries)
            if tries < self.config.backlog and self.now >= self.accept_pause.until:
                self.close_listener(listener)

    def shorten_grace(self, grace: float) -> None:
        self.shorten(NEW, grace)
        self.shorten(IDLE, grace)

    def shorten_lingering(self) -> None:
        self.shorten(CLOSING, LINGER_AFTER_INT)

    def shorten(self, state: State, limit: float) -> None:
        """(main thread) From now on a connection may be in this state for so many seconds."""
        self.limits[state] = min(self.limits[state], limit)
        due = time.monotonic() + limit
        for connection in self.by_state[state]:
            connection.deadline = min(connection.deadline, due)

    # Report
    def tell_what_is_left(self) -> None:
        idle = len(self.by_state[NEW]) + len(self.by_state[IDLE])
        others = self.open_connections - self.in_flight - idle
        message = "drain: %d requests in flight, %d other connections busy, %d idle"
        log.debug(message, self.in_flight, others, idle)

    def explain(self) -> None:
        """(main thread) Say what every operator asks: why is the old worker still there?"""
        if self.now < self.explain_at:
            return
        self.explain_at = self.now + DRAIN_REPORT
        oldest = ""
        for wait in self.oldest_requests(1):
            age = self.now - wait["since"]
            oldest = "; the oldest: {client} {method} {path} for ".format(**wait) + f"{age:.0f} s"
        others = self.open_connections - self.in_flight
        log.info(
            "still draining: %d in flight, %d other connections%s", self.in_flight, others, oldest
        )

    def report(self) -> None:
        """(main thread) Tell the other workers of the load, and the scoreboard what has changed."""
        if self.accepts():
            self.generation.loads[self.number] = self.open_connections + 1
        if self.now < self.report_at:
            return
        new, idle, reading, receiving, *_ = map(len, self.by_state)
        facts = {
            "pid": os.getpid(),
            "worker": self.number,
            "generation": self.generation.number,
            "state": self.life.name.lower(),
            "why": self.why,
            "idle": new + idle,
            "reading": reading + receiving,
            "in_flight": self.in_flight,
            "served": self.served,
            "requests": self.oldest_requests(SHOWN_REQUESTS),
        }
        if facts != self.reported:
            self.reported = facts
            self.report_at = self.now + REPORT_PAUSE
            scoreboard.write(self.slot, facts)
            self.say_that_it_serves()  # after its entry: the page must not show too few

    def oldest_requests(self, count: int) -> list[dict[str, Any]]:
        """-> the oldest requests in flight, without their queries, which hold secrets."""
        oldest = itertools.islice(self.by_state[IN_FLIGHT], count)
        return [
            {
                "client": connection.client,
                **shown_request(connection.request.environ),
                "since": connection.since,
            }
            for connection in oldest
        ]


def shown_request(environ: Environ) -> dict[str, str]:
    """-> what others may see of a request: its method and path, but not its query."""
    path = environ["REQUEST_URI"].partition("?")[0]
    return {"method": environ["REQUEST_METHOD"][:SHOWN_PATH], "path": path[:SHOWN_PATH]}


# ==================================================================================================
# Part III: one exchange (RFC 9110, RFC 9112, PEP 3333)
#
# First a head is parsed, then a body is read as the application asks for it, then the response is
# framed and sent. The parser is strict because a proxy in front may read a doubtful message in
# another way than we do: what one takes for a body, the other may take for the next request.
# ==================================================================================================
MAX_LINE = (
    8192  # bytes of a request line (414), of a chunk's size with its extensions, of a trailer
)
MAX_HEAD = 65536  # bytes of a head (431), of all chunk extensions (400)
MAX_FIELDS = 100  # in a head, and in trailers (431)
SMALL_BODY = 65536  # bytes: a body announced as so short is read before a thread is taken
TRICKLE = 4096  # bytes of a response that a client must take within io_timeout
CACHED = 128  # parsed heads, their fields, and response heads that are remembered
MOST_AT_ONCE = 2**30  # bytes that one system call is asked for: TLS takes less than 2**31
LARGE_FILE = 2**22  # bytes of a response from which on the kernel's queue is kept short
SHORT_QUEUE = 2**17  # bytes: more would leave the processor's cache before the client copies it

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
AUTHORITY = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]"
    r"|(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*)"
    r"(?::[0-9]{0,5})?"
)
REQUEST_LINE = re.compile(
    rf"(?P<method>{TOKEN}) (?P<target>[!-~]+) HTTP/(?P<major>[0-9])\.(?P<minor>[0-9])"
)
ABSOLUTE_TARGET = re.compile(r"https?://(?P<host>[^:/?][^/?]*)/?(?P<rest>.*)", re.IGNORECASE)
FIELD = rf"(?P<name>{TOKEN}):(?P<value>[\t -~\x80-\xff]*)"
FIELD_LINE = re.compile(FIELD)
DOUBTFUL = re.compile(rb"\0|(?<!\r)\n|\r(?=[^\n])")  # in a head: NUL, bare LF, bare CR
# These two match a line without its LF.
CHUNK_LINE = re.compile(rb"(?P<size>[0-9A-Fa-f]{1,16})(?P<extensions>;[\t -~\x80-\xff]*)?\r")
TRAILER_LINE = re.compile(rf"(?:{FIELD})?\r".encode())
STATUS = re.compile(r"[2-9][0-9]{2}(?: [\t -~\x80-\xff]*)?")  # 1xx is never final
LENGTH = re.compile("[0-9]{1,18}")  # more digits than any real length has
FORGING = re.compile(r"[^\t -~\x80-\xff]")  # CR or LF in a response field would begin another
CLOSE_OPTION = re.compile(r"\bclose\b", re.IGNORECASE)


class Refusal(OSError):
    """A request that we refuse with an HTTP status; its connection closes.

    It is an OSError because reading wsgi.input is expected to raise such.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(errno.EBADMSG, reason)
        self.status = http.HTTPStatus(status)
        self.reason = reason

    def response(self, request_line: str) -> bytes:
        """-> the whole response. A HEAD is answered without a body."""
        status = f"{self.status.value} {self.status.phrase}"
        body = f"{status}: {self.reason}\n"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            f"Date: {email.utils.formatdate(usegmt=True)}\r\nConnection: close\r\n\r\n"
        )
        return (head if request_line.startswith("HEAD ") else head + body).encode()


def refuse_if(wrong: object, status: int, reason: str) -> None:
    if wrong:
        raise Refusal(status, reason)


# Parsing a head
class Request(NamedTuple):
    """What a head says. It is cached and shared by requests, so it is never changed."""

    line: str  # escaped for logs
    label: bytes  # the line without query and version, as it lies on a desk
    environ: Environ  # the head in PEP 3333's words
    length: int | None  # bytes of the body; None: it is chunked
    expects_100: bool  # the client waits for 100 Continue before it sends the body
    keeps: bool  # the client would keep the connection
    is_http11: bool  # the client knows chunked


class Framing(NamedTuple):
    """What the fields of a head say about its body and connection (RFC 9112 section 6)."""

    length: int | None
    expects_100: bool
    keeps: bool


def take_request(connection: Connection, max_body: int) -> State:
    """(main thread) Take the next request's head off the buffer, if all of it is there.

    -> the State that the buffer now justifies. Raises Refusal.
    """
    if connection.request is None:
        if connection.buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2 lets clients send some
            connection.buffer = re.sub(rb"(\r\n)+", b"", connection.buffer, count=1)
            connection.scanned = 0
        end = connection.buffer.find(b"\r\n\r\n", max(0, connection.scanned - 3))
        if end < 0 or end > MAX_HEAD - 4:
            return take_partial_head(connection)
        connection.request = parse_head(connection.buffer[: end + 2])
        connection.buffer = connection.buffer[end + 4 :]
        connection.scanned = 0
        too_long = 0 < max_body < (connection.request.length or 0)
        refuse_if(too_long, 413, "more than max_body bytes")
    request = connection.request
    length = request.length or 0
    if length > SMALL_BODY or request.expects_100 or len(connection.buffer) >= length:
        return WAITING
    return RECEIVING


def take_partial_head(connection: Connection) -> State:
    """(main thread) A head that is not complete: is there something wrong with it already?"""
    buffer = connection.buffer
    if buffer in (b"", b"\r"):  # an empty line is no request
        return NEW if connection.state == NEW else IDLE
    # Parse the line once, and search only what is new: a head may come byte by byte.
    start = max(0, connection.scanned - 1)
    line, crlf, _ = buffer.partition(b"\r\n")
    line_is_new = crlf and len(line) >= start
    if line_is_new or len(line) > MAX_LINE + 1:  # + 1: its CR may be here before its LF
        parse_request_line(line)
    refuse_if(len(buffer) >= MAX_HEAD, 431, f"a head of more than {MAX_HEAD} bytes")
    doubt = DOUBTFUL.search(buffer, start)
    refuse_if(doubt, 400, "NUL, bare CR or bare LF in a head")
    connection.scanned = len(buffer)
    return READING


# Two caches: a client repeats its whole head or, if only the path changes, its fields.
@functools.lru_cache(maxsize=CACHED)
def parse_head(head: bytes) -> Request:
    r"""Parse a head without its empty line. Raises Refusal.

    b"GET /a%20b?c HTTP/1.1\r\nHost: x\r\n" gives an environ with PATH_INFO "/a b", QUERY_STRING "c"
    and HTTP_HOST "x", the length 0, and keeps the connection.
    """
    line, _, fields = head.partition(b"\r\n")
    method, target, major, minor = parse_request_line(line)
    is_http11 = minor != "0"
    refuse_if(major == "0", 400, f"HTTP/{major}.{minor} is not spoken here")
    refuse_if(major != "1", 505, f"HTTP/{major}.{minor} is not spoken here")
    refuse_if(method == "CONNECT", 501, "this is no proxy")
    absolute = ABSOLUTE_TARGET.fullmatch(target)
    if absolute:
        is_proper = is_authority(absolute["host"])
    else:
        is_proper = target.startswith("/") or (method == "OPTIONS" and target == "*")
    refuse_if("#" in target or not is_proper, 400, "malformed request target")
    environ, framing = parse_fields(fields, is_http11)
    if absolute:
        environ = {**environ, "HTTP_HOST": absolute["host"]}  # it overrides Host
        target = "/" + absolute["rest"]
    path, _, query = target.partition("?")
    if path == "*":
        path = ""  # the server as a whole
    if "%" in path:
        path = urllib.parse.unquote_to_bytes(path).decode("latin-1")
    environ = {
        **environ,
        "REQUEST_METHOD": method,
        "REQUEST_URI": target,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": "HTTP/1.1" if is_http11 else "HTTP/1.0",
    }
    label = Desks.label(f"{method} {target.partition('?')[0]}")
    return Request(escaped(line.decode()), label, environ, *framing, is_http11)


def parse_request_line(line: bytes) -> tuple[str, str, str, str]:
    """-> method, target, major and minor version (RFC 9112 section 3). Raises Refusal."""
    refuse_if(len(line) > MAX_LINE, 414, f"a request line of more than {MAX_LINE} bytes")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise Refusal(400, "malformed request line")
    return match["method"], match["target"], match["major"], match["minor"]


@functools.lru_cache(maxsize=CACHED)
def parse_fields(block: bytes, is_http11: bool) -> tuple[Environ, Framing]:
    """Field lines -> their part of an environ, and the framing (RFC 9112 sections 5 and 6)."""
    environ = parse_field_lines(block)
    refuse_if(is_http11 and "HTTP_HOST" not in environ, 400, "no Host")
    refuse_if(not is_authority(environ.get("HTTP_HOST", "")), 400, "invalid Host")
    length = environ.get("CONTENT_LENGTH", "0")
    refuse_if(not LENGTH.fullmatch(length), 400, "invalid Content-Length")
    is_chunked = "HTTP_TRANSFER_ENCODING" in environ
    if is_chunked:
        both = "CONTENT_LENGTH" in environ
        refuse_if(both, 400, "both Content-Length and Transfer-Encoding")
        refuse_if(not is_http11, 400, "Transfer-Encoding in HTTP/1.0")
        codings = list_items(environ["HTTP_TRANSFER_ENCODING"])
        wrong = codings.count("chunked") > 1 or "" in codings
        refuse_if(wrong, 400, "invalid Transfer-Encoding")
        refuse_if(codings != ["chunked"], 501, "unknown transfer coding")
    expectation = environ.get("HTTP_EXPECT", "").lower() if is_http11 else ""
    refuse_if(expectation not in ("", "100-continue"), 417, "unknown expectation")
    options = list_items(environ.get("HTTP_CONNECTION", ""))
    keeps = "close" not in options and (is_http11 or "keep-alive" in options)
    return environ, Framing(None if is_chunked else int(length), expectation != "", keeps)


def list_items(value: str) -> list[str]:
    """' Chunked , x' -> ['chunked', 'x']."""
    return [item.strip(" \t") for item in value.lower().split(",")]


def parse_field_lines(block: bytes) -> Environ:
    r"""b"Host: x\r\nAccept: y\r\n" -> {"HTTP_HOST": "x", "HTTP_ACCEPT": "y"}. Raises Refusal."""
    lines = block.decode("latin-1").split("\r\n")[:-1]
    refuse_if(len(lines) > MAX_FIELDS, 431, f"more than {MAX_FIELDS} header fields")
    environ: Environ = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "malformed header field")
        if "_" in match["name"]:
            continue  # X_Y and X-Y are one in the environ: one could pose as the other
        name = match["name"].upper().replace("-", "_")
        key = name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}"
        value = match["value"].strip(" \t")
        if key not in environ:
            environ[key] = value
        elif key != "CONTENT_LENGTH" or environ[key] != value:
            # Two different lengths, or two Hosts, join to something invalid that is refused later.
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    return environ


def is_authority(text: str) -> bool:
    """Is it a host, perhaps with a port (RFC 3986 section 3.2)?"""
    match = AUTHORITY.fullmatch(text)
    if match is None:
        return False
    try:
        ipaddress.IPv6Address(match["ipv6"] or "::")
    except ValueError:
        return False
    return True


# Reading a body
class Body(io.RawIOBase):
    """(request thread) A request's body, read as it comes (RFC 9112 sections 6 and 7.1).

    After a Refusal each read raises it again.
    """

    in_chunks = 0  # bytes in all chunks so far
    in_extensions = 0  # bytes in all chunk extensions so far
    refusal: Refusal | None = None

    def __init__(self, exchange: Exchange, request: Request):
        self.exchange = exchange
        self.connection = exchange.connection
        self.config = exchange.worker.config
        self.is_chunked = request.length is None  # False again after the last chunk
        self.unread = request.length or 0  # bytes of the body, or of the present chunk
        self.owes_100 = request.expects_100 and not self.connection.buffer

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if self.refusal:
            raise self.refusal
        try:
            if self.is_chunked and not self.unread:
                self.begin_chunk()
            # A view that outlived this call would keep RawIOBase.read() from resizing its buffer.
            size = min(self.unread, MOST_AT_ONCE)
            with memoryview(target) as whole, whole[:size] as wanted:
                count = self.read_some(wanted)
        except Refusal as refusal:
            self.refusal = refusal
            raise
        self.unread -= count
        return count

    def read_some(self, target: memoryview) -> int:
        """-> the number of bytes put into the target; 0 only if it has no room for any."""
        if not target:
            return 0
        buffer = self.connection.buffer
        if not buffer:
            return self.wait_for_input(target)  # straight into the caller's buffer: no second copy
        count = min(len(target), len(buffer))
        target[:count] = buffer[:count]
        self.connection.buffer = buffer[count:]
        return count

    def begin_chunk(self) -> None:
        """Read the line with the next chunk's size and, after the last chunk, the trailers."""
        if self.in_chunks:
            self.take_line(TRAILER_LINE, 1)  # the CRLF that ends the previous chunk
        line = self.take_line(CHUNK_LINE)
        self.unread = int(line["size"], 16)
        self.in_chunks += self.unread
        self.in_extensions += len(line["extensions"] or b"")
        too_many = self.in_extensions > MAX_HEAD
        refuse_if(too_many, 400, f"chunk extensions of more than {MAX_HEAD} bytes")
        refuse_if(0 < self.config.max_body < self.in_chunks, 413, "more than max_body bytes")
        if self.unread == 0:
            self.discard_trailers()
            self.is_chunked = False

    def discard_trailers(self) -> None:
        """They must be well-formed, and end with an empty line."""
        for _ in range(MAX_FIELDS + 1):
            if self.take_line(TRAILER_LINE)[0] == b"\r":
                return
        raise Refusal(431, f"more than {MAX_FIELDS} trailers")

    def take_line(self, pattern: re.Pattern[bytes], limit: int = MAX_LINE) -> re.Match[bytes]:
        """Take a line of at most `limit` bytes off the buffer. -> its match."""
        while b"\n" not in self.connection.buffer and len(self.connection.buffer) <= limit:
            self.wait_for_input()
        line, _, self.connection.buffer = self.connection.buffer.partition(b"\n")
        match = pattern.fullmatch(line)
        if match is None or len(line) > limit:
            raise Refusal(400, "malformed chunk")
        return match

    def wait_for_input(self, target: memoryview | None = None) -> int:
        """Wait until some has come, having sent 100 Continue if it is owed. -> number of bytes."""
        while True:
            came = self.connection.receive(target)
            if came is not None:
                break
            if self.owes_100 and not self.exchange.head_is_sent:
                self.exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.owes_100 = False
            ready = is_ready(self.connection.sock, POLLIN, self.config.io_timeout)
            refuse_if(not ready, 408, "slow body")
        refuse_if(came == 0, 400, "the body was cut short")
        return came

    def can_be_skipped(self) -> bool:
        """Is the unread rest of the body here already? Only a short one is looked for."""
        if self.is_chunked or self.unread > SMALL_BODY:
            return False
        while len(self.connection.buffer) < self.unread:
            if not self.connection.receive():
                return False
        return True

    def skip(self) -> None:
        self.connection.buffer = self.connection.buffer[self.unread :]
        self.unread = 0


# Sending a response
class ResponseHead(NamedTuple):
    """What the application gave to start_response, checked."""

    lines: bytes  # without what frames the body and the connection
    length: int | None  # its Content-Length
    keeps: bool  # it did not say `Connection: close`


@functools.lru_cache(maxsize=CACHED)
def begin_head(
    status: str, headers: tuple[tuple[str, str], ...], epoch_second: int
) -> ResponseHead:
    """Check what start_response was given (PEP 3333). Raises ValueError, TypeError.

    The present second is an argument so that a cached head, with its Date, serves for one second.
    """
    if not STATUS.fullmatch(status):
        raise ValueError(f"{status!r} is no final status")
    ours = {
        "date": f"Date: {email.utils.formatdate(epoch_second, usegmt=True)}",
        "server": "Server: hupserve",
    }
    lines = [f"HTTP/1.1 {status:4}"]  # "200 ", where there is no reason phrase
    length = None
    keeps = True
    for name, value in headers:
        lower = name.lower()
        if not re.fullmatch(TOKEN, name) or FORGING.search(value):
            raise ValueError(f"{name!r}: {value!r} could add a header, or a response")
        if lower == "content-length":
            is_length = LENGTH.fullmatch(value)
            if not is_length or (length is not None and length != int(value)):
                raise ValueError(f"invalid Content-Length {value!r}")
            length = int(value)
        elif lower == "connection":
            keeps = keeps and not CLOSE_OPTION.search(value)
        elif not is_hop_by_hop(lower):
            lines.append(f"{name}: {value}")
            ours.pop(lower, None)  # the application gives its own
    return ResponseHead("\r\n".join([*lines, *ours.values()]).encode("latin-1"), length, keeps)


def is_hop_by_hop(name: str) -> bool:
    """wsgiref's table says "trailers" where RFC 2616 section 13.5.1 meant the field Trailer."""
    return wsgiref.util.is_hop_by_hop(name) or name == "trailer"


class Exchange:
    """(request thread) One request and its response. The thread owns the connection (rule 1)."""

    status = ""  # the response's status line, once start_response was called
    unsent: int | None = None  # bytes of body that the Content-Length still allows; None: any
    sent = 0  # bytes of body
    head_is_sent = False
    is_chunked = False  # the response
    response_head: ResponseHead  # from start_response on

    def __init__(self, worker: Worker, connection: Connection):
        self.worker = worker
        self.connection = connection
        self.config = worker.config
        self.request: Request = connection.request
        self.keeps = (
            self.request.keeps
            and self.config.keepalive_timeout > 0
            and not connection.must_make_room
        )
        self.body = None if self.request.length == 0 else Body(self, self.request)

    def run(self) -> None:
        """Answer the request, and say what becomes of the connection."""
        connection = self.connection
        wsgi_input = io.BufferedReader(self.body, PIECE) if self.body else io.BytesIO()
        try:
            environ = {
                **connection.common_environ,
                **self.request.environ,
                "wsgi.input": wsgi_input,
                "wsgi.errors": ErrorsToLog(),
            }
            self.respond(self.worker.application(environ, self.start_response))
        except Refusal as refusal:  # raised by wsgi.input and not caught, or by send()
            log.debug("%s: %s: %s", connection.client, self.request.line, refusal.reason)
            self.fail(refusal)
        except BaseException:  # sys.exit() in a request is the application's error, too
            log.exception("%s: %s", connection.client, self.request.line)
            answer_is_whole = self.head_is_sent and self.unsent == 0
            if not answer_is_whole:
                self.fail(Refusal(500, "the application failed"))
        if self.keeps and self.body:
            self.body.skip()  # may_keep() has checked that the rest is in the buffer
        connection.is_kept = self.keeps
        connection.must_linger = not self.keeps and self.client_may_be_sending()
        self.unsent = 0  # disarms a write() that the application has stored
        if self.body:  # and disarms wsgi.input: the connection is the main thread's again
            self.body.refusal = Refusal(400, "the request is over")
        self.body = None  # breaks a reference cycle: the buffers go at once
        if self.config.access_log != "off":
            log_access(connection, self.status[:3], self.sent)

    def client_may_be_sending(self) -> bool:
        """Must it linger? Not if the client asked for the close and has sent its whole request.

        A long response may still be in the kernel's buffer, where a reset would destroy it.
        """
        if self.request.keeps or self.sent > PIECE:
            return True
        return self.body is not None and (self.body.is_chunked or self.body.unread > 0)

    def respond(self, result: Iterable[bytes]) -> None:
        """Send what the application returned, and close it in any case (PEP 3333)."""
        try:
            is_file = isinstance(result, wsgiref.util.FileWrapper)
            if not (is_file and self.send_file(cast(Any, result).filelike)):
                self.send_pieces(result)
            if self.is_chunked:
                self.send(b"0\r\n\r\n")
                self.unsent = 0  # the answer is whole, even if close() raises now
            elif self.unsent:
                self.keeps = False
                log.error(
                    "%s: %d bytes less than its Content-Length", self.request.line, self.unsent
                )
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def send_pieces(self, pieces: Iterable[bytes]) -> None:
        is_whole = isinstance(pieces, (list, tuple)) and len(pieces) == 1
        for piece in pieces:
            if piece and self.head_is_sent and self.unsent == 0:
                break  # surplus never reaches the wire, and may never end
            if piece != b"":  # not `if piece`: an empty str is an error, too
                self.send_piece(piece, is_whole)
        if not self.head_is_sent:
            self.send(self.finish_head(0))

    def start_response(
        self, status: str, headers: Sequence[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333. Raises what is wrong with its arguments, in the application."""
        if exc_info and self.head_is_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.status and not exc_info:
            raise AssertionError("start_response was called twice, without exc_info")
        # A subclass of str may compare, or print, as something else. What is checked, remembered
        # and sent is its text.
        status = str.__str__(status)
        fields = tuple([(str.__str__(name), str.__str__(value)) for name, value in headers])
        self.response_head = begin_head(status, fields, int(time.time()))
        self.status = status
        self.unsent = self.response_head.length
        self.keeps = self.keeps and self.response_head.keeps
        return self.send_piece

    def finish_head(self, length: int | None) -> bytes:
        """-> the head as bytes, to be sent at once. length: of the body, if it is known."""
        if not self.status:
            raise AssertionError("start_response was not called")
        head = self.response_head.lines + self.framing(length)
        self.keeps = self.keeps and self.may_keep()
        self.head_is_sent = True
        if not self.keeps:
            return head + b"\r\nConnection: close\r\n\r\n"
        if not self.request.is_http11:
            return head + b"\r\nConnection: keep-alive\r\n\r\n"
        return head + b"\r\n\r\n"

    def framing(self, length: int | None) -> bytes:
        """Decide how the client learns where the body ends (RFC 9112 section 6.3). -> a field.

        204                      no body, no field
        304, HEAD                no body; a Content-Length that the application gave stays
        length known             Content-Length
        unknown, HTTP/1.1        chunked
        unknown, HTTP/1.0        the end of the connection
        """
        code = self.status[:3]
        if code in ("204", "304") or self.request.environ["REQUEST_METHOD"] == "HEAD":
            announced = self.unsent
            self.unsent = 0
            if announced is None or code == "204":
                return b""
            return b"\r\nContent-Length: %d" % announced
        if self.unsent is None:
            self.unsent = length
        if self.unsent is not None:
            return b"\r\nContent-Length: %d" % self.unsent
        if self.request.is_http11:
            self.is_chunked = True
            return b"\r\nTransfer-Encoding: chunked"
        self.keeps = False
        return b""

    def may_keep(self) -> bool:
        """Can another request follow on this connection? In a drain, only one that has arrived."""
        if self.body and not self.body.can_be_skipped():
            return False
        return not self.worker.drains() or self.next_request_has_come()

    def next_request_has_come(self) -> bool:
        """Is there input behind this request? The socket is read for it once per connection.

        Only once: a client that always has the next one under way would never let the worker go.
        """
        connection = self.connection
        unread = self.body.unread if self.body else 0
        if len(connection.buffer) > unread:
            return True
        if connection.looked_ahead:
            return False
        connection.looked_ahead = True
        return bool(connection.receive())

    def send_piece(self, data: bytes, is_whole: bool = False) -> None:
        """Send a piece of the body, the head before the first. It is PEP 3333's write(), too."""
        if not isinstance(data, bytes):
            raise TypeError(f"the application gave {type(data).__name__}, not bytes")
        head = b""
        if not self.head_is_sent:
            head = self.finish_head(len(data) if is_whole else None)
        if self.unsent is not None:
            data = data[: self.unsent]  # more than was announced would pose as the next response
        if self.is_chunked and data:
            self.send(head + b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self.send(head + data)
        self.sent += len(data)
        if self.unsent is not None:
            self.unsent -= len(data)

    def send(self, data: bytes) -> None:
        """Send all of it. Raises Refusal if the client is gone or too slow."""
        rest: bytes | memoryview = data
        if len(data) > PIECE:  # a shorter rest is simply copied; mostly nothing is left
            rest = memoryview(data)
        while rest:
            try:
                count = self.connection.sock.send(rest[:MOST_AT_ONCE])
            except NO_DATA_YET:
                self.wait_for_room()
            except OSError as error:
                raise Refusal(408, f"client gone: {reason_of(error)}") from None
            else:
                rest = rest[count:]

    def wait_for_room(self) -> None:
        """Wait until the socket takes more. Raises Refusal if the client takes next to nothing.

        POLLOUT waits for a third of the send buffer, which can be megabytes. A slow client may be
        alive for long before that, so its progress is measured by what is left in the buffer.
        """
        queued = unsent_bytes(self.connection.sock)
        while not is_ready(self.connection.sock, POLLOUT, self.config.io_timeout):
            before = queued
            queued = unsent_bytes(self.connection.sock)
            refuse_if(queued > before - TRICKLE, 408, "the client takes nothing")

    def send_file(self, file: Any) -> bool:
        """Send a plain file from its position to its end by sendfile(). -> False: read it instead.

        (A GzipFile has a descriptor, too, but what it reads is not what is in the file.)
        """
        if self.head_is_sent or self.connection.tls or not hasattr(os, "sendfile"):
            return False
        is_plain = type(getattr(file, "raw", file)) is io.FileIO and os.path.isfile(file.fileno())
        if not is_plain:
            return False
        start = file.tell()
        size = os.path.getsize(file.fileno())
        if start >= size:  # as of the files in /proc, whose size is 0
            return False
        self.send(self.finish_head(size - start))
        with self.short_queue():
            while self.unsent:
                count = self.send_from_file(file.fileno(), start + self.sent, self.unsent)
                if count == 0:  # it has become shorter, or sendfile() cannot
                    break
                self.sent += count
                self.unsent -= count
        must_be_read = self.sent == 0 and self.unsent
        return not must_be_read

    @contextlib.contextmanager
    def short_queue(self) -> Iterator[None]:
        """While a large file is sent, let the kernel hold little that is not on its way yet.

        A megabyte in its queue would leave the processor's caches before the client copies it. For
        other answers the queue is as long as ever, so that they do not hold their thread.
        """
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is None or (self.unsent or 0) < LARGE_FILE:
            yield
            return
        with contextlib.suppress(OSError):  # a unix socket has no such option
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, option, SHORT_QUEUE)
        yield
        with contextlib.suppress(OSError):
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, option, 0)  # the system's default

    def send_from_file(self, descriptor: int, offset: int, count: int) -> int:
        """-> bytes sent. 0: there are no more, or this system cannot send this file so."""
        while True:
            try:
                sock = self.connection.sock.fileno()
                return os.sendfile(sock, descriptor, offset, min(count, MOST_AT_ONCE))
            except NO_DATA_YET:
                self.wait_for_room()
            except OSError as error:
                if self.sent == 0:
                    return 0
                raise Refusal(408, f"client gone: {reason_of(error)}") from None

    def fail(self, refusal: Refusal) -> None:
        """Answer with a status of ours if nothing is on the wire yet. The connection closes."""
        self.keeps = False
        if not self.head_is_sent:
            self.head_is_sent = True
            self.status = str(refusal.status.value)
            with contextlib.suppress(OSError):
                self.send(refusal.response(self.request.line))


def unsent_bytes(sock: socket.socket) -> int:
    """-> how much the client has not acknowledged yet. Only Linux can tell: elsewhere always 0, so
    a client for which there is no room within io_timeout seems to make no progress."""
    if sys.platform != "linux":
        return 0
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


class ErrorsToLog:
    """wsgi.errors: what the application writes there becomes lines of the log.

    Each request has its own. (An io.TextIOBase would take seven times as long to make and end.)
    """

    def write(self, text: str) -> int:
        if text.strip():
            log.error("%s", text.rstrip())
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """The log has done it."""

    close = flush


MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def log_access(connection: Connection, status: str, sent: int) -> None:
    """(owner) Log in the combined format, plus the seconds since the request was dispatched."""
    environ = connection.request.environ if connection.request else {}
    access_log.info(
        '%s - - [%s] "%s" %s %d "%s" "%s" %.6f',
        connection.client,
        access_time(int(time.time())),
        connection.line,
        status,
        sent,
        escaped(environ.get("HTTP_REFERER", "-")),
        escaped(environ.get("HTTP_USER_AGENT", "-")),
        time.monotonic() - connection.since,
    )


@functools.lru_cache(maxsize=2)
def access_time(epoch_second: int) -> str:
    """-> '30/Nov/2026:20:27:10 +0000'. %b would follow the application's locale."""
    now = time.localtime(epoch_second)
    return time.strftime(f"%d/{MONTHS[now.tm_mon - 1]}/%Y:%H:%M:%S %z", now)


def escaped(text: str) -> str:
    """What a client sent must not forge a line of a log, or steer a terminal."""
    return ascii(text)[1:-1].replace('"', '\\"')


escaped("")  # PyPy opens files at the first call, and a worker may have no descriptor free by then


# ==================================================================================================
# Part IV: tools
#
# What wakes a main loop and how the processes talk, the memory they share, the listening sockets,
# what happens when the application forks, and what of the process is the application's.
# ==================================================================================================
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LONGEST_UNIX_PATH = 107  # bytes, in Linux's struct sockaddr_un
FIRST_PASSED_DESCRIPTOR = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
SPARE_DESCRIPTORS = 64  # for what the application opens while it serves
MASTER_DESCRIPTORS = 20  # standard streams, bell, logs and what is open for a moment


def is_ready(source: Any, event: int, seconds: float) -> bool:
    """Wait. -> did the source become readable (POLLIN) or writable (POLLOUT) within the time?"""
    poller = poll()  # select() fails for descriptors above 1023
    poller.register(source, event)
    return bool(poller.poll(seconds * 1000))


class Pause:
    """What to do when the system has no more to give: try again in a while, and log that once."""

    until = 0.0  # in time.monotonic() seconds; 0 if there is no lack

    def __init__(self, what: str):
        self.what = what

    def begin(self, now: float, error: BaseException) -> None:
        if not self.until:
            message = "cannot %s: %s; trying again every %g s"
            log.error(message, self.what, reason_of(error), RETRY_PAUSE)
        self.until = now + RETRY_PAUSE

    def end(self) -> None:
        self.until = 0.0


class Bell:
    """The self-pipe trick: a signal, or a thread, wakes a main loop by a byte in a pipe.

    Which signals came is noted in a list. The bytes alone would not do: a pipe that is full of HUPs
    drops the byte of a TERM.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        reader, writer = os.pipe()
        self.reader = io.FileIO(reader, "r")
        self.writer = io.FileIO(writer, "w")
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self.fileno = self.reader.fileno
        self.take_wakeups()

    def take_wakeups(self) -> None:
        """From now on each signal rings.

        A worker inherits the master's wake-up descriptor. Until it has replaced it here, its
        signals would ring the master's bell; so they are blocked until then.
        """
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def handle(self, *signals: int) -> None:
        """From now on note these signals, even if our launcher had blocked them."""
        for signum in signals:
            signal.signal(signum, self.note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def note(self, signum: int, frame: object) -> None:
        """(main thread) The handler of all our signals: note it, and the main loop acts.

        A terminal sends TTIN and TTOU to a background job which reads or, after `stty tostop`,
        writes. They are ignored after the first: when such a handler returns, the call begins again
        and raises the same signal, for ever. They are not ignored from the start, because programs
        that the application executes would inherit that.
        """
        self.received.append(signum)
        if signum in TERMINAL_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)

    def ring(self) -> None:
        """(any thread) Wake the main loop. If the pipe is full, it wakes anyway."""
        self.writer.write(b"!")

    def take_signals(self) -> list[int]:
        """-> the signals that came. The pipe is emptied first: a later one rings again."""
        self.reader.read(4096)
        received = self.received
        self.received = []
        return received


class Line:
    """One side of the socketpair between master and worker. Each message is a JSON list on a line.

    The end of file means that the other process is gone.
    """

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.sock = sock
        self.fileno = sock.fileno
        self.pending = b""  # a message that has not come whole
        self.ended = False

    def say(self, *words: Any) -> None:
        """Send a message. It is lost if the other side is gone, which hear() will notice, or so
        stuck that 200 KB wait unread."""
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(words).encode() + b"\n")

    def hear(self) -> list[list[Any]]:
        """-> the messages that have come. `ended` is true if there will be no more."""
        try:
            while not self.ended:
                data = self.sock.recv(4096)
                self.pending += data
                self.ended = not data
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, self.pending = self.pending.split(b"\n")
        return [json.loads(line) for line in lines]


class Scoreboard:
    """Memory that all processes share. In its slot each says as JSON what it does, for the page."""

    MASTER = 0  # its slot
    WORKERS = range(1, 1024)  # theirs
    UNSEEN = 1024  # the slot that nobody reads, for all workers beyond these
    # Bytes of a slot. An entry has fewer: its texts are cut, and a character takes six at most.
    SIZE = 4096
    memory = mmap.mmap(-1, (UNSEEN + 1) * SIZE)

    def write(self, slot: int, facts: dict[str, Any] | None) -> None:
        """None empties the slot."""
        text = b""
        if facts:
            text = json.dumps(facts, ensure_ascii=False).encode(errors="backslashreplace")
        entry = text[: self.SIZE - 1].ljust(self.SIZE, b"\0")
        self.memory[slot * self.SIZE : (slot + 1) * self.SIZE] = entry

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """-> the entries in these slots, with ages in s."""
        found = []
        for start in range(first * self.SIZE, (last + 1) * self.SIZE, self.SIZE):
            if self.memory[start] == 0:
                continue
            text = self.memory[start : start + self.SIZE].rstrip(b"\0")
            with contextlib.suppress(ValueError):  # it is being written: the next look finds it
                found.append(json.loads(text, object_hook=with_age))
        return found


def with_age(facts: dict[str, Any]) -> dict[str, Any]:
    """An entry says since when, so that it need not be written again for being older."""
    if "since" in facts:
        facts["age"] = round(time.monotonic() - facts.pop("since"), 1)
    return facts


# The master's; its workers inherit it. A second copy of this module, which `python -m` and other
# names for its file make, finds that of the first, see serve().
scoreboard: Scoreboard = getattr(sys.modules.get("hupserve"), "scoreboard", None) or Scoreboard()


class Desks:
    """Memory that a worker shares with the master: what each of its request threads is doing.

    The scoreboard would not do for that: a worker that hangs cannot fill it in.
    """

    SIZE = 64  # bytes of a desk
    EMPTY = bytes(SIZE)

    def __init__(self, threads: int):
        self.memory = mmap.mmap(-1, threads * self.SIZE)

    @classmethod
    def label(cls, request: str) -> bytes:
        """-> what is put on a desk: ASCII, filled up with NUL."""
        return request.encode()[: cls.SIZE].ljust(cls.SIZE, b"\0")

    def place(self, desk: int) -> slice:
        return slice(desk * self.SIZE, (desk + 1) * self.SIZE)

    def read(self) -> list[str]:
        """-> the requests that lie on the desks."""
        desks = re.findall(rb"(?s).{%d}" % self.SIZE, self.memory[:])
        return [desk.rstrip(b"\0").decode() for desk in desks if desk[0]]


# Limits
def requests_of_a_life(max_requests: int) -> int:
    """-> after how many a worker leaves: a random tenth more, so that not all do at once; 0: never.

    The numbers of `random` would be the same in all workers that are forked from one master.
    """
    return max_requests + int.from_bytes(os.urandom(4), "big") % (max_requests // 10 + 1)


def raise_descriptor_limit(worker: Worker) -> None:
    """(worker) Raise the soft limit to what it may need; warn if the hard limit forbids that."""
    config = worker.config
    in_use = os.dup(worker.line.fileno())  # the lowest free number
    os.close(in_use)
    needed = config.connections + config.threads + SPARE_DESCRIPTORS + in_use
    limit = raise_limit_to(needed)
    if limit < needed and worker.number == 0:
        message = "only %d descriptors are allowed; connections and threads may need %d"
        log.warning(message, limit, needed)


def refuse_too_many(workers: int, addresses: Collection[str]) -> None:
    """(master) A reload needs lines and listeners of two generations. Raises ValueError."""
    needed = 2 * (workers + 2 * len(addresses)) + MASTER_DESCRIPTORS
    limit = raise_limit_to(needed)
    if limit < needed:
        reason = f"a reload needs {needed} descriptors, and only {limit} are allowed"
        raise ValueError(f"[server:main] workers: {workers}: {reason}")


def raise_limit_to(needed: int) -> float:
    """Raise the soft limit of open descriptors as far as it is needed and allowed. -> the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return FOREVER
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


# Listeners
class Listener(Socket):
    """A listening socket, or one that is bound and will listen at the commit."""

    file: os.stat_result | None = None  # of a unix socket of ours: to recognise its file later

    def accept(self) -> tuple[socket.socket, Any]:
        """As the original, but -> a Socket even if the application has replaced socket.socket."""
        descriptor, address = self._accept()  # type: ignore[attr-defined]
        return Socket(self.family, self.type, self.proto, descriptor), address

    def still_has_its_file(self) -> bool:
        """Is the file at our path still ours? OSError if there is none."""
        file = cast(os.stat_result, self.file)
        return os.path.samestat(file, os.stat(self.getsockname()))

    def refuse_if_replaced(self) -> None:
        if self.file and not self.still_has_its_file():
            raise OSError(errno.EADDRINUSE, "another master has taken its place")

    def set_file_mode(self, mode: int) -> None:
        """Before listen(): until then nobody can connect, whatever mode bind() gave the file."""
        if self.file:
            with contextlib.suppress(FileNotFoundError):  # some cleaner of folders has removed it
                if self.still_has_its_file():
                    os.chmod(self.getsockname(), mode)


Adopted = dict[tuple[int, Any], Listener]  # by family and socket address


def open_listeners(binds: Binds, adopted: Adopted) -> list[Listener]:
    """Bind the sockets of one address. Raises OSError; then none is left open.

    They listen() only at the commit, so a roll-back resets nobody.
    """
    listeners: list[Listener] = []
    try:
        for family, address in binds:
            given = adopted.get((family, address))
            listener = given.dup() if given else Listener(family)
            listeners.append(listener)
            listener.setblocking(False)
            if family != socket.AF_UNIX:  # the connections inherit it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if given is None:
                bind_listener(listener, address)
    except OSError:
        close_listeners(listeners)
        raise
    return listeners


def bind_listener(listener: Listener, address: Any) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if listener.family != socket.AF_UNIX:
        listener.bind(address)
        return
    unlink_dead_socket(address)  # on any other file, bind() fails
    listener.bind(address)
    listener.file = os.stat(address)


def unlink_dead_socket(path: str) -> None:
    """Remove the socket file that a server has left behind, if nobody listens on it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # the queue of a living server may be full
        is_dead = probe.connect_ex(path) == errno.ECONNREFUSED
    if is_dead and stat.S_ISSOCK(os.stat(path).st_mode):
        os.unlink(path)


def close_listeners(listeners: Iterable[Listener]) -> None:
    """(master) Close our copies. The workers' copies and the queue stay, unlike with shutdown()."""
    for listener in listeners:
        with contextlib.suppress(OSError):
            if listener.file and listener.still_has_its_file():
                os.unlink(listener.getsockname())
        listener.close()


def adopt_listeners() -> Adopted:
    """-> the sockets that systemd has passed (sd_listen_fds(3)). The variables are used up."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", "")
    adopted: Adopted = {}
    if pid != str(os.getpid()) or not count.isdigit():
        return adopted
    for descriptor in range(FIRST_PASSED_DESCRIPTOR, FIRST_PASSED_DESCRIPTOR + int(count)):
        listener = Listener(fileno=descriptor)
        listener.set_inheritable(False)
        address = listener.getsockname()
        adopted[listener.family, address] = listener
        if address[:1] == ("::",):
            is_ipv6_only = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            if not is_ipv6_only:  # then it serves IPv4, too
                adopted[socket.AF_INET, ("0.0.0.0", address[1])] = listener
    return adopted


def warn_about_unnamed(adopted: Adopted, config: Config) -> None:
    """Clients of a socket that systemd holds and nobody accepts from would wait for ever."""
    binds = {bind for address in config.listen.values() for bind in address}
    named = {adopted[bind] for bind in binds if bind in adopted}
    unnamed = {str(one.getsockname()) for one in adopted.values() if one not in named}
    if unnamed:
        reason = f"systemd's {', '.join(unnamed)} is not named: its clients wait in vain"
        log.warning("%s", mistake(config, "listen", reason))


class ForkGuard:
    """What becomes of a worker's sockets when the application forks, as multiprocessing does.

    A child that kept a connection open would keep its client waiting for an end that never comes.
    So a child closes all of them. It finds them in by_state. A fork waits until the main thread
    sleeps in Worker.wait(), when no connection is between two states.
    """

    def __init__(self, worker: Worker):
        self.worker = worker
        self.is_worker = True
        self.mask: set[int] = set()  # the signals that were blocked before a fork
        lock = threading.RLock()
        self.forbid = lock.acquire
        self.allow = lock.release
        os.register_at_fork(
            before=self.before_fork,
            after_in_parent=self.after_fork,
            after_in_child=self.after_fork_in_child,
        )

    def before_fork(self) -> None:
        """(the forking thread) A signal for the child waits until it has dropped our handlers."""
        self.forbid()
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, MASTER_SIGNALS)

    def after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        self.allow()

    def after_fork_in_child(self) -> None:
        """(the application's child) Hold no socket of ours open, answer to no signal of ours."""
        if self.is_worker:  # only once: in a child's child the descriptors may be something else
            self.is_worker = False
            self.close_everything()
            # A forked request thread that returns from the application finds no job, and the bell
            # closed: it ends.
            self.worker.jobs.clear()
            signal.set_wakeup_fd(-1)
            for signum in signal.valid_signals():
                if signal.getsignal(signum) in (self.worker.bell.note, ignore):
                    signal.signal(signum, signal.SIG_DFL)
        self.after_fork()

    def close_everything(self) -> None:
        worker = self.worker
        worker.line.sock.close()
        worker.selector.close()
        worker.bell.reader.close()
        worker.bell.writer.close()
        for listener in worker.listeners:
            listener.close()
        for connections in worker.by_state:
            for connection in connections:
                connection.sock.close()


# The guest. The application lives in this process and may change anything there, mostly by
# accident. prepare_for_guest() says what it finds, take_back_from_guest() what it may not keep, and
# leave() how its threads, executors and exit functions end.
def prepare_for_guest(bell: Bell, folder: str) -> None:
    """(worker) Before the application is loaded: make the process its own, and unblock signals."""
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):  # it is the master's or the calling program's
            signal.signal(signum, signal.SIG_DFL)
    # A stop may have been meant for the whole group. The master ends this process if it must.
    for signum in STOPS:
        signal.signal(signum, ignore)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    bell.handle(signal.SIGHUP, *IGNORED_SIGNALS)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    enter_folder(folder)
    sys.path.insert(0, folder)
    del sys.argv[1:]
    with open(os.devnull, "rb+", buffering=0) as null:
        os.dup2(null.fileno(), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    forget_the_callers_output()
    forget_the_callers_exit_functions()


def ignore(signum: int, frame: object) -> None:
    """A handler, because SIG_IGN would be inherited by programs that the application executes."""


def forget_the_callers_output() -> None:
    """(worker) What the calling program has printed may still be buffered: it prints that itself.

    Here it goes to /dev/null, by a flush while the stream's descriptor leads there.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it has no descriptor
            descriptor = stream.fileno()
            kept = os.dup(descriptor)
            os.dup2(0, descriptor)
            with contextlib.suppress(OSError):
                stream.flush()
            os.dup2(kept, descriptor)
            os.close(kept)


def forget_the_callers_exit_functions() -> None:
    """(worker) They would delete the calling program's files and end its children.

    Those of Python's own modules are registered again: they serve the application, too.
    """
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    if "multiprocessing.util" in sys.modules:
        atexit.register(sys.modules["multiprocessing.util"]._exit_function)
        sys.modules["multiprocessing.process"]._children.clear()


def take_back_from_guest(bell: Bell, config: Config) -> None:
    """(worker) After the application is loaded: what we rely on, and it may have changed.

    From now on its code runs in other threads, which cannot change signals. Raises ConfigError for
    an application that would make our threads hang, or every TLS connection fail.
    """
    refuse_replaced(config, "threads", _thread.start_new_thread is not start_new_thread)
    refuse_replaced(config, "ssl", config.tls and ssl.SSLSocket is not SSLSocket)
    for signum in signal.valid_signals():
        handler = signal.getsignal(signum)
        if callable(handler) and handler not in (bell.note, ignore):
            signal.signal(signum, shielded(handler))
    bell.take_wakeups()
    bell.handle(signal.SIGHUP, *STOPS)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a client that is gone is an error of send()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.disable()  # enable() alone would not take SIGABRT back
    faulthandler.enable(stderr_log().file)


def refuse_replaced(config: Config, what: str, is_replaced: object) -> None:
    if is_replaced:
        reason = f"the application replaces Python's {what}, on which hupserve relies"
        hint = "(monkey_patch() of gevent and eventlet does)"
        raise ConfigError(f"{config.ini.path}: {reason} {hint}")


def shielded(handler: Callable[..., object]) -> Callable[..., None]:
    """-> a signal handler of the application's that cannot end our main loop by an exception."""

    def handle(signum: int, frame: object) -> None:
        try:
            handler(signum, frame)
        except BaseException:
            log.exception("the application's handler for signal %d", signum)

    return handle


def leave(line: Line, status: int) -> NoReturn:
    """(worker) End the process as the interpreter ends, but within EXIT_TIME.

    First the application's threads and executors finish, then the exit functions run. A task that
    hangs does not keep them from running: a helper thread runs them after half of the time.
    Request threads are not waited for: they are idle, or their requests are cut by drain_timeout.
    """
    line.say("exiting")
    # The last resort ends the process even if C code holds the interpreter's lock.
    with contextlib.suppress(RuntimeError):  # it can start no thread: then OVERTIME is the limit
        faulthandler.dump_traceback_later(EXIT_TIME, exit=True, file=stderr_log().file)
    exit_functions = threading.Lock()  # held by the thread that runs them

    def run_exit_functions() -> None:
        with exit_functions:
            log.debug("leaving: running the exit functions")
            atexit._run_exitfuncs()

    def hurry() -> None:
        time.sleep(EXIT_TIME / 2)
        still_there = ", ".join(guests_threads()) or "an exit function"
        message = "leaving: %s: not done after %g s, is cut short after %d s"
        log.warning(message, still_there, EXIT_TIME / 2, EXIT_TIME)
        run_exit_functions()

    flush_stdout = functools.partial(print, end="", flush=True)
    flush_stderr = functools.partial(print, end="", flush=True, file=sys.stderr)
    start_helper = threading.Thread(target=hurry, daemon=True).start
    wait_for_threads = threading._shutdown  # type: ignore[attr-defined]
    log.debug("leaving: waiting for the application's threads: %s", guests_threads() or "none")
    for step in (start_helper, wait_for_threads, run_exit_functions, flush_stdout, flush_stderr):
        with contextlib.suppress(BaseException):
            step()
    os._exit(status)


def guests_threads() -> list[str]:
    """-> the names of the threads that leave() waits for."""
    return [
        thread.name
        for thread in threading.enumerate()
        if not thread.daemon
        and thread is not threading.main_thread()
        and not thread.name.startswith(REQUEST_THREAD)
    ]


# ==================================================================================================
# Part V: the operator
#
# Configuration first: text goes in, one immutable object comes out. Then logs, pidfile, systemd,
# the status page with the demo, and the command line.
# ==================================================================================================
LONGEST_LINE = 1000  # characters of a mistake or a STATUS
GAP = " ... "


class ConfigError(Exception):
    """The operator's mistake, in one line: file, section, key and reason."""

    def __init__(self, text: str):
        super().__init__(shortened(text))


class Config(NamedTuple):
    """One reading of a file. Sizes are in bytes, times in seconds."""

    listen: dict[str, Binds]  # what to bind for each address, which is told apart by its text
    socket_mode: int  # of the files of unix sockets
    backlog: int  # clients that the kernel queues for each address
    workers: int
    threads: int  # requests in flight for each worker
    connections: int  # open ones for each worker
    max_body: int  # 0: no limit
    keepalive_timeout: float  # 0: no connection is kept
    header_timeout: float
    io_timeout: float
    idle_grace: float
    drain_timeout: float  # 0: no limit
    boot_timeout: float
    hang_timeout: float  # 0: a worker that hangs stays
    max_requests: int  # after which a worker is replaced; 0: never
    certfile: str
    keyfile: str
    pidfile: str
    access_log: str  # "off", "-" or an absolute path
    log_file: str
    log_level: int
    tls: ssl.SSLContext | None
    parts: list[Part]  # of the application, the outermost first
    ini: Ini


class Part(NamedTuple):
    """An application or a filter, as the file names it."""

    place: str  # for error messages
    target: str  # module:attribute
    arguments: list[Any] | None  # the target is called with them; None: it is the application
    settings: dict[str, str]  # and with these


class Key(NamedTuple):
    default: str
    read: Callable[[str], Any]  # raises the reason as ValueError or OSError


def reason_of(error: BaseException, with_type: bool = False) -> str:
    """-> an exception's text, on one line."""
    if with_type:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def shortened(text: str) -> str:
    """-> one line. What is too much in the middle is left out: the reason is often the end."""
    line = " ".join(text.split())
    if len(line) <= LONGEST_LINE:
        return line
    half = (LONGEST_LINE - len(GAP)) // 2
    return line[:half] + GAP + line[-half:]


def mistake(config: Config, key: str, reason: str) -> str:
    return f"{config.ini.path}: [server:main] {key}: {reason}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """-> a hint for the end of an error message, or nothing."""
    close = difflib.get_close_matches(word, words, 1, SIMILAR)
    return f"; did you mean {close[0]}?" if close else ""


def misplaced(settings: Iterable[str]) -> str:
    """-> a hint, if one of these settings of an application or a filter is a key of ours."""
    keys = [key for key in settings if key in KEYS]
    return f"; {keys[0]} belongs in [server:main]" if keys else ""


# Readers of values
def whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,16}", text) or not least <= int(text) <= most:
            raise ValueError(f"not a whole number between {least} and {most}")
        return int(text)

    return read


def seconds(at_least: float = 0.0, at_most: float = 1e6) -> Callable[[str], float]:
    def read(text: str) -> float:
        is_number = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)
        if not is_number or not at_least <= float(text) <= at_most:
            raise ValueError(f"not a number between {at_least} and {at_most:.16g}")
        return float(text)

    return read


def addresses(text: str) -> dict[str, Binds]:
    """'*:80 unix:/x' -> what to bind for '*:80', and for 'unix:/x'."""
    found = {word: binds_of(word) for word in text.split() or [""]}
    for one, other in itertools.combinations(found, 2):
        if overlap(found[one], found[other]):
            raise ValueError(f"{other} overlaps {one}")
    return found


def binds_of(word: str) -> Binds:
    """'[::1]:80' -> ((AF_INET6, ('::1', 80, 0, 0)),).

    Hosts are numeric: the master never waits for a name server.
    """
    problem = (
        f"{word} is no numeric host:port, localhost:port, [::1]:port, *:port or unix:/path "
        f"({LONGEST_UNIX_PATH} bytes, no blank)"
    )
    if word.startswith("unix:"):
        path = word[len("unix:") :]
        if not 0 < len(os.fsencode(path)) <= LONGEST_UNIX_PATH or "\0" in path:
            raise ValueError(problem)
        return ((socket.AF_UNIX, path),)
    host, _, digits = word.rpartition(":")
    try:
        port = whole(0, 65535)(digits)
        if host == "*":
            any_ipv4 = (socket.AF_INET, ("0.0.0.0", port))
            any_ipv6 = (socket.AF_INET6, ("::", port, 0, 0))
            return (any_ipv4, any_ipv6) if socket.has_dualstack_ipv6() else (any_ipv4,)
        if host == "localhost":
            host = "127.0.0.1"
        if host.startswith("[") and host.endswith("]"):
            ipv6 = ipaddress.IPv6Address(host[1:-1])
            if ipv6.is_link_local or ipv6.scope_id:
                problem = f"{word} is a link-local address: these need a zone and are not served"
                raise ValueError
            return ((socket.AF_INET6, (str(ipv6), port, 0, 0)),)
        return ((socket.AF_INET, (str(ipaddress.IPv4Address(host)), port)),)
    except ValueError:
        raise ValueError(problem) from None


def overlap(binds: Binds, others: Binds) -> bool:
    """Would the two collide? (IPv6 listeners are IPv6 only, so the families do not.)"""
    for (family, one), (other_family, other) in itertools.product(binds, others):
        if family != other_family:
            continue
        if one == other:
            return True
        if family != socket.AF_UNIX:
            one_is_any = one[0] in ("0.0.0.0", "::")
            other_is_any = other[0] in ("0.0.0.0", "::")
            if one[1] == other[1] and (one_is_any or other_is_any):
                return True
    return False


def socket_mode(text: str) -> int:
    """'0660' -> 0o660; '' -> the mode that the umask gives."""
    if text:
        if not re.fullmatch("0?[0-7]{3}", text):
            raise ValueError("not an octal mode such as 0660")
        return int(text, 8)
    umask = os.umask(0o077)  # it can be read only by setting it
    os.umask(umask)
    return 0o777 & ~umask


def readable_file(text: str) -> str:
    """'' or the path of a file that can be read; otherwise OSError."""
    if text:
        with open(text, opener=regular_file_opener):
            pass
    return text


def regular_file_opener(path: str, flags: int) -> int:
    """For open(): refuse by name what could keep us waiting, such as a FIFO."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # of a FIFO, open() itself would wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def log_path(text: str) -> str:
    """'off', '-' or a file, which can be written or created. Nothing is created here."""
    if text in ("off", "-"):
        return text
    path = os.path.abspath(text)
    try:
        os.close(open_at_once(path, os.O_WRONLY | os.O_APPEND))
    except FileNotFoundError:
        folder = os.path.dirname(os.path.realpath(path))
        os.stat(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "cannot be created in its folder") from None
    return path


def path_in_folder(text: str) -> str:
    """'' or a path whose folder exists; otherwise OSError."""
    if not text:
        return ""
    os.stat(os.path.join(os.path.dirname(text), "."))
    return os.path.realpath(text)


def log_level(text: str) -> int:
    return logging.Handler(text.upper()).level  # a Handler knows the names


SIMILAR = 0.75  # what difflib must find two names to be, or "reload" would be a hint at "threads"
# fmt: off
KEYS = {
    "listen":            Key("127.0.0.1:8000",  addresses),
    "socket_mode":       Key("",                socket_mode),
    "backlog":           Key("2048",            whole(1, 1_000_000)),
    "workers":           Key("2",               whole(1, 1_000)),
    "threads":           Key("16",              whole(1, 10_000)),
    "connections":       Key("1000",            whole(1, 1_000_000)),
    "max_body":          Key("0",               whole(0, 10**15)),
    "keepalive_timeout": Key("75",              seconds()),
    "header_timeout":    Key("10",              seconds(at_least=0.001)),
    "io_timeout":        Key("60",              seconds(at_least=0.001)),
    "boot_timeout":      Key("60",              seconds(at_least=0.001)),
    "idle_grace":        Key("5",               seconds()),
    "drain_timeout":     Key("0",               seconds()),
    "hang_timeout":      Key("60",              seconds()),
    "max_requests":      Key("0",               whole(0, 10**9)),
    "certfile":          Key("",                readable_file),
    "keyfile":           Key("",                readable_file),
    "pidfile":           Key("",                path_in_folder),
    "access_log":        Key("off",             log_path),
    "log_file":          Key("-",               log_path),
    "log_level":         Key("info",            log_level),
}
# fmt: on
# Keys of gunicorn and others that have another name here.
ELSEWHERE = {
    "bind": "here it is listen",
    "host": "here it is listen = host:port",
    "port": "here it is listen = host:port",
    "timeout": "here they are boot_timeout, hang_timeout and drain_timeout",
    "graceful_timeout": "here it is drain_timeout",
    "keepalive": "here it is keepalive_timeout",
    "reload": "here a SIGHUP reloads",
}


def start_folder() -> str:
    """-> the present folder, by the path that $PWD has for it, if it has one, as a shell would.

    os.getcwd() follows symbolic links. A link that is switched to a new release leads there only
    if it stays in the path.
    """
    path = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(path) and os.path.samefile(path, "."):
            return path
    try:
        return os.getcwd()
    except OSError as error:
        raise OSError(error.errno, f"the current folder: {reason_of(error)}") from None


def enter_folder(folder: str) -> None:
    """Go to where the start folder's path leads now. If it leads nowhere, stay and say so."""
    try:
        os.chdir(folder)
    except OSError as error:
        log.warning("the start folder %s: %s", folder, reason_of(error))


def read_config(path: str, folder: str = "") -> Config:
    """-> what the file says, all of it valid. Raises ConfigError.

    folder: what a relative path starts from; by default the present folder.
    """
    try:
        return Ini(path, folder or start_folder()).config()
    except configparser.Error as error:
        place = ""
        if hasattr(error, "option"):
            place = f"[{error.section}] {error.option}: "  # type: ignore[attr-defined]
        raise ConfigError(f"{path}: {place}{reason_of(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {reason_of(error)}") from None


class Ini(configparser.ConfigParser):
    """The file, parsed once. Its methods raise OSError, ValueError or configparser.Error."""

    def __init__(self, path: str, folder: str):
        """path: as the operator gave it, for messages. folder: see start_folder()."""
        # First without inheritance, to note each section's own keys; then [DEFAULT] is turned on.
        super().__init__(default_section="")
        self.path = path
        self.folder = folder
        self.full_path = os.path.join(folder, path)
        enter_folder(folder)  # the paths in the file are relative to it, too
        absolute = os.path.abspath(self.full_path).replace("%", "%%")
        self["DEFAULT"] = {"here": os.path.dirname(absolute), "__file__": absolute}
        with open(self.full_path, encoding="utf-8-sig", opener=regular_file_opener) as file:
            self.read_file(file)
        self.keys_of = {section: list(self[section]) for section in self}
        cast(dict[str, str], self.defaults()).update(self.items("DEFAULT", raw=True))

    def optionxform(self, optionstr: str) -> str:
        """Keys are case-sensitive."""
        return optionstr

    def own(self, section: str) -> dict[str, str]:
        """-> the section's own keys. Those of [DEFAULT] are global_conf, not settings."""
        if section not in self:
            raise ValueError(f"[{section}] missing section{did_you_mean(section, self)}")
        return {key: self.get(section, key) for key in self.keys_of[section]}

    def config(self) -> Config:
        texts = self.server_keys()
        values: dict[str, Any] = {}
        for key, (default, read) in KEYS.items():
            text = texts.get(key, default)
            try:
                values[key] = read(text)
            except (ValueError, OSError) as error:
                raise ValueError(f"[server:main] {key}: {text!r}: {reason_of(error)}") from None
        refuse_too_many(values["workers"], values["listen"])
        tls = tls_context(values["certfile"], values["keyfile"])
        return Config(**values, tls=tls, parts=self.parts(), ini=self)

    def server_keys(self) -> dict[str, str]:
        """-> the keys of [server:main]. In a file without a server's section they are defaults."""
        if "server:main" not in self:
            meant = difflib.get_close_matches("server:main", self, 1, SIMILAR)
            meant += [section for section in self if re.match(r"server\b", section)]
            if meant:
                raise ValueError(f"[server:main] missing section; is [{meant[0]}] meant?")
            return {}
        if "use" in self.keys_of["server:main"]:
            return self.keys_of_another_server()
        texts = self.own("server:main")
        unknown = sorted(texts.keys() - KEYS.keys())
        if unknown:
            key = unknown[0]
            hint = f"; {ELSEWHERE[key]}" if key in ELSEWHERE else did_you_mean(key, KEYS)
            raise ValueError(f"[server:main] {key}: unknown key{hint}")
        return texts

    def keys_of_another_server(self) -> dict[str, str]:
        """`use = egg:waitress#main`: take the keys that we have too, and `host` and `port`.

        The others are ignored, even if they could not be interpolated: their variables may be
        arguments of that server's command line.
        """
        keys = self.keys_of["server:main"]
        taken = [key for key in keys if key in KEYS]
        if "listen" not in taken:
            taken += [key for key in keys if key in ("host", "port")]
        texts = {key: self.get("server:main", key) for key in taken}
        ignored = [key for key in keys if key not in taken and key != "use"]
        if ignored:
            message = "%s: [server:main] use: it is for another server; ignored: %s"
            log.warning(message, self.path, " ".join(ignored))
        if "host" in texts or "port" in texts:
            # Paste's defaults; waitress has the same port. No host is every host, as for bind().
            host = texts.pop("host", "127.0.0.1") or "*"
            port = texts.pop("port", "8080")
            texts["listen"] = f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
        return texts

    def parts(self) -> list[Part]:
        """-> what the application is made of, the outermost first."""
        settings = {"pipeline": "main"}
        if "pipeline:main" in self:
            settings = self.own("pipeline:main")
        names = settings.pop("pipeline", "").split()
        if not names:
            raise ValueError("[pipeline:main] pipeline: names no application")
        filters = [self.part("filter", name) for name in names[:-1]]
        parts = [*filters, self.part("app", names[-1])]
        found = [part for part in parts if part]
        if settings or len(found) < len(parts):
            # PasteDeploy would not find a quoted folder again whose name is not UTF-8.
            path = os.path.abspath(self.full_path).replace("%", "%25").replace("#", "%23")
            return [Part("read by PasteDeploy", "paste.deploy:loadapp", [f"config:{path}"], {})]
        return found

    def part(self, prefix: str, name: str) -> Part | None:
        """-> one of parts(). None: only PasteDeploy knows what it means."""
        section = f"{prefix}:{name}"
        kinds = ("application", "composite", "composit", "filter-app", "pipeline")
        others = [f"{kind}:{name}" for kind in kinds]
        if section not in self and (":" in name or any(other in self for other in others)):
            return None
        settings = self.own(section)
        kind = f"paste.{prefix}_factory"
        if prefix == "app" and kind not in settings:
            kind = "wsgi"
        for key in settings:
            if key != kind and re.match("use$|filter-with$|[sg]et |paste[.]", key):
                return None
        target = settings.pop(kind, "")
        match = re.fullmatch(r"([\w.]+:[\w.]+)(\(\))?", target)
        if match is None or (match[2] and kind != "wsgi"):
            what = "module:attribute or module:function()" if kind == "wsgi" else "module:attribute"
            hint = did_you_mean(kind, settings)
            raise ValueError(f"[{section}] {kind}: {target!r} is not {what}{hint}")
        place = f"[{section}] {kind}: {target}"
        self.warn_if_imported(place, target.partition(":")[0])
        if kind != "wsgi":
            return Part(place, target, [dict(self["DEFAULT"])], settings)
        if settings:
            first = min(settings)
            hint = misplaced([first]) or "; wsgi takes no settings, paste.app_factory does"
            raise ValueError(f"[{section}] {first}: unknown key{hint}")
        return Part(place, match[1], [] if match[2] else None, {})

    def warn_if_imported(self, place: str, module: str) -> None:
        """(master) A module that is here already was imported by the calling program."""
        if sys.modules.get(module) not in (None, sys.modules[__name__]):
            why = "the calling program has imported it, so no reload will see its new code"
            log.warning("%s: %s: %s", self.path, place, why)


def tls_context(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """The master makes it: it may read a key that its workers cannot."""
    if not certfile and not keyfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # send() would have to read
    context.set_alpn_protocols(["http/1.1"])
    never_ask_on_the_terminal = lambda: b""  # noqa: E731
    try:
        context.load_cert_chain(certfile, keyfile or None, never_ask_on_the_terminal)
    except (OSError, ValueError) as error:  # it does not say which of the two files it means
        files = f"{certfile} {keyfile}".strip()
        raise ValueError(f"[server:main] certfile: {files!r}: {reason_of(error)}") from None
    return context


# The application
def load_application(config: Config) -> Application:
    """(worker) Import and build it. Raises ConfigError for the operator's mistakes.

    The application's own exceptions pass.
    """
    importlib.invalidate_caches()  # a module may be newer than what Python remembers of its folder
    place = "[loggers]"
    settings: dict[str, str] = {}
    application: Any = None
    try:
        if "loggers" in config.ini:
            logging.config.fileConfig(config.ini, disable_existing_loggers=False)
        for part in reversed(config.parts):
            place = part.place
            settings = part.settings
            application = build(part, application)
    except Exception as error:
        if is_loading_mistake(error):
            reason = reason_of(error, with_type=True)
            hint = misplaced(settings) if isinstance(error, TypeError) else ""
            if isinstance(error, ModuleNotFoundError):
                hint = f"; looked in {sys.path[0]} and in Python's own folders"
            raise ConfigError(f"{config.ini.path}: {place}: {reason}{hint}") from None
        raise
    finally:  # the traceback of an application that does not load must be seen, too
        take_back_loggers(loggers_named_by(config.ini))
    return cast(Application, application)


def build(part: Part, inner: Any) -> Any:
    """-> the application, or the filter around the inner application."""
    found = pkgutil.resolve_name(part.target)
    if part.arguments is not None:
        found = found(*part.arguments, **part.settings)
    if inner is not None:
        found = found(inner)
    if not callable(found):
        raise TypeError(f"{found!r} is not callable")
    if part.arguments is None and cannot_be_an_application(found):
        attribute = part.target.partition(":")[2]
        raise TypeError(
            f"it does not take (environ, start_response); a factory? write {attribute}()"
        )
    return found


def cannot_be_an_application(found: Callable[..., Any]) -> bool:
    """Does its signature say that it cannot be called with two arguments?

    What a decorator has wrapped does not count: the function around it is what will be called.
    """
    call = found if hasattr(found, "__code__") else type(found).__call__
    arguments = 2 if call is found else 3  # with self
    if getattr(getattr(call, "__code__", None), "co_argcount", 0) == arguments:
        return False  # the usual case, without two megabytes of inspect in each worker
    import inspect

    try:
        signature = inspect.signature(found, follow_wrapped=False)
    except Exception:  # it has none, or its annotations cannot be evaluated
        return False
    try:
        signature.bind({}, None)
    except TypeError:
        return True
    return False


def is_loading_mistake(error: Exception) -> bool:
    """Whose mistake is it? If only loaders stand in the traceback, the file names something wrong.

    Otherwise the application's own code was at work.
    """
    if isinstance(error, SyntaxError):
        return False
    loaders = rf"{__name__}|pkgutil|configparser|(importlib|logging|paste)(\..+)?"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not re.fullmatch(loaders, str(frame.f_globals.get("__name__"))):
            return False
    return True


# Logs
PATIENCE = 0.25  # seconds a record waits for room: a reader that is alive has made some by then
DATED = logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(message)s")
PLAIN = logging.Formatter("%(message)s")


class Log(logging.Handler):
    """Where lines go. A line that cannot be written is lost, and nothing else happens.

    No buffer is in between: what cannot be written now must not fail again at the process's end.
    close() is not overridden: the application's dictConfig() closes every handler there is.
    """

    file: Any  # a FileIO or a socket, which never waits
    lost = 0  # records since the last one that could be written
    is_cut = False  # the last line has no end

    def emit(self, record: logging.LogRecord) -> None:
        """(any thread) logging's lock lets one in at a time."""
        try:
            self.write_all(self.encoded(record))
            self.lost = 0
        except Exception as error:
            self.lost += 1
            if self.lost == 1:
                self.complain(error)

    def flush(self) -> None:
        """(main thread) The last chance: logging.shutdown() calls this at the process's end."""
        if self.lost:
            text = "this process ends"
            self.handle(logging.LogRecord(log.name, logging.INFO, "", 0, text, None, None))

    def encoded(self, record: logging.LogRecord) -> bytes:
        """-> the record's lines. If some were lost, their number stands before them."""
        text = self.format(record) + "\n"
        if self.lost:
            what = "%d log lines before this one could not be written"
            gap = logging.LogRecord(log.name, logging.WARNING, "", 0, what, (self.lost,), None)
            text = f"{self.format(gap)}\n{text}"
        if self.is_cut:
            text = f"\n{text}"
        return text.encode(errors="backslashreplace")

    def format(self, record: logging.LogRecord) -> str:
        layout = DATED if record.name == log.name else PLAIN
        return layout.format(record)

    def write_all(self, data: bytes) -> None:
        """Raises OSError: there is no room for all of it.

        A reader that is alive but slow gets a moment for each record. One that is stuck has cost a
        record already: then nobody waits for it any more, until it has made room.
        """
        deadline = time.monotonic() + PATIENCE
        while data:
            try:
                count = self.write(data)
            except BlockingIOError:
                patience = 0 if self.lost else deadline - time.monotonic()
                if patience <= 0 or not is_ready(self.file, POLLOUT, patience):
                    raise
                continue
            data = data[count:]
            self.is_cut = bool(data)

    def write(self, data: bytes) -> int:
        """-> how many bytes there was room for. Raises BlockingIOError: for none."""
        return os.write(self.file.fileno(), data)

    def complain(self, error: Exception) -> None:
        """Say elsewhere that a line was lost, the first one after others were written."""


class StderrLog(Log):
    """stderr, by a descriptor of our own: the application may close or redirect its number 2."""

    def __init__(self) -> None:
        super().__init__()
        try:
            copy = os.dup(2)
        except OSError:  # it is closed
            copy = os.open(os.devnull, os.O_WRONLY)
        status = os.fstat(copy)
        journal = os.environ.get("JOURNAL_STREAM")  # systemd.exec(5): device and inode
        self.is_journal = journal == f"{status.st_dev}:{status.st_ino}"
        self.is_socket = stat.S_ISSOCK(status.st_mode)
        self.may_wait = not self.is_socket and not stat.S_ISREG(status.st_mode)
        if self.may_wait:
            # O_NONBLOCK belongs to the open pipe or terminal, which other programs share. So open
            # it once more, where that is possible. (A file's position must stay the common one.)
            with contextlib.suppress(OSError):
                again = open_at_once(f"/proc/self/fd/{copy}", os.O_WRONLY | os.O_APPEND)
                os.close(copy)
                copy = again
                self.may_wait = False
        self.file = socket.socket(fileno=copy) if self.is_socket else io.FileIO(copy, "w")

    def write(self, data: bytes) -> int:
        if self.is_socket:
            return cast(int, self.file.send(data, socket.MSG_DONTWAIT))
        if self.may_wait:  # poll() promises room for no more than PIPE_BUF bytes
            if not is_ready(self.file, POLLOUT, 0):
                raise BlockingIOError
            data = data[:PIPE_BUF]
        return super().write(data)

    def format(self, record: logging.LogRecord) -> str:
        """The journal adds time and pid. A line begins with its priority (sd-daemon(3))."""
        if not self.is_journal:
            return super().format(record)
        syslog = logging.handlers.SysLogHandler
        priority = syslog.priority_names[syslog.priority_map.get(record.levelname, "warning")]
        lines = PLAIN.format(record).split("\n")
        return "\n".join(f"<{priority}>{line}" for line in lines)


@functools.cache
def stderr_log() -> StderrLog:
    """-> the one of this process and its children."""
    return StderrLog()


class LogFile(Log):
    """A file. It is followed when it is rotated."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.is_created = not os.path.exists(path)
        self.file = self.open_file()

    def open_file(self) -> io.FileIO:
        file = io.FileIO(self.path, "ab", opener=open_at_once)
        self.status = os.fstat(file.fileno())
        return file

    def write(self, data: bytes) -> int:
        if not self.is_in_place():
            rotated = self.file
            self.file = self.open_file()
            rotated.close()
        return super().write(data)

    def is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), self.status)
        except FileNotFoundError:
            return False

    def complain(self, error: Exception) -> None:
        tell(f"{self.path}: {reason_of(error)}")

    def undo(self) -> None:
        """(master) The commit has failed: nothing has been written yet."""
        self.file.close()
        if self.is_created:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(self.path))


def open_at_once(path: str, flags: int) -> int:
    """os.open() that does not wait for the other side of a pipe. -> a descriptor that never waits.

    A terminal does not become ours.
    """
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = "a pipe that nobody reads, or a socket"
        raise


class LogUse(NamedTuple):
    """What one of our loggers does."""

    handler: logging.Handler
    level: int


Logs = dict[logging.Logger, LogUse]
logs_in_use: Logs = {}


def open_logs(config: Config, undo: contextlib.ExitStack) -> Logs:
    """-> the configuration's logs, open. Raises ConfigError. `undo` gets what takes this back."""
    return {
        log: LogUse(open_log(config, "log_file", undo), config.log_level),
        access_log: LogUse(open_log(config, "access_log", undo), logging.INFO),
    }


def open_log(config: Config, key: str, undo: contextlib.ExitStack) -> logging.Handler:
    path = getattr(config, key)
    if path == "off":
        return logging.NullHandler()
    if path == "-":
        return stderr_log()
    try:
        file = LogFile(path)
    except OSError as error:
        raise ConfigError(mistake(config, key, f"{path}: {reason_of(error)}")) from None
    undo.callback(file.undo)
    return file


def use_logs(logs: Logs, of_others: Collection[str] = ()) -> None:
    """Write to these from now on, and close the files that were used so far. This cannot fail."""
    for before in logs_in_use.values():
        if isinstance(before.handler, LogFile):
            before.handler.file.close()
    logs_in_use.update(logs)
    take_back_loggers(of_others)


def use_new_logs(config: Config) -> None:
    """(worker) The master has opened them just before. Should it fail here, the old ones stay."""
    try:
        logs = open_logs(config, contextlib.ExitStack())
    except ConfigError as error:
        log.error("%s", error)
        return
    use_logs(logs, loggers_named_by(config.ini))


def take_back_loggers(of_others: Collection[str]) -> None:
    """Undo what the application's dictConfig(), fileConfig() and disable() have done to ours.

    of_others: names of loggers whose handlers are the ini's.
    """
    for logger, (handler, level) in logs_in_use.items():
        logger.disabled = False
        # logging.disable() acts by the common manager, so each of our loggers has its own.
        logger.manager = logging.Manager(logger)  # type: ignore[arg-type]
        if logger.name not in of_others:
            logger.handlers = [handler]
            logger.propagate = False
            logger.setLevel(level)


def loggers_named_by(ini: Ini) -> set[str]:
    """-> the names of the loggers that [loggers] sets up."""
    keys = ini.get("loggers", "keys", raw=True, fallback="").split(",")
    sections = [f"logger_{key.strip()}" for key in keys]
    return {ini.get(section, "qualname", raw=True, fallback="") for section in sections}


# Pidfile and systemd
LONGEST_PIDFILE = 4096  # bytes; another program's may have more than a number in it
NOTIFY_TIMEOUT = 1.0  # seconds for systemd to make room for a datagram


def write_pidfile(config: Config, undo: contextlib.ExitStack) -> None:
    """Write our pid over whatever is there, as nginx does. Raises ConfigError.

    undo gets what puts back the file as it was.
    """
    path = config.pidfile
    if not path:
        return
    try:
        before = read_pidfile(path)
        if names_us(before):
            return  # were it written again, somebody could find it empty
        undo.callback(put_back_pidfile, path, before)
        overwrite(path, b"%d\n" % os.getpid())
    except OSError as error:
        raise ConfigError(mistake(config, "pidfile", f"{path}: {reason_of(error)}")) from None


def read_pidfile(path: str) -> bytes | None:
    """-> what is in it; None if there is no such file."""
    try:
        with io.FileIO(path, "r", opener=open_at_once) as file:
            return file.read(LONGEST_PIDFILE)
    except FileNotFoundError:
        return None


def names_us(text: bytes | None) -> bool:
    return (text or b"").strip() == b"%d" % os.getpid()


def overwrite(path: str, data: bytes) -> None:
    with io.FileIO(path, "w", opener=open_at_once) as file:
        file.write(data)


def put_back_pidfile(path: str, before: bytes | None) -> None:
    with contextlib.suppress(OSError):
        if before is None:
            os.unlink(path)
        else:
            overwrite(path, before)


def release_pidfile(path: str) -> None:
    """Remove the file if it still names us. If it does not, it has become another master's."""
    if path:
        with contextlib.suppress(OSError):
            if names_us(read_pidfile(path)):
                os.unlink(path)


def take_notify_socket() -> str:
    """-> the address in NOTIFY_SOCKET, or "". Workers do not inherit the variable."""
    return re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))


def sd_notify(address: str, state: str, status: str) -> None:
    """(master) Tell systemd, if it gave an address: KEY=VALUE lines and a STATUS (sd_notify(3)).

    It drops a datagram of more than 4,096 bytes; a character has 4 at most. While systemd is busy
    its queue may be full. It would wait for ever for a READY=1 that was lost. So the master waits
    here, nowhere else, for a moment.
    """
    if address:
        readable = status.encode(errors="backslashreplace").decode()
        lines = f"{state}\nSTATUS={shortened(readable)}".lstrip()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT)
            sock.connect(address)
            sock.send(lines.encode())


# Status and demo: the two applications that ship with it
# Nothing is ever put into the page. It draws itself from the JSON, as text, so that nothing which a
# client or an application says can become markup.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; connect-src 'self';
  img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>hupserve</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif;
  --line: #c9d0da; --quiet: #566070; --bar: #c6dcfb; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --line: #434c5a; --quiet: #a9b3c1; --bar: #23497a; --bad: #ff9b91 } }
body { max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere }
main { display: grid; gap: 1.25rem }
h1, h2, h3, p, ul, ol { margin: 0; padding: 0; list-style: none }
h1 { font-size: 1.75rem } h2 { font-size: 1.1rem } h3 { font-size: 1rem }
button, code { font: inherit; padding: .25rem .75rem }
button { margin: .25rem 0 }
code { font-family: monospace; background: #8882; user-select: all }
small, .quiet { color: var(--quiet); font-size: .875rem; font-weight: normal }
ul:empty, ol:empty, #silence:empty { display: none }
.failed #outcome, #silence { color: var(--bad); font-weight: 600 }
.silent > :not(#silence) { opacity: .5; filter: grayscale(1) }
#lanes, .workers { display: grid; gap: .5rem }
.workers { align-items: start; grid-template-columns:
  repeat(auto-fill, minmax(min(18rem, 100%), 1fr)) }
#lanes > section { border-top: 1px solid var(--line); padding-top: .5rem }
@media (min-width: 45rem) {
  #lanes > section { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1rem } }
.card { --state: #888; padding: .5rem .75rem; border-radius: .25rem;
  border: 1px solid var(--line); border-left: .5rem solid var(--state) }
.booting, .reloading { --state: #d9a400 } .ready { --state: #3b82f6 } .leaving { --state: #9061f9 }
.serving, #master.ready { --state: #2e9e5b } .draining, .stopping { --state: #e8710a }
#master.failed { --state: var(--bad) }
h3, .requests li { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem }
h3 span { font-weight: normal }
h3 span::before { content: ""; display: inline-block; width: .7em; height: .7em;
  margin-right: .4em; border-radius: 50%; background: var(--state) }
small:not(#ini), .requests span + span { white-space: nowrap; font-variant-numeric: tabular-nums }
.requests li { font-size: .875rem; margin: .25rem 0; padding: 0 .25rem;
  border: 1px solid var(--bar); transition: background-size .5s linear;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 0 / 0 }
</style>
<template id="lane">
  <section><div><h2></h2><p class="quiet"></p></div><ul class="workers"></ul></section>
</template>
<template id="worker">
  <li><h3><b></b><span></span></h3><ul class="requests"></ul><p class="quiet"></p></li>
</template>
<template id="request"><li><span></span><span></span></li></template>
<main>
<h1>hupserve</h1>
<noscript>This page needs JavaScript. What it would show is at ?format=json.</noscript>
<p id="silence" role="alert"></p>
<section id="master" class="card">
  <h2>Master, pid <span id="pid"></span> <small id="ini"></small></h2>
  <p><span id="outcome" role="status"></span> <small id="age"></small></p>
  <p>To reload: <code id="command"></code> <button id="copy">Copy</button></p>
</section>
<section>
  <p id="next"></p>
  <p id="demo" hidden><button id="hold" value="20">Hold a request in flight for 20 s</button>
    <small>up to 4 at once</small></p>
  <ol id="answers" aria-live="polite"></ol>
</section>
<div id="lanes"></div>
<p class="quiet" id="drawn"></p>
</main>
<script>
const PAUSE = 500 // ms between an answer and the next question
const PATIENCE = 5000 // ms until an answer is taken to be missing
const LONG = 20 // seconds: the age at which a bar is full
const MOST_HELD = 4 // requests: a browser opens six connections, and this page needs one
const MOST_ANSWERS = 6 // lines
const WORDS = { booting: "loads the application", ready: "has loaded, accepts nothing yet",
  serving: "accepts and answers", leaving: "serves until its successor is ready",
  draining: "finishes what it has begun", exiting: "runs its exit functions" }
const $ = id => document.getElementById(id)

// Text that has not changed is left alone, so that it stays selected.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text
}

// Give the parent one child for each item, made from the template, and keep those that it has.
function each(parent, template, items, key, draw) {
  const old = new Map([...parent.children].map(child => [child.dataset.key, child]))
  items.forEach((item, index) => {
    const name = String(key(item, index))
    const child = old.get(name) || $(template).content.firstElementChild.cloneNode(true)
    old.delete(name)
    child.dataset.key = name
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index])
    draw(child, item)
  })
  old.forEach(child => child.remove())
}

function draw({ greeting, path, worker, generation, master, workers }) {
  const task = greeting ? "Hold a request in flight, change the greeting in" : "Change"
  say(document.querySelector("h1"), greeting || "hupserve")
  $("demo").hidden = !greeting
  $("master").className = `card ${master.state} ${master.failed ? "failed" : ""}`
  say($("pid"), `${master.pid}`)
  say($("ini"), master.ini)
  say($("outcome"), master.outcome)
  say($("age"), `${master.age.toFixed(0)} s ago`)
  say($("command"), `kill -HUP ${master.pid}`)
  say($("next"), `${task} ${master.ini.replace(/.*[/]/, "")} and run the command: a new ` +
    "generation takes over when it has loaded; the old one stays until it has answered.")
  const generations = [...new Set(workers.map(one => one.generation))]
  each($("lanes"), "lane", generations, number => number, (lane, number) => {
    const mine = workers.filter(one => one.generation === number)
    const states = [...new Set(mine.map(one => one.state))]
    say(lane.querySelector("h2"), `Generation ${number}`)
    say(lane.querySelector("p"), states.map(state => `${state}: ${WORDS[state]}`).join("; "))
    each(lane.querySelector("ul"), "worker", mine, one => one.pid, (card, one) => {
      // A request for this page is no news.
      drawWorker(card, one, one.requests.filter(request => request.path !== path))
    })
  })
  say($("drawn"), `Drawn twice a second; worker ${worker} of generation ${generation} answered.`)
}

function drawWorker(card, worker, requests) {
  const unseen = worker.in_flight - worker.requests.length
  const more = unseen ? `${unseen} more in flight, ` : ""
  card.className = `card ${worker.state}`
  say(card.querySelector("b"), `Worker ${worker.worker}, pid ${worker.pid}`)
  say(card.querySelector("span"), worker.state + (worker.why ? `: ${worker.why}` : ""))
  say(card.querySelector("p"),
    `${more}idle ${worker.idle}, reading ${worker.reading}, served ${worker.served}`)
  each(card.querySelector("ul"), "request", requests, (_, index) => index, (bar, request) => {
    say(bar.firstChild, `${request.method} ${request.path} from ${request.client}`)
    say(bar.lastChild, `${request.age.toFixed(1)} s`)
    bar.style.backgroundSize = `${Math.min(request.age / LONG, 1) * 100}% 100%`
  })
}

let presses = 0
let held = 0
async function hold() {
  const line = document.createElement("li")
  const name = `Request ${++presses}`
  say(line, `${name} is held …`)
  $("answers").append(line)
  if ($("answers").children.length > MOST_ANSWERS) $("answers").firstChild.remove()
  $("hold").disabled = ++held >= MOST_HELD
  // no-store: equal requests would wait for one another in the browser's cache.
  const answer = fetch(`slow?seconds=${$("hold").value}`, { cache: "no-store" })
    .then(response => response.text())
  say(line, `${name}: ${await answer.catch(error => `no answer, ${error.message}`)}`)
  $("hold").disabled = --held >= MOST_HELD
}

// One failure is nothing: an idle connection may be closed just when it is used again.
let failures = 0
async function poll() {
  const signal = AbortSignal.timeout(PATIENCE)
  const answer = fetch("?format=json", { cache: "no-store", signal })
  const facts = await answer.then(response => response.json()).catch(() => null)
  failures = facts?.master ? 0 : failures + 1
  if (failures === 0) draw(facts)
  document.querySelector("main").className = failures > 1 ? "silent" : ""
  say($("silence"), failures > 1 ? "Nobody answers. This is the last picture; still asking …" : "")
  setTimeout(poll, failures === 1 ? 0 : PAUSE)
}

$("hold").onclick = hold
$("copy").onclick = () => navigator.clipboard.writeText($("command").textContent)
  .then(() => say($("copy"), "Copied"))
$("copy").hidden = !navigator.clipboard
poll()
</script>
"""


def status_filter(
    global_conf: Mapping[str, str], path: str = "/status", greeting: str = ""
) -> Callable[[Application], Application]:
    """paste.filter_factory. At `path` it shows all workers, as a live page or as JSON.

    JSON is for `Accept: application/json` or `?format=json`.
    """

    def wrap(inner: Application) -> Application:
        def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("PATH_INFO") != path:
                return inner(environ, start_response)
            return show_status(environ, start_response, greeting)

        return application

    return wrap


def show_status(
    environ: Environ, start_response: Callable[..., Any], greeting: str
) -> Iterable[bytes]:
    wants_json = "application/json" in environ.get("HTTP_ACCEPT", "")
    if not wants_json and "format=json" not in environ.get("QUERY_STRING", ""):
        return answer(start_response, "200 OK", PAGE, "text/html; charset=utf-8")
    master = scoreboard.read(Scoreboard.MASTER, Scoreboard.MASTER)
    workers = scoreboard.read(Scoreboard.WORKERS[0], Scoreboard.WORKERS[-1])
    facts = {
        "greeting": greeting,
        "path": shown_request(environ)["path"],  # by which the page knows its own requests
        "pid": os.getpid(),
        "generation": environ.get("hupserve.generation"),
        "worker": environ.get("hupserve.worker"),
        "master": master[0] if master else None,
        "workers": sorted(workers, key=lambda facts: (facts["generation"], facts["worker"])),
    }
    return answer(start_response, "200 OK", json.dumps(facts), "application/json")


def answer(
    start_response: Callable[..., Any],
    status: str,
    text: str,
    kind: str = "text/plain; charset=utf-8",
) -> list[bytes]:
    body = text.encode()
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ]
    start_response(status, headers)
    return [body]


def demo_app(global_conf: Mapping[str, str], greeting: str = "hello") -> Application:
    """paste.app_factory. The status page with a greeting; /slow?seconds=N takes so long."""

    def slow(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING") or "seconds=20"
        match = re.fullmatch(r"seconds=([0-9]{1,4}(\.[0-9]+)?)", query)
        if environ.get("PATH_INFO") != "/slow" or match is None:
            return answer(start_response, "404 Not Found", "Try / or /slow?seconds=20\n")
        time.sleep(float(match[1]))
        who = f"pid {os.getpid()} of generation {environ.get('hupserve.generation')}"
        text = f"{greeting}, after {match[1]} s, still from {who}\n"
        return answer(start_response, "200 OK", text)

    return status_filter(global_conf, "/", greeting)(slow)


# Command line
def tell(reason: object, level: int = logging.ERROR) -> None:
    """Say something to the person at the terminal, whatever the log_file."""
    record = logging.LogRecord("", level, "", 0, "hupserve: %s", (reason,), None)
    stderr_log().handle(record)


def in_words(addresses: Iterable[str]) -> str:
    return " ".join(sorted(addresses)) or "none"


def count_workers(config: Config) -> str:
    return "1 worker" if config.workers == 1 else f"{config.workers} workers"


def announce(generation: Generation) -> None:
    """The first line: what is served where. It says the port even if the system has chosen it."""
    config = generation.config
    places = []
    for address, listeners in generation.listeners.items():
        if address.startswith("unix:"):
            places.append(address)
            continue
        scheme = "https" if config.tls else "http"
        host = address.rpartition(":")[0]
        port = listeners[0].getsockname()[1]
        places.append(f"{scheme}://{host}:{port}")
    what = f"serving {config.ini.path} on {' '.join(places)} with {count_workers(config)}"
    tell(f"{what}; to reload it: kill -HUP {os.getpid()}", logging.INFO)


def serve(config: Config) -> int:
    """Serve until a stop. -> exit status.

    0 after a clean stop; 1 after a forced one or a failed start; 2 for the operator's mistake.
    """
    # Otherwise hupserve:demo_app would import a second copy of this file.
    sys.modules.setdefault("hupserve", sys.modules[__name__])
    with signals_put_back():
        try:
            # Its own logs are opened at the commit. A start that fails creates nothing.
            before = config._replace(log_file="-", access_log="off")
            use_logs(open_logs(before, contextlib.ExitStack()))
            master = Master(config)
        except (OSError, ConfigError) as error:
            tell(reason_of(error))
            return 1
        return master.run()


@contextlib.contextmanager
def signals_put_back() -> Iterator[None]:
    """(master) At the end the calling program has its handlers, wake-up descriptor and mask."""
    ours = {*MASTER_SIGNALS, *IGNORED_SIGNALS, signal.SIGPIPE}
    handlers = {signum: signal.getsignal(signum) for signum in ours}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for signum, handler in handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. -> exit status."""
    parser = argparse.ArgumentParser(
        prog="hupserve", description="A WSGI server whose SIGHUP reload loses nothing."
    )
    parser.add_argument("config", metavar="CONFIG", help="an ini file")
    parser.add_argument(
        "--check", action="store_true", help="validate it, application included, and exit"
    )
    parser.add_argument("--version", action="version", version=f"hupserve {__version__}")
    options = parser.parse_args(arguments)
    # Fill the first three descriptors: the number of a closed stderr must not become a socket's.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        config = read_config(options.config)
    except ConfigError as error:
        wants_ini = re.fullmatch(r"[\w.]+:[\w.]+(\(\))?", options.config)
        hint = f"; wanted is an ini file with [app:main] wsgi = {options.config}"
        tell(f"{error}{hint if wants_ini else ''}")
        return 2
    if options.check:  # like nginx -t: a worker loads all of it, and nothing is bound
        config = config._replace(listen={}, workers=1, pidfile="", log_file="-", access_log="off")
    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
