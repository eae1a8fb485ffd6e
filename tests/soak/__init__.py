"""Killing real runs with SIGKILL, restarting them, and comparing the end with that of a run nobody disturbed.

``processes`` forks processes that have everything imported, ``probe`` tells from inside where such a process is and
stops it where a kill is wanted, ``jobs`` starts one or two of them, or the commands that users type, and kills one,
``world`` makes the runs and compares their ends, ``kills`` goes on until it was often enough. ``python -m soak`` is
``make soak``.
"""
