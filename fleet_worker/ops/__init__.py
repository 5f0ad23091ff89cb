"""The commands of an operator: status, drain, restart, doctor.

May import: everything except `cli`, `setup`, `celery` and `demo`. Read in this order: `commands`, `status`, `snapshot`,
`node_control`, `drain`, `restart`, `rolling_restart`, `restart_control`, `doctor`, `clocks`, `cache_checks`,
`quarantine_checks`, `findings`, `broker_checks`, `rights_checks`, `tls_checks`, `server_checks`, `managed_checks`,
`host_checks`, `availability_checks`, `waiting_notice`.
"""
