"""What a run was and what came of it, as one page: curves, samples, clips, settings, and what to do next."""
