"""The server: one process, one device, the recurrent state of every running episode."""
