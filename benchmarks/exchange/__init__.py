"""Three exchanges of tokens between ranks, and a model of what they cost."""
