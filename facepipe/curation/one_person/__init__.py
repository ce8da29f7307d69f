"""Judge whether two groups of faces are one person: likelihoods from the corpus itself, and a probability per pair."""
