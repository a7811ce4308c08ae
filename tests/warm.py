"""Starts scripts without the seconds that Python needs to import torch, which are half of a short run.

A server has imported the libraries. For each run it forks, and the child executes the script's file as __main__, in a
session of its own, with the flags, folder, environment and streams that it is given. ``Run`` offers what tests use of
``subprocess.Popen``.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NoReturn

# not wandb, which makes a temporary folder as it is imported; the first run to end would remove it
LIBRARIES = "torch._dynamo gymnasium ale_py cv2 tyro typeguard tqdm moviepy.video.io.ffmpeg_writer"


class Run:
    """A script that runs in a fork of the server."""

    server = None  # the connection to it, from the first run on

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]):
        if Run.server is None:
            Run.server = start_server()
        self.args = command
        self.streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # stdout and stderr
        paths = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in self.streams]
        self.returncode = None
        self.pid = ask("start", str(folder), command, environment, paths)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that was printed, once the run has ended."""
        self.wait(timeout)
        printed = []
        for stream in self.streams:
            stream.seek(0)
            printed.append(stream.read())
        return tuple(printed)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ask(*request):
    Run.server.send_bytes(json.dumps(request).encode())
    return json.loads(Run.server.recv_bytes())


def start_server() -> Connection:
    """It ends with the process that has started it."""
    ours, theirs = Pipe()
    number = theirs.fileno()
    subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number], start_new_session=True)
    theirs.close()
    return ours


def serve(connection: Connection) -> None:
    for library in LIBRARIES.split():
        __import__(library)
    while True:
        try:
            kind, *request = json.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        if kind == "poll":
            (pid,) = request
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                finish(request)
        connection.send_bytes(json.dumps(answer).encode())


def become(folder: str, command: list[str], environment: dict[str, str], streams: list[str]) -> None:
    """Makes this process what ``command`` would be: a script and its flags."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate([os.devnull, *streams]):
        descriptor = os.open(path, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    script = command[0]
    sys.argv = command
    sys.path[0] = os.path.dirname(script)
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    code = compile(Path(script).read_text(), script, "exec")
    exec(code, vars(main))


def finish(request: list) -> NoReturn:
    """Runs a script to its end, and leaves the memory to the system: that saves a second."""
    exit_code = 0
    try:
        become(*request)
    except SystemExit as end:
        exit_code = end.code
        if isinstance(exit_code, str):
            print(exit_code, file=sys.stderr)
            exit_code = 1
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code or 0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
