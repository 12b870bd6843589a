#!/usr/bin/env python3
"""hupserve: a WSGI server that takes up a new configuration and loses no request doing so.

    python hupserve.py example.ini          serve
    kill -HUP <pid of the master>           reload: new workers, new code, new settings

It promises that between its first answer and its stop no client is refused or reset, and that no request which has
begun to arrive goes without an answer (but for drain_timeout, and RFC 9112 section 9.5): whatever is reloaded, right
or wrong. It leaves to others: HTTP/2, websockets, async applications, privileges, static files at scale.

    operator --signals--> MASTER    owns the listeners, starts and counts the workers; runs no
                          |    ^    application code and no thread, so it can fork for years
       go, drain (line)   v    |    ready, leaving, failed (line)
                        WORKER      its main thread owns every connection that is not in flight:
                          |    ^    it accepts, reads, waits, expires, closes
     request (head read)  v    |    connection, answered
                        THREADS     run the application: one request, one response

A reload. A generation is the workers started from one reading of the configuration.

    master        SIGHUP: read, bind, fork ....... every new worker is ready: commit
    old workers   serve .........................................| drain: finish what has begun, leave
    new workers                    load the application ....ready| serve
                  a mistake found up to here is a roll-back: nothing has changed

    signal        to the master                          to a worker
    HUP           reload (its terminal is gone: stop)    drain if the master ordered it, else a log line
    TERM, QUIT    stop when all requests are answered    ask for a replacement, drain and leave
    INT           as TERM, without grace for the idle    nothing: the master speaks for it
    a second one  stop at once                           nothing
    USR1          nothing: logs follow their rotation    nothing
"""

import argparse
import array
import atexit
import collections
import configparser
import contextlib
import difflib
import email.utils
import enum
import errno
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
import select
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
import types
import urllib.parse
import wsgiref.util
from typing import Any, Optional

__version__ = "1.0.0"
log = logging.getLogger("hupserve")
access_log = logging.getLogger("hupserve.access")


# ---- Words: the states of a connection, a worker and a reload, and what moves them ----
class State(enum.IntEnum):
    """Where a connection is (Worker.move()). Its deadline or its client's end ends it, but in WAITING and IN_FLIGHT."""
    NEW = 0         # nothing of a first request has come (nor all of a TLS handshake)
    IDLE = 1        # kept alive, and nothing of a next request has come
    READING = 2     # a part of a head has come
    RECEIVING = 3   # the head, but not all of its short, announced body
    WAITING = 4     # all that is read beforehand         -> IN_FLIGHT (a thread is free)
    IN_FLIGHT = 5   # in jobs, in a thread or returned    -> IDLE, or READING to WAITING, if more has come; or CLOSING
    CLOSING = 6     # refused, or answered for the last time: our side is shut down, input is discarded  -> closed


class Life(enum.IntEnum):
    """Child.life, as the master sees it; Worker.life, from BOOTING on, as it knows itself. A death ends any."""
    VACANT = 0      # to be forked                    -> BOOTING (now, or after the back-off)
    BOOTING = 1     # loads the application           -> READY (it says "ready"), or DRAINING (a roll-back: by SIGKILL)
    READY = 2       # loaded, accepts nothing         -> SERVING (the master says "go"), or DRAINING (a roll-back)
    SERVING = 3     # accepts                         -> DRAINING (the master orders it), or LEAVING
    LEAVING = 4     # somebody's SIGTERM: accepts nothing, has said "leaving"  -> DRAINING (ordered, and replaced)
    DRAINING = 5    # finishes what it has begun      -> gone; its successor, if any, is there already


class Stage(enum.Enum):
    """Generation.stage. A reload, as the start, is Master.upcoming on its way from BINDING to CURRENT, or VOID."""
    BINDING = 0     # its new addresses               -> LOADING (it has them all), or VOID (a bind fails)
    LOADING = 1     # its workers load                -> CURRENT (all READY: commit), or VOID (a death, time, a stop)
    CURRENT = 2     # serves                          -> PAST (the next one's commit, or a stop)
    PAST = 3        # its workers drain, or are gone
    VOID = 4        # rolled back: no client has seen it


NEW, IDLE, READING, RECEIVING, WAITING, IN_FLIGHT, CLOSING = State
VACANT, BOOTING, READY, SERVING, LEAVING, DRAINING = Life
STOPS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
MASTER_SIGNALS = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
FOREVER = float("inf")
PAUSE = 0.5             # seconds without accept or fork when the system has no more to give
LINGER = 2.0            # seconds of input to discard on a connection that is closing
TRICKLE = 4096          # bytes of a response that a client must take within io_timeout: less is no progress
HANDSHAKE = 0.2         # seconds for those who are in the midst of it when an address is given up
BIND_PATIENCE = 1.0     # seconds for an old worker to let go of an address that comes back
DRAIN_REPORT = 30.0     # seconds between two log lines on what a draining worker waits for
BACK_OFF = (0, 0.2, 0.4, 0.8, 1.6, 3.2, 5)      # seconds before a worker that died is replaced
STEADY = 10.0           # seconds: who has lived longer is replaced at once


# ---- Configuration: text in, one immutable object out ----------------------------------------------
class ConfigError(Exception):
    """The operator's mistake, in one line: file, section, key and reason."""


def reason_of(error, short=True):
    text = (getattr(error, "strerror", None) or error) if short else f"{type(error).__name__}: {error}"
    return " ".join(str(text).split())


def did_you_mean(word, words):
    return "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(word, words, 1))


def addresses(text):
    """'*:80 unix:/x' -> {each as configured, which is what tells two apart: what its sockets bind (binds_of)}."""
    found = {word: binds_of(word) for word in text.split() or [""]}
    for one, other in itertools.combinations(found, 2):
        if overlap(found[one], found[other]):
            raise ValueError(f"{other} overlaps {one}")
    return found


def binds_of(word):
    """-> ((family, socket address), ...). Hosts are numeric: the master never waits for a name server."""
    if word.startswith("unix:") and 5 < len(os.fsencode(word)) < 113 and "\0" not in word:
        return ((socket.AF_UNIX, word[5:]),)
    host, _, port = word.rpartition(":")
    with contextlib.suppress(ValueError):
        port = number(port, 0, 65535)
        if host == "*" and socket.has_dualstack_ipv6():         # without IPv6 it is IPv4 alone
            return (socket.AF_INET, ("0.0.0.0", port)), (socket.AF_INET6, ("::", port, 0, 0))
        host = {"*": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host)
        ip = ipaddress.IPv6Address(host[1:-1]) if host[:1] + host[-1:] == "[]" else ipaddress.IPv4Address(host)
        return ((socket.AF_INET, (str(ip), port)) if ip.version == 4 else (socket.AF_INET6, (str(ip), port, 0, 0)),)
    raise ValueError(f"{word} is no numeric host:port, localhost:port, [::1]:port, *:port or unix:/path (107 bytes)")


def overlap(binds, others):
    """Could the two not listen at the same time? (IPv6 listeners are IPv6 only.)"""
    return any(family == family2 and (one == two or {one[0], two[0]} & {"0.0.0.0", "::"} and one[1] == two[1])
               for family, one in binds for family2, two in others)


def number(text, low, high):
    """A whole number, if its limits are whole; else seconds, which may have a fraction."""
    kind, form = (int, "[0-9]{1,16}") if isinstance(low, int) else (float, r"[0-9]{1,9}(\.[0-9]{1,9})?")
    if not re.fullmatch(form, text) or not low <= kind(text) <= high:
        raise ValueError(f"not a {'whole ' * (kind is int)}number between {low} and {high:.16g}")
    return kind(text)


def log_path(text):
    """'off', '-' or a file, which is opened once here: so a commit does not fail for it."""
    path = os.devnull if text in ("off", "-") else os.path.abspath(text)        # of a pipe that nobody reads:
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))      # an error, no wait
    return text if path == os.devnull else path


def path_in_folder(text):
    os.stat(os.path.join(os.path.dirname(text), "."))       # OSError: no such folder
    return text and os.path.realpath(text)


KEYS = {    # of [server:main]: the default, what reads the text (its ValueError is the reason), and its limits
    "listen": ("127.0.0.1:8000", addresses), "backlog": ("2048", number, 1, 1_000_000),
    "workers": ("2", number, 1, 1000), "threads": ("16", number, 1, 10_000),    # requests in flight per worker
    "connections": ("1000", number, 1, 1_000_000), "max_body": ("0", number, 0, 10**15),    # per worker; bytes
    "keepalive_timeout": ("75", number, 0.0, 1e6), "header_timeout": ("10", number, 0.001, 1e6),    # all in seconds
    "io_timeout": ("60", number, 0.001, 1e6), "boot_timeout": ("60", number, 0.001, 1e6),
    "idle_grace": ("5", number, 0.0, 1e6), "drain_timeout": ("0", number, 0.0, 1e6),                # 0: no limit
    "certfile": ("", str), "keyfile": ("", str), "pidfile": ("", path_in_folder),
    "access_log": ("off", log_path), "log_file": ("-", log_path),
    "log_level": ("info", lambda text: logging.Handler(text.upper()).level),
}
# One reading of a file: every key of KEYS; an SSLContext or None; the application's parts (see Ini.parts); the Ini.
Config = collections.namedtuple("Config", [*KEYS, "tls", "parts", "ini"])      # type: ignore[misc]


def read_config(path):
    """-> Config, all of it valid. Raises ConfigError."""
    try:
        return Ini(path).config()
    except (OSError, ValueError, configparser.Error) as error:      # the latter's often names the place
        place = f"[{error.section}] {error.option}: " if hasattr(error, "option") else ""
        raise ConfigError(f"{path}: {place}{reason_of(error)}") from None


class Ini(configparser.ConfigParser):
    """The file, parsed once, and what it says. All of it raises OSError, ValueError or configparser.Error."""
    optionxform = str       # type: ignore[assignment]  # keys are case-sensitive

    def __init__(self, path):
        super().__init__(default_section="")        # as yet, sections inherit nothing
        full = os.path.abspath(path).replace("%", "%%")
        self["DEFAULT"] = {"here": os.path.dirname(full), "__file__": full}
        with open(path, encoding="utf-8-sig") as file:
            self.read_file(file)
        self.path, self.keys_of = path, {section: [*self[section]] for section in self}
        self.defaults().update(self.items("DEFAULT", raw=True))     # now they do

    def own(self, section):
        """-> the section's own keys, as a dict: those of [DEFAULT] are global_conf, not settings."""
        if section not in self:
            raise ValueError(f"[{section}] missing section{did_you_mean(section, self)}")
        return {key: self.get(section, key) for key in self.keys_of[section]}

    def config(self):
        """[server:main], which can be left out, but not misspelt, and the rest -> Config."""
        texts = self.own("server:main") if difflib.get_close_matches("server:main", self, 1, 0.8) else {}
        use, values = texts.pop("use", ""), {}
        for key in sorted(texts.keys() - KEYS):
            if not use:
                raise ValueError(f"[server:main] {key}: unknown key{did_you_mean(key, KEYS)}")
            log.warning("%s: [server:main] %s: unknown key, left to %s", self.path, key, use)
        try:
            for key, (default, read, *limits) in KEYS.items():
                text = texts.get(key, default)
                values[key] = read(text, *limits)
            key, text = "certfile", f"{values['certfile']} {values['keyfile']}".strip()     # errors name neither
            values["tls"] = tls_context(values["certfile"], values["keyfile"]) if text else None
        except (ValueError, OSError) as error:
            raise ValueError(f"[server:main] {key}: {text!r}: {reason_of(error)}") from None
        return Config(**values, parts=self.parts(), ini=self)

    def parts(self):
        """-> what the application is made of, the outermost first: [(place, module:attribute, arguments, settings)]."""
        settings = self.own("pipeline:main") if "pipeline:main" in self else {"pipeline": "main"}
        names = settings.pop("pipeline", "").split()
        if not names:
            raise ValueError("[pipeline:main] pipeline: names no application")
        parts = [self.part("filter", name) for name in names[:-1]] + [self.part("app", names[-1])]
        uri = f"config:{urllib.parse.quote(os.path.abspath(self.path))}"
        return [("read by PasteDeploy", "paste.deploy:loadapp", [uri], {})] if settings or None in parts else parts

    def part(self, prefix, name):
        """-> one of parts(). None: only PasteDeploy knows what it means."""
        section, others = f"{prefix}:{name}", ("composite", "filter-app", "pipeline")
        if section not in self and (":" in name or any(f"{other}:{name}" in self for other in others)):
            return None
        settings, kind = self.own(section), f"paste.{prefix}_factory"
        if prefix == "app" and kind not in settings:
            kind = "wsgi"
        if any(re.match("use$|filter-with$|[sg]et |paste[.]", key) and key != kind for key in settings):
            return None
        target = settings.pop(kind, "")
        if not re.fullmatch(r"[\w.]+:[\w.]+", target):
            raise ValueError(f"[{section}] {kind}: {target!r} is not module:attribute{did_you_mean(kind, settings)}")
        if kind == "wsgi" and settings:
            raise ValueError(f"[{section}] {min(settings)}: a setting: wsgi takes none, paste.app_factory does")
        return f"[{section}] {kind}: {target}", target, [] if kind == "wsgi" else [dict(self["DEFAULT"])], settings


def tls_context(certfile, keyfile):
    """-> ssl.SSLContext. The master makes it: it may read a key that its workers cannot."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION          # send() would have to read
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certfile, keyfile or None, lambda: b"")     # never ask on the terminal
    return context


def load_application(config):
    """In a worker -> the WSGI callable. Raises ConfigError for the operator's mistakes, and the application's own."""
    importlib.invalidate_caches()       # a module may be younger than the import system's idea of its folder
    use_logs(config)
    application, place = None, "[loggers]"
    try:
        if "loggers" in config.ini:
            logging.config.fileConfig(config.ini, disable_existing_loggers=False)
        for place, target, arguments, settings in reversed(config.parts):
            found = pkgutil.resolve_name(target)
            found = found(*arguments, **settings) if arguments else found
            application = found if application is None else found(application)
            if not callable(application):
                raise TypeError(f"{application!r} is not callable")
        return application
    except Exception as error:
        names = "".join(f" {frame.f_globals.get('__name__')}" for frame, _ in traceback.walk_tb(error.__traceback__))
        loaders = rf"( {__name__}| pkgutil| configparser| (importlib|logging|paste)(\.\S+)?)+"
        if isinstance(error, SyntaxError) or not re.fullmatch(loaders, names):
            raise       # the application's own code was at work
        raise ConfigError(f"{config.ini.path}: {place}: {reason_of(error, short=False)}") from None


class LogFile(logging.handlers.WatchedFileHandler):
    """Follows rotation. A full disk costs log lines, never requests: one line on stderr says so."""
    def emit(self, record):
        try:
            super().emit(record)
        except OSError:         # it could not be opened again
            self.handleError(record)

    def handleError(self, record):
        self.handleError = lambda record: None      # type: ignore[method-assign]
        tell(f"{self.baseFilename}: {reason_of(sys.exc_info()[1])}", 0)


def use_logs(config):
    """Raises OSError, where a file cannot be opened: then nothing has changed."""
    handlers = [logging.NullHandler() if path == "off" else logging.StreamHandler() if path == "-"
                else LogFile(path, errors="backslashreplace") for path in (config.log_file, config.access_log)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    for logger, threshold, handler in zip((log, access_log), (config.log_level, "INFO"), handlers):
        for old in logger.handlers:
            with contextlib.suppress(OSError):      # on a full disk, what could not be written is still there
                old.close()
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(threshold)


# ---- Listeners: bind, adopt, let go ----------------------------------------------------------------
class Listener(socket.socket):
    file: Any = None        # of a unix socket that is ours: what os.stat() said, to know its file by

    def has_file(self):     # still that very one? OSError, where there is none
        return os.path.samestat(self.file, os.stat(self.getsockname()))

    def turn_away(self):
        """Before its close, which resets whoever is queued: nobody is to come between the last accept() and that. With
        a filter that drops each SYN a client is not heard, and asks again after the close. The queue stays."""
        if sys.platform == "linux" and self.family != socket.AF_UNIX:
            code = struct.pack("HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 2, 6, 0, 0, 0, 6, 0, 0, 0xffffffff)
            drop_syn, so_attach_filter = array.array("B", code), 26     # BPF: load TCP's flags; SYN? 0 bytes; all
            with contextlib.suppress(OSError):
                self.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("@HP", 4, drop_syn.buffer_info()[0]))


def open_listeners(binds, adopted, listeners):
    """Append an address's, which listen from the commit on: a roll-back resets nobody. OSError: some may be open."""
    for family, address in binds:
        given = adopted.get((family, address))
        listener = given.dup() if given else Listener(family)
        listeners.append(listener)
        listener.setblocking(False)
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # its connections inherit it
        if given:
            continue
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        elif family == socket.AF_UNIX:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)        # the queue of a living server may be full
                if probe.connect_ex(address) == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(address).st_mode):
                    os.unlink(address)          # a dead server's; on any other file, bind() fails
        listener.bind(address)
        listener.file = os.stat(address) if family == socket.AF_UNIX else None


def close_listeners(listeners):
    """In the master: the workers' copies, and who is queued, stay after close(). (shutdown() would end them, too.)"""
    for listener in listeners:
        with contextlib.suppress(OSError):
            if listener.file and listener.has_file():
                os.unlink(listener.getsockname())
        listener.close()


def adopt():
    """systemd's sockets (sd_listen_fds(3)) -> {(family, socket address): Listener}."""
    pid, count, _ = [os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")]
    adopted = {}
    for fd in range(3, 3 + int(count)) if pid == str(os.getpid()) and count.isdigit() else ():
        listener = Listener(fileno=fd)
        listener.set_inheritable(False)
        address = listener.getsockname()
        adopted[listener.family, address] = listener
        if address[:1] == ("::",) and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            adopted[socket.AF_INET, ("0.0.0.0", address[1])] = listener         # it is of both families
    return adopted


# ---- The bell: what wakes a main loop, and how the two loops talk ----------------------------------
def comes_in_time(source, event, seconds):
    """Wait until it can be read (select.POLLIN) or written (POLLOUT) -> has it come to that in time?"""
    poller = select.poll()      # of select() a descriptor above 1023 would be too much to ask
    poller.register(source, event)
    return bool(poller.poll(seconds * 1000))


def again_at(before, now, what, error):
    """The system gives no more -> when to try again. before: the last such time; 0.0, and only then logged, if none."""
    if not before:
        log.error("cannot %s: %s; trying again every %g s", what, reason_of(error), PAUSE)
    return now + PAUSE


class Bell:
    """A pipe that wakes a selector. Which signals came is a list: a pipe full of HUPs would drop the byte of a TERM."""
    def __init__(self):
        self.rung: list = []
        self.reader, self.writer = map(io.FileIO, os.pipe(), "rw")
        for end in self.reader, self.writer:
            os.set_blocking(end.fileno(), False)
        # A worker inherits the master's: until it has its own here, its signals would ring the master's bell.
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.fileno = self.reader.fileno

    def hang(self, signals):
        for signum in signals:
            signal.signal(signum, lambda came, frame: self.rung.append(came))

    def silence(self):
        """-> the signals that came, in order. The pipe is read first: for a later one it rings again."""
        self.reader.read(4096)
        rung, self.rung = self.rung, []
        return rung


class Line:
    """One end of the socketpair between master and worker: a JSON list per line. Its end says: the other is gone."""
    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.pending, self.ended, self.fileno = sock, b"", False, sock.fileno

    def say(self, *words):
        with contextlib.suppress(OSError):      # the other side is gone, and hear() tells; or reads none of 200 KB
            self.sock.sendall(json.dumps(words).encode() + b"\n")

    def hear(self):
        """-> the messages that have come; .ended, if there will be no more."""
        try:
            while not self.ended:
                data = self.sock.recv(4096)
                self.pending, self.ended = self.pending + data, not data
        except OSError as error:
            self.ended = not isinstance(error, BlockingIOError)
        *lines, self.pending = self.pending.split(b"\n")
        return [json.loads(line) for line in lines]


class Scoreboard:
    """Memory that all workers share. In its slot each tells what it does: a JSON object of up to 2 KB, or null."""
    SLOTS, SIZE = 1024, 4096
    memory = mmap.mmap(-1, SLOTS * SIZE)
    loads = memoryview(mmap.mmap(-1, SLOTS * 4)).cast("I")      # by slot: open connections, and 1; 0: accepts none

    def write(self, slot, facts):
        self.memory[slot * self.SIZE:(slot + 1) * self.SIZE] = json.dumps(facts).encode().ljust(self.SIZE, b"\0")

    def read(self):
        """-> one dict a worker, the oldest generation first, each wait with its age in seconds."""
        found = []
        for text in re.findall(rb"\{[^\0]+", self.memory):
            with contextlib.suppress(ValueError):       # half written: the next look finds it
                found.append(json.loads(text))
                for wait in found[-1]["waits_for"]:
                    wait["age"] = round(time.monotonic() - wait.pop("since"), 1)
        return sorted(found, key=lambda facts: (facts["generation"], facts["worker"]))


scoreboard: Any = Scoreboard()      # the master's, which its workers inherit


# ---- The exchange: one request, one response (RFC 9110 and 9112, PEP 3333) -------------------------
MAX_LINE = 8192             # bytes of a request line (414), of a chunk's size with its extensions, of a trailer (400)
MAX_HEAD = 65536            # bytes of a head (431), of all chunk extensions (400)
MAX_FIELDS = 100            # of a head, and of trailers (431)
SMALL_BODY = 65536          # bytes: an announced body up to this is read before a thread is taken
SKIPPABLE = 262144          # bytes, at most, in which the end of an unread body is looked for, to keep the connection
PIECE = 16384               # bytes read at once: not more, for to take a chunk off the buffer copies all that is behind

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
AUTHORITY = r"(?:\[([0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
ABSOLUTE = re.compile(r"https?://([^:/?][^/?]*)/?(.*)", re.IGNORECASE)     # host, path
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")
DOUBTFUL = re.compile(rb"\0|(?<!\r)\n|\r(?=[^\n])")         # in a head: NUL, bare LF, bare CR
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t -~\x80-\xff]*)?\r")     # cut off at its LF, as the next
TRAILER = re.compile(rf"(?:{FIELD.pattern})?\r".encode())
STATUS = re.compile(r"[1-9][0-9]{2}(?: [\t -~\x80-\xff]*)?")
LENGTH = re.compile("[0-9]{1,18}")
FORGED = re.compile(r"[^\t -~\x80-\xff]")      # in a response field, where CR LF would begin another


class Refusal(OSError):
    """What ends a request, and its connection, before its time. An OSError, as wsgi.input is expected to raise."""
    def __init__(self, status, reason):
        super().__init__(errno.EBADMSG, reason)
        self.status, self.reason = http.HTTPStatus(status), reason

    def response(self, line):
        """-> its bytes, whole. line: the request's; a HEAD is answered without a body."""
        status = f"{self.status.value} {self.status.phrase}"
        body = f"{status}: {self.reason}\n"
        head = (f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
                f"Date: {email.utils.formatdate(usegmt=True)}\r\nConnection: close\r\n\r\n")
        return (head if line.startswith("HEAD ") else head + body).encode()


def refuse_if(wrong, status, reason):
    if wrong:
        raise Refusal(status, reason)


# environ: what the head says, in PEP 3333's words; shared, and so never changed. length: the body's, in bytes; None: it
# is chunked. expect: the client waits for 100 Continue. keep: it would keep the connection. http11: it knows chunked.
Request = collections.namedtuple("Request", "line environ length expect keep http11")


def is_authority(text):
    """A host, perhaps with a port (RFC 3986 section 3.2)?"""
    match = re.fullmatch(AUTHORITY, text)
    with contextlib.suppress(ValueError):
        return bool(match and ipaddress.IPv6Address(match[1] or "::"))
    return False


def collect(block):
    """Field lines -> their part of an environ (RFC 9112 section 5). Raises Refusal."""
    lines, environ = block.decode("latin-1").split("\r\n")[:-1], {}
    refuse_if(len(lines) > MAX_FIELDS, 431, f"more than {MAX_FIELDS} header fields")
    for match in map(FIELD.fullmatch, lines):
        refuse_if(not match, 400, "malformed header field")
        if "_" in match[1]:
            continue        # X_Y and X-Y are one in the environ: one could pose as the other
        name, value = match[1].upper().replace("-", "_"), match[2].strip(" \t")
        key = name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}"
        if key not in environ:
            environ[key] = value
        elif key != "CONTENT_LENGTH" or environ[key] != value:      # of two lengths, or Hosts, this makes no valid one
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    return environ


@functools.lru_cache(maxsize=128)
def parse_fields(block, http11):
    """Field lines -> (their part of an environ, length, expect, keep), as in Request (RFC 9112 section 6)."""
    environ = collect(block)
    length, chunked = environ.get("CONTENT_LENGTH", "0"), "HTTP_TRANSFER_ENCODING" in environ
    codings = [coding.strip(" \t") for coding in environ.get("HTTP_TRANSFER_ENCODING", "none").lower().split(",")]
    expect = environ.get("HTTP_EXPECT", "").lower() if http11 else ""
    refuse_if(http11 and "HTTP_HOST" not in environ, 400, "no Host")
    refuse_if(not is_authority(environ.get("HTTP_HOST", "")), 400, "invalid Host")
    refuse_if(not LENGTH.fullmatch(length), 400, "invalid Content-Length")
    refuse_if(chunked and "CONTENT_LENGTH" in environ, 400, "both Content-Length and Transfer-Encoding")
    refuse_if(chunked and not http11, 400, "Transfer-Encoding in HTTP/1.0")
    refuse_if(codings.count("chunked") > 1 or "" in codings, 400, "invalid Transfer-Encoding")
    refuse_if(chunked and codings != ["chunked"], 501, "unknown transfer coding")
    refuse_if(expect not in ("", "100-continue"), 417, "unknown expectation")
    options = [option.strip(" \t") for option in environ.get("HTTP_CONNECTION", "").lower().split(",")]
    keep = "close" not in options and (http11 or "keep-alive" in options)
    return environ, None if chunked else int(length), expect != "", keep


def parse_line(line):
    """A request line -> method, target, major and minor version (RFC 9112 section 3). Raises Refusal."""
    refuse_if(len(line) > MAX_LINE, 414, f"a request line of more than {MAX_LINE} bytes")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    refuse_if(not match, 400, "malformed request line")
    return match.groups()


@functools.lru_cache(maxsize=128)       # a client repeats its head or, if only the path changes, its fields (above)
def parse_head(head):
    """A head, without its empty line -> Request (RFC 9112, PEP 3333). Raises Refusal."""
    line, _, block = head.partition(b"\r\n")
    method, target, major, minor = parse_line(line)
    refuse_if(major != "1", 400 if major == "0" else 505, f"HTTP/{major}.{minor} is not spoken here")
    refuse_if(method == "CONNECT", 501, "this is no proxy")
    absolute = ABSOLUTE.fullmatch(target)
    proper = is_authority(absolute[1]) if absolute else target[0] == "/" or (method, target) == ("OPTIONS", "*")
    refuse_if("#" in target or not proper, 400, "malformed request target")
    fields, *framing = parse_fields(block, minor != "0")
    host, target = ({"HTTP_HOST": absolute[1]}, "/" + absolute[2]) if absolute else ({}, target)
    path, _, query = target.partition("?")
    path = urllib.parse.unquote_to_bytes(path).decode("latin-1") if "%" in path else path.lstrip("*")   # no path
    environ = {**fields, **host, "REQUEST_METHOD": method, "REQUEST_URI": target, "PATH_INFO": path,
               "QUERY_STRING": query, "SERVER_PROTOCOL": "HTTP/1.1" if minor != "0" else "HTTP/1.0"}
    return Request(escaped(line.decode()), environ, *framing, minor != "0")


class Connection:
    """A client's connection. In flight one thread reads and writes it; else the main thread does."""
    state = NEW
    since = 0.0                 # when it came to this state, in time.monotonic() seconds
    deadline = FOREVER          # when it must have left it
    registered = False          # with the selector
    buffer = b""                # what has arrived and is not used yet
    scanned = 0                 # bytes of the buffer in which no end of a head was found
    request: Any = None         # a Request, once its head is complete
    keep, linger, asked = False, True, False    # kept? may the client still be sending? has a drain looked behind?

    def __init__(self, sock, client, base, tls):        # base: the part of the environ that all its requests have
        self.sock, self.client, self.base, self.tls = sock, client, base, tls

    @property
    def line(self):     # the request's first, or what has come of it, as fit for a log
        return self.request.line if self.request else escaped(self.buffer[:80].split(b"\r\n")[0].decode("latin-1"))

    def log_access(self, status, sent):
        """A line in the combined format, plus the seconds since the last move(): of an answer, since dispatch()."""
        environ = self.request.environ if self.request else {}
        referer, agent = [escaped(environ.get(f"HTTP_{name}", "-")) for name in ("REFERER", "USER_AGENT")]
        access_log.info('%s - - [%s] "%s" %s %d "%s" "%s" %.6f', self.client, time.strftime("%d/%b/%Y:%H:%M:%S %z"),
                        self.line, status, sent, referer, agent, time.monotonic() - self.since)

    def receive(self, target=None):
        """One read, into target or the buffer -> bytes that came; None: not yet; 0: none will (its end, an error)."""
        try:
            if target is not None:
                return self.sock.recv_into(target)
            data = self.sock.recv(PIECE)
            while self.tls and self.sock.pending():     # decrypted, and so invisible to a selector
                data += self.sock.recv(PIECE)
        except WOULD_BLOCK:
            return None
        except OSError as error:
            log.debug("%s: %s", self.client, reason_of(error))
            return 0
        self.buffer += data
        return len(data)

    def take_request(self, max_body):
        """Take the next request off the buffer -> the State to which what has arrived takes it. Raises Refusal."""
        if self.request is None:
            if self.buffer.startswith(b"\r\n"):     # RFC 9112 section 2.2
                self.buffer, self.scanned = re.sub(rb"(\r\n)+", b"", self.buffer, count=1), 0
            end = self.buffer.find(b"\r\n\r\n", max(0, self.scanned - 3))
            if not 0 <= end <= MAX_HEAD - 4:
                if self.buffer in (b"", b"\r"):     # an empty line is no request
                    return min(self.state, IDLE)    # NEW stays NEW
                self.look()
                return READING
            self.request = parse_head(self.buffer[:end + 2])
            self.buffer, self.scanned = self.buffer[end + 4:], 0
            refuse_if(0 < max_body < (self.request.length or 0), 413, "more than max_body bytes")
        length = self.request.length or 0
        return WAITING if length > SMALL_BODY or self.request.expect or len(self.buffer) >= length else RECEIVING

    def look(self):
        """A head that is not complete: what is wrong with it already? Raises Refusal."""
        line, crlf, _ = self.buffer.partition(b"\r\n")
        if crlf or len(line) > MAX_LINE + 1:        # its CR may be here already
            parse_line(line)
        refuse_if(len(self.buffer) >= MAX_HEAD, 431, f"a head of more than {MAX_HEAD} bytes")
        refuse_if(DOUBTFUL.search(self.buffer, max(0, self.scanned - 1)), 400, "NUL, bare CR or bare LF in a head")
        self.scanned = len(self.buffer)


class Body(io.RawIOBase):
    """A body as it comes off the connection (RFC 9112 sections 6 and 7.1). After a Refusal each read raises it anew."""
    size = extensions = 0       # bytes in the chunks, and in their extensions, so far

    def __init__(self, exchange):
        self.exchange, self.connection, self.config = exchange, exchange.request, exchange.server.config
        request = self.connection.request
        self.chunked = request.length is None       # and the last chunk has not come
        self.left = request.length or 0             # bytes of it, or of its chunk, that are not read
        self.owes_100, self.refusal = request.expect and not self.connection.buffer, None

    def readable(self):
        return True

    def readinto(self, target):
        try:
            if self.refusal:
                raise self.refusal
            if self.chunked and not self.left:
                self.begin_chunk()
            target = memoryview(target)[:self.left]
            if target and not self.connection.buffer:
                count = self.fill(target)       # to its place at once: a detour costs as much again, and memory
            else:
                count = min(len(target), len(self.connection.buffer))
                target[:count], self.connection.buffer = self.connection.buffer[:count], self.connection.buffer[count:]
        except Refusal as refusal:
            self.refusal = refusal
            raise
        self.left -= count
        return count

    def begin_chunk(self):
        if self.size:       # an empty line ends the one before
            self.take_line(TRAILER, 1)
        line = self.take_line(CHUNK_LINE)
        self.left, self.extensions = int(line[1], 16), self.extensions + len(line[2] or b"")
        self.size += self.left
        refuse_if(self.extensions > MAX_HEAD, 400, f"chunk extensions of more than {MAX_HEAD} bytes")
        refuse_if(0 < self.config.max_body < self.size, 413, "more than max_body bytes")
        if not self.left:   # the last: trailers, which must be well-formed and are discarded, and an empty line
            for _ in range(MAX_FIELDS + 1):
                if self.take_line(TRAILER)[0] == b"\r":
                    self.chunked = False
                    return
            raise Refusal(431, f"more than {MAX_FIELDS} trailers")

    def take_line(self, pattern, limit=MAX_LINE):
        """Take a line of at most limit bytes off the buffer -> its match."""
        while b"\n" not in self.connection.buffer and len(self.connection.buffer) <= limit:
            self.fill()
        line, _, self.connection.buffer = self.connection.buffer.partition(b"\n")
        match = pattern.fullmatch(line)
        refuse_if(not match or len(line) > limit, 400, "malformed chunk")
        return match

    def fill(self, target=None):
        """Wait for input, having invited it if need be -> bytes that came."""
        while (came := self.connection.receive(target)) is None:
            if self.owes_100 and not self.exchange.head_sent:
                self.exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.owes_100 = False
            refuse_if(not comes_in_time(self.connection.sock, select.POLLIN, self.config.io_timeout), 408, "slow body")
        refuse_if(not came, 400, "the body was cut short")
        return came

    def what_follows(self, ask):
        """-> the input behind it, if all is here. Found out on a copy whose input ends there: it may yet be read."""
        while ask and len(self.connection.buffer) < SKIPPABLE and self.connection.receive():
            pass
        trial, copy = Body(self.exchange), types.SimpleNamespace(buffer=self.connection.buffer, receive=lambda *_: 0)
        trial.__dict__.update(vars(self), connection=copy)
        with contextlib.suppress(Refusal):
            trial.readall()
        return None if trial.chunked or trial.left else copy.buffer


@functools.lru_cache(maxsize=128)
def begin_head(status, headers, second):
    """-> (a head's bytes, without framing; the Content-Length or None; keep-alive?). Raises ValueError, TypeError."""
    if not STATUS.fullmatch(status):
        raise ValueError(f"{status!r} is no status")
    ours = {"date": f"Date: {email.utils.formatdate(second, usegmt=True)}", "server": "Server: hupserve"}
    lines, length, keep = [f"HTTP/1.1 {status:4}"], None, True      # "200 ", where there is no reason
    for name, value in headers:
        lower = name.lower()
        if not re.fullmatch(TOKEN, name) or FORGED.search(value):
            raise ValueError(f"{name!r}: {value!r} could add a header, or a response")
        if lower == "content-length":
            if not LENGTH.fullmatch(value) or length not in (None, int(value)):
                raise ValueError(f"invalid Content-Length {value!r}")
            length = int(value)
        elif lower == "connection":
            keep = keep and not re.search(r"\bclose\b", value, re.IGNORECASE)
        elif not wsgiref.util.is_hop_by_hop(name) and lower != "trailer":       # wsgiref calls it "trailers"
            lines.append(f"{name}: {value}")
            ours.pop(lower, None)       # it gives its own
    return "\r\n".join([*lines, *ours.values()]).encode("latin-1"), length, keep


class Exchange(socketserver.BaseRequestHandler):
    """One request and its response, in a thread. What socketserver calls request is a Connection; server, a Worker."""
    left: Optional[int] = None          # bytes of body that its Content-Length still allows
    status, sent, head_sent, chunked = "", 0, False, False      # its status line; bytes of body; head sent? in chunks?

    def handle(self):
        connection, request, config = self.request, self.request.request, self.server.config
        connection.keep, self.keep = False, request.keep and config.keepalive_timeout > 0 and not self.server.pressed
        self.body = None if request.length == 0 else Body(self)
        given = io.BufferedReader(self.body, PIECE) if self.body else io.BytesIO()
        try:
            environ = {**connection.base, **request.environ, "wsgi.input": given}
            self.respond(self.server.application(environ, self.start_response))
        except Refusal as refusal:      # out of wsgi.input, where the application let it through, or out of send()
            log.debug("%s: %s: %s", connection.client, request.line, refusal.reason)
            self.fail(refusal)
        except BaseException:           # sys.exit() in a request is the application's error, too
            log.exception("%s: %s", connection.client, request.line)
            if not self.head_sent or self.left != 0:        # else the answer is whole, and another may follow
                self.fail(Refusal(500, "the application failed"))
        if self.body and self.keep:
            self.body.readall()     # what was not read: it is all here, what_follows() has seen to that
        connection.linger = request.keep or self.sent > PIECE or self.body and (self.body.chunked or self.body.left)
        connection.keep, self.left, self.body = self.keep, 0, None      # a kept write() sends no more; no cycle is left
        if config.access_log != "off":
            connection.log_access(self.status[:3], self.sent)

    def respond(self, result):
        try:
            if not (isinstance(result, wsgiref.util.FileWrapper) and self.send_file(result.filelike)):
                whole = isinstance(result, (list, tuple)) and len(result) == 1
                for data in result:
                    if data and self.head_sent and self.left == 0:
                        break       # it would never reach the wire, and may never end
                    if data != b"":
                        self.write(data, whole)
                if not self.head_sent:
                    self.send(self.head(0))
            if self.chunked:
                self.send(b"0\r\n\r\n")
            elif self.left:
                self.keep = False
                log.error("%s: %d bytes less than its Content-Length", self.request.line, self.left)
        finally:
            if hasattr(result, "close"):
                result.close()

    def start_response(self, status, headers, exc_info=None):
        """PEP 3333. Raises what is wrong with its arguments, at the application."""
        if exc_info and self.head_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.status and not exc_info:
            raise AssertionError("start_response was called twice, without exc_info")
        self.opening, self.left, keep = begin_head(status, tuple(map(tuple, headers)), int(time.time()))
        self.status, self.keep = status, self.keep and keep
        return self.write

    def head(self, length):
        """-> the head, having decided how the body, of length bytes or None, is framed (RFC 9112 section 6.3)."""
        if not self.status:
            raise AssertionError("start_response was not called")
        connection, request, head = self.request, self.request.request, self.opening
        no_length = self.status[0] == "1" or self.status[:3] == "204"
        no_body = no_length or self.status[:3] == "304" or request.environ["REQUEST_METHOD"] == "HEAD"
        if self.left is None and not no_body:
            self.left = length
        if self.left is not None and not no_length:
            head += b"\r\nContent-Length: %d" % self.left
        elif request.http11 and not no_body:
            self.chunked = True
            head += b"\r\nTransfer-Encoding: chunked"
        elif not no_body or self.status[0] == "1":
            self.keep = False
        if no_body:
            self.left = 0
        if self.keep:       # in a drain only for what is here already: that is answered, too
            ask, connection.asked = not connection.asked, self.server.life >= LEAVING   # once: else who is ahead stays
            rest = self.body.what_follows(ask) if self.body else connection.buffer
            self.keep = rest is not None and bool(self.server.life < LEAVING or rest or ask and connection.receive())
        self.head_sent = True
        last = b"\r\nConnection: close" if not self.keep else b"" if request.http11 else b"\r\nConnection: keep-alive"
        return head + last + b"\r\n\r\n"

    def write(self, data, whole=False):
        """Send a piece of the body, the head before the first (PEP 3333's write callable, too)."""
        if not isinstance(data, bytes):
            raise TypeError(f"the application gave {type(data).__name__}, not bytes")
        head = b"" if self.head_sent else self.head(len(data) if whole else None)
        data = data[:self.left]     # or all of it; more than was announced would pose as the next response
        self.send(head + (b"%x\r\n%b\r\n" % (len(data), data) if self.chunked and data else data))
        self.sent += len(data)
        if self.left is not None:
            self.left -= len(data)

    def send(self, data):
        data = memoryview(data) if len(data) > PIECE else data      # of less what is left is copied, mostly nothing
        while data:
            data = data[self.push(self.request.sock.send, data):]

    def push(self, send, *arguments):
        """-> bytes taken. Raises Refusal where the client is gone, or takes next to nothing for io_timeout seconds."""
        sock = self.request.sock
        while True:
            try:
                return send(*arguments)
            except WOULD_BLOCK:     # there is "room" when a third of the kernel's megabytes is free: it may take long
                room, queued = False, FOREVER
                while not room:
                    before, queued = queued, 0
                    if sys.platform == "linux":     # elsewhere a timeout is the end
                        queued = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
                    refuse_if(queued > before - TRICKLE, 408, "the client takes nothing")
                    room = comes_in_time(sock, select.POLLOUT, self.server.config.io_timeout)
            except OSError as error:
                if send != sock.send and not self.sent:
                    return 0        # sendfile() cannot: it has to be read
                raise Refusal(408, f"client gone: {reason_of(error)}") from None

    def send_file(self, file):
        """From where it stands to its end -> False: it has to be read. (A GzipFile's descriptor is no plain file's.)"""
        plain = type(getattr(file, "raw", file)) is io.FileIO and os.path.isfile(file.fileno())
        start, size = (file.tell(), os.path.getsize(file.fileno())) if plain else (0, 0)
        if start >= size or self.head_sent or self.request.tls or not hasattr(os, "sendfile"):
            return False
        self.send(self.head(size - start))
        ends = self.request.sock.fileno(), file.fileno()
        while self.left and (count := self.push(os.sendfile, *ends, start + self.sent, min(self.left, 2**30))):
            self.sent += count
            self.left -= count
        return self.sent > 0 or not self.left

    def fail(self, refusal):
        """Answer with a status of ours, if nothing is on the wire yet; the connection ends either way."""
        self.keep = False
        if not self.head_sent:
            self.head_sent, self.status = True, str(refusal.status.value)
            with contextlib.suppress(OSError):
                self.send(refusal.response(self.request.line))


def escaped(text):
    """What a client sent must not forge a line of a log, or steer a terminal."""
    return ascii(text)[1:-1].replace('"', '\\"')


# ---- The worker: its loop first, then orders, accept, read, dispatch, take back, close --------------
class Worker(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Its main thread alone registers and closes sockets: were a thread to close one, its descriptor could be another
    connection's before the selector hears of it. From dispatch() to take_back() a connection is one thread's alone."""
    application: Any = None             # once it is loaded
    life = BOOTING
    accepting = pressed = False         # are the listeners registered? full, and somebody was queued, at the last look?
    in_flight = 0                       # requests from dispatch() to take_back(); the main thread alone counts
    count = served = threads = 0        # connections open, requests answered, threads started
    now = accept_at = close_at = polite_at = thread_at = report_at = 0.0    # the time; not before these
    give_up_at = explain_at = FOREVER   # of a drain, once the master has ordered it
    facts: dict = {}                    # as last reported

    def __init__(self, generation, number, slot, line, bell):
        super().__init__(None, Exchange)
        self.generation, self.number, self.slot = generation, number, slot
        self.config, self.line, self.bell = generation.config, line, bell
        self.listeners = {listener: (text, self.base(listener))     # text: its address, as configured
                          for text, group in generation.listeners.items() for listener in group}
        first, kept, body = self.config.header_timeout, self.config.keepalive_timeout, self.config.io_timeout
        self.limits = [first, kept, first, body, FOREVER, FOREVER, LINGER]      # seconds, at most, in each State
        self.rooms: list = [{} for _ in State]              # the connections in each, the longest there first
        self.jobs, self.returned = collections.deque(), collections.deque()     # handed to the threads; handed back
        self.sleeping: list = []                            # the gates of the threads that have nothing to do
        self.selector = selectors.DefaultSelector()         # key.data: what is to be called
        self.selector.register(bell, selectors.EVENT_READ)
        self.selector.register(line, selectors.EVENT_READ, self.hear)
        self.still = threading.RLock()      # the main thread lets go of it in wait() alone: only there may others fork
        os.register_at_fork(before=self.before_fork, after_in_parent=self.after_fork, after_in_child=self.disown)

    def run(self):
        """Until an order has closed the listeners, and each connection has gone or drain_timeout is over."""
        self.still.acquire()
        while self.life != DRAINING or self.listeners or (self.count and self.now < self.give_up_at):
            events = self.wait()
            self.obey()         # first: nothing is begun after an order; what is handed back from here on rings anew
            self.take_back()    # before what has come is read: who has been answered does not speak early
            for key, _ in events:
                if key.data:
                    key.data()
            self.expire()
            self.empty_queues()
            self.resume_accepting()
            self.dispatch()
            self.explain()
            self.report()
        self.still.release()

    def wait(self):
        """-> selector events. While there are jobs, it first leaves the interpreter's lock to the thread that was woken
        for all, until it rings or a millisecond is over. Then dispatch() wakes another: the first may be stuck."""
        self.still.release()
        if self.jobs:
            comes_in_time(self.bell, select.POLLIN, 0.001 if self.now >= self.thread_at else PAUSE)
        timers = self.accept_at, self.polite_at, self.report_at, self.close_at, self.explain_at, self.give_up_at
        due = [when for when in timers if when > self.now] + [next(iter(room)).deadline for room in self.rooms if room]
        # In this order: a thread hands back before it takes its next job, so that one of the two is seen.
        events = self.selector.select(0 if self.jobs or self.returned else min(min(due) - time.monotonic(), 3600))
        self.still.acquire()
        self.now = time.monotonic()
        return events

    def report(self):
        """Fill in this worker's slot of the scoreboard, if it has changed, and at most fifty times a second."""
        if self.now < self.report_at:
            return
        new, idle, reading, receiving, *_ = map(len, self.rooms)
        facts = {"pid": os.getpid(), "worker": self.number, "generation": self.generation.number,
                 "state": self.life.name.lower(), "idle": new + idle, "reading": reading + receiving,
                 "in_flight": self.in_flight, "served": self.served,
                 "waits_for": self.waits_for(8) if self.life >= LEAVING else []}
        if facts != self.facts:
            self.facts, self.report_at = facts, self.now + 0.02
            scoreboard.write(self.slot, facts)

    def waits_for(self, count):
        """-> the oldest requests in flight, without their queries, which hold secrets."""
        return [{"client": connection.client, "request": re.split(r"[?]| HTTP/", connection.line)[0][:60],
                 "since": connection.since} for connection in itertools.islice(self.rooms[IN_FLIGHT], count)]

    def explain(self):
        """What every operator asks: why is the old worker still there?"""
        if self.now >= self.explain_at:
            self.explain_at = self.now + DRAIN_REPORT
            oldest = ["; the oldest: {client} {request}".format(**wait) + f" for {self.now - wait['since']:.0f} s"
                      for wait in self.waits_for(1)]
            log.info("still draining: %d in flight, %d other connections%s", self.in_flight,
                     self.count - self.in_flight, "".join(oldest))

    # Orders
    def obey(self):
        for signum in self.bell.silence():
            self.hear()     # an order is written before its SIGHUP is sent: it is there by now
            if signum == signal.SIGHUP and self.life < LEAVING:
                log.warning("SIGHUP without an order from the master: serving on")
            elif signum in (signal.SIGTERM, signal.SIGQUIT) and self.life == SERVING:
                log.info("%s: asking the master for a replacement, to drain", signal.Signals(signum).name)
                self.line.say("leaving")
                self.stop_accepting()
                self.life = LEAVING     # answers say close; the rest waits for the master's order

    def hear(self):
        for word, *rest in self.line.hear():
            if word == "go":
                self.life = SERVING
                self.bell.hang(STOPS)
            else:
                self.drain(*rest)
        if self.line.ended and self.line in self.selector.get_map():
            self.selector.unregister(self.line)
            log.error("the master is gone: draining")
            self.drain(self.generation.listeners.keys() - self.generation.borrowed, self.config.idle_grace)

    def drain(self, dropped, grace):
        """dropped: addresses that nobody takes over: close() would reset who is queued. grace: seconds for the idle."""
        listened, self.close_at = self.life >= SERVING, self.now + min(grace, HANDSHAKE)
        if self.life != DRAINING:           # a later order only shortens the grace
            self.life, self.explain_at = DRAINING, self.now + DRAIN_REPORT
            self.give_up_at = self.now + (self.config.drain_timeout or FOREVER)
            self.stop_accepting()
            for listener, (text, _) in list(self.listeners.items()):
                if listened and text in dropped:    # before "go" perhaps nobody did, and accept() would fail for ever
                    listener.turn_away()
                else:
                    self.listeners.pop(listener)
                    listener.close()
        for state in (NEW, IDLE):
            self.limits[state] = min(self.limits[state], grace)
            for connection in self.rooms[state]:
                connection.deadline = min(connection.deadline, self.now + grace)

    def empty_queues(self):
        """Of listeners that nobody takes over. Out of descriptors, it goes on when there may be some again."""
        for listener in list(self.listeners) if self.life == DRAINING and self.now >= self.accept_at else ():
            while self.admit(listener):
                pass
            if self.now >= max(self.accept_at, self.close_at):
                self.listeners.pop(listener)
                listener.close()

    # Accept
    def full(self):     # and nobody can be asked to go: who was busy a moment ago may be about to speak
        return self.count >= self.config.connections and not self.long_idle()

    def long_idle(self):
        """-> who has been idle longest among the new and among the kept ones, and for PAUSE seconds at least."""
        firsts = [next(iter(room)) for room in (self.rooms[NEW], self.rooms[IDLE]) if room]
        return [connection for connection in firsts if connection.since <= self.now - PAUSE]

    def accept(self, listener, polite=False):
        """A few at a time, if there are threads free: of many that come at once the other workers get their share. The
        polite, where one of these has fewer connections, leave them to it for a moment; the full leave them queued."""
        fewest = min(filter(None, scoreboard.loads[:self.config.workers + 32]), default=FOREVER) if polite else FOREVER
        self.pressed = self.full() and any(comes_in_time(each, select.POLLIN, 0) for each in self.listeners)
        if self.pressed or self.count > fewest + 2:
            self.polite_at = self.now + (0.1 if self.pressed else 0.001)
            return self.stop_accepting()
        for _ in range(max(1, (self.config.threads - self.in_flight - len(self.rooms[WAITING])) // 4)):
            if self.in_flight >= self.config.threads:       # the other workers get them
                return self.stop_accepting()
            if not self.accepting or self.full() or not self.admit(listener):
                return

    def resume_accepting(self):
        """As soon as a thread is free, and before dispatch() takes it: else kept clients could starve the newcomers."""
        scoreboard.loads[self.slot] = self.count + 1 if self.life == SERVING else 0
        may = self.life == SERVING and self.now >= max(self.accept_at, self.polite_at)
        if may and not self.accepting and self.in_flight < self.config.threads:
            self.accepting = True
            for listener in self.listeners:
                self.selector.register(listener, selectors.EVENT_READ, functools.partial(self.accept, listener, True))
            for listener in self.listeners:
                self.accept(listener)

    def stop_accepting(self):
        for listener in self.listeners if self.accepting else ():
            self.selector.unregister(listener)
        self.accepting = False

    def admit(self, listener):
        """Accept a client -> is it worth another try at once?"""
        try:
            sock, address = listener.accept()
            sock.setblocking(False)
            if self.config.tls:     # its handshake is part of the first reads
                sock = self.config.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except WOULD_BLOCK:
            return False        # another worker was faster
        except OSError as error:
            return error.errno not in EXHAUSTED or self.make_room(listener, error)      # or that client is gone again
        while self.count >= self.config.connections and self.life == SERVING and self.evict():
            pass
        self.accept_at, self.count = 0.0, self.count + 1
        host, port = address[:2] if isinstance(address, tuple) else ("", "")
        base = {**self.listeners[listener][1], "REMOTE_ADDR": host, "REMOTE_PORT": str(port)}
        connection = Connection(sock, host or "unix:", base, self.config.tls)
        self.rooms[NEW][connection] = None
        self.read(connection)   # often its request is there already, and there is no need to register it
        return True

    def make_room(self, listener, error):
        """Out of descriptors or memory -> is there one now for who is queued? If not, a pause, not a spin."""
        queued = comes_in_time(listener, select.POLLIN, 0)      # accept() fails so when nobody is, too
        if queued and not self.evict():
            self.accept_at = again_at(self.accept_at, self.now, "accept", error)
            self.stop_accepting()
        return queued and self.now >= self.accept_at

    def base(self, listener):
        """-> the part of the environ that is the same for all requests of a listener."""
        name, tls = listener.getsockname(), self.config.tls
        host, port = name[:2] if isinstance(name, tuple) else ("localhost", 443 if tls else 80)
        return {"SERVER_NAME": host, "SERVER_PORT": str(port), "SERVER_SOFTWARE": f"hupserve/{__version__}",
                "SCRIPT_NAME": "", "wsgi.version": (1, 0), "wsgi.url_scheme": "https" if tls else "http",
                "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False,
                "wsgi.errors": ErrorsToLog(), "wsgi.file_wrapper": wsgiref.util.FileWrapper,
                "wsgi.input_terminated": True,      # Flask asks, before it reads a body without a length
                "hupserve.generation": self.generation.number, "hupserve.worker": self.number}

    # Move, and read
    def move(self, connection, state):
        """All in a room are given the same time, so that the first is the first that is due."""
        del self.rooms[connection.state][connection]
        self.rooms[state][connection] = None
        connection.state, connection.since, connection.deadline = state, self.now, self.now + self.limits[state]
        if not connection.registered and state not in (WAITING, IN_FLIGHT):
            connection.registered = True
            self.selector.register(connection.sock, selectors.EVENT_READ, functools.partial(self.read, connection))

    def read(self, connection):
        if connection not in self.rooms[connection.state]:
            return      # closed on account of an earlier event of the same round
        if connection.state in (WAITING, IN_FLIGHT):
            # Only now: most clients await their answer, and to leave them registered saves two system calls a request.
            connection.registered = False
            self.selector.unregister(connection.sock)
            return
        came = connection.receive()
        if came is None and connection.registered:
            return
        if came and connection.state == CLOSING:
            connection.buffer = b""     # once a round: who sends and sends must not keep this thread from its deadline
        elif came != 0:
            self.advance(connection)
        elif connection.state in (READING, RECEIVING):
            self.refuse(connection, Refusal(400, "the request was cut short"))
        else:
            self.close(connection)

    def advance(self, connection):
        try:
            state = connection.take_request(self.config.max_body)
        except Refusal as refusal:
            return self.refuse(connection, refusal)
        if state != connection.state or state == RECEIVING or not connection.registered:    # io_timeout starts anew
            self.move(connection, state)

    def refuse(self, connection, refusal):
        log.debug("%s: %s: %s", connection.client, connection.line, refusal.reason)
        with contextlib.suppress(OSError):      # a few hundred bytes into an empty buffer: no waiting
            connection.sock.send(refusal.response(connection.line))
        if self.config.access_log != "off":
            connection.log_access(refusal.status.value, 0)
        self.close(connection, linger=True)

    # Dispatch, and take back
    def dispatch(self):
        """One thread is woken for all: at the interpreter's lock they take turns anyway, and every switch costs."""
        while self.rooms[WAITING] and self.in_flight < self.config.threads:
            connection = next(iter(self.rooms[WAITING]))
            self.move(connection, IN_FLIGHT)
            self.in_flight += 1
            self.jobs.append(connection)
        if self.jobs and self.sleeping:
            self.sleeping.pop().release()
        elif self.jobs and self.threads < self.config.threads and self.now >= self.thread_at:
            try:
                threading.Thread(target=self.work, daemon=True, name=f"request-{self.threads}").start()
                self.threads, self.thread_at = self.threads + 1, 0.0
            except RuntimeError as error:       # those there are go on
                self.thread_at = again_at(self.thread_at, self.now, "start a thread", error)

    def work(self):
        """In a thread: one job after another. To start a thread for each would cost more than most of them do."""
        gate = threading.Lock()
        gate.acquire()
        while True:
            try:
                connection = self.jobs.popleft()
            except IndexError:
                self.sleeping.append(gate)
                gate.acquire()
            else:
                self.process_request_thread(connection, connection.client)  # Exchange.handle(), shutdown_request()

    def shutdown_request(self, connection):
        """In a thread: it goes back. The bell is rung for a batch, one job early: it takes that long to wake up."""
        self.returned.append(connection)
        if len(self.jobs) < 2:
            self.bell.writer.write(b"!")    # None, if the pipe is full: it wakes anyway

    def take_back(self):
        while self.returned:
            connection = self.returned.popleft()
            connection.request = None
            self.in_flight -= 1
            self.served += 1
            if connection.keep and not connection.buffer:
                self.move(connection, IDLE)
            elif connection.keep:
                self.advance(connection)
            else:       # closed at once, if the client has asked for that and sent nothing more
                came = bool(connection.buffer) or connection.receive()
                self.close(connection, linger=connection.linger if came is None else came)

    # Close, and expire
    def close(self, connection, linger=False):
        """linger: discard what still comes: a close with input unread is a reset, which can overtake the answer."""
        if connection.tls:      # close_notify: anybody can cut off what has none. (What lingers is read as it comes.)
            with contextlib.suppress(OSError, ValueError):
                connection.sock.unwrap()
        if linger:
            connection.buffer = b""
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            return self.move(connection, CLOSING)
        if connection.registered:
            self.selector.unregister(connection.sock)
        del self.rooms[connection.state][connection]
        self.count, self.polite_at = self.count - 1, 0.0 if self.pressed else self.polite_at    # there is a place now
        connection.sock.close()

    def evict(self):
        """Close, or read if it has spoken, who has been idle longest, and for long -> was there one?"""
        idle = self.long_idle()
        if idle:
            min(idle, key=lambda connection: connection.since).deadline = self.now
            self.expire()
        return bool(idle)

    def expire(self):
        """End what is due. Who is idle is read once more just before: what risk remains, see RFC 9112 section 9.5."""
        for room in self.rooms:
            while room and next(iter(room)).deadline <= self.now:
                connection = next(iter(room))
                if connection.state <= IDLE and connection.receive():
                    self.advance(connection)
                if connection in room and connection.state in (READING, RECEIVING):
                    self.refuse(connection, Refusal(408, "the request took too long to arrive"))
                elif connection in room:
                    self.close(connection)

    # When the application forks, as multiprocessing does
    def before_fork(self):
        """Not while a socket is in no room: the child would keep it. A TERM to that has to wait for disown()."""
        self.still.acquire()
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, MASTER_SIGNALS)

    def after_fork(self):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        self.still.release()

    def disown(self):
        """In the child: it must hold no connection or listener open, nor answer to our signals."""
        if self.bell:       # once: in its own children the descriptors may be something else
            for each in (self.line.sock, self.selector, self.bell.reader, self.bell.writer, *self.listeners,
                         *(connection.sock for room in self.rooms for connection in room)):
                each.close()
            self.bell = None
            self.jobs.clear()       # if its copy of a request ends by an exception, it is back in work()
            signal.set_wakeup_fd(-1)
            for signum in MASTER_SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
        self.after_fork()


class ErrorsToLog(io.TextIOBase):
    """wsgi.errors: what the application writes there becomes lines of the log."""
    def write(self, text):
        if text.strip():
            log.error("%s", text.rstrip())
        return len(text)


def run_worker(generation, number, slot, line):
    """A worker's life, in the worker. Signals are still blocked when it begins."""
    bell = Bell()
    for signum in MASTER_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)   # until it serves, it dies of TERM at once
    bell.hang((signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)    # SIGIO ends it, if the master ends while it loads
    if comes_in_time(line, select.POLLIN, 0):       # or has ended already
        return
    worker = Worker(generation, number, slot, line, bell)
    worker.report()
    worker.application = load_application(generation.config)
    fcntl.fcntl(line, fcntl.F_SETFL, os.O_NONBLOCK)
    worker.life = READY
    line.say("ready")
    worker.run()
    if worker.in_flight:
        log.warning("drain_timeout: %d requests in flight are cut short", worker.in_flight)


def leave(status):
    """sys.exit() would wait for a thread that hangs; os._exit() alone skips atexit: multiprocessing leaves orphans."""
    signal.alarm(10)        # if they take longer, it dies of that
    for last in (atexit._run_exitfuncs, lambda: sys.stdout.flush(), lambda: sys.stderr.flush()):
        with contextlib.suppress(BaseException):
            last()
    os._exit(status)


# ---- The master: its loop first, then what comes from below, the reload, spawn -----------------------
class Child:
    """One of a generation's places for a worker and, from BOOTING on, the worker in it."""
    def __init__(self, generation, number, deaths=0, fork_at=0.0):
        self.generation, self.number, self.life = generation, number, VACANT
        self.deaths, self.fork_at = deaths, fork_at     # in a row, before it; when it may be forked
        self.pid, self.line, self.slot, self.born, self.failure = 0, None, 0, 0.0, None     # born: forked, then ready

    def hear(self):
        for word, *rest in self.line.hear():
            if word == "failed":
                self.failure = rest         # exit status, reason
            elif self.life != DRAINING:     # what it was told meanwhile wins
                self.life, self.born = READY if word == "ready" else LEAVING, time.monotonic()

    def successor(self, now):
        """-> the one that takes its place, after the back-off."""
        deaths = 0 if self.life == LEAVING or self.life == SERVING and now - self.born > STEADY else self.deaths
        child = Child(self.generation, self.number, deaths + 1, now + BACK_OFF[min(deaths, len(BACK_OFF) - 1)])
        self.generation.children[self.number] = child
        return child


class Generation:
    """The workers of one reading of the configuration, and what they listen on."""
    def __init__(self, number, config, adopted=(), kept=()):
        self.number, self.config, self.stage, self.born = number, config, Stage.BINDING, time.monotonic()
        self.listeners = {text: kept[text] for text in config.listen if text in kept}     # {text: [Listener]}
        self.borrowed = {text for text, binds in config.listen.items() if set(binds) & set(adopted)}    # systemd's
        self.children: list = []        # by number, once all of its addresses are bound


class Master:
    """Owns listeners and workers; sits in one poll() all its life."""
    hup, stopping, fork_at = False, False, 0.0      # a SIGHUP waits; a stop is ordered; not before, after a failed fork
    terminal: Any = None        # /dev/tty, where it was started on one: no tty any more, when that has hung up

    def __init__(self, config):
        self.status = 0 if config.listen else 2     # to exit with; --check (no address): 2, unless it succeeds
        self.notify_socket = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # under nohup its end is no reason to stop
            with contextlib.suppress(OSError):
                self.terminal = io.FileIO(os.ctermid())
        self.adopted, self.bell = adopt(), Bell()
        self.bell.hang((*MASTER_SIGNALS, signal.SIGUSR2, signal.SIGTTIN))       # two that would end, or stop, it
        self.children, self.numbers = {}, itertools.count()     # {pid: Child}, of all generations; their numbers
        # The one that serves, and the one that a reload prepares. The start is a reload, too: from nothing, number 0.
        self.current = Generation(next(self.numbers), config._replace(listen={}, pidfile=""))
        self.upcoming: Any = Generation(next(self.numbers), config, self.adopted)

    def run(self):
        """-> exit status. Each step looks at what is and does what is due; only wait() waits."""
        while self.children or not self.stopping:
            self.wait()     # it hears "leaving" before obey() hears TERM: of a TERM to all ours has come then, and wins
            self.obey()     # before reap(): the bell is silenced first, so that a death after this rings it anew
            self.reap()
            self.advance()
            self.tend()
        self.release_pidfile(self.current.config.pidfile)
        log.log(logging.INFO if self.current.number else logging.DEBUG, "stopped")
        return self.status

    def wait(self):
        """Until there is a signal or word from a worker; while something may come to be due, for 20 ms at most."""
        poll = select.poll()        # an epoll would be shared with the children: one that unregisters deafens us
        for source in (self.bell, *(child.line for child in self.children.values() if not child.line.ended)):
            poll.register(source, select.POLLIN)
        pending = self.hup or self.upcoming or any(child.life < SERVING for child in self.current.children)
        poll.poll(20 if pending else None)
        self.now = time.monotonic()
        for child in self.children.values():
            child.hear()

    # What comes from the operator, and from below
    def obey(self):
        """A stop is a reload to nothing but the pidfile; a second one does not wait."""
        for signum in self.bell.silence():
            hung_up = signum == signal.SIGHUP and self.terminal and not self.terminal.isatty()
            if signum in STOPS and self.stopping:
                log.warning("stopped by force")
                self.status = self.status or 1
                for pid in self.children:
                    os.kill(pid, signal.SIGKILL)
            elif (signum in STOPS or hung_up) and not self.stopping:
                self.stopping, self.hup, name = True, False, signal.Signals(signum).name
                self.notify("STOPPING=1", f"{name}: stopping, when every request that has begun is answered")
                self.settle(Generation(self.current.number, self.current.config), self.upcoming, self.current)
                for child in self.children.values() if signum == signal.SIGINT else ():
                    child.line.say("drain", [], 0)      # a second order: no grace
            elif signum == signal.SIGHUP:
                self.hup = not self.stopping

    def reap(self):
        with contextlib.suppress(ChildProcessError):
            for pid, status in iter(lambda: os.waitpid(-1, os.WNOHANG), (0, 0)):
                if pid in self.children:        # if not, we are process 1, and it is somebody's orphan
                    self.bury(self.children.pop(pid), os.waitstatus_to_exitcode(status))

    def bury(self, child, code):
        child.hear()        # its last words
        child.line.sock.close()
        scoreboard.write(child.slot, None)
        scoreboard.loads[child.slot] = 0
        end = f"worker {child.number} (pid {child.pid}) ended with {'status' if code >= 0 else 'signal'} {abs(code)}"
        status, reason = child.failure or (1, end)
        if child.generation.stage == Stage.LOADING:
            self.roll_back(reason, status)
        elif child.life != DRAINING:
            log.error("%s; it is replaced in %g s", reason, child.successor(self.now).fork_at - self.now)
        elif code and child.generation.stage != Stage.VOID:
            log.warning("%s, of generation %d", end, child.generation.number)

    # The reload: bind, boot, commit or roll back; and the workers for it
    def advance(self):
        """Move the reload on, as far as it goes. A SIGHUP that comes in its midst is remembered, once, and is next."""
        if self.hup and not self.upcoming and not self.stopping:
            self.hup = False
            self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", "SIGHUP: reloading")
            try:
                config = read_config(self.current.config.ini.path)
                self.upcoming = Generation(next(self.numbers), config, self.adopted, self.current.listeners)
            except ConfigError as error:
                self.notify("READY=1", f"reload refused: {error}", logging.ERROR)
        new = self.upcoming
        if new and new.stage == Stage.BINDING:
            self.bind(new, self.current)
        elif new and all(child.life == READY for child in new.children):
            self.commit(new, self.current)
        elif new and self.now > new.born + new.config.boot_timeout:
            self.roll_back(f"not every worker was ready within {new.config.boot_timeout:g} s (boot_timeout)")

    def bind(self, new, old):
        """The new addresses; those that stay have their very sockets already."""
        try:
            for text, binds in new.config.listen.items():
                if text not in new.listeners:
                    for other in old.listeners:
                        if overlap(binds, old.config.listen[other]):
                            raise OSError(errno.EEXIST, f"overlaps {other}, which is being served")
                    open_listeners(binds, self.adopted, new.listeners.setdefault(text, []))
        except OSError as error:
            close_listeners(new.listeners.pop(text, []))
            if error.errno == errno.EADDRINUSE and self.now < new.born + BIND_PATIENCE:
                return      # an old worker may be about to let go of it: once more
            return self.roll_back(f"{new.config.ini.path}: [server:main] listen: {text}: {reason_of(error)}")
        new.children, new.stage = [Child(new, number) for number in range(new.config.workers)], Stage.LOADING

    def commit(self, new, old):
        """Every new worker is ready, and none has accepted anything. What can fail comes first."""
        if not new.config.listen:       # --check
            return self.roll_back(f"{new.config.ini.path}: good", 0)
        try:
            self.claim_pidfile(text := new.config.pidfile)
            for text in sorted(new.listeners, key=old.listeners.__contains__):      # the new ones first
                for listener in new.listeners[text]:
                    if listener.file and text not in old.listeners and not listener.has_file():
                        raise OSError(errno.EADDRINUSE, "another master has taken its place")
                    listener.listen(new.config.backlog)
            use_logs(new.config)
        except OSError as error:
            name, files = error.filename or text, ("pidfile", "log_file", "access_log")
            key = next((key for key in files if getattr(new.config, key) == name), "listen")
            return self.roll_back(f"{new.config.ini.path}: [server:main] {key}: {name}: {reason_of(error)}")
        self.current, new.stage = new, Stage.CURRENT
        self.tend()     # "go" to the new, before settle() says "drain" to the old
        self.settle(new, old)
        workers = f"{new.config.workers} worker{'s' * (new.config.workers > 1)}"
        if not old.number:      # the first line says the port even where the system has chosen it
            places = [text if text.startswith("unix:") else
                      f"http{'s' * bool(new.config.tls)}://{text.rpartition(':')[0]}:{first.getsockname()[1]}"
                      for text, (first, *_) in new.listeners.items()]
            tell(f"serving {new.config.ini.path} on {' '.join(places)} with {workers}; "
                 f"to reload it: kill -HUP {os.getpid()}", 0)
        self.notify("READY=1", f"generation {new.number} serves with {workers}")

    def roll_back(self, reason, status=1):
        """Nothing has changed: the old generation has never stopped serving."""
        self.settle(self.current, self.upcoming)
        if self.current.number:
            self.notify("READY=1", f"reload rolled back: {reason}", logging.ERROR)
        else:
            self.stopping, self.status = True, tell(reason, status and max(status, self.status))

    def settle(self, heir, *others):
        """Close what only the others have, then tell their workers: these let in whoever is queued at an address, and
        close its last copy. Were the master's still open, more would queue there, to be reset by its close."""
        self.current, self.upcoming = heir, None
        for generation in filter(None, others):
            generation.stage = Stage.PAST if generation.stage == Stage.CURRENT else Stage.VOID
            dropped = generation.listeners.keys() - heir.listeners.keys()
            for text in dropped:
                close_listeners(generation.listeners[text])
            if generation.config.pidfile != heir.config.pidfile:
                self.release_pidfile(generation.config.pidfile)
            for child in self.children.values():
                if child.generation is generation and child.life != DRAINING:       # who drains is not told again
                    # The signal finds the order there. A worker that is dead already keeps its pid until reap().
                    child.line.say("drain", sorted(dropped - generation.borrowed), generation.config.idle_grace)
                    os.kill(child.pid, signal.SIGKILL if child.life == BOOTING else signal.SIGHUP)
                    child.life = DRAINING

    def claim_pidfile(self, path):
        """OSError: it cannot be written, or names a living process that is none of ours."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError, OverflowError), open(path) as file:
            if (pid := int(file.read(32))) == os.getpid():
                return      # were it rewritten, somebody could find it empty
            os.getpgid(-1 if pid in self.children else pid or -1)       # ProcessLookupError: it is dead
            raise FileExistsError(errno.EEXIST, f"it names process {pid}, which is alive", path)
        with open(path or os.devnull, "w") as file:
            print(os.getpid(), file=file)

    def release_pidfile(self, path):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            if int(file.read(32)) == os.getpid():     # if not, it has become another master's
                os.unlink(path)

    def notify(self, state, outcome, level=logging.INFO):
        """The log and, by sd_notify(3), systemd, which waits for whatever becomes of a SIGHUP."""
        log.log(level, "%s", outcome)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(self.notify_socket)        # "", where nobody wants to know: an OSError, too
            sock.send(f"{state}\nSTATUS={outcome}".encode(errors="backslashreplace"), socket.MSG_DONTWAIT)

    def tend(self):
        """Look at every place: fork for the vacant, end what never becomes ready, send the ready to work."""
        for generation in filter(None, (self.current, self.upcoming)):
            for child in generation.children:
                if child.life == LEAVING:
                    child.line.say("drain", [], generation.config.idle_grace)
                    child.life, child = DRAINING, child.successor(self.now)
                if child.life == VACANT and self.now >= max(child.fork_at, self.fork_at):
                    self.spawn(child)
                elif child.life == BOOTING and self.now > child.born + generation.config.boot_timeout:
                    child.failure = child.failure or (1, f"worker {child.number} was not ready within boot_timeout")
                    os.kill(child.pid, signal.SIGKILL)
                elif child.life == READY and generation.stage == Stage.CURRENT:
                    child.line.say("go")
                    child.life = SERVING

    def spawn(self, child):
        child.slot = min({*range(Scoreboard.SLOTS)} - {other.slot for other in self.children.values()}, default=0)
        # Blocked, for the child must not run the master's handlers, nor lose a signal before it has its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            child.line, theirs = map(Line, socket.socketpair())
            child.pid = os.fork()
            if not child.pid:
                self.become_worker(child, theirs)       # does not return
            theirs.sock.close()
            self.fork_at, child.born, child.life = 0.0, self.now, BOOTING
            self.children[child.pid] = child
        except OSError as error:
            self.fork_at = again_at(self.fork_at, self.now, "start a worker", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def become_worker(self, child, line):
        """In the worker: close what is the master's and other generations', and run. Never returns."""
        try:
            spare = [self.bell.reader, self.bell.writer, self.terminal, *self.adopted.values(),
                     *(each.line.sock for each in (child, *self.children.values()))]
            for other in filter(None, (self.current, self.upcoming)):
                for text in other.listeners.keys() - child.generation.listeners.keys():
                    spare += other.listeners[text]
            for each in filter(None, spare):
                each.close()
            run_worker(child.generation, child.number, child.slot, line)
            leave(0)
        except ConfigError as error:
            line.say("failed", 2, str(error))
        except BaseException as error:      # an import may well call sys.exit()
            log.exception("worker %d failed", child.number)
            line.say("failed", 1, f"worker {child.number} failed: {reason_of(error, short=False)[:500]}")
        finally:        # also if the error cannot even be told: this must not become a second master
            leave(1)


# ---- Demo and status: the two applications that ship with it -----------------------------------------
COLUMNS = ("generation", "worker", "pid", "state", "idle", "reading", "in_flight", "served", "waits_for")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hupserve</title>
<style>:root { color-scheme: light dark; font-family: system-ui } td { padding: .5em; white-space: pre-line }</style>
<main><h1>%(title)s</h1><p>Answered by worker %(worker)s (pid %(pid)s) of generation %(generation)s.</p>
<table><tr><th>%(columns)s%(rows)s</table></main>
<p><button onclick="fetch('slow?seconds=20')" %(hidden)s>Hold a request in flight for 20 s</button>
<script>setInterval(async () => {
  const page = await fetch("").then(response => response.text()).catch(() => "")
  document.querySelector("main").innerHTML = page.split(/<.?main>/)[1] || "Nobody answers." }, 500)</script>"""


def status_filter(global_conf, path="/status", greeting=""):
    """paste.filter_factory: at path, all workers, live; or as JSON (Accept: application/json, or ?format=json)."""
    return lambda application: functools.partial(status, application, path, greeting)


def status(application, path, greeting, environ, start_response):
    if environ.get("PATH_INFO") != path:
        return application(environ, start_response)
    facts = {"greeting": greeting, "pid": os.getpid(), "workers": scoreboard.read(),
             "generation": environ.get("hupserve.generation"), "worker": environ.get("hupserve.worker")}
    if "format=json" in environ.get("QUERY_STRING", "") or "application/json" in environ.get("HTTP_ACCEPT", ""):
        return answer(start_response, "200 OK", json.dumps(facts), "application/json")
    import html     # here, for its table of entities is half a megabyte that few will need
    rows = ""
    for worker in facts["workers"]:
        worker["waits_for"] = "\n".join("{client} {request} {age} s".format(**wait) for wait in worker["waits_for"])
        rows += "\n<tr><td>" + "<td>".join(html.escape(str(worker[column])) for column in COLUMNS)
    return answer(start_response, "200 OK", PAGE % {
        **facts, "title": html.escape(greeting or "hupserve"), "hidden": "" if greeting else "hidden",
        "columns": "<th>".join(COLUMNS).replace("_", " "), "rows": rows}, "text/html; charset=utf-8")


def answer(start_response, status, text, kind="text/plain; charset=utf-8"):
    body = text.encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
    return [body]


def demo_app(global_conf, greeting="hello"):
    """paste.app_factory: the status page with a greeting, and /slow?seconds=N to hold a request in flight."""
    def slow(environ, start_response):
        seconds = re.fullmatch(r"seconds=([0-9]{1,4}(\.[0-9]+)?)", environ.get("QUERY_STRING") or "seconds=20")
        if environ.get("PATH_INFO") != "/slow" or not seconds:
            return answer(start_response, "404 Not Found", "Try / or /slow?seconds=20\n")
        time.sleep(float(seconds[1]))
        return answer(start_response, "200 OK", f"{greeting}, after {seconds[1]} s, still from pid {os.getpid()} "
                                                f"of generation {environ.get('hupserve.generation')}\n")
    return status_filter(global_conf, "/", greeting)(slow)


# ---- Main --------------------------------------------------------------------------------------------
def tell(reason, status):
    with contextlib.suppress(OSError):      # nobody reads it
        print(f"hupserve: {reason}", file=sys.stderr, flush=True)
    return status


def serve(config):
    """-> exit status: 0 after a clean stop; 1 after a forced one or a failed start; 2 for the operator's mistake."""
    sys.modules.setdefault("hupserve", sys.modules[__name__])   # or hupserve:demo_app were a second copy
    try:
        sys.path.insert(0, os.getcwd())     # once: it may be gone when a replacement starts
        use_logs(config)
        master = Master(config)
    except OSError as error:
        return tell(reason_of(error), 1)
    return master.run()


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="hupserve", description="A WSGI server whose SIGHUP reload loses nothing.")
    parser.add_argument("config", metavar="CONFIG", help="an ini file")
    parser.add_argument("--check", action="store_true", help="validate it, application included, and exit")
    parser.add_argument("--version", action="version", version=f"hupserve {__version__}")
    arguments = parser.parse_args(argv)
    while os.open(os.devnull, os.O_RDWR) < 3:       # a closed stderr's number must not become a socket's
        pass
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        config = read_config(arguments.config)
    except ConfigError as error:
        return tell(error, 2)
    if arguments.check:         # like nginx -t: a worker loads all of it, and nothing is bound
        config = config._replace(listen={}, workers=1, pidfile="", log_file="-", access_log="off")
    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
