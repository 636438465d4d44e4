"""Types, errors, clocks and models shared by every part of Baton. Standard library and numpy only."""
