"""Settings: their sources and checks, and values that can change at run time.

Imports `runtime` and `errors` only: every other folder reads settings. Start with
`configuration.py`; `options.py` checks the options of `cache`, `secret_keys.py` finds the secret.
"""
