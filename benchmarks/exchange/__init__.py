"""Three exchanges of tokens between ranks, and a model of their cost."""
