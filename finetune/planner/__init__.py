"""How much memory and time a run needs, from its model's JSON alone, and which memory techniques make it fit."""
