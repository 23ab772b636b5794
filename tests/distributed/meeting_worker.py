"""A rank that joins the others as torchrun says. Usage: meeting_worker.py SECONDS_LATE"""

from __future__ import annotations

import sys
import time

from exgrpo_fast.core.process_group import joined
from exgrpo_fast.core.torchrun import place_of

if __name__ == "__main__":
    time.sleep(float(sys.argv[1]))
    with joined(place_of(), "cpu") as processes:
        print(processes.gather(processes.place.rank))
