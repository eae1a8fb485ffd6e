"""Fuzzing: functions that take bytes and raise only on a bug, seeds to start from, and a runner (``run.py``).

``make test`` drives them for seconds with hypothesis (``tests/test_fuzz.py``), ``make soak`` for minutes:
``python -m tests.fuzz.run --seconds 600 --output fuzz.json``.
"""
