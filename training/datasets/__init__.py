"""Adapters that read data sets into lists of labelled images, one module each."""
