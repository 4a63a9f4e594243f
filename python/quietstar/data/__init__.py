"""Texts and thoughts to train on."""
