"""What stands beside the main path: reports, the quickstart."""
