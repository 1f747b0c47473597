"""Actors of Ray that each hold a model."""
