"""medgpt: from medical text to an aligned medical language model, and its service."""

__version__ = "0.1.0"
