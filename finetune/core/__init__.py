"""What every folder may use: types, errors, random numbers, files, checksums, and the processes of a launch."""
