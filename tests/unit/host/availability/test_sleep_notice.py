"""The notice that a machine goes to sleep, from commands that print what the real ones print."""

import contextlib
import ctypes
import os
import queue
import shutil
import subprocess
import sys

import pytest

from fleet_worker.exit_codes import UNAVAILABLE
from fleet_worker.host.availability import mac_sleep, probes, sleep_notice
from fleet_worker.host.availability.mac_sleep import CAN_SLEEP, HAS_POWERED_ON, WILL_SLEEP, Messages
from fleet_worker.host.availability.sleep_notice import SleepNotice, notices
from fleet_worker.host.child_process import python
from tests.unit.host.availability.test_keep_awake import INHIBIT, is_running, until

GDBUS = """Monitoring signals on object /org/freedesktop/login1 owned by org.freedesktop.login1
The name org.freedesktop.login1 is owned by :1.3
/org/freedesktop/login1: org.freedesktop.login1.Manager.SessionNew ('7', objectpath '/org/freedesktop/login1/s7')
/org/freedesktop/login1: PropertiesChanged ('Manager', {'PreparingForSleep': <true>}, @as [])
/org/freedesktop/login1: org.freedesktop.login1.Manager.PrepareForSleep (true,)
/org/freedesktop/login1: org.freedesktop.login1.Manager.PrepareForShutdown (true,)
/org/freedesktop/login1: org.freedesktop.login1.Manager.PrepareForSleep (false,)
"""
_SIGNAL = (
    "signal time=1764441012.512 sender=:1.3 -> destination=(null destination) serial=214 "
    "path=/org/freedesktop/login1; interface=org.freedesktop.login1.Manager; member=PrepareForSleep"
)
DBUS_MONITOR = f"""signal time=1764441000.105 sender=org.freedesktop.DBus -> destination=:1.88 member=NameAcquired
   string ":1.88"
{_SIGNAL}
   boolean true
{_SIGNAL}
   boolean false
"""
BUSCTL = """Monitoring bus message stream.
\u2023 Type=signal  Endian=l  Flags=1  Version=1 Cookie=214  Timestamp="Sun 2026-11-29 18:30:12.512001 UTC"
  Sender=:1.3  Path=/org/freedesktop/login1  Interface=org.freedesktop.login1.Manager  Member=PrepareForSleep
  UniqueName=:1.3
  MESSAGE "b" {
          BOOLEAN true;
  };

\u2023 Type=signal  Endian=l  Flags=1  Version=1 Cookie=220  Timestamp="Sun 2026-11-29 18:46:39.001044 UTC"
  Sender=:1.3  Path=/org/freedesktop/login1  Interface=org.freedesktop.login1.Manager  Member=PrepareForSleep
  UniqueName=:1.3
  MESSAGE "b" {
          BOOLEAN false;
  };
"""
WITHIN = 10.0


@pytest.mark.parametrize("output", [GDBUS, DBUS_MONITOR, BUSCTL], ids=["gdbus", "dbus-monitor", "busctl"])
def test_every_monitor_of_d_bus_is_understood(output):
    assert list(notices(output.splitlines())) == [True, False]


@pytest.fixture
def logind(tmp_path, monkeypatch):
    """A machine with logind: returns a function that writes what `gdbus monitor` prints next. Its `delays` are the
    calls of `systemd-inhibit`.
    """
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(probes, "FOLDERS", os.defpath)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    os.mkfifo(tmp_path / "printed")
    for name, script in (
        ("gdbus", '#!/bin/sh\necho $$ "$@" >>"$0.log"\nexec cat "${0%gdbus}printed"\n'),
        ("systemd-inhibit", INHIBIT),
    ):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)

    def calls(name):
        log = tmp_path / f"{name}.log"
        return [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []

    with contextlib.ExitStack() as ends:

        def say(text):
            if not hasattr(say, "pipe"):
                say.pipe = ends.enter_context((tmp_path / "printed").open("w"))
            say.pipe.write(text)
            say.pipe.flush()

        say.delays = lambda: calls("systemd-inhibit")
        say.monitors = lambda: calls("gdbus")
        yield say


def test_logind_waits_until_it_is_allowed_to_sleep(logind):
    heard = queue.Queue()
    notice = SleepNotice(heard.put)
    notice.start()
    until(lambda: len(logind.delays()) == 1)
    (delay,) = logind.delays()
    assert delay[1].startswith("--what=sleep --who=fleet-worker ")
    assert delay[1].endswith(" --mode=delay cat")
    lines = GDBUS.splitlines(keepends=True)
    logind("".join(lines[:-1]))
    assert heard.get(timeout=WITHIN) is True
    assert is_running(delay)
    notice.allow()
    until(lambda: not is_running(delay))
    logind(lines[-1])
    assert heard.get(timeout=WITHIN) is False
    until(lambda: len(logind.delays()) == 2)
    assert is_running(logind.delays()[1]), "for the next sleep"
    notice.close()
    until(lambda: not any(map(is_running, [*logind.delays(), *logind.monitors()])))


def test_a_monitor_that_ends_is_started_again_and_that_is_said_once(logind, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sleep_notice, "RESTART_AFTER", 0.01)
    monkeypatch.setattr(sleep_notice, "monitor_command", lambda: ["/bin/echo", f"{sleep_notice.SIGNAL} true"])
    heard = queue.Queue()
    notice = SleepNotice(heard.put)
    notice.start()
    assert [heard.get(timeout=WITHIN) for _ in range(3)] == [True] * 3
    notice.close()
    assert len(caplog.records) == 1


def test_a_system_without_a_monitor_is_said_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sleep_notice, "find_program", lambda _: None)
    monkeypatch.setattr(sys, "platform", "linux")
    notice = SleepNotice(lambda _: None)
    notice.start()
    until(lambda: caplog.records)
    notice.close()
    assert "a sleep is noticed afterwards" in caplog.text


HOLDS = """
import sys, time
from fleet_worker.host.availability.sleep_notice import SleepNotice
SleepNotice(print).start()
time.sleep(60)
"""


def test_its_processes_end_with_a_process_that_is_killed(logind):
    with subprocess.Popen(python("-c", HOLDS)) as process:
        until(lambda: logind.delays() and logind.monitors())
        running = [*logind.delays(), *logind.monitors()]
        assert all(map(is_running, running))
        process.kill()
    until(lambda: not any(map(is_running, running)))


# --- macOS


def test_a_mac_may_be_idle_but_sleeps_only_when_it_is_allowed_to():
    events = []
    messages = Messages(say=events.append, allow=events.append, wait=lambda: events.append("waits"))
    messages.receive(CAN_SLEEP, 7)
    messages.receive(WILL_SLEEP, 8)
    messages.receive(HAS_POWERED_ON, 0)
    messages.receive(0xE0000320, 0)  # begins to wake up
    assert events == [7, f"{sleep_notice.SIGNAL} true", "waits", 8, f"{sleep_notice.SIGNAL} false"]
    assert list(notices(filter(lambda event: isinstance(event, str), events))) == [True, False]


def test_elsewhere_the_process_for_macos_ends():
    code = subprocess.run(python("-m", "fleet_worker.host.availability.mac_sleep"), input=b"", timeout=30, check=False)
    assert code.returncode == UNAVAILABLE


FRAMEWORK = """
#include <stdint.h>
typedef void (*callback)(void *, uint32_t, uint32_t, void *);
static callback registered;
static void *source_of, *added;
static long allowed[4];
static int count;
const void *kCFRunLoopDefaultMode = (void *)0x123456789abc;
uint32_t IORegisterForSystemPower(void *context, void **port, callback found, uint32_t *notifier) {
    registered = found; *port = (void *)0x7fffdeadbeef; *notifier = 11; return context ? 0 : 0xf00d;
}
void *IONotificationPortGetRunLoopSource(void *port) { source_of = port; return (void *)0x7eeeeeeeeeee; }
int IOAllowPowerChange(uint32_t root, long argument) { if (root == 0xf00d) allowed[count++] = argument; return 0; }
void *CFRunLoopGetCurrent(void) { return (void *)0x7ccccccccccc; }
void CFRunLoopAddSource(void *loop, void *source, const void *mode) {
    if (loop == (void *)0x7ccccccccccc && mode == kCFRunLoopDefaultMode) added = source;
}
void CFRunLoopRun(void) {
    if (added != (void *)0x7eeeeeeeeeee || source_of != (void *)0x7fffdeadbeef) return;
    registered(0, 1, 0xE0000270, (void *)0x7aaaaaaaaaaa);
    registered(0, 1, 0xE0000280, (void *)0x7bbbbbbbbbbb);
    registered(0, 1, 0xE0000300, 0);
}
long allowed_at(int n) { return n < count ? allowed[n] : -1; }
"""
"""The functions of IOKit and Core Foundation that are called, with their types in Apple's headers. Pointers of 48 bits
show that none is cut.
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_functions_of_macos_are_called_with_their_types(tmp_path):
    (tmp_path / "framework.c").write_text(FRAMEWORK)
    library = tmp_path / "framework.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "framework.c"], check=True, timeout=60)
    framework = ctypes.CDLL(str(library))
    said = []
    mac_sleep.run(
        framework, framework, lambda allow: Messages(say=said.append, allow=allow, wait=lambda: said.append("waits"))
    )
    assert said == [f"{sleep_notice.SIGNAL} true", "waits", f"{sleep_notice.SIGNAL} false"]
    framework.allowed_at.restype = ctypes.c_long
    assert [framework.allowed_at(n) for n in range(3)] == [0x7AAAAAAAAAAA, 0x7BBBBBBBBBBB, -1]
