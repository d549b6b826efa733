"""What behaviour established once about an architecture, read without torch."""
