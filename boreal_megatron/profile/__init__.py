"""Where a step's time goes: timers for every run (`timers`, `rates`), and `boreal profile`."""
