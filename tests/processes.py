"""The processes of this machine, as `ps` lists them."""

import subprocess


def processes():
    """Parent and command line of all that are alive, by process id."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listed.stdout.splitlines()]
    return {int(row[0]): (int(row[1]), row[-1]) for row in rows if row[2][0] != "Z"}


def descendants(pid):
    """The command lines of its children, and of theirs, by process id."""
    alive, found = processes(), {pid}
    while more := {each for each, (parent, _) in alive.items() if parent in found} - found:
        found |= more
    return {each: alive[each][1] for each in found - {pid}}
