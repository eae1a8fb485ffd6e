"""A run as YAML: its sections, its faults with line and fix, and the rules that no section can see alone."""
