"""Recipes that ship with steadynorm: they run offline, on real data."""
