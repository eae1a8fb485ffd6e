"""The command line: a function per verb, a first configuration from templates, and the standard streams."""
