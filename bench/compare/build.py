"""A revision, built into a folder of its own by the interpreter that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "compare"
WORKING = "the working tree"


class BuildError(Exception):
    """A revision that is not there or cannot be built, with the end of what was said."""


def _run(command: list[str], **kwargs: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise BuildError("\n".join([" ".join(command), *said]))
    return str(done.stdout).strip()


def built(revision: str) -> tuple[str, Path]:
    """The revision's name, and a folder with its pysmooth inside; kept for later comparisons."""
    if not (ROOT / ".git").exists():
        raise BuildError(f"{ROOT} is no checkout: there are no revisions to compare")
    if revision == WORKING:
        # Copied, and built where the copy is: what is being edited stays as it is.
        name, tree = "working", WORK / "working"
        files = _run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"])
        # All but the objects, so that only what has changed is compiled again.
        for old in tree.iterdir() if tree.exists() else ():
            if old.name != "build":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for file in filter(None, files.split("\0")):
            if (ROOT / file).is_file():
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, tree / file)
        done = False
    else:
        name = _run(["git", "-C", str(ROOT), "rev-parse", "--short=12", f"{revision}^{{commit}}"])
        tree = WORK / name
        done = (tree / "lib" / "built").exists()
        if not (tree / "setup.py").exists():
            tree.mkdir(parents=True, exist_ok=True)
            archive = WORK / f"{name}.tar"
            _run(["git", "-C", str(ROOT), "archive", "-o", str(archive), name])
            shutil.unpack_archive(archive, tree)
            archive.unlink()
    if not done:
        # What is compared are steps on the CPU.
        environment = {**os.environ, "PYSMOOTH_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build", "-b", "build", "--build-lib", "lib"]
        _run(command, cwd=tree, env=environment)
        (tree / "lib" / "built").touch()
    return name, tree / "lib"
