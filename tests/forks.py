"""Processes of tests, in every environment: started without a new Python, and ended with the tests."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path


def fork(work):
    """Run ``work`` in a child process, which needs no new start of Python; returns its id. A message of failure goes to stderr."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return child


def inherit_orphans():
    """What a child of this process leaves running becomes its own child (on Linux), and SIGTERM ends the tests as Ctrl-C does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def children() -> list[int]:
    """Of every thread of this process; but for the server of multiprocessing that clears shared memory away and then ends by itself."""
    found = []
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            with contextlib.suppress(FileNotFoundError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found


def end_all_children():
    """And theirs, which become this process's own."""
    while found := children():
        for child in found:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
