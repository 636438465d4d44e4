"""What a simulation run is shown as: figures, plots, a page."""
