"""Choice of schedules."""
