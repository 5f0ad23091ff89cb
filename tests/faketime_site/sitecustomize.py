"""For processes under libfaketime: its version 0.9.10 breaks Python's `time.sleep` if only the wall clock is wrong."""

import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds)[0] or None
