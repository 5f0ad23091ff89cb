"""The owner of a host comes first: when its nodes may work, and what keeps it awake while they do.

Files in reading order: watcher, keep_awake.
"""
