"""Output that cannot be written, or that nobody reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robust_app.runs import ONE_THREAD


def test_a_reader_that_has_left_ends_a_run_with_a_word(tmp_path):
    command = [sys.executable, "-m", "robust_app", "train", "--epochs", "9", "--run-dir", "run"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ONE_THREAD | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("run directory")
        process.stdout.close()
        err = process.stderr.read()
        assert (
            err == "robust-app: cannot read or write (standard output was closed by who read it)\n"
        )
        assert process.wait() == 2


def printed_into(output, *arguments, processes=""):
    """Status and standard error of a command with this standard output."""
    command = [sys.executable, "-m", "robust_app", *arguments]
    done = subprocess.run(
        command,
        env=ONE_THREAD | {"WORLD_SIZE": processes, "PYTHONUNBUFFERED": ""},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [("recipes", "digits-ibp"), ("models",)])
def test_a_letter_that_a_terminal_lacks_is_shown_as_another(tmp_path, command):
    page = tmp_path / "page"
    environment = ONE_THREAD | {"PYTHONIOENCODING": "ascii"}
    with page.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "robust_app", *command], env=environment, stdout=output
        )
    assert done.returncode == 0
    assert "?" in page.read_text("ascii")


def test_how_a_user_has_letters_replaced_stays(tmp_path):
    page = tmp_path / "page"
    environment = ONE_THREAD | {"PYTHONIOENCODING": "ascii:backslashreplace"}
    command = [sys.executable, "-m", "robust_app", "recipes", "digits-ibp"]
    with page.open("wb") as output:
        subprocess.run(command, env=environment, stdout=output, check=True)
    assert b"\\u03b5" in page.read_bytes()


OUTPUTS = [("recipes",), ("recipes", "digits"), ("--version",)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("processes", ["", "2"])
@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_cannot_be_written_is_one_line_and_status_2(arguments, processes):
    with Path("/dev/full").open("w") as full:
        told = printed_into(full, *arguments, processes=processes)
    assert told == (2, "robust-app: cannot read or write (No space left on device)\n")


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_nobody_reads_is_one_line_and_status_2(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    told = printed_into(writer, *arguments)
    os.close(writer)
    assert told == (
        2,
        "robust-app: cannot read or write (standard output was closed by who read it)\n",
    )


@pytest.mark.parametrize("to", ["&-", "/dev/full"])
def test_what_is_wrong_has_its_status_where_it_cannot_be_said(to):
    command = f"exec {sys.executable} -m robust_app evaluate nowhere 2>{to}"
    done = subprocess.run(["sh", "-c", command], env=ONE_THREAD, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")
