"""What a report says of a plan: made here, drawn by the terminal, the HTML page and JSON alike."""
