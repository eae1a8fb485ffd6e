"""From raw footage to a dataset: scenes, filters, clips, and a ledger that accounts for every second of it."""
