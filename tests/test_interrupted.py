"""Ctrl-C while torch is still loading: one line where the command line was called, a traceback in any other program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import halfstep as hs
from halfstep.interrupted import is_command

SOURCE = Path(hs.__file__).parents[1]
#: As the installed command is written.
SCRIPT = "import sys\nfrom halfstep.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def interrupted(folder, *arguments):
    """A process whose torch is interrupted as it loads."""
    # A shell's background jobs ignore the signal, and so would this process.
    (folder / "torch.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    path = os.pathsep.join([str(folder), str(SOURCE)])
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


@pytest.mark.parametrize(
    "arguments", [("-m", "halfstep", "demo"), ("-m", "halfstep.cli"), ("halfstep", "demo")]
)
def test_the_command_line_ends_in_one_line(arguments, tmp_path):
    (tmp_path / "halfstep").write_text(SCRIPT)
    done = interrupted(tmp_path, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_any_other_program_has_its_traceback(tmp_path):
    done = interrupted(tmp_path, "-c", "import halfstep")
    assert done.returncode == -signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("argv", "original", "so"),
    [
        (["-m"], ["python", "-m", "halfstep", "demo"], True),
        (["-m"], ["python", "-u", "-m", "halfstep"], True),
        (["-m"], ["python", "-m", "train"], False),
        (["C:\\bin\\halfstep.exe"], ["halfstep.exe"], True),
        (["bench/halfstep.py"], ["python", "bench/halfstep.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_the_command_line_is_told_from_programs_that_import_the_package(argv, original, so):
    assert is_command(argv, original) is so
