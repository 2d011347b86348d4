"""The checks and measurements of a machine with a GPU, in four parts; see `command`."""
