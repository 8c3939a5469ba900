"""Nothing here is for pytest: ``make ascend-check`` runs ``check.py``, in environments of its own."""

collect_ignore_glob = ["*.py"]
