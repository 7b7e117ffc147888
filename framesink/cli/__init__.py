"""The command line: `framesink` and `build-engines`."""
