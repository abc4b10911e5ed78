"""Settings: where they come from, what each must look like, and values that change while running.

Imports `runtime` and `errors` only: every other folder reads settings.
Start with `configuration.py`; `options.py` checks what `cache` accepts, `secret_keys.py` finds
the secret.
"""
