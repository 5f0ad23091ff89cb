"""`fleet-worker demo`: a real fleet with small models on this machine.

May import: everything but `cli`, `celery` and `ops`. Read in this order: `run`, `children`, `gateway`, `models`,
`gguf`, `embedding_server`.
"""
