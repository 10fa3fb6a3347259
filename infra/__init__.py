"""The servers that a team shares; README.md tells how they are started."""
