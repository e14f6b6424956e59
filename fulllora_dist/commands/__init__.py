"""The command lines, one file a command, and their exit codes."""
