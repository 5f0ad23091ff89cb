"""One MLX server that `fleet-worker up` runs: when it starts, how it ends, when it starts again.

off -> starting -> serving -> stopping -> off
          ^  |        |          |
          |  v        v          v
          +- waiting, quarantined, blocked
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from pathlib import Path

import psutil

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import file_name
from fleet_worker.host.node_process import NEVER
from fleet_worker.host.servers import port_owner, server_record
from fleet_worker.host.servers.guard import Guard, end_guard
from fleet_worker.host.servers.process_family import is_marked, kill_all, marked
from fleet_worker.host.servers.restart_policy import Pace, RestartPolicy
from fleet_worker.host.servers.server_command import ServerCommand
from fleet_worker.host.servers.server_output import ServerOutput
from fleet_worker.host.servers.server_process import ServerProcess
from fleet_worker.host.servers.server_record import Identity, ServerRecord
from fleet_worker.protocol.host_messages import ServerStatus, Stage
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a server has to end after SIGTERM."""
UNKILLABLE_AFTER = 10.0
"""Seconds after SIGKILL; what has not ended then hangs in the system, and only a restart of the host ends it."""
POLL_START = 0.1
"""Seconds between two looks whether a server that starts accepts connections."""
POLL_SERVING = 5.0
"""Seconds between two looks at the memory of a server."""
POLL_ADOPTED = 0.5
"""Seconds between two looks whether a server that is no child of this process still runs."""
POLL_BLOCKED = 3.0
"""Seconds between two looks whether a port is free again."""
PATIENT_LOOKS = 3
"""Looks at a port that is taken before that is told: a process that is ending frees it within a second."""
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""The value of a variable that has one of these in its name is hidden where the server prints it."""


class ManagedServer:
    """The server of one instance, whether its process runs or not. No method waits: call `act` at the time `due`, and
    `reap` whenever a child process has ended, and before `act`.
    """

    def __init__(
        self,
        instance: str,
        command: ServerCommand,
        *,
        folder: Path,
        host: str,
        serve_timeout: float = 900.0,
        max_memory: int | None = None,
        pace: Pace = Pace(),  # noqa: B008 - it is frozen
    ) -> None:
        self.instance = instance
        self._command = command
        self._serve_timeout = serve_timeout
        self._max_memory = max_memory
        name = file_name(f"{instance}@{host}")
        self._record_path = folder / f"server-{name}.json"
        self._output_path = folder / f"server-{name}.out"
        self._owner = hashlib.sha256(f"{folder.resolve()} {name}".encode()).hexdigest()[:16]
        """What begins the mark of all servers of this instance, whichever `up` has started them."""
        self._mark = f"{self._owner}/{secrets.token_hex(8)}"
        self._policy = RestartPolicy(pace)
        self._process: ServerProcess | None = None
        self._guard: Guard | None = None
        self._output: ServerOutput | None = None
        self._wanted = False
        self._stage: Stage = "off"
        self._reason = ""
        self._former_is_known = False
        self._started_at = 0.0
        self._act_at = NEVER
        self._killed = False
        self._stopping = ""
        """Why it is being stopped; empty if it is not."""
        self._overdue = ""
        """Why it was killed while it started; empty if it was not."""
        self._starts = self._deaths = 0
        self._looks = 0
        """The number of looks at its port since that was taken by another process."""
        self._memory: int | None = None

    @classmethod
    def of(cls, settings: Settings, instance: str, pace: Pace = Pace()) -> ManagedServer:  # noqa: B008 - it is frozen
        """Return that of an instance with `serve`."""
        its = settings.instances[instance]
        command, folder = ServerCommand.of(its), settings.state_dir
        timeout, memory = its.serve_timeout, its.max_memory
        return cls(
            instance,
            command,
            folder=folder,
            host=settings.host,
            serve_timeout=timeout,
            max_memory=memory,
            pace=pace,
        )

    # --- What it is

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do, unless its process ends before."""
        adopted = self._process is not None and self._process.adopted
        return min(self._act_at, time.monotonic() + POLL_ADOPTED) if adopted else self._act_at

    @property
    def gone(self) -> bool:
        """True if it is not wanted any more and has ended, or cannot be ended."""
        return not self._wanted and not self._process

    @property
    def serves(self) -> bool:
        """True if it accepts connections."""
        return self._stage == "serving"

    @property
    def status(self) -> ServerStatus:
        pid = self._process.pid if self._process else None
        return ServerStatus(
            self.instance, self._stage, self._reason, pid, max(0, self._starts - 1), self._memory, self._deaths
        )

    @property
    def guard_fd(self) -> int:
        """A file descriptor for the node of this instance to inherit: while it holds that, the server lives on, even
        if this process is killed. Raises `OSError` if no process can be started.
        """
        return self._guarded().descriptor

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
        if not self._process:
            self._plan("starting", "", 0.0)

    def stop(self, grace: float = GRACE) -> None:
        """Send SIGTERM; `act` kills it if it has not ended after `grace` seconds. It does not start again."""
        self._wanted = False
        if self._process:
            self._end("it is stopped", grace)
        else:
            self._stage, self._reason, self._act_at = "off", "", NEVER

    def restart(self, reason: str, *, by_operator: bool = False, grace: float = GRACE) -> None:
        """Stop it and start it again. That is no death, but `restarts_from` grows, unless an operator asks for it."""
        if by_operator:
            self._policy.forgive()
        else:
            self._policy.wished(time.monotonic())
        if self._process:
            self._end(reason, grace)
        elif self._wanted and by_operator:
            self._plan("starting", reason, 0.0)

    def configure(self, settings: Settings) -> bool:
        """Take other settings for its next start; return whether it runs with another command line than theirs."""
        its = settings.instances[self.instance]
        self._command = ServerCommand.of(its)
        self._serve_timeout, self._max_memory = its.serve_timeout, its.max_memory
        return self._process is not None and self._process.fingerprint != self._command.fingerprint

    def kill(self) -> None:
        """Kill it with all that it has started."""
        if self._process:
            self._killed = True
            self._act_at = time.monotonic() + UNKILLABLE_AFTER
            self._process.kill()

    def close(self) -> None:
        """Forget what belongs to it. Only if it is `gone`."""
        if self._guard:
            self._guard.close()
        if self._output:
            self._output.close()
        self._guard = self._output = None

    # --- What happens

    def act(self) -> None:
        """Do what is due: start it, look whether it serves, or kill it."""
        now = time.monotonic()
        if not self._process:
            self._start(now)
        elif self._killed:
            self._give_up()
        elif self._stopping:
            log.warning("the server of %s did not end in time and is killed", self.instance)
            self.kill()
        elif self.serves:
            self._measure(now)
        else:
            self._look_whether_it_serves(now)

    def reap(self) -> None:
        """If its process has ended, kill what that has left behind, and decide when it starts again."""
        if self._guard and self._guard.ended:
            log.warning("somebody has killed the guard of the server of %s, another one starts", self.instance)
            self._guard.close()
            self._guard = None
            if self._process:
                self._watch(self._process)
        if not self._process or (how := self._process.how_ended()) is None:
            return
        self._process.kill()  # child processes that it has left running
        self._forget_process()
        if self._stopping:
            self._stopped(how)
        else:
            self._fail(self._overdue or how + self._told())

    # --- Its start

    def _start(self, now: float) -> None:
        if not self._former_is_known:
            self._former_is_known = True
            if self._take_over():
                return
        if port_owner.is_taken(self._command.host, self._command.port):
            self._block()
            return
        self._started_at = now
        self._policy.started(now)
        self._looks = 0
        try:
            self._guarded()
            output = self._printed()
            self._process = ServerProcess.start(self._command, self._mark, output.writer)
        except (OSError, ConfigurationError, psutil.Error) as error:
            self._fail(f"could not start: {error}")
            return
        self._watch(self._process)
        self._starts += 1
        log.info("the server of %s starts, pid %d, on port %d", self.instance, self._process.pid, self._command.port)
        self._plan("starting", "it does not accept connections yet", POLL_START)

    def _take_over(self) -> bool:
        """Take over the server of an `up` that was killed, and end what is left of one that has no leader any more;
        return whether there is a server now.
        """
        record = server_record.read(self._record_path)
        former = record.server.process() if record else None
        if record and (guard := record.guard.process()):
            end_guard(guard)  # it would end the server with the node of that `up`
        if not record or not former:
            kill_all(marked(self._owner))
            return False
        self._mark = record.mark
        self._started_at = time.monotonic()
        self._process = ServerProcess.adopt(former, record.mark, record.fingerprint)
        with contextlib.suppress(OSError):
            self._printed()
        self._watch(self._process)
        log.info("the server of %s runs already, pid %d, and is taken over", self.instance, former.pid)
        self._plan("starting", "it was started by an earlier fleet-worker up", 0.0)
        if record.fingerprint != self._command.fingerprint:
            self._end("its command line has changed", GRACE)
        return True

    def _watch(self, process: ServerProcess) -> None:
        """Have it end with this process, and let the next `up` know of it."""
        try:
            guard = self._guarded()
            guard.watch(process.pid, process.mark)
            identity, of_guard = Identity.of(process.pid), Identity.of(guard.pid)
            record = ServerRecord(identity, of_guard, process.fingerprint, process.mark)
            server_record.write(self._record_path, record)
        except (OSError, psutil.Error) as error:
            problem = f"its state cannot be written to {self._record_path}: {error}"
            log.warning("the server of %s cannot be taken over by another fleet-worker up: %s", self.instance, problem)

    def _block(self) -> None:
        """Another process has its port. If that is one of ours, which may be ending just now, kill it; wait for the end
        of any other one.
        """
        owner = port_owner.owner(self._command.port)
        reason = f"port {self._command.port} is in use by {port_owner.described(owner)}"
        if owner and self._is_ours(owner):
            kill_all([owner])
            reason += ", which an earlier server has left behind"
        self._looks += 1
        if self._looks <= PATIENT_LOOKS:
            self._plan("starting", reason, POLL_START * 2**self._looks)
            return
        if (self._stage, self._reason) != ("blocked", reason):
            log.error("the server of %s cannot start: %s; end that, or set another base_url", self.instance, reason)
        self._plan("blocked", reason, POLL_BLOCKED)

    def _is_strange(self, owner: psutil.Process | None) -> bool:
        return owner is not None and not self._is_ours(owner)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return is_marked(process, self._owner)
        except (psutil.Error, OSError):
            return False

    def _look_whether_it_serves(self, now: float) -> None:
        process, command = self._process, self._command
        if process and port_owner.accepts(command.host, command.port):
            if process.holds(command.port) is False and self._is_strange(owner := port_owner.owner(command.port)):
                self._end(f"port {command.port} is in use by {port_owner.described(owner)}", GRACE)
                return
            log.info(
                "the server of %s accepts connections, %.1f s after its start", self.instance, now - self._started_at
            )
            self._policy.served(now)
            self._plan("serving", "", 0.0)
        elif now - self._started_at >= self._serve_timeout:
            self._overdue = f"accepted no connection within {self._serve_timeout:g} s"
            log.warning("the server of %s %s and is killed", self.instance, self._overdue)
            self.kill()
        else:
            self._act_at = now + POLL_START

    # --- While it serves

    def _measure(self, now: float) -> None:
        if self._process:
            self._memory = self._process.memory()
            self._act_at = now + POLL_SERVING

    # --- Its end

    def _end(self, reason: str, grace: float) -> None:
        """Send SIGTERM, once."""
        if self._process and not self._stopping:
            log.info("the server of %s is told to end within %g s: %s", self.instance, grace, reason)
            self._stopping = reason
            self._plan("stopping", reason, grace)
            self._process.terminate()

    def _stopped(self, how: str) -> None:
        log.info("the server of %s %s", self.instance, how)
        self._policy.stopped(time.monotonic())
        reason, self._stopping, self._overdue = self._stopping, "", ""
        if self._wanted:
            self._plan("starting", reason, 0.0)
        else:
            self._stage, self._reason, self._act_at = "off", "", NEVER

    def _fail(self, how: str) -> None:
        """Count a death, and plan the next start."""
        pause = self._policy.died(time.monotonic())
        self._overdue = ""
        self._deaths += 1
        if not self._wanted:
            self._stage, self._reason, self._act_at = "off", "", NEVER
            return
        when = f"starts again in {pause:g} s" if pause else "starts again at once"
        log.warning("the server of %s %s; %s", self.instance, how, when)
        if self._policy.quarantined:
            log.error("the server of %s has died too often: it is tried every %g s only", self.instance, pause)
        self._plan("quarantined" if self._policy.quarantined else "waiting", how, pause)

    def _told(self) -> str:
        """Return the last lines that it printed before it served anybody. Later ones could hold a part of a prompt: the
        log of this host has them, and nobody else gets them.
        """
        lines = self._output.last_lines() if self._output else []
        if self.serves or not lines:
            return ""
        return ": " + " | ".join(lines[-3:])[-300:]

    def _give_up(self) -> None:
        """SIGKILL did not end it."""
        if self._process:
            log.error("the server of %s, pid %d, cannot be killed: restart this host", self.instance, self._process.pid)
            self._forget_process()
            self._fail("cannot be killed")

    def _forget_process(self) -> None:
        self._process, self._killed, self._memory = None, False, None
        if self._guard:
            self._guard.release()
        with contextlib.suppress(OSError):
            self._record_path.unlink()

    # --- What belongs to it

    def _guarded(self) -> Guard:
        self._guard = self._guard or Guard()
        return self._guard

    def _printed(self) -> ServerOutput:
        self._output = self._output or ServerOutput(self.instance, self._output_path)
        variables = self._command.variables.items()
        hidden = [text for name, text in variables if any(word in name.upper() for word in SECRET) and len(text) > 5]
        self._output.secrets = tuple(hidden)
        self._output.forget()
        return self._output

    def _plan(self, stage: Stage, reason: str, pause: float) -> None:
        self._stage, self._reason, self._act_at = stage, reason, time.monotonic() + pause


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
