"""What was decoded, token by token: a record of every episode, in files of columns."""
