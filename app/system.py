"""What set-up asks of the operating system. Standard library alone: it runs before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def works(program: Path, *words: str) -> bool:
    """Whether a program starts and is content."""
    try:
        return subprocess.run([program, *words], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def apt_install(package: str) -> bool:
    """Installs a Debian package where that needs no question: as root. Its own messages are not shown."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    say(f"Installing the system package {package}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    return all(
        subprocess.run(step, env=env, capture_output=True, check=False).returncode == 0
        for step in (["apt-get", "update"], install)
    )
