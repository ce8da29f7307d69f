"""Find wrong identity labels: estimate who each face is, how sure that is, and decide what to do about it."""
