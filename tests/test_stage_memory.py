"""The peak of a process's memory is its own."""

import subprocess
import sys

from tasks.stage.memory import peak_memory

TELL = "from tasks.stage.memory import peak_memory; print(peak_memory())"
LARGE = 400 * 2**20


def test_the_peak_stays_when_the_memory_is_given_back_and_is_not_handed_to_children() -> None:
    before = peak_memory()
    held = bytearray(LARGE)
    for at in range(0, LARGE, 4096):
        held[at] = 1
    del held
    assert peak_memory() >= max(before, LARGE)
    told = subprocess.run([sys.executable, "-c", TELL], check=True, capture_output=True, text=True)
    assert 2**20 < int(told.stdout) < LARGE
