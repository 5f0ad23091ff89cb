"""`fleet-worker demo`: a real fleet with small models on this machine.

May import: everything but `cli`, `celery` and `ops`. Read in this order: `run`, `children`, `gateway`,
`lines_to_paste`, `models`, `gguf`, `embedding_server`.
"""
