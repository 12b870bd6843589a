"""The second half of the lesson: what hupserve promises, with a test for each promise.

    python -m pytest hupserve_test.py                     everything, in two to three minutes
    HUPSERVE_CORE=1 python -m pytest hupserve_test.py     the core, in about a minute
    HUPSERVE_PYTHON=/path/to/python ...                   another interpreter runs the server

Nothing here is mocked, except in one section, the simulated world. Every other test starts hupserve
as its operator would, speaks to it in bytes over 127.0.0.1, ::1 or a unix socket, sends it signals,
and looks at it from outside: at its answers, its log, its exit status and its processes in /proc.
(So the tests need Linux.)

    the harness         until, processes, Server, Client, Load, and the application under test
    the invariants      DESIGN's promises 1 to 15, in order
    the reload          what can change, what is refused, what takes long
    the simulated world the master in 2,000 histories of everything that can happen around it
    the mistakes        an operator's mistakes, at the start, with --check and at a reload
    the signals         who may send what to whom
    the guest           what an application does to the process it lives in
    the exchange        a table that reads like RFC 9112: bytes in, status and connection out
    the responses       what applications may do, and what they may not
    the slow            clients that take their time
    the operator        TLS, unix sockets, systemd, terminals, logs, full disks
    the benchmark       python hupserve_test.py bench: hupserve and its peers, in ratios

A test waits for conditions, by until(). It waits for a time only where time itself is the promise.

The index: a promise, the function of hupserve.py that keeps it, and the test that fails without it.
(The names of all tests begin with test_.)

1   no client is refused or reset, and the idle get a grace
    Master.settle                 1_no_client_is_refused_or_reset_across_reloads
    Worker.shorten_grace          1_an_idle_connection_gets_its_grace
    Worker.expire                 1_a_connection_is_read_once_more_before_it_is_closed
2   what has begun is answered, across a reload, a stop and a replacement
    Exchange.may_keep             2_what_has_begun_is_answered_across
    Worker.empty_queues           signal_TERM_answers_all_that_came
    Master.must_come_up_first     replace_a_TERM_to_the_whole_group_is_a_stop_that_loses_nothing
3   a reload commits whole or changes nothing
    Master.roll_back              3_a_reload_commits_whole_or_changes_nothing
    Master.commit                 3_a_roll_back_leaves_no_file_behind
4   a worker drains when what replaces it is ready, and is told once
    Master.advance_reload         4_no_old_worker_drains_before_every_new_one_is_ready
    Master.settle                 world_keeps_every_promise
5   one thread counts what is in flight, and a worker leaves only at zero
    Worker.take_back              5_the_counter_is_exact_and_a_worker_leaves_only_at_zero
6   a signal handler sets a flag
    Bell.note                     6_a_TERM_is_heard_in_a_flood_of_HUPs
7   no signal is lost around a fork, and a worker that loads ignores stops
    Master.spawn                  7_no_signal_is_lost_around_a_fork
    prepare_for_guest             7_a_worker_that_still_loads_ignores_stops
8   workers outlive no master
    WorkerLife.on_line            8_workers_outlive_no_master
    run_worker                    8_nor_do_workers_that_still_load
9   a worker that dies is replaced, with a back-off
    Master.fill_place_of          9_a_worker_that_dies_is_replaced
    Child.successor               9_a_crash_loop_backs_off
10  a slow client costs no thread
    take_request                  10_a_slow_client_costs_no_thread
11  no answer is lost to a reset of our own
    Worker.linger                 11_no_answer_is_lost_to_a_reset_of_our_own
    Worker.end_idle_lingering     11_but_a_client_that_does_nothing_or_never_stops_is_let_go
12  a child keeps no descriptor that is not its own
    Master.close_what_is_not_for  12_a_child_keeps_no_descriptor_that_is_not_its_generations
    ForkGuard.close_everything    12_an_applications_children_keep_none_and_block_nothing
13  out of descriptors or processes is a pause
    Pause.begin                   13_out_of_descriptors_is_a_pause_and_never_a_spin
    Master.spawn                  13_a_fork_that_fails_is_a_pause_and_never_a_crash
14  the guest cannot take the worker away
    take_back_from_guest          guest_cannot_take_signals_away
    take_back_loggers             14_the_application_cannot_silence_our_logs
15  a log that cannot be written costs lines
    Log.write_all                 15_a_reader_that_is_stuck_costs_lines_and_nothing_else
Replacement: a worker that is to go serves until its successor does, or is told to hurry
    Master.maintain               replace_a_worker_that_got_a_TERM_serves_until_its_successor_does
    Master.fill_place_of          replace_a_successor_that_cannot_boot_leaves_the_old_worker_serving
    WorkerLife.ask_to_leave       replace_a_second_TERM_drains_at_once
Replacement: max_requests is a reason for one worker at a time
    Master.may_be_replaced        replace_after_max_requests_one_worker_at_a_time
Replacement: a worker hangs that leaves four questions in a row unread
    Master.watch_workers          replace_a_worker_that_hangs
    Master.ask                    replace_nobody_that_only_works_hard_or_sleeps
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import heapq
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import pty
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from signal import SIGABRT, SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, SIGTERM, SIGUSR1
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar, Union

import pytest

HUPSERVE = Path(__file__).resolve().with_name("hupserve.py")
PYTHON = os.environ.get("HUPSERVE_PYTHON", sys.executable)
DEADLINE = 30  # seconds for anything that must happen; only a failing test waits that long
CLEANUP_DEADLINE = 10  # seconds for the processes that a stopped server has left behind
POLL_PAUSE = 0.01  # seconds between two looks at a condition
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # per second of processor time

CORE_ONLY = "HUPSERVE_CORE" in os.environ
beyond_core = pytest.mark.skipif(CORE_ONLY, reason="HUPSERVE_CORE: only the core")

Found = TypeVar("Found")
Address = Union[int, tuple[str, int], str, Path]  # see Client


# ==== the harness =================================================================================


def until(
    condition: Callable[[], Found | None], what: str = "", deadline: float = DEADLINE
) -> Found:
    """Wait until the condition returns something true, and return that."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {deadline} s for {what or 'a condition'}"
        time.sleep(POLL_PAUSE)


class Process(NamedTuple):
    """One line of /proc/<pid>/stat, see proc(5)."""

    pid: int
    state: str  # Z is a zombie
    parent: int
    session: int  # inherited by all descendants that do not leave it
    cpu: float  # seconds of processor time, user and system


def look_at(pid: str) -> Iterator[Process]:
    """Yield the process, unless it has ended."""
    try:
        line = Path("/proc", pid, "stat").read_text(errors="replace")
    except OSError:
        return
    _, _, after_command = line.rpartition(")")
    fields = after_command.split()
    yield Process(
        pid=int(pid),
        state=fields[0],
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
    )


def processes() -> list[Process]:
    """Return every process of this machine."""
    pids = filter(str.isdigit, os.listdir("/proc"))
    return [process for pid in pids for process in look_at(pid)]


def alive(pid: int) -> bool:
    """Does the process exist, and not as a zombie?"""
    return any(process.state != "Z" for process in look_at(str(pid)))


def is_in_state(pid: int, state: str) -> bool:
    """Is the process's main thread in this state of proc(5)? S sleeps, T is stopped."""
    return any(process.state == state for process in look_at(str(pid)))


def descriptors(pid: int) -> list[str]:
    """Return what the process holds open.

    There is one entry for each descriptor: "socket:[inode]", "pipe:[inode]" or a path.
    """
    found = []
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return sorted(found)


def listening() -> dict[str, int]:
    """Return the machine's listening TCP sockets, as {"socket:[inode]": port}.

    The kernel lists them before the others, which may be 30,000 just closed ones.
    """
    ports = {}
    for table in Path("/proc/net/tcp"), Path("/proc/net/tcp6"):
        if not table.exists():
            continue
        with open(table) as lines:
            next(lines)  # the names of the columns
            for line in lines:
                columns = line.split()
                address = columns[1]
                state = columns[3]
                inode = columns[9]
                if state != "0A":  # TCP_LISTEN
                    break
                _, _, port = address.rpartition(":")
                ports[f"socket:[{inode}]"] = int(port, 16)
    return ports


def ports_of(pid: int) -> set[int]:
    """Return the ports on which this process holds a listening socket."""
    ports = listening()
    return {ports[link] for link in descriptors(pid) if link in ports}


def drains(worker: int) -> bool:
    """Has this worker begun to drain? Then it has closed its listeners."""
    return not ports_of(worker)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def refused(port: int) -> bool:
    """Is a connection to this port of 127.0.0.1 refused?"""
    try:
        Client(port).close()
    except ConnectionRefusedError:
        return True
    return False


def importable(module: str) -> bool:
    """Does the interpreter that runs the server have this module?"""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    ended = subprocess.run([PYTHON, "-c", code], cwd="/", stderr=subprocess.DEVNULL)
    return ended.returncode == 0


def replace_numbers(text: str, numbers: Mapping[str, tuple[float, float]]) -> str:
    """Return hupserve.py's text with smaller constants: {name: (the one it has, another)}."""
    for name, (has, shall) in numbers.items():
        pattern = rf"(?m)^{name} = {re.escape(str(has))}(?![.\d])"
        text, count = re.subn(pattern, f"{name} = {shall}", text)
        assert count == 1, name
    return text


class Server:
    """hupserve in a folder of its own: its ini, its application, its process and its log.

    Entered as a context manager it starts. At the end it is stopped and looked at: the exit status
    must be 0, no process may be left, and there may be no traceback in the log (unless the test
    has set `tracebacks`).
    """

    APP = "[app:main]\npaste.app_factory = app:factory\ngreeting = hello\n"
    STATUS = (
        "[pipeline:main]\npipeline = status app\n"
        "[filter:status]\npaste.filter_factory = hupserve:status_filter\npath = /status\n"
        + APP.replace("app:main", "app:app", 1)
    )
    FIRST_LINE = r" on (?P<addresses>.+) with \d+ workers?; to reload it: kill -HUP \d+\n"

    process: subprocess.Popen[bytes]
    pid: int  # of the master
    addresses: list[str]  # as the first line of the log shows them

    def __init__(
        self,
        folder: Path | str,
        sections: str = APP,
        code: str | None = None,
        prefix: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        port: int = 0,
        terminal: bool = False,
        popen: Mapping[str, Any] | None = None,
        numbers: Mapping[str, tuple[float, float]] | None = None,
        **keys: object,
    ) -> None:
        """Prepare a server; start() starts it.

        sections: the ini's text after [server:main], whose keys are `keys`
        code: the text of app.py, by default APPLICATION
        prefix: a command that executes the server
        env: what to add to the environment
        port: of 127.0.0.1, where the first line of the log cannot be read
        terminal: standard input becomes the terminal of the server's session
        popen: further arguments of subprocess.Popen
        numbers: what hupserve.py has and what a copy of it shall have instead: {name: (has, shall)}
        """
        self.folder = Path(folder)
        self.program = HUPSERVE
        if numbers:
            self.program = self.folder / "hupserve.py"
            self.program.write_text(replace_numbers(HUPSERVE.read_text(), numbers))
        self.ini = self.folder / "hupserve.ini"
        self.stderr = self.folder / "stderr"
        self.sections = sections
        self.keys: dict[str, object] = {"listen": f"127.0.0.1:{port}", "workers": 2, **keys}
        self.prefix = list(prefix)
        self.env = {**os.environ, **(env or {})}
        self.popen = dict(popen or {})
        self.port = port  # 0 until the log tells it
        self.terminal = terminal
        self.tracebacks = False  # True where the test provokes some
        self.clients: list[Client] = []
        self.generation = 1  # the newest one that reload() has seen
        self.write_app(code or APPLICATION)

    def put(self, name: str, text: str) -> None:
        """Replace a file by a rename, so that nobody ever reads half of it."""
        (self.folder / "new").write_text(text)
        os.replace(self.folder / "new", self.folder / name)

    def write_app(self, code: str) -> None:
        """Replace the application."""
        self.put("app.py", code)

    def write(self, sections: str | None = None, **keys: object) -> None:
        """Change the ini. A key of None is left out."""
        if sections is not None:
            self.sections = sections
        self.keys.update(keys)
        lines = [f"{key} = {value}\n" for key, value in self.keys.items() if value is not None]
        self.put(self.ini.name, "[server:main]\n" + "".join(lines) + "\n" + self.sections)

    def touch(self, *names: str) -> None:
        """Create files in the server's folder, for which an application or an import looks."""
        for name in names:
            (self.folder / name).touch()

    def remove(self, name: str) -> None:
        """Remove a file that touch() has created."""
        (self.folder / name).unlink()

    def __enter__(self) -> Server:
        self.write()
        self.start()
        return self

    def start(self) -> None:
        """Start the server and wait until it serves."""
        with open(self.stderr, "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, PYTHON, str(self.program), str(self.ini)],
                cwd=self.folder,
                env=self.env,
                start_new_session=True,
                preexec_fn=self.prepare_process,
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **self.popen},
            )
        self.pid = self.process.pid
        self.generation = 1
        try:
            ready = self.answers if self.port else self.find_first_line
            until(lambda: ready() or self.process.poll() is not None, "the server to start")
            assert self.process.poll() is None, "the server has ended"
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def prepare_process(self) -> None:
        """(child, before exec) Undo what the tests were started with."""
        for number in (SIGHUP, SIGINT, SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        if self.terminal:  # as after a login
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def find_first_line(self) -> bool:
        """Look for the log's first line; take the addresses and the first TCP port from it."""
        found = re.search(self.FIRST_LINE, self.log())
        if not found:
            return False
        self.addresses = found["addresses"].split()
        port = re.search(r"//\S+:(\d+)", found["addresses"])
        self.port = int(port[1]) if port else 0
        return True

    def answers(self) -> bool:
        """Does it listen?"""
        return not refused(self.port)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """End the server, gently unless the test has failed already, and leave nothing behind."""
        self.release("all")
        for client in self.clients:
            client.close()
        status = 0
        left_behind = []
        if error is None:
            status = self.stop_gently()
            left_behind = self.others()
        for pid in self.others():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)
        self.process.wait(DEADLINE)
        print(self.log(self.ini.name) if self.ini.is_file() else "")
        print("---- log ----", self.log(), sep="\n")
        if error is None:
            assert status == 0, "exit status"
            assert left_behind == [], "processes left behind"
            assert self.tracebacks or "Traceback" not in self.log()

    def stop_gently(self) -> int:
        """Stop the server if it runs, wait for its processes, and return the exit status.

        The status of a server that had ended before is not looked at, and 0 is returned.
        """
        status = 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.poll() is None:
                self.signal(SIGINT)  # INT gives idle connections no grace
                status = self.process.wait(DEADLINE)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.others(), deadline=CLEANUP_DEADLINE)
        return status

    def signal(self, number: int = SIGHUP) -> None:
        """Send the master a signal."""
        os.kill(self.pid, number)

    def stop(self, number: int = SIGTERM, status: int = 0) -> None:
        """Stop the server by this signal; it must end with this exit status."""
        self.signal(number)
        assert self.process.wait(DEADLINE) == status

    def log(self, file: str = "stderr") -> str:
        """Return what is in this log, or in any other file of the server's folder."""
        path = self.folder / file
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_log(self, pattern: str, since: int = 0, file: str = "stderr") -> re.Match[str]:
        """Wait until the pattern is found in the log from position `since` on."""
        return until(
            lambda: re.search(pattern, self.log(file)[since:]), f"a log line like {pattern!r}"
        )

    def reload(self, sections: str | None = None, **keys: object) -> int:
        """Change the ini, send SIGHUP and wait until a newer generation serves; return its number.

        Without arguments the ini stays as it is.
        """
        since = len(self.log())
        old = self.workers()

        def newer_generations() -> list[int]:
            numbers = re.findall(r"generation (\d+) serves", self.log()[since:])
            return [int(number) for number in numbers if int(number) > self.generation]

        if sections is not None or keys:
            self.write(sections, **keys)
        self.signal(SIGHUP)
        self.generation = max(until(newer_generations, "a newer generation"))
        until(lambda: all(map(drains, old)), "the old workers to drain")
        return self.generation

    def reload_fails(self, pattern: str, sections: str | None = None, **keys: object) -> str:
        """Change the ini, send SIGHUP, wait for a log line like the pattern, and return it."""
        since = len(self.log())
        if sections is not None or keys:
            self.write(sections, **keys)
        self.signal(SIGHUP)
        return self.wait_log(pattern, since)[0]

    def others(self) -> list[int]:
        """Return every process of the server's session, the master included."""
        living = [process for process in processes() if process.state != "Z"]
        return [process.pid for process in living if process.session == self.pid]

    def workers(self) -> set[int]:
        """Return the master's living children."""
        living = [process for process in processes() if process.state != "Z"]
        return {process.pid for process in living if process.parent == self.pid}

    def zombies(self) -> list[Process]:
        """Return the master's children that have ended and were not waited for yet."""
        dead = [process for process in processes() if process.state == "Z"]
        return [process for process in dead if process.parent == self.pid]

    def connect(self, tls: ssl.SSLContext | None = None, receive_buffer: int = 0) -> Client:
        """Open a connection, which is closed at the end of the test at the latest."""
        client = Client(self.port, tls, receive_buffer)
        self.clients.append(client)
        return client

    def get(self, target: str = "/", *fields: str, address: Address | None = None) -> Answer:
        """Send one request on a connection of its own and return the answer."""
        with Client(address or self.port) as client:
            return client.get(target, *fields)

    def hold(self, name: str) -> Client:
        """Start a request that stays in flight until release(name).

        Return its client, as soon as the application has begun, with `worker` set.
        """
        client = self.connect()
        client.request("GET", f"/hold?{name}")
        began = self.folder / f"{name}.began"
        until(began.exists, f"{name} to begin")
        client.worker = int(began.read_text())
        return client

    def release(self, *names: str) -> None:
        """Let requests end that hold() has started."""
        self.touch(*names)

    def status(self) -> list[dict[str, Any]]:
        """Ask the status filter for all workers."""
        workers: list[dict[str, Any]] = self.get("/status?format=json").json["workers"]
        return workers


def kernel_queue(server: Server, client: Client, which: str) -> int:
    """Return how many bytes of a connection the server's kernel holds, see proc(5).

    which: "unsent", of an answer; or "unread", of a request
    """
    _, port = client.socket.getsockname()
    line = re.compile(rf":{server.port:04X} \w+:{port:04X} \w+ (?P<unsent>\w+):(?P<unread>\w+) ")
    found = line.search(Path("/proc/net/tcp").read_text())
    assert found
    return int(found[which], 16)


class Cut(ConnectionError):
    """The connection ended before the answer was whole."""


class Answer(NamedTuple):
    """What Client.answer() has read."""

    status: int
    headers: dict[str, str]  # the names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        """Does the server say that it closes the connection?"""
        return self.headers.get("connection", "").lower() == "close"


class Client:
    """One connection, with a strict reader.

    Anything that is missing from an answer raises Cut. Surplus bytes stay in `buffer`.
    """

    RECEIVE_SIZE = 65536
    SHOWN_SIZE = 200  # bytes of an answer that an error message shows

    worker: int  # set by Server.hold: the process that runs the request

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None = None, receive_buffer: int = 0
    ) -> None:
        """Connect to a port of 127.0.0.1, a (host, port) or the path of a unix socket.

        A small receive buffer, in bytes, makes a slow reader.
        """
        if isinstance(address, int):
            address = ("127.0.0.1", address)
        if isinstance(address, (str, Path)):
            family = socket.AF_UNIX
            address = str(address)
        elif ":" in address[0]:
            family = socket.AF_INET6
        else:
            family = socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(DEADLINE)
        self.buffer = bytearray()
        try:
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.connect(address)
            if tls:
                self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; any unread input makes this a reset."""
        self.socket.close()

    def send(self, data: bytes) -> Client:
        """Send all of the data; return the client, so that calls can be chained."""
        self.socket.sendall(data)
        return self

    def request(self, method: str, target: str, body: bytes = b"", *fields: str) -> Client:
        """Send one request, with a Content-Length if it has a body."""
        lines = [f"{method} {target} HTTP/1.1", "Host: test", *fields]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""])
        return self.send(head.encode("latin-1") + body)

    def get(self, target: str = "/", *fields: str) -> Answer:
        """Send a GET and read the answer."""
        return self.request("GET", target, b"", *fields).answer()

    def post(self, target: str, body: bytes, *fields: str) -> Answer:
        """Send a POST and read the answer."""
        return self.request("POST", target, body, *fields).answer()

    def more(self) -> None:
        """Receive something into the buffer; raise Cut at the end of the connection."""
        data = self.socket.recv(self.RECEIVE_SIZE)
        if not data:
            raise Cut(f"the connection ended after {bytes(self.buffer[-self.SHOWN_SIZE :])!r}")
        self.buffer += data

    def take(self, size: int) -> bytes:
        """Take exactly so many bytes."""
        while len(self.buffer) < size:
            self.more()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def take_until(self, mark: bytes) -> bytes:
        """Take everything up to the mark, and the mark too; return what was before it."""
        while mark not in self.buffer:
            self.more()
        data = self.take(self.buffer.index(mark))
        self.take(len(mark))
        return data

    def answer(self, method: str = "GET") -> Answer:
        """Read one answer to a request of this method, strictly as RFC 9112 has it.

        If it says that it is the last one, end our side, so that the server need not linger.
        """
        first, *fields = self.take_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        matched = re.fullmatch(r"HTTP/1\.1 (?P<status>[1-5]\d\d) [\t -\xff]*", first)
        assert matched, first
        status = int(matched["status"])
        pairs = []
        for field in fields:
            name, _, value = field.partition(":")
            pairs.append((name.lower(), value.strip()))
        names = [name for name, _ in pairs]
        assert names.count("content-length") <= 1, fields
        assert not {"content-length", "transfer-encoding"} <= set(names), fields
        headers = dict(pairs)
        if method == "HEAD" or status < 200 or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = self.take_chunks()
        elif "content-length" in headers:
            body = self.take(int(headers["content-length"]))
        else:
            body = self.take_all()
        answer = Answer(status, headers, body)
        if answer.closes and not isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError):  # it has closed already
                self.socket.shutdown(socket.SHUT_WR)
        return answer

    def take_chunks(self) -> bytes:
        """Take a chunked body, without extensions and trailers; hupserve sends none."""
        body = b""
        while True:
            size = int(self.take_until(b"\r\n"), 16)
            body += self.take(size)
            assert self.take(2) == b"\r\n"
            if not size:
                return body

    def take_all(self) -> bytes:
        """Take everything up to the end of the connection."""
        with contextlib.suppress(Cut):
            while True:
                self.more()
        return self.take(len(self.buffer))

    def ended(self) -> bool:
        """Wait for the next byte or the end; is it the end, in good order? (A reset raises.)"""
        if self.buffer or self.socket.recv(1):
            return False
        self.close()
        return True


class Load:
    """Clients in threads: some keep their connection, some open a new one for every request.

    A request is lost, for whatever reason, unless its complete and correct answer comes back.
    """

    REASON_SIZE = 300  # characters
    SHOWN_REASONS = 5

    def __init__(
        self, server: Server, keep: int = 6, closing: int = 3, pause: float = 0, path: str = "/"
    ) -> None:
        """keep, closing: the number of clients that keep, or close, their connection
        pause: the longest pause between two requests of a client, in seconds
        """
        self.port = server.port
        self.pause = pause
        self.path = path
        self.answered: list[int] = []  # the generation that gave each answer
        self.lost: list[str] = []  # why each lost request was lost
        self.numbers = itertools.count()
        self.stopping = threading.Event()
        keeps = [True] * keep + [False] * closing
        self.threads = [threading.Thread(target=self.client, args=(kept,)) for kept in keeps]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(2 * DEADLINE)

    def client(self, keep: bool) -> None:
        """(thread) Send requests until the load stops."""
        fields = [] if keep else ["Connection: close"]
        connection = None
        while not self.stopping.is_set():
            try:
                connection = connection or Client(self.port)
                closes = self.exchange(connection, fields)
            except Exception as error:
                self.lost.append(f"{type(error).__name__}: {error}"[: self.REASON_SIZE])
                closes = True
            if closes and connection:
                connection.close()
                connection = None
            if self.pause:
                self.stopping.wait(random.uniform(0, self.pause))
        if connection:
            connection.close()

    def exchange(self, connection: Client, fields: list[str]) -> bool:
        """(thread) Send one request and check its answer; does the server close then?"""
        token = str(next(self.numbers))
        body = token * 20
        answer = connection.post(f"{self.path}?{token}", body.encode(), *fields)
        assert answer.status == 200, answer
        seen = answer.json
        assert seen["QUERY_STRING"] == token, answer
        assert seen["body"] == body, answer
        self.answered.append(seen["hupserve.generation"])
        return answer.closes

    def more(self, count: int = 100) -> list[int]:
        """Wait for so many more answers, and return the generations that gave them."""
        before = len(self.answered)
        until(lambda: len(self.answered) >= before + count or self.lost, f"{count} more answers")
        assert not self.lost, self.lost[: self.SHOWN_REASONS]
        return self.answered[before:]


class NotTested:
    """A plugin of pytest. It says at the end what was not tested on this machine, and why."""

    SHOWN_TESTS = 2  # for each reason

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tests = collections.defaultdict(list)
        for report in terminalreporter.getreports("skipped"):
            _, _, reason = report.longrepr
            _, _, test = report.nodeid.partition("::")
            tests[reason.replace("Skipped: ", "", 1)].append(test)
        if tests:
            terminalreporter.write_line("\nNot tested here:")
        for reason, names in sorted(tests.items()):
            shown = ", ".join(names[: self.SHOWN_TESTS])
            more = len(names) - self.SHOWN_TESTS
            terminalreporter.write_line(
                f"  {reason}: {shown}{f' and {more} more' if more > 0 else ''}"
            )


@pytest.fixture(scope="session", autouse=True)
def tell_what_is_not_tested(request: pytest.FixtureRequest) -> None:
    request.config.pluginmanager.register(NotTested())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new folder. Its path is short, because that of a unix socket is at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hupserve") as path:
        yield Path(path)


def test_the_index_names_what_there_is():
    """Its functions are in hupserve.py, and its tests are here."""
    functions = set()
    for node in ast.parse(HUPSERVE.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            functions.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            functions |= {f"{node.name}.{method.name}" for method in methods}
    _, _, index = (__doc__ or "").partition("The index: ")
    rows = re.findall(r"(?m)^ {4}(\S+) +(\w+)$", index)
    assert len(rows) > 30
    for function, test in rows:
        assert function in functions
        assert f"test_{test}" in globals(), test


@beyond_core
def test_what_is_not_tested_here_is_told_at_the_end(folder):
    """In an environment without commands there is no nginx."""
    test = "test_operator_readme_has_an_upstream_that_nginx_understands"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-qp", "no:cacheprovider", "--assert=plain"]
        + [f"{__file__}::{test}"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert f"\nNot tested here:\n  no nginx command: {test}\n" in ended.stdout, ended


Serve = Callable[..., Server]  # takes the arguments of Server, except the folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """A function that starts a server, which is stopped and looked at when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **keywords: stack.enter_context(Server(folder, *args, **keywords))


@contextlib.contextmanager
def shared_server(**keywords: Any) -> Iterator[Server]:
    """A server in a folder of its own, for several tests or beside another server."""
    with tempfile.TemporaryDirectory(prefix="hupserve") as path, Server(path, **keywords) as server:
        yield server


# The application under test. The first part of the path names what it does; to any other path it
# answers with what it saw. It is a text, because another interpreter may run the server.

APPLICATION = r'''
import io
import json
import logging
import mmap
import os
import subprocess
import sys
import time
import wsgiref.validate

HERE = os.path.dirname(os.path.abspath(__file__))

def note(name, line):
    """Append a line to a file in the server's folder, where the test can read it."""
    with open(os.path.join(HERE, name), "a") as file:
        file.write(f"{line}\n")

note("imports", os.getpid())

def factory(global_conf, **settings):
    return lambda environ, start_response: application({**environ, **settings}, start_response)

def validate(global_conf):
    return wsgiref.validate.validator

def application(environ, start_response):
    """Call what the first part of the path names, else echo."""
    name = environ["PATH_INFO"].lstrip("/").split("/")[0]
    return globals().get("do_" + name, echo)(environ, start_response)

def ok(start_response, *headers, status="200 OK"):
    return start_response(status, [("Content-Type", "text/plain"), *headers])

def text(start_response, body, *headers, status="200 OK"):
    if isinstance(body, str):
        body = body.encode("latin-1")
    ok(start_response, ("Content-Length", str(len(body))), *headers, status=status)
    return [body]

def pieces(environ):
    """Read the request's body in pieces of up to 64 KiB."""
    return iter(lambda: environ["wsgi.input"].read(65536), b"")

def echo(environ, start_response):
    """Answer with what the application saw, as JSON."""
    body = b"".join(pieces(environ)).decode("latin-1")
    seen = {key: value for key, value in environ.items() if isinstance(value, (str, int, bool))}
    return text(start_response, json.dumps({**seen, "body": body, "pid": os.getpid()}))

def do_hold(environ, start_response):
    """Stay in flight until there is a file of the query's name, or one called all."""
    name = environ["QUERY_STRING"]
    path = os.path.join(HERE, name)
    note(name + ".part", os.getpid())
    os.rename(path + ".part", path + ".began")
    while not os.path.exists(path) and not os.path.exists(os.path.join(HERE, "all")):
        time.sleep(0.01)
    return echo(environ, start_response)

def do_stay(environ, start_response):
    """Stay in flight until there is a file called all."""
    while not os.path.exists(os.path.join(HERE, "all")):
        time.sleep(0.01)
    return echo(environ, start_response)

def do_nap(environ, start_response):
    time.sleep(0.005)
    return echo(environ, start_response)

def do_sleep(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return echo(environ, start_response)

def do_spoil(environ, start_response):
    """Answer with the environ, then clear it, and the list of headers too."""
    seen = json.dumps({key: str(environ[key]) for key in sorted(environ)})
    environ.clear()
    headers = [["Content-Type", "text/plain"]]
    ok(start_response, *headers)
    headers.clear()
    return [seen.encode()]

def do_size(environ, start_response):
    size = sum(len(piece) for piece in pieces(environ))
    return text(start_response, str(size))

def do_big(environ, start_response):
    """Answer with as many bytes as the query says, rounded down to a multiple of 16."""
    pattern = b"0123456789abcdef"
    return text(start_response, pattern * (int(environ["QUERY_STRING"]) // len(pattern)))

def do_retry(environ, start_response):
    """Read on after an error, as if nothing had happened."""
    seen = []
    for _ in range(3):
        try:
            seen.append(environ["wsgi.input"].read(5).decode())
        except OSError:
            seen.append("error")
    return text(start_response, json.dumps({"seen": seen}))

def do_whole(environ, start_response):
    """Read the body at once; answer with its length and whatever in it is not an x."""
    body = environ["wsgi.input"].read()
    return text(start_response, f"{len(body)} {body.decode().strip('x')}")

def do_unread(environ, start_response):
    return text(start_response, "not read")

def do_environment(environ, start_response):
    return text(start_response, json.dumps(dict(os.environ)))

def do_children(environ, start_response):
    """Note the descriptors of a forked child; answer with the signals of an executed one."""
    if os.fork() == 0:
        for number in os.listdir("/proc/self/fd"):
            path = "/proc/self/fd/" + number
            note("child", os.path.exists(path) and os.readlink(path))
        os._exit(0)
    os.wait()
    status = subprocess.check_output(["cat", "/proc/self/status"]).decode()
    lines = [line for line in status.splitlines() if line.startswith("Sig")]
    return text(start_response, json.dumps(dict(line.split(":\t") for line in lines)))

def do_terminate(environ, start_response):
    """Fork children and send each a TERM at once; it must end them."""
    for _ in range(20):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(1)
        os.kill(child, 15)
        assert os.waitpid(child, 0)[1] == 15
    return text(start_response, "ended")

def do_orphan(environ, start_response):
    """Leave a grandchild whose parent has ended; process 1 inherits it."""
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
        os._exit(0)
    os.wait()
    return text(start_response, "orphaned")

def do_exit(environ, start_response):
    os._exit(3)

def do_log(environ, start_response):
    logging.getLogger("app").warning("50%% of %s", environ["QUERY_STRING"])
    print("to wsgi.errors", file=environ["wsgi.errors"])
    return text(start_response, "logged")

def do_closestderr(environ, start_response):
    sys.stderr.close()
    return text(start_response, "closed")

# What an application may do.

def do_stream(environ, start_response):
    ok(start_response)
    yield from (b"one ", b"", b"two")

def do_list(environ, start_response):
    ok(start_response)
    return [b"hello"]

def do_204(environ, start_response):
    start_response("204 No Content", [])
    return []

def do_304(environ, start_response):
    start_response("304 Not Modified", [("Content-Length", "5")])
    return [b"hello"]

def do_write(environ, start_response):
    write = ok(start_response, ("Content-Length", "7"))
    write(b"one ")
    return [b"two"]

def do_replaced(environ, start_response):
    ok(start_response)
    try:
        raise ValueError("a mistake")
    except ValueError:
        headers = [("Content-Type", "text/plain"), ("Content-Length", "8")]
        start_response("503 Busy", headers, sys.exc_info())
    return [b"replaced"]

class Closing:
    """An iterable that notes when it is closed."""

    def __init__(self, parts, name):
        self.parts = iter(parts)
        self.name = name

    def __iter__(self):
        return self.parts

    def close(self):
        note(self.name + ".closed", "closed")

def do_closing(environ, start_response):
    ok(start_response)
    return Closing([b"one ", b"two"], environ["QUERY_STRING"])

def do_endless(environ, start_response):
    ok(start_response)
    return Closing(iter(lambda: b"x" * 65536, None), environ["QUERY_STRING"])

class ClosingFile(io.BytesIO):
    def close(self):
        note("file.closed", "closed")
        super().close()

def do_filelike(environ, start_response):
    ok(start_response)
    return environ["wsgi.file_wrapper"](ClosingFile(b"like a file"))

def do_file(environ, start_response):
    """Answer with a file from an offset on: /file?<offset>,<announced length or nothing>."""
    offset, length = environ["QUERY_STRING"].split(",")
    file = open(os.path.join(HERE, "data"), "rb")
    file.seek(int(offset))
    if length:
        ok(start_response, ("Content-Length", length))
    else:
        ok(start_response)
    return environ["wsgi.file_wrapper"](file, 4096)

def do_proc(environ, start_response):
    """Answer with a file whose size is 0 until it is read, because the kernel makes it up."""
    ok(start_response)
    return environ["wsgi.file_wrapper"](open("/proc/self/status", "rb"))

kept_writes = []

def do_keep(environ, start_response):
    """Call the write() of the request before, which is over."""
    for write in kept_writes:
        write(b"late")
    kept_writes[:] = [ok(start_response)]
    return [b"not ", b"late"]

def do_close(environ, start_response):
    return text(start_response, "closing", ("Connection", "close"))

def do_hop(environ, start_response):
    return text(
        start_response,
        "hop",
        ("Connection", "X-Hop"),
        ("Keep-Alive", "timeout=9"),
        ("Upgrade", "h2c"),
        ("Proxy-Authenticate", "Basic"),
        ("TE", "gzip"),
        ("X-Kept", "yes"),
    )

# What an application may not do.

def do_crlf(environ, start_response):
    return text(start_response, "x", ("X-Bad", "a\r\nX-Injected: b"))

def do_control(environ, start_response):
    return text(start_response, "x", ("X-Bad", "a\x01b"))

def do_crlfname(environ, start_response):
    return text(start_response, "x", ("X-Bad: a\r\nX-Injected", "b"))

def do_crlfstatus(environ, start_response):
    return text(start_response, "x", status="200 OK\r\nX-Injected: b")

class Disguised(str):
    """Compares and prints as something else, as a (str, Enum) prints its name."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return hash("disguised")

    def __str__(self):
        return "\r\nX-Injected: b"

    def __format__(self, spec):
        return str(self)

    def lower(self):
        return "content-length"

def do_disguised(environ, start_response):
    """Answer with the query as a header's value and in its name and the status, disguised."""
    query = environ["QUERY_STRING"]
    headers = [(Disguised("X-" + query), Disguised(query))]
    start_response(Disguised("202 " + query), headers)
    return [b"disguised"]

def do_101(environ, start_response):
    start_response("101 Switching Protocols", [("Content-Length", "0")])
    return []

def do_readinto(environ, start_response):
    """Read into a buffer of the application's own that grows afterwards, under a profiler."""
    held = []
    target = bytearray(3)
    sys.setprofile(lambda frame, *_: held.append(frame))
    try:
        count = environ["wsgi.input"].raw.readinto(target)
        target.extend(b"lo")
    finally:
        sys.setprofile(None)
    return text(start_response, bytes(target[:count] + target[3:]))

def do_gigabytes(environ, start_response):
    """Name sizes over 2 GiB, in a read and in an answer. Most of this memory is never touched."""
    with mmap.mmap(-1, 2**31 + 1) as target:
        note("gigabytes", environ["wsgi.input"].raw.readinto(target))
    ok(start_response, ("Content-Length", str(2**31 + 2)))
    yield b"x"
    yield bytes(2**31 + 1)

def do_short(environ, start_response):
    ok(start_response, ("Content-Length", "10"))
    return [b"short"]

def do_surplus(environ, start_response):
    ok(start_response, ("Content-Length", "5"))
    return [b"hel", b"loSURPLUS", b"SURPLUS"]

def do_surpluswrite(environ, start_response):
    write = ok(start_response, ("Content-Length", "5"))
    write(b"helloSURPLUS")
    return []

def do_raise(environ, start_response):
    raise ValueError("the application's own mistake")

def do_raisemidway(environ, start_response):
    ok(start_response)
    yield b"one "
    raise ValueError("the application's own mistake")

def do_emptystr(environ, start_response):
    ok(start_response)
    return [""]

def do_raiseatend(environ, start_response):
    ok(start_response, ("Content-Length", "4"))
    yield b"all "
    raise ValueError("the application's own mistake")

def do_late(environ, start_response):
    ok(start_response)
    yield b"one "
    try:
        raise ValueError("the application's own mistake")
    except ValueError:
        start_response("500 Late", [], sys.exc_info())
    yield b"never seen"

def do_nothing(environ, start_response):
    return [b"no start_response"]

def do_twice(environ, start_response):
    ok(start_response)
    ok(start_response)
    return [b"twice"]

def do_none(environ, start_response):
    ok(start_response)

def do_str(environ, start_response):
    ok(start_response)
    return ["not bytes"]

def do_sysexit(environ, start_response):
    sys.exit("an application that calls sys.exit()")
'''

# Put in front of an application, this is an import that takes until the file `gate` is gone.
GATE = "import os, time\nwhile os.path.exists('gate'):\n    time.sleep(0.01)\n"

# An application that does not import.
BROKEN = "raise RuntimeError('this application does not import')\n"

# An application whose own mistake looks like one in an ini file.
OWN_FILE = """import configparser
def factory(global_conf, **settings):
    configparser.ConfigParser()['nosuch']
"""

# A sitecustomize.py that injects faults into the server. Each one is switched on by a file: forks
# and threads that fail, a HUP in a child's first moment, and deaths that are noticed late.
FAULTS = """
import os
import signal
import threading
import time

real_fork = os.fork
real_exit = os._exit
real_waitpid = os.waitpid
real_start = threading.Thread.start

def faulty_fork():
    if os.path.exists('nofork'):
        raise BlockingIOError(11, 'no more processes')
    pid = real_fork()
    if pid == 0 and os.path.exists('signalled'):
        os.kill(os.getpid(), signal.SIGHUP)
    return pid

def late_exit(status):
    if os.path.exists('slow'):
        signal.set_wakeup_fd(-1)
        os.closerange(3, 256)
        time.sleep(0.02)
    real_exit(status)

def late_waitpid(*arguments):
    found = real_waitpid(*arguments)
    if found[0] == 0 and os.path.exists('slow'):
        time.sleep(0.05)
    return found

def faulty_start(thread):
    if os.path.exists('nothread'):
        raise RuntimeError('no more threads')
    real_start(thread)

os.fork = faulty_fork
os._exit = late_exit
os.waitpid = late_waitpid
threading.Thread.start = faulty_start
"""

# Put in front of an application, this is a thread that forks, even while the interpreter exits.
FORKING = """
import atexit
import os
import queue
import threading

jobs = queue.Queue()

def work():
    while jobs.get():
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)

thread = threading.Thread(target=work, daemon=True)
thread.start()

def end():
    for job in (True, True, False):
        jobs.put(job)
    thread.join()

atexit.register(end)
"""


# ==== the invariants ==============================================================================


def serve_with_faults(serve: Serve, folder: Path, **keys: object) -> Server:
    """Start a server into which a file of the right name injects a fault, see FAULTS."""
    (folder / "sitecustomize.py").write_text(FAULTS)
    return serve(env={"PYTHONPATH": str(folder)}, **keys)


def test_1_no_client_is_refused_or_reset_across_reloads(serve):
    """Guards: new workers start before old ones drain, the listener stays, the idle get a grace."""
    reloads = 8
    server = serve()
    busy = Load(server, keep=8, closing=4)
    idle = Load(server, keep=40, closing=0, pause=0.5)
    with busy, idle:
        for _ in range(reloads):
            server.reload()
            busy.more(100)
    assert busy.lost == []
    assert idle.lost == []
    assert set(busy.answered) == set(range(1, 1 + reloads + 1))


@beyond_core
def test_1_nor_after_200_and_then_10000_sighups_in_a_row(serve):
    """Guards: a SIGHUP during a reload is remembered; the last configuration and code win."""
    server = serve(workers=3)

    def greetings():
        return {server.get().json["greeting"] for _ in range(10)}

    with Load(server) as load:
        for number in range(200):
            server.write_app(APPLICATION + "#" * number)
            server.write(server.APP.replace("hello", f"hello {number}"), workers=2)
            server.signal()
            load.more(1)
        for _ in range(10_000):
            server.signal()
        until(lambda: greetings() == {"hello 199"}, "the newest configuration")
        until(lambda: len(server.workers()) == 2, "two workers")
        until(lambda: not server.zombies(), "no zombie")
    assert load.lost == []


def test_1_an_idle_connection_gets_its_grace(serve):
    """Guards: idle_grace. A request within it is answered and its connection closed.

    A connection that stays silent is closed when the grace is over.
    """
    server = serve(workers=1, idle_grace=2)
    new = server.connect()  # it has not sent anything before the reload
    kept = server.connect()
    silent = server.connect()
    old = kept.get().json["pid"]
    assert silent.get().json["pid"] == old
    server.reload()
    until(lambda: drains(old))
    for client in kept, new:
        answer = client.get()
        assert answer.closes
        assert answer.json["pid"] == old
        assert client.ended()
    assert silent.ended()
    until(lambda: not alive(old))


@beyond_core
@pytest.mark.parametrize("why", ["idle_grace", "keepalive_timeout"])
def test_1_a_connection_is_read_once_more_before_it_is_closed(serve, why):
    """Guards: the last look. A request in time is answered, however late the worker reads it."""
    limit = 1.5  # seconds
    server = serve(workers=1, **{why: limit})
    with server.connect() as client:
        worker = client.get().json["pid"]
        if why == "idle_grace":
            server.reload()
            until(lambda: drains(worker))
        os.kill(worker, SIGSTOP)
        until(lambda: is_in_state(worker, "T"), "it to stop, or it would still read this")
        client.request("GET", "/overdue")
        time.sleep(limit + 0.2)
        os.kill(worker, SIGCONT)
        assert client.answer().json["pid"] == worker


@pytest.mark.parametrize("how", ["a reload", "a graceful stop", "a worker's replacement"])
def test_2_what_has_begun_is_answered_across(serve, how):
    """Guards: the whole drain.

    One request is in flight and two are pipelined behind it, one waits for a thread, one is
    queued, one is half read, and one comes on an idle connection in its grace.
    """
    server = serve(workers=1, threads=1, idle_grace=20, header_timeout=60)
    waiting = server.connect()
    half = server.connect()
    idle = server.connect()
    waiting.get()
    idle.get()
    half.send(b"GET /half HTTP/1.1\r\nHo")
    busy = server.hold("busy")
    waiting.request("GET", "/waiting")
    queued = server.connect()
    queued.request("GET", "/queued")
    busy.request("GET", "/second")
    busy.request("GET", "/third")

    if how == "a reload":
        server.reload()
    elif how == "a graceful stop":
        server.signal(SIGTERM)
    else:
        os.kill(busy.worker, SIGTERM)
    until(lambda: drains(busy.worker))
    half.send(b"st: test\r\n\r\n")
    idle.request("GET", "/idle")
    if how != "a graceful stop":
        assert queued.answer().json["pid"] != busy.worker, "the new worker serves meanwhile"
    server.release("busy")

    answers = [busy.answer(), busy.answer(), busy.answer()]
    assert [answer.json["PATH_INFO"] for answer in answers] == ["/hold", "/second", "/third"]
    assert answers[-1].closes
    assert busy.ended()
    for client, path in (waiting, "/waiting"), (half, "/half"), (idle, "/idle"):
        answer = client.answer()
        assert answer.json["PATH_INFO"] == path
        assert answer.json["pid"] == busy.worker
        assert answer.closes
        assert client.ended()
    if how == "a graceful stop":
        assert queued.answer().json["PATH_INFO"] == "/queued"
        assert server.process.wait(DEADLINE) == 0
    else:
        until(lambda: not alive(busy.worker))
        assert len(server.workers()) == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /nap HTTP/1.1\r\nHost: test\r\n\r\n",
        b"POST /nap HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\nxx",
    ],
)
def test_2_but_a_client_always_one_request_ahead_holds_no_worker(serve, request_bytes):
    """Guards: a drain looks once for a pipelined request. The next answer closes."""
    server = serve(workers=1)
    with server.connect() as client:
        client.send(request_bytes + request_bytes)
        server.signal()
        end = time.monotonic() + DEADLINE
        while not client.answer().closes:
            assert time.monotonic() < end
            with contextlib.suppress(ConnectionError):
                client.send(request_bytes)


def test_2_and_a_request_behind_one_that_waited_for_a_thread_is_answered(serve):
    """Guards: a drain looks for a pipelined request, also if the first one was waiting then."""
    server = serve(workers=1, threads=1)
    with server.connect() as client:
        assert client.get().status == 200
        held = server.hold("held")
        client.request("GET", "/first")
        # If it read both at once, the test would prove less.
        until(lambda: not kernel_queue(server, client, "unread"), "the worker to read it")
        client.request("GET", "/second")
        server.signal()
        until(lambda: drains(held.worker))
        server.release("held")
        assert held.answer().status == 200
        assert client.answer().json["PATH_INFO"] == "/first"
        assert client.answer().json["PATH_INFO"] == "/second"
        assert client.ended()


def test_2_long_requests_cross_two_reloads_whole(serve):
    """Guards: a drain has no limit of its own (drain_timeout = 0)."""
    server = serve(workers=1, idle_grace=1)
    small = server.connect()
    large = server.connect()
    chunked = server.connect()
    download = server.connect(receive_buffer=4096)
    size = b"POST /size HTTP/1.1\r\nHost: test\r\n"
    small.send(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 2000\r\n\r\n" + b"s" * 1000)
    large.send(size + b"Content-Length: 2000000\r\n\r\n" + b"l" * 1000)
    chunked.send(size + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"c" * 100)
    download.request("GET", "/big?16000000")
    download.more()
    held = server.hold("held")  # the worker has accepted the others before this one
    server.reload()
    server.reload()
    assert server.get().json["hupserve.generation"] == 3
    assert download.answer().body == b"0123456789abcdef" * 1_000_000
    assert small.send(b"s" * 1000).answer().json["body"] == "s" * 2000
    assert large.send(b"l" * 1_999_000).answer().body == b"2000000"
    chunked.send(b"c" * 900 + b"\r\n5\r\nhello\r\n0\r\n\r\n")
    assert chunked.answer().body == b"1005"
    assert alive(held.worker)
    server.release("held")
    assert held.answer().json["hupserve.generation"] == 1
    until(lambda: not alive(held.worker))


ROLLED_BACK = [
    "the application does not import",
    "a worker exits while it boots",
    "a worker is never ready",
    "an address is taken",
]


@pytest.mark.parametrize("why", ROLLED_BACK)
def test_3_a_reload_commits_whole_or_changes_nothing(serve, why):
    """Guards: ready before commit; new addresses listen at the commit only; the roll-back."""
    server = serve(boot_timeout=20, numbers={"BIND_PATIENCE": (1.0, 0.1)})
    server.tracebacks = True
    held_by_master = descriptors(server.pid)
    workers = server.workers()
    new_port = free_port()
    listen = f"127.0.0.1:0 127.0.0.1:{new_port}"
    sections = server.APP.replace("hello", "good bye")
    good = {"sections": sections, "listen": listen, "workers": 3, "boot_timeout": 20}
    bad = dict(good)
    with Load(server) as load, socket.socket() as taken:
        if why == "the application does not import":
            server.write_app(BROKEN + APPLICATION)
        elif why == "a worker exits while it boots":
            server.write_app("import os\nos._exit(3)\n" + APPLICATION)
        elif why == "a worker is never ready":
            server.write_app(GATE + APPLICATION)
            server.touch("gate")
            bad["boot_timeout"] = 0.5
        else:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            bad["listen"] = f"{listen} 127.0.0.1:{taken.getsockname()[1]}"
        for _ in range(2):  # the next SIGHUP tries again
            server.reload_fails("reload rolled back: .+", **bad)
            assert refused(new_port)
            until(lambda: server.workers() == workers, "the new workers to be gone")
            until(
                lambda: descriptors(server.pid) == held_by_master,
                "the master to hold what it held",
            )
        assert set(load.more()) == {1}
        assert server.get().json["greeting"] == "hello"

        server.write_app(APPLICATION + "# mended\n")
        server.reload(**good)
        assert server.get().json["greeting"] == "good bye"
        assert not refused(new_port)
        until(lambda: len(server.workers()) == 3)
    assert load.lost == []
    if why == "the application does not import":
        assert "RuntimeError: this application" in server.log()
    else:
        assert "RuntimeError: this application" not in server.log()


LEAVES_NOTHING = ["the application does not import", "no room for the pid", "listen() fails"]


@pytest.mark.parametrize("why", LEAVES_NOTHING)
def test_3_a_roll_back_leaves_no_file_behind(serve, folder, why):
    """Guards: what the commit creates is undone if a later step of it fails."""
    server = serve(workers=1)
    server.tracebacks = True
    stale = folder / "stale"
    stale.write_text("999999999\n")
    server.write_app(GATE + (BROKEN if why == LEAVES_NOTHING[0] else APPLICATION))
    server.touch("gate")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        path = folder / "socket"
        server.write(
            listen=f"127.0.0.1:0 127.0.0.1:{other.getsockname()[1]} unix:{path}",
            log_file="new.log",
            access_log="new_access.log",
            pidfile="/dev/full" if why == LEAVES_NOTHING[1] else stale,
        )
        since = len(server.log())
        server.signal(SIGHUP)
        until(path.exists, "the reload to have bound its addresses")
        if why == LEAVES_NOTHING[2]:
            other.listen()  # both could bind, but only one can listen
        server.remove("gate")
        server.wait_log("reload rolled back: .+", since)
    assert stale.read_text() == "999999999\n"
    for name in ("new.log", "new_access.log", "socket"):
        assert not (folder / name).exists(), name
    assert server.get().json["hupserve.generation"] == 1
    assert "GET" not in server.log(), "it would be the new access log's"

    server.write_app(APPLICATION + "# mended\n")
    server.write(listen="127.0.0.1:0", pidfile=stale)
    server.signal(SIGHUP)
    server.wait_log("generation . serves", file="new.log")
    assert stale.read_text() == f"{server.pid}\n"


def test_3_nor_does_a_check_or_a_failed_start(folder):
    """Guards: the logs are opened at the commit, the first one too."""
    keys = "workers = 1\nlog_file = new.log\naccess_log = new_access.log\npidfile = pid"
    (folder / "good.ini").write_text(GOOD.replace(KEY, keys))
    (folder / "app.py").write_text(APPLICATION)
    assert run("--check", folder / "good.ini", cwd=folder).returncode == 0
    (folder / "app.py").write_text(BROKEN)
    start = run(folder / "good.ini", cwd=folder)
    assert start.returncode == 1
    assert "RuntimeError: this application" in start.stderr, "on stderr, for there is no log yet"
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"good.ini", "app.py", "imports"}


UNPRINTABLE_ERROR = """
class Worse(OSError):
    def __str__(self):
        raise OSError('worse')
raise Worse
"""


def test_3_an_error_that_cannot_be_printed_makes_no_second_master(serve):
    """Guards: a child ends as a child, whatever happens in it."""
    server = serve()
    server.tracebacks = True
    workers = server.workers()
    server.write_app(UNPRINTABLE_ERROR)
    server.reload_fails("reload rolled back: .+")
    until(lambda: server.workers() == workers, "the new workers to be gone")
    assert "cannot start a worker" not in server.log()


SECOND_IMPORT_WAITS = """
import os, time
try:
    os.mkdir('first')
except FileExistsError:
    while not os.path.exists('go'):
        time.sleep(0.01)
"""


def test_4_no_old_worker_drains_before_every_new_one_is_ready(serve):
    """Guards: the commit waits for all workers. While one still imports, nothing has changed."""
    server = serve(workers=2)
    server.write_app(SECOND_IMPORT_WAITS + APPLICATION)
    with Load(server) as load, server.connect() as client:
        client.get()
        server.signal()
        until(lambda: len(server.log("imports").split()) == 2 + 1, "one new worker to import")
        assert set(load.more(300)) == {1}
        assert not client.get().closes
        assert "generation 2" not in server.log()
        server.touch("go")
        server.wait_log("generation 2 serves with 2 workers")
        assert client.get().closes
        until(lambda: load.more(10)[-1] == 2)
    assert load.lost == []


def test_4_an_old_worker_is_told_once(serve):
    """Guards: the order is given once. Later reloads do not start an idle client's grace again."""
    server = serve(workers=1, idle_grace=1)
    with server.connect() as client:
        client.get()
        client.socket.settimeout(0.5)
        for _ in range(40):
            server.signal()
            with contextlib.suppress(socket.timeout):
                assert client.ended()
                return
    pytest.fail("an idle connection lived for 20 s of reloads")


def test_5_the_counter_is_exact_and_a_worker_leaves_only_at_zero(serve):
    """Guards: one writer. Every hand-over is counted and every hand-back is taken off.

    That holds however the request ends.
    """
    server = serve(Server.STATUS, workers=1, threads=8)
    server.tracebacks = True

    def in_flight():
        [worker] = [worker for worker in server.status() if worker["generation"] == 1]
        return worker["in_flight"]

    def is_in_flight(number):
        return lambda: in_flight() == number

    with Load(server) as load:
        for path in ("/raise", "/short", "/endless?gone", "/raisemidway", "/crlf"):
            with server.connect() as client:  # it leaves before the answer is whole
                client.request("GET", path)
                client.more()
        load.more(500)
    until(is_in_flight(1), "nothing but the status request itself to be in flight")
    held = [server.hold(f"held{number}") for number in range(4)]
    until(is_in_flight(4 + 1))
    server.reload()
    for number, client in enumerate(held):
        until(is_in_flight(4 - number))  # another worker answers the status request now
        assert alive(client.worker)
        server.release(f"held{number}")
        assert client.answer().status == 200
        assert client.ended()
    until(lambda: not alive(held[0].worker))


def fill_bell(master: int) -> None:
    """Fill the pipe that wakes the master, its only one, with the bytes of HUPs."""
    folder = Path(f"/proc/{master}/fd")
    pipes = [path for path in folder.iterdir() if os.readlink(path).startswith("pipe:")]
    writer = os.open(pipes[0], os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes([SIGHUP]))
    os.close(writer)


def test_6_a_TERM_is_heard_in_a_flood_of_HUPs(serve):
    """Guards: flags beside the wake-up bytes. A pipe full of HUPs drops the byte of a TERM."""
    server = serve()
    for _ in range(100_000):
        server.signal(SIGHUP)
    server.signal(SIGSTOP)
    fill_bell(server.pid)  # for the case that it could read as fast as the signals came
    server.signal(SIGTERM)
    server.signal(SIGCONT)
    assert server.process.wait(DEADLINE) == 0


def test_6_HUPs_during_a_reload_are_remembered_once(serve):
    """Guards: a flag is not a queue. The master looks at it as soon as a reload ends."""
    server = serve(workers=1)
    server.hold("held")  # keeps the old worker
    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.signal()
    until(lambda: len(server.workers()) == 2, "the new worker to import")
    for _ in range(200):
        server.signal()
    server.remove("gate")
    server.wait_log("generation 3 serves")
    time.sleep(0.3)  # in which a queue would show: the next reload would begin at once
    assert server.reload() == 4
    assert len(server.log("imports").split()) == 4
    server.release("held")


def test_7_a_worker_that_still_loads_ignores_stops(serve):
    """They may have been meant for the whole group. The master alone ends it, and can."""
    server = serve(workers=1)
    old = server.workers()
    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.signal()
    [new] = until(lambda: server.workers() - old, "the new worker")
    until(lambda: "/dev/null" in descriptors(new), "it to import")
    for number in SIGTERM, SIGQUIT, SIGINT:
        os.kill(new, number)
    server.remove("gate")
    server.wait_log("generation 2 serves")
    assert server.get().json["pid"] == new
    server.touch("gate")
    server.signal()
    until(lambda: len(server.workers()) == 2, "one more to import")
    server.stop()


def test_7_no_signal_is_lost_around_a_fork(serve, folder):
    """Guards: signals are blocked around fork.

    Otherwise a HUP in a child's first moment would run the master's handler, and be lost.
    """
    server = serve_with_faults(serve, folder)
    server.touch("signalled")
    server.reload()
    until(lambda: server.log().count("SIGHUP without an order") == 2)


def test_7_no_death_is_missed(serve, folder):
    """Guards: the master empties the bell before it looks for dead children.

    In the other order a child that dies in between would never be noticed.
    """
    server = serve_with_faults(serve, folder, workers=1)
    server.touch("slow")
    server.stop()


@beyond_core
def test_7_a_TERM_to_the_whole_group_during_a_fork_ends_everybody(serve):
    server = serve(workers=4)
    for _ in range(5):
        workers = server.workers()
        server.signal(SIGHUP)
        until(lambda workers=workers: server.workers() != workers, "a fork")
        os.killpg(server.pid, SIGTERM)
        assert server.process.wait(DEADLINE) == 0
        until(lambda: not server.others())
        server.stderr.unlink()
        server.port = 0  # the next server has another
        server.start()


def test_7_a_worker_does_not_ring_the_masters_bell(serve):
    """Guards: the wake-up descriptor is replaced in the child.

    A HUP to a worker is its own: it logs one line, and there is no reload.
    """
    server = serve()
    workers = server.workers()
    for worker in workers:
        os.kill(worker, SIGHUP)  # the worker is idle, so nothing else would wake it
    until(lambda: server.log().count("SIGHUP without an order") == 2)
    with Load(server) as load:
        for worker in workers:
            os.kill(worker, SIGINT)
        load.more()
    assert load.lost == []
    assert "generation 2" not in server.log()
    assert server.workers() == workers


def test_8_workers_outlive_no_master(serve):
    """Guards: the line's end. The master is killed; its workers finish and free the port."""
    server = serve()
    held = server.hold("held")
    server.process.kill()
    server.process.wait()
    until(lambda: drains(held.worker))
    until(lambda: refused(server.port))
    server.release("held")
    answer = held.answer()
    assert answer.status == 200
    assert answer.closes
    until(lambda: not server.others(), "the workers to leave")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))


def test_8_nor_do_workers_that_still_load(serve):
    """Guards: SIGIO. A worker in an import cannot look at its line, and would hold the port."""
    server = serve(workers=1)
    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.signal()
    until(lambda: len(server.workers()) == 2, "the new worker to import")
    server.process.kill()
    server.process.wait()
    until(lambda: refused(server.port) and not server.others(), "the workers to leave")


def test_9_a_worker_that_dies_is_replaced(serve):
    """Guards: reap and spawn.

    The replacement runs the code on the disk under the configuration of its generation.
    """
    server = serve(workers=1)
    server.write(server.APP.replace("hello", "not yet"), workers=3)
    server.write_app(APPLICATION.replace('"pid": os', '"code": "new", "pid": os'))
    [old] = server.workers()
    os.kill(old, SIGKILL)
    answer = server.get().json
    assert answer["code"] == "new"
    assert answer["greeting"] == "hello"
    assert answer["hupserve.generation"] == 1
    assert "replaced" in server.log()
    assert len(server.workers()) == 1
    with contextlib.suppress(Cut, ConnectionResetError):
        server.get("/exit")  # the worker ends in the middle of the request
    assert server.get().json["pid"] not in (old, answer["pid"])


CRASHING = """
import os, threading
if os.path.exists('crash'):
    threading.Timer(0.2, os._exit, (3,)).start()
"""


@beyond_core
def test_9_a_crash_loop_backs_off(serve):
    """Guards: 0, 0.2, 0.4 ... 5 s between replacements. The other worker serves on."""
    server = serve(workers=2, code=CRASHING + APPLICATION)
    server.touch("crash")
    with server.connect() as client:
        healthy = client.get().json["pid"]
        [other] = server.workers() - {healthy}
        began = time.monotonic()
        os.kill(other, SIGKILL)
        while len(server.log("imports").split()) < 2 + 5:  # until the fifth replacement
            assert client.get().json["pid"] == healthy
            assert time.monotonic() < began + DEADLINE
        assert time.monotonic() - began > 0.2 + 0.4 + 0.8 + 1.6
    server.remove("crash")
    until(lambda: server.get().json["pid"] != healthy, "the mended worker to serve")


def test_9_a_worker_told_by_somebody_else_is_replaced_at_that_moment(serve):
    """Guards: the worker says on its line that it leaves. It is replaced then, not at its end."""
    server = serve(workers=1)
    held = server.hold("held")
    os.kill(held.worker, SIGTERM)
    until(lambda: server.get().json["pid"] != held.worker, "another worker to answer")
    assert held.worker in server.workers()
    server.release("held")
    assert held.answer().closes
    until(lambda: len(server.workers()) == 1)


# ==== one worker replaced ====================================================================


REPLACED = r"(?s)pid (\d+) takes its place"


def test_replace_a_worker_that_got_a_TERM_serves_until_its_successor_does(serve):
    """Guards: Child.predecessor. There is one worker, and its successor's import takes a while."""
    server = serve(code=GATE + APPLICATION, workers=1)
    [old] = server.workers()
    server.touch("gate")
    with Load(server) as load:
        os.kill(old, SIGTERM)
        until(lambda: len(server.workers()) == 2, "the successor to be forked")
        load.more(50)
        assert server.get().json["pid"] == old
        server.remove("gate")
        until(lambda: server.workers() and old not in server.workers(), "the old one to leave")
        load.more(50)
    assert not load.lost
    server.wait_log(r"SIGTERM: asking the master for a successor")
    server.wait_log(r"worker 0 \(pid \d+\) drains \(SIGTERM\); pid \d+ takes its place")


def test_replace_a_successor_that_cannot_boot_leaves_the_old_worker_serving(serve):
    """Guards: the predecessor is handed on from one successor to the next, after the back-off."""
    server = serve(workers=1)
    [old] = server.workers()
    server.write_app(BROKEN)
    with Load(server) as load:
        os.kill(old, SIGTERM)
        server.wait_log(r"replaced in 0\.4 s; until then worker 0 \(pid \d+\) serves on")
        assert server.get().json["pid"] == old
        server.write_app(APPLICATION + "# repaired\n")
        until(lambda: server.get().json["pid"] != old, "the repaired code to take over")
        load.more()
    assert not load.lost
    assert f"worker 0 (pid {old}) serves on" in server.log()
    server.tracebacks = True


def test_replace_a_second_TERM_drains_at_once(serve):
    """Guards: "hurry". The successor is still loading, so newcomers wait in the queue."""
    server = serve(code=GATE + APPLICATION, workers=1)
    [old] = server.workers()
    server.touch("gate")
    os.kill(old, SIGTERM)
    until(lambda: len(server.workers()) == 2, "the successor to be forked")
    os.kill(old, SIGTERM)
    until(lambda: drains(old), "the old worker to drain")
    client = server.connect()
    client.request("GET", "/")
    server.remove("gate")
    assert client.answer().json["pid"] != old


def test_replace_a_successor_that_leaves_before_it_serves_forgets_no_predecessor(serve):
    """Guards: `not child.predecessor` in maintain(). The successor hears "go" and TERM at once."""
    server = serve(code=GATE + APPLICATION, workers=1, log_level="debug")
    [old] = server.workers()
    server.touch("gate")
    os.kill(old, SIGTERM)
    until(lambda: len(server.workers()) == 2, "the successor to be forked")
    [successor] = {*server.workers()} - {old}
    sleeps = Path(f"/proc/{server.pid}/status")

    os.kill(server.pid, SIGSTOP)
    until(lambda: "State:\tT" in sleeps.read_text(), "the master to stop")
    server.remove("gate")
    sleeps_in = Path(f"/proc/{successor}/wchan")  # the kernel's function
    until(lambda: "epoll" in sleeps_in.read_text(), "the successor to be ready")
    os.kill(successor, SIGSTOP)
    os.kill(server.pid, SIGCONT)
    server.wait_log(rf"worker 0 \(pid {successor}\) of generation 1: serving")
    os.kill(successor, SIGTERM)
    os.kill(successor, SIGCONT)
    gone = {old, successor}
    until(lambda: gone.isdisjoint(server.workers()), "both to be replaced")
    assert len(server.workers()) == 1


@pytest.mark.parametrize("moment", ["boots", "leaves", "drains", "has died"])
def test_replace_a_TERM_to_the_whole_group_is_a_stop_that_loses_nothing(serve, moment):
    """Guards: the master hears its own TERM before it replaces; must_come_up_first()."""
    server = serve(code=GATE + APPLICATION, workers=1, idle_grace=1)
    [old] = server.workers()
    held = server.hold("held") if moment == "drains" else None
    server.touch("gate")
    if moment in ("boots", "has died"):
        os.kill(old, SIGKILL)
        until(lambda: server.workers() and old not in server.workers(), "a successor to boot")
    else:
        os.kill(old, SIGTERM)
    if moment == "drains":
        until(lambda: len(server.workers()) == 2, "the successor to be forked")
    clients = [server.connect() for _ in range(5)]
    for client in clients:
        client.request("GET", "/")
    os.killpg(server.pid, SIGTERM)
    server.remove("gate")
    server.release("held")
    for client in clients:
        assert client.answer().status == 200
    if held:
        assert held.answer().status == 200
    assert server.process.wait(DEADLINE) == 0


def test_replace_by_TERM_under_load_loses_nothing(serve):
    """Guards: all of it together. Every tenth of a second a worker gets a TERM, booting or not."""
    code = "import time; time.sleep(0.3)\n" + APPLICATION
    server = serve(Server.STATUS, code=code, workers=2)
    leaving = {"leaving", "draining", "exiting"}
    with Load(server, keep=12, closing=12, pause=0.01) as load:
        for _ in range(30):
            shown = [worker for worker in server.status() if worker["state"] not in leaving]
            if shown:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(shown)["pid"], SIGTERM)
            load.more(20)
    assert not load.lost


@beyond_core
def test_replace_after_max_requests_one_worker_at_a_time(serve):
    """Guards: leave_after, its random tenth, and may_be_replaced()."""
    code = "import time; time.sleep(0.1)\n" + APPLICATION
    server = serve(Server.STATUS, code=code, workers=2, max_requests=50)

    def six_were_replaced():
        booting = [worker for worker in server.status() if worker["state"] == "booting"]
        assert len(booting) <= 1, "one at a time"
        return len(re.findall(REPLACED, server.log())) >= 6

    with Load(server, keep=4, closing=2) as load:
        until(six_were_replaced, "six to be replaced")
        ready = {"serving", "leaving"}
        for _ in range(20):
            assert sum(worker["state"] in ready for worker in server.status()) >= 2
    assert not load.lost
    pids = re.findall(r"(pid \d+)\) drains \(max_requests\); (pid \d+)", server.log())
    assert len(pids) >= 6
    # Nobody leaves while the successor of another one, for the same reason, has not taken over.
    order = re.findall(r"max_requests: asking|drains \(max_requests\)", server.log())
    assert order[0] == "max_requests: asking"


HARD_WORK = """
import re
def do_regex(environ, start_response):
    re.match("(a+)+$", "a" * 40 + "b")
def do_compute(environ, start_response):
    end = time.monotonic() + float(environ["QUERY_STRING"])
    while time.monotonic() < end:
        sum(range(1000))
    return echo(environ, start_response)
"""


@beyond_core
@pytest.mark.parametrize("how", ["a regular expression", "a stopped process"])
def test_replace_a_worker_that_hangs(serve, how):
    """Guards: watch_workers(), Desks, faulthandler. The other worker serves on meanwhile."""
    server = serve(code=APPLICATION + HARD_WORK, workers=2, hang_timeout=1.5)
    old = server.workers()
    client = server.connect()
    if how == "a regular expression":
        client.request("GET", "/regex?secret")
    else:
        client = server.hold("held")
        os.kill(client.worker, SIGSTOP)
    with Load(server, keep=0, closing=2, pause=0.01) as load:
        server.wait_log(
            r"has not answered for 1\.5 s \(hang_timeout\); in flight: .*GET /(regex|hold)"
        )
        until(lambda: len(server.workers() - old) == 1, "a replacement")
        until(lambda: len(server.workers()) == 2, "the one that hung to be gone")
        before = len(load.answered)
        until(lambda: len(load.answered) > before + 30, "the clients to be served")
    # The clients that the worker which hung had accepted are lost with it.
    assert len(load.lost) <= 2
    if how == "a regular expression":
        server.wait_log(r'(?s)Fatal Python error: Aborted.*File ".*app.py", line \d+ in do_regex')
        assert "secret" not in server.log()


@beyond_core
def test_replace_nobody_that_only_works_hard_or_sleeps(serve):
    """Guards: four questions, each after a turn of the master's own loop."""
    server = serve(code=APPLICATION + HARD_WORK, workers=1, threads=16, hang_timeout=1.5)
    old = server.workers()
    clients = [server.connect() for _ in range(16)]
    for client in clients:
        client.request("GET", "/compute?2")
    for client in clients:
        assert client.answer().status == 200
    for number in (SIGSTOP, SIGCONT):
        os.killpg(server.pid, number)
        if number == SIGSTOP:
            time.sleep(1.8)  # the time of a suspend is the promise here
    server.get()
    assert server.workers() == old
    assert "hang_timeout" not in server.log()


@beyond_core
def test_replace_a_draining_worker_that_hangs_ends(serve):
    """Guards: the watch goes on in old generations, and in a stop."""
    server = serve(code=APPLICATION + HARD_WORK, workers=1, hang_timeout=0.5)
    client = server.connect()
    client.request("GET", "/regex")
    [old] = server.workers()
    server.signal(SIGHUP)
    server.wait_log(r"generation 2 serves")
    server.wait_log(rf"worker 0 \(pid {old}\) has not answered")
    until(lambda: old not in server.workers(), "the one that hangs to be gone")


def test_replace_a_stop_with_code_that_cannot_boot_says_that_clients_were_queued(serve):
    """Guards: a place in its back-off is not forked again, so the stop ends."""
    server = serve(workers=1)
    server.write_app(BROKEN)
    server.tracebacks = True
    [old] = server.workers()
    os.kill(old, SIGKILL)
    server.wait_log(r"replaced in 0\.[48] s")
    with server.connect() as client:
        client.request("GET", "/")
        server.stop()
        server.wait_log(r"no worker could come up to answer the clients that are queued")


def test_13_the_soft_limit_of_descriptors_is_raised_for_the_connections(serve):
    """Guards: raise_descriptor_limit(). The hard limit is not touched, and one line warns of it."""
    few = ["sh", "-c", 'ulimit -S -n 100; ulimit -H -n 300; exec "$@"', "sh"]
    server = serve(workers=2, connections=150, prefix=few)
    idle = [server.connect() for _ in range(140)]
    assert all(client.get().status == 200 for client in idle)
    assert "descriptors" not in server.log()
    server.reload(connections=1000)
    assert len(re.findall("only 300 descriptors are allowed", server.log())) == 1


def test_13_workers_that_a_reload_could_not_double_are_refused_at_the_start(folder):
    """Guards: refuse_too_many()."""
    (folder / "app.py").write_text(APPLICATION)
    ini = folder / "many.ini"
    ini.write_text("[server:main]\nlisten = 127.0.0.1:0\nworkers = 100\n" + Server.APP)
    command = ["sh", "-c", f"ulimit -n 150; exec {PYTHON} {HUPSERVE} many.ini"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert re.search(r"workers: 100: a reload needs \d+ descriptors, and only 150", run.stderr)


def test_10_a_slow_client_costs_no_thread(serve):
    """Guards: the main thread receives heads and small bodies.

    There are two threads and 700 slow clients, and nobody else is delayed.
    """
    server = serve(workers=1, threads=2, header_timeout=120)
    silent = [server.connect() for _ in range(200)]
    idle = [server.connect() for _ in range(200)]
    heads = [server.connect() for _ in range(200)]
    bodies = [server.connect() for _ in range(100)]
    for client in idle:
        client.get()
    for client in heads:
        client.send(b"GET /slow HTTP/1.1\r\nHo")
    for client in bodies:
        client.send(b"POST /slow HTTP/1.1\r\nHost: test\r\nContent-Length: 60000\r\n\r\n")
        client.send(b"b" * 100)
    for _ in range(50):
        assert server.get().status == 200
    for client in heads:
        assert client.send(b"st: test\r\n\r\n").answer().json["PATH_INFO"] == "/slow"
    for client in bodies:
        assert client.send(b"b" * 59_900).answer().json["body"] == "b" * 60_000
    for client in silent + idle:
        assert client.get().status == 200


class Refused(NamedTuple):
    """A request that ends its connection while unread bytes are still coming."""

    head: str  # | stands for CR LF
    rest: bytes  # sent behind it
    status: int
    least_size: int  # bytes of the answer's body


MAX_BODY = 1_000_000
CHUNK = b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"
CLOSING = {
    "pipelined": Refused(
        "GET /big?999999 HTTP/1.1|Host: a|Connection: close||",
        rest=b"GET / HTTP/1.1\r\n" * 5000,
        status=200,
        least_size=999_984,
    ),
    "a long upload": Refused(
        "POST / HTTP/1.1|Host: a|Content-Length: 4000000||",
        rest=b"x" * 4_000_000,
        status=413,
        least_size=0,
    ),
    "a long chunked one": Refused(
        "POST / HTTP/1.1|Host: a|Transfer-Encoding: chunked||",
        rest=CHUNK * 60 + b"0\r\n\r\n",
        status=413,
        least_size=0,
    ),
    "an unread upload": Refused(
        "POST /unread HTTP/1.1|Host: a|Content-Length: 900000||",
        rest=b"x" * 900_000,
        status=200,
        least_size=len("not read"),
    ),
    "a refused head": Refused(
        "GET / HTTP/1.1|Host : a||", rest=b"x" * 1_000_000, status=400, least_size=0
    ),
}


@pytest.mark.parametrize("what", CLOSING)
def test_11_no_answer_is_lost_to_a_reset_of_our_own(serve, what):
    """Guards: the sending side is shut down first, and input is discarded until its end."""
    row = CLOSING[what]
    request = row.head.replace("|", "\r\n").encode() + row.rest
    server = serve(max_body=MAX_BODY)
    for _ in range(20):
        with server.connect() as client:
            answer = client.send(request).answer()
            assert answer.status == row.status
            assert len(answer.body) >= row.least_size
            assert client.ended()


def test_11_nor_to_what_comes_after_the_last_answer(serve):
    """Guards: the connection lingers while most of a long answer is still on its way."""
    size = 320_000
    server = serve(access_log="-")

    def disturb():
        client.send(b"too late")
        return server.get("/").status == 200 and "GET / " in server.log()

    with Client(server.port, receive_buffer=4096) as client:
        client.request("GET", f"/big?{size}", b"", "Connection: close")
        server.wait_log("GET /big")
        until(disturb)
        client.send(b"and later")
        assert len(client.answer().body) == size


UPLOAD = b"POST /big?1000000 HTTP/1.1\r\nHost: test\r\nContent-Length: 900000\r\n\r\n"
REFUSED_UPLOAD = UPLOAD.replace(b"900000", b"9000000")  # over max_body


def linger(server: Server) -> Client:
    """Return a client whose upload was refused, and which may go on sending."""
    client = server.connect().send(REFUSED_UPLOAD)
    assert client.take_until(b"\r\n").startswith(b"HTTP/1.1 413 ")
    return client


def lingers(client: Client) -> bool:
    """Send two bytes; are both still taken? (If not, the first one calls for a reset.)"""
    with contextlib.suppress(ConnectionError):
        client.send(b"x")
        time.sleep(POLL_PAUSE)
        client.send(b"x")
        return True
    return False


# Half a minute is three seconds, and five seconds are one.
IMPATIENT = {"LINGER": (30.0, 3), "LINGER_PATIENCE": (5.0, 1), "LINGER_LOOK": (1.0, 0.1)}


@beyond_core
def test_11_nor_while_the_client_still_sends_or_takes(serve):
    """Guards: each sign of life gives a lingering connection LINGER_PATIENCE more.

    One client sends for twice that time before it reads. Another one reads for twice that time
    before it sends; were the connection closed, that would call for a reset.
    """
    server = serve(workers=1, max_body=MAX_BODY, numbers=IMPATIENT)
    with server.connect() as sender, server.connect(receive_buffer=4096) as taker:
        sender.send(UPLOAD)
        taker.send(UPLOAD)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            sender.send(b"x" * 1000)
            taker.more()
            time.sleep(0.05)
        taker.send(b"x")
        time.sleep(0.1)
        for client in sender, taker:
            assert len(client.answer().body) == MAX_BODY
            assert client.ended()


@beyond_core
def test_11_but_a_client_that_does_nothing_or_never_stops_is_let_go(serve):
    """Guards: the two limits of lingering. They hold in a drain, too."""
    server = serve(workers=1, max_body=MAX_BODY, numbers=IMPATIENT)
    (worker,) = server.workers()
    before = len(descriptors(worker))
    server.get()
    until(lambda: len(descriptors(worker)) == before, "the connection to be closed")
    began = time.monotonic()
    linger(server)  # and do nothing
    until(lambda: len(descriptors(worker)) == before)
    assert 0.9 < time.monotonic() - began < 2

    began = time.monotonic()
    endless = linger(server)
    server.reload()
    until(lambda: not lingers(endless))
    assert 2.5 < time.monotonic() - began < 5
    until(lambda: worker not in server.workers(), deadline=1)


def test_11_and_after_INT_both_within_two_seconds(serve):
    """Here it is half a second."""
    server = serve(workers=1, max_body=MAX_BODY, numbers={"LINGER_AFTER_INT": (2.0, 0.5)})
    endless = linger(server)
    server.signal(SIGINT)
    began = time.monotonic()
    until(lambda: not lingers(endless))
    assert 0.25 < time.monotonic() - began < 2
    assert server.process.wait(DEADLINE) == 0


def test_11_and_at_connections_the_longest_lingering_makes_room_after_the_idle(serve):
    server = serve(workers=1, threads=1, connections=3, max_body=MAX_BODY)
    first = linger(server)
    second = linger(server)
    idle = server.connect()
    idle.get()
    with server.connect() as newcomer:
        assert newcomer.get().status == 200
        assert idle.ended()
        assert lingers(first)
        newcomer.send(b"GET / HTTP/1.1\r\n")  # now nobody is idle
        assert server.get().status == 200
        until(lambda: not lingers(first), deadline=2)
        assert lingers(second)
        assert newcomer.send(b"Host: test\r\n\r\n").answer().status == 200


def test_12_an_applications_child_dies_of_a_TERM_at_once(serve):
    """Guards: signals stay blocked until the child has its own handlers.

    Otherwise the worker's handler would swallow this one.
    """
    server = serve(workers=1)
    assert server.get("/terminate").body == b"ended"


def test_12_a_child_keeps_no_descriptor_that_is_not_its_generations(serve):
    """Guards: a worker closes the listeners, lines, bells and selectors that are not its own."""
    server = serve(workers=2)

    def kinds(pid):
        """Count the descriptors by their kind: socket, pipe, anon_inode or a path."""
        return collections.Counter(link.split(":")[0] for link in descriptors(pid))

    def new_workers():
        return server.workers() - {old.worker}

    def hold_what_the_first_held():
        return [kinds(pid) for pid in new_workers()] == [first, first]

    first = kinds(min(server.workers()))
    master = kinds(server.pid)
    added = free_port()
    old = server.hold("old")  # a worker of generation 1 lives as long as the test
    kept = server.keys["listen"]
    server.reload(listen=f"{kept} 127.0.0.1:{added}")
    assert ports_of(server.pid) == {server.port, added}
    for _ in range(2):
        server.reload(listen=kept)
        until(lambda: len(new_workers()) == 2)
        for pid in [server.pid, *new_workers()]:
            assert ports_of(pid) == {server.port}
        until(hold_what_the_first_held, "the new to hold what the first ones held")
    killed = min(new_workers())
    os.kill(killed, SIGKILL)
    until(lambda: killed not in new_workers() and len(new_workers()) == 2, "a replacement")
    until(hold_what_the_first_held, "the replacement to hold what the first ones held")
    server.release("old")
    old.answer()
    until(lambda: kinds(server.pid) == master, "the master to hold what it held")


def test_12_an_applications_children_keep_none_and_block_nothing(serve):
    """Guards: os.register_at_fork closes the connections.

    No signal stays blocked or ignored for a child.
    """
    server = serve()
    with server.connect() as idle:
        idle.get()
        held = server.hold("held")
        signals = server.get("/children").json
        assert server.log("child")
        assert not re.search("socket:|pipe:", server.log("child"))
        assert int(signals["SigBlk"], 16) == 0
        ignored = int(signals["SigIgn"], 16)
        for number in SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, signal.SIGCHLD:
            assert not ignored & 1 << number - 1, number
        server.release("held")
        assert held.answer().status == 200
        assert idle.get().status == 200


def test_12_a_fork_does_not_wait_for_a_worker_that_leaves(serve):
    """Guards: the lock that keeps forks away from a half-done accept is released at the end."""
    serve(code=FORKING + APPLICATION).stop()


def in_shell(command: str) -> list[str]:
    """A Server's prefix that runs this shell command first."""
    return ["sh", "-c", f'{command}; exec "$@"', "sh"]


OUT_OF_DESCRIPTORS = "cannot accept: Too many open files"


@beyond_core
def test_13_out_of_descriptors_is_a_pause_and_never_a_spin(serve):
    """Guards: accept's EMFILE is answered by a pause. 200 clients come to 48 descriptors."""
    server = serve(prefix=in_shell("ulimit -n 48"), header_timeout=120)
    seconds = 1.5

    def cpu():
        return sum(process.cpu for process in processes() if process.session == server.pid)

    clients = [server.connect() for _ in range(200)]
    for client in clients:  # half a request each: an idle connection would make room for another
        client.send(b"GET / HTTP/1.1\r\nHo")
    server.wait_log(OUT_OF_DESCRIPTORS)
    pids = server.others()
    before = cpu()
    time.sleep(seconds)
    assert cpu() - before < 0.1 * seconds
    lines = re.findall(OUT_OF_DESCRIPTORS, server.log())
    assert len(lines) <= 2, "each worker logs it once, not at each try"
    for client in clients[:150]:
        client.close()
    for client in clients[150:]:
        assert client.send(b"st: test\r\n\r\n").answer().status == 200
        client.close()
    assert server.get().status == 200
    assert server.others() == pids


def test_13_nor_does_it_keep_a_request_from_its_thread(serve):
    """Guards: accept's pause is no pause of the threads."""
    server = serve(workers=1, header_timeout=120, prefix=in_shell("ulimit -n 64"))
    [worker] = server.workers()
    clients = [server.connect() for _ in range(90)]
    for client in clients:
        client.send(b"GET /stay HTTP/1.1\r\nHo")
    server.wait_log("open files")
    requests = clients[:6]
    for client in requests:
        client.send(b"st: test\r\n\r\n")
    until(
        lambda: len(os.listdir(f"/proc/{worker}/task")) >= 1 + len(requests),
        "all the requests to have a thread",
    )
    server.touch("all")
    assert {client.answer().status for client in requests} == {200}


@beyond_core
def test_13_nor_does_it_reset_the_clients_queued_at_a_stop(serve):
    """Guards: a queue that nobody takes over is emptied when there are descriptors again."""
    server = serve(workers=1, threads=1, prefix=in_shell("ulimit -n 48"))
    busy = server.hold("busy")
    queued = [server.connect() for _ in range(100)]
    for client in queued:
        client.request("GET", "/queued")
    server.signal(SIGTERM)
    server.wait_log("open files")
    server.release("busy")
    assert {client.answer().status for client in [busy, *queued]} == {200}
    assert server.process.wait(DEADLINE) == 0


@beyond_core
def test_13_a_fork_that_fails_is_a_pause_and_never_a_crash(serve, folder):
    """Guards: os.fork's OSError, injected into the real process.

    No signal is lost and no worker is forgotten.
    """
    server = serve_with_faults(serve, folder)
    server.touch("nofork")
    killed, other = sorted(server.workers())
    os.kill(killed, SIGKILL)
    with server.connect() as client:
        assert client.get().json["pid"] == other
        server.wait_log("no more processes")
        time.sleep(1.1)  # two pauses
        assert server.workers() == {other}
        assert server.log().count("no more processes") == 1
        [cpu] = [process.cpu for process in processes() if process.pid == server.pid]
        assert cpu < 1
        server.remove("nofork")
        until(lambda: len(server.workers()) == 2)

        server.touch("nofork")
        since = len(server.log())
        server.signal(SIGHUP)
        server.wait_log("no more processes", since)
        assert not client.get().closes
        server.remove("nofork")
        until(lambda: re.search("generation 2 serves|rolled back", server.log()))
        server.reload()
    assert server.get().json["hupserve.generation"] >= 2


@beyond_core
def test_13_a_thread_that_cannot_be_started_is_a_pause_too(serve, folder):
    """Guards: Thread.start's RuntimeError, injected into the real process.

    The waiting client is answered when a thread is free again.
    """
    server = serve_with_faults(serve, folder, workers=1)
    workers = server.workers()
    busy = server.hold("busy")
    server.touch("nothread")
    with server.connect() as client:
        client.request("GET", "/")
        server.wait_log("no more threads")
        time.sleep(1.1)  # two pauses
        assert server.log().count("no more threads") == 1
        server.remove("nothread")
        assert client.answer().status == 200
    server.release("busy")
    assert busy.answer().status == 200
    assert server.workers() == workers


SILENCING = {
    "dictConfig": "import logging.config\nlogging.config.dictConfig({'version': 1})\n",
    "dictConfig that names ours": """import logging.config
nothing = {'level': 'CRITICAL', 'handlers': []}
logging.config.dictConfig({
    'version': 1, 'loggers': {'hupserve': nothing, 'hupserve.access': nothing}
})
""",
    "disable": "import logging\nlogging.disable(logging.CRITICAL)\n",
    "removed handlers": """import logging
for name in ('hupserve', 'hupserve.access'):
    logging.getLogger(name).handlers.clear()
""",
}


@pytest.mark.parametrize("how", SILENCING)
def test_14_the_application_cannot_silence_our_logs(serve, how):
    """Guards: the loggers are taken back after the application is loaded, or is not."""
    server = serve(workers=1, access_log="access.log")
    server.tracebacks = True
    server.write_app(SILENCING[how] + APPLICATION)
    server.reload()
    since = len(server.log())
    assert server.get("/raise").status == 500
    server.wait_log("Traceback(?s:.+)ValueError: the application's own mistake", since)
    server.wait_log('"GET /raise HTTP/1.1" 500', file="access.log")
    server.write_app(SILENCING[how] + BROKEN)
    server.reload_fails("Traceback(?s:.+)RuntimeError: this application does not import")


def test_14_but_the_inis_loggers_may_send_ours_elsewhere(serve):
    """Guards: what [loggers] names is not taken back, neither after loading nor at "go"."""
    elsewhere = LOGGERS.replace("qualname = app", "qualname = hupserve.access")
    server = serve(
        code=SILENCING["dictConfig"] + APPLICATION,
        sections=Server.APP + elsewhere,
        workers=1,
        access_log="access.log",
    )
    server.get("/here")
    server.wait_log('<INFO> 127.0.0.1 .*"GET /here ', file="own.log")
    assert server.log("access.log") == ""


def test_14_a_closed_stderr_costs_nothing(serve):
    """Guards: stderr is written by a descriptor of our own. A failing log would end the threads."""
    server = serve(workers=1, threads=2, access_log="-")
    server.tracebacks = True
    assert server.get("/closestderr").body == b"closed"
    since = len(server.log())
    for _ in range(5):
        assert server.get("/raise").status == 500
        assert server.get().status == 200
    until(lambda: server.log()[since:].count("ValueError: the application's own mistake") == 5)
    until(lambda: server.log()[since:].count('"GET / HTTP/1.1" 200') == 5)


class StuckReader:
    """The other end of a server's stderr. Nobody reads it until read() is called."""

    def __init__(self, kind: str) -> None:
        if kind == "socket":
            ours, theirs = socket.socketpair()
            self.reader = ours.detach()
            self.writer = theirs.detach()
        elif kind == "terminal":
            self.reader, self.writer = pty.openpty()
        else:
            self.reader, self.writer = os.pipe()

    def read(self) -> str:
        """Return all that has been written so far."""
        found = b""
        while select.select([self.reader], [], [], 0)[0]:
            found += os.read(self.reader, 65536)
        return found.decode()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@beyond_core
@pytest.mark.parametrize(
    "kind", ["pipe", "pipe without /proc", "socket", "terminal", "/dev/stdout"]
)
def test_15_a_reader_that_is_stuck_costs_lines_and_nothing_else(serve, folder, kind):
    """Guards: no log waits for its reader. How many lines it has cost is said when it reads."""
    stuck = StuckReader(kind)
    output = {"stdout": stuck.writer}
    if kind != "/dev/stdout":
        output["stderr"] = stuck.writer
    env = {}
    if kind == "pipe without /proc":
        (folder / "sitecustomize.py").write_text(WITHOUT_PROC)
        env = {"PYTHONPATH": str(folder)}
    access_log = kind if kind == "/dev/stdout" else "-"
    server = serve(
        port=free_port(),
        popen=output,
        workers=1,
        env=env,
        access_log=access_log,
        numbers={"PATIENCE": (0.25, 0.05)},
    )

    def fill():
        """Write more than the kernel has room for between the server and its reader."""
        for _ in range(100):
            with server.connect() as client:
                answer = client.get("/", f"User-Agent: {'x' * 4000}", "Connection: close")
                assert answer.status == 200
                assert client.ended()  # then it has been logged

    try:
        began = time.monotonic()
        fill()
        server.signal(SIGHUP)
        until(lambda: server.get().json["hupserve.generation"] == 2)
        fill()
        assert time.monotonic() - began < 10
        assert os.get_blocking(stuck.writer), "other programs write there, too"
        stuck.read()
        server.get()
        found = until(lambda: re.search(r"(\d+) log lines .*could not be written", stuck.read()))
        assert int(found[1]) > 10
        fill()
        stuck.read()
        [worker] = server.workers()
        server.signal(SIGHUP)
        until(lambda: not alive(worker))
        assert re.search(r"(\d+) log lines .*could not be written\s+.*process ends", stuck.read())
        fill()
        server.stop(SIGTERM)
    finally:
        stuck.close()


# A sitecustomize.py that hides /proc, as a chroot may.
WITHOUT_PROC = """
import os
real_open = os.open

def open(path, *arguments, **keywords):
    if str(path).startswith('/proc'):
        raise FileNotFoundError(2, 'no /proc')
    return real_open(path, *arguments, **keywords)

os.open = open
"""


SLOW_READER = """
import os, sys, time
while data := os.read(0, 65536):
    sys.stdout.buffer.write(data)
    time.sleep(0.02)
"""


@beyond_core
def test_15_but_a_reader_that_is_slow_gets_every_line(serve, folder):
    """Guards: a record waits a moment for a pipe that is full just now."""
    stuck = StuckReader("pipe")
    output = {"stdout": stuck.writer, "stderr": stuck.writer}
    server = serve(port=free_port(), popen=output, access_log="-")
    with open(folder / "read", "wb") as file, server.connect() as client:
        slow = subprocess.Popen([PYTHON, "-c", SLOW_READER], stdin=stuck.reader, stdout=file)
        stuck.close()
        for _ in range(1000):
            client.get("/", f"User-Agent: {'x' * 3000}")  # less than PIPE_BUF: a line is whole
        server.stop(SIGINT)
        assert slow.wait(DEADLINE) == 0
    lines = server.log("read")
    assert lines.count('"GET / HTTP/1.1" 200') == 1000
    assert "could not be written" not in lines


def test_15_the_disk_of_a_log_file_is_full_for_a_while(serve, folder):
    """stderr is told of it, and the log itself when there is room again."""
    log = folder / "link.log"
    log.symlink_to("/dev/full")
    server = serve(workers=1, access_log=log)
    for _ in range(3):
        server.get("/lost")
    server.wait_log("link.log: No space left on device")
    log.unlink()
    server.get("/found")
    server.wait_log(r"\d log lines .*\n(.*/lost.*\n)*.*/found", file="link.log")
    assert server.log().count("No space") == 1


# ==== the reload ==================================================================================


def test_reload_changes_the_number_of_workers(serve):
    server = serve()
    with Load(server) as load:
        for number in (5, 1, 3):
            server.reload(workers=number)
            until(lambda number=number: len(server.workers()) == number)
            load.more()
    assert load.lost == []


def test_reload_changes_the_number_of_threads(serve):
    server = serve(workers=1, threads=1)
    held = [server.hold("one")]
    with server.connect() as client:
        client.request("GET", "/waits")
        server.reload(threads=3)
        assert client.answer().json["hupserve.generation"] == 2
    held += [server.hold(name) for name in ("two", "three", "four")]
    server.release("one", "two", "three", "four")
    assert {client.answer().status for client in held} == {200}


def test_reload_workers_are_warm_before_clients_come(serve):
    """Guards: warm_up(). All clients come at the commit, and would wait for a first thread."""
    server = serve(workers=1)
    server.reload()
    [worker] = server.workers()
    assert len(os.listdir(f"/proc/{worker}/task")) == 2


def test_reload_adds_keeps_and_drops_addresses(serve):
    """A kept address keeps its socket, and a dropped one's queue is served.

    An added address answers from the commit on.
    """
    first = free_port()
    second = free_port()
    server = serve(workers=1, threads=1, listen=f"127.0.0.1:{first}", idle_grace=20)

    def sockets_of_second():
        return {link for link, port in listening().items() if port == second}

    server.reload(listen=f"127.0.0.1:{first} 127.0.0.1:{second}")
    assert server.get(address=second).status == 200
    sockets = sockets_of_second()
    busy = server.hold("busy")
    queued = [server.connect() for _ in range(20)]
    for client in queued:
        client.request("GET", "/queued")
    server.reload(listen=f"127.0.0.1:{second}")
    until(lambda: refused(first))
    assert sockets_of_second() == sockets
    assert server.get(address=second).json["hupserve.generation"] == 3
    server.release("busy")
    assert {client.answer().json["pid"] for client in [busy, *queued]} == {busy.worker}
    for client in queued:
        client.close()
    server.reload(listen=f"127.0.0.1:{second} 127.0.0.1:{first}")
    assert server.get(address=first).json["hupserve.generation"] == 4


@beyond_core
def test_reload_takes_back_an_address_that_an_old_worker_is_about_to_close(serve):
    """Guards: the short, bounded retry of bind."""
    first = free_port()
    second = free_port()
    rounds = 5
    server = serve(listen=f"127.0.0.1:{first}")
    for _ in range(rounds):
        server.reload(listen=f"127.0.0.1:{second}")
        server.reload(listen=f"127.0.0.1:{first}")
    assert server.get().json["hupserve.generation"] == 1 + 2 * rounds
    assert "rolled back" not in server.log()


def test_reload_changes_log_file_and_log_level(serve):
    server = serve()
    server.write(log_level="warning", log_file="other.log")
    server.signal()
    until(lambda: server.get().json["hupserve.generation"] == 2)
    os.kill(server.get().json["pid"], SIGKILL)
    server.wait_log("replaced", file="other.log")
    assert "generation" not in server.log("other.log"), "no INFO lines at this level"
    server.write(log_level="debug", log_file="third.log")
    server.signal()
    server.wait_log(r"generation (\d+) serves", file="third.log")
    with server.connect() as client:
        client.request("GET", "/endless?gone")
        client.more()
    until((server.folder / "gone.closed").exists)
    server.wait_log("DEBUG", file="third.log")
    assert "Traceback" not in server.log("third.log")


def test_reload_changes_pipeline_settings_and_code(serve):
    server = serve()
    assert server.get("/status").json["greeting"] == "hello", "there is no status filter yet"
    server.reload(sections=server.STATUS.replace("hello", "good day"))
    assert server.get("/status?format=json").json["workers"]
    assert server.get().json["greeting"] == "good day"
    server.write_app(APPLICATION.replace('"pid": os', '"code": "new", "pid": os'))
    server.reload(sections=server.APP)
    assert server.get("/status").json["code"] == "new"
    server.reload(sections="[app:main]\nwsgi = app:application\n")
    assert "greeting" not in server.get("/status").json


LOGGERS = """
[loggers]
keys = root, app
[handlers]
keys = own
[formatters]
keys = short
[logger_root]
level = INFO
handlers =
[logger_app]
level = INFO
handlers = own
qualname = app
[handler_own]
class = FileHandler
args = ('%(here)s/own.log',)
formatter = short
[formatter_short]
format = <%(levelname)s> %(message)s
"""


def test_reload_changes_the_loggers(serve):
    """[loggers] goes to logging.config.fileConfig, with %(here)s and single percent signs."""
    server = serve()
    server.get("/log?before")
    server.reload(sections=server.APP + LOGGERS)
    server.get("/log?first")
    assert server.log("own.log") == "<WARNING> 50% of first\n"
    server.reload(sections=server.APP + LOGGERS.replace("<%(levelname)s>", "%(levelname)s:"))
    server.get("/log?second")
    assert server.log("own.log") == "<WARNING> 50% of first\nWARNING: 50% of second\n"
    quiet = LOGGERS.replace("app]\nlevel = INFO", "app]\nlevel = ERROR")
    server.reload(sections=server.APP + quiet)
    server.get("/log?third")
    assert "third" not in server.log("own.log")


@beyond_core
def test_reload_is_held_up_by_no_idle_connection(serve):
    """The new generation answers at once, and the old one leaves after idle_grace."""
    server = serve(idle_grace=1)
    idle = [server.connect() for _ in range(600)]
    silent = [server.connect() for _ in range(100)]
    for client in idle:
        client.get()
    old = server.workers()
    server.reload()
    assert server.get().json["hupserve.generation"] == 2
    until(lambda: not any(alive(pid) for pid in old))
    assert all(client.ended() for client in idle + silent)


@beyond_core
def test_reload_drain_timeout_ends_what_takes_longer(serve):
    server = serve(workers=1, drain_timeout=1)
    held = server.hold("held")
    server.reload()
    with pytest.raises(ConnectionError):
        held.answer()
    until(lambda: not alive(held.worker))


class Footprint(NamedTuple):
    """What a process takes up."""

    threads: int
    links: list[str]  # the kind of each descriptor
    memory: int  # kB


# Kilobytes. PyPy's collector lets its heap grow by some megabytes before it begins.
MEMORY_SLACK = 10_000 if "pypy" in Path(PYTHON).name else 1000


@beyond_core
def test_reload_40_times_leaves_the_master_as_it_was(serve):
    """It has one thread, the same descriptors, the same memory, and no code of the application."""
    server = serve(workers=1)

    def footprint():
        lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        links = sorted(link.split(":")[0] for link in descriptors(server.pid))
        return Footprint(int(status["Threads"]), links, int(status["VmRSS"].split()[0]))

    for _ in range(10):
        server.reload()
    # One socket is the listener, the other one the line of the only worker.
    until(lambda: footprint().links.count("socket") == 2)
    before = footprint()
    assert before.threads == 1
    for _ in range(30):
        server.reload()
    until(lambda: footprint().links == before.links, "the master to hold what it held")
    after = footprint()
    assert after.threads == 1
    assert after.memory < before.memory + MEMORY_SLACK
    assert str(server.pid) not in server.log("imports").split()


@beyond_core
def test_a_drain_says_every_30_seconds_what_it_waits_for(serve):
    """Here it says so every second."""
    server = serve(numbers={"DRAIN_REPORT": (30.0, 1)})
    held = server.hold("held")
    server.reload()
    line = server.wait_log(".*still draining.*")[0]
    assert "127.0.0.1" in line
    assert "GET /hold" in line
    assert "held" not in line, "a query string may be secret"
    server.release("held")
    assert held.answer().closes


# ==== the simulated world =========================================================================
#
# Here alone something is replaced: the system under the master. The real Master, Child, Generation
# and Line run in a world of one thread, one clock and one random seed, as FoundationDB and
# TigerBeetle are tested. In it workers load, fail, hang, die, ask to leave and drain at random
# moments. Signals come at any stage. The configuration changes, for good or ill. Forks and binds
# fail. A history is what happens in one such world from the start of the master to its end. It is
# the same each time, by its seed. After every step of the master the world looks at what is.

HISTORIES = int(os.environ.get("HUPSERVE_HISTORIES", "2000"))
LONGEST_TRACE = 400  # of a history's last steps are printed if it is violated
NEVER = float("inf")
SIM_MASTER = 1000  # the pid of the master
SIM_STRANGER = 999  # a process that process 1 inherits, and reaps
SIM_TICK = 0.1  # seconds: with 0.02 most of the time would go by in looks at nothing new
SIM_LATE = 1.0  # seconds that the master's and a worker's loop may be late together
SIM_STALL = 6.0  # seconds at most in which a worker does nothing, and does not hang yet
SIM_QUIET = 300.0  # seconds in which all that has begun must have come to its end
SIM_FORCE = 15.0  # seconds in which a second stop must have ended everything
SIM_SPIN = 400  # wake-ups in one tick, more than ever had a reason
SIM_BUFFER = 200_000  # bytes that wait unread in a line
SIM_PORTS = (8001, 8002, 8003)


class Violation(AssertionError):
    """A promise is broken in a history. The text has its seed and its steps."""


class SimSocket:
    """A bound socket in the kernel, of which several processes may hold a copy."""

    def __init__(self, bind: Any):
        self.bind = bind
        self.copies = 0
        self.is_listening = False
        self.queued = 0  # clients that have not been accepted


class SimListener:
    """The master's copy of a listening socket: what its code sees as a Listener."""

    file = None  # it is no unix socket

    def __init__(self, world: World, sock: SimSocket):
        self.world = world
        self.sock = sock
        self.is_open = True
        sock.copies += 1
        world.open_listeners.add(self)

    def refuse_if_replaced(self) -> None:
        pass

    def set_file_mode(self, mode: object) -> None:
        pass

    def listen(self, backlog: int) -> None:
        self.world.interrupt()
        rival = self.world.bound(self.sock.bind)
        if self.world.takes_fault("listen") or (rival and rival is not self.sock):
            self.world.note("listen fails", self.sock.bind)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        self.world.note("listens", self.sock.bind)
        self.sock.is_listening = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.world.open_listeners.discard(self)
            self.world.note("master closes", self.sock.bind)
            self.world.look_at_close(self.sock)
            self.world.drop_copy(self.sock)


class SimEnd:
    """One end of a line. Linux gives what was sent, then a reset if the peer left input unread."""

    peer: SimEnd
    worker: SimWorker | None = None  # it holds this end, the master the other

    def __init__(self, world: World):
        self.world = world
        self.inbox = b""
        self.copies = 1  # in the master and, after a fork, in the worker
        self.is_reset = False

    def setblocking(self, flag: bool) -> None:
        pass

    def fileno(self) -> int:
        return 0

    def is_readable(self) -> bool:
        return bool(self.inbox) or self.is_reset or not self.peer.copies

    def recv(self, size: int) -> bytes:
        if self.inbox:
            data, self.inbox = self.inbox[:size], self.inbox[size:]
            return data
        if self.is_reset:
            self.is_reset = False
            raise ConnectionResetError
        if self.peer.copies:
            raise BlockingIOError
        return b""

    def sendall(self, data: bytes) -> None:
        """The master says something: the world looks at it, and the worker will read it."""
        if not self.copies:
            raise OSError(errno.EBADF, "Bad file descriptor")
        worker = self.peer.worker
        if worker:
            self.world.interrupt()
            self.world.look_at_words(worker, json.loads(data))
        if not self.peer.copies:
            raise BrokenPipeError
        if len(self.peer.inbox) > SIM_BUFFER:
            raise BlockingIOError
        self.peer.inbox += data
        if worker:
            self.world.after(self.world.small_delay(), worker.read, worker)

    def close(self) -> None:
        self.copies -= 1
        if not self.copies and self.inbox:
            self.inbox = b""
            self.peer.is_reset = True


class SimWorker:
    """A worker as the world has it. Its side of the protocol is told once more, in small."""

    place: Any = None  # the Child in whose place it is
    life = "loading"  # then ready, serving, draining, exiting, dead
    hangs = False
    stalled_until = 0.0  # SIGSTOP, then SIGCONT
    status: int | None = None  # wait status, once it is dead
    is_reaped = False
    has_said_ready = False
    has_hurried = False
    hurried_in = -1  # in which turn of the master
    why = ""  # it asks to leave
    is_being_replaced = False
    was_told_go = False
    has_begun = False  # it has said that it serves
    served_at = NEVER  # when it was told to go
    told_go_in = -1  # in which turn of the master
    told_at = NEVER  # when it was ordered to drain
    exiting_at = NEVER
    was_signalled = False  # the SIGHUP after the order
    was_aborted = False
    was_killed = False

    def __init__(self, world: World, pid: int, end: SimEnd, place: Any):
        self.world = world
        self.pid = pid
        self.end = end
        self.place = place
        self.generation = place.generation
        self.key = (place.generation.number, place.number)
        self.forked_at = world.now
        self.orders: list[float] = []  # the grace of each order to drain
        self.sockets: list[tuple[str, SimSocket]] = []
        for address, listeners in self.generation.listeners.items():
            for listener in listeners:
                listener.sock.copies += 1
                self.sockets.append((address, listener.sock))
        end.worker = self
        end.copies += 1

    def __str__(self) -> str:
        return f"worker {self.place.number} of {self.generation.number} (pid {self.pid})"

    def may_accept(self) -> bool:
        """Has the master told it to serve, and not to drain, as far as the master can know?"""
        return self.was_told_go and not self.orders and not self.is_reaped

    def may_become_useful(self) -> bool:
        """Does it come up, without anything against it?"""
        begins = self.life in ("loading", "ready") and not self.was_told_go
        return begins and not self.orders and not self.was_killed and not self.was_aborted

    def say(self, *words: object) -> None:
        self.world.note(self, "says", words)
        if self.end.peer.copies:
            self.end.peer.inbox += json.dumps(words).encode() + b"\n"

    def boot(self, fate: str) -> None:
        if fate == "ready":
            self.life = "ready"
            self.has_said_ready = True
            self.say("ready")
            self.world.after(0, self.read, self)
        elif fate == "fails":
            self.say("failed", 1, "it cannot load")
            self.die(1 << 8)
        elif fate == "dies":
            self.die(signal.SIGSEGV)

    def read(self) -> None:
        """Act on the master's words. While it loads it does not look."""
        if self.life == "loading":
            return
        data, self.end.inbox = self.end.inbox, b""
        for line in data.splitlines():
            word, *arguments = json.loads(line)
            if word == "go":
                self.life = "serving"
                self.accept()
                self.world.after(self.world.small_delay(), self.begin, self)
                if self.world.has("early leave") and self.world.chance(0.2):
                    self.ask_to_leave(self.world.random.choice(("SIGTERM", "max_requests")))
            elif word == "drain" and self.life in ("ready", "serving"):
                self.drain(arguments[0])

    def begin(self) -> None:
        """Say that it serves, at the end of the round in which it was told to."""
        if self.life == "serving":
            self.has_begun = True
            self.say("serving")

    def accept(self) -> None:
        if self.life == "serving":
            for _, sock in self.sockets:
                sock.queued = 0

    def drain(self, dropped: list[str]) -> None:
        for address, sock in self.sockets:
            if self.life == "serving" and address in dropped:
                sock.queued = 0
        self.life = "draining"
        self.close_listeners()
        slow = self.world.has("slow requests") and self.world.chance(0.2)
        seconds = self.world.random.uniform(0, 40 if slow else 1)
        limit = self.generation.config.drain_timeout
        self.world.after(min(seconds, limit or NEVER), self.finish, self)

    def finish(self) -> None:
        self.life = "exiting"
        self.exiting_at = self.world.now
        self.say("exiting")
        if self.world.has("hanging") and not self.world.is_calm and self.world.chance(0.05):
            self.hang()
        else:
            self.world.after(self.world.small_delay(), functools.partial(self.die, 0), self)

    def ask_to_leave(self, why: str) -> None:
        """A SIGTERM, or max_requests: the worker's half of WorkerLife.ask_to_leave()."""
        if self.life != "serving":
            return
        if not self.why or (self.why == "max_requests" != why):
            self.why = why
            self.say("leaving", why)
        elif why != "max_requests":
            self.has_hurried = True
            self.hurried_in = self.world.turn
            self.world.excused = True  # nobody serves until its successor does
            self.say("hurry")

    def hang(self) -> None:
        self.world.note(self, "hangs")
        self.world.excuse(self)
        self.hangs = True

    def die(self, status: int) -> None:
        """The kernel closes its descriptors first; then the master's wait finds it."""
        if self.life == "dead":
            return
        self.world.note(self, "dies, wait status", status)
        if self.life in ("loading", "ready", "serving"):
            self.world.excuse(self)
        self.life = "dead"
        self.end.close()
        self.close_listeners()
        late = self.world.small_delay() if self.world.chance(0.2) else 0
        self.world.after(late, functools.partial(self.become_zombie, status))

    def become_zombie(self, status: int) -> None:
        self.status = status
        self.world.zombies.append(self)
        self.world.ring(signal.SIGCHLD)

    def close_listeners(self) -> None:
        for _, sock in self.sockets:
            self.world.drop_copy(sock)
        self.sockets = []


class SimBell:
    """What the master hears of signals."""

    def __init__(self, world: World):
        self.world = world
        self.received: list[int] = []
        world.bell = self

    def handle(self, *signals: int) -> None:
        pass

    def fileno(self) -> int:
        return 0

    def take_signals(self) -> list[int]:
        self.world.interrupt()
        received, self.received = self.received, []
        for number in received:
            if number == SIGHUP and not self.world.has_stopped:
                self.world.hups_taken += 1
            elif number in (SIGTERM, SIGQUIT, SIGINT):
                self.world.take_stop()
        return received


class SimPoll:
    """select.poll(). It is the only place where the master waits; there the world moves."""

    def __init__(self, world: World):
        self.world = world
        self.lines: list[Any] = []

    def register(self, source: Any, event: int) -> None:
        if source is not self.world.bell:
            self.world.expect(not source.ended, "the master polls a line that has ended")
            self.lines.append(source)

    def poll(self, timeout: float | None) -> list[object]:
        until_then = NEVER if timeout is None else self.world.now + timeout / 1000
        self.world.sleep(self.lines, until_then)
        return []


class World:
    """One history: everything outside of the master, and the promises."""

    master: Any
    bell: SimBell

    # What may happen in a history, and how often compared to the others.
    HAPPENINGS = {
        "hup": 8,
        "many hups": 2,
        "stop": 1,
        "edit": 8,
        "mistake": 3,
        "broken code": 2,
        "mended code": 3,
        "worker asked to leave": 5,
        "worker has answered max_requests": 4,
        "worker dies": 5,
        "all workers die": 4,
        "worker hangs": 2,
        "worker stalls": 2,
        "group signal": 1,
        "fault": 4,
        "client": 10,
        "machine sleeps": 1,
        "noise": 1,
    }

    def __init__(self, simulation: Simulation, seed: int):
        self.simulation = simulation
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 1000.0
        self.woke_at = self.now
        self.turn = 0
        self.trace: collections.deque[tuple[object, ...]] = collections.deque(maxlen=LONGEST_TRACE)
        self.steps = itertools.count()
        self.events: list[tuple[float, int, Callable[[], None], SimWorker | None]] = []
        self.next_pid = SIM_MASTER
        self.workers: list[SimWorker] = []  # not reaped yet
        self.zombies: list[SimWorker] = []
        self.orphans = 0
        self.bereaved: list[Any] = []  # generations, by a death in this turn of the master
        self.last_end: SimEnd | None = None  # of the last socketpair
        self.sockets: list[SimSocket] = []  # some process holds a copy
        self.open_listeners: set[SimListener] = set()
        # Of each place: its deaths in a row; from when on a fork is due, if one is; and 0 if the
        # last life was about as long as STEADY, so that the number is not certain.
        self.places: dict[tuple[int, int], list[float]]
        self.places = collections.defaultdict(lambda: [0, 0, 1])
        self.served: dict[str, list[SimListener]] = {}  # what the current generation listens on
        self.faults: dict[str, float] = {}  # until when
        self.last_fork_failure = -NEVER
        self.last_sleep = -NEVER
        self.is_mask_blocked = False
        self.code_is_broken = False
        self.is_calm = False
        self.is_changed = False  # a last reload was ordered
        self.ends_at = NEVER
        self.excused = False  # a worker died or hung: clients may have been lost with it
        self.has_stopped = False
        self.is_forced = False
        self.hups_taken = 0
        self.hups_answered = 0
        self.is_reloading = False
        self.must_say_stopping = 0  # times
        self.said_stopping = 0
        self.sleeps_until = self.now  # if nothing happens before
        self.staged_in = 0  # in which turn a stage has changed
        self.wakeups = 0  # since then
        self.counts_from = self.now
        # Each history has its own selection, so that some are calm and some are full of one kind.
        names = sorted(self.HAPPENINGS)
        self.selection = {name for name in names if self.chance(0.6)}
        self.features = {
            name
            for name in ("slow requests", "hanging", "failing", "interrupts", "early leave")
            if self.chance(0.5)
        }
        self.weights = [self.HAPPENINGS[name] * (name in self.selection) for name in names]
        self.names = names
        self.pidfiles: set[str] = set()
        self.config = self.any_config()
        self.log_file = self.config.log_file
        self.disk: Any = self.config  # what the ini says; None: it has a mistake
        self.adopted: dict[Any, SimListener] = {}
        if self.chance(0.1):
            self.adopt((socket.AF_INET, ("127.0.0.1", SIM_PORTS[0])))
        if self.chance(0.03):
            self.config = self.config._replace(listen={}, workers=1, pidfile="")

    # Chance
    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def small_delay(self) -> float:
        """Return the seconds that a process needs to come round to something."""
        return self.random.choice((0.0, 0.0001, 0.003, 0.05, 0.3)) * self.random.random()

    def has(self, feature: str) -> bool:
        return feature in self.features

    def any_config(self) -> Any:
        pick = self.random.choice
        ports = [port for port in SIM_PORTS if self.chance(0.6)] or [SIM_PORTS[0]]
        return self.simulation.config._replace(
            listen=dict(map(self.any_address, ports)),
            workers=pick((1, 2, 2, 3)),
            pidfile=pick(("", "/a.pid", "/b.pid")),
            log_file=pick(("-", "/a.log", "/b.log")),
            hang_timeout=pick((0, 20, 60)),
            boot_timeout=pick((1, 3)),
            drain_timeout=pick((0, 0, 5)),
            idle_grace=pick((0, 5)),
            backlog=next(self.steps) + 1,  # it tells the readings apart
        )

    def any_address(self, port: int) -> tuple[str, Any]:
        """Return an address. Now and then it overlaps the one that is served at this port."""
        hosts = ["127.0.0.1", "0.0.0.0"]
        if self.is_calm:
            hosts = [host for host in hosts if f"{host}:{port}" in self.served] or hosts
        host = hosts[self.chance(0.03) and not self.is_calm]
        return f"{host}:{port}", ((socket.AF_INET, (host, port)),)

    def adopt(self, bind: Any) -> None:
        sock = SimSocket(bind)
        sock.is_listening = True
        self.sockets.append(sock)
        self.adopted[bind] = SimListener(self, sock)

    # Time
    def after(
        self, seconds: float, action: Callable[[], None], worker: SimWorker | None = None
    ) -> None:
        """Let something happen later; if it is a worker's, then only if it can still act."""
        heapq.heappush(self.events, (self.now + seconds, next(self.steps), action, worker))

    def happen(self) -> None:
        """Let the next event happen."""
        when, _, action, worker = heapq.heappop(self.events)
        self.now = max(self.now, when)
        if worker is None:
            action()
        elif worker.life == "dead" or worker.hangs:
            pass
        elif worker.stalled_until > self.now:
            self.after(worker.stalled_until - self.now, action, worker)
        else:
            action()

    def interrupt(self) -> None:
        """Between two system calls of the master the world may move, too."""
        if self.has("interrupts") and self.chance(0.1):
            self.pass_time(self.small_delay())

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.events and self.events[0][0] <= end:
            self.happen()
        self.now = max(self.now, end)

    def sleep(self, lines: list[Any], until_then: float) -> None:
        """The master waits. Look at what it has done, then go on to its next wake-up."""
        self.sleeps_until = until_then
        self.look_around()
        while not (self.bell.received or any(line.sock.is_readable() for line in lines)):
            if not self.events or self.events[0][0] > until_then:
                self.look_at_the_end()
                if self.bell.received or (self.events and self.events[0][0] <= until_then):
                    continue
                if until_then == NEVER and not self.helps_itself():
                    self.violated(f"the master sleeps for ever, and {self.what_is_missing()}")
                if until_then == NEVER:
                    break
                self.now = max(self.now, until_then)
                break
            self.happen()
        if self.chance(0.2):  # the machine is busy
            self.pass_time(self.small_delay())
        self.wakeups += 1
        if self.now > self.counts_from + SIM_TICK:
            self.wakeups = 0
            self.counts_from = self.now
        self.expect(self.wakeups < SIM_SPIN, "the master spins")
        self.woke_at = self.now
        self.turn += 1

    # What happens
    def plan(self) -> None:
        when = 0.0
        for _ in range(self.random.randrange(2, 16)):
            when += self.random.choice((0, 0.01, 0.3, 0.3, 2, 12)) * self.random.random()
            if any(self.weights):
                (name,) = self.random.choices(self.names, self.weights)
                self.after(when, functools.partial(self.let, name))
        self.after(when + self.random.random(), self.become_calm)

    def let(self, name: str) -> None:
        self.note("----", name)
        getattr(self, "let_" + re.sub(r"\W+", "_", name))()

    def let_hup(self) -> None:
        self.ring(SIGHUP)

    def let_many_hups(self) -> None:
        for _ in range(self.random.randrange(2, 30)):
            self.after(self.small_delay(), self.let_hup)

    def let_stop(self) -> None:
        self.let_client()
        self.ring(self.random.choice((SIGTERM, SIGTERM, SIGQUIT, SIGINT)))
        if self.chance(0.5):
            self.after(self.small_delay(), self.let_stop)

    def let_edit(self) -> None:
        self.disk = self.any_config()
        self.let_client()
        if self.chance(0.7):
            self.ring(SIGHUP)

    def let_mistake(self) -> None:
        self.disk = None
        if self.chance(0.7):
            self.ring(SIGHUP)

    def let_broken_code(self) -> None:
        self.code_is_broken = True
        if self.chance(0.3):
            self.let_all_workers_die()

    def let_mended_code(self) -> None:
        self.code_is_broken = False

    def any_worker(self) -> list[SimWorker]:
        """Return a worker that acts, if there is one."""
        acting = [each for each in self.workers if each.life != "dead" and not each.hangs]
        return [self.random.choice(acting)] if acting else []

    def let_worker_asked_to_leave(self) -> None:
        for worker in self.any_worker():
            worker.ask_to_leave("SIGTERM")
            if self.chance(0.3):
                again = functools.partial(worker.ask_to_leave, "SIGTERM")
                self.after(self.small_delay(), again, worker)

    def let_worker_has_answered_max_requests(self) -> None:
        for worker in list(self.workers):
            if self.chance(0.7) and not worker.hangs:
                worker.ask_to_leave("max_requests")

    def let_worker_dies(self) -> None:
        for worker in self.any_worker():
            worker.die(self.random.choice((1 << 8, 0, SIGKILL, signal.SIGSEGV)))

    def let_all_workers_die(self) -> None:
        """Out of memory, say. Half of the time the operator stops the server at that."""
        for worker in list(self.workers):
            self.after(self.small_delay(), functools.partial(worker.die, int(SIGKILL)), worker)
        if self.chance(0.5):
            self.after(self.small_delay(), self.let_client)
            self.after(self.small_delay(), self.let_stop)

    def let_worker_hangs(self) -> None:
        for worker in self.any_worker():
            worker.hang()

    def let_worker_stalls(self) -> None:
        for worker in self.any_worker():
            worker.stalled_until = self.now + self.random.uniform(0, SIM_STALL)

    def let_group_signal(self) -> None:
        number = self.random.choice((SIGHUP, SIGTERM))
        self.ring(number)
        if number == SIGTERM:
            for worker in list(self.workers):
                if not worker.hangs:
                    ask = functools.partial(worker.ask_to_leave, "SIGTERM")
                    self.after(self.small_delay(), ask, worker)

    def let_fault(self) -> None:
        name = self.random.choice(("fork", "fork", "bind", "listen", "logs", "pidfile"))
        self.faults[name] = self.now + self.random.uniform(0, 3)

    def let_client(self) -> None:
        """A client connects to an address that is served."""
        current = self.master.current
        for address in current.listeners:
            (bind,) = current.config.listen[address]
            sock = self.bound(bind)
            if sock:
                sock.queued += 1
                for worker in self.workers:
                    self.after(self.small_delay(), worker.accept, worker)
            else:
                self.expect(self.has_stopped, "a client is refused at", address)

    def let_machine_sleeps(self) -> None:
        """Everything stands still. Afterwards the master may be the first that runs again."""
        seconds = self.random.uniform(1, 200)
        self.now += seconds
        self.ends_at += seconds
        self.last_sleep = self.now
        for worker in self.workers:
            worker.stalled_until = max(worker.stalled_until, self.now + self.small_delay())
        self.ring(signal.SIGCHLD)

    def let_noise(self) -> None:
        self.orphans += 1
        self.ring(SIGUSR1)

    def ring(self, number: int) -> None:
        self.note("signal", number)
        self.bell.received.append(number)

    def take_stop(self) -> None:
        """The master learns of a stop."""
        if self.has_stopped or self.master.stopping:
            self.is_forced = True
            self.ends_at = self.now + SIM_FORCE
        else:
            self.must_say_stopping = 1
            self.ends_at = self.now + SIM_QUIET
        self.has_stopped = True

    def takes_fault(self, name: str) -> bool:
        return self.now < self.faults.get(name, 0) and self.chance(0.7)

    def become_calm(self) -> None:
        """From now on nothing new goes wrong. In the end the master is stopped."""
        self.note("---- calm")
        self.is_calm = True
        self.code_is_broken = False
        self.faults.clear()
        self.disk = self.disk or self.config
        if self.ends_at == NEVER:
            self.ends_at = self.now + SIM_QUIET

    # The system calls
    def fork(self) -> int:
        self.interrupt()
        self.expect(self.is_mask_blocked, "a fork without blocked signals")
        place = self.simulation.spawning
        assert self.last_end
        pause_is_over = self.woke_at > self.last_fork_failure + self.simulation.pause - 1e-6
        self.expect(pause_is_over, "a fork is tried again without a pause")
        if self.takes_fault("fork"):
            self.note("fork fails")
            self.last_fork_failure = self.woke_at
            self.excused = True
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        self.look_at_fork(place)
        self.next_pid += 1
        worker = SimWorker(self, self.next_pid, self.last_end, place)
        self.workers.append(worker)
        self.note("fork:", worker)
        fate = "ready"
        if not self.is_calm and self.code_is_broken:
            fate = "fails"
        elif not self.is_calm and self.has("failing"):
            fates = ("ready", "ready", "ready", "ready", "fails", "dies", "hangs")
            fate = self.random.choice(fates)
        if fate == "hangs":
            worker.hangs = True
        else:
            slowest = 0.2 if self.is_calm else self.random.choice((0.01, 0.2, 0.9))
            seconds = slowest * self.random.random()
            self.after(seconds, functools.partial(worker.boot, fate), worker)
        return worker.pid

    def kill(self, pid: int, number: int) -> None:
        self.interrupt()
        found = [worker for worker in self.workers if worker.pid == pid]
        self.expect(found, "a signal to a stranger:", pid)
        (worker,) = found
        self.note("kill", worker, number)
        if number == SIGHUP:
            self.expect(worker.orders, worker, "is sent SIGHUP without an order")
            self.expect(not worker.was_signalled, worker, "is sent SIGHUP twice")
            worker.was_signalled = True
            self.after(self.small_delay(), worker.read, worker)
        elif number == signal.SIGABRT:
            self.look_at_abort(worker)
            worker.was_aborted = True
            if self.chance(0.7):
                self.after(self.small_delay(), functools.partial(worker.die, int(SIGABRT)))
        elif number == SIGKILL:
            self.look_at_kill(worker)
            worker.was_killed = True
            stuck = 3 if self.chance(0.05) else 0.01
            end = functools.partial(worker.die, SIGKILL)
            self.after(stuck * self.random.random(), end)

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        self.interrupt()
        assert options == os.WNOHANG
        if self.orphans and pid == -1:
            self.orphans -= 1
            return SIM_STRANGER, 0
        for worker in self.zombies:
            if pid in (-1, worker.pid):
                self.zombies.remove(worker)
                self.workers.remove(worker)
                worker.is_reaped = True
                self.note("reaped:", worker)
                self.count_death(worker)
                self.bereaved.append(worker.generation)
                assert worker.status is not None
                return worker.pid, worker.status
        if not any(pid in (-1, worker.pid) for worker in self.workers):
            raise ChildProcessError
        return 0, 0

    def waitid(self, *_: object) -> None:
        raise ChildProcessError

    def pthread_sigmask(self, how: int, mask: Iterable[int]) -> set[int]:
        self.is_mask_blocked = how == signal.SIG_BLOCK
        return set()

    def socketpair(self) -> tuple[SimEnd, SimEnd]:
        ours, theirs = SimEnd(self), SimEnd(self)
        ours.peer, theirs.peer = theirs, ours
        self.last_end = theirs
        return ours, theirs

    def open_listeners_of(self, binds: Any, adopted: Any) -> list[SimListener]:
        self.interrupt()
        listeners = []
        for bind in binds:
            if bind in adopted:
                listeners.append(SimListener(self, adopted[bind].sock))
                continue
            if self.bound(bind):
                self.note("bind: in use", bind)
                raise OSError(errno.EADDRINUSE, "Address already in use")
            if self.takes_fault("bind"):
                self.note("bind fails", bind)
                raise OSError(errno.EACCES, "Permission denied")
            sock = SimSocket(bind)
            self.sockets.append(sock)
            self.note("binds", bind)
            listeners.append(SimListener(self, sock))
        return listeners

    def bound(self, bind: Any) -> SimSocket | None:
        """Return the listening socket at this port, if there is one."""
        _, (_, port) = bind
        for sock in self.sockets:
            if sock.bind[1][1] == port and sock.is_listening:
                return sock
        return None

    def drop_copy(self, sock: SimSocket) -> None:
        sock.copies -= 1
        if not sock.copies:
            self.sockets.remove(sock)
            lost = sock.queued and not self.excused and not self.is_forced
            self.expect(not lost, "queued clients are reset at", sock.bind)

    def read_config(self, *_: object) -> Any:
        self.interrupt()
        self.expect(not self.has_stopped, "a reload begins after a stop")
        self.expect(not self.master.stopping, "a reload begins after the start has failed")
        self.hups_answered = self.hups_taken
        if self.disk is None:
            self.note("reads a mistake")
            raise self.simulation.names["ConfigError"]("sim.ini: a mistake")
        self.note("reads", self.disk.backlog, list(self.disk.listen), self.disk.workers)
        return self.disk

    def write_pidfile(self, config: Any, undo: contextlib.ExitStack) -> None:
        if config.pidfile and self.takes_fault("pidfile"):
            self.note("the pidfile cannot be written")
            raise self.simulation.names["ConfigError"]("pidfile: a fault")
        if config.pidfile and config.pidfile not in self.pidfiles:
            undo.callback(self.pidfiles.discard, config.pidfile)
            self.pidfiles.add(config.pidfile)

    def open_logs(self, config: Any, *_: object) -> Any:
        if self.takes_fault("logs"):
            self.note("the logs cannot be opened")
            raise self.simulation.names["ConfigError"]("log_file: a fault")
        return config

    def use_logs(self, config: Any) -> None:
        self.log_file = config.log_file

    def sd_notify(self, address: str, state: str, status: str) -> None:
        self.interrupt()
        self.note("notify", state)
        self.said_stopping += state == "STOPPING=1"
        if state.startswith("RELOADING=1"):
            self.expect(not self.is_reloading, "RELOADING twice without READY")
            self.expect("MONOTONIC_USEC=" in state, "RELOADING without its time")
            self.is_reloading = True
        elif state:
            self.is_reloading = False

    # The promises
    def expect(self, condition: object, *what: object) -> None:
        if not condition:
            self.violated(" ".join(map(str, what)))

    def violated(self, what: str) -> NoReturn:
        raise Violation(f"seed {self.seed}: {what}\n{self.story()}")

    def story(self) -> str:
        return "\n".join(f"{when:10.4f}  {' '.join(map(str, what))}" for when, *what in self.trace)

    def note(self, *what: object) -> None:
        self.trace.append((self.now, *what))

    def excuse(self, worker: SimWorker) -> None:
        """A worker is lost. Clients that only it could have answered may be lost, too.

        If it is ready, its generation may just be committing.
        """
        if worker.has_said_ready or worker.generation is self.master.current:
            self.excused = True

    def look_at_life(self, child: Any, life: Any) -> None:
        old = child.life.name
        self.note("worker", child.number, "of", child.generation.number, old, "->", life.name)
        moves = self.simulation.lives[old]
        self.expect(old == life.name != "DRAINING" or life.name in moves, f"{old} -> {life.name}")

    def look_at_stage(self, generation: Any, stage: Any) -> None:
        old = generation.stage.name
        self.note("generation", generation.number, old, "->", stage.name)
        self.staged_in = self.turn
        self.expect(stage.name in self.simulation.stages[old], f"{old} -> {stage.name}")
        if stage.name == "CURRENT":
            self.look_at_commit(generation)
        elif stage.name == "VOID":
            self.look_at_roll_back(generation)

    def look_at_commit(self, new: Any) -> None:
        """Every new worker is ready, and an address that stays keeps its sockets."""
        self.expect(not self.has_stopped, "a commit after a stop")
        ready = {
            worker.place.number
            for worker in self.workers
            if worker.generation is new and worker.has_said_ready
        }
        self.expect(len(ready) == new.config.workers, "a commit before every worker is ready")
        self.expect(len(new.children) == new.config.workers, "a wrong number of workers")
        for address in new.listeners.keys() & self.served.keys():
            kept = new.listeners[address] == self.served[address]
            self.expect(kept, address, "is in both configurations, and is bound again")

    def look_at_roll_back(self, generation: Any) -> None:
        """No client has seen it (unless it was the second of two listen() that failed)."""
        current = self.master.current.listeners
        for address, listeners in generation.listeners.items():
            if address not in current and "listen" not in self.faults:
                seen = [each for each in listeners if each.sock.is_listening]
                self.expect(self.adopted or not seen, "a roll-back after listen() at", address)

    def look_at_words(self, worker: SimWorker, words: list[Any]) -> None:
        """The master says something to a worker."""
        word, *arguments = words
        if word == "go":
            self.note("go", worker)
            self.expect(worker.has_said_ready, worker, "is told to go before it is ready")
            self.expect(not worker.was_told_go, worker, "is told to go twice")
            worker.was_told_go = True
            worker.told_go_in = self.turn
            worker.served_at = self.now
        elif word == "drain":
            dropped, grace = arguments
            self.note("drain", worker, dropped, grace)
            if worker.orders:
                self.expect(grace < worker.orders[-1] or not grace, worker, "is told twice")
            elif worker.place.life.name != "DRAINING":  # INT's second order goes to all
                self.look_at_order(worker, dropped)
                worker.told_at = self.now
                worker.orders.append(grace)
                key = worker.key
                has_successor = any(each.key == key for each in self.workers if each is not worker)
                if worker.has_hurried and not has_successor and not self.places[key][1]:
                    self.places[key] = [0, 0, 1]

    def look_at_order(self, worker: SimWorker, dropped: list[str]) -> None:
        """Invariant 4, and rule 4."""
        for listener in self.open_listeners:
            for address, sock in worker.sockets:
                is_copy = listener.sock is sock and listener not in self.adopted.values()
                self.expect(not (is_copy and address in dropped), "an order before the close")
        if self.has_stopped or worker.has_hurried:
            return
        current = self.master.current
        if worker.generation is current:
            heirs = [
                each
                for each in self.workers
                if each.generation is current
                and each.place.number == worker.place.number
                and each is not worker
                and each.has_begun
            ]
            self.expect(heirs, worker, "is to drain before its successor serves")
        elif worker.was_told_go:
            for place in current.children:
                served = place.life.name in ("SERVING", "LEAVING")
                self.expect(served, worker, "is to drain before every new worker serves")

    def look_at_close(self, sock: SimSocket) -> None:
        """At a stop: is there nobody for the queue but a worker that comes up?"""
        if not self.has_stopped or self.is_forced or not sock.is_listening:
            return
        if any(sock is each.sock for each in self.adopted.values()):
            return
        holders = [each for each in self.workers if any(sock is mine for _, mine in each.sockets)]
        coming = [each for each in holders if each.may_become_useful()]
        accepting = any(each.may_accept() for each in self.workers)
        late = sock.queued and coming and not accepting
        self.expect(not late, "a stop does not let", *coming[:1], "answer the queue")

    def look_at_abort(self, worker: SimWorker) -> None:
        config = worker.generation.config
        limit = config.drain_timeout
        drained_at = worker.told_at + (limit + self.simulation.overtime if limit else NEVER)
        legitimate = (
            (worker.hangs and not self.is_unwatched(worker))
            or worker.life == "dead"
            or (
                worker.life in ("loading", "ready")
                and self.now >= worker.forked_at + config.boot_timeout
            )
            or self.now >= drained_at
            or self.now >= worker.exiting_at + self.simulation.overtime
        )
        self.expect(legitimate, worker, "is aborted, though it does not hang")

    def look_at_kill(self, worker: SimWorker) -> None:
        if worker.was_aborted or worker.was_killed or self.is_forced:
            return
        self.expect(not worker.was_told_go, worker, "is killed while it serves")
        is_current = worker.generation is self.master.current
        self.expect(not is_current or self.has_stopped, worker, "is killed without a reason")

    def look_at_fork(self, place: Any) -> None:
        """Invariant 9, and that a place has one worker."""
        key = (place.generation.number, place.number)
        others = [each for each in self.workers if not each.orders]
        self.expect(not self.is_forced, "a fork after a second stop")
        if self.has_stopped:
            serving = any(each.may_accept() and each.told_go_in < self.turn for each in others)
            self.expect(not serving, "a fork after a stop, though a worker serves")
            self.expect(self.places[key][0] <= 1, "a stop forks in a place that has its back-off")
        rivals = [each for each in others if each.key == key]
        leaving = [each for each in rivals if each.why]
        self.expect(len(rivals) == len(leaving) <= 1, "two workers in one place")
        _, due, certain = self.places[key]
        if leaving and not due:
            self.places[key] = [0, 0, 1]
            for each in others:
                self.expect(
                    not (each.why == leaving[0].why == "max_requests" and each.is_being_replaced),
                    "two workers are replaced for max_requests",
                )
            leaving[0].is_being_replaced = True
        if due and certain:
            self.expect(self.woke_at > due - 1e-6, "a fork before the back-off is over")
            late = self.woke_at - max(due, self.last_fork_failure, self.last_sleep)
            self.expect(late < SIM_LATE, "a replacement comes late")
        if due:
            self.places[key][1] = 0

    def count_death(self, worker: SimWorker) -> None:
        """Note from when on its place may have a new worker."""
        if worker.orders or worker.was_killed and not worker.was_aborted and not worker.was_told_go:
            return
        later = [each for each in self.workers if each.key == worker.key and each.pid > worker.pid]
        place = self.places[worker.key]
        if worker.why and (place[1] or any(not each.orders for each in later)):
            return  # its successor has begun, or is due
        served = self.woke_at - worker.served_at
        if worker.why or served > self.simulation.steady:
            place[0] = 0
        pauses = self.simulation.back_off
        place[1] = self.woke_at + pauses[min(int(place[0]), len(pauses) - 1)]
        place[2] = abs(served - self.simulation.steady) > SIM_LATE
        if not worker.why:
            place[0] += 1

    def look_around(self) -> None:
        """After every turn of the master: what is true whatever has happened?"""
        master = self.master
        current = master.current
        known = {worker.pid for worker in self.workers}
        self.expect(master.children.keys() == known, "the master does not know its children")
        wanted = {each for listeners in current.listeners.values() for each in listeners}
        for listener in wanted:
            self.expect(listener.is_open, "an address of the configuration is closed")
            self.expect(listener.sock.is_listening, "an address does not listen")
        if master.upcoming:
            for listeners in master.upcoming.listeners.values():
                wanted.update(listeners)
        wanted.update(self.adopted.values())
        self.expect(self.open_listeners == wanted, "a listener is left open")
        self.expect(self.log_file == current.config.log_file, "the logs are another generation's")
        self.served = current.listeners
        pidfiles = {current.config.pidfile} - {""}
        self.expect(self.pidfiles == pidfiles, "pidfiles:", self.pidfiles, "not", pidfiles)
        is_reloading = bool(master.upcoming and current.number and not master.stopping)
        self.expect(self.is_reloading == is_reloading, "RELOADING without an end by READY")
        self.expect(not self.is_mask_blocked, "signals stay blocked")
        for generation in self.bereaved:
            self.expect(generation is not master.upcoming, "a reload outlives its worker")
        self.bereaved.clear()
        if not self.bell.received:
            self.expect(not self.zombies, "a death is overlooked")
        if master.upcoming:
            self.look_at_patience(master.upcoming)
        for worker in self.workers:
            self.look_at(worker)
        self.look_at_the_end()

    def look_at_patience(self, new: Any) -> None:
        """A reload has its time, and so has each of its workers."""
        is_binding = new.stage.name == "BINDING"
        limit = self.simulation.bind_patience if is_binding else new.config.boot_timeout
        forks = [child.since for child in new.children if child.life.name == "BOOTING"]
        is_over = self.woke_at > max([new.begun_at, *forks]) + limit
        if any(child.kill_at < math.inf for child in new.children):
            return  # one was aborted: its death ends the reload
        self.expect(not is_over or self.staged_in == self.turn, "a reload takes too long")

    def look_at(self, worker: SimWorker) -> None:
        master = self.master
        if worker.life == "dead":
            return
        if self.is_forced:
            self.expect(worker.was_killed, worker, "outlives a second stop")
            return
        if self.has_stopped and worker.may_accept() and worker.told_go_in < self.turn:
            self.violated(f"{worker} is not told of the stop")
        if self.has_stopped and worker.may_accept():
            soon = self.now + SIM_LATE
            self.expect(self.sleeps_until < soon, "a stop sleeps, though", worker, "serves")
        if worker.place.predecessor:  # it waits for its turn
            worker.hurried_in = self.turn
        if worker.has_hurried and worker.may_accept() and worker.hurried_in + 1 < self.turn:
            self.violated(f"{worker} hurries in vain")
        self.expect(worker.end.copies == 1, "the master keeps the end of", worker)
        if worker.generation not in (master.current, master.upcoming):
            done = worker.orders or worker.was_killed or worker.was_aborted
            self.expect(done, worker, "is forgotten")

    def what_is_missing(self) -> str:
        """Return what is not as it must be after quiet, or ""."""
        master = self.master
        if self.has_stopped or master.stopping:
            return "the stop has not ended"
        if self.hups_answered < self.hups_taken or self.bell.received:
            return "a SIGHUP is forgotten"
        if master.upcoming:
            return "a reload has not ended"
        if any(worker.hangs for worker in self.workers):
            return "a worker that hangs is still there"
        serving = [each for each in self.workers if each.may_accept() and each.life == "serving"]
        if len(self.workers) != len(serving):
            return "a worker that is to go is still there"
        if any(worker.why for worker in self.workers):
            return "a worker that leaves is still there"
        places = sorted(each.place.number for each in serving if each.generation is master.current)
        if places != list(range(master.current.config.workers)):
            return f"the workers that serve are {places}"
        return ""

    def look_at_the_end(self) -> None:
        """In the calm all comes to rest. Then a last reload must succeed, and a last stop end."""
        if self.now > self.ends_at and not self.helps_itself():
            self.violated(f"long after the last event {self.what_is_missing()}")
        if not self.is_calm or self.has_stopped or self.master.stopping:
            return
        for worker in self.workers:
            if worker.hangs and self.is_unwatched(worker):
                worker.die(SIGKILL)  # by the operator
        if self.what_is_missing():
            return
        if self.is_changed:
            served = self.master.current.config.backlog
            self.expect(served == self.disk.backlog, "the newest configuration is not served")
            self.ring(self.random.choice((SIGTERM, SIGINT)))
        elif not self.events:
            self.is_changed = True
            self.disk = self.any_config()
            self.ring(SIGHUP)
            self.ends_at = self.now + SIM_QUIET

    def is_unwatched(self, worker: SimWorker) -> bool:
        """May it hang for ever? With hang_timeout = 0 only what has a limit of its own is ended."""
        is_limited = worker.generation.config.drain_timeout if worker.orders else 0
        is_limited = is_limited or worker.life in ("loading", "exiting")
        return not self.master.current.config.hang_timeout and not is_limited

    def helps_itself(self) -> bool:
        """A stop with a worker that hangs, which nobody watches, is ended by a second stop."""
        hung = any(worker.hangs and self.is_unwatched(worker) for worker in self.workers)
        is_stopping = self.has_stopped or self.master.stopping
        helps = is_stopping and hung and not self.is_forced
        if helps:
            self.ring(SIGTERM)
        return helps

    def look_at_exit(self, status: int) -> None:
        """The master has ended."""
        self.note("exit status", status)
        self.expect(not self.workers, "a worker outlives the master")
        self.expect(not self.open_listeners - {*self.adopted.values()}, "a listener is left open")
        self.expect(not self.pidfiles, "the pidfile is left behind")
        self.expect(not self.is_reloading, "RELOADING without an end")
        self.expect(self.said_stopping == self.must_say_stopping, "STOPPING is not said once")
        if self.is_forced:
            self.expect(status, "the exit status of a forced stop is 0")


# The moves that the tables of states in hupserve.py allow.
LIVES = {
    "VACANT": {"BOOTING"},
    "BOOTING": {"READY", "DRAINING"},
    "READY": {"SERVING", "DRAINING"},
    "SERVING": {"LEAVING", "DRAINING"},
    "LEAVING": {"DRAINING"},
    "DRAINING": {"EXITING"},
    "EXITING": set(),
}
STAGES = {
    "BINDING": {"LOADING", "VOID"},
    "LOADING": {"CURRENT", "VOID"},
    "CURRENT": {"PAST"},
    "PAST": set(),
    "VOID": set(),
}


def part_one() -> str:
    """Return hupserve.py's text as far as Part I goes: up to the first class of Part II."""
    text = HUPSERVE.read_text()
    (state,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "State"]
    return "".join(text.splitlines(keepends=True)[: state.lineno - 1])


def has_comments() -> bool:
    """Is hupserve.py as it was written? (../shared/tools/mutants.py leaves the comments out.)"""
    return "# Part II: serving" in HUPSERVE.read_text()


class Simulation:
    """A private copy of hupserve whose Part I touches a World instead of the system."""

    spawning: Any = None  # the Child for which the master forks

    def __init__(self, change: tuple[str, str] = ("", "")):
        """change: a text in Part I and what a careless hand has put in its place."""
        names = dict(vars(sim_module()))
        part = part_one()
        old, new = change
        assert not old or part.count(old) == 1, f"not once in Part I: {old!r}"
        part = part.replace(old, new) if old else part
        exec(compile(part, "hupserve.py, Part I", "exec"), names)
        self.names = names
        self.lives = LIVES
        self.stages = STAGES
        self.overtime: float = names["OVERTIME"]
        self.steady: float = names["STEADY"]
        self.back_off: Any = names["BACK_OFF"]
        self.pause: float = names["RETRY_PAUSE"]
        self.bind_patience: float = names["BIND_PATIENCE"]
        names["Scoreboard"] = types.SimpleNamespace(MASTER=0, WORKERS=range(1, 64), UNSEEN=64)
        defaults = {key: read(default) for key, (default, read) in names["KEYS"].items()}
        ini = types.SimpleNamespace(path="sim.ini", folder="/")
        self.config = names["Config"](**defaults, tls=None, parts=[], ini=ini)
        self.watch(names["Child"], "look_at_life")
        self.watch(names["Generation"], "look_at_stage")
        spawn = names["Master"].spawn

        def watched_spawn(master: Any, child: Any) -> None:
            self.spawning = child
            spawn(master, child)

        names["Master"].spawn = watched_spawn

    def watch(self, machine: Any, look: str) -> None:
        enter = machine.enter

        def watched_enter(it: Any, state: Any) -> None:
            getattr(self.world, look)(it, state)
            enter(it, state)

        machine.enter = watched_enter

    def run(self, seed: int) -> World:
        """Let one history happen. Raises Violation."""
        world = self.world = World(self, seed)
        self.names.update(self.system(world))
        world.master = self.names["Master"](world.config)
        world.plan()
        try:
            status = world.master.run()
        except Violation:
            raise
        except Exception:
            world.violated(f"the master has crashed: {traceback.format_exc()}")
        world.look_at_exit(status)
        return world

    def system(self, world: World) -> dict[str, Any]:
        """Return the names by which the master touches the system, and what they are here."""

        def ignore(*_: object, **__: object) -> None:
            pass

        log = types.SimpleNamespace(
            info=world.note, warning=world.note, error=world.note, log=world.note, debug=ignore
        )
        return {
            "TICK": SIM_TICK,
            "os": types.SimpleNamespace(
                fork=world.fork,
                kill=world.kill,
                waitpid=world.waitpid,
                waitid=world.waitid,
                waitstatus_to_exitcode=os.waitstatus_to_exitcode,
                getpid=lambda: SIM_MASTER,
                WNOHANG=os.WNOHANG,
            ),
            "time": types.SimpleNamespace(
                monotonic=lambda: world.now, monotonic_ns=lambda: int(world.now * 1e9)
            ),
            "poll": functools.partial(SimPoll, world),
            "signal": types.SimpleNamespace(
                **{
                    **vars(signal),
                    "pthread_sigmask": world.pthread_sigmask,
                    "valid_signals": tuple,
                }
            ),
            "socket": types.SimpleNamespace(socketpair=world.socketpair),
            "Bell": functools.partial(SimBell, world),
            "Desks": lambda threads: types.SimpleNamespace(read=list),
            "scoreboard": types.SimpleNamespace(write=ignore),
            "log": log,
            "open_listeners": world.open_listeners_of,
            "close_listeners": lambda listeners: [each.close() for each in listeners],
            "adopt_listeners": lambda: world.adopted,
            "is_ready": lambda listener, event, seconds: listener.sock.queued > 0,
            "unsent_bytes": lambda end: len(end.peer.inbox),
            "read_config": world.read_config,
            "open_logs": world.open_logs,
            "use_logs": world.use_logs,
            "write_pidfile": world.write_pidfile,
            "release_pidfile": world.pidfiles.discard,
            "take_notify_socket": lambda: "sim",
            "sd_notify": world.sd_notify,
            "tell": world.note,
            "announce": ignore,
            "warn_about_unnamed": ignore,
        }


@functools.cache
def sim_module() -> Any:
    """Return hupserve.py as a module, loaded from the file that is tested."""
    spec = importlib.util.spec_from_file_location("hupserve_in_a_world", HUPSERVE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["log"] = types.SimpleNamespace(error=lambda *_: None)  # Pause says nothing
    return module


@pytest.mark.skipif(not has_comments(), reason="this copy of hupserve.py has no comments")
@pytest.mark.parametrize("name, moves", [("Life", LIVES), ("Stage", STAGES)])
def test_world_has_the_moves_of_the_tables(name, moves):
    """Guards: the arrows in the tables of states."""
    (table,) = re.findall(rf"(?s)\nclass {name}\(.*?# fmt: on", part_one())
    found: dict[str, set[str]] = {}
    state = ""
    for line in table.splitlines():
        row = re.match(r" +([A-Z]+) = \d", line)
        state = row[1] if row else state
        found.setdefault(state, set()).update(re.findall(r"-> ([A-Z]+)", line))
    del found[""]
    assert found == moves


def test_world_keeps_every_promise():
    """No history breaks one. HUPSERVE_HISTORIES=200000 looks at more of them."""
    simulation = Simulation()
    for seed in range(HISTORIES):
        simulation.run(seed)


# What a careless hand could change in Part I, and what it would be then.
# fmt: off
SIM_MUTANTS = {
    "a commit at the first ready":
        ("elif all(child.life == READY", "elif any(child.life == READY"),
    "a commit that goes on after a stop":
        ("        self.settle(self.current, self.upcoming)\n\n    def advance_stop",
         "\n    def advance_stop"),
    "told twice":
        ("generation and child.life < DRAINING:", "generation:"),
    "the signal before the order":
        ('child.line.say("drain", sorted(dropped), grace)\n'
         "            child.signal(signal.SIGHUP)",
         "child.signal(signal.SIGHUP)\n            "
         'child.line.say("drain", sorted(dropped), grace)'),
    "a forgotten SIGHUP":
        ("elif signum == signal.SIGHUP and not self.stopping:",
         "elif signum == signal.SIGHUP and not self.stopping and not self.upcoming:"),
    "a SIGHUP that interrupts a reload":
        ("if self.sighup_waits and not self.upcoming:", "if self.sighup_waits:"),
    "a SIGHUP that is remembered over a stop":
        ("        self.stopping = True\n        self.sighup_waits = False\n        if signum",
         "        self.stopping = True\n        if signum"),
    "a SIGHUP that is remembered over a failed start":
        ("        self.sighup_waits = False\n        self.status = max",
         "        self.status = max"),
    "TERM unheard while loading":
        ("            elif signum in STOPS:\n",
         "            elif signum in STOPS and not self.upcoming:\n"),
    "a second stop unheard":
        ("            if signum in STOPS and self.stopping:\n", "            if False:\n"),
    "a worker that comes up after a second stop":
        ("        self.drop_all_addresses()\n        for child", "        for child"),
    "a stop that waits for nobody":
        ("or self.must_come_up_first():", "or False:"),
    "a stop that waits for a place in its back-off":
        ("return child.deaths <= 1 and not self.fork_pause.until", "return True"),
    "no back-off":
        ("pause = BACK_OFF[min(deaths, len(BACK_OFF)) - 1]", "pause = 0"),
    "a back-off that is never over":
        ("deaths = 1 if was_steady else self.deaths + 1", "deaths = self.deaths + 1"),
    "a successor that takes over before it is ready":
        ("if old and (old.hurries or child.has_begun):", "if old and child.life >= BOOTING:"),
    "a successor that takes over before it serves":
        ("(old.hurries or child.has_begun):", "(old.hurries or child.life == SERVING):"),
    "a predecessor that is forgotten":
        ("if child.life == LEAVING and not child.predecessor and", "if child.life == LEAVING and"),
    "a worker that hurries in vain":
        ("if old and (old.hurries or child.has_begun):", "if old and child.has_begun:"),
    "go after drain":
        ("        self.maintain_workers()  # says", "        # says"),
    "a stale word":
        ("self.life in (SERVING, LEAVING):", "self.life >= SERVING:"),
    "an address that stays is closed":
        ("generation.listeners.keys() - heir.listeners.keys()", "generation.listeners.keys()"),
    "an address that stays is bound again":
        ("config.listen if address in kept}", "config.listen if address in ()}"),
    "an address that goes stays open":
        ("dropped = generation.listeners.keys() - heir.listeners.keys()", "dropped = set()"),
    "an order before the close":
        ("            for address in dropped:\n"
         "                close_listeners(generation.listeners[address])\n"
         "            if generation.config.pidfile != heir.config.pidfile:\n"
         "                release_pidfile(generation.config.pidfile)\n"
         "            # Kill those that still boot first: "
         "they have a copy, too, and empty no queue.\n"
         "            for child in sorted(self.children.values(), key=lambda child: child.life):\n"
         "                if child.generation is generation and child.life < DRAINING:\n"
         "                    self.order_to_drain(child, dropped - generation.borrowed)\n",
         "            for child in sorted(self.children.values(), key=lambda child: child.life):\n"
         "                if child.generation is generation and child.life < DRAINING:\n"
         "                    self.order_to_drain(child, dropped - generation.borrowed)\n"
         "            for address in dropped:\n"
         "                close_listeners(generation.listeners[address])\n"
         "            if generation.config.pidfile != heir.config.pidfile:\n"
         "                release_pidfile(generation.config.pidfile)\n"),
    "a queue that nobody empties":
        ('child.line.say("drain", sorted(dropped),', 'child.line.say("drain", [],'),
    "a pidfile that a roll-back leaves":
        ("generation.config.pidfile != heir.config.pidfile:", "generation.stage == Stage.PAST:"),
    "a refusal of which systemd does not hear":
        ('self.notify("READY=1", f"reload refused: {error}", logging.ERROR)', "pass"),
    "a bind without patience":
        ("patience = self.now < new.begun_at + BIND_PATIENCE", "patience = True"),
    "a death that no reload minds":
        ("if generation.stage == Stage.LOADING:", "if False:"),
    "no boot_timeout for a reload":
        ("elif self.now > new.begun_at + new.config.boot_timeout:", "elif False:"),
    "no boot_timeout for a replacement":
        ("return self.since + config.boot_timeout", "return FOREVER"),
    "no end to a drain":
        ("return self.since + config.drain_timeout + OVERTIME", "return FOREVER"),
    "no end to the exit functions":
        ("        if self.life == EXITING:\n            return self.since + OVERTIME",
         "        if self.life == EXITING:\n            return FOREVER"),
    "an abort without a kill":
        ("child.kill_at = self.now + ABORT_TIME\n        child.signal(signal.SIGABRT)",
         "child.signal(signal.SIGABRT)"),
    "a worker that hangs although it reads":
        ("child.unread + 1 if unsent_bytes(child.line.sock) else 0", "child.unread + 1"),
    "a worker that hangs and is not found":
        ("child.unread + 1 if unsent_bytes(child.line.sock) else 0", "0"),
    "questions without hang_timeout":
        ("hang_timeout / (QUESTIONS + 1) if hang_timeout else FOREVER", "12"),
    "all replaced at once for max_requests":
        ("return child.why != MAX_REQUESTS or not any(", "return True or not any("),
    "a fork with signals unblocked":
        ("before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
         "before = signal.pthread_sigmask(signal.SIG_SETMASK, ())"),
    "the worker's end of the line kept":
        ("            theirs.close()\n", ""),
    "a fork that fails ends the master":
        ("except OSError as error:\n            self.fork_pause",
         "except KeyError as error:\n            self.fork_pause"),
    "a fork that fails is tried without a pause":
        ("self.fork_pause.begin(self.now, error)", "pass"),
    "one death reaped for each signal":
        ("                self.bury(self.children.pop(pid), os.waitstatus_to_exitcode(status))\n",
         "                self.bury(self.children.pop(pid), os.waitstatus_to_exitcode(status))\n"
         "                return\n"),
    "a reap before the bell is emptied":
        ("            self.obey()\n            self.reap()\n",
         "            self.reap()\n            self.obey()\n"),
    "a stop that sleeps when a worker has come up":
        ("must_still_drain = self.stopping and self.current.listeners", "must_still_drain = False"),
    "a spinning master":
        ("            if not child.line.ended:\n                poll",
         "            if True:\n                poll"),
    "no look while a reload is under way":
        ("            due.append(self.now + TICK)\n", "            pass\n"),
}
# fmt: on


@beyond_core
@pytest.mark.skipif(not has_comments(), reason="this copy of hupserve.py has no comments")
@pytest.mark.parametrize("change", SIM_MUTANTS.values(), ids=list(SIM_MUTANTS))
def test_world_finds(change):
    """The histories bite: some history breaks a promise if the master is changed so."""
    simulation = Simulation(change)
    with pytest.raises(Violation, match=r"^seed \d+: "):
        for seed in range(2 * HISTORIES):  # all but one are found within the first half
            simulation.run(seed)


# ==== the mistakes ================================================================================

GOOD = """[server:main]
listen = 127.0.0.1:0
workers = 1

[app:main]
paste.app_factory = app:factory
greeting = hello
"""
KEY = "workers = 1"
ADDRESS = "127.0.0.1:0"
LISTEN = "[server:main] listen:"
FACTORY = "paste.app_factory = app:factory"
SETTING = FACTORY + "\ngreeting = hello"
PIPELINE = "[pipeline:main]\npipeline = "

# Each row replaces the first text of GOOD by the second one. All the texts that follow must be in
# the one line that says so. Port numbers stand for PORT, a free one, and TAKEN.
# fmt: off
MISTAKES = [
    (KEY, "worker = 1", "[server:main] worker: unknown key; did you mean workers?"),
    (KEY, "Workers = 1", "[server:main] Workers: unknown key"),
    (KEY, "colour = blue", "[server:main] colour: unknown key"),
    (KEY, "bind = 127.0.0.1:0", "[server:main] bind: unknown key; here it is listen"),
    (KEY, "timeout = 30", "[server:main] timeout: unknown key; here they are", "drain_timeout"),
    (KEY, "reload = true", "[server:main] reload: unknown key; here a SIGHUP reloads"),
    (KEY, "workers = none", "[server:main] workers:"),
    (KEY, "workers = 0", "[server:main] workers:"),
    (KEY, "workers = -1", "[server:main] workers:"),
    (KEY, "workers = 1 2", "[server:main] workers:"),
    (KEY, "workers =", "[server:main] workers:"),
    (KEY, "workers = 1\nworkers = 2", "server:main", "workers"),
    (KEY, "workers = 1\n[server:main]", "server:main"),
    (KEY, "workers", "line", "workers"),
    (KEY, "workers = %(cores)s", "server:main", "workers", "cores"),
    (KEY, "threads = many", "[server:main] threads:"),
    (KEY, "threads = 0", "[server:main] threads:"),
    (KEY, "connections = 0", "[server:main] connections:"),
    (KEY, "backlog = -1", "[server:main] backlog:"),
    (KEY, "keepalive_timeout = -5", "[server:main] keepalive_timeout:"),
    (KEY, "header_timeout = soon", "[server:main] header_timeout:"),
    (KEY, "idle_grace = nan", "[server:main] idle_grace:"),
    (KEY, "drain_timeout = inf", "[server:main] drain_timeout:"),
    (KEY, "max_body = 1MB", "[server:main] max_body:"),
    (KEY, "log_level = loud", "[server:main] log_level:", "loud"),
    (KEY, "log_file = /no/such/folder/log", "[server:main] log_file:"),
    (KEY, "access_log = /no/such/folder/log", "[server:main] access_log:"),
    (KEY, "pidfile = /no/such/folder/pid", "[server:main] pidfile:"),
    (KEY, "certfile = /no/such/cert.pem", "[server:main] certfile:", "/no/such/cert.pem"),
    (KEY, "keyfile = /no/such/key.pem", "[server:main] keyfile:", "/no/such/key.pem"),
    (KEY, "keyfile = app.py", "[server:main]", "certfile"),
    (KEY, "socket_mode = 0668", "[server:main] socket_mode:", "octal"),
    (ADDRESS, "127.0.0.1", LISTEN, "127.0.0.1"),
    (ADDRESS, "127.0.0.1:http", LISTEN, "127.0.0.1:http"),
    (ADDRESS, "127.0.0.1:65536", LISTEN, "127.0.0.1:65536"),
    (ADDRESS, "server.invalid:8000", LISTEN, "server.invalid"),
    (ADDRESS, "127.0.0.999:8000", LISTEN, "127.0.0.999"),
    (ADDRESS, "127.0.0.1:PORT *:PORT", LISTEN, "127.0.0.1:PORT", "*:PORT"),
    (ADDRESS, "127.0.0.1:TAKEN", LISTEN, "127.0.0.1:TAKEN"),
    (ADDRESS, "unix:/no/such/folder/socket", LISTEN, "/no/such/folder"),
    (ADDRESS, "unix:my site/socket", LISTEN, "site/socket", "no blank"),
    (ADDRESS, "[fe80::7%%eth0]:8000", LISTEN, "[fe80::7%eth0]:8000", "link-local"),
    (ADDRESS, "", LISTEN),
    ("[server:main]", "[server]", "[server:main] missing section", "[server]"),
    ("[server:main]", "[server:site]", "[server:main] missing section", "[server:site]"),
    ("listen = 127.0.0.1:0", "use = egg:waitress#main\nport = http", LISTEN, "127.0.0.1:http"),
    ("listen = 127.0.0.1:0", "use = egg:waitress#main\nport = %(http_port)s",
     "[server:main] port:", "http_port"),
    ("[app:main]", "[app:other]", "app:main"),
    ("[app:main]", PIPELINE + "nosuch app\n[app:app]", "nosuch"),
    ("[app:main]", PIPELINE + "\n[app:app]", "[pipeline:main] pipeline:"),
    ("[app:main]", "[pipeline:main]\n[app:app]", "[pipeline:main]", "pipeline"),
    ("[app:main]", PIPELINE + "cache app\n[filter:cache]\nsize = 3\n[app:app]", "[filter:cache]"),
    ("[app:main]", PIPELINE + "x app\n[filter:x]\npaste.filter_factory = app:nosuch\n[app:app]",
     "[filter:x] paste.filter_factory:", "nosuch"),
    (FACTORY, "", "[app:main]"),
    (FACTORY, "paste.app_factory = app", "[app:main] paste.app_factory:"),
    (SETTING, "wsgi = app", "[app:main] wsgi:"),
    (SETTING, "wsgi = nosuch:app", "[app:main] wsgi:", "nosuch", "looked in FOLDER"),
    (SETTING, "wsgi = app:validate", "[app:main] wsgi:", "a factory? write validate()"),
    (SETTING, "wsgi = app:validate()", "[app:main] wsgi:", "global_conf"),
    (SETTING, "wsgi = app:application\nthreads = 2", "threads belongs in [server:main]"),
    (SETTING, "paste.app_factory = app:validate\nthreads = 2", "threads belongs in [server:main]"),
    (SETTING, "wsgi = app:nosuch", "[app:main] wsgi:", "nosuch"),
    (SETTING, "wsgi = app:HERE", "[app:main] wsgi:", "callable"),
    (FACTORY, "paste.app_factory = nosuch:factory", "[app:main] paste.app_factory:", "nosuch"),
    ("hello", "100%", "app:main", "greeting"),
    ("hello", "%(nosuch)s", "app:main", "greeting", "nosuch"),
    ("hello", "hello\n[loggers]\nkeys = root", "loggers"),
    ("hello", f"hello{LOGGERS.replace('%(here)s', '/nosuch')}", "[loggers]", "/nosuch/own.log"),
    ("hello", f"hello{LOGGERS.replace('level = INFO', 'level = LOUD')}", "[loggers]", "LOUD"),
    ("[server:main]", "listen = 127.0.0.1:0\n[server:main]", "line", "listen"),
    ("[server:main]", "[server:main", "line"),
    ("hello", "\udcff\udcfe", "utf-8"),
]
# fmt: on


@pytest.fixture(scope="module")
def mistaken():
    """A server whose ini the tests spoil."""
    with shared_server(workers=1) as server:
        yield server


@pytest.mark.parametrize("key", ["access_log", "certfile", "keyfile", "the ini"])
def test_a_mistake_is_a_file_that_is_a_pipe_without_another_end(mistaken, key):
    """Guards: the master waits for nobody who might open the other end of a pipe."""
    pipe = mistaken.folder / "pipe"
    os.mkfifo(pipe)
    if key == "the ini":
        stop = run(pipe, cwd=mistaken.folder)
        assert stop.returncode == 2
        assert "pipe: not a regular file" in stop.stderr
        assert is_one_line(stop)
        os.replace(pipe, mistaken.ini)
        mistaken.reload_fails(f"reload refused: {mistaken.ini}: not a regular file")
        mistaken.ini.unlink()
    else:
        mistaken.reload_fails(f"reload refused: .*{key}: .*pipe.*", **{key: pipe})
        pipe.unlink()
        mistaken.write(**{key: None})


def run(*arguments: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run hupserve until it ends by itself."""
    return subprocess.run(
        [PYTHON, str(HUPSERVE), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **keywords,
    )


def is_one_line(stop: subprocess.CompletedProcess[str]) -> bool:
    """Has the server said one line on stderr and nothing else?"""
    return len(stop.stderr.splitlines()) == 1 and stop.stdout == ""


@beyond_core
@pytest.mark.parametrize(
    "replaced, by, expected",
    [(replaced, by, expected) for replaced, by, *expected in MISTAKES],
    ids=[repr(by)[1:-1][:50] for _, by, *_ in MISTAKES],
)
def test_a_mistake_is_one_clear_line(mistaken, replaced, by, expected):
    """It is the same at the start, with --check and at a reload.

    There is never a traceback, and a running server stays as it is.
    """
    found_by_check = "TAKEN" not in by and "unix:" not in by  # --check binds nothing
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"PORT": str(free_port()), "TAKEN": str(taken.getsockname()[1])}
        for word, port in ports.items():
            by = by.replace(word, port)
            expected = [text.replace(word, port) for text in expected]
        expected = [text.replace("FOLDER", str(mistaken.folder)) for text in expected]
        ini = GOOD.replace(replaced, by, 1)
        mistaken.ini.write_bytes(ini.encode("utf-8", "surrogateescape"))

        since = len(mistaken.log())
        with concurrent.futures.ThreadPoolExecutor() as side_by_side:
            starting = side_by_side.submit(run, mistaken.ini, cwd=mistaken.folder)
            checking = side_by_side.submit(run, "--check", mistaken.ini, cwd=mistaken.folder)
            mistaken.signal(SIGHUP)
            mistaken.wait_log("reload (refused|rolled back): .*\n", since)
        start = starting.result()
        assert start.returncode in (1, 2), start
        assert is_one_line(start), start
        logs = [start.stderr, mistaken.log()[since:]]
        if found_by_check:
            check = checking.result()
            assert check.returncode == 2, check
            assert is_one_line(check), check
            logs.append(check.stderr)
    for log in logs:
        assert "Traceback" not in log
        texts = [*expected, mistaken.ini.name]
        assert any(all(text in line for text in texts) for line in log.splitlines()), log
    assert mistaken.get().json["hupserve.generation"] == 1
    assert len(mistaken.workers()) == 1


# Keys of gunicorn for which hupserve has another name or none. Most were once hinted at as threads.
FOREIGN_KEYS = """
    bind ca_certs capture_output chdir check_config daemon default_proc_name errorlog
    forwarded_allow_ips graceful_timeout group host keepalive limit_request_line logconfig name port
    preload preload_app proc_name raw_env reload reload_engine reuse_port sendfile spew statsd_host
    timeout umask user worker_class worker_tmp_dir
"""


def test_a_mistake_gets_no_false_hint():
    """Guards: a key of another server is not said to be a misspelt one of ours."""
    code = (
        "import hupserve, sys\n"
        "for key in sys.argv[1:]: print(key, hupserve.did_you_mean(key, hupserve.KEYS))\n"
    )
    shown = subprocess.run(
        [PYTHON, "-c", code, *FOREIGN_KEYS.split(), "keep_alive_timeout", "thread"],
        cwd=HUPSERVE.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    hints = dict(line.split(" ", 1) for line in shown.splitlines())
    hinted = {key for key in FOREIGN_KEYS.split() if hints[key]}
    assert hinted <= {"timeout", "keepalive"}, "for these, ELSEWHERE has the true hint"
    assert hints["keep_alive_timeout"] == "; did you mean keepalive_timeout?"
    assert hints["thread"] == "; did you mean threads?"


@beyond_core
def test_a_mistake_in_the_command_line(folder):
    good = folder / "good.ini"
    missing = folder / "none.ini"
    good.write_text(GOOD)
    (folder / "app.py").write_text(APPLICATION)
    wrong = [
        [],
        ["one.ini", "two.ini"],
        ["--colour"],
        [missing],
        [folder],
        ["--check", missing],
    ]
    for arguments in wrong:
        stop = run(*arguments, cwd=folder)
        assert stop.returncode == 2, stop
        assert "Traceback" not in stop.stderr
        assert len(stop.stderr.splitlines()) == 1 or stop.stderr.startswith("usage:"), stop

    stop = run("myflask:app", cwd=folder)
    assert stop.returncode == 2
    assert is_one_line(stop)
    assert "wanted is an ini file with [app:main] wsgi = myflask:app" in stop.stderr

    stop = run("--version")
    assert stop.returncode == 0
    assert stop.stderr == ""
    assert stop.stdout.startswith("hupserve ")

    stop = run("--check", good, cwd=folder)
    assert stop.returncode == 0
    assert "Traceback" not in stop.stderr


@beyond_core
def test_an_applications_mistake_is_told_with_its_traceback(folder):
    """The author of the application would find it nowhere else."""
    (folder / "good.ini").write_text(GOOD)
    mistakes = [
        (BROKEN, "RuntimeError: this application does not import", 'app.py", line 1'),
        (OWN_FILE, "nosuch", 'app.py", line 3'),
    ]
    for code, text, place in mistakes:
        (folder / "app.py").write_text(code)
        for arguments, status in (["--check"], 2), ([], 1):
            stop = run(*arguments, folder / "good.ini", cwd=folder)
            assert stop.returncode == status, stop
            assert "Traceback" in stop.stderr
            assert text in stop.stderr
            assert place in stop.stderr


# ==== the signals =================================================================================


@pytest.mark.parametrize("number", [SIGTERM, SIGQUIT])
def test_signal_TERM_answers_all_that_came(serve, number):
    """Requests in flight and in the queue are answered, and the exit status is 0."""
    server = serve(threads=4, idle_grace=20)
    names = [f"held{number}" for number in range(8)]
    held = [server.hold(name) for name in names]
    queued = [server.connect() for _ in range(30)]
    for client in queued:
        client.request("GET", "/queued")
    server.signal(number)
    until(lambda: refused(server.port))
    server.release(*names)
    assert {client.answer().status for client in held + queued} == {200}
    assert server.process.wait(DEADLINE) == 0


def test_signal_TERM_a_second_time_stops_at_once(serve):
    server = serve()
    held = server.hold("held")
    server.signal(SIGTERM)
    until(lambda: drains(held.worker))
    server.stop(SIGTERM, status=1)
    until(lambda: not server.others())


def test_signal_TERM_in_the_middle_of_a_reload_is_obeyed_at_once(serve):
    server = serve(workers=2)
    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.signal(SIGHUP)
    until(lambda: len(server.workers()) == 2 + 2)
    server.stop(SIGTERM)


def test_signal_TERM_in_the_middle_of_the_start_is_obeyed_at_once(folder):
    (folder / "gate").touch()
    (folder / "app.py").write_text(GATE)
    (folder / "hupserve.ini").write_text(GOOD)
    command = [PYTHON, str(HUPSERVE), "hupserve.ini"]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    until(lambda: [worker for worker in processes() if worker.parent == process.pid])
    process.terminate()
    process.wait(DEADLINE)
    until(lambda: not [left for left in processes() if left.session == process.pid])


def test_signal_INT_does_not_wait_for_idle_browsers(serve):
    server = serve(idle_grace=1000)
    browsers = [server.connect() for _ in range(10)]
    for browser in browsers:
        browser.get()
    server.stop(SIGINT)
    assert all(browser.ended() for browser in browsers)


def test_signal_INT_answers_queued_clients(serve):
    """Guards: the second order, which takes the grace away, leaves the queue of the first alone."""
    server = serve(workers=1, threads=1)
    held = server.hold("held")
    queued = [server.connect() for _ in range(5)]
    for client in queued:
        client.request("GET", "/queued")
    server.signal(SIGINT)
    until(lambda: drains(held.worker))
    server.release("held")
    assert {client.answer().status for client in [held, *queued]} == {200}
    assert server.process.wait(DEADLINE) == 0


def test_signal_INT_to_the_whole_group_waits_for_what_is_in_flight(serve):
    """A terminal's Ctrl-C reaches the workers too. They leave it to the master."""
    server = serve()
    held = server.hold("held")
    os.killpg(server.pid, SIGINT)
    until(lambda: drains(held.worker))
    server.release("held")
    assert held.answer().status == 200
    assert server.process.wait(DEADLINE) == 0


def test_signal_USR1_is_nothing_to_anybody(serve):
    """Neither are the others that mean something to other servers."""
    server = serve()
    workers = server.workers()
    for _ in range(10):
        for number in SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU:
            os.killpg(server.pid, number)
        assert server.get().status == 200
    assert server.workers() == workers


@pytest.mark.parametrize("imports", [True, False], ids=["imports", "does not import"])
def test_signal_HUP_to_the_whole_group_loses_nothing(serve, imports):
    """Guards: a worker obeys the order on its line, not the signal, which anybody can send."""
    server = serve()
    server.tracebacks = True
    server.write_app(APPLICATION + "# new\n" if imports else BROKEN + APPLICATION)
    outcome = "generation . serves" if imports else "rolled back"
    with Load(server) as load:
        for _ in range(3):
            since = len(server.log())
            os.killpg(server.pid, SIGHUP)
            server.wait_log(outcome, since)
            load.more()
    assert load.lost == []
    assert "SIGHUP without an order" in server.log()


# ==== the guest ===================================================================================

# What applications do to the process they live in, mostly by an import. Put in front of one.
TAKEOVERS = {
    "handlers": """
import signal, sys
for number in signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT:
    signal.signal(number, lambda *_: sys.exit(1))
""",
    "default handlers": """
import signal
for number in signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT:
    signal.signal(number, signal.SIG_DFL)
""",
    "asyncio": """
import asyncio, signal
loop = asyncio.new_event_loop()
for number in signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1:
    loop.add_signal_handler(number, print)
loop.close()
""",
    "blocked signals": """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
""",
    "removed functions": """
import select, socket
del select.poll, select.POLLIN, select.POLLOUT

class Mine(socket.socket):
    def recv(self, *_):
        raise AssertionError("not the application's socket")

socket.socket = Mine
""",
}


@pytest.mark.parametrize("takeover", TAKEOVERS)
def test_guest_cannot_take_signals_away(serve, takeover):
    """An idle worker hears a TERM, and neither a reload nor a stop loses what is in flight."""
    server = serve(workers=1, code=TAKEOVERS[takeover] + APPLICATION)
    [worker] = server.workers()
    assert "SigBlk:\t0000000000000000" in Path(f"/proc/{worker}/status").read_text()
    assert server.get().status == 200
    until(lambda: is_in_state(worker, "S"), "it to be idle")
    os.kill(worker, SIGTERM)
    until(lambda: server.workers() - {worker} and not alive(worker), "it to be replaced")
    with server.connect() as client:  # a body for which a thread has to wait
        assert client.post("/size", b"x" * 1_000_000).body == b"1000000"
    for order in server.reload, server.stop:
        held = server.hold(order.__name__)
        if order == server.stop:
            server.signal(SIGTERM)
            until(lambda held=held: drains(held.worker))
        else:
            server.reload()
        server.release(order.__name__)
        assert held.answer().status == 200
    assert server.process.wait(DEADLINE) == 0


RAISING = """
import signal
def raise_timeout(*_):
    raise TimeoutError("too late")
signal.signal(signal.SIGALRM, raise_timeout)
"""


def test_guest_signal_handler_that_raises_ends_no_worker(serve):
    """SIGALRM is the application's, but its handler runs in our main loop."""
    server = serve(workers=1, code=RAISING + APPLICATION)
    server.tracebacks = True
    held = server.hold("held")
    os.kill(held.worker, signal.SIGALRM)
    server.wait_log("TimeoutError: too late")
    server.release("held")
    assert held.answer().json["pid"] == held.worker


THREADS_REPLACED = "import _thread\n_thread.start_new_thread = lambda *_: 0\n"


def test_guest_that_replaces_threads_is_refused_in_one_line(serve):
    """gevent's monkey_patch_all() does: each request would hang."""
    server = serve()
    server.write_app(THREADS_REPLACED + APPLICATION)
    line = server.reload_fails("reload rolled back: .*")
    assert "hupserve.ini" in line
    assert "threads" in line
    assert server.get().json["hupserve.generation"] == 1


# Requests leave work behind, which notes that it is done.
WORKING = """
import atexit, concurrent.futures, multiprocessing, threading

def work(name):
    while not os.path.exists("finish " + name):
        time.sleep(0.01)
    note("done", name)

def do_executor(environ, start_response):
    executor = concurrent.futures.ThreadPoolExecutor()
    executor.submit(work, "executor")
    return text(start_response, "later")

def do_thread(environ, start_response):
    threading.Thread(target=work, args=["thread"]).start()
    return text(start_response, "later")

def do_processes(environ, start_response):
    global pool
    pool = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
    pool.submit(work, "processes")
    multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True).start()
    return text(start_response, "later")

def do_hand_in(environ, start_response):
    while not os.path.exists("handed"):
        time.sleep(0.01)
    with concurrent.futures.ThreadPoolExecutor() as executor:
        return text(start_response, executor.submit(str, "handed in").result())

atexit.register(lambda: note("done", "exit function"))
"""


@pytest.mark.parametrize("order", ["reload", "stop"])
def test_guest_threads_and_executors_finish_their_work(serve, order):
    """Guards: leave() does what the interpreter does at its end, and nothing is left behind."""
    server = serve(workers=1, code=APPLICATION + WORKING)
    [worker] = server.workers()
    for path in "executor", "thread", "processes":
        assert server.get("/" + path).body == b"later"
    handing = server.connect()
    handing.request("GET", "/hand_in")
    if order == "reload":
        server.reload()
    else:
        server.signal(SIGTERM)
        until(lambda: drains(worker))
    server.touch("handed")
    assert handing.answer().body == b"handed in", "a draining worker's executors work"
    handing.close()
    names = ["processes", "executor", "thread"]
    for name in names:
        time.sleep(0.1)  # in which the worker could leave
        assert alive(worker)
        server.touch(f"finish {name}")
        until(lambda name=name: name in server.log("done"), name)
    until(lambda: not alive(worker))
    assert server.log("done").splitlines() == [*names, "exit function"]
    until(lambda: len(server.others()) == (2 if order == "reload" else 0))


HANGING = """
import atexit, signal, threading
signal.signal(signal.SIGALRM, signal.SIG_IGN)

def hang():
    note("hangs", os.getpid())
    time.sleep(60)

atexit.register(hang)
threading.Thread(target=time.sleep, args=[60], name="hanging").start()
"""


@beyond_core
def test_guest_that_hangs_at_its_end_is_cut_short(serve):
    """A task that hangs does not keep the exit functions from running. If they hang, that ends.

    Which task it was, the log says.
    """
    server = serve(workers=1, code=APPLICATION + HANGING, numbers={"EXIT_TIME": (10, 2)})
    began = time.monotonic()
    [worker] = server.workers()
    server.reload()
    server.stop()
    assert 1.9 < time.monotonic() - began < 10
    assert len(server.log("hangs").split()) == 2
    assert server.log().count("leaving: hanging") == 2
    assert "in hang\n" in server.log(), "faulthandler shows where it hung"


def test_guest_request_cut_by_drain_timeout_is_not_waited_for(serve):
    server = serve(workers=1, drain_timeout=0.1)
    held = server.hold("held")
    began = time.monotonic()
    server.reload()
    until(lambda: not alive(held.worker))
    assert time.monotonic() - began < 5


ENDING = """
class Ending(logging.Filter):
    def filter(self, record):
        if "/raise" in record.getMessage():
            raise SystemExit
        return True

logging.getLogger("hupserve").addFilter(Ending())
"""


def test_guest_thread_that_ends_is_no_longer_counted(serve):
    server = serve(workers=1, threads=1, code=APPLICATION + ENDING)
    server.tracebacks = True
    for _ in range(3):
        with contextlib.suppress(Cut):
            assert server.get("/raise").status == 500
        assert server.get().status == 200


LEFT_OPEN = """
kept = []

def do_keep(environ, start_response):
    kept.append(environ["wsgi.input"])
    environ["wsgi.errors"].close()
    return text(start_response, "kept")

def do_read_kept(environ, start_response):
    try:
        return text(start_response, b"read " + kept[0].read())
    except OSError as error:
        return text(start_response, "refused")
"""


def test_guest_request_leaves_nothing_for_the_next(serve):
    """wsgi.input and wsgi.errors are its own."""
    server = serve(workers=1, threads=1, code=APPLICATION + LEFT_OPEN)
    with server.connect() as client:
        client.request("POST", "/keep", b"", "Content-Length: 100000").send(b"first")
        assert client.answer().body == b"kept"
        assert server.get("/read_kept").body == b"refused", "its connection is the main thread's"
        assert server.get("/log?text").body == b"logged"


# A program that has hupserve inside: what it leaves behind for the workers is its own.
CALLER = """
import atexit, concurrent.futures, multiprocessing, os, signal, subprocess, sys, tempfile
import threading, time
import hupserve

def note(line):
    with open("notes", "a") as file:
        file.write(line + "\\n")

if __name__ == "__main__":
    folder = tempfile.TemporaryDirectory(dir=".")
    ini = os.path.join(folder.name, "hupserve.ini")
    with open(ini, "w") as file:
        file.write(open("hupserve.ini").read())
    atexit.register(note, "exit function")
    signal.signal(signal.SIGALRM, lambda *_: note("alarm"))
    executor = concurrent.futures.ThreadPoolExecutor()
    executor.submit(str)
    fork = multiprocessing.get_context("fork")
    daemon = fork.Process(target=time.sleep, args=[60], daemon=True)
    daemon.start()
    child = subprocess.Popen(["sh", "-c", "sleep 0.1; exit 7"])
    sys.stdin.readline()
    print("printed once")
    sys.stderr.write("half a line")
    status = hupserve.main([ini])
    note(f"status {status}, child {child.wait()}, daemon {daemon.is_alive()}")
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        note("interrupted")
"""


def run_by(command: str) -> list[str]:
    """A Server's prefix: this command, in which $PYTHON and $INI stand for themselves."""
    return ["sh", "-c", f'PYTHON="$1" INI="$3"; exec {command}', "sh"]


READING = """
note("argv", sys.argv)
note("stdin", repr(sys.stdin.read()) + " " + repr(os.read(0, 1)))
"""


def test_guest_of_a_calling_program(serve, folder):
    """Its exit functions, files, children and output are left to it, by workers that leave, too.

    After the stop it has its signals back, and learns how its children have ended.
    """
    (folder / "hupserve.py").symlink_to(HUPSERVE)
    (folder / "caller.py").write_text(CALLER)
    (folder / "lines").write_text("one\ntwo\n")
    with open(folder / "lines") as lines:
        server = serve(
            workers=1,
            code=APPLICATION + READING,
            env={"PYTHONUNBUFFERED": ""},
            prefix=run_by('"$PYTHON" caller.py'),
            popen={"stdin": lines},
        )
    server.reload()
    until(lambda: len(server.workers()) == 1 + 1, "the old worker to leave")
    assert not (folder / "notes").exists()
    server.reload()
    server.stop()
    assert server.log("notes").splitlines() == [
        "status 0, child 7, daemon True",
        "interrupted",
        "exit function",
    ]
    assert set(server.log("stdin").splitlines()) == {"'' b''"}
    assert server.log().count("printed once") == 1
    assert server.log().count("half a line") == 1
    until(lambda: not server.others())


IMPORTING_CALLER = """
import sys
import app
import hupserve
sys.exit(hupserve.main(sys.argv[1:]))
"""


def test_guest_that_the_calling_program_has_imported_gets_a_warning(serve, folder):
    (folder / "hupserve.py").symlink_to(HUPSERVE)
    (folder / "caller.py").write_text(IMPORTING_CALLER)
    server = serve(prefix=run_by('"$PYTHON" caller.py "$INI"'))
    assert server.log().count("no reload will see its new code") == 1
    server.reload()
    assert server.log().count("no reload will see its new code") == 2


@pytest.mark.parametrize("command", ["-m package.hupserve", "package/hupserve.py"])
def test_guest_finds_the_module_that_serves_under_any_name(serve, folder, command):
    """Guards: a second copy of the module shows the first one's workers."""
    (folder / "package").mkdir()
    (folder / "package" / "hupserve.py").symlink_to(HUPSERVE)
    sections = Server.STATUS.replace("hupserve:", "package.hupserve:")
    server = serve(sections, prefix=run_by(f'"$PYTHON" {command} "$INI"'))
    assert len(server.status()) == 2


BLOCKING_LAUNCHER = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_guest_and_server_hear_what_their_launcher_had_blocked(serve):
    server = serve(prefix=[PYTHON, "-c", BLOCKING_LAUNCHER])
    assert int(server.get("/children").json["SigBlk"], 16) == 0
    server.reload()
    os.kill(min(server.workers()), SIGTERM)
    server.wait_log("SIGTERM")
    server.stop()


def test_guest_has_no_arguments_and_nothing_to_read(serve, folder):
    """A background job of a terminal would read for ever otherwise."""
    main, side = pty.openpty()
    server = serve(workers=1, code=APPLICATION + READING, popen={"stdin": side})
    os.close(side)
    assert server.log("argv") == f"{[str(HUPSERVE)]}\n"
    assert server.log("stdin") == "'' b''\n"
    os.close(main)


def test_guest_follows_the_link_that_it_was_started_in(folder):
    """The ini, the code and what the ini names by relative paths are the new release's.

    So the old one can be removed.
    """
    server = Server(folder, workers=1, code="", log_file="log")
    for name in "first", "second":
        (folder / name).mkdir()
        server.write(greeting=None)
        (folder / name / "hupserve.ini").write_text(server.ini.read_text())
        (folder / name / "app.py").write_text(APPLICATION + f"note('../loaded', {name!r})\n")
    (folder / "current").symlink_to("first")
    server.prefix = in_shell("cd current")
    server.ini = Path("hupserve.ini")
    server.start()
    with contextlib.ExitStack() as stack:
        stack.push(server)
        assert server.log("loaded") == "first\n"
        (folder / "new").symlink_to("second")
        os.replace(folder / "new", folder / "current")
        [worker] = server.workers()
        os.kill(worker, SIGKILL)
        [successor] = until(lambda: server.workers() - {worker}, "its successor")
        until(lambda: os.readlink(f"/proc/{successor}/cwd") == str(folder / "second"))
        until(lambda: server.log("loaded") == "first\nsecond\n")
        shutil.rmtree(folder / "first")
        server.signal()
        server.wait_log("generation 2 serves", file="second/log")
        assert server.log("loaded") == "first\nsecond\nsecond\n"


@pytest.mark.parametrize("sections", [Server.APP, "[app:main]\nuse = call:app:factory\n"])
def test_guest_in_a_folder_whose_name_is_not_utf8(folder, sections):
    if "use" in sections and not importable("paste.deploy"):
        pytest.skip("the server's interpreter has no PasteDeploy")
    odd = folder / "\udcff#"
    odd.mkdir()
    with Server(odd, sections) as server:
        server.reload()
        assert server.get().status == 200


def test_guest_in_a_folder_that_is_gone_is_refused_by_name(folder):
    gone = folder / "gone"
    command = ["sh", "-c", f'mkdir {gone}; cd {gone}; rmdir {gone}; exec "$@"', "sh"]
    stop = subprocess.run(
        [*command, PYTHON, str(HUPSERVE), "hupserve.ini"], capture_output=True, text=True
    )
    assert stop.returncode == 2
    ours = [line for line in stop.stderr.splitlines() if line.startswith("hupserve")]
    assert len(ours) == 1  # an interpreter that is a shell script may complain, too
    assert "the current folder" in ours[0]


# ==== the exchange ================================================================================

OPEN = "open"
CLOSED = "closed"
HOST = "HTTP/1.1|Host: a|"
POST = "POST / " + HOST
UNREAD = "POST /unread " + HOST
CHUNKED = POST + "Transfer-Encoding: chunked||"
TE = POST + "Transfer-Encoding: "
BAD_CODING = {400, 501}
TOO_MUCH = {400, 413, 431}
BAD_LENGTHS = [
    *("5, 5", "5,6", "+5", "-5", "1_0", "0x5", "5 5", "5.0", "five", "", "\xb2", "5\x0b"),
    "9" * 5000,
]
BAD_CHUNK_SIZES = [
    *("+5", "-5", "0x5", "5_0", " 5", "5 ", "5\t", "g", "", ";a", "5\x00", "\xb2"),
    "0" * 16 + "5",
]
MANY_EXTENSIONS = f"1;{'a' * 1000}|x|" * 70
CHUNKS_OVER_MAX_BODY = f"80000|{'x' * 0x80000}|" * 2

# A row has a name, the bytes of a request (where | stands for CR LF), the status of the answer or a
# set of possible ones, what becomes of the connection, and what the application saw, if that
# matters. Behind each row's request the client sends one more at once. If the row says OPEN, that
# one is answered, too. If it says CLOSED, the connection ends without another byte.
# fmt: off
EXCHANGE = [
    # RFC 9112 2.2: the message
    ("the plain request", f"GET /x?y=z {HOST}|", 200, OPEN,
     {"PATH_INFO": "/x", "QUERY_STRING": "y=z"}),
    ("an empty line before it", f"|GET / {HOST}|", 200, OPEN),
    ("lines that end in LF", "GET / HTTP/1.1\nHost: a\n\n", 400, CLOSED),
    ("one line that ends in LF", "GET / HTTP/1.1|Host: a\nX: b||", 400, CLOSED),
    ("a head that ends in LF LF", "GET / HTTP/1.1|Host: a\n\n", 400, CLOSED),
    ("a bare CR in the request line", "GET /\r HTTP/1.1|Host: a||", 400, CLOSED),
    ("a bare CR in a field", "GET / HTTP/1.1|Host: a|X: a\rb||", 400, CLOSED),
    ("white space before the first field", "GET / HTTP/1.1| Host: a||", 400, CLOSED),
    ("a TLS handshake", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03||", 400, CLOSED),

    # RFC 9112 2.3 and 3: version and request line
    ("HTTP/1.0 closes", "GET / HTTP/1.0||", 200, CLOSED, {"SERVER_PROTOCOL": "HTTP/1.0"}),
    ("HTTP/1.0 may ask to keep alive", "GET / HTTP/1.0|Connection: keep-alive||", 200, OPEN),
    ("HTTP/1.2 is answered as 1.1", f"GET / {HOST}|".replace("1.1", "1.2"), 200, OPEN),
    ("HTTP/2.0", "GET / HTTP/2.0|Host: a||", 505, CLOSED),
    ("HTTP/2's preface", "PRI * HTTP/2.0||SM||", 505, CLOSED),
    ("HTTP/0.9", "GET /||", 400, CLOSED),
    ("a version of two digits", "GET / HTTP/1.10|Host: a||", 400, CLOSED),
    ("a version of one digit", "GET / HTTP/1|Host: a||", 400, CLOSED),
    ("a version in small letters", "GET / http/1.1|Host: a||", 400, CLOSED),
    ("no version but white space", "GET / |Host: a||", 400, CLOSED),
    ("two spaces after the method", "GET  / HTTP/1.1|Host: a||", 400, CLOSED),
    ("two spaces before the version", "GET /  HTTP/1.1|Host: a||", 400, CLOSED),
    ("a space after the version", "GET / HTTP/1.1 |Host: a||", 400, CLOSED),
    ("a space before the method", " GET / HTTP/1.1|Host: a||", 400, CLOSED),
    ("tabs for spaces", "GET\t/\tHTTP/1.1|Host: a||", 400, CLOSED),
    ("a method that is no token", "G@T / HTTP/1.1|Host: a||", 400, CLOSED),
    ("a method of the client's own", f"BREW-IT / {HOST}|", 200, OPEN,
     {"REQUEST_METHOD": "BREW-IT"}),
    ("a request line of 8 KiB", f"GET /{'a' * (8192 - 14)} {HOST}|", 200, OPEN),
    ("a longer one", f"GET /{'a' * (8192 - 13)} {HOST}|", 414, CLOSED),

    # RFC 9112 3.2: the target
    ("percent signs", f"GET /a%20b%2Fc?%41 {HOST}|", 200, OPEN,
     {"PATH_INFO": "/a b/c", "QUERY_STRING": "%41"}),
    ("UTF-8 in percent signs", f"GET /caf%C3%A9 {HOST}|", 200, OPEN, {"PATH_INFO": "/caf\xc3\xa9"}),
    ("two slashes stay two", f"GET //a {HOST}|", 200, OPEN, {"PATH_INFO": "//a"}),
    ("an absolute target overrides Host", f"GET http://b:8/x?y {HOST}|", 200, OPEN,
     {"HTTP_HOST": "b:8", "PATH_INFO": "/x", "QUERY_STRING": "y"}),
    ("an absolute target without a path", f"GET http://b {HOST}|", 200, OPEN,
     {"HTTP_HOST": "b", "PATH_INFO": "/"}),
    ("an absolute target without a host", f"GET http:///x {HOST}|", 400, CLOSED),
    ("OPTIONS *", f"OPTIONS * {HOST}|", 200, OPEN, {"REQUEST_METHOD": "OPTIONS"}),
    ("* for anything else", f"GET * {HOST}|", 400, CLOSED),
    ("CONNECT", "CONNECT a:443 HTTP/1.1|Host: a:443||", 501, CLOSED),
    ("no leading slash", f"GET x {HOST}|", 400, CLOSED),
    ("only a query", f"GET ?x {HOST}|", 400, CLOSED),
    ("a fragment", f"GET /x#y {HOST}|", 400, CLOSED),
    ("a control character", f"GET /x\x01 {HOST}|", 400, CLOSED),
    ("a DEL", f"GET /x\x7f {HOST}|", 400, CLOSED),
    ("a NUL", f"GET /x\x00 {HOST}|", 400, CLOSED),
    ("raw Latin-1", f"GET /caf\xe9 {HOST}|", 400, CLOSED),

    # RFC 9112 3.2: Host
    ("no Host in 1.1", "GET / HTTP/1.1||", 400, CLOSED),
    ("no Host in 1.0", "GET / HTTP/1.0|Connection: keep-alive||", 200, OPEN),
    ("two Hosts", f"GET / {HOST}Host: b||", 400, CLOSED),
    ("the same Host twice", f"GET / {HOST}Host: a||", 400, CLOSED),
    ("a Host with a space", "GET / HTTP/1.1|Host: a b||", 400, CLOSED),
    ("a Host with a path", "GET / HTTP/1.1|Host: a/b||", 400, CLOSED),
    ("a Host with a user", "GET / HTTP/1.1|Host: me@a||", 400, CLOSED),
    ("a Host with a bad port", "GET / HTTP/1.1|Host: a:b||", 400, CLOSED),
    ("a Host that is an address", "GET / HTTP/1.1|Host: [::1]:80||", 200, OPEN,
     {"HTTP_HOST": "[::1]:80"}),
    ("half an address", "GET / HTTP/1.1|Host: [::1||", 400, CLOSED),
    ("no address in brackets", "GET / HTTP/1.1|Host: [1::2::3]||", 400, CLOSED),
    ("nor in an absolute target", f"GET http://[12345::]/ {HOST}|", 400, CLOSED),
    ("a port without a host in an absolute target", f"GET http://:80/ {HOST}|", 400, CLOSED),
    ("half an encoding", "GET / HTTP/1.1|Host: a%2||", 400, CLOSED),

    # RFC 9112 5: fields
    ("white space around a value", f"GET / {HOST}X: \t b \t||", 200, OPEN, {"HTTP_X": "b"}),
    ("no value", f"GET / {HOST}X:||", 200, OPEN, {"HTTP_X": ""}),
    ("Latin-1 in a value", f"GET / {HOST}X: caf\xe9||", 200, OPEN, {"HTTP_X": "caf\xe9"}),
    ("a field twice is a list", f"GET / {HOST}X-Y: a|x-y: b||", 200, OPEN, {"HTTP_X_Y": "a,b"}),
    ("an underscore poses as a hyphen", f"GET / {HOST}X_Y: a||", 200, OPEN, {"HTTP_X_Y": None}),
    ("an underscore poses as a length", f"GET / {HOST}Content_Length: 5||", 200, OPEN,
     {"CONTENT_LENGTH": None}),
    ("white space before the colon", "GET / HTTP/1.1|Host : a||", 400, CLOSED),
    ("a folded line", f"GET / {HOST}X: a| b||", 400, CLOSED),
    ("no colon", f"GET / {HOST}X||", 400, CLOSED),
    ("no name", f"GET / {HOST}: x||", 400, CLOSED),
    ("a name with a space", f"GET / {HOST}X Y: a||", 400, CLOSED),
    ("a name with a control character", f"GET / {HOST}X\x01: a||", 400, CLOSED),
    ("a name in Latin-1", f"GET / {HOST}X\xe9: a||", 400, CLOSED),
    ("a NUL in a value", f"GET / {HOST}X: a\x00b||", 400, CLOSED),
    ("100 fields", f"GET / {HOST}{'X: a|' * 99}|", 200, OPEN),
    ("101 fields", f"GET / {HOST}{'X: a|' * 100}|", 431, CLOSED),
    ("a field of 60 KiB", f"GET / {HOST}X: {'a' * 60000}||", 200, OPEN),
    ("a head of 64 KiB", f"GET / HTTP/1.1|Host: a|X: {'a' * (65536 - 32)}||", 200, OPEN),
    ("a head over 64 KiB", f"GET / HTTP/1.1|Host: a|X: {'a' * (65536 - 31)}||", 431, CLOSED),
    ("one before a binary body",
     f"{POST}Content-Length: 9|X: {'a' * 66000}||\0\r\n\0\n\r\0\n\0", 431, CLOSED),

    # RFC 9112 6: the length of a body
    ("a body", f"{POST}Content-Length: 5||hello", 200, OPEN,
     {"body": "hello", "CONTENT_LENGTH": "5"}),
    ("a body of none", f"{POST}Content-Length: 0||", 200, OPEN, {"body": ""}),
    ("a body to GET", f"GET / {HOST}Content-Length: 5||hello", 200, OPEN, {"body": "hello"}),
    ("an unread body is skipped", f"{UNREAD}Content-Length: 5||hello", 200, OPEN),
    ("an unread body of 64 KiB, too", f"{UNREAD}Content-Length: 65536||{'x' * 65536}", 200, OPEN),
    ("a longer one closes the connection", f"{UNREAD}Content-Length: 65537||{'x' * 65537}", 200,
     CLOSED),
    ("both lengths", f"{POST}Content-Length: 5|Transfer-Encoding: chunked||0||", 400, CLOSED),
    ("both, the other way round", f"{TE}chunked|Content-Length: 5||0||", 400, CLOSED),
    ("two lengths that differ", f"{POST}Content-Length: 5|Content-Length: 6||hello", 400, CLOSED),
    *((f"Content-Length: {ascii(length)[1:-1]:.20}",
       f"{POST}Content-Length: {length}||hello", 400, CLOSED) for length in BAD_LENGTHS),
    ("a length over max_body", f"{POST}Content-Length: {MAX_BODY + 1}||", 413, CLOSED),
    ("a length of nineteen digits", f"{POST}Content-Length: {'9' * 19}||", {400, 413}, CLOSED),

    # RFC 9112 6.1: transfer codings
    ("chunked", f"{CHUNKED}5|hello|0||", 200, OPEN, {"body": "hello", "CONTENT_LENGTH": None}),
    ("Chunked", CHUNKED.replace("chunked", "Chunked") + "0||", 200, OPEN, {"body": ""}),
    ("gzip", f"{TE}gzip||", 501, CLOSED),
    ("gzip and chunked", f"{TE}gzip, chunked||0||", 501, CLOSED),
    ("chunked and gzip", f"{TE}chunked, gzip||0||", BAD_CODING, CLOSED),
    ("chunked twice", f"{TE}chunked, chunked||0||", BAD_CODING, CLOSED),
    ("chunked in two fields", f"{TE}chunked|Transfer-Encoding: chunked||0||", BAD_CODING, CLOSED),
    ("identity", f"{TE}identity||", BAD_CODING, CLOSED),
    ("xchunked", f"{TE}xchunked||0||", 501, CLOSED),
    ("chunked after a vertical tab", f"{TE}\x0bchunked||0||", BAD_CODING, CLOSED),
    ("a coding of nothing", f"{POST}Transfer-Encoding:||0||", BAD_CODING, CLOSED),
    ("chunked in 1.0", "POST / HTTP/1.0|Transfer-Encoding: chunked||0||", 400, CLOSED),

    # RFC 9112 7.1: chunks
    ("several chunks", f"{CHUNKED}3|hel|2|lo|0||", 200, OPEN, {"body": "hello"}),
    ("hexadecimal, either case", f"{CHUNKED}a|0123456789|00A|0123456789|0||", 200, OPEN,
     {"body": "0123456789" * 2}),
    ("chunk extensions", f'{CHUNKED}5;a=b;c="d e"|hello|0;x||', 200, OPEN, {"body": "hello"}),
    ("trailers are discarded", f"{CHUNKED}5|hello|0|X-T: x|X-U: y||", 200, OPEN,
     {"body": "hello", "HTTP_X_T": None}),
    ("unread chunks close the connection", f"{UNREAD}Transfer-Encoding: chunked||5|hello|0||",
     200, CLOSED),
    ("unread bad chunks", f"{UNREAD}Transfer-Encoding: chunked||x|hello|0||", {200, 400}, CLOSED),
    *((f"a chunk size of {ascii(size)[1:-1]:.20}",
       f"{CHUNKED}{size}|hello|0||", 400, CLOSED) for size in BAD_CHUNK_SIZES),
    ("a chunk longer than its size", f"{CHUNKED}4|hello|0||", 400, CLOSED),
    ("a chunk shorter than its size", f"{CHUNKED}6|hello|0||", 400, CLOSED),
    ("a chunk size that ends in LF", f"{CHUNKED}5\nhello|0||", 400, CLOSED),
    ("a chunk that ends in LF", f"{CHUNKED}5|hello\n0||", 400, CLOSED),
    ("an LF in an extension", f"{CHUNKED}5;a\nb|hello|0||", 400, CLOSED),
    ("a CR in an extension", f"{CHUNKED}5;a\rb|hello|0||", 400, CLOSED),
    ("many extensions", f"{CHUNKED}{MANY_EXTENSIONS}0||", 400, CLOSED),
    ("an endless extension", f"{CHUNKED}5;{'a' * 70000}|hello|0||", TOO_MUCH, CLOSED),
    ("endless trailers", f"{CHUNKED}0|{'X: a|' * 20000}|", TOO_MUCH, CLOSED),
    ("a malformed chunk stays one",
     f"POST /retry {HOST}Transfer-Encoding: chunked||zz|5|hello|0||", 200, CLOSED,
     {"seen": ["error"] * 3}),
    ("a trailer that is none", f"{CHUNKED}0|X||", 400, CLOSED),
    ("chunks over max_body", f"{CHUNKED}{CHUNKS_OVER_MAX_BODY}0||", 413, CLOSED),

    # RFC 9112 9: the connection
    ("Connection: close", f"GET / {HOST}Connection: close||", 200, CLOSED),
    ("close in a list", f"GET / {HOST}Connection: x, Close||", 200, CLOSED),
    ("close in a second field", f"GET / {HOST}Connection: x|Connection: close||", 200, CLOSED),
    ("close and keep-alive", f"GET / {HOST}Connection: keep-alive, close||", 200, CLOSED),
    ("keep-alive in a list", "GET / HTTP/1.0|Connection: x, Keep-Alive||", 200, OPEN),
    ("something that begins like close", f"GET / {HOST}Connection: closed||", 200, OPEN),
    ("an upgrade nobody knows", f"GET / {HOST}Connection: upgrade|Upgrade: h2c||", 200, OPEN),

    # RFC 9110 9.3.2, 15.3.5, 15.4.5: answers that have no body
    ("HEAD", f"HEAD / {HOST}|", 200, OPEN),
    ("HEAD of a stream", f"HEAD /stream {HOST}|", 200, OPEN),
    ("HEAD of what is not read", f"HEAD /unread {HOST}|", 200, OPEN),
    ("204", f"GET /204 {HOST}|", 204, OPEN),
    ("304", f"GET /304 {HOST}|", 304, OPEN),
]
# fmt: on


@pytest.fixture(scope="module")
def shared():
    """The server of all tests that look at one exchange only."""
    with shared_server(max_body=MAX_BODY) as server:
        server.tracebacks = True
        (server.folder / "data").write_bytes(b"0123456789" * 100_000)
        yield server


def wire(text: str) -> bytes:
    """Return the bytes of a request that is written with | for CR LF."""
    return text.replace("|", "\r\n").encode("latin-1")


@pytest.mark.parametrize(
    "raw, status, then, seen",
    [(*row, {})[1:5] for row in EXCHANGE],
    ids=[str(row[0]) for row in EXCHANGE],
)
def test_exchange(shared, raw, status, then, seen):
    with shared.connect() as client:
        client.send(wire(raw) + b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n")
        method, _, _ = raw.partition(" ")
        answer = client.answer(method)
        assert answer.status in (status if isinstance(status, set) else {status})
        for key, value in seen.items():
            assert answer.json.get(key) == value
        connection = answer.headers.get("connection", "").lower()
        if then is OPEN:
            assert connection == "keep-alive" or connection == "" and "HTTP/1.0" not in raw
            assert client.answer().json["PATH_INFO"] == "/next"
        else:
            assert connection == "close" or "HTTP/1.0" in raw
            assert client.ended()


def test_exchange_pipelined_requests_are_answered_in_their_order(shared):
    count = 100
    with shared.connect() as client:
        for number in range(count):
            client.request("POST", f"/?{number}", b"body" * number)
        for number in range(count):
            assert client.answer().json["QUERY_STRING"] == str(number)


def test_exchange_byte_by_byte(shared):
    """Bytes may arrive in any segments, and a request may end anywhere in one."""
    one = f"POST /one {HOST}Transfer-Encoding: chunked||5;x|hello|0|X: y||"
    two = f"POST /two {HOST}Content-Length: 5||hello"
    with shared.connect() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(3):
            for byte in wire(one + two):
                client.send(bytes([byte]))
            for path in ("/one", "/two"):
                answer = client.answer().json
                assert answer["PATH_INFO"] == path
                assert answer["body"] == "hello"


@beyond_core
def test_exchange_no_reading_is_quadratic(serve):
    """Guards: input is received in small pieces, because each chunk taken off one copies it.

    One-byte chunks cost the most. Four times as many cost four times the processor time, and those
    that nobody reads cost nothing.
    """
    server = serve(workers=1)
    [worker] = server.workers()

    def cost(path: str, count: int) -> float:
        [before] = [process.cpu for process in processes() if process.pid == worker]
        with server.connect() as client:
            client.send(wire(f"POST {path} {HOST}Transfer-Encoding: chunked||{'1|x|' * count}0||"))
            assert client.answer().status == 200
        [after] = [process.cpu for process in processes() if process.pid == worker]
        return after - before

    count = 30_000
    assert cost("/size", 4 * count) < 8 * max(cost("/size", count), 0.05)
    assert cost("/unread", 4 * count) < 0.1


def test_exchange_expect_100_continue(shared):
    """The client is told to go on when the application first reads, and not if it never does."""

    def head(path, size, version="1.1"):
        return wire(
            f"POST {path} HTTP/{version}|Host: a|Content-Length: {size}|Expect: 100-Continue||"
        )

    # The main thread would receive the small body itself. A request thread receives the large one.
    for size in (5, 100_000):
        with shared.connect() as client:
            client.send(head("/", size))
            assert client.answer().status == 100
            assert client.send(b"x" * size).answer().json["body"] == "x" * size
            assert client.get().status == 200
        with shared.connect() as client:
            answer = client.send(head("/unread", size)).answer()
            assert answer.status == 200
            assert answer.closes
            assert client.ended()
    with shared.connect() as client:
        assert client.send(head("/", MAX_BODY + 1)).answer().status == 413
    with shared.connect() as client:  # HTTP/1.0 does not know Expect
        client.send(head("/", 5, version="1.0") + b"hello")
        assert client.answer().json["body"] == "hello"


CUT_SHORT = {
    "head": "GET / HT",
    "small body": f"{POST}Content-Length: 5||hel",
    "large body": f"{POST}Content-Length: 100000||hel",
    "chunk": f"{CHUNKED}5|hel",
    "chunks": f"{CHUNKED}5|hello|",
}


@pytest.mark.parametrize("raw", CUT_SHORT.values(), ids=CUT_SHORT)
def test_exchange_a_request_cut_short_is_not_answered_as_if_it_were_whole(shared, raw):
    since = len(shared.log())
    with shared.connect() as client:
        client.send(wire(raw))
        client.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Cut):
            assert client.answer().status == 400
        assert client.ended()
    assert "Traceback" not in shared.log()[since:]


def test_exchange_a_client_that_has_shut_down_its_sending_side_gets_its_answer(shared):
    with shared.connect() as client:
        client.request("GET", "/half")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer().json["PATH_INFO"] == "/half"
        assert client.ended()


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Replace up to two bytes, in one to three places, by up to two of the troublesome ones."""
    mutated = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(mutated))
        end = at + chance.randrange(3)
        new = [chance.choice(b"\0\r\n\t :;,0aG/\x7f\xff") for _ in range(chance.randrange(3))]
        mutated[at:end] = bytes(new)
    return bytes(mutated)


@beyond_core
def test_exchange_random_and_mutated_bytes(shared):
    """Nothing hangs, there is no traceback and no 500, and no worker is lost."""
    chance = random.Random(1)
    corpus = [wire(row[1]) for row in EXCHANGE if len(row[1]) < 1000]
    workers = shared.workers()
    since = len(shared.log())
    for _ in range(1500):
        raw = mutate(chance.choice(corpus), chance)
        with shared.connect() as client:
            client.send(raw)
            client.socket.shutdown(socket.SHUT_WR)
            answers = client.take_all()
        assert re.match(rb"HTTP/1\.1 \d\d\d [^\r\n]+\r\n|$", answers), (raw, answers)
        first_line, _, _ = answers.partition(b"\r\n")
        assert b" 500 " not in first_line, raw
    assert shared.workers() == workers
    assert "Traceback" not in shared.log()[since:]


# ==== the responses ===============================================================================

CUT = "cut"  # something has been sent and something is missing, and the client must see it

# A row has the path, the status and the body, where None is any body.
# fmt: off
RESPONSES = [
    # What an application may do.
    ("/list", 200, b"hello"),
    ("/stream", 200, b"one two"),
    ("/write", 200, b"one two"),
    ("/replaced", 503, b"replaced"),
    ("/closing?closing", 200, b"one two"),
    ("/big?1000000", 200, b"0123456789abcdef" * 62_500),
    ("/file?0,", 200, b"0123456789" * 100_000),
    ("/file?999995,", 200, b"56789"),
    ("/file?5,7", 200, b"5678901"),
    ("/file?1000000,0", 200, b""),
    ("/filelike", 200, b"like a file"),
    ("/close", 200, b"closing"),
    ("/hop", 200, b"hop"),

    # What it may not do. Nothing has been sent by then, so the answer becomes a 500.
    ("/crlf", 500, None),
    ("/control", 500, None),
    ("/crlfname", 500, None),
    ("/crlfstatus", 500, None),
    ("/101", 500, None),
    ("/raise", 500, None),
    ("/nothing", 500, None),
    ("/twice", 500, None),
    ("/none", 500, None),
    ("/str", 500, None),
    ("/emptystr", 500, None),
    ("/sysexit", 500, None),

    # Something has been sent by then. Surplus bytes never are.
    ("/surplus", 200, b"hello"),
    ("/surpluswrite", 200, b"hello"),
    ("/raiseatend", 200, b"all "),
    ("/short", 200, CUT),
    ("/file?999995,10", 200, CUT),
    ("/raisemidway", 200, CUT),
    ("/late", 200, CUT),
]
# fmt: on


@pytest.mark.parametrize("path, status, body", RESPONSES, ids=[row[0] for row in RESPONSES])
@pytest.mark.parametrize("method, version", [("GET", "1.1"), ("GET", "1.0"), ("HEAD", "1.1")])
def test_response(shared, method, version, path, status, body):
    """In HTTP/1.0 the end of the connection may be the end of the body."""
    with shared.connect() as client:
        client.send(wire(f"{method} {path} HTTP/{version}|Host: a|Connection: keep-alive||"))
        try:
            answer = client.answer(method)
        except Cut:
            assert body == CUT
            return
        assert answer.status == status
        assert not [name for name in answer.headers if "injected" in name]
        assert version == "1.1" or "transfer-encoding" not in answer.headers
        if body == CUT:  # and here no client could see it
            assert method == "HEAD" or version == "1.0" and "content-length" not in answer.headers
        elif method == "GET" and body is not None:
            assert answer.body == body
        if answer.closes or version == "1.0" and "connection" not in answer.headers:
            assert client.ended()
        elif body != CUT:
            assert path != "/close"
            assert client.get("/list").body == b"hello"


def test_response_header_fields(shared):
    """Hop-by-hop fields are the server's own. An answer without a body announces none."""
    hop = shared.get("/hop").headers
    assert hop["x-kept"] == "yes"
    assert not {"keep-alive", "upgrade", "proxy-authenticate", "te"} & set(hop)
    assert hop.get("connection", "keep-alive") == "keep-alive"
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", hop["date"])
    assert not {"content-length", "transfer-encoding"} & set(shared.get("/204").headers)
    assert "transfer-encoding" not in shared.get("/304").headers
    assert shared.get("/list").headers["content-length"] == "5"
    assert shared.get("/stream").headers["transfer-encoding"] == "chunked"
    with shared.connect() as client:
        client.request("HEAD", "/big?1600")
        assert client.answer("HEAD").headers["content-length"] == "1600"


def test_response_what_is_checked_is_what_is_sent(shared):
    """A subclass of str is its text, whatever it compares to or prints as."""
    for text in "one", "other":
        with shared.connect() as client:
            answer = client.request("GET", f"/disguised?{text}").answer()
            assert answer.status == 202
            assert answer.headers[f"x-{text}"] == text
            assert answer.body == b"disguised"
            assert "x-injected" not in answer.headers


def test_response_wsgi_multiprocess_is_true_if_there_are_several_workers(serve):
    """With one, Pyramid's debug toolbar works."""
    server = serve(workers=1)
    assert server.get().json["wsgi.multiprocess"] is False
    server.reload(workers=2)
    assert server.get().json["wsgi.multiprocess"] is True


def test_response_iterables_are_closed_in_any_case(shared):
    """close() is called once.

    That is so at the end, after the client has gone away, for HEAD, and for a wrapped file.
    """
    shared.get("/closing?at-the-end")
    since = len(shared.log())
    with shared.connect() as client:
        client.request("GET", "/endless?gone")
        client.more()
    with shared.connect() as client:
        for path in ("/closing?head", "/endless?never-ends"):
            client.request("HEAD", path)
            client.answer("HEAD")
    (shared.folder / "file.closed").unlink(missing_ok=True)
    shared.get("/filelike")
    for name in ("at-the-end", "gone", "head", "never-ends", "file"):
        until(lambda name=name: shared.log(f"{name}.closed") == "closed\n")
    assert "Traceback" not in shared.log()[since:]


def test_response_an_applications_traceback_is_logged_whole(shared):
    """The client is told nothing of it."""
    since = len(shared.log())
    body = shared.get("/raise").body
    shared.wait_log("Traceback(?s:.+)app.py(?s:.+)ValueError: the application's own mistake", since)
    assert b"Traceback" not in body
    assert b"app.py" not in body


def test_response_the_environ_is_complete(shared):
    seen = shared.get("/a?b").json
    assert seen["wsgi.url_scheme"] == "http"
    assert seen["wsgi.multithread"] is True
    assert seen["wsgi.multiprocess"] is True  # there are two workers
    assert seen["wsgi.run_once"] is False
    assert seen["SCRIPT_NAME"] == ""
    assert seen["SERVER_NAME"]
    assert seen["SERVER_PORT"] == str(shared.port)
    assert seen["REMOTE_ADDR"] == "127.0.0.1"
    assert seen["REMOTE_PORT"].isdigit()
    assert seen["hupserve.generation"] == 1
    assert isinstance(seen["hupserve.worker"], int)
    assert not {"HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"} & set(seen)


def test_response_requests_that_repeat_share_nothing(serve):
    """Guards: the caches of heads, which may not be seen.

    Each request has an environ of its own and its own client's address, and each second has its
    own Date. (The test's application has no factory, because that would copy the environ.)
    """
    server = serve("[app:main]\nwsgi = app:application\n")
    with server.connect() as one, server.connect() as other:
        first = one.get("/spoil?a")
        second = one.get("/spoil?a")
        third = other.get("/spoil?a")
        assert len(first.json) > 20
        assert set(second.json) == set(first.json)
        assert set(third.json) == set(first.json)
        for client, answer in ((one, first), (one, second), (other, third)):
            assert answer.json["REMOTE_PORT"] == str(client.socket.getsockname()[1])
        assert one.get("/spoil?b").json["QUERY_STRING"] == "b"
        date = first.headers["date"]
        until(lambda: one.get("/spoil?a").headers["date"] != date, "another second")


@pytest.mark.parametrize("length", [5, 70_000, 1_000_000])
@pytest.mark.parametrize("chunks", [0, 1, 7])
def test_response_a_body_read_by_one_read_is_whole(shared, length, chunks):
    """read() without a size takes another way through the standard library's readers."""
    request = b"POST /whole HTTP/1.1\r\nHost: test\r\n"
    if chunks:
        size = length // chunks
        sizes = [size] * (chunks - 1) + [length - size * (chunks - 1)]
        request += b"Transfer-Encoding: chunked\r\n\r\n"
        for size in filter(None, sizes):
            request += b"%x\r\n%b\r\n" % (size, b"x" * size)
        request += b"0\r\n\r\n"
    else:
        request += b"Content-Length: %d\r\n\r\n%b" % (length, b"x" * length)
    with shared.connect() as client:
        for _ in range(2):
            assert client.send(request).answer().body == b"%d " % length


@pytest.mark.parametrize(
    "framing", ["Content-Length: 3||hel", "Transfer-Encoding: chunked||3|hel|"]
)
def test_response_a_body_keeps_no_view_of_its_readers_buffer(shared, framing):
    """PyPy, and Python 3.15 under a profiler, would not let the buffer grow afterwards."""
    with shared.connect() as client:
        client.send(wire(f"POST /readinto HTTP/1.1|Host: a|{framing}"))
        assert client.answer().body == b"hello"


def test_response_a_file_whose_size_is_unknown_is_read(shared):
    assert b"\nPid:" in shared.get("/proc").body


def test_response_a_write_that_was_kept_writes_no_more(serve):
    server = serve(workers=1)
    with server.connect() as client:
        for _ in range(3):
            assert client.get("/keep").body == b"not late"
            assert client.buffer == b""


VALIDATED = (
    "[pipeline:main]\npipeline = validate app\n"
    "[filter:validate]\npaste.filter_factory = app:validate\n"
    + Server.APP.replace("app:main", "app:app", 1)
)
VALIDATED_PATHS = {
    "/": 200,
    "/list": 200,
    "/stream": 200,
    "/file?0,10": 200,
    "/filelike": 200,
    "/big?160000": 200,
    "/a%20b?c=d": 200,
    "/replaced": 503,
}
VALIDATED_REQUESTS = [
    "GET PATH HTTP/1.1|Host: a||",
    "GET PATH HTTP/1.0|Host: a||",
    "HEAD PATH HTTP/1.1|Host: a||",
    "POST PATH HTTP/1.1|Host: a|Content-Length: 5|Content-Type: text/plain||hello",
    "POST PATH HTTP/1.1|Host: a|Transfer-Encoding: chunked||5|hello|0||",
    "OPTIONS PATH HTTP/1.1|Host: a||",
]


def test_response_wsgiref_validate_has_nothing_to_say(serve):
    """The standard library's own judge of servers stands between hupserve and the application."""
    server = serve(VALIDATED)
    (server.folder / "data").write_bytes(b"0123456789")
    for path, status in VALIDATED_PATHS.items():
        for request in VALIDATED_REQUESTS:
            method, _, _ = request.partition(" ")
            with server.connect() as client:
                client.send(wire(request.replace("PATH", path)))
                assert client.answer(method).status == status
    assert not re.search("Assertion|Warning|ERROR", server.log())


FRAMEWORKS = {
    "flask": """\
import flask
app = flask.Flask(__name__)

@app.route('/<name>', methods=['POST'])
def hello(name):
    return name + flask.request.form['greeting']
""",
    "bottle": """\
import bottle
app = bottle.Bottle()

@app.post('/<name>')
def hello(name):
    return name + bottle.request.forms['greeting']
""",
    "django": """\
import django.conf, django.http, django.urls, django.core.wsgi

def hello(request, name):
    return django.http.HttpResponse(name + request.POST['greeting'])

urlpatterns = [django.urls.path('<name>', hello)]
django.conf.settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=['*'], SECRET_KEY='x')
app = django.core.wsgi.get_wsgi_application()
""",
}


@beyond_core
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_response_frameworks_run_unchanged(serve, framework):
    if not importable(framework):
        pytest.skip(f"the server's interpreter has no {framework}")
    server = serve("[app:main]\nwsgi = app:app\n", FRAMEWORKS[framework])
    form = "Content-Type: application/x-www-form-urlencoded"
    for _ in range(2):
        assert server.connect().post("/x", b"greeting=hello", form).body == b"xhello"
        server.reload()


# ==== the slow ====================================================================================


@beyond_core
def test_slow_heads_and_first_requests_end_at_header_timeout(serve):
    """A client that sends nothing, half a head, or a head byte by byte is let go."""
    server = serve(header_timeout=1)
    with server.connect() as silent, server.connect() as half:
        half.send(b"GET / HTTP/1.1\r\nHost: test\r\n")
        answer = half.answer()
        assert answer.status == 408
        assert answer.closes
        assert half.ended()

        head = b"GET / HTTP/1.1\r\nHost: test\r\nX: " + b"x" * 200
        pause = 0.1
        with server.connect() as dribbling:
            for byte in head:  # for over 20 s, if the server let it
                dribbling.send(bytes([byte]))
                if select.select([dribbling.socket], [], [], pause)[0]:
                    break
            else:
                pytest.fail("the whole head was received")
            assert dribbling.answer().status == 408

        with contextlib.suppress(Cut):
            silent.answer()
        assert silent.ended()


@beyond_core
def test_slow_clients_idle_connections_end_at_keepalive_timeout(serve):
    server = serve(keepalive_timeout=1)
    with server.connect() as client:
        assert not client.get().closes
        assert client.ended(), "without a word"
    server.reload(keepalive_timeout=0)
    with server.connect() as client:
        assert client.get().closes
        assert client.ended()


BODIES = ["Content-Length: 1000", "Content-Length: 100000", "Transfer-Encoding: chunked"]


@beyond_core
@pytest.mark.parametrize("field", BODIES)
def test_slow_bodies_end_at_io_timeout(serve, field):
    server = serve(workers=1, threads=1, io_timeout=1)
    with server.connect() as client:
        client.send(wire(f"POST / HTTP/1.1|Host: test|{field}||"))
        with contextlib.suppress(Cut):
            assert client.answer().status == 408
        assert client.ended()
    assert server.get().status == 200


@beyond_core
def test_slow_readers_end_at_io_timeout(serve):
    server = serve(workers=1, threads=1, io_timeout=1)
    with server.connect(receive_buffer=4096) as client:
        client.request("GET", "/endless?reader")
        assert server.get().status == 200, "the thread is free again"
        with pytest.raises(ConnectionError):
            client.answer()
    until((server.folder / "reader.closed").exists)


@beyond_core
def test_slow_but_steady_is_no_reason_to_end(serve):
    """io_timeout is about progress, not about the whole. This takes longer, in small steps."""
    size = 100_000
    steps = 10
    server = serve(io_timeout=1)
    with server.connect() as client:
        client.send(wire(f"POST /size HTTP/1.1|Host: test|Content-Length: {size}||"))
        for _ in range(steps):
            client.send(b"x" * (size // steps))
            time.sleep(0.15)
        assert client.answer().body == b"%d" % size


SIZE_FOR_THE_SLOW = 12_000_000


@beyond_core
@pytest.mark.parametrize("path", [f"/big?{SIZE_FOR_THE_SLOW}", "/file?0,"])
def test_slow_but_steady_readers_are_served_to_the_end(serve, path):
    """Guards: progress is measured by what is queued in the kernel.

    poll() reports room only when a third of the kernel's buffer is free.
    """
    server = serve(workers=1, io_timeout=1)
    (server.folder / "data").write_bytes(b"x" * SIZE_FOR_THE_SLOW)
    with server.connect(receive_buffer=65536) as client:
        client.request("GET", path)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            client.more()
            time.sleep(0.2)  # a few hundred kilobytes a second
        assert len(client.answer().body) == SIZE_FOR_THE_SLOW


@beyond_core
def test_slow_readers_of_a_large_file_fill_no_queue_but_free_their_thread_of_a_small_one(serve):
    """Guards: TCP_NOTSENT_LOWAT, and that it ends with the download on a connection that is kept.

    A megabyte in the kernel's queue leaves the processor's caches before the client copies it.
    """
    server = serve(workers=1)
    (server.folder / "data").write_bytes(b"x" * SIZE_FOR_THE_SLOW)
    with server.connect(receive_buffer=65536) as client:
        client.request("GET", "/file?0,")
        until(lambda: kernel_queue(server, client, "unsent") > 0)
        highest = 0
        for _ in range(20):
            highest = max(highest, kernel_queue(server, client, "unsent"))
            time.sleep(0.01)
        assert highest < 500_000
        assert len(client.answer().body) == SIZE_FOR_THE_SLOW
        client.request("GET", "/big?1500000")
        until(lambda: kernel_queue(server, client, "unsent") > 1_000_000)
        assert len(client.answer().body) == 1_500_000


@beyond_core
def test_slow_readers_of_next_to_nothing_end_at_io_timeout(serve):
    """A few bytes now and then are no progress. (slowhttptest -X attacks so.)"""
    server = serve(workers=1, threads=1, io_timeout=1)
    with server.connect(receive_buffer=4096) as client:
        client.request("GET", "/endless?reader")
        end = time.monotonic() + DEADLINE
        while not (server.folder / "reader.closed").exists():
            assert time.monotonic() < end
            client.socket.recv(150)
            time.sleep(0.1)


def test_slow_the_longest_idle_connection_makes_room(serve):
    """There is one thread, because of two the second might hand back its connection first."""
    server = serve(workers=1, threads=1, connections=5)
    clients = [server.connect() for _ in range(5)]
    for client in clients:
        client.get()
    refreshed, longest_idle, *others = clients
    refreshed.get()
    with server.connect() as newcomer:
        assert newcomer.get().status == 200
        assert longest_idle.ended()
        for client in [refreshed, *others]:
            assert client.get().status == 200


def test_slow_more_clients_than_connections_take_turns(serve):
    """Guards: a connection that is new, or was just answered, does not make room for another.

    While a client is queued, no connection is kept.
    """
    server = serve(workers=1, threads=4, connections=8)
    with Load(server, keep=20, closing=20) as load:
        for _ in range(10):
            load.more()
            assert server.get().status == 200
    assert load.lost == []


@beyond_core
def test_slow_and_so_do_clients_that_come_when_all_threads_are_busy(serve):
    """Guards: a worker that resumes accepting knows that it was full."""
    server = serve(workers=1, threads=1, connections=3)
    with Load(server, keep=10, closing=0, path="/nap") as load:
        for _ in range(10):
            load.more(10)
            assert server.get().status == 200
    assert load.lost == []


def test_slow_newcomers_go_to_the_worker_with_the_fewest_connections(serve):
    """Guards: a worker with more connections leaves a client to the others for a moment.

    Otherwise a worker that is awake could take nearly all of a burst. One fair burst of twenty is
    enough here, because the machine may be busy with other things.
    """
    burst = 60
    server = serve(workers=2)
    early, late = server.workers()
    unused = len(descriptors(early))

    def larger_share():
        until(lambda: len(descriptors(early)) == unused, "the burst before to be closed")
        for worker in early, late:
            os.kill(worker, SIGSTOP)
        clients = [server.connect() for _ in range(burst)]
        os.kill(early, SIGCONT)
        until(lambda: len(descriptors(early)) > unused, "one to accept")
        os.kill(late, SIGCONT)
        shares = collections.Counter(client.get().json["pid"] for client in clients)
        for client in clients:
            client.close()
        return max(shares.values())

    assert any(larger_share() <= 2 / 3 * burst for _ in range(20))


def test_slow_newcomers_are_not_starved_by_kept_connections(serve):
    """Each time a thread comes free, one new connection is accepted before a waiting one runs."""
    server = serve(workers=1, threads=2)
    with Load(server, keep=10, closing=0, path="/nap") as load:
        load.more(50)
        for _ in range(10):
            assert server.get().status == 200
    assert load.lost == []


# ==== the operator ================================================================================

OPENSSL = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    " -subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout NAME.key -out NAME.pem"
)


@pytest.fixture
def certificates(folder):
    """Two self-signed certificates for localhost, each as the ini's certfile and keyfile."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl command")
    pairs = []
    for name in ("one", "two"):
        command = OPENSSL.replace("NAME", name).split()
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        pairs.append({"certfile": folder / f"{name}.pem", "keyfile": folder / f"{name}.key"})
    return pairs


def trusting(pair: dict[str, Path]) -> ssl.SSLContext:
    """Return a client's context that trusts this certificate only."""
    context = ssl.create_default_context(cafile=str(pair["certfile"]))
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@beyond_core
def test_operator_tls_and_its_renewal(serve, certificates):
    """The certificate changes at a reload, and a bad pair is refused.

    A connection in flight ends under the old certificate.
    """
    one, two = certificates
    server = serve(workers=1, log_level="debug", **one)
    assert server.addresses == [f"https://127.0.0.1:{server.port}"]
    with server.connect(tls=trusting(one)) as client:
        assert client.socket.selected_alpn_protocol() == "http/1.1"
        assert client.get().json["wsgi.url_scheme"] == "https"
        # The larger body takes several TLS records. Some of it may be decrypted already, inside the
        # SSLSocket, where the server's selector does not see it.
        for size in (1000, 300_000):
            assert client.post("/", b"x" * size).json["body"] == "x" * size
        client.request("GET", "/one")
        client.request("GET", "/two")
        assert client.answer().json["PATH_INFO"] == "/one"
        assert client.answer().json["PATH_INFO"] == "/two"
        assert client.get("/big?8000000").body == b"0123456789abcdef" * 500_000
        server.reload_fails(
            "reload refused: .*(?:keyfile|certfile).*",
            certfile=one["certfile"],
            keyfile=two["keyfile"],
        )
        client.request("GET", "/hold?held")
        until((server.folder / "held.began").exists)
        server.reload(**two)
        with server.connect(tls=trusting(two)) as new:
            assert new.get().json["hupserve.generation"] == server.generation
        with pytest.raises(ssl.SSLError):
            server.connect(tls=trusting(one))
        server.release("held")
        assert client.answer().closes
        assert client.ended()


@beyond_core
def test_operator_tls_has_no_sizes_that_are_too_large(serve, certificates):
    """Guards: no system call is asked for 2 GiB. Python 3.9's TLS would raise OverflowError."""
    server = serve(workers=1, **certificates[0])
    with server.connect(tls=trusting(certificates[0])) as client:
        length = f"Content-Length: {2**31 + 1}"
        client.request("POST", "/gigabytes", b"", length, "Expect: 100-continue")
        assert client.answer().status == 100
        client.send(b"hello")
        assert client.take_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert client.take(1_000_000) == b"x" + bytes(999_999)
    assert server.log("gigabytes") == "5\n"


@beyond_core
def test_operator_tls_handshakes_delay_nobody(serve, certificates):
    """A client that stalls in its handshake, or speaks something else, costs no thread.

    It leaves a debug line and no traceback.
    """
    half_a_hello = b"\x16\x03\x01\x02\x00\x01\x00"
    server = serve(workers=1, threads=1, header_timeout=1, log_level="debug", **certificates[0])
    stalled = [server.connect() for _ in range(20)]
    half = server.connect().send(half_a_hello)
    plain = server.connect().send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" * 10)
    garbage = server.connect().send(os.urandom(100))
    server.connect().send(half_a_hello).close()
    with server.connect(tls=trusting(certificates[0])) as client:
        assert client.get().status == 200
    for client in [*stalled, half, plain, garbage]:
        with contextlib.suppress(ConnectionResetError):
            while client.socket.recv(1000):  # an alert, perhaps, before the end
                pass
    assert "DEBUG" in server.log()
    assert "ERROR" not in server.log()


@beyond_core
def test_operator_unix_sockets(serve, folder):
    """A socket file has the umask's mode, replaces a stale one, and keeps its inode at a reload.

    It is refused where another server is alive, and removed when its address is dropped.
    socket_mode wins over the umask, at a reload too.
    """
    path = folder / "socket"
    other = folder / "other"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = serve(listen=f"unix:{path}", prefix=in_shell("umask 077"))
    assert server.addresses == [f"unix:{path}"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert server.get(address=path).json["PATH_INFO"] == "/"

    inode = path.stat().st_ino
    server.reload(listen=f"unix:{path} unix:{other}", socket_mode="0666")
    assert path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o666, "the one that is kept"
    assert stat.S_IMODE(other.stat().st_mode) == 0o666, "the new one"
    assert server.get(address=other).json["hupserve.generation"] == 2

    second = run(server.ini, cwd=folder)
    assert second.returncode == 1
    assert str(path) in second.stderr
    assert is_one_line(second)
    assert server.get(address=path).status == 200, "the second has not taken it away"

    server.reload(listen=f"unix:{other}", socket_mode="")
    until(lambda: not path.exists())
    assert stat.S_IMODE(other.stat().st_mode) == 0o700

    # Another server takes the path between the reload's bind and its commit.
    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.write(listen=f"unix:{other} unix:{path}")
    server.signal()
    until(path.exists, "the reload to bind it")
    with shared_server(listen=f"unix:{path}") as another:
        server.remove("gate")
        server.wait_log("rolled back: .*another master")
        assert another.get(address=path).json["pid"] in another.workers()
    server.write_app(APPLICATION)

    # Some cleaner of folders removes the file. Further reloads must work nevertheless.
    other.unlink()
    server.reload(listen=f"unix:{other}")
    server.stop()
    assert not other.exists()


@beyond_core
def test_operator_ipv6_and_all_addresses(serve):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6")
    server = serve(listen="[::1]:0")
    assert server.get(address=("::1", server.port)).json["REMOTE_ADDR"] == "::1"
    port = free_port()
    server.reload(listen=f"*:{port}")
    assert server.get(address=("127.0.0.1", port)).json["REMOTE_ADDR"] == "127.0.0.1"
    assert server.get(address=("::1", port)).json["REMOTE_ADDR"] == "::1"


# What systemd does between fork and exec: the sockets become descriptors 3, 4 and so on.
HAND_OVER = """
import os, sys
numbers = sys.argv[1].split(",")
for place, number in enumerate(numbers, start=3):
    os.dup2(int(number), place)
os.environ["LISTEN_FDS"] = str(len(numbers))
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDNAMES"] = "x"
os.execv(sys.argv[2], sys.argv[2:])
"""


@beyond_core
def test_operator_socket_activation(serve, folder):
    """The sockets are systemd's. The program itself is replaced, and no client is refused."""
    path = folder / "socket"
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.socket())
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(path))
        numbers = []
        for listener in (tcp, unix):
            listener.listen()
            # Out of the way of 3 and 4, which HAND_OVER fills.
            number = fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, 50)
            stack.callback(os.close, number)
            numbers.append(number)
        server = serve(
            listen=f"127.0.0.1:{tcp.getsockname()[1]} unix:{path}",
            popen={"pass_fds": numbers},
            prefix=[PYTHON, "-c", HAND_OVER, ",".join(map(str, numbers))],
        )
        environment = server.get("/environment").json
        assert not [key for key in environment if key.startswith("LISTEN_")]
        # Without it an answer in two pieces would take 40 ms.
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with Load(server, keep=0, closing=4) as load:
            load.more()
            server.reload()
            load.more()
            server.stop()
            assert path.exists(), "it is not hupserve's to remove"
            server.stderr.unlink()
            server.start()
            load.more()
        assert load.lost == []
        assert server.get(address=path).json["PATH_INFO"] == "/"
        assert "wait in vain" not in server.log()
        server.reload(listen=f"127.0.0.1:{tcp.getsockname()[1]}")
        [warning] = [line for line in server.log().splitlines() if "wait in vain" in line]
        assert str(path) in warning


def monotonic_microseconds() -> int:
    """Return what systemd expects in MONOTONIC_USEC."""
    return time.monotonic_ns() // 1000


class Notifications:
    """The socket on which systemd would listen for sd_notify's datagrams."""

    LARGEST = 4096  # bytes; systemd drops larger ones

    def __init__(self, name: str) -> None:
        """name: a path, or a name in the abstract namespace with a leading @"""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(name.replace("@", "\0"))
        self.socket.settimeout(DEADLINE)

    def next(self, *expected: str) -> dict[str, str]:
        """Return the next message that is more than a STATUS. It must have these keys."""
        while True:
            lines = self.socket.recv(self.LARGEST).decode().splitlines()
            message = dict(line.split("=", 1) for line in lines)
            if set(message) != {"STATUS"}:
                assert set(expected) <= set(message), message
                return message

    def wait_for_reload_since(self, began: int) -> None:
        """Wait for a RELOADING whose time, in microseconds, is not before `began`."""
        while True:
            message = self.next()
            if "RELOADING" in message and int(message["MONOTONIC_USEC"]) >= began:
                return


@beyond_core
@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_operator_sd_notify(serve, folder, abstract):
    """READY comes at the start, and STOPPING at the end.

    Every SIGHUP is answered by RELOADING and then READY, whatever became of the reload.
    """
    name = f"@hupserve-test-{os.getpid()}" if abstract else str(folder / "notify")
    notifications = Notifications(name)
    with notifications.socket:
        server = serve(env={"NOTIFY_SOCKET": name}, log_level="debug")
        notifications.next("READY")
        assert "NOTIFY_SOCKET" not in server.get("/environment").json

        for workers in (3, "none", 2):
            began = monotonic_microseconds()
            server.write(workers=workers)
            server.signal()
            message = notifications.next("RELOADING", "MONOTONIC_USEC")
            assert message["RELOADING"] == "1"
            assert began <= int(message["MONOTONIC_USEC"]) <= monotonic_microseconds()
            assert notifications.next("READY", "STATUS")["READY"] == "1"

        # An error with a surrogate, as os.fsdecode() makes of some file names.
        server.tracebacks = True
        server.write_app("raise RuntimeError('\\udcff')\n")
        server.signal()
        notifications.next("RELOADING")
        assert "\\udcff" in notifications.next("READY")["STATUS"]

        # A SIGHUP during a reload is answered, too, with a time after it came.
        server.write_app(GATE + APPLICATION)
        server.touch("gate")
        server.signal()
        notifications.next("RELOADING")
        began = monotonic_microseconds()
        since = len(server.log())
        server.signal()
        server.wait_log("heard SIGHUP", since)
        server.remove("gate")
        notifications.wait_for_reload_since(began)
        notifications.next("READY")

        # A reload that is given up for a stop is answered, too.
        server.touch("gate")
        server.signal()
        notifications.next("RELOADING")
        server.signal(SIGTERM)
        notifications.next("READY")
        notifications.next("STOPPING")
        assert server.process.wait(DEADLINE) == 0
        assert notifications.socket.recv(notifications.LARGEST) == b"STATUS=stopped"


@beyond_core
def test_operator_sd_notify_fits_into_a_datagram(serve, folder):
    """systemd drops a longer one whole, and would wait for READY for ever."""
    notifications = Notifications(str(folder / "notify"))
    with notifications.socket:
        server = serve(env={"NOTIFY_SOCKET": str(folder / "notify")})
        notifications.next("READY")
        for letter in "x", "\N{SNOWMAN}", "\N{PILE OF POO}":
            line = server.reload_fails("reload refused: .*", listen=letter * 100_000)
            assert len(line) < 1100
            assert "[server:main] listen: 'x" in line or letter != "x"
            assert "unix:/path" in line, "the reason is at the end"
            notifications.next("RELOADING")
            status = notifications.next("READY", "STATUS")["STATUS"]
            assert "[server:main] listen:" in status
            assert len(status) <= 1000


@beyond_core
def test_operator_sd_notify_waits_for_a_systemd_that_is_busy(serve, folder):
    """Its queue is full for a moment, and READY=1 is not lost."""
    notifications = Notifications(str(folder / "notify"))
    with notifications.socket, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        server = serve(env={"NOTIFY_SOCKET": str(folder / "notify")})
        notifications.next("READY")
        filler.setblocking(False)
        filler.connect(str(folder / "notify"))
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.send(b"STATUS=busy")
        server.signal()
        server.wait_log("SIGHUP: reloading")
        time.sleep(0.1)  # systemd is busy
        notifications.next("RELOADING")
        notifications.next("READY")


@beyond_core
def test_operator_the_journal_gets_priorities(serve, folder):
    """Every line has one, those of a traceback too; the journal adds time and pid itself."""
    server = Server(folder, workers=1, access_log="-")
    server.stderr.touch()
    status = server.stderr.stat()
    server = serve(
        workers=1, access_log="-", env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    )
    server.tracebacks = True
    server.get("/raise")
    server.reload_fails("<3>reload refused: .*workers", workers="none")
    lines = server.log().splitlines()
    assert all(re.match("<[0-7]>", line) for line in lines), lines
    assert "<3>Traceback (most recent call last):" in lines
    assert "<3>ValueError: the application's own mistake" in lines
    assert "<6>generation 1 serves with 1 worker" in lines
    assert re.search("^<6>hupserve: serving", server.log())
    assert re.search('^<6>127.0.0.1 .*"GET /raise HTTP/1.1" 500', server.log(), re.M)


@beyond_core
def test_operator_pidfile(serve, folder):
    pidfile = folder / "pid"
    moved = folder / "moved"
    path = folder / "socket"
    second = folder / "second.ini"
    pidfile.write_text("999999999\n")  # of a dead server
    server = serve(pidfile=pidfile)
    assert pidfile.read_text().strip() == str(server.pid)

    server.reload(pidfile=moved, listen=f"127.0.0.1:0 unix:{path}")
    until(lambda: moved.exists() and not pidfile.exists())
    second.write_text(GOOD.replace(KEY, f"listen = unix:{path}\npidfile = {moved}"))
    assert run(second, cwd=folder).returncode in (1, 2)
    assert server.get(address=path).status == 200, "the second has not touched the socket"
    assert moved.read_text().strip() == str(server.pid)

    fifo = folder / "fifo"
    os.mkfifo(fifo)
    server.reload_fails("pidfile: .*a pipe that nobody reads", pidfile=fifo)
    server.reload_fails("rolled back: .*pidfile: /dev/full: No space", pidfile="/dev/full")
    server.stop()
    assert not moved.exists()


@beyond_core
def test_operator_pidfile_is_written_over_whatever_is_there(serve, folder):
    """A living stranger's too: on a volume that outlives a container any pid may be in it.

    It is removed only if it still names us.
    """
    pidfile = folder / "pid"
    pidfile.write_text(f"{os.getpid()}\n")
    server = serve(pidfile=pidfile)
    assert pidfile.read_text() == f"{server.pid}\n"
    pidfile.write_text(f"{os.getpid()}\n")
    server.stop()
    assert pidfile.read_text() == f"{os.getpid()}\n"


COMBINED = re.compile(
    r"127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
    r'"(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}) (?P<size>\d+|-) '
    r'"(?P<referer>(?:[^"\\]|\\.)*)" "(?P<agent>(?:[^"\\]|\\.)*)" (?P<seconds>\d+\.\d+)'
)


@beyond_core
def test_operator_access_log(serve):
    """It has the combined format and the seconds taken. What clients sent is escaped."""
    server = serve(access_log="access.log", workers=1)
    server.get("/a?b", "Referer: http://r/", 'User-Agent: "quoted" \\ caf\xe9')
    with server.connect() as client:
        client.send(b"nonsense\r\n\r\n").answer()
    server.stop()
    lines = server.log("access.log").splitlines()
    good, bad = sorted(lines, key=lambda line: "nonsense" in line)
    assert good.isascii()
    found = COMBINED.fullmatch(good)
    assert found["request"] == "GET /a?b HTTP/1.1"
    assert found["status"] == "200"
    assert found["referer"] == "http://r/"
    assert int(found["size"]) > 100
    assert float(found["seconds"]) < 100
    assert "quoted" in found["agent"]
    assert '"quoted"' not in found["agent"].replace('\\"', "")
    assert COMBINED.fullmatch(bad)["status"] == "400"


@beyond_core
def test_operator_access_log_has_english_months(serve, folder):
    """Log parsers know no others, whatever the application has made of its locale."""
    (folder / "polish").write_text('LC_TIME\ncopy "pl_PL"\nEND LC_TIME\n')
    command = ["localedef", "-c", "-i", "polish", "-f", "UTF-8", "./pl.UTF-8"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True)
    except OSError:
        pytest.skip("no localedef command")
    if not (folder / "pl.UTF-8").is_dir():
        pytest.skip("localedef has no list of the characters in UTF-8")
    polish = "import locale\nlocale.setlocale(locale.LC_TIME, 'pl.UTF-8')\n"
    env = {"LOCPATH": str(folder)}
    server = serve(code=polish + APPLICATION, access_log="access.log", workers=1, env=env)
    server.get()
    line = server.wait_log(r"\[\d\d/(.+?)/", file="access.log")
    months = "JanFebMarAprMayJunJulAugSepOctNovDec"
    assert months.index(line[1]) == 3 * (time.localtime().tm_mon - 1)


PROTOCOL = [
    r"heard SIGHUP",
    r"generation 2: configuration read; addresses kept: 127\S+; new: 127\S+; dropped: none",
    r"generation 2: loading",
    r"worker 0 \(pid \d+\) of generation 2: booting",
    r"worker 0 \(pid \d+\) of generation 2: ready",
    r"generation 2: every worker is ready: commit",
    r"go, to worker 0 \(pid \d+\)",
    r"drain, to worker 0 \(pid \d+\); addresses that nobody inherits: none",
    r"drain: closed the listener of 127",
    r"drain: 1 requests in flight, 0 other connections busy, 1 idle",
    r"drain: an idle connection has 0\.1 s",
    r"drain: the last connection is gone",
    r"leaving: waiting for the application's threads: none",
    r"leaving: running the exit functions",
    r"reaped worker 0 \(pid \d+\)",
]


@beyond_core
def test_operator_the_log_tells_the_protocol_at_debug(serve):
    """Guards: one line a step by master and workers, in this order, and none of them at info."""
    server = serve(workers=1, log_level="debug", idle_grace=0.1)
    held = server.hold("held")
    server.connect().get()
    server.reload(listen=f"{server.keys['listen']} 127.0.0.1:{free_port()}")
    server.release("held")
    held.answer()
    since = 0
    for pattern in PROTOCOL:
        since += server.wait_log(pattern, since).start()
    server.reload(log_level="info")
    until(lambda: len(server.workers()) == 1, "the last worker that logs at debug to end")
    quiet_from = len(server.log())
    server.reload()
    assert "DEBUG" not in server.log()[quiet_from:]


@beyond_core
def test_operator_log_files_follow_rotation(serve, folder):
    """They are renamed under load, without a signal or with USR1, and no line is lost."""
    server = serve(access_log="access.log", log_file="error.log")

    def lines_in_access_logs():
        return sum(path.read_text().count("\n") for path in folder.glob("access.log*"))

    with Load(server) as load:
        for rotation in range(3):
            load.more()
            for path in folder.glob("*.log"):
                path.rename(f"{path}.{rotation}")
            if rotation > 0:
                os.killpg(server.pid, SIGUSR1)
            until((folder / "access.log").exists)
        load.more()
    assert load.lost == []
    until(lambda: lines_in_access_logs() == len(load.answered))
    os.kill(min(server.workers()), SIGKILL)
    server.wait_log("replaced", file="error.log")


def serve_in_a_terminal(serve: Serve, **keywords: Any) -> tuple[Server, Callable[[], None]]:
    """Start a server with a new pseudo terminal for 0, 1 and 2.

    Return the server, and a function that closes the terminal's window.
    """
    window, line = pty.openpty()
    terminal = {"stdin": line, "stdout": line, "stderr": line}
    try:
        server = serve(port=free_port(), popen=terminal, **keywords)
    except BaseException:
        os.close(window)
        raise
    finally:
        os.close(line)
    return server, lambda: os.close(window)


@beyond_core
def test_operator_a_closed_terminal_is_a_reload(serve):
    """Closing the window sends a HUP, and a HUP is always a reload: the server serves on."""
    server, close_window = serve_in_a_terminal(serve, terminal=True)
    held = server.hold("held")
    with Load(server) as load:
        load.more()
        close_window()
        until(lambda: load.more(10)[-1] >= 2, "the new generation to answer")
        server.release("held")
        assert held.answer().closes
        load.more()
    assert load.lost == []
    assert server.process.poll() is None


@beyond_core
@pytest.mark.parametrize("how", ["nohup", "setsid"])
def test_operator_nohup_and_setsid_outlive_the_terminal(serve, how):
    """The HUP of the closed window is a reload, too. After setsid there is none.

    The tests start every server as setsid does, so for setsid there is nothing to add.
    """
    if how == "nohup":
        server, close_window = serve_in_a_terminal(serve, terminal=True, prefix=["nohup"])
    else:
        server, close_window = serve_in_a_terminal(serve)
    close_window()
    with Load(server) as load:
        load.more()
        generation = 1
        if how == "nohup":
            until(lambda: load.more(10)[-1] == 2)
            generation = 2
        server.signal(SIGHUP)
        until(lambda: load.more(10)[-1] == generation + 1)
    assert load.lost == []
    assert server.process.poll() is None


@beyond_core
def test_operator_a_background_job_may_write_after_stty_tostop(serve):
    """The terminal sends a TTOU at the first line of the log, which costs nothing.

    Neither do those that anybody sends.
    """
    window, line = pty.openpty()
    shown = []

    def watch():
        with contextlib.suppress(OSError):  # the terminal's last user has ended
            while True:
                shown.append(os.read(window, 4096))

    command = 'stty tostop; set -m; "$@" & echo $! >pid; wait $!'
    watcher = threading.Thread(target=watch)
    watcher.start()
    server = serve(
        port=free_port(),
        terminal=True,
        prefix=["sh", "-c", command, "sh"],
        popen={"stdin": line, "stdout": line, "stderr": line},
        access_log="-",
    )
    server.pid = int(server.log("pid"))
    assert os.getpgid(server.pid) != os.tcgetpgrp(window), "it is in the background"
    os.close(line)
    with Load(server) as load:
        load.more()
        for number in (signal.SIGTTOU, signal.SIGTTIN, signal.SIGUSR2):
            os.killpg(server.pid, number)
        server.signal()
        until(lambda: load.more(10)[-1] == 2, "the reload")
    assert load.lost == []
    until(lambda: b"generation 2 serves" in b"".join(shown))
    server.signal(SIGTERM)
    assert server.process.wait(DEADLINE) == 0
    watcher.join(DEADLINE)
    os.close(window)


@beyond_core
def test_operator_status_while_a_slow_request_drains(serve):
    """It shows both generations, and what the old one waits for.

    That is the client, the method, the path and the age, but no query string.
    """
    server = serve(Server.STATUS)
    held = server.hold("secret")
    server.reload()

    def states_of_old():
        return [worker["state"] for worker in server.status() if worker["generation"] == 1]

    until(lambda: states_of_old() == ["draining"])
    workers = server.status()
    assert {worker["generation"] for worker in workers} == {1, 2}
    for worker in workers:
        assert {"worker", "state", "idle", "reading", "in_flight", "served"} <= set(worker)
    [old] = [worker for worker in workers if worker["generation"] == 1]
    assert old["pid"] == held.worker
    assert old["in_flight"] == 1
    [request] = old["requests"]
    assert request["method"] == "GET"
    assert request["path"] == "/hold"
    assert request["age"] >= 0
    assert "127.0.0.1" in request["client"]

    page = server.get("/status", "Accept: text/html")
    assert page.headers["content-type"].startswith("text/html")
    assert b"secret" not in page.body
    assert b"http://" not in page.body, "it needs no other host"
    assert b"https://" not in page.body
    assert server.get("/status", "Accept: application/json").json["workers"]
    assert server.get("/statuses").json["PATH_INFO"] == "/statuses"
    server.release("secret")
    assert held.answer().status == 200
    until(lambda: len(server.status()) == 2)


@beyond_core
def test_operator_status_tells_of_the_master_and_its_last_reload(serve):
    """It shows each step and outcome of a reload, whatever it says, and however long that is."""
    server = serve(Server.STATUS)

    def master():
        return server.get("/status?format=json").json["master"]

    def outcome(pattern):
        """Wait for such an outcome, and return the master's entry."""
        until(lambda: re.search(pattern, master()["outcome"]))
        return master()

    first = outcome("^generation 1 serves with 2 workers$")
    assert first["pid"] == server.pid
    assert first["ini"].endswith(server.ini.name)
    assert first["state"] == "ready"
    assert first["failed"] is False
    assert 0 <= first["age"] < DEADLINE

    server.write_app(GATE + APPLICATION)
    server.touch("gate")
    server.signal()
    loading = outcome("^loading generation 2 with 2 workers$")
    assert loading["state"] == "reloading"
    states = ["serving", "serving", "booting", "booting"]
    until(lambda: [worker["state"] for worker in server.status()] == states)
    server.remove("gate")
    outcome("^generation 2 serves with 2 workers$")

    server.write(workrs=3)
    server.signal()
    refused = outcome("^reload refused: .* workrs: unknown key; did you mean workers[?]$")
    assert refused["state"] == "ready"
    assert refused["failed"] is True

    # A text of 5,000 characters, which take six bytes each.
    server.write(workrs=None, **{"\x01" * 5_000: 3})
    server.signal()
    outcome(r"^reload refused: [^\x01]*\x01{100}")

    server.tracebacks = True
    server.ini.write_text(server.ini.read_text().replace("\x01" * 5_000 + " = 3", ""))
    server.write_app("raise RuntimeError('\\udcff')\n")
    server.signal()
    assert outcome("^reload rolled back: worker [01] failed: RuntimeError")["failed"] is True


@beyond_core
def test_operator_status_of_what_is_in_flight_while_nothing_changes(serve):
    """An age grows though the worker sleeps. What is too long for a slot is cut.

    A client chooses method and path. These would be escaped twice.
    """
    server = serve(Server.STATUS, workers=1)
    longest = 8_000  # characters; a whole request line has 8,192 bytes
    for number in range(7):
        server.connect().request("GET", "/hold/" + '"' * longest + f"?secret{number}")
    server.connect().request("G" * longest, "/hold?secret")

    def held():
        [worker] = server.status()
        return [request for request in worker["requests"] if request["path"] != "/status"]

    until(lambda: len(held()) == 8)
    assert [worker["state"] for worker in server.status()] == ["serving"]
    found = held()
    assert {request["client"] for request in found} == {"127.0.0.1"}
    assert {request["method"][:3] for request in found} == {"GET", "GGG"}
    assert {request["path"][:6] for request in found} == {"/hold/", "/hold"}
    assert "secret" not in json.dumps(found)
    oldest = found[0]["age"]
    until(lambda: held()[0]["age"] >= oldest + 0.3)


class Browser:
    """A page in headless Chromium, driven over a pair of pipes by the DevTools protocol.

    Each message is JSON and ends with a NUL. (chromium --remote-debugging-pipe)
    """

    CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
    OPTIONS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --remote-debugging-pipe"
    )
    COMMANDS = 3  # the descriptor from which Chromium reads
    ANSWERS = 4  # the one to which it writes

    def __init__(self, url: str, profile: Path) -> None:
        """profile: an empty folder"""
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()

        def prepare_pipes() -> None:
            """(child, before exec) Give the pipes the numbers that Chromium expects."""
            above = 10
            copies = [fcntl.fcntl(end, fcntl.F_DUPFD, above) for end in (commands, answers)]
            os.dup2(copies[0], self.COMMANDS)
            os.dup2(copies[1], self.ANSWERS)
            for copy in copies:
                os.close(copy)

        self.process = subprocess.Popen(
            [self.CHROMIUM, *self.OPTIONS.split(), f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,
            preexec_fn=prepare_pipes,
        )
        os.close(commands)
        os.close(answers)
        self.buffer = b""
        self.numbers = itertools.count()
        self.errors: list[Any] = []  # what the console shows
        self.session: dict[str, Any] = {}  # which page the commands are for
        page = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in "Runtime", "Log", "Network":
            self.command(f"{domain}.enable")
        self.command("Page.navigate", url=url)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        """End Chromium and all its processes."""
        os.killpg(self.process.pid, SIGKILL)
        self.process.wait(DEADLINE)
        os.close(self.commands)
        os.close(self.answers)

    def command(self, method: str, **parameters: object) -> Any:
        """Give a command and return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(answer["params"])
            if answer.get("id") == number:
                return answer["result"]

    def message(self) -> Any:
        """Return the next message."""
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], DEADLINE)[0], "Chromium is silent"
            data = os.read(self.answers, 65536)
            assert data, "Chromium has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and return its value."""
        evaluated = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        return evaluated["result"].get("value")

    def shows(self, pattern: str, times: int = 1) -> bool:
        """Is the pattern found so many times in the text that one sees?"""
        text = self.run("document.body ? document.body.innerText : ''")
        return len(re.findall(pattern, text)) == times

    def be_offline(self, offline: bool) -> None:
        """Let all requests of the page fail, or let them pass again."""
        unlimited = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.command("Network.emulateNetworkConditions", offline=offline, **unlimited)


# Which requests has the page ever shown?
NOTE_ALL_BARS = """
seen = new Set()
setInterval(() => document.querySelectorAll(".requests li span:first-child")
  .forEach(bar => seen.add(bar.textContent)), 50)
"""


@beyond_core
@pytest.mark.skipif(not Browser.CHROMIUM, reason="there is no Chromium")
def test_operator_page_shows_the_reload_in_a_browser(serve, folder):
    """Three presses are three requests. They are seen in flight, in both generations, and answered.

    What was selected before stays selected. When nobody answers, the page says so and waits.
    """
    demo = Server.STATUS.replace("app:factory", "hupserve:demo_app")
    server = serve(demo)
    with Browser(f"http://127.0.0.1:{server.port}/", folder / "profile") as page:
        until(lambda: page.shows(f"Master, pid {server.pid}"))
        assert page.shows("generation 1 serves with 2 workers")
        assert page.shows(f"kill -HUP {server.pid}")
        page.run("getSelection().selectAllChildren(document.querySelector('#pid'))")
        page.run(NOTE_ALL_BARS)
        page.run("document.querySelector('#hold').value = 3")  # seconds
        for _ in range(3):
            page.run("document.querySelector('#hold').click()")
        until(lambda: page.shows("GET /slow from 127.0.0.1", times=3))

        server.reload(demo.replace("hello", "<b>servus</b>"))
        until(lambda: page.shows("(?s)Generation 1.*draining.*Generation 2.*serving"))
        until(lambda: page.shows("<b>servus</b>"))
        assert page.shows("GET /slow from 127.0.0.1", times=3)
        until(lambda: page.shows(r"hello, after 3 s, still from pid \d+ of generation 1", times=3))
        until(lambda: page.shows("Generation 1", times=0))
        server.reload_fails("reload refused", workrs=3)
        until(lambda: page.shows("reload refused: .*did you mean workers"))
        assert page.run("getSelection().toString()") == str(server.pid)
        assert page.run("[...seen].join()") == "GET /slow from 127.0.0.1", "nothing of its own"
        assert page.errors == []

        page.be_offline(True)
        until(lambda: page.shows("Nobody answers"))
        assert page.shows("Generation 2"), "the last picture"
        page.be_offline(False)
        until(lambda: page.shows("Nobody answers", times=0))


@beyond_core
def test_operator_the_example_runs_as_it_is(serve, folder):
    """Only its address is another here."""
    example = HUPSERVE.with_name("example.ini").read_text()
    example = re.sub(r"(?m)^listen *=.*", "listen = 127.0.0.1:0", example)
    _, _, after_heading = example.partition("[server:main]")
    _, _, sections = after_heading.partition("\n\n")
    server = serve(sections)
    server.ini.write_text(example)
    server.signal()
    server.wait_log("generation 2 serves")
    assert server.get("/?format=json").json["greeting"] == "hello"
    assert server.get("/slow?seconds=1").status == 200
    server.ini.write_text(re.sub(r"(?m)^greeting *=.*", "greeting = <b>good day</b>", example))
    server.reload()
    assert server.get("/?format=json").json["greeting"] == "<b>good day</b>"
    page = server.get("/", "Accept: text/html")
    assert page.headers["content-type"].startswith("text/html")
    assert b"good day" not in page.body, "no text of another's is put into markup"


@beyond_core
def test_operator_another_servers_section_is_read(serve):
    """Guards: `use = egg:waitress#main` with `host` and `port` once served 127.0.0.1:8000.

    What is ignored is one warning, and needs no variables: those may come from a command line.
    """
    ports = [free_port(), free_port()]
    server = serve()
    texts = [
        (f"host = 127.0.0.1\nport = {ports[0]}\nunix_socket = %(run)s/x\nidle = 3", ports[0]),
        (f"listen = 127.0.0.1:{ports[1]}\nhost = 0.0.0.0\nport = %(http_port)s", ports[1]),
        (f"host =\nport = {ports[0]}", ports[0]),
        (f"port = {ports[1]}", ports[1]),
    ]
    if socket.has_dualstack_ipv6():
        texts.append((f"host = ::1\nport = {ports[0]}", ports[0]))
    for text, port in texts:
        server.put(server.ini.name, f"[server:main]\nuse = egg:x#main\n{text}\n{Server.APP}")
        server.reload()
        host = "::1" if "::1" in text else "127.0.0.1"
        assert server.get(address=(host, port)).json["hupserve.generation"] == server.generation
    ignored = re.findall(r"WARNING .* ignored: (.*)", server.log())
    assert ignored == ["unix_socket idle", "host port"]


# Each is a way to name an application. The name of the first is on its left, as wsgi has it.
WAYS = """
import functools
from app import application

def create_app():
    return application

def view(request):
    return application

@functools.wraps(view)
def wrapped(environ, start_response):
    return application(environ, start_response)

class AsClass:
    def __init__(self, environ, start_response):
        self.pieces = application(environ, start_response)
    def __iter__(self):
        return iter(self.pieces)

class AsMethod:
    def __call__(self, *arguments):
        return application(*arguments)

as_object = AsMethod()
as_partial = functools.partial(lambda name, *arguments: application(*arguments), "name")
"""


@beyond_core
def test_operator_an_application_is_named_in_many_ways(serve):
    """A function without arguments makes it, if parentheses say so. No callable is refused that
    two arguments can be given to, whatever it wraps."""
    server = serve()
    server.put("ways.py", WAYS)
    for name in ("create_app()", "AsMethod()", "wrapped", "AsClass", "as_object", "as_partial"):
        server.reload(f"[app:main]\nwsgi = ways:{name}\n")
        assert server.get().json["hupserve.generation"] == server.generation
    for name in ("create_app", "view", "AsMethod"):
        server.reload_fails(
            rf"rolled back: .*a factory\? write {name}\(\)", f"[app:main]\nwsgi = ways:{name}\n"
        )


COMPOSITE = """
[DEFAULT]
debug = false
[server:main]
use = egg:waitress#main
listen = 127.0.0.1:0
colour = blue
[composite:main]
use = call:app:by_path
first = one
second = two
[app:one]
paste.app_factory = app:factory
greeting = one
[pipeline:two]
pipeline = validate inner
[filter:validate]
paste.filter_factory = app:plain
[app:inner]
paste.app_factory = app:factory
greeting = two
"""
BY_PATH = """
def by_path(loader, global_conf, **paths):
    apps = {}
    for name, app in paths.items():
        apps[f"/{name}"] = loader.get_app(app, global_conf=global_conf)
    return lambda environ, start_response: apps[environ["PATH_INFO"]](environ, start_response)

def plain(global_conf):
    return lambda app: app
"""


@beyond_core
def test_operator_pastedeploy(folder):
    """Composites are PasteDeploy's, and another server's keys are a warning then."""
    if not importable("paste.deploy"):
        pytest.skip("the server's interpreter has no PasteDeploy")
    server = Server(folder, code=APPLICATION + BY_PATH)
    server.write = lambda: server.ini.write_text(COMPOSITE)
    with server:
        assert server.get("/first").json["greeting"] == "one"
        assert server.get("/second").json["greeting"] == "two"
        assert "colour" in server.log()
        server.ini.write_text(COMPOSITE.replace("greeting = two", "greeting = three"))
        server.reload()
        assert server.get("/second").json["greeting"] == "three"
    assert run("--check", server.ini, cwd=folder).returncode == 0


NO_PASTE = """
import sys
sys.modules['paste'] = None
sys.modules['paste.deploy'] = None
"""


@beyond_core
def test_operator_without_pastedeploy_is_one_clear_line(folder):
    (folder / "sitecustomize.py").write_text(NO_PASTE)
    (folder / "app.py").write_text(APPLICATION + BY_PATH)
    (folder / "paste.ini").write_text(COMPOSITE)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    for arguments in ([], ["--check"]):
        stop = run(*arguments, folder / "paste.ini", cwd=folder, env=environment)
        assert stop.returncode in (1, 2), stop
        [line] = [line for line in stop.stderr.splitlines() if "colour" not in line]
        assert "PasteDeploy" in line


def serve_with_unwritable_log(serve: Serve, what: str) -> Server:
    """Start a server one of whose logs cannot be written."""
    if what == "a full log file":
        return serve(log_file="/dev/full")
    if what == "a full access log":
        return serve(access_log="/dev/full")
    if what == "a full stderr":
        with open("/dev/full", "w") as full:
            return serve(port=free_port(), access_log="-", popen={"stdout": full, "stderr": full})
    if what == "a pipe that nobody reads":
        read, write = os.pipe()
        os.close(read)
        pipes = {"stdout": write, "stderr": write}
        server = serve(port=free_port(), access_log="-", popen=pipes)
        os.close(write)
        return server
    close = {"closed stderr": "exec 2>&-", "closed 0, 1 and 2": "exec <&- >&- 2>&-"}
    return serve(port=free_port(), access_log="-", prefix=in_shell(close[what]))


@beyond_core
@pytest.mark.parametrize(
    "what",
    [
        "a full log file",
        "a full access log",
        "a full stderr",
        "closed stderr",
        "closed 0, 1 and 2",
        "a pipe that nobody reads",
    ],
)
def test_operator_a_log_that_cannot_be_written_stops_nobody(serve, what):
    server = serve_with_unwritable_log(serve, what)
    server.tracebacks = True
    with Load(server) as load:
        load.more()
        assert server.get("/log?text").body == b"logged"
        assert server.get("/raise").status == 500
        server.signal(SIGHUP)
        until(lambda: load.more(10)[-1] == 2)
        os.kill(min(server.workers()), SIGHUP)
        load.more()
    assert load.lost == []
    server.stop(status=0)  # not the interpreter's 120


@beyond_core
@pytest.mark.parametrize("what", ["deleted", "a folder", "unreadable", "half written", "empty"])
def test_operator_an_ini_that_cannot_be_read_is_a_refused_reload(serve, what):
    server = serve()
    whole = server.ini.read_text()
    half, _, _ = whole.partition("kers =")  # in the middle of a key
    server.ini.unlink()
    if what == "a folder":
        server.ini.mkdir()
    elif what == "unreadable":
        server.ini.write_text(whole)
        server.ini.chmod(0)
        if os.access(server.ini, os.R_OK):
            pytest.skip("nothing is unreadable to root")
    elif what == "half written":
        server.ini.write_text(half)
    elif what == "empty":
        server.ini.touch()
    line = server.reload_fails("reload refused: .*")
    assert "hupserve.ini" in line
    assert server.get().json["hupserve.generation"] == 1
    if what == "a folder":
        server.ini.rmdir()
    server.write()
    server.reload()
    assert server.get().json["hupserve.generation"] > 1


# README's examples are taken from README, so that they work as they stand there.
README = HUPSERVE.with_name("README.md")


def readme(language: str, *, having: str = "") -> list[str]:
    """Return README's blocks in this language that have this text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    return [block for block in blocks if having in block]


def try_command(*command: str | Path) -> str:
    """Run a checker of files, if it is installed. It must be content; return what it says."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"no {command[0]} command")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 0, ended
    return ended.stdout + ended.stderr


@beyond_core
def test_operator_readme_knows_every_key_and_its_default():
    code = "import hupserve; print([(key, one.default) for key, one in hupserve.KEYS.items()])"
    stop = subprocess.check_output([PYTHON, "-c", code], cwd=HUPSERVE.parent, text=True)
    rows = re.findall(r"(?m)^\| (`[a-z_`, ]+`) \| *(\S*?) *\|", README.read_text())
    told = {key: default for keys, default in rows for key in re.findall("[a-z_]+", keys)}
    for key, default in eval(stop):
        assert told[key].strip("`") == default, key


@beyond_core
def test_operator_readme_has_ini_files_that_are_read(folder):
    files = [text for text in readme("ini") if "systemd/" not in text]
    assert len(files) > 4
    for number, text in enumerate(files):
        (folder / f"{number}.ini").write_text(text)
    code = "import hupserve, sys; [hupserve.read_config(path) for path in sys.argv[1:]]"
    environment = {**os.environ, "PYTHONPATH": str(HUPSERVE.parent)}
    paths = map(str, folder.glob("*.ini"))
    subprocess.run([PYTHON, "-c", code, *paths], cwd=folder, env=environment, check=True)


@beyond_core
def test_operator_readme_has_a_filter_for_the_proxys_headers(serve):
    for text in readme("python"):
        compile(text, "README.md", "exec")
    [code] = readme("python", having="def proxyfix")
    [ini] = readme("ini", having="[filter:proxyfix]")
    server = serve()
    server.put("myfilters.py", code)
    server.reload(ini.replace("mysite.wsgi:application", "app:application"))
    seen = server.get("/", "X-Forwarded-For: 6.6.6.6, 192.0.2.7", "X-Forwarded-Proto: https").json
    assert seen["REMOTE_ADDR"] == "192.0.2.7"
    assert seen["wsgi.url_scheme"] == "https"
    assert server.get("/").json["REMOTE_ADDR"] == "127.0.0.1"


@beyond_core
def test_operator_readme_has_a_unit_that_systemd_understands(folder):
    for text in readme("ini", having="# /etc/systemd/system/"):
        name = Path(text.splitlines()[0]).name
        (folder / name).write_text(text)
    version = int(try_command("systemd-analyze", "--version").split()[1])
    unit = folder / "hupserve.service"
    if version < 253:  # as README says
        unit.write_text(unit.read_text().replace("notify-reload", "notify"))
    said = try_command("systemd-analyze", "verify", unit, folder / "hupserve.socket")
    assert "hupserve.s" not in said


@beyond_core
def test_operator_readme_has_an_upstream_that_nginx_understands(folder):
    [block] = readme("nginx")
    block = block.replace("listen 80;", f"listen 127.0.0.1:{free_port()};")  # 80 may be taken
    config = folder / "nginx.conf"
    config.write_text(f"pid {folder}/pid;\nevents {{}}\nhttp {{\n{block}}}\n")
    try_command("nginx", "-t", "-p", folder, "-c", config, "-g", "error_log stderr;")


@beyond_core
def test_operator_readme_has_a_loop_that_forgets_no_change(serve, folder):
    """A ConfigMap changes as kubelet changes it: the link ..data leads to another folder then."""
    [block] = readme("yaml")
    loop = re.search(r"- \|\n(.*?done\n)", block, re.DOTALL)[1]
    loop = textwrap.dedent(loop).replace("sleep 2", "sleep 0.1")
    loop = loop.replace("/etc/hupserve", f"{folder}/etc").replace("/run/hupserve", str(folder))
    mount = folder / "etc"
    mount.mkdir()
    (mount / "app.ini").symlink_to("..data/app.ini")
    server = Server(folder, pidfile=folder / "pid")
    server.ini = mount / "app.ini"
    versions = itertools.count()

    def publish() -> None:
        version = mount / f"..{next(versions)}"
        version.mkdir()
        lines = [f"{key} = {value}\n" for key, value in server.keys.items()]
        (version / "app.ini").write_text("[server:main]\n" + "".join(lines) + server.sections)
        (mount / "new").symlink_to(version.name)
        os.replace(mount / "new", mount / "..data")

    server.write = publish
    sidecar = subprocess.Popen(["sh", "-c", loop], stderr=subprocess.DEVNULL)
    try:
        with server:
            server.wait_log("generation 2 serves")  # what it had seen before the server was there
            server.keys["workers"] = 3
            publish()
            until(lambda: len(server.workers()) == 3)
            # A change that cannot be delivered, as while hupserve starts.
            (folder / "pid").rename(folder / "kept")
            server.keys["workers"] = 1
            publish()
            time.sleep(0.5)
            (folder / "kept").rename(folder / "pid")
            until(lambda: len(server.workers()) == 1)
            served = re.findall("generation . serves", server.log())
            time.sleep(0.5)
            assert re.findall("generation . serves", server.log()) == served, "and no more"
    finally:
        sidecar.kill()
        sidecar.wait()


@beyond_core
def test_operator_a_stopped_master_stops_nobody(serve):
    """After SIGSTOP the workers serve on. After SIGCONT the master reloads, as it was told."""
    server = serve()
    with Load(server) as load:
        server.signal(SIGSTOP)
        for _ in range(100):
            server.signal(SIGHUP)
        assert set(load.more(300)) == {1}
        server.signal(SIGCONT)
        until(lambda: load.more(10)[-1] == 2)
    assert load.lost == []
    assert len(server.workers()) == 2


JUMPING_CLOCK = """
import os
import time

real_time = time.time
day = 24 * 60 * 60

def jumping_time():
    if os.path.exists('later'):
        return real_time() + day
    if os.path.exists('earlier'):
        return real_time() - day
    return real_time()

time.time = jumping_time
"""


@beyond_core
def test_operator_a_clock_that_jumps_changes_nothing(serve, folder):
    """Guards: monotonic time everywhere. The server's time.time() jumps by a day here."""
    (folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    server = serve(env={"PYTHONPATH": str(folder)})
    with server.connect() as client, Load(server) as load:
        client.get()
        for name in ("later", "earlier"):
            server.touch(name)
            load.more(50)
            server.remove(name)
            load.more(50)
            assert not client.get().closes
        server.reload()
        load.more(50)
    assert load.lost == []


@beyond_core
def test_operator_idle_it_uses_no_processor_time(serve):
    server = serve()

    def cpu():
        return sum(process.cpu for process in processes() if process.session == server.pid)

    with server.connect() as client:
        client.get()
        before = cpu()
        time.sleep(2)
        assert cpu() - before <= 0.02


@beyond_core
def test_operator_process_1_of_a_container(serve):
    """In a pid namespace of its own it reaps the orphans it inherits, and everything works."""
    prefix = ["unshare", "-pf", "--kill-child"]
    if not shutil.which("unshare"):
        pytest.skip("no unshare command")
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no pid namespaces for this user")
    server = serve(prefix=prefix)
    assert "kill -HUP 1\n" in server.log()
    [server.pid] = [process.pid for process in processes() if process.parent == server.pid]
    with Load(server) as load:
        for _ in range(10):
            assert server.get("/orphan").body == b"orphaned"
        until(lambda: len(server.workers()) == 2 and not server.zombies(), "orphans to be reaped")
        server.reload()
        load.more()
        os.kill(min(server.workers()), SIGKILL)
        server.wait_log("replaced")
        until(lambda: len(server.workers()) == 2)
    server.stop()


# ==== the benchmark ===============================================================================
#
# `python hupserve_test.py bench` measures hupserve and all of its peers that this interpreter has.
# A round takes every server through every scenario. Each time the server is freshly started, and
# its answers are checked before they are counted. The rounds alternate.

BENCH_NOTE = """\
There are 2 workers with 16 threads each, and keep-alive is on. But waitress has no workers, it is
one process; cheroot is two processes on one port (SO_REUSEPORT). uWSGI serves by --http11-socket,
but `closed` by --http-socket, and `many` by its http router (with a thread per connection 224 of
the 256 would wait for ever). A figure is the median of the rounds; `max` is their maximum, and
`errors`, `lost` and `requests` are their sum. `hupserve is` is the median of the rounds' ratios:
2.00 x is twice as fast as that peer. Memory is the PSS of all the server's processes after the
load."""

# Each server is at its best, with keep-alive and with room for all connections.
BENCH_SERVERS = {
    "hupserve": "HUPSERVE bench.ini",
    "gunicorn": (
        "-m gunicorn --bind 127.0.0.1:PORT --worker-class gthread --workers 2 --threads 16"
        " --keep-alive 75 --worker-connections 2000 --log-level warning benchapp:app"
    ),
    "waitress": (
        "-m waitress --host 127.0.0.1 --port PORT --threads 16 --connection-limit 2000"
        " --backlog 2048 benchapp:app"
    ),
    "cheroot": "cherootrun.py",
    "uWSGI": (
        "--master --processes 2 --threads 16 --lazy-apps --die-on-term --disable-logging"
        " --listen 1024 --wsgi benchapp:app "
    ),
    "granian": (
        "-m granian --interface wsgi --http 1 --host 127.0.0.1 --port PORT --workers 2"
        " --blocking-threads 16 --backlog 2048 --respawn-interval 0.5 --log-level warning"
        " benchapp:app"
    ),
}
BENCH_UWSGI = {
    "closed": "--http-socket 127.0.0.1:PORT --add-header Connection:close",
    "many": "--http 127.0.0.1:PORT --http-keepalive --http-processes 2",
    "otherwise": "--http11-socket 127.0.0.1:PORT",
}
BENCH_RELOADING = ["hupserve", "gunicorn", "uWSGI", "granian"]  # by SIGHUP
BENCH_RELOADS = 10
BENCH_RELOAD_PAUSE = 1.5  # seconds; granian takes 0.5 s to replace each worker
BENCH_SETTLING = 0.5  # seconds for the second worker to start, and for the last reload to end
BENCH_DEADLINE = 30  # seconds for a first answer
BENCH_LONGEST_LOAD = 600  # seconds of load during reloads
BENCH_SIZE = 8 * 1024 * 1024  # bytes of a download or an upload
BENCH_HELLO = b"Hello, world!"


class Scenario(NamedTuple):
    """What the clients of a benchmark do."""

    text: str
    connections: int
    path: str = "/"
    answer: bytes = BENCH_HELLO
    sends: int = 0  # bytes of request body
    close: bool = False  # one request per connection


BENCH_SCENARIOS = {
    "keepalive": Scenario("32 kept-alive connections", 32),
    "closed": Scenario("32 connections of one request each", 32, close=True),
    "many": Scenario("256 kept-alive connections", 256),
    "download": Scenario(
        "8 MB from a file (wsgi.file_wrapper), 8 connections",
        connections=8,
        path="/download",
        answer=b"x" * BENCH_SIZE,
    ),
    "upload": Scenario(
        "8 MB of request body, 8 connections",
        connections=8,
        path="/upload",
        answer=b"%d" % BENCH_SIZE,
        sends=BENCH_SIZE,
    ),
    "reload": Scenario(
        f"SIGHUP to the first new answer, and 16 clients during {BENCH_RELOADS} reloads", 16
    ),
}

BENCH_FILES = {
    "bench.ini": """\
[server:main]
listen = 127.0.0.1:PORT
workers = 2
threads = 16
connections = 2000
log_level = warning
[app:main]
wsgi = benchapp:app
""",
    "benchapp.py": """\
import os
from wsgiref.util import FileWrapper

with open("generation", "rb") as file:
    GENERATION = file.read()
SIZE = os.path.getsize("download")
PIECE = 64 * 1024

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/download":
        headers = [("Content-Type", "application/octet-stream"), ("Content-Length", str(SIZE))]
        start_response("200 OK", headers)
        return environ.get("wsgi.file_wrapper", FileWrapper)(open("download", "rb"), PIECE)
    body = b"Hello, world!"
    if path == "/upload":
        body = b"%d" % read(environ["wsgi.input"], int(environ["CONTENT_LENGTH"]))
    if path == "/generation":
        body = GENERATION
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]

def read(file, length):
    left = length
    while left and (piece := file.read(min(left, PIECE))):
        left -= len(piece)
    return length - left
""",
    "cherootrun.py": """\
import os
from cheroot.wsgi import Server
from benchapp import app

server = Server(
    ("127.0.0.1", PORT), app, numthreads=16, request_queue_size=2048, timeout=75, reuse_port=True
)
server.keep_alive_conn_limit = 2000
os.fork()
server.start()
""",
    "gunicorn.conf.py": """\
control_socket_disable = True  # it would stay behind in the home folder
""",
    "wrk.lua": """\
if wrk.path == "/upload" then
    wrk.method = "POST"
    wrk.body = ("x"):rep(8 * 1024 * 1024)
end

function done(summary, latency)
    local e = summary.errors
    local errors = e.connect + e.read + e.write + e.timeout + e.status
    print("DONE", summary.requests * 1e6 / summary.duration, latency:percentile(50) / 1e3,
          latency:percentile(99) / 1e3, latency.max / 1e3, errors)
end
""",
}

Figures = dict[str, float]  # one server's in one scenario and round, by column


def bench_command(name: str, scenario: str, port: int) -> list[str]:
    """Return the command that starts this server."""
    program = sys.executable
    arguments = BENCH_SERVERS[name]
    if name == "uWSGI":
        program = os.path.join(os.path.dirname(sys.executable), "uwsgi")
        arguments += BENCH_UWSGI.get(scenario, BENCH_UWSGI["otherwise"])
    arguments = arguments.replace("PORT", str(port)).replace("HUPSERVE", str(HUPSERVE))
    return [program, *arguments.split()]


@contextlib.contextmanager
def bench_server(
    name: str, scenario: str, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a server, wait for its first answer, and leave nothing of it behind.

    Yields the process and its port.
    """
    port = free_port()
    for file, text in {**BENCH_FILES, "generation": "0"}.items():
        (folder / file).write_text(text.replace("PORT", str(port)))
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            bench_command(name, scenario, port),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            bench_first_answer(process, port, "/", BENCH_HELLO)
            time.sleep(BENCH_SETTLING)
            yield process, port
        except Exception:
            log.seek(0)
            print(*log.readlines()[-5:], sep="", end="")
            raise
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()


def bench_request(path: str, sends: int = 0, close: bool = False) -> bytes:
    """Return the bytes of a request; with a body it is a POST."""
    lines = [f"{'POST' if sends else 'GET'} {path} HTTP/1.1", "Host: localhost"]
    if sends:
        lines.append(f"Content-Length: {sends}")
    if close:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""])
    return head.encode() + b"x" * sends


def bench_exchange(sock: socket.socket, request: bytes) -> tuple[bytes, bool]:
    """Send a request; return the answer's body, and whether the server keeps the connection."""
    sock.sendall(request)
    data = bytearray()
    start = 0  # of the body
    end = 0
    while not start or len(data) < end:
        piece = sock.recv(256 * 1024)
        if not piece:
            raise ConnectionError("the connection ended before the answer did")
        data += piece
        if not start and b"\r\n\r\n" in data:
            start = data.index(b"\r\n\r\n") + 4
            length = re.search(rb"(?i)\r\nContent-Length: *(\d+)", data)
            if not data.startswith(b"HTTP/1.1 200 ") or not length:
                raise ConnectionError(f"unexpected answer {bytes(data[:start])!r}")
            end = start + int(length[1])
    closes = re.search(rb"(?i)\r\nConnection: *close", data[:start])
    return bytes(data[start:]), not closes


def bench_first_answer(
    process: subprocess.Popen[bytes], port: int, path: str, answer: bytes
) -> float:
    """Ask until this is the answer; return the milliseconds it took.

    Each request has a connection of its own.
    """
    request = bench_request(path, close=True)
    began = time.perf_counter()
    while time.perf_counter() < began + BENCH_DEADLINE and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            body, _ = bench_exchange(sock, request)
            if body == answer:
                return (time.perf_counter() - began) * 1000
        time.sleep(0.005)
    raise ConnectionError(f"no answer {answer!r}")


def bench_check(port: int, scenario: Scenario) -> None:
    """Open all connections at the same time; all must be answered rightly, then kept or closed."""
    request = bench_request(scenario.path, scenario.sends, scenario.close)
    requests = 1 if scenario.close else 2
    with contextlib.ExitStack() as stack:
        for _ in range(scenario.connections):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            for _ in range(requests):
                body, _ = bench_exchange(sock, request)
                if body != scenario.answer:
                    raise ConnectionError("wrong answer")
            if scenario.close and sock.recv(1):
                raise ConnectionError("more than the answer")


class BenchClients:
    """Our own load: a thread for each connection. It runs in a process of its own."""

    def __init__(
        self, port: int, request: bytes, pause: float, end: float, stop: Path | None
    ) -> None:
        self.port = port
        self.request = request
        self.pause = pause  # seconds between two requests
        self.end = end  # by time.perf_counter()
        self.stop = stop  # the load ends when this file appears
        self.latencies: list[float] = []  # milliseconds
        self.errors: list[OSError] = []

    def stopped(self) -> bool:
        """Is the time over, or has the file appeared?"""
        return time.perf_counter() >= self.end or bool(self.stop and self.stop.exists())

    def client(self) -> None:
        """(thread) Send requests until the load stops."""
        sock = None
        while not self.stopped():
            began = time.perf_counter()
            keeps = False
            try:
                if sock and select.select([sock], [], [], 0)[0]:  # closed while it was idle
                    sock.close()
                    sock = None
                sock = sock or socket.create_connection(("127.0.0.1", self.port), 10)
                _, keeps = bench_exchange(sock, self.request)
                self.latencies.append((time.perf_counter() - began) * 1000)
            except OSError as error:
                self.errors.append(error)
            if sock and not keeps:
                sock.close()
                sock = None
            time.sleep(self.pause)

    def run(self, connections: int) -> None:
        """Run all clients to their end."""
        threads = [threading.Thread(target=self.client) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def bench_clients(
    port: int,
    request: bytes,
    connections: int,
    seconds: float,
    pause: float = 0,
    stop: Path | None = None,
) -> tuple[Figures, int, int]:
    """Load a server for some seconds or until a file appears.

    Return the latencies, the number of answers and the number of errors.
    """
    clients = BenchClients(port, request, pause, time.perf_counter() + seconds, stop)
    clients.run(connections)
    latencies = sorted(clients.latencies)
    if not latencies:
        raise clients.errors[0]
    figures = {
        "p50 ms": latencies[len(latencies) // 2],
        "p99 ms": latencies[len(latencies) * 99 // 100],
        "max ms": latencies[-1],
    }
    return figures, len(latencies), len(clients.errors)


def one_process() -> concurrent.futures.ProcessPoolExecutor:
    """A process beside this one, for bench_clients()."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork"))


def bench_load(port: int, scenario: Scenario, seconds: int, folder: Path) -> Figures:
    """Measure requests per second and their latency, by wrk if there is one."""
    if shutil.which("wrk"):
        return bench_load_by_wrk(port, scenario, seconds, folder)
    request = bench_request(scenario.path, scenario.sends, scenario.close)
    with one_process() as pool:
        load = pool.submit(bench_clients, port, request, scenario.connections, seconds)
        figures, answers, errors = load.result()
    return {"requests/s": answers / seconds, **figures, "errors": errors}


def bench_load_by_wrk(port: int, scenario: Scenario, seconds: int, folder: Path) -> Figures:
    """Measure by wrk, whose script prints the figures."""
    command = ["wrk", "-t1", f"-c{scenario.connections}", f"-d{seconds}s", "--latency"]
    command += ["-s", str(folder / "wrk.lua")]
    if scenario.close:
        command += ["-H", "Connection: close"]
    command.append(f"http://127.0.0.1:{port}{scenario.path}")
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    _, _, figures = output.partition("DONE")
    columns = ["requests/s", "p50 ms", "p99 ms", "max ms", "errors"]
    return dict(zip(columns, map(float, figures.split())))


def bench_reload(
    process: subprocess.Popen[bytes], port: int, scenario: Scenario, folder: Path
) -> Figures:
    """Reload under clients that ask every 10 ms.

    A request without a connection or a complete answer is lost.
    """
    stop = folder / "stop"
    stop.unlink(missing_ok=True)
    times = []
    with one_process() as pool:
        load = pool.submit(
            bench_clients,
            port,
            bench_request("/"),
            scenario.connections,
            BENCH_LONGEST_LOAD,
            pause=0.01,
            stop=stop,
        )
        try:
            for generation in range(1, BENCH_RELOADS + 1):
                time.sleep(BENCH_RELOAD_PAUSE)
                (folder / "generation").write_text(str(generation))
                process.send_signal(SIGHUP)
                times.append(bench_first_answer(process, port, "/generation", b"%d" % generation))
            time.sleep(BENCH_SETTLING)
        finally:
            stop.touch()
        figures, answers, errors = load.result()
    reload_time = statistics.median(times)
    return {"reload ms": reload_time, **figures, "requests": answers + errors, "lost": errors}


def bench_memory(session: int) -> float:
    """Return the PSS of a session's processes in MB, or 0 where there is no /proc."""
    kilobytes = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) != session:
                continue
            found = re.search(r"\nPss: +(\d+)", (folder / "smaps_rollup").read_text())
            if found:
                kilobytes += int(found[1])
    return kilobytes / 1024


def bench_row(name: str, scenario: str, seconds: int, folder: Path) -> Figures | None:
    """Return the figures of one server in one scenario, or None after an error."""
    details = BENCH_SCENARIOS[scenario]
    try:
        with bench_server(name, scenario, folder) as (process, port):
            bench_check(port, details)
            if scenario == "reload":
                row = bench_reload(process, port, details, folder)
            else:
                row = bench_load(port, details, seconds, folder)
            row["memory MB"] = bench_memory(process.pid)
            return row
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"{name}, {scenario}: {error}")
        return None


Rounds = list[Union[Figures, None]]  # one server's in one scenario
BENCH_COMBINE: dict[str, Callable[[list[float]], float]] = {
    "max ms": max,
    "errors": sum,
    "requests": sum,
    "lost": sum,
}


def bench_columns(results: dict[str, Rounds]) -> list[str]:
    """Return the columns that these figures have; errors only where there were some."""
    rows = [row for rounds in results.values() for row in rounds if row]
    columns = dict.fromkeys(column for row in rows for column in row)
    if not any(row.get("errors") for row in rows):
        columns.pop("errors", None)
    return list(columns) or [""]


def bench_figure(column: str, rounds: Rounds) -> str:
    """Return one cell of the table."""
    values = [row[column] for row in rounds if row and column in row]
    if not values:
        return "failed"
    combine = BENCH_COMBINE.get(column, statistics.median)
    value = combine(values)
    is_plain = value >= 100 or value == int(value)
    return f"{value:,.0f}" if is_plain else f"{value:,.2f}"


def bench_ratio(column: str, ours: Rounds, theirs: Rounds) -> float | None:
    """How many times as good is hupserve in this column, in the median of the rounds?"""
    ratios = []
    for our_row, their_row in zip(ours, theirs):
        if our_row and their_row:
            ratios.append(our_row[column] / their_row[column])
    if not ratios:
        return None
    ratio = statistics.median(ratios)
    return 1 / ratio if column == "reload ms" else ratio  # less time is better


def bench_table(results: dict[str, Rounds]) -> None:
    """Print one scenario: a line for each server, from all its rounds."""
    columns = bench_columns(results)
    print(" " * 9, *(f"{column:>11}" for column in columns), f"{'hupserve is':>11}")
    for name, rounds in results.items():
        cells = [f"{bench_figure(column, rounds):>11}" for column in columns]
        ratio = bench_ratio(columns[0], results.get("hupserve", []), rounds)
        if ratio and name != "hupserve":
            cells.append(f"{ratio:9.2f} x")
        print(f"{name:9}", *cells)


def bench_options(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="hupserve_test.py bench", description="Measure hupserve and its peers."
    )
    names = ", ".join(BENCH_SERVERS)
    parser.add_argument("peers", nargs="*", help=f"of {names} (default: all there are)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=int, default=5, help="of load for each figure (default: 5)"
    )
    parser.add_argument(
        "--only",
        default=",".join(BENCH_SCENARIOS),
        metavar="NAME,...",
        help="default: %(default)s",
    )
    options = parser.parse_args(argv)
    options.scenarios = options.only.split(",")
    unknown = {*options.scenarios, *options.peers} - {*BENCH_SCENARIOS, *BENCH_SERVERS}
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def bench_versions(peers: list[str]) -> dict[str, str]:
    """Print what is measured, and by what. Return the servers with their versions."""
    versions = {"hupserve": "of this folder"}
    for name in peers:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.setdefault(name, importlib.metadata.version(name))
    missing = set(peers) - set(versions)
    load = "our own client, which may be the limit (there is no wrk)"
    if shutil.which("wrk"):
        version = subprocess.run(["wrk", "-v"], stdout=subprocess.PIPE, text=True)  # it exits 1
        load, _, _ = version.stdout.partition("[")
    servers = ", ".join(f"{name} {version}" for name, version in versions.items())
    if missing:
        servers += f" (not installed: {', '.join(missing)})"
    print(f"load by {load.strip()}; {os.cpu_count()} cores; Python {platform.python_version()};")
    print(servers)
    print(BENCH_NOTE)
    return versions


def bench_compare_many(results: dict[str, dict[str, Rounds]]) -> None:
    """Add to the figures of `many` how they compare to those of `keepalive`."""
    for name, rounds in results.get("many", {}).items():
        for many, keepalive in zip(rounds, results.get("keepalive", {}).get(name, [])):
            if many and keepalive:
                many["x keepalive"] = many["requests/s"] / keepalive["requests/s"]


def bench(argv: list[str]) -> None:
    """Measure hupserve and its peers, and print a table for each scenario."""
    options = bench_options(argv)
    versions = bench_versions(options.peers or list(BENCH_SERVERS))
    signal.signal(SIGTERM, lambda *_: sys.exit(1))  # so that the servers end then, too
    results: dict[str, dict[str, Rounds]] = {}
    for scenario in options.scenarios:
        names = [name for name in versions if scenario != "reload" or name in BENCH_RELOADING]
        results[scenario] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="hupserve-bench-") as path:
        folder = Path(path)
        (folder / "download").write_bytes(b"x" * BENCH_SIZE)
        for number in range(1, options.rounds + 1):
            for scenario in options.scenarios:
                print(f"round {number}: {scenario}", file=sys.stderr)
                for name, rounds in results[scenario].items():
                    rounds.append(bench_row(name, scenario, options.seconds, folder))
    bench_compare_many(results)
    for scenario in options.scenarios:
        print(f"\n{scenario}: {BENCH_SCENARIOS[scenario].text}")
        bench_table(results[scenario])


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(sys.argv[2:])
    else:
        sys.exit(pytest.main([__file__, *sys.argv[1:]]))
