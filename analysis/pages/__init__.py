"""What is read outside a terminal: the report, the published data card, gate reports."""
