"""Adapters from data set folders to one list of labelled images, a file each."""
