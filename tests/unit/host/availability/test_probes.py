"""What is read from the outputs of each system, as its manual pages and its users show them."""

import contextlib
import logging
import math
import os
import time
from collections import namedtuple

import psutil
import pytest

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability import linux, macos, probes
from fleet_worker.host.availability.probes import (
    MemoryPressure,
    ProbeFailed,
    Thermal,
    find_program,
    on_power,
    output_of,
)
from fleet_worker.host.availability.readings import Reader, Readings
from tests.clock import Clock

IOREG = """
+-o Root  <class IORegistryEntry, id 0x100000100, retain 32>
  +-o J274AP  <class IOPlatformExpertDevice, id 0x100000227, registered, matched, active, busy 0 (18 ms), retain 39>
    +-o IOResources  <class IOResources, id 0x100000118, registered, matched, active, busy 0 (9 ms), retain 38>
      +-o IOHIDSystem  <class IOHIDSystem, id 0x1000003c1, registered, matched, active, busy 0 (0 ms), retain 14>
        | {
        |   "IOClass" = "IOHIDSystem"
        |   "HIDParameters" = {"HIDClickTime"=500000000,"HIDFKeyMode"=1,"HIDScrollZoomModifierMask"=0}
        |   "HIDIdleTime" = 12345678901
        |   "IOMatchedAtBoot" = Yes
        | }
"""
THERM_INTEL = """
Note: No thermal warning level has been recorded
2026-05-07 12:17:19 +0200 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= {limit}
"""
THERM_APPLE = """
Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
PSI = """some avg10={some} avg60=0.00 avg300=0.00 total=1714800
full avg10={full} avg60=0.00 avg300=0.00 total=1126453
"""
SESSIONS = """ 2 1000 anna seat0 2711 user    tty2  no -
c1  120 gdm  seat0 1411 greeter tty1  no -
 7 1000 anna -     3902 user    pts/3 no -
"""
DESKTOP = {"Class": "user", "Type": "wayland", "TTY": "tty2", "State": "active", "LockedHint": "no"}
DESKTOP |= {"IdleHint": "no", "IdleSinceHintMonotonic": "0"}
GREETER = DESKTOP | {"Class": "greeter", "TTY": "tty1"}
REMOTE = DESKTOP | {"Type": "tty", "TTY": "pts/3"}


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Returns a function that makes commands of the system out of the texts that they print."""
    monkeypatch.setattr(probes, "FOLDERS", "")
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(**programs):
        for name, printed in programs.items():
            path = tmp_path / name.replace("_", "-")
            script = printed if printed.startswith("#!") else f"#!/bin/sh\n/bin/cat <<'END'\n{printed.strip()}\nEND\n"
            path.write_text(script, "utf-8")
            path.chmod(0o755)

    return install


# --- Both systems

Battery = namedtuple("Battery", "power_plugged")


@pytest.mark.parametrize(("battery", "answer"), [(None, True), (Battery(True), True), (Battery(False), False)])
def test_a_machine_without_a_battery_is_on_power(battery, answer, monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert on_power() is answer


def test_a_battery_of_which_nothing_is_known_is_no_answer(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(None), raising=False)
    with pytest.raises(ProbeFailed, match="does not tell"):
        on_power()


def test_a_command_that_is_not_there_fails_or_hangs_is_a_failed_probe(system, monkeypatch):
    monkeypatch.setattr(probes, "TIMEOUT", 0.1)
    system(fails="#!/bin/sh\nexit 3\n", hangs="#!/bin/sh\nexec /bin/sleep 60\n", says="yes")
    for command, why in [("missing", "not there"), ("fails", "exit code 3"), ("hangs", "not answer within 0.1 s")]:
        with pytest.raises(ProbeFailed, match=why):
            output_of(command)
    assert output_of("says") == "yes\n"


def test_commands_of_the_system_are_found_with_the_short_path_of_launchd(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program("cat") in ("/usr/bin/cat", "/bin/cat")


# --- macOS


def test_the_idle_time_of_a_mac_is_that_of_its_keyboard_and_mouse(system):
    system(ioreg=IOREG)
    assert macos.MacProbes().idle_seconds() == pytest.approx(12.345678901)
    with pytest.raises(ProbeFailed, match="HIDIdleTime"):
        macos.idle_seconds("")


@pytest.mark.parametrize(
    ("printed", "level"), [("1", MemoryPressure.NORMAL), ("2", MemoryPressure.WARNING), ("4", MemoryPressure.CRITICAL)]
)
def test_the_memory_pressure_of_a_mac_is_that_of_its_kernel(printed, level, system):
    system(sysctl=printed)
    assert macos.MacProbes().memory_pressure() == level


@pytest.mark.parametrize("printed", ["", "3", "sysctl: unknown oid"])
def test_another_level_is_no_answer(printed, system):
    system(sysctl=printed)
    with pytest.raises(ValueError, match=r"MemoryPressure|invalid literal"):
        macos.MacProbes().memory_pressure()


@pytest.mark.parametrize("number", range(5))
def test_the_thermal_pressure_of_a_mac_is_what_it_publishes(number, system):
    system(notifyutil=f"com.apple.system.thermalpressurelevel {number}", pmset=THERM_INTEL.format(limit=10))
    assert macos.MacProbes().thermal() == Thermal(number)


@pytest.mark.parametrize(("limit", "level"), [(100, Thermal.NOMINAL), (70, Thermal.HEAVY)])
def test_without_it_a_processor_that_is_slowed_down_is_hot(limit, level, system):
    system(pmset=THERM_INTEL.format(limit=limit))
    assert macos.MacProbes().thermal() == level


def test_on_a_mac_that_tells_neither_there_is_no_answer(system):
    system(notifyutil="com.apple.system.thermalpressurelevel: failed", pmset=THERM_APPLE)
    with pytest.raises(ProbeFailed, match="neither"):
        macos.MacProbes().thermal()


# --- Linux


@pytest.fixture
def users(monkeypatch):
    """Returns a function that sets the terminals in which somebody is logged in, as `w` knows them."""
    User = namedtuple("User", "terminal")

    def set_users(*terminals):
        monkeypatch.setattr(psutil, "users", lambda: [User(terminal) for terminal in terminals])

    set_users()
    return set_users


def properties(*sessions):
    return "\n\n".join("\n".join(f"{name}={value}" for name, value in session.items()) for session in sessions)


def logind(*sessions):
    """`loginctl` on a machine with these sessions."""
    return f"""#!/bin/sh
case $1 in
list-sessions) /bin/cat <<'END'
{SESSIONS}
END
;;
show-session) [ "$2 $3 $4" = "2 c1 7" ] && /bin/cat <<'END'
{properties(*sessions)}
END
esac
"""


def idle_for(seconds):
    return {"IdleHint": "yes", "IdleSinceHintMonotonic": str(int((time.monotonic() - seconds) * 1e6))}


def terminal(root, name, seconds):
    file = root / "dev" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time.time() - seconds, time.time()))


@pytest.mark.parametrize(
    ("desktop", "idle"),
    [
        (DESKTOP, 0.0),
        (DESKTOP | {"LockedHint": "yes"}, math.inf),
        (DESKTOP | {"State": "closing"}, math.inf),
        (DESKTOP | {"Class": "background"}, math.inf),
    ],
)
def test_a_desktop_tells_logind_since_when_it_is_idle(desktop, idle, system, users, tmp_path):
    system(loginctl=logind(desktop, GREETER))
    assert linux.LinuxProbes(tmp_path).idle_seconds() == pytest.approx(idle, abs=30)


def test_a_desktop_that_nobody_uses_tells_logind_since_when(system, users, tmp_path):
    system(loginctl=logind(DESKTOP | idle_for(500), GREETER))
    assert linux.LinuxProbes(tmp_path).idle_seconds() == pytest.approx(500, abs=30)


def test_a_terminal_is_idle_since_somebody_has_typed_there(system, users, tmp_path):
    system(loginctl=logind(DESKTOP | idle_for(5000), GREETER, REMOTE))
    users("pts/4", ":0")
    terminal(tmp_path, "pts/3", 700)
    terminal(tmp_path, "pts/4", 900)
    terminal(tmp_path, "tty2", 1)  # of the desktop: only logind knows
    assert linux.LinuxProbes(tmp_path).idle_seconds() == pytest.approx(700, abs=30)
    terminal(tmp_path, "pts/4", 0)
    assert linux.LinuxProbes(tmp_path).idle_seconds() == pytest.approx(0, abs=30)


def test_without_logind_the_terminals_tell(system, users, tmp_path):
    users("pts/4")
    terminal(tmp_path, "pts/4", 900)
    assert linux.LinuxProbes(tmp_path).idle_seconds() == pytest.approx(900, abs=30)


def test_without_logind_and_terminals_there_is_no_answer(system, users, tmp_path):
    with pytest.raises(ProbeFailed, match="loginctl is not there"):
        linux.LinuxProbes(tmp_path).idle_seconds()


def test_with_logind_and_no_session_nobody_is_there(system, users, tmp_path):
    system(loginctl="#!/bin/sh\n[ $1 = list-sessions ]\n")
    assert linux.LinuxProbes(tmp_path).idle_seconds() == math.inf


@pytest.mark.parametrize(
    ("some", "full", "level"),
    [("0.00", "0.00", 1), ("9.99", "9.99", 1), ("10.00", "0.00", 2), ("60.5", "9.99", 2), ("60.5", "22.10", 4)],
)
def test_the_memory_pressure_of_linux_is_the_time_lost_for_it(some, full, level, tmp_path):
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").write_text(PSI.format(some=some, full=full))
    assert linux.LinuxProbes(tmp_path).memory_pressure() == MemoryPressure(level)


@pytest.mark.parametrize(("available", "level"), [(50, 1), (10, 1), (9, 2), (5, 2), (4, 4)])
def test_a_kernel_that_does_not_measure_it_tells_how_much_is_available(available, level, tmp_path, monkeypatch):
    Memory = namedtuple("Memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(available, 100))
    assert linux.LinuxProbes(tmp_path).memory_pressure() == MemoryPressure(level)


def zone(root, number, temperature, **limits):
    folder = root / f"sys/class/thermal/thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "temp").write_text(f"{temperature * 1000:.0f}\n")
    for place, (name, limit) in enumerate(limits.items()):
        (folder / f"trip_point_{place}_type").write_text(f"{name}\n")
        (folder / f"trip_point_{place}_temp").write_text(f"{limit * 1000:.0f}\n")


@pytest.mark.parametrize(
    ("temperature", "limits", "level"),
    [
        (40, {"active": 30, "passive": 90, "critical": 105}, Thermal.NOMINAL),
        (81, {"passive": 90, "critical": 105}, Thermal.MODERATE),
        (90, {"passive": 90, "critical": 105}, Thermal.HEAVY),
        (105, {"passive": 90, "critical": 105}, Thermal.TRAPPING),
        (101, {"passive": 0, "hot": 100}, Thermal.TRAPPING),
    ],
)
def test_the_heat_of_linux_is_held_against_the_limits_of_its_sensors(temperature, limits, level, tmp_path):
    zone(tmp_path, 0, 20, critical=105)
    zone(tmp_path, 1, temperature, **limits)
    assert linux.LinuxProbes(tmp_path).thermal() == level


def test_a_machine_without_sensors_has_no_answer(tmp_path):
    zone(tmp_path, 0, 99)
    with pytest.raises(ProbeFailed, match="no sensor"):
        linux.LinuxProbes(tmp_path).thermal()


def test_a_sensor_that_is_off_counts_for_nothing(tmp_path):
    zone(tmp_path, 0, 99, critical=105)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    with pytest.raises(ProbeFailed, match="no sensor"):
        linux.LinuxProbes(tmp_path).thermal()


# --- Readings


class Answers:
    """Probes that count how often they are asked, and fail if their answer is an error."""

    def __init__(self, **answers):
        self.answers = {
            "on_power": True,
            "idle_seconds": 9.0,
            "memory_pressure": MemoryPressure.NORMAL,
            "thermal": Thermal.NOMINAL,
        }
        self.answers |= answers
        self.asked = dict.fromkeys(self.answers, 0)

    def __getattr__(self, name):
        def probe():
            self.asked[name] += 1
            if isinstance(answer := self.answers[name], Exception):
                raise answer
            return answer

        return probe


ALL = AvailabilitySettings(idle_user=300, only_on_power=True, max_memory_pressure="normal", max_thermal="heavy")


def test_only_what_the_settings_need_is_asked():
    answers = Answers()
    assert Reader(AvailabilitySettings(hours="sat", only_on_power=True), answers).read() == Readings(on_power=True)
    assert answers.asked == {"on_power": 1, "idle_seconds": 0, "memory_pressure": 0, "thermal": 0}


def test_the_user_is_looked_for_each_time_and_all_else_now_and_then():
    answers, clock = Answers(), Clock(100.0)
    reader = Reader(ALL, answers, period=5.0, clock=clock)
    for _ in range(10):
        assert reader.read() == Readings(9.0, True, MemoryPressure.NORMAL, Thermal.NOMINAL)
        clock.now += 1.0
    assert answers.asked == {"on_power": 2, "idle_seconds": 10, "memory_pressure": 2, "thermal": 2}


@pytest.mark.parametrize(
    "error", [ProbeFailed("ioreg is not there"), OSError(13, "denied"), ValueError("x"), RuntimeError("y")]
)
def test_what_cannot_be_read_is_said_once(error, caplog):
    answers, clock = Answers(idle_seconds=error, thermal=error), Clock()
    reader = Reader(ALL, answers, clock=clock)
    for _ in range(20):
        assert reader.read() == Readings(None, True, MemoryPressure.NORMAL, None)
        clock.now += 1.0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "availability.max_thermal has no effect" in caplog.text
    assert "availability.idle_user has no effect" in caplog.text


def test_the_probes_of_this_machine_answer_or_fail():
    for name in ("idle_seconds", "memory_pressure", "thermal", "on_power"):
        with contextlib.suppress(ProbeFailed, OSError):
            assert getattr(linux.LinuxProbes(), name)() >= 0
