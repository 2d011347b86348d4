"""What every other package may use: devices, memory, timers and files. Imports nothing of ours but `errors`."""
