"""The owner of a host comes first: when its nodes may work, and what keeps the host awake while they do.

Read in this order: `watcher`, `policy`, `readings`, `probes`, `linux`, `macos`, `sleep_notice`, `mac_sleep`,
`keep_awake`, `held_process`.
"""
