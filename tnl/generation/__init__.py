"""Text generation with a constant-size recurrent state."""
