"""Clock, devices, journal, checkpoints, signals: what touches the machine."""
