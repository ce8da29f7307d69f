"""What a person or a scheduler starts. A command parses, calls one function, prints, and returns an exit code."""
