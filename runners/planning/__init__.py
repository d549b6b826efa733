"""Engine, devices, memory, passes and time of each read, before anything loads."""
