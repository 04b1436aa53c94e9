"""The set-up script finds a Python that really runs, and says what to do where there is none."""

import shutil
import subprocess
import sys

import pytest
from tests.support.launch import ROOT

BROKEN = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
REAL = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
OLD = "#!/bin/sh\nexit 1\n"  # what the version question gets from an older one


@pytest.fixture
def folder(tmp_path):
    """A PATH of its own with the few programs the script uses, and a virtual environment that accepts everything."""
    (tmp_path / "bin").mkdir()
    for name in ("cat", "touch"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    write(tmp_path / "venv/bin/python", "#!/bin/sh\nexit 0\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(folder, **variables):
    env = {"PATH": str(folder / "bin"), "HOME": str(folder), **variables}
    command = [shutil.which("sh"), ROOT / "tools/make_venv.sh", folder / "venv"]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def test_without_any_python_it_says_what_to_do(folder):
    write(folder / "bin/python3.12", BROKEN)
    write(folder / "bin/python3", OLD)
    done = run(folder)
    assert done.returncode == 1
    assert "No Python >= 3.12 was found that runs" in done.stderr
    assert "uv python install 3.12" in done.stderr
    assert not (folder / "venv/.installed").exists()


@pytest.mark.parametrize("place", ["bin/python3.13", ".pyenv/versions/3.12.9/bin/python", "given"])
def test_it_passes_over_what_does_not_run(place, folder):
    write(folder / "bin/python3.12", BROKEN)
    write(folder / "bin/python3", OLD)
    write(folder / place, REAL)
    done = run(folder, **({"PYTHON": str(folder / place)} if place == "given" else {}))
    assert done.returncode == 0, done.stderr
    assert f"Using Python {sys.version.split()[0]} at {folder / place}" in done.stdout
    assert (folder / "venv/.installed").exists()


def test_uv_is_asked_last(folder):
    write(folder / "elsewhere/python", REAL)
    write(folder / "bin/uv", f"#!/bin/sh\necho {folder / 'elsewhere/python'}\n")
    assert f"at {folder / 'elsewhere/python'}" in run(folder).stdout


def test_a_python_that_was_named_and_does_not_run_is_mentioned(folder):
    write(folder / "bin/python3.13", REAL)
    done = run(folder, PYTHON="/nowhere/python")
    assert done.returncode == 0
    assert "PYTHON=/nowhere/python does not run" in done.stderr


def test_make_does_nothing_the_second_time():
    """After a set-up, make has only the test command left to run."""
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("this checkout was not set up by make")
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make_venv" not in plan and "pytest" in plan
