"""What everything stands on: messages, signals, devices, seeds, atomic files."""
