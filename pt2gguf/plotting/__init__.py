"""Pictures of single weight matrices."""
