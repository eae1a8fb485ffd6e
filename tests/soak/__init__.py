"""Killing real runs with SIGKILL, restarting them, and comparing the end with that of a run nobody disturbed.

``nursery`` forks processes that have everything imported, ``probe`` tells from inside where such a process is and stops
it where a kill is wanted, ``world`` makes the runs and compares their ends, ``campaign`` kills one process at a time,
``pair`` one of two, ``shell`` the real commands. ``python -m soak`` is ``make soak``.
"""
