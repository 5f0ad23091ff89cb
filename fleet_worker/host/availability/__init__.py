"""The owner of a host comes first: when its nodes may work, and what keeps it awake while they do.

Files in reading order:

- watcher: the thread that looks, and tells `up`
- policy: what it decides, and when it comes back
- readings: what the settings ask for; probes: the four questions; linux, macos: their answers
- sleep_notice: the machine goes to sleep; mac_sleep: how macOS tells that
- keep_awake: it does not, while a node works
"""
