"""Who may use the fleet, how much of it, and who has used what.

In reading order: `keys` with `key`; `quotas` with `quota_texts`, `counts`, `shared_counts` and `count_scripts`;
`ledger` with `ledger_file`; `usage` with `usage_listing`.
"""
