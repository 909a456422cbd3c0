"""Where the world can fail us: disk, hub, network."""
