"""What every app shares: flags, the experiment behind --config, errors as one line, a quiet screen, the compile cache.

Exit codes: 0 done, 1 failed, 2 wrong flags or config, 75 interrupted with the state saved, 130 Ctrl-C.
"""

import ctypes
import functools
import hashlib
import logging as standard_logging
import os
import platform
import re
import select
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from tml.config import Experiment, from_config_dict
from tml.config.tree import nearest_keys

FLAGS = flags.FLAGS
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command continues."""
EXIT_KEYBOARD = 130
EXIT_UNREAD = 141
"""As shells say of a command that a closed pipe ended: it was not done."""

COMPILE_CACHE = Path("~/.cache/tml/xla")
"""Where compiled programs stay between runs; JAX_COMPILATION_CACHE_DIR overrides it."""


CPU_FLAGS = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"
"""Lets independent operations of a step run on different cores; the default order is for the least memory. A fifth
off the time of a small model's step on two cores. Flags in XLA_FLAGS come after it, so they win."""


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE and its overrides, --config.group.key=value."""
    return config_flags.DEFINE_config_file(
        "config",
        help_string="An experiment, such as experiments/quickstart.py. "
        "--config.group.key=value changes one value, as in --config.train.num_steps=200.",
    )


def read_experiment(config: flags.FlagHolder) -> Experiment:
    """The experiment that the flags describe, checked before any array exists.

    Raises:
        app.UsageError: no file, or values that do not fit.
    """
    if FLAGS["config"].value is None:
        raise app.UsageError("--config is missing; name an experiment, as in --config=experiments/quickstart.py")
    try:
        return from_config_dict(config.value)
    except (ValueError, OSError) as error:
        raise app.UsageError(_readable(error)) from error


def run_app(main: Callable[[list[str]], int | None]) -> None:
    """Runs an app: parses flags, prints help, and turns errors that a user can mend into one line.

    Args:
        main: gets what is left of the command line; returns the exit code, None for 0. ValueError,
            FileNotFoundError and the like become one line; other exceptions are our mistakes and
            keep their traceback.
    """
    _quieten()
    app.run(lambda argv: sys.exit(_guarded(main, argv)), flags_parser=_parse_flags)


def output_folder(flag: str, folder: Path | str) -> Path:
    """The folder that a command is to write; it may be there.

    Raises:
        app.UsageError: a file stands there, or where a folder above it would.
    """
    folder = Path(folder)
    place = _standing(folder)
    if not place.is_dir():
        where = "is a file" if place == folder else f"is below {place}, which is a file"
        raise app.UsageError(f"--{flag}={folder} {where}; name a folder")
    return folder


def writable_folder(flag: str, folder: Path | str) -> Path:
    """An `output_folder` that is made only when everything is done: what is in its way is found before.

    Raises:
        app.UsageError: also where it is a link to nowhere, or cannot be written.
    """
    folder = output_folder(flag, folder)
    if folder.is_symlink() and not folder.exists():
        raise app.UsageError(f"--{flag}={folder} is a link to nowhere ({os.readlink(folder)}); name a folder")
    place = _standing(folder)
    if not os.access(place, os.W_OK):
        raise app.UsageError(f"--{flag}={folder}: {place} cannot be written; name another folder")
    return folder


def _standing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


@contextmanager
def as_usage() -> Iterator[None]:
    """What is wrong with values of the command line is a usage error: a ValueError becomes an app.UsageError."""
    try:
        yield
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments {argv[1:]}; every option is a --flag")
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except app.UsageError as error:
        return _complain(str(error), EXIT_USAGE)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return EXIT_UNREAD
        if _TRACEBACK.value:
            raise
        return _complain(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_KEYBOARD)


def _is_unread() -> bool:
    """Whether nobody reads what is printed any more, as `head` when it has enough; then nothing more is printed."""
    place = sys.stdout.fileno()
    watch = select.poll()
    watch.register(place, 0)
    is_closed = any(event & select.POLLERR for _, event in watch.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), place)
    return is_closed


def _complain(message: str, code: int) -> int:
    line = re.sub(r"\s*\n\s*", " ", message).strip()
    sys.unraisablehook = lambda _: None  # what libraries leave behind on the way out adds nothing
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; bad flags and config files end the program with one line."""
    if any(arg in ("--help", "-h", "-help", "--helpshort", "--helpfull") for arg in argv[1:]):
        print(_help_text())
        sys.exit(0)
    try:
        _check_overrides(argv)
        return FLAGS(argv)
    except KeyError as error:
        # ml_collections: the key, and sometimes: Did you mean "this" instead of "that"?
        key, _, near = str(error.args[0]).partition("Did you mean ")
        way_out = f"did you mean {near.split()[0]}?" if near else "only the config file can add such a key"
        sys.exit(_complain(f"a --config override names {key.strip()}; {way_out}", EXIT_USAGE))
    except (flags.Error, app.UsageError, AttributeError, TypeError, ValueError, OSError) as error:
        sys.exit(_complain(_readable(error), EXIT_USAGE))


def _readable(error: Exception) -> str:
    """The message, cut down to file and reason where a config file could not be loaded, or to what it raised itself."""
    text = str(error)
    raised = re.search(r"Error whilst parsing config file:.*\nValueError: (.*)", text, re.DOTALL)
    if raised:
        return raised.group(1)
    named = re.search(r"config=(\S+?\.py):(\S+): .*get_config\(\) takes 0 positional arguments", text, re.DOTALL)
    if named:
        return f"{named.group(1)} has no settings to choose of, so :{named.group(2)} says nothing; leave it out"
    found = re.search(r"Attempted \[[^]]*\]:\s*(\S+)\s*(\[Errno[^\n]*)", text)
    if not found:
        return text
    file = Path(found.group(1))
    if file.exists():
        return f"config file {file} cannot be loaded: {found.group(2)}"
    folders = (file.parent, Path("experiments"))
    found_there = {other for folder in folders for other in folder.glob("*.py")}
    known = sorted(str(other) for other in found_there if "def get_config(" in other.read_text(errors="replace"))
    return f"there is no config file {file}" + (f"; {nearest_keys(str(file), known)}" if known else "")


def _check_overrides(argv: list[str]) -> None:
    """Checks every --config.a.b=value against the dataclasses, to name the nearest keys."""
    for arg in argv[1:]:
        found = re.match(r"--?config\.([\w.]+)(=|$)", arg)
        if found:
            value = arg.partition("=")[2] if found.group(2) else None
            check_key(found.group(1), value)


def check_key(key: str, value: str | None = None) -> None:
    """Checks that a dotted key, such as `model.num_layers`, is one of an experiment's.

    Args:
        key: without `config` in front.
        value: as the command line gives it, checked where a number is wanted; None for no check.

    Raises:
        app.UsageError: it is none, with the nearest keys; or the value is no number.
    """
    _check_names(key.split("."), Experiment, "config", value)


def _check_names(names: list[str], kind: Any, path: str, value: str | None) -> None:
    if not names:
        if value is not None and kind in (int, float):
            _check_number(value, kind, path)
        return
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if names[0] not in hints:
            raise app.UsageError(f"unknown key {path}.{names[0]}; {_likely_keys(names[0], hints)}")
        _check_names(names[1:], hints[names[0]], f"{path}.{names[0]}", value)
        return
    origin = typing.get_origin(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _check_names(names[1:], typing.get_args(kind)[1], f"{path}.{names[0]}", value)
        return
    raise app.UsageError(f"unknown key {path}.{'.'.join(names)}; {path} is a single value")


def _likely_keys(name: str, hints: Mapping[str, Any]) -> str:
    """A phrase that names keys like this one: near ones beside it, or the same name anywhere in the config."""
    elsewhere = [key for key in _keys_below(Experiment, "config") if key.endswith(f".{name}")]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest_keys(name, hints)


def _keys_below(kind: Any, path: str) -> Iterator[str]:
    """Dotted paths of all fields of a tree of dataclasses, groups and values."""
    if is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield f"{path}.{name}"
            yield from _keys_below(hint, f"{path}.{name}")


def _check_number(value: str, kind: type[int] | type[float], path: str) -> None:
    try:
        kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise app.UsageError(f"{path} = {value!r} is not {wanted}") from None


def _help_text() -> str:
    """The app's docstring and its own flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    shared = [FLAGS[name] for name in ("config", "traceback") if name in FLAGS]
    for flag in [*FLAGS.get_key_flags_for_module(sys.argv[0]), *shared]:
        default = "" if flag.default in (None, "", False) else f" (default {flag.default_as_str})"
        lines.append(f"  --{flag.name}  {flag.help}{default}")
    return "\n".join(lines)


def _quieten() -> None:
    """Keeps third parties from flooding the screen; our own warnings stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.unraisablehook = _main_thread_only
    logging.set_verbosity(logging.FATAL)  # what fails raises, and is shown once
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"(tml|launch|data_pipelines|experiments)\b")


def _main_thread_only(unraisable: Any) -> None:
    """Shows ignored exceptions, but for those of native libraries' own threads, which come after what went wrong."""
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


@functools.cache
def prepare_jax() -> None:
    """Sets the compiler up and turns on its cache, once. Call it when the config is checked, before the first array."""
    import jax  # slow to import, and nothing about flags needs it

    _keep_freed_memory()
    os.environ["XLA_FLAGS"] = f"{CPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or COMPILE_CACHE.expanduser() / _machine()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next step, where it is glibc.

    XLA on CPU allocates its buffers anew every step. Large ones would come from the kernel each time, a page fault for
    every 4 KiB: a fifth of the step of a small model.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _machine() -> str:
    """A short name of this processor's instruction set: programs compiled for another one may not run here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()[:12]
