"""The preference data people have: every layout read into Pair rows, checked and shown."""
