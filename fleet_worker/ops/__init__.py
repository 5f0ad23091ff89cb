"""What an operator asks: status, drain, doctor.

May import: everything but `cli`, `celery` and `demo`. Read in this order: `status`, `snapshot`, `drain`, `doctor`,
`findings`, `broker_checks`, `server_checks`, `terminal`.
"""
