#!/usr/bin/env python3
"""hupserve: a WSGI server that takes up a new configuration and loses no request doing so.

    python hupserve.py example.ini          serve
    kill -HUP <pid of the master>           reload: new workers, new code, new settings

What it promises: between its first answer and its stop no client is refused or reset, and no request
that has begun to arrive is left without an answer, whatever is reloaded, and also when the new
configuration turns out to be wrong.
What it leaves to others: HTTP/2, websockets, async applications, privileges, static files at scale.

Who is who

    operator --signals--> MASTER    owns the listeners, starts and counts the workers. Runs no
                          |    ^    application code and no thread, so that it can fork for years.
                    fork, |    |
       go, drain (line)   v    |    ready, leaving, failed (line)
                        WORKER      its main thread owns every connection that is not in flight:
                          |    ^    it accepts, reads heads, waits, expires, closes.
             a connection |    |    the same connection, answered
                          v    |
                        THREADS     run the application: one request, one response.

A generation is the set of workers started from one reading of the configuration.

A reload

    operator  SIGHUP ->
    master             read, bind, fork ......... every worker is ready: commit
    old workers        serve on ...............................|drain: finish what has begun, leave
    new workers                     load the application, ready|serve
                                            a failure up to here, and nothing has changed

Signals      to the master                       to a worker
    HUP      reload                              drain, if the master ordered it; else one log line
    TERM     stop when all requests are done     drain, leave and be replaced
    QUIT     as TERM                             as TERM
    INT      as TERM; idle connections: no grace nothing, the master speaks for it
    USR1     nothing, logs follow by themselves  nothing
A second TERM, QUIT or INT stops the master at once.

The sections: words, configuration, listeners, the bell, the exchange, the worker, the master,
demo and status, main.
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
import traceback
import urllib.parse
import wsgiref.util
from typing import Any, NamedTuple, Optional

__version__ = "1.0.0"
__all__ = ["main", "serve", "read_config", "ConfigError", "demo_app", "status_filter"]

log = logging.getLogger("hupserve")
access_log = logging.getLogger("hupserve.access")


# ----------------------------------------------------------------------------------------------------
# Words: the states, each listed once, with who moves what on which event
# ----------------------------------------------------------------------------------------------------

class State(enum.IntEnum):
    """Where a connection is. Only the worker's main thread moves one (Worker.move)."""

    HANDSHAKE = 0   # TLS is being agreed on                             -> NEW
    NEW = 1         # no byte of a first request has arrived             -> READING
    IDLE = 2        # kept alive, no byte of a next request has arrived  -> READING
    READING = 3     # a head has begun to arrive                         -> RECEIVING, WAITING
    RECEIVING = 4   # its short, announced body has begun to arrive      -> WAITING
    WAITING = 5     # complete, and no thread is free                    -> IN_FLIGHT
    IN_FLIGHT = 6   # with a thread                                      -> IDLE, READING, CLOSING
    CLOSING = 7     # our side is shut down, input is being discarded    -> closed


class Life(enum.IntEnum):
    """Where a worker is, as the master sees it. Only Master moves one, on what it hears."""

    BOOTING = 0     # forked, loads the application   -> READY (it says "ready")
    READY = 1       # loaded, accepts nothing         -> SERVING (the master says "go")
    SERVING = 2     # accepts                         -> DRAINING (an order, or it says "leaving")
    DRAINING = 3    # finishes what it has begun      -> gone; nobody replaces it


class Phase(enum.IntEnum):
    """Where a reload is. The start is a reload from nothing. Only Master.advance moves it."""

    NONE = 0        # no reload is going on           -> BINDING (SIGHUP, and the file is valid)
    BINDING = 1     # the new addresses are bound     -> BOOTING, or rolled back
    BOOTING = 2     # the new generation is loading   -> committed, or rolled back


STOPS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
MASTER_SIGNALS = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
WORKER_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)     # TERM and QUIT: once it has loaded
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE = 0.5             # seconds without accept or fork when the system has no more to give
LINGER = 2.0            # seconds of input to discard on a connection that is closing
BIND_PATIENCE = 1.0     # seconds to wait for an old worker to let go of an address that comes back
LONG_DRAIN = 30.0       # seconds between two reports of what a draining worker waits for
BACK_OFF = (0, 0.2, 0.4, 0.8, 1.6, 3.2, 5)      # seconds before a worker that died is replaced
STEADY = 10.0           # seconds of life that start the back-off again
FOREVER = float("inf")


# ----------------------------------------------------------------------------------------------------
# Configuration: text in, one immutable object out
# ----------------------------------------------------------------------------------------------------

class ConfigError(Exception):
    """The operator's mistake, in one line: file, section, key and reason."""


class Address(NamedTuple):
    text: str       # as configured; what tells two listeners apart
    binds: tuple    # (family, socket address) pairs: *:port has two


def addresses(text):
    """'127.0.0.1:80 unix:/x' -> a tuple of Address. Numeric: the master never waits for a name server."""
    found: list = []
    for word in text.split():
        address = Address(word, binds_of(word))
        rival = next((other.text for other in found if overlap(address, other)), None)
        if rival:
            raise ValueError(f"{word} overlaps {rival}")
        found.append(address)
    if not found:
        raise ValueError("no address")
    return tuple(found)


def binds_of(word):
    kind, _, path = word.partition("unix:")
    if not kind and path:
        if len(os.fsencode(path)) > 107:
            raise ValueError(f"{word}: the path of a unix socket has 107 bytes at most")
        return ((socket.AF_UNIX, path),)
    host, _, port = word.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{word}: not host:port, [::1]:port, *:port or unix:/path")
    if host == "*":
        return ((socket.AF_INET, ("0.0.0.0", int(port))), (socket.AF_INET6, ("::", int(port), 0, 0)))
    bare = host[1:-1] if host[0] + host[-1] == "[]" else host
    try:
        (family, *_, name), *_ = socket.getaddrinfo(
            "127.0.0.1" if bare == "localhost" else bare, int(port),
            type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        raise ValueError(f"{word}: the host is neither numeric nor localhost") from None
    if (family == socket.AF_INET6) != (bare != host):
        raise ValueError(f"{word}: brackets belong around an IPv6 address, and nowhere else")
    return ((family, name),)


def overlap(one, other):
    """Could the two not listen at the same time? (IPv6 listeners are IPv6 only.)"""
    for family, name in one.binds:
        for family2, name2 in other.binds:
            if family != family2 or (family != socket.AF_UNIX and not name[1]):
                continue
            if name == name2 or family != socket.AF_UNIX and name[1] == name2[1] and (
                    {name[0], name2[0]} & {"0.0.0.0", "::"}):
                return True
    return one.text == other.text


def number(kind, low, high):
    """A reader of whole numbers (int) or of seconds (float) from low to high."""
    def read(text):
        if not re.fullmatch(r"[0-9]{1,15}" if kind is int else r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        if not low <= kind(text) <= high:
            raise ValueError(f"{text} is not between {low} and {high}")
        return kind(text)
    return read


def choice(*words):
    def read(text):
        if text.lower() not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}{did_you_mean(text, words)}")
        return text.lower()
    return read


def log_path(text):
    """'off', '-' or a file, which is opened once here so that a commit cannot fail for it."""
    if text not in ("off", "-"):
        with open(text, "a"):
            pass
    return text


def did_you_mean(word, words):
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


SECONDS = number(float, 0, 1e9)
SOME_SECONDS = number(float, 0.001, 1e9)
KEYS = {    # of [server:main]: the default, and what reads the text (a ValueError is the reason)
    "listen": ("127.0.0.1:8000", addresses),
    "workers": ("2", number(int, 1, 1000)),
    "threads": ("16", number(int, 1, 10_000)),              # requests in flight per worker
    "connections": ("1000", number(int, 1, 1_000_000)),     # open connections per worker
    "backlog": ("2048", number(int, 1, 1_000_000)),
    "keepalive_timeout": ("75", SECONDS),
    "header_timeout": ("10", SOME_SECONDS),
    "io_timeout": ("60", SOME_SECONDS),
    "idle_grace": ("5", SECONDS),
    "drain_timeout": ("0", SECONDS),                        # 0: no limit
    "boot_timeout": ("60", SOME_SECONDS),
    "max_body": ("0", number(int, 0, 10**15)),              # bytes, 0: no limit
    "certfile": ("", str),
    "keyfile": ("", str),
    "pidfile": ("", str),
    "access_log": ("off", log_path),
    "log_file": ("-", log_path),
    "log_level": ("info", choice("debug", "info", "warning", "error", "critical")),
}


class Part(NamedTuple):
    """One section of the application: where its callable is, and the settings it is given."""

    where: str          # "example.ini: [app:main] wsgi", to begin a complaint with
    kind: str           # wsgi, paste.app_factory or paste.filter_factory
    target: str         # module:attribute
    settings: dict


class Config(collections.namedtuple("Config", [*KEYS, "target", "path", "name", "warnings", "parser",
                                               "global_conf", "parts", "tls"])):
    """One reading of a configuration file: every key of KEYS, and

    target: the file as the command line names it (path, or path#name); path, name: its two halves
    warnings: lines for the log;  parser: the file as configparser read it, for logging.config
    global_conf: [DEFAULT] with here and __file__;  tls: an ssl.SSLContext, or None for plain HTTP
    parts: the application's Parts, outermost filter first; None: PasteDeploy is to read the file
    """


def read_config(target):
    """Read and validate 'file.ini' or 'file.ini#name' -> Config. Raises ConfigError."""
    path, _, name = target.partition("#")
    parser, bare = parse_ini(path)

    def own(section):
        """The section's own keys, without those of [DEFAULT] (which are global_conf), as a dict."""
        try:
            return {key: parser.get(section, key) for key in bare.options(section)}
        except configparser.Error as error:
            raise ConfigError(f"{path}: [{section}] {' '.join(str(error).split())}") from None

    global_conf = {key: parser.get("DEFAULT", key) for key in parser.defaults()}
    server = own("server:main") if "server:main" in bare else {}
    for section in difflib.get_close_matches("server:main", bare.sections(), 1, 0.8):
        if "server:main" not in bare:
            raise ConfigError(f"{path}: [{section}] unknown section; did you mean [server:main]?")
    warnings, values = [], {key: read(text) for key, (text, read) in KEYS.items() if key not in server}
    for key, text in server.items():
        try:
            if key in KEYS:
                values[key] = KEYS[key][1](text)
            elif "use" not in server:
                raise ValueError(f"unknown key{did_you_mean(key, KEYS)}")
            elif key != "use":
                warnings.append(f"{path}: [server:main] {key}: unknown key, left to {server['use']}")
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path}: [server:main] {key}: {reason_of(error)}") from None
    if values["log_file"] == "off":
        raise ConfigError(f"{path}: [server:main] log_file: cannot be off; log_level says how much is logged")
    return Config(**values, target=target, path=path, name=name or "main", warnings=warnings, parser=parser,
                  global_conf=global_conf, parts=read_parts(path, name or "main", bare, own),
                  tls=tls_context(path, values["certfile"], values["keyfile"]))


def parse_ini(path):
    """-> the file as configparser reads it, and once more without [DEFAULT]'s inheritance."""
    folder = os.path.dirname(os.path.abspath(path))
    parser = configparser.ConfigParser({"here": folder.replace("%", "%%"),
                                        "__file__": os.path.abspath(path).replace("%", "%%")})
    bare = configparser.RawConfigParser(default_section="")
    parser.optionxform = bare.optionxform = str         # type: ignore[method-assign, assignment]
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        parser.read_string(text, path)
        bare.read_string(text, path)
        for key in parser.defaults():
            parser.get("DEFAULT", key)
    except (OSError, ValueError, configparser.Error) as error:
        raise ConfigError(f"{path}: {reason_of(error)}") from None
    return parser, bare


def reason_of(error):
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())


def read_parts(path, name, bare, own):
    """[app:NAME] or [pipeline:NAME] -> a tuple of Part; None where it is for PasteDeploy to read."""
    if f"pipeline:{name}" not in bare:
        parts = [read_part(path, "app", name, bare, own)]
    elif f"app:{name}" in bare:
        raise ConfigError(f"{path}: [pipeline:{name}] and [app:{name}] are both there: which is meant?")
    else:
        pipeline = own(f"pipeline:{name}")
        names = pipeline.pop("pipeline", "").split()
        if not names:
            raise ConfigError(f"{path}: [pipeline:{name}] pipeline: names no application")
        if pipeline or any(":" in part for part in names):
            return None
        parts = [read_part(path, "filter", part, bare, own) for part in names[:-1]]
        parts.append(read_part(path, "app", names[-1], bare, own))
    return tuple(parts) if all(parts) else None


def read_part(path, prefix, name, bare, own):
    """The section [prefix:name] -> a Part; None where only PasteDeploy knows what it means."""
    section = f"{prefix}:{name}"
    if section not in bare:
        kinds = ("composite", "composit", "application", "filter-app", "pipeline")
        if prefix == "app" and any(f"{kind}:{name}" in bare for kind in kinds):
            return None
        raise ConfigError(f"{path}: [{section}] missing section{did_you_mean(section, bare.sections())}")
    settings = own(section)
    kind = next((key for key in ("wsgi", f"paste.{prefix}_factory") if key in settings), None)
    if any(re.match(r"use$|filter-with$|[sg]et |paste\.(?!%s_factory$)" % prefix, key) for key in settings):
        return None
    if not kind or (kind == "wsgi" and prefix == "filter"):
        raise ConfigError(f"{path}: [{section}] paste.{prefix}_factory: missing key"
                          + (", and so is wsgi" if prefix == "app" else "")
                          + did_you_mean(f"paste.{prefix}_factory", settings))
    target, where = settings.pop(kind), f"{path}: [{section}] {kind}"
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ConfigError(f"{where}: {target!r} is not module:attribute")
    if kind == "wsgi" and settings:
        raise ConfigError(f"{path}: [{section}] {next(iter(settings))}: a setting, and wsgi = takes none; "
                          "paste.app_factory does")
    return Part(where, kind, target, settings)


def tls_context(path, certfile, keyfile):
    """-> ssl.SSLContext, made by the master: it may read a key that its successors cannot. Or None."""
    if not certfile:
        if keyfile:
            raise ConfigError(f"{path}: [server:main] keyfile: needs a certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile or None, lambda: b"")     # never ask on the terminal
    except (OSError, ValueError) as error:
        where = f"{certfile}{keyfile and ', ' + keyfile}"
        raise ConfigError(f"{path}: [server:main] certfile: {where}: {reason_of(error)}") from None
    return context


def load_application(config):
    """In a worker: import, build and return the WSGI callable. Raises ConfigError for what the
    operator wrote wrongly and, as they are, the application's own errors."""
    importlib.invalidate_caches()   # the code may have changed in the second the master started in
    sys.path.insert(0, os.getcwd())
    if config.parts is None:
        return load_with_paste(config)
    application: Any = None
    for part in reversed(config.parts):
        found = resolve(part)
        if part.kind == "wsgi":
            application = found
            continue
        try:
            inspect.signature(found).bind(config.global_conf, **part.settings)
        except TypeError as error:
            raise ConfigError(f"{part.where}: {part.target}: {reason_of(error)}") from None
        except ValueError:
            pass    # a callable that has no signature to look at
        made = found(config.global_conf, **part.settings)
        application = made(application) if part.kind == "paste.filter_factory" else made
    if not callable(application):
        raise ConfigError(f"{config.parts[0].where}: {application!r} is not callable")
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
        raise ConfigError(f"{part.where}: module {module} has no {attribute}"
                          f"{did_you_mean(attribute, dir(found))}") from None


def load_with_paste(config):
    """What hupserve does not read itself: use = egg:…, config:, composites, filter-with, set."""
    try:
        from paste.deploy import loadapp
    except ImportError:
        raise ConfigError(f"{config.path}: [app:{config.name}] needs PasteDeploy, which is not installed "
                          "(use =, composites and the like are its)") from None
    try:
        return loadapp("config:" + urllib.parse.quote(os.path.abspath(config.path)), config.name)
    except LookupError as error:        # PasteDeploy's word for a section or an entry point it misses
        if type(error) is not LookupError:
            raise
        raise ConfigError(f"{config.path}: {reason_of(error)}") from None


class LogFile(logging.handlers.WatchedFileHandler):
    """Follows rotation. A full disk costs log lines, never requests: one line on stderr says so."""

    complained = False

    def handleError(self, record):
        if not self.complained:
            self.complained = True
            with contextlib.suppress(Exception):
                print(f"hupserve: {self.baseFilename}: {reason_of(sys.exc_info()[1])}", file=sys.stderr)


class Terminal(logging.StreamHandler):
    """Stderr, which may be closed by now: nothing to say about that, and nobody to say it to."""

    def handleError(self, record):
        pass


def open_logs(config):
    """-> the handlers of the log and of the access log (None: off). Raises OSError."""
    handlers: list = []
    for path, form in ((config.log_file, "%(asctime)s [%(process)d] %(levelname)s %(message)s"),
                       (config.access_log, "%(message)s")):
        handler = None if path == "off" else Terminal(sys.stderr) if path == "-" else LogFile(path)
        if handler:
            handler.setFormatter(logging.Formatter(form))
        handlers.append(handler)
    return handlers


def use_logs(config, handlers):
    for logger, handler in zip((log, access_log), handlers):
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        logger.propagate = False
        if handler:
            logger.addHandler(handler)
    log.setLevel(config.log_level.upper())
    access_log.setLevel(logging.INFO if handlers[1] else logging.CRITICAL)


# What a client sent must not forge a line or steer a terminal.
ESCAPES = {code: f"\\x{code:02x}" for code in range(256) if not 32 <= code < 127 or code in b'"\\'}


# ----------------------------------------------------------------------------------------------------
# Listeners: bind, adopt, let go
# ----------------------------------------------------------------------------------------------------

class Listener(socket.socket):
    """A bound socket, and for a unix socket that is ours the path and the identity of its file."""

    file: Optional[tuple] = None


def open_listener(address, adopted):
    """-> the Listeners of an Address: bound and not yet listening, or adopted from systemd.

    Bound only: until the commit nobody can be queued on them, so a roll-back resets nobody.
    Raises OSError."""
    sockets: list = []
    try:
        for family, name in address.binds:
            given = adopted.get((family, name if family == socket.AF_UNIX else name[:2]))
            if given:
                sockets.append(given.dup())
            elif is_dual(adopted.get((socket.AF_INET6, ("::", name[1])))) and address.text[0] == "*":
                continue        # systemd's [::]:port serves both families
            elif not sockets:
                sockets.append(bind(family, name))
            elif socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") or sys.platform != "linux":
                sockets.append(bind(family, ("::", sockets[0].getsockname()[1], 0, 0)))     # of *:port
    except BaseException:
        for sock in sockets:
            close_listener([sock])
        raise
    return sockets


def close_listener(sockets):
    """In the master. The file of a unix socket goes first, so that nobody connects any more."""
    for sock in sockets:
        if sock.file:
            path, info = sock.file
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), info):
                    os.unlink(path)
        sock.close()


def bind(family, name):
    sock = Listener(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            remove_stale(name)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # accepted ones inherit it
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        if family == socket.AF_UNIX:
            sock.file = name, os.stat(name)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_stale(path):
    """A socket file nobody listens on is a dead server's. A live one's, or another file, is refused."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "exists and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(path)
        raise OSError(errno.EADDRINUSE, "another server listens there")
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        os.unlink(path)


def is_dual(sock):
    return sock and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def adopt():
    """systemd's sockets (sd_listen_fds(3)) -> {(family, address): socket}; the variables are unset."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    adopted = {}
    for fd in range(3, 3 + int(count)) if pid == str(os.getpid()) and count.isdigit() else ():
        try:
            sock = Listener(fileno=fd)
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS: descriptor {fd} is no socket: {reason_of(error)}") from None
        sock.set_inheritable(False)
        sock.setblocking(False)
        name = sock.getsockname()
        adopted[sock.family, name if sock.family == socket.AF_UNIX else name[:2]] = sock
    return adopted


def turn_away(sock):
    """Let a listener that is about to be closed take no new connection; its queue stays.

    Between the last accept() that finds the queue empty and the close() one more client could be
    queued, and the close would reset it. A socket filter that drops everything has the kernel ignore
    its SYN instead: it asks again, and is then refused, or served by whoever listens by then."""
    if sys.platform == "linux" and sock.family != socket.AF_UNIX:
        drop_all = array.array("B", struct.pack("@HBBI", 0x06, 0, 0, 0))    # BPF: RET 0
        so_attach_filter = 26
        sock.setsockopt(socket.SOL_SOCKET, so_attach_filter,
                        struct.pack("@HP", 1, drop_all.buffer_info()[0]))


def url_of(address, sock, tls):
    if sock.family == socket.AF_UNIX:
        return address.text
    return f"http{'s' if tls else ''}://{address.text.rpartition(':')[0]}:{sock.getsockname()[1]}"


# ----------------------------------------------------------------------------------------------------
# The bell: what wakes a main loop, and how the two loops talk
# ----------------------------------------------------------------------------------------------------

class Bell:
    """A pipe that wakes a selector, rung by signals and by threads; which signals came is a list.

    The byte only wakes: a pipe full of HUPs would drop the byte of a TERM, but never its flag."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.rung: list = []
        # An inherited wake-up descriptor would be the master's: the child's signals would ring there.
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)

    def hang(self, signals):
        for signum in signals:
            signal.signal(signum, lambda signum, frame: self.rung.append(signum))

    def ring(self):
        with contextlib.suppress(OSError):      # full: it will wake anyway
            os.write(self.writer, b"!")

    def answer(self):
        """-> the signals that came, in order. Drains the pipe first: a later signal writes anew."""
        with contextlib.suppress(OSError):
            while len(os.read(self.reader, 4096)) == 4096:
                pass
        rung, self.rung = self.rung, []
        return rung

    def fileno(self):
        return self.reader


class Line:
    """One end of the socketpair between the master and one worker: a JSON object per line of text.

    It carries what a signal cannot, and its end tells either side that the other is gone."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.pending, self.ended = sock, b"", False

    def say(self, word, **rest):
        with contextlib.suppress(OSError):      # the other side is gone: hear() tells
            self.sock.sendall(json.dumps({"word": word, **rest}).encode() + b"\n")

    def hear(self):
        """-> the messages that have come, as dicts; then .ended says whether it was the last."""
        try:
            while not self.ended:
                data = self.sock.recv(65536)
                self.pending += data
                self.ended = not data
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, self.pending = self.pending.split(b"\n")
        return [json.loads(line) for line in lines]

    def fileno(self):
        return self.sock.fileno()


@contextlib.contextmanager
def signals_blocked():
    """Around a fork: the child must not run the master's handlers, and no signal may get lost
    between the fork and the child's own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Scoreboard:
    """What every worker of every generation does, in shared memory: one slot a worker, written by
    that worker alone, readable in all of them.

    A slot is eight aligned native integers, which are copied whole, and a JSON text, which a reader
    may catch half-written and then does without."""

    SLOTS, SIZE = 1024, 1024
    FIELDS = ("pid", "worker", "generation", "state", "idle", "reading", "in_flight", "served")
    NUMBERS = struct.Struct("@8q")
    LENGTH = struct.Struct("@q")

    def __init__(self):
        self.memory = mmap.mmap(-1, self.SLOTS * self.SIZE)

    def write(self, slot, *numbers):
        self.NUMBERS.pack_into(self.memory, slot * self.SIZE, *numbers)

    def write_waits(self, slot, waits):
        start, text = slot * self.SIZE + 64, json.dumps(waits).encode()
        room = self.SIZE - 64 - self.LENGTH.size
        while len(text) > room:
            waits = waits[:-1]
            text = json.dumps(waits).encode()
        self.LENGTH.pack_into(self.memory, start, len(text))
        self.memory[start + 8:start + 8 + len(text)] = text

    def read(self):
        """-> one dict a worker, oldest generation first."""
        found = []
        for start in range(0, self.SLOTS * self.SIZE, self.SIZE):
            numbers = self.NUMBERS.unpack_from(self.memory, start)
            if numbers[0]:
                worker = dict(zip(self.FIELDS, numbers), waits_for=[])
                worker["state"] = Life(numbers[3]).name.lower()
                (length,) = self.LENGTH.unpack_from(self.memory, start + 64)
                with contextlib.suppress(ValueError):
                    worker["waits_for"] = json.loads(self.memory[start + 72:start + 72 + length] or "[]")
                found.append(worker)
        now = time.monotonic()
        for wait in (wait for worker in found for wait in worker["waits_for"]):
            wait["age"] = round(now - wait.pop("since"), 1)
        return sorted(found, key=operator.itemgetter("generation", "worker"))


scoreboard: Optional[Scoreboard] = None     # the master's, inherited by its workers


# ----------------------------------------------------------------------------------------------------
# The exchange: one request, one response (RFC 9110 and 9112, PEP 3333)
# ----------------------------------------------------------------------------------------------------

MAX_LINE = 8192             # bytes of a request line (414)
MAX_HEAD = 65536            # bytes of a head, and of a trailer section (431)
MAX_FIELDS = 100            # of a head (431)
MAX_CHUNK_LINE = 1024       # bytes of a chunk's size and its extensions
SMALL_BODY = 65536          # bytes: an announced body of at most this is read before a thread is taken
SKIPPABLE = 262144          # bytes of an unread body that are skipped to keep the connection
PIECE = 65536               # bytes read at once

REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]{0,5})?")
ABSOLUTE = re.compile(r"https?://([^/?#]+)(.*)", re.IGNORECASE)
DOUBTFUL = re.compile(rb"\0|(?<!\r)\n|\r(?=[^\n])")         # in a head: NUL, bare LF, bare CR
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?")
STATUS = re.compile(r"[1-9][0-9]{2}(?: [\t -~\x80-\xff]*)?")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Refusal(OSError):
    """A request that cannot be served: an HTTP status and a reason. The connection closes after it.

    An OSError, because raised from wsgi.input that is what applications expect."""

    def __init__(self, status, reason):
        super().__init__(errno.EBADMSG, reason)
        self.status, self.reason = http.HTTPStatus(status), reason


class ClientGone(ConnectionError):
    """The client went away, or took nothing for io_timeout seconds, in mid-response."""


class Fields(NamedTuple):
    """What the field lines of a head say, whatever its request line."""

    environ: dict               # HTTP_*, CONTENT_TYPE, CONTENT_LENGTH
    length: Optional[int]       # of the body, in bytes, where it is announced
    coding: str                 # Transfer-Encoding, lower-case
    options: frozenset          # Connection's, lower-case (RFC 9110 section 7.6.1)
    expect: str                 # lower-case


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
        name, value = match[1].upper(), match[2].strip(" \t")
        if "_" in name:
            continue        # X_Y and X-Y are one in the environ: one could pose as the other
        key = "HTTP_" + name.replace("-", "_")
        if key not in environ:
            environ[key] = value
        elif key == "HTTP_HOST" or key == "HTTP_CONTENT_LENGTH" and environ[key] != value:
            raise Refusal(400, f"two {match[1]} fields")
        elif key != "HTTP_CONTENT_LENGTH":
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    if not AUTHORITY.fullmatch(environ.get("HTTP_HOST", "")):
        raise Refusal(400, "invalid Host")
    for name in ("CONTENT_LENGTH", "CONTENT_TYPE"):
        if f"HTTP_{name}" in environ:
            environ[name] = environ.pop(f"HTTP_{name}")
    length = environ.get("CONTENT_LENGTH")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise Refusal(400, "invalid Content-Length")
    if length is not None and "HTTP_TRANSFER_ENCODING" in environ:
        raise Refusal(400, "both Content-Length and Transfer-Encoding")
    return Fields(environ, None if length is None else int(length),
                  environ.get("HTTP_TRANSFER_ENCODING", "none").lower(),
                  frozenset(option.strip().lower() for option in environ.get("HTTP_CONNECTION", "").split(",")),
                  environ.get("HTTP_EXPECT", "").lower())


class Request(NamedTuple):
    environ: dict
    length: Optional[int]   # of the body, in bytes; None: chunked
    expect: bool            # the client waits for 100 Continue
    keep: bool              # the client would keep the connection
    http11: bool            # it understands chunked


def parse_line(line):
    """A request line, as str -> (method, target, minor version). Raises Refusal."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refusal(400 if major == "0" else 505, f"HTTP/{major}.{minor} is not spoken here")
    if method == "CONNECT":
        raise Refusal(501, "this is no proxy")
    if "#" in target or not (target[0] == "/" or ABSOLUTE.match(target)
                             or (target == "*" and method == "OPTIONS")):
        raise Refusal(400, "malformed request target")
    return method, target, minor


def parse_head(head, base, max_body):
    """A complete head, as bytes without its empty line -> Request, with an environ that starts from
    base (RFC 9112 sections 3 and 6, PEP 3333). Raises Refusal."""
    line, _, block = head.partition(b"\r\n")
    method, target, minor = parse_line(line.decode("latin-1"))
    fields = parse_fields(block)
    environ = {**base, **fields.environ}
    http11 = minor != "0"
    if http11 and "HTTP_HOST" not in environ:
        raise Refusal(400, "no Host")
    if target[0] != "/" and target != "*":
        authority, target = ABSOLUTE.match(target).groups()     # type: ignore[union-attr]
        if not AUTHORITY.fullmatch(authority) or authority[0] == ":":
            raise Refusal(400, "malformed request target")
        environ["HTTP_HOST"] = authority
        target = target if target[:1] == "/" else "/" + target
    path, _, environ["QUERY_STRING"] = target.partition("?")
    if "%" in path:
        path = urllib.parse.unquote_to_bytes(path).decode("latin-1")
    environ["REQUEST_METHOD"] = method
    environ["PATH_INFO"] = path if path != "*" else ""
    environ["REQUEST_URI"] = target
    environ["SERVER_PROTOCOL"] = "HTTP/1.1" if http11 else "HTTP/1.0"
    length: Optional[int] = fields.length or 0
    if fields.coding != "none":
        if not http11:
            raise Refusal(400, "Transfer-Encoding in HTTP/1.0")
        if fields.coding != "chunked":
            codings = {coding.strip() for coding in fields.coding.split(",")}
            raise Refusal(400 if codings <= {"chunked", ""} else 501, "unknown transfer coding")
        length = None
        environ["wsgi.input_terminated"] = True     # what Flask asks for before it reads one
    elif max_body and length > max_body:            # type: ignore[operator]
        raise Refusal(413, f"more than {max_body} bytes")
    expect = http11 and fields.expect != ""
    if expect and fields.expect != "100-continue":
        raise Refusal(417, "unknown expectation")
    keep = "close" not in fields.options and (http11 or "keep-alive" in fields.options)
    return Request(environ, length, expect, keep, http11)


class Connection:
    """A client's connection: its socket, what has arrived and is not used yet, and where it stands.

    While it is in flight one thread reads and writes it; at any other time the main thread does."""

    __slots__ = ("sock", "client", "base", "tls", "state", "since", "deadline", "registered",
                 "buffer", "scanned", "request", "body", "line", "keep", "early")

    def __init__(self, sock, client, base, tls):
        self.sock = sock
        self.client = client            # the client's address, as text
        self.base = base                # the environ that its requests start from
        self.tls = tls
        self.state = State.NEW
        self.since = 0.0                # when it came to this state, in time.monotonic() seconds
        self.deadline = FOREVER         # when it must have left it
        self.registered = False         # with the selector
        self.buffer = b""
        self.scanned = 0                # bytes of the buffer in which no end of head was found
        self.request: Any = None        # a Request whose head is complete
        self.body = b""                 # its body, where it was short enough to be read beforehand
        self.line = ""                  # its request line
        self.keep = False               # what the exchange decided
        self.early = True               # closed, it may still be sent something

    def receive(self):
        """One read into the buffer, without waiting -> False at the input's end. Raises OSError,
        one of WOULD_BLOCK included."""
        data = self.sock.recv(PIECE)
        # A selector does not see what TLS has decrypted already.
        while self.tls and self.sock.pending():
            data += self.sock.recv(PIECE)
        self.buffer = self.buffer + data if self.buffer else data
        return bool(data)

    def complete(self, max_body):
        """Is the request at the buffer's beginning there, with its body if that is short?
        Then .request and .body are it. Raises Refusal as soon as there is a doubt."""
        if self.request is None:
            while self.buffer.startswith(b"\r\n"):      # RFC 9112 section 2.2
                self.buffer = self.buffer[2:]
            end = self.buffer.find(b"\r\n\r\n", max(0, self.scanned - 3))
            if end < 0 or end > MAX_HEAD:
                return self.refuse_early()
            head, self.buffer, self.scanned = self.buffer[:end + 2], self.buffer[end + 4:], 0
            line_end = head.find(b"\r\n")
            self.line = head[:line_end].decode("latin-1")
            if line_end > MAX_LINE:
                raise Refusal(414, f"a request line of more than {MAX_LINE} bytes")
            self.request = parse_head(head, self.base, max_body)
            self.body = b""
        length = self.request.length
        if length == 0 or length is None or length > SMALL_BODY or self.request.expect:
            return True
        if len(self.buffer) < length:
            return False
        self.body, self.buffer = self.buffer[:length], self.buffer[length:]
        return True

    def refuse_early(self):
        """The head is not complete. Raises Refusal if it can never be right, else returns False."""
        line_end = self.buffer.find(b"\r\n")
        self.line = self.buffer[:max(line_end, 0) or 80].decode("latin-1")
        if line_end > MAX_LINE or line_end < 0 and len(self.buffer) > MAX_LINE:
            raise Refusal(414, f"a request line of more than {MAX_LINE} bytes")
        if DOUBTFUL.search(self.buffer, max(0, self.scanned - 1)):
            raise Refusal(400, "NUL, bare CR or bare LF")
        if line_end >= 0:
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

    def send(self, data, seconds):
        """All of it; seconds is how long it may take to get any further. Raises ClientGone."""
        view = data
        while True:
            try:
                sent = self.sock.send(view)
                if sent == len(view):
                    return
                view = memoryview(view)[sent:]
            except WOULD_BLOCK:
                pass
            except OSError as error:
                raise ClientGone(reason_of(error)) from None
            self.wait_to_send(seconds)

    def wait_to_send(self, seconds):
        try:
            self.wait(select.POLLOUT, seconds)
        except OSError as error:
            raise ClientGone(reason_of(error)) from None

    def has_more(self):
        """Has a byte of a next request arrived?"""
        with contextlib.suppress(OSError):
            return bool(self.buffer) or self.receive()
        return bool(self.buffer)


class Body(io.RawIOBase):
    """A request body as it comes off the connection, for wsgi.input (RFC 9112 sections 6 and 7.1).

    Wrapped in a BufferedReader, which knows how to read, readline and iterate. Reads up to its end
    and never beyond; raises Refusal where the body is malformed, too long, cut short or late."""

    def __init__(self, exchange):
        self.exchange, self.connection = exchange, exchange.request
        self.config = exchange.server.config
        self.length = self.connection.request.length
        self.chunked = self.length is None
        self.left = self.length or 0    # bytes that the body, or its chunk, still has
        self.expected = "size"          # what the next line is, where it is chunked
        self.trailers = b""
        self.total = 0                  # bytes seen, for max_body
        self.expect = self.connection.request.expect
        self.begun = self.ended = False
        self.patient = True             # may it wait for input?
        self.stash = b""                # decoded, and not yet read by the application

    def readable(self):
        return True

    def readinto(self, target):
        if not self.stash:
            self.stash = self.piece()
        count = min(len(target), len(self.stash))
        target[:count] = self.stash[:count]
        self.stash = self.stash[count:]
        return count

    def arrived(self):
        """Has all of it arrived? What has, up to SKIPPABLE bytes, is kept for the application."""
        self.patient = False
        pieces = [self.stash]
        try:
            while not self.ended and sum(map(len, pieces)) <= SKIPPABLE:
                pieces.append(self.piece())
        except OSError:
            pass
        self.patient, self.stash = True, b"".join(pieces)
        return self.ended

    def piece(self):
        """-> the next bytes of the body, b'' at its end. Each step is taken whole or, where input has
        to be waited for and must not be, not at all."""
        while not self.ended:
            if self.left:
                data = self.take(self.left)
                self.left -= len(data)
                if self.left == 0:
                    self.ended, self.expected = not self.chunked, "end of chunk"
                return data
            self.next_line(self.take_line())
        return b""

    def next_line(self, line):
        """A line between the data of two chunks, or after the last one."""
        if self.expected == "end of chunk":
            if line:
                raise Refusal(400, "a chunk longer than its size")
            self.expected = "size"
        elif self.expected == "size":
            match = CHUNK_LINE.fullmatch(line)
            if not match or len(line) > MAX_CHUNK_LINE:
                raise Refusal(400, "malformed chunk size")
            self.left = int(match[1], 16)
            self.total += self.left
            if self.config.max_body and self.total > self.config.max_body:
                raise Refusal(413, f"more than {self.config.max_body} bytes")
            self.expected = "trailers" if self.left == 0 else "data"
        elif line:
            self.trailers += line + b"\r\n"
            if len(self.trailers) > MAX_HEAD:
                raise Refusal(431, f"trailers of more than {MAX_HEAD} bytes")
        else:
            parse_fields(self.trailers)     # they must be well-formed, and are not used
            self.ended = True

    def take(self, most):
        if not self.connection.buffer:
            self.fill()
        data, self.connection.buffer = self.connection.buffer[:most], self.connection.buffer[most:]
        return data

    def take_line(self):
        """-> a line, without its CRLF."""
        while True:
            line, found, rest = self.connection.buffer.partition(b"\n")
            if len(line) > MAX_HEAD or found and line[-1:] != b"\r":
                raise Refusal(400, "malformed chunk")
            if found:
                self.connection.buffer = rest
                return line[:-1]
            self.fill()

    def fill(self):
        """Receive something; wait for it, and invite it with 100 Continue, if that is allowed."""
        connection, seconds = self.connection, self.config.io_timeout
        while True:
            try:
                if not connection.receive():
                    raise Refusal(400, "the body was cut short")
                self.begun = True
                return
            except WOULD_BLOCK:
                if not self.patient:
                    raise
            except ConnectionError as error:
                raise Refusal(400, f"the body was cut short: {reason_of(error)}") from None
            if self.expect and not self.begun and not self.exchange.head_sent:
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", seconds)
            self.begun = True
            try:
                connection.wait(select.POLLIN, seconds)
            except TimeoutError as error:
                raise Refusal(408, f"the body: {error.strerror}") from None


@functools.lru_cache(maxsize=512)
def field_name(name):
    """A response header's name -> lower-case, and whether it is hop-by-hop. ValueError: no token."""
    if not TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is no header name")
    return name.lower(), wsgiref.util.is_hop_by_hop(name)


@functools.lru_cache(maxsize=2)
def http_date(second):
    """-> the Date field of that second, made once."""
    return b"\r\nDate: " + email.utils.formatdate(second, usegmt=True).encode()


class FileWrapper(wsgiref.util.FileWrapper):
    """wsgi.file_wrapper: sent with sendfile where it is a real file, else read in larger pieces."""

    def __init__(self, filelike, blksize=PIECE):
        super().__init__(filelike, blksize)

    def plain_file(self):
        """-> (descriptor, offset, bytes left), or None where only reading tells what it gives.
        (A GzipFile has a descriptor too, of what it would decompress.)"""
        if isinstance(getattr(self.filelike, "raw", self.filelike), io.FileIO):
            with contextlib.suppress(OSError, ValueError):
                info, offset = os.fstat(self.filelike.fileno()), self.filelike.tell()
                if stat.S_ISREG(info.st_mode):
                    return self.filelike.fileno(), offset, max(0, info.st_size - offset)
        return None


class Exchange(socketserver.BaseRequestHandler):
    """One request and its response, in a thread. What socketserver calls the request is the
    connection; .server is the worker. On return connection.keep says how it goes on."""

    def handle(self):
        connection, worker = self.request, self.server
        request = connection.request
        environ = request.environ
        self.status = None              # of the response, as the application gave it
        self.announced: Optional[int] = None    # its Content-Length
        self.head_sent = False
        self.left: Optional[int] = None     # bytes the announced Content-Length still allows
        self.sent = 0                   # bytes of body
        self.chunked = self.bodyless = False
        self.single = False             # the body is one piece
        self.keep = request.keep and worker.config.keepalive_timeout > 0
        self.body = None                # a Body, where it did not come with the head
        if request.length == 0 or connection.body:
            environ["wsgi.input"] = io.BytesIO(connection.body)
        else:
            self.body = Body(self)
            environ["wsgi.input"] = io.BufferedReader(self.body, PIECE)
        try:
            self.respond(environ)
        except Refusal as refusal:      # wsgi.input raised it, and the application let it through
            self.fail(refusal)
        except ClientGone as error:
            self.keep = False
            log.debug("%s: %s: client gone: %s", connection.client, escaped(connection.line), error)
        except BaseException:           # sys.exit() in a request is the application's error as well
            log.exception("%s: %s", connection.client, escaped(connection.line))
            self.fail(Refusal(500, "the application failed"))
        whole = self.body is None or self.body.ended
        connection.keep, connection.early = self.keep and whole, request.keep or not whole
        if worker.config.access_log != "off":
            self.log_access()

    def respond(self, environ):
        result = self.server.application(environ, self.start_response)
        try:
            if isinstance(result, FileWrapper) and not self.head_sent and self.send_file(result):
                return
            self.single = not self.head_sent and isinstance(result, (list, tuple)) and len(result) == 1
            for data in result:
                if data:
                    self.write(data)
            if not self.head_sent:
                self.connection_send(self.head(0))
            if self.chunked:
                self.connection_send(b"0\r\n\r\n")
            elif self.left:
                log.error("%s: the application gave %d bytes less than its Content-Length",
                          escaped(self.request.line), self.left)
                self.keep = False
        finally:
            if hasattr(result, "close"):
                result.close()

    def start_response(self, status, headers, exc_info=None):
        """PEP 3333. Raises what is wrong with the arguments at the application."""
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
            self.given.add(lower)
            if lower == "content-length":
                if not re.fullmatch("[0-9]{1,18}", value) or self.announced not in (None, int(value)):
                    raise ValueError(f"invalid Content-Length {value!r}")
                self.announced = int(value)
            elif not hop_by_hop:
                lines.append(f"{name}: {value}")
            elif lower == "connection" and re.search(r"\bclose\b", value, re.IGNORECASE):
                self.keep = False
        # CR and LF are in the joints and nowhere else, or a value could add a header, or a response.
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
            raise ValueError(f"CR, LF or NUL in a response header: {headers!r}")
        self.status, self.lines = status, head.encode("latin-1")
        return self.write

    def head(self, length):
        """-> the head, as bytes, and decide how the body is framed (RFC 9112 section 6.3).
        length: of the whole body in bytes, or None if it is not known."""
        if self.status is None:
            raise AssertionError("start_response was not called")
        request, code = self.request.request, self.status[:3]
        interim = code[0] == "1"
        self.bodyless = request.environ["REQUEST_METHOD"] == "HEAD" or code in ("204", "304") or interim
        if self.announced is None and not self.bodyless:
            self.announced = length
        head = self.lines
        if self.announced is not None and code != "204" and not interim:
            head += b"\r\nContent-Length: %d" % self.announced
        if self.bodyless:
            self.left = 0
        elif self.announced is not None:
            self.left = self.announced
        elif request.http11:
            self.chunked = True
            head += b"\r\nTransfer-Encoding: chunked"
        if interim or not (self.bodyless or self.chunked or self.left is not None):
            self.keep = False
        if "date" not in self.given:
            head += http_date(int(time.time()))
        if "server" not in self.given:
            head += b"\r\nServer: hupserve"
        if self.keep and self.body:
            self.keep = self.body.arrived()
        if self.keep and self.server.draining:
            # Who has asked already is answered once more; the last answer says close.
            self.keep = self.request.has_more()
        self.head_sent = True
        if not self.keep:
            return head + b"\r\nConnection: close\r\n\r\n"
        return head + (b"\r\n\r\n" if request.http11 else b"\r\nConnection: keep-alive\r\n\r\n")

    def write(self, data):
        """Send a piece of the body, the head before the first (PEP 3333's write callable too).
        What is more than the announced length never reaches the wire: it would be the next response."""
        if not isinstance(data, bytes):
            raise TypeError(f"the application gave {type(data).__name__}, not bytes")
        head = b"" if self.head_sent else self.head(len(data) if self.single else None)
        if self.bodyless:
            data = b""
        elif self.left is not None:
            data = data[:self.left]
            self.left -= len(data)
        self.sent += len(data)
        if self.chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if len(data) > PIECE and head:
            self.connection_send(head)
            head = b""
        if head or data:
            self.connection_send(head + data if head else data)

    def connection_send(self, data):
        self.request.send(data, self.server.config.io_timeout)

    def send_file(self, wrapper):
        """The file, or as much as Content-Length allows, by sendfile -> False: not possible."""
        plain = not self.request.tls and wrapper.plain_file()
        if not plain or not hasattr(os, "sendfile"):
            return False
        fd, offset, size = plain
        self.connection_send(self.head(size))
        end = offset + min(size, self.left)
        while offset < end:
            try:
                count = os.sendfile(self.request.sock.fileno(), fd, offset, end - offset)
                if not count:
                    break                           # the file has shrunk meanwhile
                offset, self.sent, self.left = offset + count, self.sent + count, self.left - count
            except BlockingIOError:
                self.request.wait_to_send(self.server.config.io_timeout)
            except OSError as error:
                raise ClientGone(reason_of(error)) from None
        self.keep = self.keep and not self.left
        return True

    def fail(self, refusal):
        """Answer with a status of ours, if nothing is on the wire yet; the connection ends either way."""
        self.keep = False
        if not self.head_sent:
            self.head_sent, self.status = True, f"{refusal.status.value}"
            with contextlib.suppress(OSError):
                self.connection_send(refusal_bytes(refusal, self.request.line))

    def log_access(self):
        connection, environ = self.request, self.request.request.environ
        log_access(connection, (self.status or "-")[:3], self.sent,
                   environ.get("HTTP_REFERER", "-"), environ.get("HTTP_USER_AGENT", "-"))


def log_access(connection, status, sent, referer="-", agent="-"):
    """One line in the combined format, plus the seconds from hand-over to the last byte handed out."""
    access_log.info('%s - - [%s] "%s" %s %d "%s" "%s" %.6f', connection.client,
                    time.strftime("%d/%b/%Y:%H:%M:%S %z"), escaped(connection.line), status, sent,
                    escaped(referer), escaped(agent), time.monotonic() - connection.since)


def escaped(text):
    return text.translate(ESCAPES)


def refusal_bytes(refusal, line):
    """-> a whole response that says no. A HEAD is told without a body."""
    status = refusal.status
    body = f"{status.value} {status.phrase}: {refusal.reason}\n".encode()
    head = (f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}").encode() + http_date(int(time.time()))
    head += b"\r\nServer: hupserve\r\nConnection: close\r\n\r\n"
    return head if line.startswith("HEAD ") else head + body


# ----------------------------------------------------------------------------------------------------
# The worker: the loop first, then accept, read, dispatch, take back, expire, drain
# ----------------------------------------------------------------------------------------------------

class Worker(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """A server whose socketserver "request" is a connection with a complete request on it.

    Its main thread alone registers, unregisters and closes sockets: were a thread to close one, the
    number could be another connection's before the selector hears of it. It alone writes the
    in-flight counter as well: one more when it hands a connection to a thread, one less when it gets
    it back, so that there is no moment in which a request is with nobody and not counted."""

    daemon_threads = True       # a request that hangs must not hold a worker that has to go

    def __init__(self, config, generation, number, slot, listeners, borrowed, line, bell, application):
        super().__init__(None, Exchange)
        self.config, self.application = config, application
        self.generation, self.number, self.slot, self.pid = generation, number, slot, os.getpid()
        self.line, self.bell = line, bell
        self.listeners = {sock: text for text, sockets in listeners.items() for sock in sockets}
        self.borrowed = borrowed                # texts of the listeners that are systemd's
        self.bases = {sock: self.base(sock) for sock in self.listeners}
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
        self.accept_at = 0.0                    # out of descriptors: not before this time
        self.grace = config.idle_grace
        self.give_up_at = self.report_at = FOREVER
        self.alarm = FOREVER                    # the earliest time at which something is due
        self.now = time.monotonic()
        self.selector.register(bell, selectors.EVENT_READ, (self.obey,))
        self.selector.register(line, selectors.EVENT_READ, (self.hear,))
        os.register_at_fork(after_in_child=self.disown)

    def run(self):
        """Until there is nothing left to drain. Each step does what is due and waits for nothing."""
        while not self.finished():
            self.take_back()
            self.resume_accepting()
            self.dispatch()
            self.expire()
            self.report()
            for key, _ in self.wait():
                act, *subject = key.data
                act(*subject)

    def wait(self):
        """-> the selector's events. Sleeps until there is one, something is due or a thread rings.

        A thread appends to .returned and then looks at .asleep; here it is the other way round. So
        whichever comes first, either the thread rings or there is no sleep."""
        self.asleep = True
        seconds = 0 if self.returned else self.alarm - time.monotonic()
        if self.jobs:       # one thread was woken for all of them: if it is stuck in one, wake another
            seconds = min(seconds, 0.001)
        events = self.selector.select(None if seconds == FOREVER else max(0, seconds))
        self.asleep = False
        self.now = time.monotonic()
        return events

    def finished(self):
        if self.draining and self.count and self.now >= self.give_up_at:
            log.warning("drain_timeout: %d requests in flight are cut short", self.in_flight)
            return True
        return self.draining and not self.count

    def report(self):
        """Fill in this worker's slot of the scoreboard."""
        idle = len(self.rooms[State.NEW]) + len(self.rooms[State.IDLE])
        life = Life.DRAINING if self.draining else Life.SERVING if self.serving else Life.READY
        scoreboard.write(self.slot, self.pid, self.number, self.generation, life, idle,
                         self.count - idle - self.in_flight, self.in_flight, self.served)
        if self.draining:
            scoreboard.write_waits(self.slot, [
                {"client": connection.client, "request": without_query(connection.line), "since": connection.since}
                for connection in list(self.rooms[State.IN_FLIGHT])[:8]])

    # Orders

    def obey(self):
        for signum in self.bell.answer():
            self.hear()     # an order is written before its SIGHUP is sent: so it is there by now
            if signum == signal.SIGHUP and not self.draining:
                log.warning("SIGHUP without an order from the master: serving on")
            elif signum in (signal.SIGTERM, signal.SIGQUIT) and not self.draining:
                log.info("signal %d: draining, to be replaced", signum)
                self.line.say("leaving")
                self.drain((), self.config.idle_grace)

    def hear(self):
        for message in self.line.hear():
            if message["word"] == "go":
                self.serving = True
            else:
                self.drain(message["dropped"], message["grace"])
        if self.line.ended and self.line in self.selector.get_map():
            self.selector.unregister(self.line)
            log.error("the master is gone: draining")
            self.drain(set(self.listeners.values()) - self.borrowed, self.grace)

    def drain(self, dropped, grace):
        """Accept no more, finish what has begun. dropped: the addresses that nobody takes over: whoever
        is queued there has been accepted by the kernel, and the close would reset him. A second order
        can only shorten the grace of the idle."""
        if not self.draining:
            self.draining, self.report_at = True, self.now + LONG_DRAIN
            if self.config.drain_timeout:
                self.give_up_at = self.now + self.config.drain_timeout
        self.grace = min(self.grace, grace)
        self.stop_accepting()
        for sock, text in self.listeners.items():
            if text in dropped:
                turn_away(sock)
                while self.admit(sock):
                    pass
            sock.close()
        self.listeners = {}
        for connection in (*self.rooms[State.NEW], *self.rooms[State.IDLE]):
            connection.deadline = min(connection.deadline, self.now + self.grace)
        self.alarm = self.now       # the deadlines have changed: look at them all

    # Accept

    def accept(self, listener):
        """One client at a time: the other workers want some, too. With no thread free, they get all."""
        if self.in_flight >= self.config.threads or self.count >= self.config.connections and not self.evict():
            self.stop_accepting()
        elif self.accepting:
            self.admit(listener)

    def admit(self, listener):
        """Accept a client, if there is one -> was there one?"""
        try:
            sock, address = listener.accept()
            sock.setblocking(False)
            self.starved = False
            if self.config.tls:
                sock = self.config.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except WOULD_BLOCK:
            return False        # another worker was faster
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                return True     # that client is gone again
            return self.evict() or self.starve(error)
        host, port = (address[0], str(address[1])) if isinstance(address, tuple) else ("", "")
        connection = Connection(sock, host or "unix:", {**self.bases[listener], "REMOTE_ADDR": host,
                                                        "REMOTE_PORT": port}, self.config.tls)
        self.count += 1
        state = State.HANDSHAKE if self.config.tls else State.NEW
        self.move(connection, state, min(self.config.header_timeout, self.grace) if self.draining
                  else self.config.header_timeout)
        self.read(connection)       # often its request is there already: that saves registering it
        return True

    def starve(self, error):
        """Out of descriptors or memory, with nobody idle to send away: a pause, not a spin."""
        if not self.starved:
            log.error("cannot accept: %s; trying again every %g s", reason_of(error), PAUSE)
        self.starved = True
        self.stop_accepting()
        self.accept_at = self.now + PAUSE
        self.alarm = min(self.alarm, self.accept_at)
        return False

    def stop_accepting(self):
        if self.accepting:
            self.accepting = False
            for listener in self.listeners:
                self.selector.unregister(listener)

    def resume_accepting(self):
        """As soon as a thread is free. A newcomer is accepted before a waiting request is dispatched,
        or the clients that are connected already could keep all threads to themselves."""
        if (self.accepting or not self.serving or self.draining or self.now < self.accept_at
                or self.in_flight >= self.config.threads or self.count >= self.config.connections
                and not (self.rooms[State.NEW] or self.rooms[State.IDLE])):
            return
        self.accepting = True
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ, (self.accept, listener))
        for listener in self.listeners:
            self.accept(listener)

    def base(self, listener):
        """-> the part of the environ that is the same for all requests of a listener."""
        name = listener.getsockname()
        host, port = name[:2] if isinstance(name, tuple) else ("localhost", 443 if self.config.tls else 80)
        return {"SERVER_NAME": host, "SERVER_PORT": str(port), "SERVER_SOFTWARE": f"hupserve/{__version__}",
                "SCRIPT_NAME": "", "GATEWAY_INTERFACE": "CGI/1.1", "wsgi.version": (1, 0),
                "wsgi.url_scheme": "https" if self.config.tls else "http", "wsgi.errors": ErrorsToLog(),
                "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False,
                "wsgi.file_wrapper": FileWrapper,
                "hupserve.generation": self.generation, "hupserve.worker": self.number}

    # Where a connection is

    def move(self, connection, state, seconds=FOREVER):
        """To a state, which it has to leave within so many seconds. In one state all are given the same
        time, so that the first in a room is the first that is due."""
        self.rooms[connection.state].pop(connection, None)
        self.rooms[state][connection] = None
        connection.state, connection.since = state, self.now
        connection.deadline = self.now + seconds
        if connection.deadline < self.alarm:
            self.alarm = connection.deadline

    def park(self, connection):
        """Kept alive: idle until its next byte."""
        self.move(connection, State.IDLE, self.grace if self.draining else self.config.keepalive_timeout)
        self.watch(connection)

    def watch(self, connection):
        if not connection.registered:
            connection.registered = True
            self.selector.register(connection.sock, selectors.EVENT_READ, (self.readable, connection))

    def unwatch(self, connection):
        if connection.registered:
            connection.registered = False
            self.selector.unregister(connection.sock)

    def close(self, connection):
        self.unwatch(connection)
        del self.rooms[connection.state][connection]
        self.count -= 1
        if connection.tls:
            with contextlib.suppress(OSError, ValueError):
                connection.sock.unwrap()        # close_notify: this was no truncation
        connection.sock.close()

    # Read

    def readable(self, connection):
        if not connection.registered:
            return      # closed on account of an earlier event of the same round
        if connection.state < State.WAITING:
            self.read(connection)
        elif connection.state == State.CLOSING:
            self.discard(connection)
        else:
            # It speaks early. In flight it stays registered, for most clients wait for their answer,
            # and that saves two system calls a request.
            self.unwatch(connection)

    def read(self, connection):
        try:
            if connection.state == State.HANDSHAKE:
                connection.sock.do_handshake()
                self.move(connection, State.NEW, self.config.header_timeout)
            if connection.receive():
                self.advance(connection)
            elif connection.state >= State.READING:
                self.refuse(connection, Refusal(400, "the request was cut short"))
            else:
                self.close(connection)
        except ssl.SSLWantWriteError:
            self.unwatch(connection)
            connection.registered = True
            self.selector.register(connection.sock, selectors.EVENT_WRITE, (self.rewatch, connection))
        except WOULD_BLOCK:
            self.watch(connection)
        except OSError as error:
            log.debug("%s: %s", connection.client, reason_of(error))
            self.close(connection)

    def rewatch(self, connection):
        """TLS can write again what it has to, and goes on reading."""
        self.unwatch(connection)
        self.read(connection)

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
        elif connection.buffer and connection.state != State.READING:
            self.move(connection, State.READING, self.config.header_timeout)
        elif connection.state == State.IN_FLIGHT:       # it was an empty line, after an answer
            self.move(connection, State.IDLE, self.grace if self.draining else self.config.keepalive_timeout)
        self.watch(connection)

    def refuse(self, connection, refusal):
        log.debug("%s: %s: %s", connection.client, escaped(connection.line), refusal.reason)
        answer = refusal_bytes(refusal, connection.line)
        with contextlib.suppress(OSError):      # a few hundred bytes into an empty buffer: no waiting
            connection.sock.send(answer)
        if self.config.access_log != "off":
            log_access(connection, refusal.status.value, len(answer))
        self.linger(connection)

    # Dispatch and take back

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
        request.keep, request.early = False, True
        self.jobs.append(request)

    def wake_thread(self):
        """One for all jobs: threads that run Python take turns anyway, and each switch costs."""
        if self.sleeping:
            self.sleeping.pop().release()
        elif self.threads < self.config.threads:
            with contextlib.suppress(RuntimeError):     # no more threads to be had: the next one free
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
        """In a thread: the connection goes back to the main thread."""
        self.returned.append(request)
        if self.asleep and not self.jobs:
            self.asleep = False
            self.bell.ring()

    def handle_error(self, request, client_address):
        log.exception("%s: %s", client_address, escaped(request.line))

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
        """After a last answer. Where the client wants to go as well, and no unread byte would turn the
        close into a reset, it is closed at once."""
        try:
            if not connection.buffer and not connection.receive():
                return self.close(connection)
        except WOULD_BLOCK:
            if not connection.early:
                return self.close(connection)
        except OSError:
            return self.close(connection)
        self.linger(connection)

    def linger(self, connection):
        """Shut the sending side, and discard what still comes until the client has ended, too: to close
        a socket with unread input sends a reset, which can overtake the answer (RFC 9112 section 9.6)."""
        connection.buffer = b""
        try:
            if connection.tls:
                with contextlib.suppress(OSError, ValueError):
                    connection.sock.unwrap()
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.close(connection)
        self.move(connection, State.CLOSING, LINGER)
        self.watch(connection)

    def discard(self, connection):
        try:
            while connection.sock.recv(PIECE):
                pass
        except WOULD_BLOCK:
            return
        except OSError:
            pass
        self.close(connection)

    def retire(self, connection):
        """Close an idle connection -> was it idle? It is read once more just before: a request that has
        arrived by now is answered, and the moment in which one can be missed is a system call long."""
        try:
            if connection.receive():
                self.advance(connection)
                return connection.state in (State.NEW, State.IDLE) and not self.close(connection)
        except OSError:
            pass
        self.close(connection)
        return True

    def evict(self):
        """The connection that has been idle longest -> was there one?"""
        while True:
            idle = [next(iter(room)) for room in (self.rooms[State.NEW], self.rooms[State.IDLE]) if room]
            if not idle:
                return False
            if self.retire(min(idle, key=operator.attrgetter("since"))):
                return True

    def expire(self):
        if self.now < self.alarm:
            return
        self.alarm = min(self.give_up_at, self.accept_at if self.accept_at > self.now else FOREVER)
        if self.now >= self.report_at:
            self.report_at = self.now + LONG_DRAIN
            self.log_drain()
        self.alarm = min(self.alarm, self.report_at)
        for state in State:
            room = self.rooms[state]
            while room:
                connection = next(iter(room))
                if connection.deadline > self.now:
                    self.alarm = min(self.alarm, connection.deadline)
                    break
                self.expired(connection)

    def expired(self, connection):
        if connection.state in (State.NEW, State.IDLE):
            self.retire(connection)
        elif connection.state in (State.READING, State.RECEIVING):
            self.refuse(connection, Refusal(408, "the request took too long to arrive"))
        else:
            self.close(connection)

    def log_drain(self):
        """Every operator asks: why is the old worker still there?"""
        oldest = next(iter(self.rooms[State.IN_FLIGHT]), None)
        log.info("still draining: %d in flight, %d other connections%s", self.in_flight, self.count - self.in_flight,
                 f"; the oldest: {oldest.client} {escaped(without_query(oldest.line))}"
                 f" for {self.now - oldest.since:.0f} s" if oldest else "")

    def disown(self):
        """In a child that the application forks: it must hold no client's connection open, and must
        not answer to our signals."""
        for sock in (*self.listeners, *(connection.sock for room in self.rooms for connection in list(room)),
                     self.line.sock, self.selector):
            sock.close()
        signal.set_wakeup_fd(-1)
        for signum in (*STOPS, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)
        os.close(self.bell.reader)
        os.close(self.bell.writer)


def without_query(line):
    """A request line -> its method and path. Queries hold secrets."""
    return re.split(r"[?]| HTTP/", line)[0]


class ErrorsToLog(io.TextIOBase):
    """wsgi.errors: what the application writes becomes lines of the log."""

    def write(self, text):
        if text.strip():
            log.error("%s", text.rstrip())
        return len(text)

    def writelines(self, lines):
        self.write("".join(lines))


def run_worker(config, generation, number, slot, listeners, borrowed, line):
    """A worker's life, in the worker -> exit status. Signals are still blocked when it begins."""
    bell = Bell()
    for signum in MASTER_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)   # loading, it dies of TERM at once
    bell.hang(WORKER_SIGNALS)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    scoreboard.write(slot, os.getpid(), number, generation, Life.BOOTING, 0, 0, 0, 0)
    try:
        application = prepare(config)
    except ConfigError as error:
        line.say("failed", status=2, reason=str(error))
        return 2
    except BaseException as error:      # an import may well call sys.exit()
        log.exception("the application does not load")
        line.say("failed", status=1, reason=f"the application does not load: {type(error).__name__}: "
                                            f"{reason_of(error)[:500]}")
        return 1
    bell.hang(STOPS)
    worker = Worker(config, generation, number, slot, listeners, borrowed, line, bell, application)
    line.say("ready")
    worker.run()
    return 0


def prepare(config):
    """Logging, then the application -> the WSGI callable. Raises ConfigError, or whatever it raises."""
    use_logs(config, open_logs(config))
    if "loggers" in config.parser:
        own = log.handlers[:], access_log.handlers[:]
        try:
            logging.config.fileConfig(config.parser, disable_existing_loggers=False)
        except Exception as error:
            raise ConfigError(f"{config.path}: [loggers] {type(error).__name__}: {reason_of(error)}") from None
        for logger, handlers in zip((log, access_log), own):
            logger.handlers[:] = logger.handlers or handlers
    return load_application(config)


# ----------------------------------------------------------------------------------------------------
# The master: the loop first, then reap, obey, the reload, spawn, stop
# ----------------------------------------------------------------------------------------------------

class Child:
    """A worker, as the master knows it."""

    def __init__(self, pid, post, slot, line, born):
        self.pid, self.post, self.slot, self.line = pid, post, slot, line
        self.generation = post.generation
        self.life = Life.BOOTING
        self.born = born                    # time.monotonic() seconds
        self.failure = None                 # (exit status, reason), when it said "failed"


class Post:
    """One of a generation's places for a worker, and how well that goes."""

    def __init__(self, generation, number):
        self.generation, self.number = generation, number
        self.child: Optional[Child] = None
        self.deaths = 0                     # since somebody lived for STEADY seconds
        self.not_before = 0.0               # when the next one may be started

    def vacate(self, now):
        """-> seconds until it is filled again."""
        assert self.child
        if now - self.child.born > STEADY:
            self.deaths = 0
        seconds = BACK_OFF[min(self.deaths, len(BACK_OFF) - 1)]
        self.child, self.deaths, self.not_before = None, self.deaths + 1, now + seconds
        return seconds


class Generation:
    """The workers of one reading of the configuration, and what they listen on."""

    def __init__(self, number, config, deadline):
        self.number, self.config = number, config
        self.deadline = deadline            # of its binding, then of its booting
        self.listeners: dict = {}           # {address text: [sockets]}
        self.fresh: set = set()             # texts that the generation before does not have
        self.borrowed: set = set()          # texts that are systemd's
        self.pidfile: Any = None            # open and locked
        self.posts = [Post(self, number) for number in range(config.workers)]


class Master:
    """Owns listeners and workers; sits in one selector all its life."""

    def __init__(self, config):
        self.target = config.target
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()    # IGN: nohup
        self.adopted = adopt()
        self.bell = Bell()
        self.bell.hang(MASTER_SIGNALS)
        # Not epoll, whose descriptor is shared over fork: a child could unregister what is the master's.
        self.selector = selectors.PollSelector()
        self.selector.register(self.bell, selectors.EVENT_READ)
        self.children: dict = {}                    # {pid: Child}
        self.count = 0                              # of generations
        self.current: Optional[Generation] = None   # the one that serves
        self.upcoming: Optional[Generation] = None  # the one that a reload prepares
        self.phase = Phase.NONE
        self.hup = False                            # a SIGHUP is to be obeyed
        self.stops = 0                              # TERM, QUIT and INT so far
        self.fork_at = 0.0                          # not before this time
        self.alarm = FOREVER                        # when the loop has to come round again
        self.status = 0                             # to exit with

    def run(self, config):
        """-> exit status. Each step looks at what is, does what is due, and waits for nothing."""
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
        """Is it time? If not, come round then."""
        if self.now >= when:
            return True
        self.alarm = min(self.alarm, when)
        return False

    # What comes from below

    def hear(self, child):
        for message in child.line.hear():
            if message["word"] == "ready":
                child.life = Life.READY
                if child.generation is self.current:        # a replacement: it need not wait for others
                    self.go(child)
            elif message["word"] == "failed":
                child.failure = message["status"], message["reason"]
            elif message["word"] == "leaving" and child.life == Life.SERVING:
                child.life = Life.DRAINING
                child.post.vacate(self.now)
        if child.line.ended and child.line in self.selector.get_map():
            self.selector.unregister(child.line)        # its end comes with SIGCHLD

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child:       # None: as process 1, somebody's orphan
                self.bury(child, os.waitstatus_to_exitcode(status))

    def bury(self, child, code):
        self.hear(child)
        if child.line in self.selector.get_map():
            self.selector.unregister(child.line)
        child.line.sock.close()
        scoreboard.write(child.slot, *[0] * 8)
        scoreboard.write_waits(child.slot, [])
        how = f"exited with status {code}" if code >= 0 else f"was killed by signal {-code}"
        status, reason = child.failure or (1, f"a new worker {how} before it was ready")
        if child.life == Life.DRAINING:
            log.log(logging.WARNING if code else logging.DEBUG, "worker %d of generation %d (pid %d) %s",
                    child.post.number, child.generation.number, child.pid, how)
        elif child.generation is self.upcoming:
            self.roll_back(reason, status)
        else:
            seconds = child.post.vacate(self.now)
            log.error("worker %d (pid %d) %s%s; replaced %s", child.post.number, child.pid, how,
                      f": {reason}" if child.failure else "", f"in {seconds:g} s" if seconds else "now")

    def obey(self):
        for signum in self.bell.answer():
            if signum in STOPS:
                self.stop(signum)
            elif signum == signal.SIGHUP and self.terminal and not has_terminal():
                log.info("the terminal is gone")
                self.stop(signum)
            elif signum == signal.SIGHUP:
                self.hup = True

    # The reload: begin, bind, boot, commit or roll back

    def advance(self):
        """Move the reload on as far as it goes. A SIGHUP in the middle of one is remembered, once."""
        if self.phase == Phase.NONE and self.hup and not self.stops:
            self.hup = False
            self.reload()
        if self.phase == Phase.BINDING:
            self.bind()
        if self.phase == Phase.BOOTING:
            assert self.upcoming
            if all(post.child and post.child.life == Life.READY for post in self.upcoming.posts):
                self.commit()
            elif self.due(self.upcoming.deadline):
                self.roll_back(f"not every worker was ready within {self.upcoming.config.boot_timeout:g} s"
                               " (boot_timeout)")

    def reload(self):
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            self.begin(read_config(self.target))
        except ConfigError as error:
            log.error("reload refused: %s", error)
            self.notify("READY=1", f"STATUS=reload refused: {error}")

    def begin(self, config):
        for warning in config.warnings:
            log.warning("%s", warning)
        self.count += 1
        self.upcoming = Generation(self.count, config, time.monotonic() + BIND_PATIENCE)
        self.phase = Phase.BINDING

    def bind(self):
        """Keep the sockets of the addresses that stay, bind the new ones, claim the pidfile."""
        new = self.upcoming
        assert new
        path = new.config.path
        for address in new.config.listen:
            try:
                self.bind_address(new, address)
            except OSError as error:
                # An address may come back before an old worker has let go of it.
                if error.errno == errno.EADDRINUSE and self.now < new.deadline:
                    self.alarm = min(self.alarm, self.now + 0.05)
                    return
                return self.roll_back(f"{path}: [server:main] listen: {address.text}: {reason_of(error)}")
        try:
            if new.config.pidfile and not (self.current and self.current.config.pidfile == new.config.pidfile):
                new.pidfile = claim_pidfile(new.config.pidfile)
        except OSError as error:
            return self.roll_back(f"{path}: [server:main] pidfile: {new.config.pidfile}: {reason_of(error)}")
        new.deadline = self.now + new.config.boot_timeout
        self.phase = Phase.BOOTING

    def bind_address(self, new, address):
        if address.text in new.listeners:
            return
        old = self.current
        if old and address.text in old.listeners:       # its very socket, and the clients queued on it
            new.listeners[address.text] = old.listeners[address.text]
            new.borrowed |= old.borrowed & {address.text}
            return
        for other in old.config.listen if old else ():
            if overlap(address, other):
                raise OSError(errno.EEXIST, f"overlaps {other.text}, which is being served")
        new.listeners[address.text] = open_listener(address, self.adopted)
        new.fresh.add(address.text)
        if any((family, name if family == socket.AF_UNIX else name[:2]) in self.adopted
               for family, name in address.binds):
            new.borrowed.add(address.text)

    def commit(self):
        """Every new worker is ready, and none has accepted anything. What can fail comes first."""
        new, old = self.upcoming, self.current
        assert new
        try:
            for text in sorted(new.listeners, key=lambda text: text not in new.fresh):
                for sock in new.listeners[text]:
                    sock.listen(new.config.backlog)
            logs = open_logs(new.config)
        except OSError as error:
            return self.roll_back(f"{new.config.path}: {text}: {reason_of(error)}")
        self.current, self.upcoming, self.phase = new, None, Phase.NONE
        use_logs(new.config, logs)
        for post in new.posts:
            self.go(post.child)
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
        """Let go of the listeners that are gone, then tell the old workers: nobody may queue up on a
        socket after a worker has found its queue empty."""
        dropped = set(old.listeners) - set(new.listeners)
        if old.config.pidfile == new.config.pidfile:
            new.pidfile = old.pidfile
        else:
            release_pidfile(old.pidfile)
        for text in dropped:
            close_listener(old.listeners[text])
        for child in self.children.values():
            if child.generation is not new:
                self.order_drain(child, dropped - old.borrowed, child.generation.config.idle_grace)

    def order_drain(self, child, dropped, grace):
        """The order, with what a signal cannot say, before the signal. Who drains already is not told
        again; who has never served is simply ended."""
        if child.life == Life.SERVING:
            child.life = Life.DRAINING
            child.line.say("drain", dropped=sorted(dropped), grace=grace)
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
            print(f"hupserve: {reason}", file=sys.stderr)
            self.stops, self.status = 1, status

    def abandon(self):
        """The upcoming generation goes: its workers, its new listeners, its pidfile."""
        new, self.upcoming, self.phase = self.upcoming, None, Phase.NONE
        assert new
        for child in self.children.values():
            if child.generation is new:
                self.order_drain(child, (), 0)
        for text in new.fresh:
            close_listener(new.listeners[text])
        release_pidfile(new.pidfile)

    def announce(self, generation):
        config = generation.config
        urls = [url_of(address, generation.listeners[address.text][0], config.tls) for address in config.listen]
        print(f"hupserve {__version__}: serving {self.target} on {' '.join(urls)} with {config.workers} "
              f"worker{'s' * (config.workers > 1)}; to reload it: kill -HUP {os.getpid()}",
              file=sys.stderr, flush=True)

    # Spawn

    def replenish(self):
        """Fill the posts that are empty, and end replacements that never become ready."""
        for child in self.children.values():
            if child.life == Life.BOOTING and child.generation is self.current and self.due(
                    child.born + self.current.config.boot_timeout):
                log.error("worker %d (pid %d) was not ready within boot_timeout", child.post.number, child.pid)
                os.kill(child.pid, signal.SIGKILL)
        for generation in (self.current, self.upcoming if self.phase == Phase.BOOTING else None):
            for post in generation.posts if generation and not self.stops else ():
                if not post.child and self.due(max(post.not_before, self.fork_at)):
                    self.spawn(post)

    def spawn(self, post):
        try:
            ours, theirs = map(Line, socket.socketpair())
            slot = min(set(range(Scoreboard.SLOTS)) - {child.slot for child in self.children.values()},
                       default=Scoreboard.SLOTS - 1)
            with signals_blocked():
                pid = os.fork()
                if not pid:
                    self.become_worker(post.generation, post.number, slot, theirs)      # does not return
        except OSError as error:
            if not self.fork_at:
                log.error("cannot start a worker: %s; trying again every %g s", reason_of(error), PAUSE)
            self.fork_at = self.now + PAUSE
            self.alarm = min(self.alarm, self.fork_at)
            return
        theirs.sock.close()
        self.fork_at = 0.0
        post.child = self.children[pid] = Child(pid, post, slot, ours, self.now)
        self.selector.register(ours, selectors.EVENT_READ, post.child)

    def become_worker(self, generation, number, slot, line):
        """In the worker: drop what is the master's and other generations', and run. Never returns."""
        status = 1
        try:
            os.close(self.bell.reader)
            os.close(self.bell.writer)
            for child in self.children.values():
                child.line.sock.close()
            for other in filter(None, (self.current, self.upcoming)):
                for text, sockets in other.listeners.items():
                    if generation.listeners.get(text) is not sockets:
                        for sock in sockets:
                            sock.close()
                if other.pidfile:
                    other.pidfile.close()
            for sock in self.adopted.values():
                sock.close()
            status = run_worker(generation.config, generation.number, number, slot, generation.listeners,
                                generation.borrowed, line)
        except BaseException:
            log.exception("worker %d failed", number)
        finally:
            leave(status)

    # Stop

    def stop(self, signum):
        """Gracefully; the second time at once."""
        self.stops += 1
        if self.stops > 1:
            log.warning("stopped by force")
            self.status = self.status or 1
            for child in self.children.values():
                os.kill(child.pid, signal.SIGKILL)
            return
        log.info("stopping: every worker finishes what it has begun")
        self.notify("STOPPING=1")
        if self.upcoming:
            self.abandon()
        texts = set(self.current.listeners) - self.current.borrowed if self.current else set()
        for sockets in self.current.listeners.values() if self.current else ():
            close_listener(sockets)
        for child in self.children.values():
            grace = 0 if signum == signal.SIGINT else child.generation.config.idle_grace
            if child.life == Life.DRAINING:
                child.line.say("drain", dropped=[], grace=grace)
            self.order_drain(child, texts, grace)

    def finish(self):
        if self.current:
            release_pidfile(self.current.pidfile)
        log.info("stopped")

    def notify(self, *lines):
        """sd_notify(3): one datagram."""
        if self.notify_socket:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                sock.sendto("\n".join(lines).encode(), re.sub("^@", "\0", self.notify_socket))


def claim_pidfile(path):
    """-> the new file, open and locked: the lock, unlike the number in it, dies with its master.
    Raises OSError while another master holds it."""
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


def leave(status):
    """Exit a worker. A thread that hangs, or one of the application's, would hold sys.exit() for ever;
    os._exit() alone would skip what is to be done at exit, and multiprocessing would leave orphans."""
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


# ----------------------------------------------------------------------------------------------------
# Demo and status: the two applications that ship with it
# ----------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hupserve</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums }
.draining td { opacity: .7 }
.wide { overflow-x: auto }
button { font: inherit; padding: .3rem .8rem }
</style></head><body>
<h1 id="greeting">GREETING</h1>
<p>Answered by <span id="who">WHO</span>. <span id="note"></span></p>
<p id="try" hidden><button>Hold a request in flight for 20 s</button></p>
<div class="wide"><table><thead><tr><th class="number">generation<th class="number">worker<th class="number">pid
<th>state<th class="number">idle<th class="number">in flight<th class="number">served<th>waits for</thead>
<tbody id="workers"></tbody></table></div>
<script>
const at = id => document.getElementById(id), columns =
  ["generation", "worker", "pid", "state", "idle", "in_flight", "served", "waits"]
async function look() {
  try {
    const now = await (await fetch("?format=json", {cache: "no-store"})).json()
    at("greeting").textContent = now.greeting || "hupserve"
    at("who").textContent = now.answered_by
    at("note").textContent = ""
    at("try").hidden = !now.greeting
    at("workers").replaceChildren(...now.workers.map(worker => {
      const row = document.createElement("tr")
      row.className = worker.state
      worker.waits = worker.waits_for.map(w => `${w.client} ${w.request} ${w.age.toFixed(0)} s`).join("\\n")
      for (const column of columns) {
        const cell = row.insertCell()
        cell.textContent = worker[column]
        cell.style.whiteSpace = "pre-line"
        if (typeof worker[column] === "number") cell.className = "number"
      }
      return row
    }))
  } catch (error) { at("note").textContent = "No answer: " + error.message }
  setTimeout(look, 500)
}
document.querySelector("button").onclick = () => fetch("slow?seconds=20")
look()
</script></body></html>
"""


def status_filter(global_conf, path="/status"):
    """paste.filter_factory: at path, a page that shows all workers of all generations, live, and as
    JSON to who asks for it (Accept: application/json, or ?format=json)."""
    def decorate(application):
        def with_status(environ, start_response):
            if environ.get("PATH_INFO") == path:
                return status(environ, start_response)
            return application(environ, start_response)
        return with_status
    return decorate


def status(environ, start_response, greeting=""):
    who = (f"worker {environ.get('hupserve.worker')} (pid {os.getpid()}) of generation "
           f"{environ.get('hupserve.generation')}")
    if "format=json" in environ.get("QUERY_STRING", "") or "application/json" in environ.get("HTTP_ACCEPT", ""):
        kind, text = "application/json", json.dumps({
            "greeting": greeting, "answered_by": who, "pid": os.getpid(),
            "generation": environ.get("hupserve.generation"), "worker": environ.get("hupserve.worker"),
            "workers": scoreboard.read() if scoreboard else []})
    else:
        kind, text = "text/html; charset=utf-8", PAGE.replace(
            "GREETING", html.escape(greeting or "hupserve")).replace("WHO", who)
    body = text.encode()
    start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))),
                              ("Cache-Control", "no-store")])
    return [body]


def demo_app(global_conf, greeting="hello"):
    """paste.app_factory: the status page with a greeting, and /slow?seconds=N to hold a request."""
    def demo(environ, start_response):
        path = environ.get("PATH_INFO", "")
        if path == "/":
            return status(environ, start_response, greeting)
        if path != "/slow":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"Try / or /slow?seconds=20\n"]
        query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        try:
            seconds = min(max(float(query.get("seconds", ["20"])[0]), 0), 3600)
        except ValueError:
            start_response("400 Bad Request", [("Content-Type", "text/plain")])
            return [b"seconds is a number\n"]
        time.sleep(seconds)
        start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{greeting}: {seconds:g} s later, still pid {os.getpid()} of generation "
                f"{environ.get('hupserve.generation')}\n".encode()]
    return demo


# ----------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------

def serve(config):
    """Run the master until it is stopped -> exit status: 0 after a clean stop, 1 or 2 (the mistake was
    the operator's) if it could not start, 1 if it was stopped by force."""
    global scoreboard
    sys.modules.setdefault("hupserve", sys.modules[__name__])   # or hupserve:demo_app were a second copy
    while os.open(os.devnull, os.O_RDWR) < 3:       # a closed stderr's number must not become a socket's
        pass
    scoreboard = Scoreboard()
    try:
        use_logs(config, open_logs(config))
        master = Master(config)
    except (OSError, ConfigError) as error:
        return complain(reason_of(error), 1)
    try:
        return master.run(config)
    finally:
        master.finish()


def check(config):
    """Load all of it in a child and bind nothing, like nginx -t -> exit status 0 or 2."""
    sys.modules.setdefault("hupserve", sys.modules[__name__])
    pid = os.fork()
    if not pid:
        signal.setitimer(signal.ITIMER_REAL, config.boot_timeout)
        try:
            prepare(config)
            leave(0)
        except ConfigError as error:
            complain(error, 2)
        except BaseException as error:
            traceback.print_exc()
            complain(f"{config.path}: the application does not load: {type(error).__name__}: "
                     f"{reason_of(error)}", 2)
        leave(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        complain(f"{config.path}: the application did not load within {config.boot_timeout:g} s (boot_timeout)"
                 if code == -signal.SIGALRM else f"{config.path}: loading it ended by signal {-code}", 2)
    if code == 0:
        print(f"{config.target}: good")
    return 2 if code else 0


def complain(reason, status):
    print(f"hupserve: {reason}", file=sys.stderr, flush=True)
    return status


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="hupserve", description="A WSGI server with a lossless SIGHUP reload.")
    parser.add_argument("config", metavar="CONFIG", help="an ini file, or file#name for [app:name]")
    parser.add_argument("--check", action="store_true", help="validate it, application included, and exit")
    parser.add_argument("--version", action="version", version=f"hupserve {__version__}")
    arguments = parser.parse_args(argv)
    if sys.stderr is None:                  # it was closed
        sys.stderr = open(os.devnull, "w")
    try:
        config = read_config(arguments.config)
    except ConfigError as error:
        return complain(error, 2)
    return check(config) if arguments.check else serve(config)


if __name__ == "__main__":
    sys.exit(main())
