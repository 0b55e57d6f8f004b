"""Searches that are killed, and go on, end with the bytes of a search that never was."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and ends its children with their parent")
def test_twelve_kills_at_random_and_four_at_named_files() -> None:
    """A process of its own: 12 kills at random moments, then within the ticket's writing, a snapshot's, a mask's."""
    program = str(Path(__file__).parent / "kill.py")
    command = [sys.executable, program, "--kills", "12", "--seed", "7", "--named", "--iterations", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 kills in" in done.stdout and "FAULT" not in done.stdout
    for kind in ("eager, ticket.safetensors within", "eager, state/00-0.safetensors within", "at a random time"):
        assert kind in done.stdout, done.stdout
