"""What `dan-fast COMMAND` does, where it is not the whole of another room."""
