"""The doctor: what training will see of a dataset, and what is wrong with it, before anything is paid for."""
