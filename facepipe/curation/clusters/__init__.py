"""Group faces into persons, and keep the groups up to date as faces come and go."""
