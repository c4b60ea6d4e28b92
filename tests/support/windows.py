"""Windows' rules for files, on Linux: what is open or mapped can neither be replaced nor deleted, only a file that may
be written is flushed, renaming replaces nothing, there are no symbolic links and no fork, and text is in cp1252 where
nobody says otherwise. (A child process keeps its own rules.)"""
from __future__ import annotations

import builtins
import fcntl
import io
import os
import signal
import sys
from pathlib import Path

OURS = ("/trainer/", "/models_impl/", "/nodes/", "/kernels/")


def in_use() -> set[str]:
    """The files that this process has open or mapped."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the one that listed them
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.add(line[line.find("/"):] if "/" in line else "")
    return found


def place(path, folder: int | None) -> str:
    path = os.fsdecode(os.fspath(path))
    if folder is not None and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.realpath(path)


def refuse_in_use(path, folder=None):
    where = place(path, folder)
    if found := [one for one in in_use() if one == where or one.startswith(where + os.sep) and os.path.isfile(one)]:
        error = PermissionError(13, "The process cannot access the file because it is being used by another process",
                                found[0])
        error.winerror = 32
        raise error


def pretend(monkeypatch):
    """Windows' rules until the end of the test."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "remove")}

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real["fsync"](number)

    def moved(name, over):
        def move(source, target, **folders):
            refuse_in_use(source, folders.get("src_dir_fd"))
            if os.path.exists(target):
                if not over or os.path.isdir(target):
                    raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
                refuse_in_use(target, folders.get("dst_dir_fd"))
            real[name](source, target, **folders)
        return move

    def removed(name):
        def remove(path, *, dir_fd=None):
            refuse_in_use(path, dir_fd)
            real[name](path, dir_fd=dir_fd)
        return remove

    def refused(*_, **__):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", moved("replace", True))
    monkeypatch.setattr(os, "rename", moved("rename", False))
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, removed(name))
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.delattr(os, "fork")
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGPIPE"):
        monkeypatch.delattr(signal, name)
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", in_cp1252(module.open))


def in_cp1252(real):
    def opened(file, mode="r", buffering=-1, encoding=None, *args, **kwargs):
        """io.open, for our own lines without UTF-8 by default."""
        caller = sys._getframe(1)
        while caller and caller.f_code.co_filename.endswith("pathlib.py"):
            caller = caller.f_back
        name = caller.f_code.co_filename if caller else ""
        if "b" not in mode and encoding in (None, "locale") and "site-packages" not in name and any(
                folder in name for folder in OURS):
            encoding = "cp1252"
        return real(file, mode, buffering, encoding, *args, **kwargs)

    return opened
