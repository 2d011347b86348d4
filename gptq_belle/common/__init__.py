"""Devices, memory, timers and files, for every other package. Imports only `gptq_belle.errors`."""
