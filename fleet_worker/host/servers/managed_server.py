"""One MLX server that `fleet-worker up` runs: when it starts, how it ends, when it starts again.

off -> starting -> serving -> stopping -> off or starting
        ^      |      |
        |      v      v
      blocked, waiting, quarantined
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import psutil

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.node_process import NEVER
from fleet_worker.host.servers import port_owner
from fleet_worker.host.servers.custody import Custody
from fleet_worker.host.servers.restart_policy import PACE, Pace, RestartPolicy
from fleet_worker.host.servers.server_command import ServerCommand
from fleet_worker.host.servers.server_output import ServerOutput
from fleet_worker.host.servers.server_port import ServerPort
from fleet_worker.host.servers.server_process import ServerProcess
from fleet_worker.host.servers.server_run import ServerRun
from fleet_worker.protocol.host_messages import ServerStatus, Stage
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a server has to end after SIGTERM."""
UNKILLABLE_AFTER = 10.0
"""Seconds after SIGKILL; what has not ended then hangs in the system, and only a restart of the host ends it."""
POLL_START, POLL_LONG_START = 0.1, 0.5
"""Seconds between two looks whether a server accepts connections, at first and when its start takes longer."""
POLL_SERVING = 2.0
"""Seconds between two looks at the memory of a server."""
LOOK_SHARE = 30.0
"""A look at the memory of thousands of processes takes long: the next one comes after so many times as long."""
POLL_ADOPTED = 0.5
"""Seconds between two looks whether a server that is no child of this process still runs."""


class ManagedServer:
    """The server of one instance, whether its process runs or not. No method waits: call `act` at the time `due`, and
    `reap` whenever a child process has ended, and before `act`.
    """

    def __init__(self, instance: str, command: ServerCommand, *, folder: Path, host: str, pace: Pace = PACE) -> None:
        self.instance = instance
        self._command = command
        self._serve_timeout = 900.0
        self._max_memory: int | None = None
        self._custody = Custody(instance, folder=folder, host=host)
        self._port = ServerPort(self._custody)
        self._policy = RestartPolicy(pace)
        self._run: ServerRun | None = None
        """None while it has no process."""
        self._output: ServerOutput | None = None
        self._wanted = False
        self._stage: Stage = "off"
        self._reason = ""
        self._former_is_known = False
        self._act_at = NEVER
        self._starts = self._deaths = 0

    @classmethod
    def of(cls, settings: Settings, instance: str, pace: Pace = PACE) -> ManagedServer:
        """Return that of an instance with `serve`."""
        command = ServerCommand.of(settings.instances[instance])
        server = cls(instance, command, folder=settings.state_dir, host=settings.host, pace=pace)
        server.configure(settings)
        return server

    # --- What it is

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do, unless its process ends before."""
        adopted = self._run is not None and self._run.process.adopted
        return min(self._act_at, time.monotonic() + POLL_ADOPTED) if adopted else self._act_at

    @property
    def gone(self) -> bool:
        """True if it is not wanted any more and has ended, or cannot be ended."""
        return not self._wanted and not self._run

    @property
    def serves(self) -> bool:
        """True if it accepts connections."""
        return self._stage == "serving"

    @property
    def status(self) -> ServerStatus:
        pid, restarts = self._run.process.pid if self._run else None, max(0, self._starts - 1)
        return ServerStatus(self.instance, self._stage, self._reason, pid, restarts, self._memory, self._deaths)

    @property
    def _memory(self) -> int | None:
        return self._run.memory if self._run else None

    @property
    def guard_fd(self) -> int:
        """A file descriptor for the node of this instance to inherit: while it holds that, the server lives on, even
        if this process is killed. Raises `OSError` if no process can be started.
        """
        return self._custody.guard().descriptor

    @property
    def restarts_from(self) -> float:
        """The time.monotonic() from which it may be restarted for a fault or its memory."""
        return self._policy.wish_allowed_at

    @property
    def wants_restart(self) -> str:
        """Why it is to be restarted now, once its requests have ended; empty if it is not."""
        if not self.serves or not self._max_memory or (self._memory or 0) <= self._max_memory:
            return ""
        if time.monotonic() < self.restarts_from:
            return ""
        return f"it uses {_size(self._memory or 0)}, more than max_memory ({_size(self._max_memory)})"

    # --- What it is told

    def start(self) -> None:
        """Start it as soon as it has no process, and forget its deaths."""
        self._wanted = True
        self._policy.forgive()
        if not self._run:
            self._plan("starting", "", 0.0)

    def stop(self, grace: float = GRACE) -> None:
        """Send SIGTERM; `act` kills it if it has not ended after `grace` seconds. It does not start again."""
        self._wanted = False
        if self._run:
            self._end(self._run, "it is stopped", grace)
        else:
            self._rest()

    def restart(self, reason: str, *, by_operator: bool = False, grace: float = GRACE) -> None:
        """Stop it and start it again. That is no death, but `restarts_from` grows, unless an operator asks for it."""
        if by_operator:
            self._policy.forgive()
        else:
            self._policy.wished(time.monotonic())
        if self._run:
            self._end(self._run, reason, grace)
        elif self._wanted and by_operator:
            self._plan("starting", reason, 0.0)

    def configure(self, settings: Settings) -> bool:
        """Take other settings for its next start; return whether it runs with another command line than theirs."""
        its = settings.instances[self.instance]
        self._command = ServerCommand.of(its)
        self._serve_timeout, self._max_memory = its.serve_timeout, its.max_memory
        return self._run is not None and self._run.process.fingerprint != self._command.fingerprint

    def kill(self) -> None:
        """Kill it with all that it has started. It does not start again."""
        self._wanted = False
        if run := self._run:
            run.ask_to_end("it is killed")
            self._kill(run)
        else:
            self._rest()

    def close(self) -> None:
        """Forget what belongs to it. Only if it is `gone`."""
        if self._output:
            self._output.close()
        self._output = None
        self._custody.close()

    # --- What happens

    def act(self) -> None:
        """Do what is due: start it, look whether it serves, or kill it."""
        now = time.monotonic()
        if not (run := self._run):
            self._start(now)
        elif run.killed:
            self._give_up(run)
        elif run.ending:
            log.warning("the server of %s did not end in time and is killed", self.instance)
            self._kill(run)
        elif self.serves:
            run.memory = run.process.memory()
            self._act_at = now + max(POLL_SERVING, LOOK_SHARE * (time.monotonic() - now))
        else:
            self._look_whether_it_serves(run, now)

    def reap(self) -> None:
        """If its process has ended, kill what that has left behind, and decide when it starts again."""
        self._custody.check()
        if not (run := self._run) or (how := run.process.how_ended()) is None:
            return
        run.process.kill()  # child processes that it has left running
        reason = run.ending or how + self._told(run)
        self._forget_process()
        if run.is_asked:
            self._stopped(reason, how)
        else:
            self._fail(reason)

    # --- Its start

    def _start(self, now: float) -> None:
        if not self._former_is_known:
            self._former_is_known = True
            if self._take_over():
                return
        if taken := self._port.taken_by(self._command):
            self._wait_for_port(taken)
            return
        self._policy.started(now)
        try:
            self._custody.guard()
            output = self._printed()
            process = ServerProcess.start(self._command, self._custody.mark, output.writer)
        except (OSError, ConfigurationError, psutil.Error) as error:
            self._fail(f"could not start: {error}")
            return
        self._run = ServerRun(process, now)
        self._custody.keep(process)
        self._starts += 1
        log.info("the server of %s starts, pid %d, on port %d", self.instance, process.pid, self._command.port)
        self._plan("starting", "it does not accept connections yet", POLL_START)

    def _take_over(self) -> bool:
        """Take over the server of an `up` that was killed; return whether there is one."""
        if not (process := self._custody.take_over()):
            return False
        now = time.monotonic()
        self._run = run = ServerRun(process, now, has_served=True)
        self._policy.started(now)
        with contextlib.suppress(OSError):  # then nobody reads what it prints
            self._printed()
        log.info("the server of %s runs already, pid %d, and is taken over", self.instance, process.pid)
        self._plan("starting", "it was started by an earlier fleet-worker up", 0.0)
        if process.fingerprint != self._command.fingerprint:
            self._end(run, "its command line has changed", GRACE)
        return True

    def _wait_for_port(self, taken: str) -> None:
        if not self._port.blocks:
            self._plan("starting", taken, self._port.pause)
            return
        if (self._stage, self._reason) != ("blocked", taken):
            text = "the server of %s cannot start: %s; end that, or set another %s"
            log.error(text, self.instance, taken, self._command.port_setting)
        self._plan("blocked", taken, self._port.pause)

    def _look_whether_it_serves(self, run: ServerRun, now: float) -> None:
        command, seconds = self._command, now - run.started_at
        if port_owner.accepts(command.host, command.port):
            if stranger := self._port.stranger(command, run.process):
                self._end(run, stranger, GRACE)
                return
            log.info("the server of %s accepts connections, %.1f s after its start", self.instance, seconds)
            run.has_served = True
            self._policy.served(now)
            self._plan("serving", "", 0.0)
        elif seconds >= self._serve_timeout:
            run.ending = f"accepted no connection on port {command.port} within {self._serve_timeout:g} s"
            log.warning("the server of %s %s and is killed", self.instance, run.ending)
            self._kill(run)
        else:
            self._act_at = now + min(POLL_LONG_START, max(POLL_START, seconds / 20))

    # --- Its end

    def _end(self, run: ServerRun, reason: str, grace: float) -> None:
        """Send SIGTERM, once."""
        if run.ask_to_end(reason):
            log.info("the server of %s is told to end within %g s: %s", self.instance, grace, reason)
            self._plan("stopping", reason, grace)
            run.process.terminate()

    def _stopped(self, reason: str, how: str) -> None:
        log.info("the server of %s %s", self.instance, how)
        self._policy.stopped(time.monotonic())
        if self._wanted:
            self._plan("starting", reason, 0.0)
        else:
            self._rest()

    def _fail(self, how: str) -> None:
        """Count a death, and plan the next start."""
        pause = self._policy.died(time.monotonic())
        self._deaths += 1
        if not self._wanted:
            self._rest()
            return
        when = f"starts again in {pause:g} s" if pause else "starts again at once"
        log.warning("the server of %s %s; %s", self.instance, how, when)
        if self._policy.quarantined:
            log.error("the server of %s has died too often: it is tried every %g s only", self.instance, pause)
        self._plan("quarantined" if self._policy.quarantined else "waiting", how, pause)

    def _kill(self, run: ServerRun) -> None:
        run.killed = True
        self._plan("stopping", run.ending, UNKILLABLE_AFTER)
        run.process.kill()

    def _give_up(self, run: ServerRun) -> None:
        """SIGKILL did not end it."""
        log.error("the server of %s, pid %d, cannot be killed: restart this host", self.instance, run.process.pid)
        self._forget_process()
        self._fail("cannot be killed")

    def _forget_process(self) -> None:
        self._run = None
        self._custody.release()

    def _printed(self) -> ServerOutput:
        """Return where it prints to, as for a server that has printed nothing yet."""
        self._output = self._output or ServerOutput(self.instance, self._custody.output_path)
        self._output.begin(self._command.secrets)
        return self._output

    def _told(self, run: ServerRun) -> str:
        """Return the last lines that it printed before it served anybody. Later ones could hold a part of a prompt: the
        log of this host has them, and nobody else gets them.
        """
        lines = self._output.last_lines() if self._output else []
        return ": " + " | ".join(line.strip() for line in lines[-3:])[-300:] if lines and not run.has_served else ""

    def _rest(self) -> None:
        self._stage, self._reason, self._act_at = "off", "", NEVER

    def _plan(self, stage: Stage, reason: str, pause: float) -> None:
        self._stage, self._reason, self._act_at = stage, reason, time.monotonic() + pause


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
