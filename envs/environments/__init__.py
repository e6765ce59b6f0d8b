"""The Gymnasium environments, one a file, their shells, rewards and rendering."""
