"""The program among others: streams that cannot be written, terminals that close, signals, how it ends."""

import errno
import fcntl
import io
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios

import pytest
import torch
from conftest import ROOT
from helpers import NO_EXTRAS, SHORT, assert_group_is_gone, run_folder, wait_for, wandb_records

from dqn_atari import STOP_SIGNALS, catch_signals, guard_streams, say

pytestmark = pytest.mark.slow

# --------------------------------------------------------------------------------------------- standard streams


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    main, terminal = pty.openpty()
    os.close(main)
    return terminal


def full_pipe() -> int:
    """... that does not block."""
    global unread
    unread, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(2**16))
    return writer


@pytest.mark.parametrize("buffering", [-1, 0])  # 0: python -u
@pytest.mark.parametrize(
    "open_stream, number",
    [
        (full_disk, errno.ENOSPC),
        (closed_pipe, errno.EPIPE),
        (closed_terminal, errno.EIO),
        (full_pipe, errno.EAGAIN),
    ],
)
def test_what_cannot_be_printed_is_lost(monkeypatch, open_stream, number, buffering):
    descriptor = open_stream()
    with pytest.raises(OSError) as failure:
        os.write(descriptor, b"x" * 2**16)
    assert failure.value.errno == number
    for name in ("stdout", "stderr"):
        file = open(descriptor, "wb", buffering, closefd=False)
        monkeypatch.setattr(sys, name, io.TextIOWrapper(file, "ascii", write_through=buffering == 0))
    guard_streams()
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            say("1 \u00b1 2" * 10_000, file=stream)
        stream.flush()
        stream.close()
    os.close(descriptor)


def test_lines_come_through_as_soon_as_they_can(monkeypatch):
    """Each at once, though it is no terminal; what the encoding lacks becomes a question mark."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(open(full_pipe(), "wb"), "ascii"))
    guard_streams()
    say("lost")
    os.read(unread, 2**20)
    say("1 \u00b1 2")
    assert os.read(unread, 100) == b"1 ? 2\n"


def test_run_without_standard_streams(tmp_path):
    """All closed: /dev/null takes their numbers, which checkpoints or sockets would else have; with W&B and video."""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, ROOT / "dqn_atari.py", *SHORT.split()]
    command += "--total-timesteps 1000000 --eval-frequency 800 --video-length 5 --checkpoint-minutes 0.001".split()
    process = subprocess.Popen(command, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/videos/*.mp4")), process)  # a checkpoint stands before it
    assert [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    process.terminate()
    assert process.wait(timeout=300) == -signal.SIGTERM
    assert torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] >= 80
    assert next(run_folder(tmp_path).glob("videos/*.mp4")).stat().st_size > 1000
    assert wandb_records(tmp_path)


# --------------------------------------------------------------------------------------------------- terminals


def start_on_terminal(command: list, folder, prepare=lambda: None) -> tuple[subprocess.Popen, int]:
    """A process with a terminal of its own, and the other end of this terminal: what is read there was printed."""
    main, terminal = pty.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        prepare()

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=take_terminal, **streams)
    os.close(terminal)
    return process, main


DQN = [sys.executable, str(ROOT / "dqn_atari.py"), *NO_EXTRAS.split()]
ENDLESS = "--total-timesteps 1000000 --checkpoint-minutes 0.05".split()


def test_closed_terminal_stops_the_run_after_a_checkpoint(tmp_path):
    process, main = start_on_terminal([*DQN, *ENDLESS], tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    os.close(main)
    assert process.wait(timeout=300) == -signal.SIGHUP
    assert_group_is_gone(process.pid)
    assert torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] % 800 != 0


def test_run_under_nohup_outlives_its_terminal(tmp_path):
    """Each line that it prints then fails, also where W&B looks at what is printed."""
    flags = [
        *SHORT.split(),
        *"--total-timesteps 500 --max-episode-frames 400 --eval-frequency 0 --no-capture-video".split(),
    ]
    no_hangup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process, main = start_on_terminal([*DQN[:2], *flags], tmp_path, no_hangup)
    assert b"runs/Breakout" in os.read(main, 1000)
    os.close(main)
    assert process.wait(timeout=300) == 0
    assert {path.name for path in run_folder(tmp_path).iterdir()} == {"checkpoint.pt", "model.pt"}
    assert "output_raw" in {record["type"] for record in wandb_records(tmp_path)}


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path):
    """... though terminals signal each process; what is said stands on lines of its own, not in the bar's."""
    script = shlex.join([*DQN, *ENDLESS])
    process, main = start_on_terminal(["bash", "-c", f"for seed in 1 2; do {script} --seed $seed; done"], tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    os.write(main, b"\x03")
    assert process.wait(timeout=300) == -signal.SIGINT
    folder = run_folder(tmp_path)  # the only one
    printed = os.read(main, 2**16).decode().replace("\r", "\n").splitlines()
    assert any(re.fullmatch(r"stopping as soon as all is saved; kill -9 \d+ stops at once", line) for line in printed)
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]
    assert f"stopped at step {step:,}; go on with: --resume runs/{folder.name}" in printed


# ----------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def handlers():
    """Puts the signal handlers back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_caught_signals_are_listed_and_do_no_more(handlers, capfd):
    """Not those that were ignored at the start; how to stop at once is said one time."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    caught = catch_signals()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
    assert caught == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    assert capfd.readouterr().err.count(f"kill -9 {os.getpid()} stops at once") == 1


ENDS = """
import atexit, os, signal, sys
import dqn_atari

atexit.register(os.write, 1, b"cleaned up ")
mains = {"code": lambda: 3, "signal": lambda: 128 + signal.SIGTERM}
mains["Ctrl-C"] = lambda: signal.raise_signal(signal.SIGINT)
for name, main in mains.items():
    child = os.fork()
    if child == 0:
        dqn_atari.main = main
        dqn_atari.run_main()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{name}: {status}", flush=True)
os._exit(0)
"""


def test_program_ends_by_its_exit_code_or_by_the_signal(tmp_path):
    """What is to be done at the exit is done; Ctrl-C before signals are caught ends it at once, without a traceback."""
    environment = os.environ | {"OMP_DISPLAY_ENV": "TRUE"}
    result = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "cleaned up code: 3\ncleaned up signal: -15\nCtrl-C: -2\n"
    openmp, rest = result.stderr.split("OPENMP DISPLAY ENVIRONMENT END\n")
    assert not rest
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in openmp  # it was set before torch was loaded
