"""The policy: loading a language model, or building and warming up a small one from scratch."""
