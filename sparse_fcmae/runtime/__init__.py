"""What everything stands on: errors, options, files, devices, and the random streams."""
