"""The paper's tables: what they need is run, and set beside the paper's figures."""
