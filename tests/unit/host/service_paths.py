"""Paths that the file of a service has to name as they are."""

from pathlib import Path

CONFIG = Path("/etc/fleet/worker.toml")
LOG = Path("/Users/op/Library/Logs/fleet-worker/up.log")
PYTHON = "/opt/fleet/bin/python3"
FOLDERS = ["plain", "with a space", "100%h %n", "größer 東京 🚢", "$HOME ${HOME}", "a;b # c", "&amp; <b>"]
QUOTES = ['say "hi"', "it's", "back\\slash \\n"]
