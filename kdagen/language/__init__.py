"""What the body of a recurrence is written in: nodes, the functions on them, annotations of arguments."""
