"""The training room: the loop, checkpoints, several processes, metrics, and the arithmetic chosen for this machine."""
