"""What `dan-fast COMMAND` does, where the command is not a room of its own as `sweep`, `report` and `bench` are."""
