"""Engine, devices, memory and passes of each read, before anything loads."""
