#!/usr/bin/env python3
"""hupserve: a WSGI server that takes up a new configuration and loses no request doing so.

    python hupserve.py example.ini          serve
    kill -HUP <pid of the master>           reload: new workers, new code, new settings

It promises that between its first answer and its stop no client is refused or reset, and that no request
which has begun to arrive goes without an answer: whatever is reloaded, and also if that turns out wrong.
It leaves to others: HTTP/2, websockets, async applications, privileges, static files at scale.

    operator --signals--> MASTER    owns the listeners, starts and counts the workers; runs no
                          |    ^    application code and no thread, so it can fork for years
       go, drain (line)   v    |    ready, leaving, failed (line)
                        WORKER      its main thread owns every connection that is not in flight:
                          |    ^    it accepts, reads, waits, expires, closes
     request, complete    v    |    connection, answered
                        THREADS     run the application: one request, one response

A reload. A generation is the workers started from one reading of the configuration.

    master        SIGHUP: read, bind, fork ....... every new worker is ready: commit
    old workers   serve .........................................| drain: finish what has begun, leave
    new workers                    load the application ....ready| serve
                  a mistake found up to here is a roll-back: nothing has changed

    signal   to the master                          to a worker
    HUP      reload                                 drain if the master ordered it, else a log line
    TERM     stop when every request is answered    drain, leave and be replaced
    QUIT     as TERM                                as TERM
    INT      as TERM, without grace for the idle    nothing: the master speaks for it
    USR1     nothing: logs follow their rotation    nothing
A second TERM, QUIT or INT stops the master at once.
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
import html
import http
import importlib
import inspect
import io
import ipaddress
import json
import logging
import logging.config
import logging.handlers
import mmap
import operator
import os
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
import threading
import time
import urllib.parse
import wsgiref.util
from typing import Any, NamedTuple, Optional

__version__ = "1.0.0"
log = logging.getLogger("hupserve")
access_log = logging.getLogger("hupserve.access")


# ---- Words: the states, each listed once, and who moves what on which event ------------------------


class State(enum.IntEnum):
    """Where a connection is. Only the worker's main thread moves one (Worker.move)."""
    HANDSHAKE = 0   # TLS is being agreed on                             -> NEW
    NEW = 1         # no byte of a first request has arrived             -> READING
    IDLE = 2        # kept alive, no byte of a next request has arrived  -> READING
    READING = 3     # a head has begun to arrive                         -> RECEIVING, WAITING
    RECEIVING = 4   # its short, announced body has begun to arrive      -> WAITING
    WAITING = 5     # complete, until a thread is free                   -> IN_FLIGHT
    IN_FLIGHT = 6   # with a thread                                      -> IDLE, READING, CLOSING
    CLOSING = 7     # our side is shut down, input is discarded          -> closed


class Life(enum.IntEnum):
    """Where a worker is, as the master sees it. Only Master moves one."""
    VACANT = 0      # to be forked                    -> BOOTING (now, or after the back-off)
    BOOTING = 1     # loads the application           -> READY (it says "ready")
    READY = 2       # loaded, accepts nothing         -> SERVING (the master says "go")
    SERVING = 3     # accepts                         -> DRAINING (an order, or it says "leaving")
    DRAINING = 4    # finishes what it has begun      -> gone, and nobody replaces it


class Phase(enum.IntEnum):
    """Where a reload is; the start is a reload from nothing. Only Master moves it."""
    NONE = 0        # no reload is going on           -> BINDING (a SIGHUP, and the file is valid)
    BINDING = 1     # the new addresses are bound     -> BOOTING, or rolled back
    BOOTING = 2     # the new generation is loading   -> committed, or rolled back


STOPS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
MASTER_SIGNALS = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
LOADING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)    # a worker's, before TERM and QUIT
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
FOREVER = float("inf")
PAUSE = 0.5             # seconds without accept or fork when the system has no more to give
LINGER = 2.0            # seconds of input to discard on a connection that is closing
BIND_PATIENCE = 1.0     # seconds for an old worker to let go of an address that comes back
DRAIN_REPORT = 30.0     # seconds between two log lines on what a draining worker waits for
BACK_OFF = (0, 0.2, 0.4, 0.8, 1.6, 3.2, 5)      # seconds before a worker that died is replaced
STEADY = 10.0           # seconds of life that start the back-off again


# ---- Configuration: text in, one immutable object out ----------------------------------------------


class ConfigError(Exception):
    """The operator's mistake, in one line: file, section, key and reason."""


def reason_of(error):
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())


def did_you_mean(word, words):
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


class Address(NamedTuple):
    text: str       # as configured: what tells two listeners apart
    binds: tuple    # (family, host or path, port) of each of its sockets: *:port has two


def addresses(text):
    """'127.0.0.1:80 unix:/x' -> Addresses. Hosts are numeric: the master never waits for a name server."""
    found = tuple(Address(word, binds_of(word)) for word in text.split())
    for index, address in enumerate(found):
        for other in found[:index]:
            if overlap(address, other):
                raise ValueError(f"{address.text} overlaps {other.text}")
    if not found:
        raise ValueError("no address")
    return found


def binds_of(word):
    if word.startswith("unix:"):
        if not 5 < len(os.fsencode(word)) < 113:
            raise ValueError(f"{word}: the path of a unix socket has 1 to 107 bytes")
        return ((socket.AF_UNIX, word[5:], -1),)
    host, _, port = word.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{word} is not host:port, [::1]:port, *:port or unix:/path")
    if host == "*":
        return ((socket.AF_INET, "0.0.0.0", int(port)), (socket.AF_INET6, "::", int(port)))
    with contextlib.suppress(ValueError):
        if host.startswith("["):
            return ((socket.AF_INET6, str(ipaddress.IPv6Address(host[1:-1])), int(port)),)
        return ((socket.AF_INET, "127.0.0.1" if host == "localhost" else str(ipaddress.IPv4Address(host)), int(port)),)
    raise ValueError(f"{word}: the host is neither *, localhost, an IPv4 nor an [IPv6] address")


def overlap(one, other):
    """Could the two not listen at the same time? (IPv6 listeners are IPv6 only.)"""
    return one.text == other.text or any(
        family == family2 and port == port2 != 0 and (host == host2 or {host, host2} & {"0.0.0.0", "::"})
        for family, host, port in one.binds for family2, host2, port2 in other.binds)


def number(kind, low, high):
    """-> a reader of whole numbers (int), or of seconds (float), from low to high."""
    def read(text):
        if not re.fullmatch("[0-9]{1,15}" if kind is int else r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        if not low <= kind(text) <= high:
            raise ValueError(f"{text} is not between {low} and {high}")
        return kind(text)
    return read


def level(text):
    if text.lower() not in LEVELS:
        raise ValueError(f"{text!r} is none of {', '.join(LEVELS)}{did_you_mean(text, LEVELS)}")
    return text.upper()


def log_path(text):
    """'off', '-' or a file, which is opened once here: so a commit does not fail for it."""
    if text not in ("off", "-"):
        open(text, "a").close()
    return text


LEVELS = ("debug", "info", "warning", "error", "critical")
KEYS = {    # of [server:main]: the default, and what reads the text (its ValueError is the reason)
    "listen": ("127.0.0.1:8000", addresses),
    "workers": ("2", number(int, 1, 1000)),
    "threads": ("16", number(int, 1, 10_000)),              # requests in flight per worker
    "connections": ("1000", number(int, 1, 1_000_000)),     # open connections per worker
    "backlog": ("2048", number(int, 1, 1_000_000)),
    "keepalive_timeout": ("75", number(float, 0, 1e9)),     # seconds, as all that follow
    "header_timeout": ("10", number(float, 0.001, 1e9)),
    "io_timeout": ("60", number(float, 0.001, 1e9)),
    "idle_grace": ("5", number(float, 0, 1e9)),
    "drain_timeout": ("0", number(float, 0, 1e9)),          # 0: no limit
    "boot_timeout": ("60", number(float, 0.001, 1e9)),
    "max_body": ("0", number(int, 0, 10**15)),              # bytes, 0: no limit
    "certfile": ("", str),
    "keyfile": ("", str),
    "pidfile": ("", str),
    "access_log": ("off", log_path),
    "log_file": ("-", log_path),
    "log_level": ("info", level),
}


class Part(NamedTuple):
    """One section of the application: where its callable is, and the settings it is given."""
    where: str          # "example.ini: [app:main] wsgi", to begin a complaint with
    kind: str           # wsgi, paste.app_factory or paste.filter_factory
    target: str         # module:attribute
    settings: dict


class Config(collections.namedtuple("Config", [*KEYS, "target", "ini", "name", "warnings", "parts", "tls"])):
    """One reading of a configuration file: every key of KEYS, and

    target: as the command line names it (path, or path#name);  name: of the application, main
    ini: the Ini;  warnings: lines for the log;  tls: an ssl.SSLContext, or None for plain HTTP
    parts: the application's Parts, outermost filter first; None: PasteDeploy is to read the file
    """


class Ini:
    """The text of the file, parsed once. Raises OSError, ValueError or configparser.Error."""

    def __init__(self, path):
        self.path, full = path, os.path.abspath(path)
        defaults = {"here": os.path.dirname(full), "__file__": full}
        self.parser = configparser.ConfigParser({key: text.replace("%", "%%") for key, text in defaults.items()})
        self.bare = configparser.RawConfigParser(default_section="")     # sections inherit nothing in this one
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        for parser in (self.parser, self.bare):
            parser.optionxform = str        # type: ignore[method-assign, assignment]
            parser.read_string(text, path)
        self.global_conf = {key: self.parser.get("DEFAULT", key) for key in self.parser.defaults()}

    def own(self, section):
        """-> the section's own keys, as a dict: those of [DEFAULT] are global_conf, not settings."""
        return {key: self.parser.get(section, key) for key in self.bare.options(section)}

    def wrong(self, section, key, reason):
        return ConfigError(f"{self.path}: [{section}] {key}: {reason}")


def read_config(target):
    """Read and validate 'file.ini' or 'file.ini#name' -> Config. Raises ConfigError."""
    path, _, name = target.partition("#")
    try:
        ini = Ini(path)
        server = ini.own("server:main") if "server:main" in ini.bare else {}
        values, warnings = read_server(ini, server)
        parts = read_parts(ini, name or "main")
    except (OSError, ValueError, configparser.Error) as error:
        raise ConfigError(f"{path}: {reason_of(error)}") from None
    tls = tls_context(ini, values["certfile"], values["keyfile"])
    return Config(**values, target=target, ini=ini, name=name or "main", warnings=warnings, parts=parts, tls=tls)


def read_server(ini, server):
    """-> the values of KEYS, and warnings. With use = the section is another server's, and may have keys
    of its own."""
    if not server and difflib.get_close_matches("server:main", ini.bare.sections(), 1, 0.8):
        raise ConfigError(f"{ini.path}: [server:main] missing section{did_you_mean('server:main', ini.bare)}")
    values, warnings = {key: read(text) for key, (text, read) in KEYS.items() if key not in server}, []
    for key, text in server.items():
        try:
            if key in KEYS:
                values[key] = KEYS[key][1](text)
            elif "use" not in server:
                raise ValueError(f"unknown key{did_you_mean(key, KEYS)}")
            elif key != "use":
                warnings.append(f"{ini.path}: [server:main] {key}: unknown key, left to {server['use']}")
        except (ValueError, OSError) as error:
            raise ini.wrong("server:main", key, reason_of(error)) from None
    if values["log_file"] == "off":
        raise ini.wrong("server:main", "log_file", "cannot be off; log_level says how much is logged")
    return values, warnings


def read_parts(ini, name):
    """[app:NAME] or [pipeline:NAME] -> a tuple of Parts; None where it is for PasteDeploy to read."""
    if f"pipeline:{name}" not in ini.bare:
        parts = [read_part(ini, "app", name)]
    elif f"app:{name}" in ini.bare:
        raise ini.wrong(f"pipeline:{name}", "pipeline", f"[app:{name}] is there, too: which is meant?")
    else:
        pipeline = ini.own(f"pipeline:{name}")
        names = pipeline.pop("pipeline", "").split()
        if not names:
            raise ini.wrong(f"pipeline:{name}", "pipeline", "names no application")
        if pipeline or any(":" in part for part in names):
            return None
        parts = [read_part(ini, "app" if part == names[-1] else "filter", part) for part in names]
    return tuple(parts) if all(parts) else None


def read_part(ini, prefix, name):
    """The section [prefix:name] -> a Part; None where only PasteDeploy knows what it means."""
    section = f"{prefix}:{name}"
    if section not in ini.bare:
        if prefix == "app" and any(re.fullmatch(f"(composite?|application|filter-app|pipeline):{re.escape(name)}",
                                                other) for other in ini.bare):
            return None
        raise ConfigError(f"{ini.path}: [{section}] missing section{did_you_mean(section, ini.bare.sections())}")
    settings, factory = ini.own(section), f"paste.{prefix}_factory"
    kind = "wsgi" if prefix == "app" and "wsgi" in settings else factory
    if any(re.match("use$|filter-with$|[sg]et |paste[.]", key) and key != factory for key in settings):
        return None
    if kind not in settings:
        raise ini.wrong(section, kind, f"missing key{did_you_mean(kind, settings)}"
                        + " (or wsgi = module:attribute)" * (prefix == "app"))
    target = settings.pop(kind)
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ini.wrong(section, kind, f"{target!r} is not module:attribute")
    if kind == "wsgi" and settings:
        raise ini.wrong(section, next(iter(settings)), "a setting, and wsgi = takes none; paste.app_factory does")
    return Part(f"{ini.path}: [{section}] {kind}", kind, target, settings)


def tls_context(ini, certfile, keyfile):
    """-> ssl.SSLContext or None. The master makes it: it may read a key that its workers cannot."""
    if not certfile and keyfile:
        raise ini.wrong("server:main", "keyfile", "needs a certfile")
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile or None, lambda: b"")     # never ask on the terminal
    except (OSError, ValueError) as error:
        raise ini.wrong("server:main", "certfile", f"{certfile} {keyfile}: {reason_of(error)}") from None
    return context


def load_application(config):
    """In a worker: import and build the WSGI callable. Raises ConfigError for what the operator wrote
    wrongly and, as they are, the application's own errors."""
    importlib.invalidate_caches()       # a module may be younger than the import system's idea of its folder
    sys.path.insert(0, os.getcwd())
    if config.parts is None:
        return load_with_paste(config)
    application: Any = None
    for part in reversed(config.parts):
        found = resolve(part)
        if part.kind != "wsgi":
            with contextlib.suppress(ValueError):       # a callable without a signature to look at
                try:
                    inspect.signature(found).bind(config.ini.global_conf, **part.settings)
                except TypeError as error:
                    raise ConfigError(f"{part.where}: {part.target}: {reason_of(error)}") from None
            found = found(config.ini.global_conf, **part.settings)
        application = found(application) if part.kind == "paste.filter_factory" else found
        if not callable(application):
            raise ConfigError(f"{part.where}: {part.target} gives {application!r}, which is not callable")
    return application


def resolve(part):
    """'module:attribute' -> the object."""
    module, _, attribute = part.target.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise       # the module is there: what it imports is not
        raise ConfigError(f"{part.where}: there is no module {error.name}") from None
    try:
        return operator.attrgetter(attribute)(found)
    except AttributeError:
        hint = did_you_mean(attribute, dir(found))
        raise ConfigError(f"{part.where}: module {module} has no {attribute}{hint}") from None


def load_with_paste(config):
    """What hupserve does not read itself: use = egg:..., config:, composites, filter-with, set."""
    try:
        from paste.deploy import loadapp
    except ImportError:
        raise ConfigError(f"{config.ini.path}: [app:{config.name}] is for PasteDeploy to read, "
                          "which is not installed") from None
    try:
        return loadapp("config:" + urllib.parse.quote(os.path.abspath(config.ini.path)), config.name)
    except LookupError as error:
        if type(error) is not LookupError:      # PasteDeploy's own, for a section or entry point it misses
            raise
        raise ConfigError(f"{config.ini.path}: {reason_of(error)}") from None


class LogFile(logging.handlers.WatchedFileHandler):
    """Follows rotation. A full disk costs log lines, never requests: one line on stderr says so."""
    complained = False

    def handleError(self, record):
        if not self.complained:
            self.complained = True
            with contextlib.suppress(Exception):
                print(f"hupserve: {self.baseFilename}: {reason_of(sys.exc_info()[1])}", file=sys.stderr)


def open_logs(config):
    """-> the handlers of the log and of the access log (None: off). Raises OSError."""
    handlers: list = []
    for path, form in ((config.log_file, "%(asctime)s [%(process)d] %(levelname)s %(message)s"),
                       (config.access_log, "%(message)s")):
        handlers.append(None if path == "off" else logging.StreamHandler() if path == "-" else LogFile(path))
        if handlers[-1]:
            handlers[-1].setFormatter(logging.Formatter(form))
    return handlers


def use_logs(config, handlers):
    for logger, handler in zip((log, access_log), handlers):
        for old in logger.handlers:
            old.close()
        logger.handlers, logger.propagate = [handler] if handler else [], False
    log.setLevel(config.log_level)
    access_log.setLevel(logging.INFO)


# What a client sent must not forge a line of a log, or steer a terminal.
ESCAPES = {code: f"\\x{code:02x}" for code in range(256) if not 32 <= code < 127 or code in b'"\\'}


# ---- Listeners: bind, adopt, let go ----------------------------------------------------------------


class Listener(socket.socket):
    """A bound socket; of a unix socket that is ours, .file is the path and the identity of its file."""
    file: Optional[tuple] = None


def open_listener(address, adopted):
    """-> the Listeners of an Address, bound or adopted. They do not listen before the commit, so that
    nobody is queued on them and a roll-back resets nobody. Raises OSError."""
    listeners: list = []
    try:
        for family, host, port in address.binds:
            wildcard = adopted.get((socket.AF_INET6, "::", port))
            if (family, host, port) in adopted:
                listeners.append(adopted[family, host, port].dup())
            elif host == "0.0.0.0" and wildcard and not wildcard.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                continue        # systemd's [::]:port serves both families
            else:
                listeners.append(bind(family, host, port or listeners and listeners[0].getsockname()[1]))
    except OSError as error:
        if not listeners or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            close_listeners(listeners)
            raise               # *:port on a machine without IPv6 is IPv4 alone
    return listeners


def bind(family, host, port):
    listener = Listener(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if family == socket.AF_UNIX:
            remove_stale(host)
            listener.bind(host)
            listener.file = host, os.stat(host)
            return listener
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # its connections inherit it
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port or 0))
    except BaseException:
        listener.close()
        raise
    return listener


def remove_stale(path):
    """The file of a socket that nobody listens on is a dead server's. Any other is not ours to remove."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "is there already, and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        return os.unlink(path)
    except BlockingIOError:
        pass        # its queue is full: it is alive
    raise OSError(errno.EADDRINUSE, "another server listens there")


def close_listeners(listeners):
    """In the master. The file of a unix socket goes first, so that nobody connects any more."""
    for listener in listeners:
        with contextlib.suppress(OSError):
            if listener.file and os.path.samestat(os.stat(listener.file[0]), listener.file[1]):
                os.unlink(listener.file[0])
        listener.close()


def adopt():
    """systemd's sockets (sd_listen_fds(3)) -> {(family, host or path, port): Listener}."""
    pid, count, _ = [os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")]
    adopted = {}
    for fd in range(3, 3 + int(count)) if pid == str(os.getpid()) and count.isdigit() else ():
        listener = Listener(fileno=fd)
        listener.set_inheritable(False)
        listener.setblocking(False)
        name = listener.getsockname()
        adopted[(listener.family, *(name[:2] if isinstance(name, tuple) else (name, -1)))] = listener
    return adopted


def turn_away(listener):
    """Let a listener that is about to be closed take no new client; its queue stays.

    Between the last accept(), which finds the queue empty, and the close() one more could be queued, and
    the close would reset it. With a filter that drops everything the kernel ignores its SYN instead: it
    asks again, and is refused, or served by whoever listens there by then."""
    if sys.platform == "linux" and listener.family != socket.AF_UNIX:
        drop_all = array.array("B", struct.pack("@HBBI", 0x06, 0, 0, 0))        # BPF: return 0
        so_attach_filter = 26
        listener.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("@HP", 1, drop_all.buffer_info()[0]))


# ---- The bell: what wakes a main loop, and how the two loops talk ----------------------------------


class Bell:
    """A pipe that wakes a selector, rung by signals and by threads; which signals came is a list.

    The byte only wakes: a pipe full of HUPs would drop the byte of a TERM, but not its place in the list."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.rung: list = []
        # In a worker the inherited one is the master's: its signals would ring there.
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)

    def hang(self, signals):
        for signum in signals:
            signal.signal(signum, lambda signum, frame: self.rung.append(signum))

    def ring(self):
        with contextlib.suppress(OSError):      # full: it wakes anyway
            os.write(self.writer, b"!")

    def answer(self):
        """-> the signals that came, in order. The pipe is drained first: a later one writes anew."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.reader, 4096):
                pass
        rung, self.rung = self.rung, []
        return rung

    def fileno(self):
        return self.reader

    def close(self):
        os.close(self.reader)
        os.close(self.writer)


class Line:
    """One end of the socketpair between the master and a worker: a JSON list per line, [word, ...].

    It carries what a signal cannot, and its end tells either side that the other is gone."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.pending, self.ended = sock, b"", False

    def say(self, *words):
        with contextlib.suppress(OSError):      # the other side is gone, and hear() tells
            self.sock.sendall(json.dumps(words).encode() + b"\n")

    def hear(self):
        """-> the messages that have come; .ended, if there will be no more."""
        try:
            while not self.ended:
                data = self.sock.recv(4096)
                self.pending, self.ended = self.pending + data, not data
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, self.pending = self.pending.split(b"\n")
        return [json.loads(line) for line in lines]

    def fileno(self):
        return self.sock.fileno()


class Scoreboard:
    """What the workers of all generations do: shared memory with a slot for each, which it alone writes
    while it lives, and all can read. A slot is a JSON object, or null, up to a NUL."""
    SLOTS, SIZE = 1024, 2048

    def __init__(self):
        self.memory = mmap.mmap(-1, self.SLOTS * self.SIZE)

    def write(self, slot, facts):
        text = json.dumps(facts).encode()
        self.memory[slot * self.SIZE:slot * self.SIZE + len(text) + 1] = text + b"\0"

    def read(self):
        """-> one dict a worker, the oldest generation first, each wait with its age in seconds."""
        found, now = [], time.monotonic()
        for start in range(0, len(self.memory), self.SIZE):
            with contextlib.suppress(ValueError):       # vacant, or half written: the next look finds it
                found += filter(None, [json.loads(self.memory[start:start + self.SIZE].partition(b"\0")[0])])
        for wait in (wait for worker in found for wait in worker["waits_for"]):
            wait["age"] = round(now - wait.pop("since"), 1)
        return sorted(found, key=operator.itemgetter("generation", "worker"))


scoreboard: Any = None      # the master's, which its workers inherit


# ---- The exchange: one request, one response (RFC 9110 and 9112, PEP 3333) -------------------------

MAX_LINE = 8192             # bytes of a request line (414)
MAX_HEAD = 65536            # bytes of a head, and of trailers (431)
MAX_FIELDS = 100            # of a head (431)
MAX_CHUNK_LINE = 1024       # bytes of a chunk's size with its extensions
SMALL_BODY = 65536          # bytes: an announced body up to this is read before a thread is taken
SKIPPABLE = 262144          # bytes of an unread body that are skipped to keep the connection
PIECE = 65536               # bytes read at once

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")
AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]{0,5})?")
ABSOLUTE = re.compile(r"https?://([^/?#]+)(.*)", re.IGNORECASE)
EMPTY_LINES = re.compile(rb"(?:\r\n)*")
DOUBTFUL = re.compile(rb"\0|(?<!\r)\n|\r(?=[^\n])")         # in a head: NUL, bare LF, bare CR
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?")
STATUS = re.compile(r"[1-9][0-9]{2}(?: [\t -~\x80-\xff]*)?")
LENGTH = re.compile("[0-9]{1,18}")


class Refusal(OSError):
    """A request that cannot be served: HTTP status and reason. The connection closes after it.
    An OSError, since out of wsgi.input that is what applications expect."""

    def __init__(self, status, reason):
        super().__init__(errno.EBADMSG, reason)
        self.status, self.reason = http.HTTPStatus(status), reason

    def response(self, line):
        """-> its bytes, whole. line: the request's; a HEAD is answered without a body."""
        body = f"{self.status.value} {self.status.phrase}: {self.reason}\n".encode()
        return (b"HTTP/1.1 %d %b\r\nContent-Type: text/plain\r\nContent-Length: %d%b\r\nConnection: close\r\n\r\n%b"
                % (self.status.value, self.status.phrase.encode(), len(body), http_date(int(time.time())),
                   b"" if line.startswith("HEAD ") else body))


class ClientGone(ConnectionError):
    """The client went away, or took nothing for io_timeout seconds, in mid-response."""


class Fields(NamedTuple):
    """What the field lines of a head say, whatever its request line."""
    environ: dict               # HTTP_*, CONTENT_TYPE, CONTENT_LENGTH
    length: Optional[int]       # of the body in bytes, where it is announced
    coding: Optional[str]       # Transfer-Encoding, lower-case
    options: list               # Connection's, lower-case (RFC 9110 section 7.6.1)


# A client repeats its field lines from request to request, and this is a pure function of them.
@functools.lru_cache(maxsize=128)
def parse_fields(block):
    """The bytes between request line and empty line -> Fields (RFC 9112 section 5). Raises Refusal."""
    lines = block.decode("latin-1").split("\r\n")[:-1]
    if len(lines) > MAX_FIELDS:
        raise Refusal(431, f"more than {MAX_FIELDS} header fields")
    environ: dict = {}
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise Refusal(400, "malformed header field")
        name, value = match[1].upper().replace("-", "_"), match[2].strip(" \t")
        key = name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}"
        if "_" in match[1]:
            continue        # X_Y and X-Y are one in the environ: one could pose as the other
        if key not in environ:
            environ[key] = value
        elif key == "HTTP_HOST" or key == "CONTENT_LENGTH" and environ[key] != value:
            raise Refusal(400, f"two {match[1]} fields")
        elif key != "CONTENT_LENGTH":
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    length, coding = environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING")
    if not AUTHORITY.fullmatch(environ.get("HTTP_HOST", "")):
        raise Refusal(400, "invalid Host")
    if length is not None and not LENGTH.fullmatch(length):
        raise Refusal(400, "invalid Content-Length")
    if length is not None and coding is not None:
        raise Refusal(400, "both Content-Length and Transfer-Encoding")
    return Fields(environ, length and int(length), coding if coding is None else coding.lower(),
                  [option.strip(" \t") for option in environ.get("HTTP_CONNECTION", "").lower().split(",")])


class Request(NamedTuple):
    environ: dict
    length: Optional[int]   # of the body in bytes; None: chunked
    expect: bool            # the client waits for 100 Continue
    keep: bool              # the client would keep the connection
    http11: bool            # it understands chunked


def parse_line(line):
    """A request line -> (method, target, minor version). Raises Refusal (RFC 9112 section 3)."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refusal(400 if major == "0" else 505, f"HTTP/{major}.{minor} is not spoken here")
    if method == "CONNECT":
        raise Refusal(501, "this is no proxy")
    if "#" in target or not (target[0] == "/" or ABSOLUTE.match(target) or (method, target) == ("OPTIONS", "*")):
        raise Refusal(400, "malformed request target")
    return method, target, minor


def parse_head(head, base, max_body):
    """A complete head without its empty line -> Request, whose environ starts from base (RFC 9112
    section 6, PEP 3333). Raises Refusal."""
    line, _, block = head.partition(b"\r\n")
    method, target, minor = parse_line(line.decode("latin-1"))
    fields, http11 = parse_fields(block), minor != "0"
    environ = {**base, **fields.environ}
    if http11 and "HTTP_HOST" not in environ:
        raise Refusal(400, "no Host")
    if target[0] not in "/*":
        environ["HTTP_HOST"], target = ABSOLUTE.match(target).groups()      # type: ignore[union-attr]
        if not AUTHORITY.fullmatch(environ["HTTP_HOST"]) or environ["HTTP_HOST"][0] == ":":
            raise Refusal(400, "malformed request target")
        target = target if target.startswith("/") else "/" + target
    path, _, environ["QUERY_STRING"] = target.partition("?")
    environ["PATH_INFO"] = urllib.parse.unquote_to_bytes(path).decode("latin-1") if "%" in path else path.strip("*")
    environ["REQUEST_METHOD"], environ["REQUEST_URI"] = method, target
    environ["SERVER_PROTOCOL"] = "HTTP/1.1" if http11 else "HTTP/1.0"
    length, coding = fields.length or 0, fields.coding
    if coding is not None:
        if not http11:
            raise Refusal(400, "Transfer-Encoding in HTTP/1.0")
        if coding != "chunked":
            raise Refusal(400 if set(re.split("[ \t]*,[ \t]*", coding)) <= {"chunked", ""} else 501,
                          "a transfer coding other than chunked")
        length = None
        environ["wsgi.input_terminated"] = True     # what Flask asks for before it reads such a body
    elif max_body and length > max_body:
        raise Refusal(413, f"more than {max_body} bytes")
    expect = environ.get("HTTP_EXPECT", "").lower() if http11 else ""
    if expect not in ("", "100-continue"):
        raise Refusal(417, "unknown expectation")
    keep = "close" not in fields.options and (http11 or "keep-alive" in fields.options)
    return Request(environ, length, expect != "", keep, http11)


class Connection:
    """A client's connection. In flight one thread reads and writes it; else the main thread does."""
    state = State.NEW
    since = 0.0                 # when it came to this state, in time.monotonic() seconds
    deadline = FOREVER          # when it must have left it
    registered = False          # with the selector
    buffer = b""                # what has arrived and is not used yet
    scanned = 0                 # bytes of the buffer in which no end of a head was found
    request: Any = None         # a Request, once its head is complete
    body = b""                  # its body, where that was short enough to be read beforehand
    line = ""                   # its request line
    keep = False                # the exchange's decision
    more = True                 # after a close, something may still come

    def __init__(self, sock, client, base, tls):
        self.sock, self.client, self.tls = sock, client, tls        # client: its address, for the logs
        self.base = base                                            # the environ of its requests to be

    def receive(self):
        """One read into the buffer, without waiting -> False at the end of input. Raises OSError, one of
        WOULD_BLOCK included."""
        data = self.sock.recv(PIECE)
        while self.tls and self.sock.pending():     # decrypted, and so invisible to a selector
            data += self.sock.recv(PIECE)
        self.buffer = self.buffer + data if self.buffer else data
        return bool(data)

    def complete(self, max_body):
        """Is the request that the buffer begins with there, with its body if that is short? Then .request
        and .body are it. Raises Refusal as soon as it cannot be right any more."""
        if self.request is None:
            if self.buffer.startswith(b"\r\n"):     # RFC 9112 section 2.2
                self.buffer, self.scanned = self.buffer[EMPTY_LINES.match(self.buffer).end():], 0   # type: ignore
            end = self.buffer.find(b"\r\n\r\n", max(0, self.scanned - 3))
            if end < 0 or end > MAX_HEAD:
                return self.refuse_early()
            head, self.buffer, self.scanned = self.buffer[:end + 2], self.buffer[end + 4:], 0
            self.line = head[:head.find(b"\r\n")].decode("latin-1")
            if len(self.line) > MAX_LINE:
                raise Refusal(414, f"a request line of more than {MAX_LINE} bytes")
            self.request, self.body = parse_head(head, self.base, max_body), b""
        length = self.request.length
        if not length or length > SMALL_BODY or self.request.expect:
            return True
        if len(self.buffer) < length:
            return False
        self.body, self.buffer = self.buffer[:length], self.buffer[length:]
        return True

    def refuse_early(self):
        """The head is not complete: False, unless it can never be right."""
        end = self.buffer.find(b"\r\n")
        self.line = self.buffer[:end if end >= 0 else 80].decode("latin-1")
        if end > MAX_LINE or end < 0 and len(self.buffer) > MAX_LINE:
            raise Refusal(414, f"a request line of more than {MAX_LINE} bytes")
        if DOUBTFUL.search(self.buffer, max(0, self.scanned - 1)):
            raise Refusal(400, "NUL, bare CR or bare LF")
        if end >= 0:
            parse_line(self.line)
        if len(self.buffer) > MAX_HEAD:
            raise Refusal(431, f"a head of more than {MAX_HEAD} bytes")
        self.scanned = len(self.buffer)
        return False

    # In flight: called in the connection's thread.

    def wait(self, event, seconds):
        """Until the socket can be read (POLLIN) or written (POLLOUT). Raises TimeoutError."""
        poller = select.poll()
        poller.register(self.sock, event)
        if not poller.poll(seconds * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"no progress for {seconds:g} s")

    def push(self, step, seconds):
        """step() sends something and says whether that was all. It may take seconds to get any further.
        Raises ClientGone."""
        try:
            while True:
                try:
                    if step():
                        return
                except WOULD_BLOCK:
                    self.wait(select.POLLOUT, seconds)
        except OSError as error:
            raise ClientGone(reason_of(error)) from None

    def send(self, data, seconds):
        """All of the bytes; the rest as push()."""
        def step():
            nonlocal data
            data = memoryview(data)[self.sock.send(data):]
            return not data
        self.push(step, seconds)

    def has_more(self):
        """Has a byte of a next request arrived?"""
        with contextlib.suppress(OSError):
            self.buffer or self.receive()
        return bool(self.buffer)


class Body(io.RawIOBase):
    """A request body as it comes off the connection, for wsgi.input (RFC 9112 sections 6 and 7.1).

    Wrapped in a BufferedReader, which knows how to read, readline and iterate. Never reads beyond the
    body's end. Raises Refusal where it is malformed, too long, cut short or late, and then always."""

    def __init__(self, exchange):
        self.exchange, self.connection, self.config = exchange, exchange.request, exchange.server.config
        self.pieces = self.decode(self.connection.request.length)
        self.stash = b""                # decoded, and not yet read by the application
        self.patient = True             # may it wait for input?
        self.ended, self.error = False, None
        self.invited = bool(self.connection.buffer) or not self.connection.request.expect

    def readable(self):
        return True

    def readinto(self, target):
        if not self.stash:
            self.stash = self.piece()
        count = min(len(target), len(self.stash))
        target[:count], self.stash = self.stash[:count], self.stash[count:]
        return count

    def piece(self):
        """-> the next bytes; b'' at the end, or if there are none yet and it must not wait for them."""
        if self.error:
            raise self.error
        try:
            return next(self.pieces, b"")
        except Refusal as refusal:
            self.error = refusal
            raise

    def arrived(self):
        """Has all of it arrived? What has, up to SKIPPABLE bytes, is kept for the application."""
        self.patient, stash = False, [self.stash]
        with contextlib.suppress(Refusal):
            while not self.ended and (len(stash) == 1 or stash[-1]) and sum(map(len, stash)) <= SKIPPABLE:
                stash.append(self.piece())
        self.patient, self.stash = True, b"".join(stash)
        return self.ended

    def decode(self, left):
        """Yields the pieces of left bytes, or of chunks (None); b'' where it would have to wait."""
        connection, chunked, total = self.connection, left is None, 0
        while left or chunked:
            if chunked:
                size = CHUNK_LINE.fullmatch((yield from self.line(MAX_CHUNK_LINE)))
                if not size:
                    raise Refusal(400, "malformed chunk size")
                left = int(size[1], 16)
                total += left
                if self.config.max_body and total > self.config.max_body:
                    raise Refusal(413, f"more than {self.config.max_body} bytes")
                if not left:
                    break
            while left:
                if not connection.buffer:
                    yield from self.fill()
                data, connection.buffer = connection.buffer[:left], connection.buffer[left:]
                left -= len(data)
                self.ended = not left and not chunked
                yield data
            if chunked and (yield from self.line(0)):
                raise Refusal(400, "a chunk longer than its size")
        trailers = b""
        while chunked:
            line = yield from self.line(MAX_HEAD - len(trailers))
            trailers += line + b"\r\n"
            chunked = line != b""
        parse_fields(trailers[:-2])     # they must be well-formed, and are discarded
        self.ended = True

    def line(self, limit):
        """Returns a line of at most limit bytes, without its CRLF."""
        connection = self.connection
        while True:
            line, found, rest = connection.buffer.partition(b"\n")
            if len(line) > limit + 1 or found and line[-1:] != b"\r":
                raise Refusal(400, "malformed chunk")
            if found:
                connection.buffer = rest
                return line[:-1]
            yield from self.fill()

    def fill(self):
        """Receive something. Invites it with 100 Continue, if the client waits for that."""
        connection, seconds = self.connection, self.config.io_timeout
        while True:
            try:
                if connection.receive():
                    self.invited = True
                    return
                raise Refusal(400, "the body was cut short")
            except WOULD_BLOCK:
                if not self.patient:
                    yield b""
                    continue
            except ConnectionError as error:
                raise Refusal(400, f"the body was cut short: {reason_of(error)}") from None
            if not self.invited and not self.exchange.head_sent:
                self.invited = True
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", seconds)
            try:
                connection.wait(select.POLLIN, seconds)
            except TimeoutError as error:
                raise Refusal(408, f"the body: {error.strerror}") from None


@functools.lru_cache(maxsize=512)
def field_name(name):
    """A response header's name -> lower-case, and whether it is hop-by-hop. ValueError: it is no token."""
    if not re.fullmatch(TOKEN, name):
        raise ValueError(f"{name!r} is no header name")
    return name.lower(), wsgiref.util.is_hop_by_hop(name)


@functools.lru_cache(maxsize=2)
def http_date(second):
    """-> the Date field, made once a second."""
    return b"\r\nDate: " + email.utils.formatdate(second, usegmt=True).encode()


class FileWrapper(wsgiref.util.FileWrapper):
    """wsgi.file_wrapper: sent with sendfile where it is a real file, else read in larger pieces."""

    def __init__(self, filelike, blksize=PIECE):
        super().__init__(filelike, blksize)

    def plain(self):
        """-> (descriptor, offset, end), or None where only reading tells what it gives. (A GzipFile has
        a descriptor as well: of what it would decompress.)"""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(getattr(self.filelike, "raw", self.filelike), io.FileIO):
                fd, offset = self.filelike.fileno(), self.filelike.tell()
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return fd, offset, max(offset, os.fstat(fd).st_size)
        return None


class Exchange(socketserver.BaseRequestHandler):
    """One request and its response, in a thread. What socketserver calls the request is the connection,
    and the server is the worker. Afterwards connection.keep says whether it may go on."""
    status = None                       # of the response, as the application gave it
    announced: Optional[int] = None     # its Content-Length
    left: Optional[int] = None          # bytes that it still allows
    sent = 0                            # bytes of body
    head_sent = chunked = bodyless = False
    single = False                      # the body is one piece: its length is the whole
    body: Any = None                    # a Body, where it did not come with the head

    def handle(self):
        connection, config = self.request, self.server.config
        request, environ = connection.request, connection.request.environ
        self.keep = request.keep and config.keepalive_timeout > 0
        if request.length == 0 or connection.body:
            environ["wsgi.input"] = io.BytesIO(connection.body)
        else:
            self.body = Body(self)
            environ["wsgi.input"] = io.BufferedReader(self.body, PIECE)
        try:
            self.respond(self.server.application(environ, self.start_response))
        except Refusal as refusal:      # wsgi.input raised it, and the application let it through
            self.fail(refusal)
        except ClientGone as error:
            self.keep = False
            log.debug("%s: %s: client gone: %s", connection.client, escaped(connection.line), error)
        except BaseException:           # sys.exit() in a request is the application's error, too
            log.exception("%s: %s", connection.client, escaped(connection.line))
            self.fail(Refusal(500, "the application failed"))
        whole = self.body is None or self.body.ended
        connection.keep, connection.more = self.keep and whole, request.keep or not whole
        if config.access_log != "off":
            log_access(connection, (self.status or "-")[:3], self.sent, environ)

    def respond(self, result):
        try:
            if isinstance(result, FileWrapper) and not self.head_sent and self.send_file(result):
                return
            self.single = not self.head_sent and isinstance(result, (list, tuple)) and len(result) == 1
            for data in result:
                if data:
                    self.write(data)
            if not self.head_sent:
                self.send(self.head(0))
            if self.chunked:
                self.send(b"0\r\n\r\n")
            elif self.left:
                self.keep = False
                log.error("%s: %d bytes less than the application's Content-Length",
                          escaped(self.request.line), self.left)
        finally:
            if hasattr(result, "close"):
                result.close()

    def start_response(self, status, headers, exc_info=None):
        """PEP 3333. Raises what is wrong with its arguments, at the application."""
        if exc_info:
            try:
                if self.head_sent:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        elif self.status is not None:
            raise AssertionError("start_response was called twice, without exc_info")
        if not STATUS.fullmatch(status):
            raise ValueError(f"{status!r} is no status")
        lines = [f"HTTP/1.1 {status}" if len(status) > 3 else f"HTTP/1.1 {status} "]
        self.announced, self.given = None, set()
        for name, value in headers:
            lower, hop_by_hop = field_name(name)
            if lower == "content-length":
                if not LENGTH.fullmatch(value) or self.announced not in (None, int(value)):
                    raise ValueError(f"invalid Content-Length {value!r}")
                self.announced = int(value)
            elif lower == "connection":
                self.keep = self.keep and not re.search(r"\bclose\b", value, re.IGNORECASE)
            elif not hop_by_hop:
                lines.append(f"{name}: {value}")
                self.given |= {lower}
        # CR and LF are in the joints and nowhere else, or a value could add a header, or a response.
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
            raise ValueError(f"CR, LF or NUL in a response header: {headers!r}")
        self.status, self.lines = status, head.encode("latin-1")
        return self.write

    def head(self, length):
        """-> the head's bytes, having decided how the body is framed (RFC 9112 section 6.3).
        length: of the whole body in bytes, or None if that is not known."""
        if self.status is None:
            raise AssertionError("start_response was not called")
        request, head = self.request.request, self.lines
        no_length = self.status[0] == "1" or self.status[:3] == "204"
        self.bodyless = no_length or request.environ["REQUEST_METHOD"] == "HEAD" or self.status[:3] == "304"
        if self.announced is None and not self.bodyless:
            self.announced = length
        if self.announced is not None and not no_length:
            head += b"\r\nContent-Length: %d" % self.announced
        self.left = 0 if self.bodyless else self.announced
        if self.left is None and request.http11:
            self.chunked = True
            head += b"\r\nTransfer-Encoding: chunked"
        if self.left is None and not self.chunked or self.status[0] == "1" or self.body and not self.body.arrived():
            self.keep = False
        if self.keep and self.server.draining:
            # Who has asked again already is answered; the last answer says close.
            self.keep = self.request.has_more()
        self.head_sent = True
        head += b"" if "date" in self.given else http_date(int(time.time()))
        head += b"" if "server" in self.given else b"\r\nServer: hupserve"
        if not self.keep:
            return head + b"\r\nConnection: close\r\n\r\n"
        return head + (b"\r\n\r\n" if request.http11 else b"\r\nConnection: keep-alive\r\n\r\n")

    def write(self, data):
        """Send a piece of the body, the head before the first (PEP 3333's write callable, too). What is
        more than the announced length never reaches the wire: it would pose as the next response."""
        if not isinstance(data, bytes):
            raise TypeError(f"the application gave {type(data).__name__}, not bytes")
        head = b"" if self.head_sent else self.head(len(data) if self.single else None)
        if self.left is not None:
            data = data[:self.left]
            self.left -= len(data)
        self.sent += len(data)
        if self.chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if head and len(data) <= PIECE:
            self.send(head + data)
        else:
            for piece in filter(None, (head, data)):
                self.send(piece)

    def send(self, data):
        self.request.send(data, self.server.config.io_timeout)

    def send_file(self, wrapper):
        """The file, or as much as Content-Length allows, by sendfile -> False: not possible."""
        plain = hasattr(os, "sendfile") and not self.request.tls and wrapper.plain()
        if not plain:
            return False
        fd, offset, end = plain
        self.send(self.head(end - offset))

        def step():
            nonlocal offset
            count = os.sendfile(self.request.sock.fileno(), fd, offset, min(self.left, end - offset))
            self.left, self.sent, offset = self.left - count, self.sent + count, offset + count
            return not count or not self.left       # none: the file has shrunk
        if self.left:
            self.request.push(step, self.server.config.io_timeout)
        self.keep = self.keep and not self.left
        return True

    def fail(self, refusal):
        """Answer with a status of ours, if nothing is on the wire yet; the connection ends either way."""
        self.keep = False
        if not self.head_sent:
            self.head_sent, self.status = True, str(refusal.status.value)
            with contextlib.suppress(OSError):
                self.send(refusal.response(self.request.line))


def log_access(connection, status, sent, environ):
    """A line in the combined format, plus the seconds since the request was handed to a thread."""
    access_log.info('%s - - [%s] "%s" %s %d "%s" "%s" %.6f', connection.client,
                    time.strftime("%d/%b/%Y:%H:%M:%S %z"), escaped(connection.line), status, sent,
                    escaped(environ.get("HTTP_REFERER", "-")), escaped(environ.get("HTTP_USER_AGENT", "-")),
                    time.monotonic() - connection.since)


def escaped(text):
    return text.translate(ESCAPES)


# ---- The worker: its loop first, then orders, accept, read, dispatch, take back, close --------------


class Worker(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """A server whose socketserver "request" is a connection with a complete request on it.

    Its main thread alone registers, unregisters and closes sockets: were a thread to close one, the
    number could be another connection's before the selector hears of it. It alone writes the in-flight
    counter, too: one more when it hands a connection to a thread, one less when it gets it back, so that
    there is no moment in which a request is with nobody and not counted."""

    daemon_threads = True       # a request that hangs must not hold a worker that has to go

    def __init__(self, generation, number, slot, line, bell, application):
        super().__init__(None, Exchange)
        self.config, self.application = generation.config, application
        self.generation, self.number, self.slot, self.pid = generation, number, slot, os.getpid()
        self.line, self.bell = line, bell
        self.listeners = {listener: text for text, group in generation.listeners.items() for listener in group}
        self.bases = {listener: self.base(listener) for listener in self.listeners}
        self.selector = selectors.DefaultSelector()
        self.rooms: list = [{} for _ in State]  # the connections by State, the longest there first
        self.count = 0                          # of connections
        self.in_flight = self.served = 0        # of requests
        self.jobs: collections.deque = collections.deque()          # handed to the threads
        self.returned: collections.deque = collections.deque()      # handed back by them
        self.sleeping: list = []                # for each thread with nothing to do, what wakes it
        self.threads = 0                        # started so far
        self.asleep = False                     # the main thread is, or is about to be, in select
        self.serving = self.accepting = self.draining = self.starved = False
        self.patience = self.config.header_timeout          # seconds for a first byte, or a handshake
        self.keepalive = self.config.keepalive_timeout      # seconds between two requests
        self.accept_at = self.report_at = 0.0               # not before these times
        self.give_up_at = self.explain_at = FOREVER         # of a drain
        self.facts: dict = {}                               # last written to the scoreboard
        self.alarm = FOREVER                                # the earliest time at which something is due
        self.now = time.monotonic()
        self.selector.register(bell, selectors.EVENT_READ, (self.obey,))
        self.selector.register(line, selectors.EVENT_READ, (self.hear,))
        os.register_at_fork(after_in_child=self.disown)

    def run(self):
        """Until there is nothing left to drain. Each step does what is due, and only wait() waits."""
        while True:
            self.take_back()
            self.resume_accepting()
            self.dispatch()
            self.expire()
            self.report()
            if self.draining and (not self.count or self.now >= self.give_up_at):
                return
            for key, _ in self.wait():
                act, *subject = key.data
                act(*subject)

    def wait(self):
        """-> the selector's events. Sleeps until there is one, something is due or a thread rings.

        A thread appends to .returned and then looks at .asleep; here it is the other way round. So
        whichever comes first, either the thread rings or there is no sleep."""
        self.asleep = True
        seconds = 0 if self.returned else self.alarm - time.monotonic()
        if self.jobs:       # one thread was woken for all of them: should it be stuck in one, wake another
            seconds = min(seconds, 0.001)
        events = self.selector.select(None if seconds == FOREVER else max(0, seconds))
        self.asleep = False
        self.now = time.monotonic()
        return events

    def report(self):
        """Fill in this worker's slot of the scoreboard, at most ten times a second."""
        if self.now < self.report_at:
            self.alarm = min(self.alarm, self.report_at)
            return
        idle = len(self.rooms[State.NEW]) + len(self.rooms[State.IDLE])
        life = Life.DRAINING if self.draining else Life.SERVING if self.serving else Life.READY
        facts = describe(self.pid, self.number, self.generation.number, life, idle, self.count - idle - self.in_flight,
                         self.in_flight, self.served, [
                             {"client": connection.client, "request": without_query(connection.line),
                              "since": connection.since}
                             for connection in list(self.rooms[State.IN_FLIGHT])[:8] if self.draining])
        if facts != self.facts:
            scoreboard.write(self.slot, facts)
            self.facts, self.report_at = facts, self.now + 0.1

    # Orders

    def obey(self):
        for signum in self.bell.answer():
            self.hear()     # an order is written before its SIGHUP is sent: it is there by now
            if signum == signal.SIGHUP and not self.draining:
                log.warning("SIGHUP without an order from the master: serving on")
            elif signum in (signal.SIGTERM, signal.SIGQUIT) and not self.draining:
                log.info("signal %d: draining, to be replaced", signum)
                self.line.say("leaving")
                self.drain((), self.config.idle_grace)

    def hear(self):
        for word, *rest in self.line.hear():
            if word == "go":
                self.serving = True
            else:
                self.drain(*rest)
        if self.line.ended and self.line in self.selector.get_map():
            self.selector.unregister(self.line)
            log.error("the master is gone: draining")
            self.drain(self.generation.listeners.keys() - self.generation.borrowed, self.config.idle_grace)

    def drain(self, dropped, grace):
        """Accept no more, finish what has begun. dropped: the addresses that nobody takes over. Whoever is
        queued there has been let in by the kernel, and the close would reset him. grace: seconds for the
        idle; a second order can only shorten it."""
        if not self.draining:
            self.draining, self.explain_at = True, self.now + DRAIN_REPORT
            self.give_up_at = self.now + (self.config.drain_timeout or FOREVER)
        self.stop_accepting()
        self.patience, self.keepalive = min(self.patience, grace), grace
        for listener, text in self.listeners.items():
            if text in dropped:
                turn_away(listener)
                while self.admit(listener):
                    pass
            listener.close()
        self.listeners = {}
        for connection in (connection for room in self.rooms[:State.READING] for connection in room):
            connection.deadline = min(connection.deadline, self.now + grace)
        self.alarm = self.now       # deadlines have changed: look at them all

    # Accept

    def may_accept(self):
        """With no free thread the other workers get the newcomers; at the limit the longest idle goes."""
        return self.in_flight < self.config.threads and (
            self.count < self.config.connections or self.rooms[State.NEW] or self.rooms[State.IDLE])

    def accept(self, listener):
        """One client at a time: the other workers want some, too."""
        if not self.may_accept():
            self.stop_accepting()
        elif self.accepting:
            self.admit(listener)

    def resume_accepting(self):
        """As soon as a thread is free, and before a waiting request gets it: or the clients that are
        connected already could keep all threads to themselves."""
        if self.serving and not (self.accepting or self.draining) and self.now >= self.accept_at and self.may_accept():
            self.accepting = True
            for listener in self.listeners:
                self.selector.register(listener, selectors.EVENT_READ, (self.accept, listener))
            for listener in self.listeners:
                self.accept(listener)

    def stop_accepting(self):
        for listener in self.listeners if self.accepting else ():
            self.selector.unregister(listener)
        self.accepting = False

    def admit(self, listener):
        """Accept a client -> was there one?"""
        tls = self.config.tls
        try:
            sock, address = listener.accept()
            sock.setblocking(False)
            if tls:
                sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except WOULD_BLOCK:
            return False        # another worker was faster
        except OSError as error:
            # Out of descriptors or memory, and nobody idle to send away: a pause, not a spin.
            if error.errno in EXHAUSTED and not self.evict():
                if not self.starved:
                    log.error("cannot accept: %s; trying again every %g s", reason_of(error), PAUSE)
                self.starved, self.accept_at, self.alarm = True, self.now + PAUSE, self.now
                self.stop_accepting()
                return False
            return True         # that client is gone again
        self.starved = False
        host, port = address[:2] if isinstance(address, tuple) else ("", "")
        base = {**self.bases[listener], "REMOTE_ADDR": host, "REMOTE_PORT": str(port)}
        connection = Connection(sock, host or "unix:", base, tls)
        if self.count >= self.config.connections and not self.draining:
            self.evict()
        self.count += 1
        self.move(connection, State.HANDSHAKE if tls else State.NEW, self.patience)
        self.read(connection)   # often its request is there already, and there is no need to register it
        return True

    def base(self, listener):
        """-> the part of the environ that is the same for all requests of a listener."""
        name, tls = listener.getsockname(), self.config.tls
        host, port = name[:2] if isinstance(name, tuple) else ("localhost", 443 if tls else 80)
        return {"SERVER_NAME": host, "SERVER_PORT": str(port), "SERVER_SOFTWARE": f"hupserve/{__version__}",
                "SCRIPT_NAME": "", "GATEWAY_INTERFACE": "CGI/1.1", "wsgi.version": (1, 0),
                "wsgi.url_scheme": "https" if tls else "http", "wsgi.errors": ErrorsToLog(),
                "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False,
                "wsgi.file_wrapper": FileWrapper,
                "hupserve.generation": self.generation.number, "hupserve.worker": self.number}

    # Where a connection is

    def move(self, connection, state, seconds=FOREVER):
        """To a state, which it has to leave within so many seconds. In one state all are given the same
        time, so that the first in a room is the first that is due."""
        self.rooms[connection.state].pop(connection, None)
        self.rooms[state][connection] = None
        connection.state, connection.since, connection.deadline = state, self.now, self.now + seconds
        if connection.deadline < self.alarm:
            self.alarm = connection.deadline

    def park(self, connection):
        """Kept alive: idle until its next byte."""
        self.move(connection, State.IDLE, self.keepalive)
        self.watch(connection)

    def watch(self, connection):
        if not connection.registered:
            connection.registered = True
            self.selector.register(connection.sock, selectors.EVENT_READ, (self.readable, connection))

    def unwatch(self, connection):
        if connection.registered:
            connection.registered = False
            self.selector.unregister(connection.sock)

    # Read

    def readable(self, connection):
        if not connection.registered:
            return      # closed on account of an earlier event of the same round
        if connection.state < State.WAITING:
            self.read(connection)
        elif connection.state == State.CLOSING:
            self.discard(connection)
        else:           # It speaks early. In flight it stays registered, since most clients await their
            self.unwatch(connection)        # answer: that saves two system calls a request.

    def read(self, connection):
        try:
            if connection.state == State.HANDSHAKE:
                connection.sock.do_handshake()
                self.move(connection, State.NEW, self.patience)
            if connection.receive():
                self.advance(connection)
            elif connection.state >= State.READING:
                self.refuse(connection, Refusal(400, "the request was cut short"))
            else:
                self.close(connection)
        except WOULD_BLOCK:
            self.watch(connection)
        except OSError as error:
            log.debug("%s: %s", connection.client, reason_of(error))
            self.close(connection)

    def advance(self, connection):
        """As far as what has arrived allows."""
        try:
            complete = connection.complete(self.config.max_body)
        except Refusal as refusal:
            return self.refuse(connection, refusal)
        if complete:
            return self.move(connection, State.WAITING)
        if connection.request:
            self.move(connection, State.RECEIVING, self.config.io_timeout)
        elif connection.buffer not in (b"", b"\r") and connection.state != State.READING:
            self.move(connection, State.READING, self.config.header_timeout)
        elif connection.state == State.IN_FLIGHT:       # an empty line after an answer is no request
            self.park(connection)
        self.watch(connection)

    def refuse(self, connection, refusal):
        log.debug("%s: %s: %s", connection.client, escaped(connection.line), refusal.reason)
        response = refusal.response(connection.line)
        with contextlib.suppress(OSError):      # a few hundred bytes into an empty buffer: no waiting
            connection.sock.send(response)
        if self.config.access_log != "off":
            log_access(connection, refusal.status.value, len(response), {})
        self.linger(connection)

    # Dispatch, and take back

    def dispatch(self):
        """Complete requests to free threads, first come, first served."""
        waiting = self.rooms[State.WAITING]
        while waiting and self.in_flight < self.config.threads:
            connection = next(iter(waiting))
            self.move(connection, State.IN_FLIGHT)
            self.in_flight += 1
            self.process_request(connection, connection.client)
        if self.jobs:
            self.wake_thread()

    def process_request(self, request, client_address):
        """ThreadingMixIn would start a thread for each, which costs more than most requests do."""
        request.keep, request.more = False, True
        self.jobs.append(request)

    def wake_thread(self):
        """One for all the jobs: threads that run Python take turns anyway, and every switch costs."""
        if self.sleeping:
            self.sleeping.pop().release()
        elif self.threads < self.config.threads:
            with contextlib.suppress(RuntimeError):     # no more to be had: those there are go on
                threading.Thread(target=self.work, daemon=True, name=f"request-{self.threads}").start()
                self.threads += 1

    def work(self):
        """In a thread: one job after another."""
        gate = threading.Lock()
        gate.acquire()
        while True:
            try:
                connection = self.jobs.popleft()
            except IndexError:
                self.sleeping.append(gate)
                gate.acquire()
            else:
                self.process_request_thread(connection, connection.client)

    def shutdown_request(self, request):
        """In a thread: the connection goes back. While there are jobs this thread goes on with the next,
        and the main thread hears of all at once."""
        self.returned.append(request)
        if self.asleep and not self.jobs:
            self.asleep = False
            self.bell.ring()

    def take_back(self):
        while self.returned:
            connection = self.returned.popleft()
            self.in_flight -= 1
            self.served += 1
            connection.request = None
            if not connection.keep:
                self.part(connection)
            elif connection.buffer:
                self.advance(connection)
            else:
                self.park(connection)

    # Close, and expire

    def part(self, connection):
        """After a last answer: at once, if the client wants to go as well and has sent nothing more."""
        try:
            if connection.buffer or connection.receive():
                return self.linger(connection)
        except WOULD_BLOCK:
            if connection.more:
                return self.linger(connection)
        except OSError:
            pass
        self.close(connection)

    def linger(self, connection):
        """Shut the sending side, and discard what still comes until the client ends, too: closing a socket
        with unread input sends a reset, which can overtake the answer (RFC 9112 section 9.6)."""
        connection.buffer = b""
        self.say_goodbye(connection)
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.close(connection)
        self.move(connection, State.CLOSING, LINGER)
        self.watch(connection)

    def discard(self, connection):
        """Once a round: a client that sends and sends must not keep this thread from its deadline."""
        try:
            if connection.sock.recv(PIECE):
                return
        except WOULD_BLOCK:
            return
        except OSError:
            pass
        self.close(connection)

    def close(self, connection):
        if connection.state != State.CLOSING:
            self.say_goodbye(connection)
        self.unwatch(connection)
        del self.rooms[connection.state][connection]
        self.count -= 1
        connection.sock.close()

    def say_goodbye(self, connection):
        """TLS: close_notify, without which what was sent could have been cut short by anybody."""
        if connection.tls:
            with contextlib.suppress(OSError, ValueError):
                connection.sock.unwrap()

    def retire(self, connection):
        """Close an idle connection -> was it idle? It is read once more just before: a request that has
        come by now is answered, and the moment in which one can be missed is one system call long."""
        try:
            if connection.receive():
                self.advance(connection)
        except OSError:
            pass
        if connection.state > State.IDLE:
            return False
        self.close(connection)
        return True

    def evict(self):
        """Close the connection that has been idle longest -> was there one?"""
        while True:
            idle = [next(iter(room)) for room in (self.rooms[State.NEW], self.rooms[State.IDLE]) if room]
            if not idle or self.retire(min(idle, key=operator.attrgetter("since"))):
                return bool(idle)

    def expire(self):
        """Whatever is due; and .alarm becomes the time when something will be."""
        if self.now < self.alarm:
            return
        if self.now >= self.explain_at:
            self.explain_at = self.now + DRAIN_REPORT
            self.explain()
        self.alarm = min(self.give_up_at, self.explain_at, FOREVER if self.now >= self.accept_at else self.accept_at)
        for room in self.rooms:
            while room:
                connection = next(iter(room))
                if connection.deadline > self.now:
                    self.alarm = min(self.alarm, connection.deadline)
                    break
                if connection.state in (State.NEW, State.IDLE):
                    self.retire(connection)
                elif connection.state in (State.READING, State.RECEIVING):
                    self.refuse(connection, Refusal(408, "the request took too long to arrive"))
                else:
                    self.close(connection)

    def explain(self):
        """What every operator asks: why is the old worker still there?"""
        oldest = next(iter(self.rooms[State.IN_FLIGHT]), None)
        log.info("still draining: %d in flight, %d other connections%s", self.in_flight, self.count - self.in_flight,
                 f"; the oldest: {oldest.client} {escaped(without_query(oldest.line))}"
                 f" for {self.now - oldest.since:.0f} s" if oldest else "")

    def disown(self):
        """In a child that the application forks: it must not hold clients' connections open, nor the
        listeners, nor answer to our signals."""
        for sock in (self.line.sock, self.selector, self.bell, *self.listeners,
                     *(connection.sock for room in self.rooms for connection in list(room))):
            sock.close()
        signal.set_wakeup_fd(-1)
        for signum in MASTER_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)


def without_query(line):
    """A request line -> its method and path. Queries hold secrets."""
    return re.split(r"[?]| HTTP/", line)[0]


def describe(*facts):
    """-> what a worker shows of itself on the scoreboard."""
    pid, worker, generation, life, idle, reading, in_flight, served, waits_for = facts
    return {"pid": pid, "worker": worker, "generation": generation, "state": life.name.lower(), "idle": idle,
            "reading": reading, "in_flight": in_flight, "served": served, "waits_for": waits_for}


class ErrorsToLog(io.TextIOBase):
    """wsgi.errors: what the application writes there becomes lines of the log."""

    def write(self, text):
        if text.strip():
            log.error("%s", text.rstrip())
        return len(text)

    def writelines(self, lines):
        self.write("".join(lines))


def run_worker(generation, number, slot, line):
    """A worker's life, in the worker -> exit status. Signals are still blocked when it begins."""
    bell = Bell()
    for signum in MASTER_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)   # while it loads, it dies of TERM at once
    bell.hang(LOADING_SIGNALS)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    scoreboard.write(slot, describe(os.getpid(), number, generation.number, Life.BOOTING, 0, 0, 0, 0, []))
    try:
        application = prepare(generation.config)
    except ConfigError as error:
        line.say("failed", 2, str(error))
        return 2
    except BaseException as error:      # an import may well call sys.exit()
        log.exception("the application does not load")
        line.say("failed", 1, f"the application does not load: {type(error).__name__}: {reason_of(error)[:500]}")
        return 1
    bell.hang(STOPS)
    worker = Worker(generation, number, slot, line, bell, application)
    line.say("ready")
    worker.run()
    if worker.in_flight:
        log.warning("drain_timeout: %d requests in flight are cut short", worker.in_flight)
    return 0


def prepare(config):
    """Logging, then the application -> the WSGI callable. Raises ConfigError, or whatever that raises."""
    use_logs(config, open_logs(config))
    if "loggers" in config.ini.bare:
        ours = log.handlers[:], access_log.handlers[:]
        try:
            logging.config.fileConfig(config.ini.parser, disable_existing_loggers=False)
        except Exception as error:
            raise ConfigError(f"{config.ini.path}: [loggers] {type(error).__name__}: {reason_of(error)}") from None
        for logger, handlers in zip((log, access_log), ours):
            logger.handlers = logger.handlers or handlers
    return load_application(config)


def leave(status):
    """Exit a worker. A thread that hangs would hold sys.exit() for ever; os._exit() alone would skip what
    is to be done at exit, and multiprocessing would leave orphans."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


# ---- The master: its loop first, then what comes from below, the reload, spawn, stop -----------------


class Child:
    """One of a generation's places for a worker and, from BOOTING on, the worker in it."""
    pid, slot = 0, 0
    line: Any = None
    born = 0.0              # in time.monotonic() seconds
    failure: Any = None     # (exit status, reason), once it has said "failed"

    def __init__(self, generation, number, deaths=0, fork_at=0.0):
        self.generation, self.number = generation, number
        self.deaths, self.fork_at = deaths, fork_at         # of those before it; when it may be forked
        self.life = Life.VACANT

    def vacate(self, now):
        """Put a successor in its place -> after how many seconds it is to be forked."""
        deaths = 0 if now - self.born > STEADY else self.deaths
        seconds = BACK_OFF[min(deaths, len(BACK_OFF) - 1)]
        self.generation.children[self.number] = Child(self.generation, self.number, deaths + 1, now + seconds)
        return seconds


class Generation:
    """The workers of one reading of the configuration, and what they listen on."""

    def __init__(self, number, config):
        self.number, self.config = number, config
        self.deadline = time.monotonic() + BIND_PATIENCE        # of its binding, then of its booting
        self.listeners: dict = {}           # {address text: [Listener]}
        self.fresh: set = set()             # texts that the generation before does not have
        self.borrowed: set = set()          # texts of which systemd has the socket, too
        self.pidfile: Any = None            # open and locked
        self.children = [Child(self, number) for number in range(config.workers)]


class Master:
    """Owns listeners and workers; sits in one selector all its life."""

    def __init__(self, config):
        self.target = config.target
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        # Under nohup, which ignores SIGHUP, the end of the terminal is no reason to stop.
        self.terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()
        self.adopted = adopt()
        self.bell = Bell()
        self.bell.hang(MASTER_SIGNALS)
        # Not epoll: its descriptor is shared over fork, and a child could unregister what is the master's.
        self.selector = selectors.PollSelector()
        self.selector.register(self.bell, selectors.EVENT_READ)
        self.children: dict = {}                    # {pid: Child}, of all generations
        self.current: Optional[Generation] = None   # the one that serves
        self.upcoming: Any = None                   # the Generation that a reload prepares
        self.phase, self.count = Phase.NONE, 0      # of the reload; of generations so far
        self.hup = False                            # a SIGHUP waits to be obeyed
        self.stops = 0                              # TERM, QUIT and INT so far
        self.fork_at = 0.0                          # not before this time: there was no more to give
        self.status = 0                             # to exit with

    def run(self, config):
        """-> exit status. Each step looks at what is and does what is due; only wait() waits."""
        self.begin(config)
        while True:
            self.now, self.alarm = time.monotonic(), FOREVER
            self.reap()
            self.obey()
            self.advance()
            self.replenish()
            if self.stops and not self.children:
                return self.status
            self.wait()

    def wait(self):
        seconds = None if self.alarm == FOREVER else max(0, self.alarm - time.monotonic())
        for key, _ in self.selector.select(seconds):
            if key.data:
                self.hear(key.data)

    def due(self, when):
        """Is it time? If not, the loop will come round then."""
        self.alarm = min(self.alarm, when if when > self.now else FOREVER)
        return when <= self.now

    # What comes from below, and from the operator

    def hear(self, child):
        for word, *rest in child.line.hear():
            if word == "ready":
                child.life = Life.READY
                if child.generation is self.current:        # a replacement: it need not wait for others
                    self.go(child)
            elif word == "failed":
                child.failure = rest
            elif word == "leaving" and child.life == Life.SERVING:
                child.life = Life.DRAINING
                child.vacate(self.now)
        if child.line.ended and child.line in self.selector.get_map():
            self.selector.unregister(child.line)

    def reap(self):
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid in self.children:        # if not, we are process 1, and it is somebody's orphan
                    self.bury(self.children.pop(pid), os.waitstatus_to_exitcode(status))

    def bury(self, child, code):
        self.hear(child)        # its last words
        if child.line in self.selector.get_map():
            self.selector.unregister(child.line)
        child.line.sock.close()
        scoreboard.write(child.slot, None)
        how = f"worker {child.number} (pid {child.pid}) " + (
            f"exited with status {code}" if code >= 0 else f"was killed by signal {-code}")
        status, reason = child.failure or (1, f"{how} before it was ready")
        if child.life == Life.DRAINING:
            log.log(logging.WARNING if code else logging.DEBUG, "%s, of generation %d", how, child.generation.number)
        elif child.generation is self.upcoming:
            self.roll_back(reason, status)
        else:
            seconds = child.vacate(self.now)
            log.error("%s%s; replaced %s", how, f": {reason}" * bool(child.failure),
                      f"in {seconds:g} s" if seconds else "now")

    def obey(self):
        for signum in self.bell.answer():
            if signum == signal.SIGHUP and self.terminal and not has_terminal():
                log.info("the terminal is gone")
                self.stop(signum)
            elif signum == signal.SIGHUP:
                self.hup = True
            elif signum in STOPS:
                self.stop(signum)

    # The reload: begin, bind, boot, commit or roll back

    def advance(self):
        """Move the reload on, as far as it goes. A SIGHUP that comes in its midst is remembered, once."""
        if self.phase == Phase.NONE and self.hup and not self.stops:
            self.hup = False
            self.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
            try:
                self.begin(read_config(self.target))
            except ConfigError as error:
                log.error("reload refused: %s", error)
                self.notify("READY=1", f"STATUS=reload refused: {error}")
        if self.phase == Phase.BINDING:
            self.bind()
        if self.phase == Phase.BOOTING:
            if all(child.life == Life.READY for child in self.upcoming.children):
                self.commit()
            elif self.due(self.upcoming.deadline):
                self.roll_back(f"not every worker was ready within {self.upcoming.config.boot_timeout:g} s"
                               " (boot_timeout)")

    def begin(self, config):
        for warning in config.warnings:
            log.warning("%s", warning)
        self.count += 1
        self.upcoming, self.phase = Generation(self.count, config), Phase.BINDING

    def bind(self):
        """Keep the sockets of the addresses that stay, bind the new ones, claim the pidfile."""
        new, config = self.upcoming, self.upcoming.config
        try:
            for address in config.listen:
                key, text = "listen", address.text
                self.bind_address(new, address)
            key, text = "pidfile", config.pidfile
            if text and not (self.current and self.current.config.pidfile == text):
                new.pidfile = claim_pidfile(text)
        except OSError as error:
            # An address may come back before an old worker has let go of it.
            if error.errno == errno.EADDRINUSE and not self.due(min(new.deadline, self.now + 0.05)):
                return
            return self.roll_back(str(config.ini.wrong("server:main", key, f"{text}: {reason_of(error)}")))
        new.deadline, self.phase = self.now + config.boot_timeout, Phase.BOOTING

    def bind_address(self, new, address):
        text, old = address.text, self.current
        if old and text in old.listeners:       # its very socket, with the clients that are queued on it
            new.listeners[text] = old.listeners[text]
            new.borrowed |= old.borrowed & {text}
        elif text not in new.listeners:
            for other in old.config.listen if old else ():
                if overlap(address, other):
                    raise OSError(errno.EEXIST, f"overlaps {other.text}, which is being served")
            new.listeners[text] = open_listener(address, self.adopted)
            new.fresh.add(text)
            if self.adopted.keys() & set(address.binds):
                new.borrowed.add(text)

    def commit(self):
        """Every new worker is ready, and none has accepted anything. What can fail comes first."""
        new, old = self.upcoming, self.current
        try:
            for text in sorted(new.listeners, key=lambda text: text not in new.fresh):
                for listener in new.listeners[text]:
                    listener.listen(new.config.backlog)
            logs = open_logs(new.config)
        except OSError as error:
            return self.roll_back(f"{new.config.ini.path}: {text}: {reason_of(error)}")
        self.current, self.upcoming, self.phase = new, None, Phase.NONE
        use_logs(new.config, logs)
        for child in new.children:
            self.go(child)
        if old:
            self.retire(old, new)
        else:
            self.announce(new)
        log.info("generation %d serves with %d workers", new.number, new.config.workers)
        self.notify("READY=1", f"STATUS=generation {new.number} serves with {new.config.workers} workers")

    def go(self, child):
        child.line.say("go")
        child.life = Life.SERVING

    def retire(self, old, new):
        """Close what is gone, then tell the old workers, who are the last to have it."""
        dropped = old.listeners.keys() - new.listeners.keys()
        for text in dropped:
            close_listeners(old.listeners[text])
        if old.config.pidfile == new.config.pidfile:
            new.pidfile = old.pidfile
        else:
            release_pidfile(old.pidfile)
        for child in self.children.values():
            if child.generation is not new:
                self.order_drain(child, dropped - old.borrowed, child.generation.config.idle_grace)

    def order_drain(self, child, dropped, grace):
        """The order on the line, with what a signal cannot say, before the signal. Who drains already is
        not told again; who has never served is simply ended."""
        if child.life == Life.SERVING:
            child.line.say("drain", sorted(dropped), grace)
            os.kill(child.pid, signal.SIGHUP)
        elif child.life in (Life.BOOTING, Life.READY):
            os.kill(child.pid, signal.SIGKILL if child.life == Life.BOOTING else signal.SIGTERM)
        child.life = Life.DRAINING

    def roll_back(self, reason, status=1):
        """Nothing has changed: the old generation has never stopped serving."""
        self.abandon()
        if self.current:
            log.error("reload rolled back: %s", reason)
            self.notify("READY=1", f"STATUS=reload rolled back: {reason}")
        else:
            self.stops, self.status = 1, complain(reason, status)

    def abandon(self):
        """The upcoming generation goes: its workers, its new listeners, its pidfile."""
        new, self.upcoming, self.phase = self.upcoming, None, Phase.NONE
        for child in self.children.values():
            if child.generation is new:
                self.order_drain(child, (), 0)
        for text in new.fresh:
            close_listeners(new.listeners[text])
        release_pidfile(new.pidfile)

    def announce(self, generation):
        config, urls = generation.config, []
        for text, (listener, *_) in generation.listeners.items():
            port = f"{text.rpartition(':')[0]}:{listener.getsockname()[1]}"
            urls.append(text if listener.family == socket.AF_UNIX else f"http{'s' * bool(config.tls)}://{port}")
        print(f"hupserve {__version__}: serving {self.target} on {' '.join(urls)} with {config.workers} "
              f"worker{'s' * (config.workers > 1)}; to reload it: kill -HUP {os.getpid()}", file=sys.stderr, flush=True)

    # Spawn

    def replenish(self):
        """Fill the places that are vacant, and end a replacement that never becomes ready."""
        for child in [] if self.stops or not self.current else self.current.children:
            if child.life == Life.BOOTING and self.due(child.born + self.current.config.boot_timeout):
                log.error("worker %d (pid %d) was not ready within boot_timeout", child.number, child.pid)
                os.kill(child.pid, signal.SIGKILL)
        for generation in (self.current, self.upcoming if self.phase == Phase.BOOTING else None):
            for child in generation.children if generation and not self.stops else ():
                if child.life == Life.VACANT and self.due(max(child.fork_at, self.fork_at)):
                    self.spawn(child)

    def spawn(self, child):
        taken = {other.slot for other in self.children.values()}
        child.slot = next((slot for slot in range(Scoreboard.SLOTS) if slot not in taken), Scoreboard.SLOTS - 1)
        try:
            child.line, theirs = map(Line, socket.socketpair())
            with signals_blocked():
                child.pid = os.fork()
                if not child.pid:
                    self.become_worker(child, theirs)       # does not return
        except OSError as error:
            if not self.fork_at:
                log.error("cannot start a worker: %s; trying again every %g s", reason_of(error), PAUSE)
            self.fork_at = self.now + PAUSE
            self.due(self.fork_at)
            return
        theirs.sock.close()
        self.fork_at, child.born, child.life = 0.0, self.now, Life.BOOTING
        self.children[child.pid] = child
        self.selector.register(child.line, selectors.EVENT_READ, child)

    def become_worker(self, child, line):
        """In the worker: close what is the master's and other generations', and run. Never returns."""
        status, generation = 1, child.generation
        try:
            self.bell.close()
            for other in (*self.children.values(), child):
                other.line.sock.close()
            for other in filter(None, (self.current, self.upcoming)):
                for text in other.listeners:
                    if generation.listeners.get(text) is not other.listeners[text]:
                        for listener in other.listeners[text]:
                            listener.close()
                if other.pidfile:
                    other.pidfile.close()
            for listener in self.adopted.values():
                listener.close()
            status = run_worker(generation, child.number, child.slot, line)
        except BaseException:
            log.exception("worker %d failed", child.number)
        finally:
            leave(status)

    # Stop

    def stop(self, signum):
        """Gracefully; the second time at once."""
        self.stops += 1
        if self.stops > 1:
            log.warning("stopped by force")
            self.status = self.status or 1
            for pid in self.children:
                os.kill(pid, signal.SIGKILL)
            return
        log.info("stopping, when every request that has begun is answered")
        self.notify("STOPPING=1")
        if self.upcoming:
            self.abandon()
        listeners = self.current.listeners if self.current else {}
        for group in listeners.values():
            close_listeners(group)
        for child in self.children.values():
            grace = 0 if signum == signal.SIGINT else child.generation.config.idle_grace
            if child.life == Life.DRAINING:
                child.line.say("drain", [], grace)
            self.order_drain(child, listeners.keys() - self.current.borrowed if self.current else (), grace)

    def finish(self):
        if self.current:
            release_pidfile(self.current.pidfile)
        log.info("stopped")

    def notify(self, *lines):
        """sd_notify(3): one datagram."""
        if self.notify_socket:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), re.sub("^@", "\0", self.notify_socket))


@contextlib.contextmanager
def signals_blocked():
    """Around a fork: the child must not run the master's handlers, and no signal may be lost between the
    fork and the child's own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def claim_pidfile(path):
    """-> the new file, open and locked: the lock, unlike the number in it, ends with its master. Raises
    OSError while another master holds it."""
    with contextlib.suppress(FileNotFoundError), open(path) as other:
        try:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EEXIST, f"master {other.read().strip()} is alive") from None
    file = open(f"{path}.{os.getpid()}", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    print(os.getpid(), file=file, flush=True)
    os.rename(file.name, path)          # whole, or not there
    return file


def release_pidfile(file):
    if file:
        path = file.name[:-len(f".{os.getpid()}")]
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                os.unlink(path)
        file.close()


def has_terminal():
    try:
        os.close(os.open(os.ctermid(), os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


# ---- Demo and status: the two applications that ship with it -----------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hupserve</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: auto; padding: 1rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3em .6em; border-bottom: 1px solid #8886; vertical-align: top }
td { white-space: pre-line }
.draining { opacity: .7 }
button { font: inherit }
</style>
<h1 id="greeting">GREETING</h1>
<p>Answered by <span id="who">WHO</span>. <button hidden>Hold a request in flight for 20 s</button></p>
<table><thead><tr></tr></thead><tbody></tbody></table>
<script>
const one = selector => document.querySelector(selector)
const columns = ["generation", "worker", "pid", "state", "idle", "in flight", "served", "waits for"]
for (const column of columns) one("thead tr").append(Object.assign(document.createElement("th"), {textContent: column}))
async function look() {
  try {
    const now = await (await fetch("?format=json", {cache: "no-store"})).json()
    one("#greeting").textContent = now.greeting || "hupserve"
    one("#who").textContent = now.answered_by
    one("button").hidden = !now.greeting
    one("tbody").replaceChildren(...now.workers.map(worker => {
      const row = Object.assign(document.createElement("tr"), {className: worker.state})
      worker.waits_for = worker.waits_for.map(w => `${w.client} ${w.request} ${w.age.toFixed()} s`).join("\\n")
      for (const column of columns) row.insertCell().textContent = worker[column.replace(" ", "_")]
      return row
    }))
  } catch (error) { one("#who").textContent = "nobody: " + error.message }
  setTimeout(look, 500)
}
one("button").onclick = () => fetch("slow?seconds=20")
look()
</script></html>
"""


def status_filter(global_conf, path="/status"):
    """paste.filter_factory: at path, a page that shows all workers of all generations, live; and the same
    as JSON to whom asks for it (Accept: application/json, or ?format=json)."""
    def with_status(application):
        return lambda environ, start_response: (
            status if environ.get("PATH_INFO") == path else application)(environ, start_response)
    return with_status


def status(environ, start_response, greeting=""):
    worker, generation = environ.get("hupserve.worker"), environ.get("hupserve.generation")
    who = f"worker {worker} (pid {os.getpid()}) of generation {generation}"
    if "format=json" in environ.get("QUERY_STRING", "") or "application/json" in environ.get("HTTP_ACCEPT", ""):
        kind, text = "application/json", json.dumps({
            "greeting": greeting, "answered_by": who, "pid": os.getpid(), "generation": generation, "worker": worker,
            "workers": scoreboard.read() if scoreboard else []})
    else:
        kind = "text/html; charset=utf-8"
        text = PAGE.replace("GREETING", html.escape(greeting or "hupserve")).replace("WHO", who)
    return answer(start_response, "200 OK", text, kind)


def answer(start_response, status, text, kind="text/plain; charset=utf-8"):
    body = text.encode()
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
    return [body]


def demo_app(global_conf, greeting="hello"):
    """paste.app_factory: the status page with a greeting, and /slow?seconds=N to hold a request in flight."""
    def demo(environ, start_response):
        if environ.get("PATH_INFO") == "/":
            return status(environ, start_response, greeting)
        seconds = re.fullmatch("(?:.*&)?seconds=([0-9]{1,4})(?:&.*)?", environ.get("QUERY_STRING") or "seconds=20")
        if environ.get("PATH_INFO") != "/slow" or not seconds:
            return answer(start_response, "404 Not Found", "Try / or /slow?seconds=20\n")
        time.sleep(int(seconds[1]))
        return answer(start_response, "200 OK", f"{greeting}, after {seconds[1]} s, still from pid {os.getpid()} "
                                                f"of generation {environ.get('hupserve.generation')}\n")
    return demo


# ---- Main --------------------------------------------------------------------------------------------


def serve(config):
    """Run the master until it is stopped -> exit status: 0 after a clean stop; 1, or 2 for a mistake of the
    operator's, if it could not start; 1 if it was stopped by force."""
    global scoreboard
    while os.open(os.devnull, os.O_RDWR) < 3:       # a closed stderr's number must not become a socket's
        pass
    scoreboard = Scoreboard()
    try:
        use_logs(config, open_logs(config))
        master = Master(config)
    except OSError as error:
        return complain(reason_of(error), 1)
    try:
        return master.run(config)
    finally:
        master.finish()


def check(config):
    """Load all of it in a child and bind nothing, like nginx -t -> exit status 0 or 2."""
    pid = os.fork()
    if not pid:
        signal.setitimer(signal.ITIMER_REAL, config.boot_timeout)
        try:
            prepare(config)
            leave(0)
        except ConfigError as error:
            leave(complain(error, 2))
        except BaseException as error:
            log.exception("the application does not load")
            leave(complain(f"{config.target}: the application does not load: {type(error).__name__}: "
                           f"{reason_of(error)}", 2))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGALRM:
        complain(f"{config.target}: the application did not load within {config.boot_timeout:g} s (boot_timeout)", 2)
    if code == 0:
        print(f"{config.target}: good")
    return 2 if code else 0


def complain(reason, status):
    print(f"hupserve: {reason}", file=sys.stderr, flush=True)
    return status


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="hupserve", description="A WSGI server whose SIGHUP reload loses nothing.")
    parser.add_argument("config", metavar="CONFIG", help="an ini file, or file#name for [app:name]")
    parser.add_argument("--check", action="store_true", help="validate it, application included, and exit")
    parser.add_argument("--version", action="version", version=f"hupserve {__version__}")
    arguments = parser.parse_args(argv)
    sys.stderr = sys.stderr or open(os.devnull, "w")            # it may be closed
    sys.modules.setdefault("hupserve", sys.modules[__name__])   # or hupserve:demo_app were a second copy
    try:
        config = read_config(arguments.config)
    except ConfigError as error:
        return complain(error, 2)
    return check(config) if arguments.check else serve(config)


if __name__ == "__main__":
    sys.exit(main())
