"""Tables, plots and the demo."""
